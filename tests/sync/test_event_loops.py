"""SyncPools and event loops: the background one that they share, and those of their callers."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from kit.threads import in_threads
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolError, SyncPool

from .pools import Connection, assert_unharmed, first_value, loop_threads, warnings_of


def assert_loop_thread_goes() -> None:
    eventually_blocking(lambda: loop_threads() == [])


# --- the background loop ------------------------------------------------------------------------------------


def test_pools_share_one_thread_which_goes_with_the_last(dsn: str) -> None:
    assert_loop_thread_goes()
    pools = [SyncPool(dsn, max_size=1) for _ in range(4)]
    for pool in pools:
        pool.open()
        assert len(loop_threads()) == 1
    [thread] = loop_threads()
    assert thread.daemon
    for pool in pools[:3]:
        pool.close()
        assert loop_threads() == [thread]
        assert_unharmed(pools[3])
    pools[3].close()
    assert loop_threads() == []
    assert not thread.is_alive()


def test_a_pool_opened_again_has_a_thread_again(dsn: str) -> None:
    assert_loop_thread_goes()
    pool = SyncPool(dsn, max_size=1)
    for _ in range(5):
        with pool:
            assert len(loop_threads()) == 1
            assert_unharmed(pool)
        assert loop_threads() == []


def test_pools_that_come_and_go_in_many_threads_leave_no_thread(dsn: str) -> None:
    assert_loop_thread_goes()

    def come_and_go() -> None:
        for _ in range(10):
            with SyncPool(dsn, max_size=1) as pool, pool.acquire() as conn:
                assert first_value(conn, "select 1") == 1
                assert len(loop_threads()) >= 1

    for running in in_threads(4, come_and_go):
        running.result()
    assert_loop_thread_goes()


def test_the_background_thread_does_nothing_for_a_pool_that_nobody_uses_but_its_timers(dsn: str) -> None:
    """Acquire and release of an idle connection stay in the caller's thread."""
    with SyncPool(dsn, max_size=1) as pool:
        runner: Any = pool._pool._runner
        turns: list[int] = []
        call_soon_threadsafe = runner.loop.call_soon_threadsafe

        def count(*args: Any, **options: Any) -> Any:
            turns.append(1)
            return call_soon_threadsafe(*args, **options)

        runner.loop.call_soon_threadsafe = count
        for _ in range(100):
            pool.putconn(pool.getconn())
            with pool.acquire():
                pass
        del runner.loop.call_soon_threadsafe
        assert len(turns) <= 2  # a first wake-up to look after max_idle


# --- callers with a loop of their own -----------------------------------------------------------------------


async def test_in_a_thread_that_runs_an_event_loop_it_works_and_warns_once(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = SyncPool(dsn, max_size=1, name="orders")
    pool.open()
    for _ in range(3):
        with pool.acquire() as conn:
            assert first_value(conn, "select 1") == 1
        with pool.transaction() as conn:
            conn.execute("select 1")
        pool.putconn(pool.getconn("key"))
        pool.putconn(pool.getconn())
    pool.check()
    pool.close()
    [warning] = warnings_of(caplog)
    assert "orders" in warning
    assert "runs an event loop" in warning
    assert "use Pool there" in warning


async def test_in_a_thread_beside_an_event_loop_nobody_is_warned(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    def use() -> None:
        with SyncPool(dsn, max_size=1) as pool:
            assert_unharmed(pool)

    await asyncio.to_thread(use)
    assert warnings_of(caplog) == []


async def test_both_kinds_of_pool_live_in_one_process(dsn: str) -> None:
    def query(pool: SyncPool[Connection]) -> int:
        with pool.acquire() as conn:
            return int(first_value(conn, "select 1"))

    async def query_async(pool: Pool[Any]) -> int:
        async with pool.acquire() as conn:
            cursor = await conn.execute("select 1")
            row = await cursor.fetchone()
            return int(row[0])

    with ExitStack() as stack:
        blocking = await asyncio.to_thread(stack.enter_context, SyncPool(dsn, max_size=2))
        async with Pool(dsn, max_size=2) as pool:
            answers = await asyncio.gather(
                *(query_async(pool) for _ in range(50)),
                *(asyncio.to_thread(query, blocking) for _ in range(50)),
            )
            assert answers == [1] * 100
            assert pool.stats().acquires == blocking.stats().acquires == 50
        assert await asyncio.to_thread(query, blocking) == 1
        await asyncio.to_thread(blocking.close)
    await eventually(lambda: loop_threads() == [])


async def test_an_event_loop_goes_on_while_threads_wait_for_a_blocking_pool(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    await asyncio.to_thread(pool.open)
    conn = await asyncio.to_thread(pool.getconn)
    waiting = [asyncio.create_task(asyncio.to_thread(pool.getconn)) for _ in range(2)]
    await eventually(lambda: pool.stats().waiting == 2)
    pool.putconn(conn)
    for task in asyncio.as_completed(waiting):
        pool.putconn(await task)
    await asyncio.to_thread(pool.close)


def test_a_pool_may_be_opened_in_one_thread_used_in_others_and_closed_in_another(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=2)
    for work in (pool.open, lambda: assert_unharmed(pool), lambda: assert_unharmed(pool), pool.close):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert "closed" in repr(pool)
    assert pool.stats().acquires == 4


def test_a_connection_may_go_from_thread_to_thread(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        [running] = in_threads(1, lambda: first_value(conn, "select 1"))
        assert running.result() == 1
        [giving] = in_threads(1, lambda: pool.putconn(conn))
        giving.result()
        assert_unharmed(pool)


def test_a_log_handler_that_uses_the_pool_in_the_loops_own_thread_gets_an_error_and_no_deadlock(dsn: str) -> None:
    errors: list[BaseException] = []

    class Writing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "longer than long_held_after" in record.getMessage():
                for use in (pool.getconn, pool.check, pool.close):
                    try:
                        use()
                    except PoolError as error:
                        errors.append(error)

    handler = Writing()
    logger = logging.getLogger("asyncpool")
    logger.addHandler(handler)
    pool = SyncPool(dsn, max_size=1, long_held_after=0.02)
    try:
        pool.open()
        conn = pool.getconn()
        eventually_blocking(lambda: len(errors) == 2)
        assert all("own event loop" in str(error) for error in errors)
        pool.putconn(conn)
        eventually_blocking(lambda: pool.stats().size == 0)
    finally:
        logger.removeHandler(handler)
        pool.close()
