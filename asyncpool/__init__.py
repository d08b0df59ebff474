"""asyncpool: a PostgreSQL connection pool for asyncio and for threads, on psycopg 3."""

from __future__ import annotations

from .errors import PoolClosed, PoolDeadlock, PoolError, PoolTimeout, TooManyWaiting, WrongLoop
from .events import CloseReason, Holder, PoolStats
from .pool import Pool
from .sync import SyncPool

__all__ = [
    "CloseReason",
    "Holder",
    "Pool",
    "PoolClosed",
    "PoolDeadlock",
    "PoolError",
    "PoolStats",
    "PoolTimeout",
    "SyncPool",
    "TooManyWaiting",
    "WrongLoop",
]
