"""The part of psycopg2 that scripts with a connection pool use, on psycopg 3 and asyncpool.

`import asyncpool.psycopg2 as psycopg2` in place of `import psycopg2`, or `from asyncpool.psycopg2 import pool` in place
of `from psycopg2 import pool`.
"""

from __future__ import annotations

from psycopg import (
    BINARY,
    DATETIME,
    NUMBER,
    ROWID,
    STRING,
    Binary,
    DatabaseError,
    DataError,
    Date,
    DateFromTicks,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    Time,
    TimeFromTicks,
    Timestamp,
    TimestampFromTicks,
    Warning,  # noqa: A004  # PEP 249 calls it so
)

from . import absent, errors, pool, sql
from .connection import connect

apilevel = "2.0"
threadsafety = 2
paramstyle = "pyformat"

__all__ = [
    "BINARY",
    "DATETIME",
    "NUMBER",
    "ROWID",
    "STRING",
    "Binary",
    "DataError",
    "DatabaseError",
    "Date",
    "DateFromTicks",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "Time",
    "TimeFromTicks",
    "Timestamp",
    "TimestampFromTicks",
    "Warning",
    "apilevel",
    "connect",
    "errors",
    "paramstyle",
    "pool",
    "sql",
    "threadsafety",
]


def __getattr__(name: str) -> object:
    if name in ("extras", "extensions"):
        raise AttributeError(absent.what_to_use_for(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
