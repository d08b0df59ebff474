"""Finding who holds what: acquire sites, dropped leases, `long_held_after`, `debug`."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from kit.threads import in_thread
from kit.waiting import eventually_blocking

from asyncpool import CloseReason, PoolError, SyncPool

from .pools import Connection, assert_unharmed, exhausted, first_value, insert, line_here, warnings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin


def acquire_somewhere(pool: SyncPool[Connection]) -> Connection:
    return pool.getconn()


# --- holders ------------------------------------------------------------------------------------------------


def test_holders_names_the_line_of_each_caller(dsn: str) -> None:
    with SyncPool(dsn, max_size=6) as pool:
        assert pool.holders() == []
        lines = []
        by_hand, line = pool.getconn(), line_here()
        lines.append(line)
        by_key, line = pool.getconn("key"), line_here()
        lines.append(line)
        with pool.acquire():
            lines.append(line_here() - 1)
            with pool.transaction():
                lines.append(line_here() - 1)
                elsewhere = acquire_somewhere(pool)
                holders = pool.holders()
                assert [holder.site for holder in holders[:4]] == [
                    f"{__file__}:{line} in test_holders_names_the_line_of_each_caller" for line in lines
                ]
                assert holders[4].site.endswith("in acquire_somewhere")
                assert holders[0].backend_pid == by_hand.info.backend_pid
                assert all(holder.held_for >= 0 for holder in holders)
                assert all(holder.stack is None for holder in holders)
                pool.putconn(elsewhere)
        assert len(pool.holders()) == 2
        pool.putconn(by_hand)
        pool.putconn(by_key)
        assert pool.holders() == []


def test_a_waiting_callers_site_is_its_own(dsn: str) -> None:
    with exhausted(dsn) as (pool, conn):
        waiting = in_thread(lambda: acquire_somewhere(pool))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        pool.putconn(conn)
        conn = waiting.result()
        [holder] = pool.holders()
        assert holder.site.endswith("in acquire_somewhere")
        pool.putconn(conn)


# --- dropped leases -----------------------------------------------------------------------------------------


@contextmanager
def drop_reported(*words: str) -> Iterator[None]:
    with pytest.warns(ResourceWarning, match="dropped without release") as caught:
        yield
    messages = [str(warning.message) for warning in caught]
    assert all(word in message for message in messages for word in words), messages


def assert_came_back(pool: SyncPool[Connection], pid: int) -> None:
    """The place is free, and the connection, of which nobody knows what it was in the middle of, is closed."""
    eventually_blocking(lambda: pool.stats().closes == {CloseReason.LEASE_LOST: 1})
    with pool.acquire(timeout=10) as conn:
        assert conn.info.backend_pid != pid
        assert first_value(conn, "select 1") == 1


def test_a_dropped_lease_comes_back_with_a_warning_that_names_where_it_was_acquired(dsn: str) -> None:
    with SyncPool(dsn, max_size=1, name="orders") as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        with drop_reported("orders", f"{__file__}:", "test_a_dropped_lease_comes_back"):
            del conn
            gc.collect()
            assert_came_back(pool, pid)


def test_a_lease_that_a_thread_left_behind_comes_back(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        pids: list[int] = []

        def leave() -> None:
            conn = acquire_somewhere(pool)
            pids.append(conn.info.backend_pid)

        with drop_reported("acquire_somewhere"):
            thread = threading.Thread(target=leave)
            thread.start()
            thread.join()
            gc.collect()
            assert_came_back(pool, pids[0])


def test_a_lease_dropped_in_a_transaction_is_rolled_back(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        insert(conn, table)
        with drop_reported():
            del conn
            gc.collect()
            assert_came_back(pool, pid)
        assert admin.value(f"select count(*) from {table}") == 0


def test_who_waits_gets_the_place_of_a_dropped_lease(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        waiting = in_thread(lambda: pool.getconn(timeout=10))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        with drop_reported():
            del conn
            gc.collect()
            other = waiting.result()
        assert first_value(other, "select 1") == 1
        other.rollback()
        pool.putconn(other)


def test_a_lease_with_a_key_is_not_lost_as_its_key_finds_it(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        pid = pool.getconn("key").info.backend_pid
        gc.collect()
        conn = pool.getconn("key")
        assert conn.info.backend_pid == pid
        pool.putconn(conn, "key")
        assert pool.stats().closes == {}


def test_a_lease_that_outlives_its_pool_is_dropped_in_silence(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    conn = pool.getconn()
    conn.execute("select 1")
    pool.close(timeout=0)
    del conn
    gc.collect()


# --- long_held_after ----------------------------------------------------------------------------------------


def test_a_lease_that_lasts_long_is_told_once_and_again_when_it_ends(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SyncPool(dsn, name="orders", max_size=2, long_held_after=0.05) as pool:
        conn = acquire_somewhere(pool)
        eventually_blocking(lambda: len(warnings_of(caplog)) == 1)
        other = pool.getconn()
        eventually_blocking(lambda: len(warnings_of(caplog)) == 2)  # by then the first was due several times
        first, second = warnings_of(caplog)
        assert "orders" in first
        assert "acquire_somewhere" in first
        assert "acquire_somewhere" not in second
        pool.putconn(conn)
        assert "came back" in warnings_of(caplog)[2]
        pool.putconn(other)
        assert len(warnings_of(caplog)) == 4


def test_leases_that_end_in_time_are_not_told(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with SyncPool(dsn, max_size=1, long_held_after=30) as pool:
        assert_unharmed(pool)
    assert warnings_of(caplog) == []


# --- debug --------------------------------------------------------------------------------------------------


def test_debug_keeps_the_whole_stack_of_the_acquire(dsn: str) -> None:
    with SyncPool(dsn, debug=True) as pool:
        conn = acquire_somewhere(pool)
        [holder] = pool.holders()
        assert holder.stack is not None
        assert "in acquire_somewhere" in holder.stack
        assert "in test_debug_keeps_the_whole_stack_of_the_acquire" in holder.stack
        frames = [line for line in holder.stack.splitlines() if line.startswith("  File ")]
        assert __file__ in frames[-1], "the pool's own frames are not left out"
        pool.putconn(conn)


def test_debug_refuses_a_released_connection_also_when_it_has_a_new_owner(dsn: str) -> None:
    with SyncPool(dsn, max_size=1, debug=True) as pool:
        for _ in range(3):
            stale = pool.getconn()
            pool.putconn(stale)
            with pool.acquire() as conn:
                assert conn is not stale
                with pytest.raises(PoolError, match="released"):
                    stale.execute("select 1")
                with pytest.raises(PoolError, match="released"):
                    pool.putconn(stale)
                stale.close()
                assert first_value(conn, "select 1") == 1
        assert pool.stats().connects == 1


def test_debug_reports_a_dropped_lease_with_its_stack(dsn: str) -> None:
    with SyncPool(dsn, max_size=1, debug=True) as pool:
        conn = acquire_somewhere(pool)
        pid = conn.info.backend_pid
        with drop_reported("in acquire_somewhere", "in test_debug_reports_a_dropped_lease_with_its_stack"):
            del conn
            gc.collect()
            assert_came_back(pool, pid)


def test_debug_gives_the_same_key_the_same_connection(dsn: str) -> None:
    with SyncPool(dsn, max_size=2, debug=True) as pool:
        conn = pool.getconn("key")
        assert pool.getconn("key") is conn
        pool.putconn(conn)
        assert_unharmed(pool)
