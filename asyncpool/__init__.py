"""asyncpool: a PostgreSQL connection pool for asyncio and for threads, on psycopg 3."""

from __future__ import annotations

from .errors import (
    CommitOutcomeUnknown,
    PoolClosed,
    PoolDeadlock,
    PoolError,
    PoolTimeout,
    StatementOutcomeUnknown,
    StatementTimeout,
    TooManyWaiting,
    WrongLoop,
)
from .events import CloseReason, CommitStatus, Holder, PoolStats
from .histogram import Histogram
from .pool import Pool
from .sync import SyncPool

__version__ = "0.1.0"

__all__ = [
    "CloseReason",
    "CommitOutcomeUnknown",
    "CommitStatus",
    "Histogram",
    "Holder",
    "Pool",
    "PoolClosed",
    "PoolDeadlock",
    "PoolError",
    "PoolStats",
    "PoolTimeout",
    "StatementOutcomeUnknown",
    "StatementTimeout",
    "SyncPool",
    "TooManyWaiting",
    "WrongLoop",
]
