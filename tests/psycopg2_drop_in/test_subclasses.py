"""The classes as base classes, in the ways in which psycopg2's are derived from."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from kit.threads import in_threads
from kit.waiting import eventually_blocking

from asyncpool.psycopg2.pool import AbstractConnectionPool, PoolError, SimpleConnectionPool, ThreadedConnectionPool

from .pools import assert_unharmed, closing, pid_of, stats_of, value, wait_until_idle

if TYPE_CHECKING:
    from kit.servers import Admin

    from asyncpool.psycopg2.connection import LegacyConnection


class SemaphorePool(ThreadedConnectionPool):
    """The best known recipe: who finds all connections in use waits."""

    def __init__(self, minconn: int, maxconn: int, *args: Any, **kwargs: Any) -> None:
        self._semaphore = threading.Semaphore(maxconn)
        super().__init__(minconn, maxconn, *args, **kwargs)

    def getconn(self, *args: Any, **kwargs: Any) -> LegacyConnection:
        self._semaphore.acquire()
        try:
            return super().getconn(*args, **kwargs)
        except BaseException:
            self._semaphore.release()
            raise

    def putconn(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().putconn(*args, **kwargs)
        finally:
            self._semaphore.release()


class LockedPool(AbstractConnectionPool):
    """What psycopg2's own threaded pool looks like."""

    def __init__(self, minconn: int, maxconn: int, *args: Any, **kwargs: Any) -> None:
        AbstractConnectionPool.__init__(self, minconn, maxconn, *args, **kwargs)
        self._lock = threading.Lock()

    def getconn(self, key: Any = None) -> LegacyConnection:
        with self._lock:
            return self._getconn(key)

    def putconn(self, conn: Any = None, key: Any = None, close: bool = False) -> None:
        with self._lock:
            self._putconn(conn, key, close)

    def closeall(self) -> None:
        with self._lock:
            self._closeall()


def test_a_pool_with_a_semaphore_never_finds_itself_exhausted(dsn: str) -> None:
    def work() -> None:
        for number in range(25):
            conn = pool.getconn()
            try:
                assert value(conn, "select %s", (number,)) == number
            finally:
                pool.putconn(conn, close=number % 5 == 0)

    with closing(SemaphorePool(1, 3, dsn)) as pool:
        for running in in_threads(10, work):
            running.result()
        assert_unharmed(pool)


def test_a_pool_with_a_lock_of_its_own_works_as_the_one_it_imitates(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = LockedPool(1, 2, dsn)
    conn, keyed = pool.getconn(), pool.getconn("key")
    assert pool.getconn("key") is keyed
    with pytest.raises(PoolError, match="exhausted"):
        pool.getconn()
    pool.putconn(conn)
    pool.putconn(keyed, key="key", close=True)
    with pytest.raises(PoolError, match="unkeyed"):
        pool.putconn()
    pool.closeall()
    assert admin.sessions(application_name) == 0
    with pytest.raises(PoolError, match="closed"):
        pool.closeall()


def test_a_pool_may_count_and_pass_on_by_super(dsn: str) -> None:
    class Counting(SimpleConnectionPool):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.calls: list[str] = []

        def getconn(self, key: Any = None) -> LegacyConnection:
            self.calls.append("get")
            return super().getconn(key)

        def putconn(self, conn: LegacyConnection, key: Any = None, close: bool = False) -> None:
            self.calls.append("put")
            super().putconn(conn, key, close)

        def closeall(self) -> None:
            self.calls.append("close")
            super().closeall()

    pool = Counting(1, 1, dsn)
    pool.putconn(pool.getconn("key"), "key")
    pool.closeall()
    assert pool.calls == ["get", "put", "close"]


def test_a_pool_that_wants_to_connect_by_itself_is_told_that_it_may_not(dsn: str) -> None:
    class Connecting(ThreadedConnectionPool):
        def _connect(self, key: Any = None) -> None:
            raise AssertionError("nobody calls this")

    with pytest.raises(TypeError, match="_connect is not called here: use configure="):
        Connecting(1, 1, dsn)


# --- sizes --------------------------------------------------------------------------------------------------


def test_maxconn_may_be_raised(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        first = pool.getconn("first")
        with pytest.raises(PoolError, match="exhausted"):
            pool.getconn("second")
        pool.maxconn = 2
        assert pool.maxconn == 2
        second = pool.getconn("second")
        assert second is not first


def test_maxconn_may_be_lowered_also_below_minconn(dsn: str, admin: Admin, application_name: str) -> None:
    with closing(ThreadedConnectionPool(3, 3, dsn)) as pool:
        pool.maxconn = 1
        eventually_blocking(lambda: admin.sessions(application_name) == 1)
        assert (pool.minconn, pool.maxconn) == (3, 1)
        conn = pool.getconn()
        with pytest.raises(PoolError, match="exhausted"):
            pool.getconn()
        pool.putconn(conn)


def test_minconn_may_be_raised_also_before_maxconn(dsn: str, admin: Admin, application_name: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        pool.minconn = 3
        pool.maxconn = 3
        eventually_blocking(lambda: admin.sessions(application_name) == 3)
        wait_until_idle(pool, 3)


@pytest.mark.parametrize(("size", "number"), [("minconn", -1), ("maxconn", 0)])
def test_a_size_that_cannot_be_is_refused_and_the_old_one_stays(dsn: str, size: str, number: int) -> None:
    with closing(ThreadedConnectionPool(1, 2, dsn)) as pool:
        with pytest.raises(ValueError, match=size):
            setattr(pool, size, number)
        assert (pool.minconn, pool.maxconn) == (1, 2)
        assert (stats_of(pool).min_size, stats_of(pool).max_size) == (1, 2)
        conn = pool.getconn()
        assert pid_of(conn)
        pool.putconn(conn)
