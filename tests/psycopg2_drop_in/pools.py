"""What these tests do with pools and connections again and again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from kit.waiting import eventually_blocking

from asyncpool.psycopg2.pool import AbstractConnectionPool, ThreadedConnectionPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool import PoolStats
    from asyncpool.psycopg2.connection import LegacyConnection

P = TypeVar("P", bound=AbstractConnectionPool)


@contextmanager
def closing(pool: P) -> Iterator[P]:
    """A pool that is closed at the end of the block, unless it was closed in it."""
    try:
        yield pool
    finally:
        if not pool.closed:
            pool._closeall()


def stats_of(pool: AbstractConnectionPool) -> PoolStats:
    """What the pool behind it counts."""
    return pool._sync_pool.stats()


def value(conn: Any, query: str, parameters: Any = None) -> Any:
    """The first column of the first row, as psycopg2's users ask for it."""
    cursor = conn.cursor()
    cursor.execute(query, parameters)
    return cursor.fetchone()[0]


def pid_of(conn: LegacyConnection) -> int:
    """The server's process behind it."""
    return conn.info.backend_pid


def wait_until_idle(pool: AbstractConnectionPool, count: int) -> None:
    """Wait until so many connections lie in the pool."""
    eventually_blocking(lambda: stats_of(pool).idle == count)


def assert_unharmed(pool: ThreadedConnectionPool) -> None:
    """All its places can be taken, used and given back."""
    conns = [pool.getconn() for _ in range(pool.maxconn)]
    for conn in conns:
        assert value(conn, "select 1") == 1
    for conn in conns:
        pool.putconn(conn)
    wait_until_idle(pool, pool.maxconn)
