"""`getconn`: at once or not at all, unless it is told to wait; keys; the connection used last comes first."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking

import asyncpool.psycopg2 as psycopg2
from asyncpool.psycopg2.pool import AbstractConnectionPool, PoolError, SimpleConnectionPool, ThreadedConnectionPool

from .pools import assert_unharmed, closing, pid_of, stats_of, value, wait_until_idle

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kit.servers import Admin

    from asyncpool.cli.embedded import EmbeddedServer

EXHAUSTED = "^connection pool exhausted$"


@pytest.mark.parametrize("pool_class", [SimpleConnectionPool, ThreadedConnectionPool])
def test_when_all_are_in_use_it_raises_at_once(
    dsn: str, pool_class: type[SimpleConnectionPool | ThreadedConnectionPool]
) -> None:
    with closing(pool_class(1, 2, dsn)) as pool:
        conns = [pool.getconn(), pool.getconn()]
        began = time.monotonic()
        for _ in range(50):
            with pytest.raises(PoolError, match=EXHAUSTED):
                pool.getconn()
        assert time.monotonic() - began < 5
        assert stats_of(pool).size == 2
        for conn in conns:
            pool.putconn(conn)


def test_the_refusal_shows_no_error_of_the_pool_behind_it(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        with pytest.raises(PoolError) as caught:
            pool.getconn()
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        pool.putconn(conn)


def test_one_that_is_being_closed_is_waited_for_many_times_in_a_row(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        pids = set()
        for _ in range(30):
            conn = pool.getconn()
            pids.add(pid_of(conn))
            pool.putconn(conn, close=True)
            assert admin.sessions(application_name) <= 1
        assert len(pids) == 30
        assert_unharmed(pool)


def test_one_that_is_being_rolled_back_is_waited_for_many_times_in_a_row(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        for _ in range(100):
            conn = pool.getconn()
            assert value(conn, "select 1") == 1
            pool.putconn(conn)
        wait_until_idle(pool, 1)
        assert stats_of(pool).connects == 1


def test_connections_that_are_just_being_made_are_waited_for(dsn: str) -> None:
    with closing(ThreadedConnectionPool(0, 8, dsn)) as pool:
        conns = [running.result() for running in in_threads(8, pool.getconn)]
        assert len(set(conns)) == 8
        with pytest.raises(PoolError, match=EXHAUSTED):
            pool.getconn()
        for conn in conns:
            pool.putconn(conn)


def test_threads_that_come_together_get_all_places_and_not_one_more(dsn: str) -> None:
    def get() -> Any:
        try:
            return pool.getconn()
        except PoolError:
            return None

    with closing(ThreadedConnectionPool(0, 3, dsn)) as pool:
        for _ in range(10):
            conns = [conn for running in in_threads(8, get) if (conn := running.result()) is not None]
            assert len(set(conns)) == len(conns) == 3
            for conn in conns:
                pool.putconn(conn, close=True)


# --- waiting ------------------------------------------------------------------------------------------------


def test_with_a_timeout_it_waits_until_one_comes_back(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn, timeout=20)) as pool:
        conn = pool.getconn()
        waiting = in_thread(pool.getconn)
        eventually_blocking(lambda: stats_of(pool).waiting == 1)
        assert not waiting.done
        pool.putconn(conn)
        assert pid_of(waiting.result()) == pid_of(conn)
        pool.putconn(conn)


@pytest.mark.parametrize("key", [None, "key"])
def test_with_a_timeout_it_raises_as_ever_when_that_is_over(dsn: str, key: Hashable) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn, timeout=0.2)) as pool:
        conn = pool.getconn()
        began = time.monotonic()
        with pytest.raises(PoolError, match=EXHAUSTED):
            pool.getconn(key)
        assert 0.2 <= time.monotonic() - began < 2
        pool.putconn(conn)


def test_a_timeout_of_0_does_not_wait(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn, timeout=0)) as pool:
        conn = pool.getconn()
        with pytest.raises(PoolError, match=EXHAUSTED):
            pool.getconn()
        pool.putconn(conn)


def test_many_threads_share_few_connections_when_they_wait(dsn: str) -> None:
    def work() -> None:
        for number in range(20):
            conn = pool.getconn()
            try:
                assert value(conn, "select %s", (number,)) == number
            finally:
                pool.putconn(conn)

    with closing(ThreadedConnectionPool(1, 3, dsn, timeout=20)) as pool:
        for running in in_threads(12, work):
            running.result()
        assert stats_of(pool).connects <= 3


# --- keys and order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, "", False, "orders", (1, "x")], ids=repr)
def test_the_same_key_gets_the_same_connection_until_it_is_put_back(dsn: str, key: Hashable) -> None:
    with closing(ThreadedConnectionPool(2, 3, dsn)) as pool:
        conn = pool.getconn(key)
        assert pool.getconn(key=key) is conn
        assert stats_of(pool).leased == 1
        other = pool.getconn()
        assert other is not conn
        pool.putconn(conn, key=key)
        another, fresh = pool.getconn(), pool.getconn(key)
        assert fresh is not another
        assert stats_of(pool).leased == 3


def test_a_key_gets_its_connection_also_when_all_are_in_use(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn("mine")
        assert pool.getconn("mine") is conn
        with pytest.raises(PoolError, match=EXHAUSTED):
            pool.getconn("yours")
        with pytest.raises(PoolError, match=EXHAUSTED):
            pool.getconn()
        pool.putconn(conn, "mine")
        assert pool.getconn("yours") is not None


def test_threads_with_one_key_get_one_connection(dsn: str) -> None:
    with closing(ThreadedConnectionPool(0, 1, dsn)) as pool:
        conns = {running.result() for running in in_threads(6, lambda: pool.getconn("key"))}
        assert len(conns) == 1
        pool.putconn(conns.pop())


def test_the_connection_that_came_back_last_is_the_first_to_go_out(dsn: str) -> None:
    with closing(ThreadedConnectionPool(3, 3, dsn)) as pool:
        conns = [pool.getconn() for _ in range(3)]
        order = [conns[1], conns[0], conns[2]]
        for conn in order:
            pool.putconn(conn)
        again = [pool.getconn() for _ in range(3)]
        assert [pid_of(conn) for conn in again] == [pid_of(conn) for conn in reversed(order)]


# --- a server that goes away --------------------------------------------------------------------------------


def test_connections_that_the_server_has_ended_are_never_handed_out(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with closing(ThreadedConnectionPool(2, 2, dsn)) as pool:
        for _ in range(10):
            admin.terminate(*admin.pids(application_name))
            conns = [pool.getconn(), pool.getconn()]
            for conn in conns:
                assert value(conn, "select 1") == 1
            for conn in conns:
                pool.putconn(conn)
            wait_until_idle(pool, 2)


def test_while_the_server_is_away_it_raises_an_operational_error_that_says_so(
    private_server: EmbeddedServer, private_dsn: str
) -> None:
    with closing(ThreadedConnectionPool(1, 2, private_dsn, timeout=1)) as pool:
        private_server.stop()
        with pytest.raises(psycopg2.OperationalError) as caught:
            pool.getconn()
        assert not isinstance(caught.value, PoolError)
        assert "exhausted" not in str(caught.value)
        private_server.start()
        conn: Any = eventually_blocking(lambda: connection_of(pool))
        assert value(conn, "select 1") == 1
        pool.putconn(conn)


def connection_of(pool: AbstractConnectionPool) -> Any:
    """A connection, or None if the server is not there yet."""
    try:
        return pool._getconn()
    except psycopg2.OperationalError:
        return None


def test_while_the_server_is_away_it_raises_the_connect_error_at_once(private_server: EmbeddedServer) -> None:
    with closing(ThreadedConnectionPool(0, 2, private_server.dsn())) as pool:
        pool.putconn(pool.getconn(), close=True)
        private_server.stop()
        began = time.monotonic()
        with pytest.raises(psycopg2.OperationalError, match="connection failed"):
            pool.getconn()
        assert time.monotonic() - began < 5
