"""What these tests do with pools and connections again and again."""

from __future__ import annotations

import inspect
import logging
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from asyncpool import PoolError, SyncPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

Connection = psycopg.Connection[Any]

FOREVER = 1000.0


def first_value(conn: Connection, query: str, parameters: tuple[Any, ...] = ()) -> Any:
    """The first column of the first row, as rows of any kind give it."""
    row: Any = conn.execute(query.encode(), parameters).fetchone()
    return next(iter(row.values())) if isinstance(row, dict) else row[0]


def insert(conn: Connection, table: str, number: int = 1) -> None:
    """A row, in the connection's transaction."""
    conn.execute(sql.SQL("insert into {} values (%s)").format(sql.Identifier(table)), [number])


def assert_unharmed(pool: SyncPool[Connection]) -> None:
    """All its places can be taken, used and given back."""
    conns = [pool.getconn(timeout=10) for _ in range(pool.stats().max_size)]
    for conn in conns:
        assert first_value(conn, "select 1") == 1
        conn.rollback()
    for conn in conns:
        pool.putconn(conn)
    assert pool.stats().leased == 0


def line_here() -> int:
    """The line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package has warned of through its logger."""
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "asyncpool"]


def loop_threads() -> list[threading.Thread]:
    """The threads of background event loops."""
    return [thread for thread in threading.enumerate() if thread.name == "asyncpool: event loop"]


@contextmanager
def exhausted(dsn: str, **options: Any) -> Iterator[tuple[SyncPool[Connection], Connection]]:
    """A pool of one connection, and that connection, leased."""
    with SyncPool[Connection](dsn, min_size=1, max_size=1, **options) as pool:
        connection = pool.getconn()
        try:
            yield pool, connection
        finally:
            with suppress(PoolError):  # given back in the test
                pool.putconn(connection)
