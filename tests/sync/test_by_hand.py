"""`getconn` and `putconn`: what comes back in which condition, keys, and mistakes that harm nobody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import CloseReason, Pool, PoolError, PoolTimeout, SyncPool

from .pools import assert_unharmed, exhausted, first_value, insert, warnings_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kit.servers import Admin

IDLE = psycopg.pq.TransactionStatus.IDLE


def test_a_connection_is_leased_until_it_is_put_back(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        assert isinstance(conn, psycopg.Connection)
        assert (pool.stats().leased, pool.stats().idle) == (1, 0)
        assert first_value(conn, "select 1") == 1
        conn.commit()
        pool.putconn(conn)
        assert (pool.stats().leased, pool.stats().idle) == (0, 1)


def test_a_connection_put_back_in_a_transaction_is_rolled_back_and_its_owner_told_once(
    dsn: str, admin: Admin, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        for _ in range(3):
            conn = pool.getconn()
            assert conn.info.transaction_status == IDLE
            insert(conn, table)
            pool.putconn(conn)
        eventually_blocking(lambda: pool.stats().idle == 1)
        assert admin.value(f"select count(*) from {table}") == 0
        assert pool.stats().connects == 1
    [warning] = warnings_of(caplog)
    assert "released in a transaction" in warning
    assert "in test_a_connection_put_back_in_a_transaction" in warning


def test_a_connection_put_back_in_a_failed_transaction_is_rolled_back(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        with pytest.raises(psycopg.errors.DivisionByZero):
            conn.execute("select 1/0")
        pool.putconn(conn)
        assert_unharmed(pool)
        assert pool.stats().connects == 1


def test_a_connection_put_back_to_be_closed_is_closed(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, min_size=0, max_size=1) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        pool.putconn(conn, close=True)
        assert pool.stats().closes == {CloseReason.DISCARDED: 1}
        eventually_blocking(lambda: admin.sessions(application_name) == 0)
        eventually_blocking(lambda: pool.stats().size == 0)
        assert conn.closed
        assert_unharmed(pool)
        assert admin.pids(application_name) != [pid]


def test_who_waits_gets_the_place_of_a_connection_put_back_to_be_closed(dsn: str) -> None:
    with exhausted(dsn) as (pool, conn):
        pid = conn.info.backend_pid
        waiting = in_thread(pool.getconn)
        eventually_blocking(lambda: pool.stats().waiting == 1)
        pool.putconn(conn, close=True)
        other = waiting.result()
        assert other.info.backend_pid != pid
        pool.putconn(other)


def test_a_connection_put_back_while_a_thread_runs_a_statement_on_it_is_closed(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        running = in_thread(lambda: conn.execute("select pg_sleep(600)"))
        eventually_blocking(lambda: admin.states(application_name) == ["active"])
        pool.putconn(conn)
        assert isinstance(running.error(), psycopg.OperationalError)
        with pool.acquire() as other:
            assert other.info.backend_pid != pid
        assert pool.stats().closes == {CloseReason.RETURNED_BUSY: 1}
        assert admin.sessions(application_name) == 1
    assert any("in the middle of a statement" in warning for warning in warnings_of(caplog))


def test_a_connection_put_back_to_be_closed_while_a_thread_runs_a_statement_on_it_is_closed(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        for _ in range(10):
            conn = pool.getconn()
            running = in_thread(lambda conn=conn: conn.execute("select pg_sleep(600)"))  # type: ignore[misc]
            eventually_blocking(lambda: admin.states(application_name) == ["active"])
            pool.putconn(conn, close=True)
            assert isinstance(running.error(), psycopg.OperationalError)
        assert_unharmed(pool)


# --- mistakes -----------------------------------------------------------------------------------------------


def test_a_connection_put_back_twice_is_refused_and_the_pool_unharmed(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pool.putconn(conn)
        for close in (False, True):
            with pytest.raises(PoolError, match="released"):
                pool.putconn(conn, close=close)
        assert (pool.stats().size, pool.stats().idle) == (1, 1)
        assert_unharmed(pool)
        assert pool.stats().connects == 1


@pytest.mark.parametrize("close", [False, True])
def test_what_is_no_connection_of_the_pool_is_refused_and_the_pool_unharmed(dsn: str, close: bool) -> None:
    with SyncPool(dsn, max_size=1) as pool, SyncPool(dsn, max_size=1) as other, psycopg.connect(dsn) as plain:
        foreign = other.getconn()
        nothing: Any
        for nothing in (None, object(), plain, foreign):
            with pytest.raises(PoolError, match="not of this pool"):
                pool.putconn(nothing, close=close)
        assert not plain.closed
        assert other.stats().leased == 1
        other.putconn(foreign)
        assert_unharmed(other)
        assert_unharmed(pool)


async def test_a_connection_of_an_asynchronous_pool_is_refused(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as other:
        pool = SyncPool(dsn, max_size=1)
        await asyncio.to_thread(pool.open)
        conn: Any = await other.acquire()
        with pytest.raises(PoolError, match="not of this pool"):
            pool.putconn(conn)
        with pytest.raises(PoolError, match="not of this pool"):
            pool.putconn(conn, close=True)
        assert other.stats().leased == 1
        await other.release(conn)
        await asyncio.to_thread(pool.close)


def test_a_connection_is_useless_after_its_release(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        cursor = conn.execute("select 1")
        pool.putconn(conn)
        with pytest.raises(PoolError, match="released to its pool"):
            conn.execute("select 1")
        with pytest.raises(PoolError, match="released to its pool"):
            cursor.execute("select 1")
        with pytest.raises(PoolError, match="released to its pool"):
            conn.commit()
        assert cursor.fetchone() == (1,)
        assert_unharmed(pool)


# --- after the pool was closed ------------------------------------------------------------------------------


@pytest.mark.parametrize("another_is_open", [True, False])
@pytest.mark.parametrize("close", [False, True])
def test_a_connection_that_the_closing_pool_shut_down_may_be_put_back(
    dsn: str, close: bool, another_is_open: bool
) -> None:
    other = SyncPool(dsn, max_size=1)
    if another_is_open:
        other.open()
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    conn = pool.getconn()
    pool.close(timeout=0)
    with pytest.raises(psycopg.OperationalError, match=r"closed|shut down"):
        conn.execute("select 1")
    pool.putconn(conn, close=close)
    with pytest.raises(PoolError):
        pool.putconn(conn, close=close)
    other.close()


def test_a_connection_that_the_closing_pool_shut_down_may_be_put_back_to_the_pool_opened_again(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pool.close(timeout=0)
        pool.open()
        pool.putconn(conn)
        assert (pool.stats().size, pool.stats().leased) == (1, 0)
        assert_unharmed(pool)


# --- keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, "", False, "orders", (1, "x"), frozenset({1})], ids=repr)
def test_the_same_key_gets_the_same_connection_until_it_is_put_back(dsn: str, key: Hashable) -> None:
    with SyncPool(dsn, min_size=2, max_size=3) as pool:
        conn = pool.getconn(key)
        assert pool.getconn(key) is conn
        assert pool.stats().leased == 1
        other = pool.getconn(("another", key))
        assert other is not conn
        pool.putconn(conn, key)
        assert pool.stats().leased == 1
        third = pool.getconn()
        assert pool.getconn(key) is not third
        pool.putconn(pool.getconn(key), key)
        pool.putconn(third)
        pool.putconn(other)
        assert pool.stats().leased == 0
        assert_unharmed(pool)


def test_without_a_key_every_call_gets_a_connection_of_its_own(dsn: str) -> None:
    with SyncPool(dsn, max_size=2) as pool:
        first, second = pool.getconn(), pool.getconn(None)
        assert first is not second
        pool.putconn(first)
        pool.putconn(second)


def test_a_key_is_forgotten_with_its_connection_however_that_was_put_back(dsn: str) -> None:
    with SyncPool(dsn, max_size=2) as pool:
        conn = pool.getconn("key")
        pool.putconn(conn)  # without its key
        other = pool.getconn()
        mine = pool.getconn("key")
        assert mine is not other
        mine.close()  # psycopg's way
        third = pool.getconn()
        fresh = pool.getconn("key", timeout=0) if pool.stats().leased < 2 else None
        assert fresh is None  # both places are taken, and the key has no claim on the third
        with pytest.raises(PoolTimeout):
            pool.getconn("key", timeout=0)
        pool.putconn(third)
        pool.putconn(other)


def test_a_key_is_forgotten_when_its_connection_is_put_back_to_be_closed(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn("key")
        pid = conn.info.backend_pid
        pool.putconn(conn, "key", close=True)
        conn = pool.getconn("key")
        assert conn.info.backend_pid != pid
        pool.putconn(conn)


def test_a_key_does_not_get_a_connection_that_went_to_another_key(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        first = pool.getconn("first")
        first.close()
        second = pool.getconn("second")
        with pytest.raises(PoolTimeout):
            pool.getconn("first", timeout=0)
        assert pool.getconn("second") is second
        pool.putconn(second)
        assert_unharmed(pool)


def test_a_key_is_forgotten_when_the_pool_is_closed(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        pool.getconn("key")
        pool.closeall()
        pool.open()
        conn = pool.getconn("key")
        assert first_value(conn, "select 1") == 1
        conn.rollback()
        pool.putconn(conn)


def test_a_key_must_be_hashable_and_nothing_is_taken_if_it_is_not(dsn: str) -> None:
    key: Any = []
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(TypeError, match="unhashable"):
            pool.getconn(key)
        assert pool.stats().leased == 0


def test_threads_with_one_key_get_one_connection(dsn: str) -> None:
    with SyncPool(dsn, min_size=8, max_size=8) as pool:
        for number in range(30):
            conns = [running.result() for running in in_threads(8, lambda: pool.getconn(number))]  # noqa: B023
            assert len(set(conns)) == 1
            eventually_blocking(lambda: pool.stats().leased == 1)
            pool.putconn(conns[0], number)
        assert_unharmed(pool)


def test_threads_with_one_key_get_one_connection_also_when_there_is_only_one(dsn: str) -> None:
    with SyncPool(dsn, min_size=0, max_size=1) as pool:
        runnings = in_threads(2, lambda: pool.getconn("key", timeout=3))
        first, second = (running.result() for running in runnings)
        assert first is second
        pool.putconn(first)


def test_a_thread_for_each_key_keeps_its_connection(dsn: str) -> None:
    with SyncPool(dsn, max_size=4) as pool:

        def work(number: int) -> None:
            for _ in range(30):
                conn = pool.getconn(number % 8)
                assert pool.getconn(number % 8) is conn
                assert first_value(conn, "select %s::int", (number,)) == number
                conn.rollback()
                pool.putconn(conn, number % 8)

        for running in [in_thread(lambda number=number: work(number)) for number in range(8)]:  # type: ignore[misc]
            running.result()
        assert pool.stats().leased == 0
        assert_unharmed(pool)


def test_a_connection_put_back_to_be_closed_is_closed_at_once(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        for _ in range(20):
            conn = pool.getconn()
            pool.putconn(conn, close=True)
            assert conn.closed


def test_the_wrong_kind_of_with_names_the_right_class(dsn: str) -> None:
    pool: Any = Pool(dsn)
    with pytest.raises(TypeError, match="Pool wants `async with`; SyncPool"), pool:
        pass
    sync_pool: Any = SyncPool(dsn)

    async def enter() -> None:
        async with sync_pool:
            pass

    with pytest.raises(TypeError, match="SyncPool wants `with`; Pool"):
        asyncio.run(enter())


def test_a_refusal_at_once_names_no_fraction_of_a_second(dsn: str) -> None:
    with exhausted(dsn) as (pool, _), pytest.raises(PoolTimeout, match="no connection within 0 s;"):
        pool.getconn(timeout=0)


def test_an_unknown_option_names_the_class_that_was_called(dsn: str) -> None:
    with pytest.raises(TypeError, match=r"^SyncPool\(\) got an unknown option 'max_sise': did you mean 'max_size'"):
        SyncPool(dsn, max_sise=1)  # type: ignore[call-overload]
