"""`PersistentConnectionPool`: the calling thread is the key."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import CloseReason
from asyncpool.psycopg2.pool import PersistentConnectionPool, PoolError

from .pools import closing, pid_of, stats_of, value, wait_until_idle

if TYPE_CHECKING:
    from kit.servers import Admin

EXHAUSTED = "^connection pool exhausted$"
UNKEYED = "^trying to put unkeyed connection$"


def test_a_thread_gets_the_same_connection_until_it_puts_it_back(dsn: str) -> None:
    with closing(PersistentConnectionPool(1, 3, dsn)) as pool:
        conn = pool.getconn()
        assert all(pool.getconn() is conn for _ in range(5))
        assert value(conn, "select 1") == 1
        assert pool.getconn() is conn
        assert stats_of(pool).leased == 1
        pool.putconn(conn)
        assert stats_of(pool).leased == 0
        wait_until_idle(pool, 1)
        again = pool.getconn()
        assert stats_of(pool).leased == 1
        pool.putconn(again)


def test_each_thread_has_its_own(dsn: str) -> None:
    together = threading.Barrier(4)

    def work() -> int:
        conn = pool.getconn()
        together.wait(20)
        pid = pid_of(conn)
        assert pool.getconn() is conn
        together.wait(20)
        pool.putconn()
        return pid

    with closing(PersistentConnectionPool(0, 4, dsn)) as pool:
        assert len({running.result() for running in in_threads(4, work)}) == 4
        assert stats_of(pool).leased == 0


def test_putconn_needs_no_connection_but_refuses_another_than_the_threads(dsn: str) -> None:
    with closing(PersistentConnectionPool(1, 3, dsn)) as pool, psycopg.connect(dsn) as plain:
        with pytest.raises(PoolError, match=UNKEYED):
            pool.putconn()
        conn = pool.getconn()
        nothing: Any
        for nothing in (plain, object()):
            with pytest.raises(PoolError, match=UNKEYED):
                pool.putconn(nothing)
        assert isinstance(in_thread(lambda: pool.putconn(conn)).error(), PoolError)
        assert isinstance(in_thread(pool.putconn).error(), PoolError)
        assert stats_of(pool).leased == 1
        pool.putconn()
        with pytest.raises(PoolError, match=UNKEYED):
            pool.putconn(conn)
        assert stats_of(pool).leased == 0


def test_with_close_the_thread_gets_another_one_next_time(dsn: str, admin: Admin, application_name: str) -> None:
    with closing(PersistentConnectionPool(1, 1, dsn)) as pool:
        pids = set()
        for _ in range(5):
            conn = pool.getconn()
            pids.add(pid_of(conn))
            pool.putconn(close=True)
            assert admin.sessions(application_name) <= 1
        assert len(pids) == 5


def test_a_connection_that_the_thread_has_closed_is_its_own_until_it_is_put_back(dsn: str) -> None:
    with closing(PersistentConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        conn.close()
        assert pool.getconn() is conn
        pool.putconn(conn)
        assert value(pool.getconn(), "select 1") == 1
        pool.putconn()


def test_one_thread_more_than_there_are_places_is_refused(dsn: str) -> None:
    with closing(PersistentConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        error = in_thread(pool.getconn).error()
        assert isinstance(error, PoolError)
        assert str(error) == "connection pool exhausted"
        pid = pid_of(conn)
        pool.putconn(conn)

        def borrow() -> int:
            borrowed = pid_of(pool.getconn())
            pool.putconn()
            return borrowed

        assert in_thread(borrow).result() == pid


def test_a_connection_given_back_behind_its_threads_back_is_no_longer_its_own(dsn: str) -> None:
    with closing(PersistentConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        in_thread(lambda: pool._putconn(conn)).result()
        borrowed = pool._getconn()
        with pytest.raises(PoolError, match=UNKEYED):
            pool.putconn()
        with pytest.raises(PoolError, match=EXHAUSTED):
            pool.getconn()
        assert value(borrowed, "select 1") == 1
        pool._putconn(borrowed)


def take_and_die(pool: PersistentConnectionPool) -> None:
    """A thread that has taken a connection is gone, and the pool knows it."""

    def take() -> None:
        pool.getconn()

    lost = stats_of(pool).closes.get(CloseReason.LEASE_LOST, 0)
    thread = threading.Thread(target=take)
    thread.start()
    thread.join(20)
    eventually_blocking(lambda: stats_of(pool).closes.get(CloseReason.LEASE_LOST) == lost + 1)


def test_the_place_of_a_thread_that_died_comes_back_with_a_warning_that_names_where_it_was_taken(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with closing(PersistentConnectionPool(1, 1, dsn)) as pool:
        for _ in range(3):
            with pytest.warns(ResourceWarning, match=rf"dropped without release.*{__file__}:\d+ in take"):
                take_and_die(pool)
            assert value(pool.getconn(), "select 1") == 1
            pool.putconn()
        assert admin.sessions(application_name) <= 1


def test_threads_come_and_go_with_the_connection_they_put_back(dsn: str) -> None:
    def work() -> None:
        for _ in range(10):
            conn = pool.getconn()
            assert pool.getconn() is conn
            assert value(conn, "select 1") == 1
            pool.putconn(conn)

    with closing(PersistentConnectionPool(1, 4, dsn, timeout=20)) as pool:
        for _ in range(3):
            for running in in_threads(8, work):
                running.result()
        assert stats_of(pool).connects <= 4
        assert stats_of(pool).leased == 0
