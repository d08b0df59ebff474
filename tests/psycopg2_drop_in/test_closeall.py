"""`closeall`: everything is closed, in use or not, and the pool is of no further use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kit.threads import in_thread
from kit.waiting import eventually_blocking

import asyncpool.psycopg2 as psycopg2
from asyncpool.psycopg2.pool import (
    PersistentConnectionPool,
    PoolError,
    SimpleConnectionPool,
    ThreadedConnectionPool,
)

from .pools import closing, stats_of, value

if TYPE_CHECKING:
    from kit.servers import Admin

CLOSED = "^connection pool is closed$"


@pytest.mark.parametrize("pool_class", [SimpleConnectionPool, ThreadedConnectionPool, PersistentConnectionPool])
def test_connections_in_use_are_closed_too_and_in_silence(
    dsn: str,
    admin: Admin,
    application_name: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    pool_class: type[Any],
) -> None:
    pool = pool_class(3, 5, dsn)
    conn = pool.getconn()
    cursor = conn.cursor()
    cursor.execute("select 1")
    pool.closeall()
    assert admin.sessions(application_name) == 0
    assert pool.closed
    assert conn.closed
    with pytest.raises(psycopg2.OperationalError):
        cursor.execute("select 1")
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    assert capfd.readouterr() == ("", "")


def test_a_statement_that_runs_is_ended(dsn: str, admin: Admin, application_name: str) -> None:
    pool = ThreadedConnectionPool(1, 1, dsn)
    conn = pool.getconn()
    running = in_thread(lambda: conn.cursor().execute("select pg_sleep(600)"))
    eventually_blocking(lambda: admin.states(application_name) == ["active"])
    pool.closeall()
    assert isinstance(running.error(), psycopg2.OperationalError)
    assert admin.sessions(application_name) == 0


@pytest.mark.parametrize("pool_class", [SimpleConnectionPool, ThreadedConnectionPool, PersistentConnectionPool])
def test_after_it_everything_is_refused(dsn: str, pool_class: type[Any]) -> None:
    pool = pool_class(1, 2, dsn)
    conn = pool.getconn()
    pool.closeall()
    with pytest.raises(PoolError, match=CLOSED):
        pool.closeall()
    with pytest.raises(PoolError, match=CLOSED):
        pool.getconn()
    for close in (False, True):
        with pytest.raises(PoolError, match=CLOSED):
            pool.putconn(conn, close=close)
    assert stats_of(pool).size == 0


def test_who_waits_for_a_connection_is_refused(dsn: str) -> None:
    pool = ThreadedConnectionPool(1, 1, dsn, timeout=20)
    conn = pool.getconn()
    waiting = in_thread(pool.getconn)
    eventually_blocking(lambda: stats_of(pool).waiting == 1)
    pool.closeall()
    error = waiting.error()
    assert isinstance(error, PoolError)
    assert str(error) == "connection pool is closed"
    assert conn.closed


def test_of_threads_that_close_together_one_does_and_nobody_hangs(
    dsn: str, admin: Admin, application_name: str
) -> None:
    for _ in range(5):
        pool = ThreadedConnectionPool(2, 2, dsn)
        conn = pool.getconn()
        runnings = [in_thread(pool.closeall) for _ in range(4)]
        errors = [error for running in runnings if (error := running.error()) is not None]
        assert all(isinstance(error, PoolError) for error in errors)
        assert len(errors) == 3
        assert conn.closed
        assert admin.sessions(application_name) == 0


def test_closed_may_be_set_as_well_as_read(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        pool.closed = True
        with pytest.raises(PoolError, match=CLOSED):
            pool.getconn()
        pool.closed = False
        conn = pool.getconn()
        assert value(conn, "select 1") == 1
        pool.putconn(conn)


def test_a_closed_pool_cannot_be_talked_into_life_again(dsn: str) -> None:
    pool = ThreadedConnectionPool(1, 1, dsn)
    pool.closeall()
    pool.closed = False
    with pytest.raises(PoolError, match=CLOSED):
        pool.getconn()
    pool.closeall()
