"""asyncpool: a PostgreSQL connection pool for asyncio, on psycopg 3."""

from __future__ import annotations

from .errors import PoolClosed, PoolError, PoolTimeout, TooManyWaiting, WrongLoop
from .events import CloseReason, Holder, PoolStats
from .pool import Pool

__all__ = [
    "CloseReason",
    "Holder",
    "Pool",
    "PoolClosed",
    "PoolError",
    "PoolStats",
    "PoolTimeout",
    "TooManyWaiting",
    "WrongLoop",
]
