"""`putconn`: what comes back is clean, closed or refused, and its place is free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually_blocking

import asyncpool.psycopg2 as psycopg2
from asyncpool import CloseReason
from asyncpool.psycopg2.pool import PoolError, ThreadedConnectionPool

from .pools import assert_unharmed, closing, pid_of, stats_of, value, wait_until_idle

if TYPE_CHECKING:
    from kit.servers import Admin

UNKEYED = "^trying to put unkeyed connection$"


def insert(conn: Any, table: str) -> None:
    conn.cursor().execute(f"insert into {table} values (1)")


def test_what_was_not_committed_is_rolled_back(
    dsn: str, admin: Admin, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        for _ in range(3):
            conn = pool.getconn()
            assert value(conn, f"select count(*) from {table}") == 0
            insert(conn, table)
            pool.putconn(conn)
        wait_until_idle(pool, 1)
        assert admin.value(f"select count(*) from {table}") == 0
        assert stats_of(pool).connects == 1
    assert caplog.messages == []  # as everybody does it with psycopg2


def test_what_was_committed_stays(dsn: str, admin: Admin, table: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        insert(conn, table)
        conn.commit()
        pool.putconn(conn)
        assert admin.value(f"select count(*) from {table}") == 1


def test_a_failed_transaction_is_rolled_back(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        with pytest.raises(psycopg2.ProgrammingError):
            conn.cursor().execute("nonsense")
        pool.putconn(conn)
        assert_unharmed(pool)
        assert stats_of(pool).connects == 1


def test_settings_of_the_connection_do_not_reach_its_next_user(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn: Any = pool.getconn()
        pid = pid_of(conn)
        conn.readonly = True
        conn.set_isolation_level(3)
        conn.autocommit = True
        pool.putconn(conn)
        conn = pool.getconn()
        assert pid_of(conn) == pid
        assert (conn.autocommit, conn.readonly, conn.isolation_level) == (False, None, None)
        assert value(conn, "show transaction_read_only") == "off"
        assert value(conn, "show transaction_isolation") == "read committed"
        pool.putconn(conn)


def test_a_connection_put_back_inside_its_own_block_leaves_nothing_to_the_next_user(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn: Any = pool.getconn()
        conn.autocommit = True
        with pytest.raises(psycopg2.OperationalError, match="released"), conn:
            pool.putconn(conn)
        conn = pool.getconn()
        with conn:
            assert value(conn, "select 1") == 1
        assert conn.autocommit is False
        pool.putconn(conn)


@pytest.mark.parametrize("key", [None, "key"])
def test_with_close_it_is_closed_and_its_place_is_free(
    dsn: str, admin: Admin, application_name: str, key: str | None
) -> None:
    with closing(ThreadedConnectionPool(0, 1, dsn)) as pool:
        conn = pool.getconn(key)
        pid = pid_of(conn)
        pool.putconn(conn, key, close=True)
        eventually_blocking(lambda: admin.sessions(application_name) == 0)
        assert conn.closed
        conn = pool.getconn(key)
        assert pid_of(conn) != pid
        pool.putconn(conn, key, True)
        assert stats_of(pool).closes[CloseReason.DISCARDED] >= 1


def test_a_connection_that_its_user_has_closed_frees_its_place_when_it_is_put_back(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        for _ in range(5):
            conn = pool.getconn()
            conn.close()
            conn.close()
            assert conn.closed
            eventually_blocking(lambda: admin.sessions(application_name) == 0)
            with pytest.raises(PoolError, match="exhausted"):
                pool.getconn()
            pool.putconn(conn)
        assert_unharmed(pool)


def test_a_connection_that_broke_in_use_frees_its_place_when_it_is_put_back(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        for _ in range(3):
            conn = pool.getconn()
            assert value(conn, "select 1") == 1
            admin.terminate(pid_of(conn))
            with pytest.raises(psycopg2.OperationalError):
                conn.cursor().execute("select 1")
            assert conn.closed
            pool.putconn(conn)
        assert_unharmed(pool)


def test_connections_above_minconn_are_kept_for_max_idle_and_no_longer(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with closing(ThreadedConnectionPool(1, 3, dsn, max_idle=0.3)) as pool:
        conns = [pool.getconn() for _ in range(3)]
        for conn in conns:
            pool.putconn(conn)
        assert admin.sessions(application_name) == 3
        eventually_blocking(lambda: admin.sessions(application_name) == 1)
        assert stats_of(pool).idle == 1


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", [False, True])
def test_what_is_not_in_use_or_not_of_this_pool_is_refused_and_harms_nobody(dsn: str, close: bool) -> None:
    with (
        closing(ThreadedConnectionPool(1, 1, dsn)) as pool,
        closing(ThreadedConnectionPool(1, 1, dsn)) as other,
        psycopg.connect(dsn) as plain,
    ):
        foreign = other.getconn()
        nothing: Any
        for nothing in (None, object(), plain, foreign):
            with pytest.raises(PoolError, match=UNKEYED):
                pool.putconn(nothing, close=close)
        assert not plain.closed
        assert value(foreign, "select 1") == 1
        other.putconn(foreign)
        assert_unharmed(pool)
        assert_unharmed(other)


@pytest.mark.parametrize("close", [False, True])
def test_a_connection_put_back_twice_is_refused(dsn: str, close: bool) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        pool.putconn(conn, close=close)
        with pytest.raises(PoolError, match=UNKEYED):
            pool.putconn(conn)
        assert_unharmed(pool)


def test_a_connection_of_no_pool_is_refused(dsn: str) -> None:
    conn = psycopg2.connect(dsn)
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool, pytest.raises(PoolError, match=UNKEYED):
        pool.putconn(conn)
    assert not conn.closed
    conn.close()
