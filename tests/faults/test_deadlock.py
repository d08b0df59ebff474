"""Blocks that wait for each other, on a real server: told at once to one of them, and never without need."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import anyio
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolDeadlock, PoolError, PoolTimeout, SyncPool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

# Nobody waits for that long: it is there to fail the test.
LONG = 20.0


@on_both_loops
@pytest.mark.parametrize("way", ["block", "by hand", "transaction"])
async def test_of_tasks_that_each_hold_one_and_want_another_the_last_is_told_and_the_others_go_on(
    dsn: str, way: str
) -> None:
    told: list[PoolDeadlock] = []

    async def want_two() -> None:
        async with pool.acquire() as conn:
            await conn.execute("select 1")
            here.set()
            await all_hold.wait()
            try:
                if way == "by hand":
                    await pool.release(await pool.acquire(timeout=LONG))
                else:
                    async with pool.acquire(timeout=LONG) if way == "block" else pool.transaction(LONG) as second:
                        await second.execute("select 2")
            except PoolDeadlock as deadlock:
                told.append(deadlock)

    async with Pool(dsn, max_size=3, acquire_timeout=LONG) as pool:
        all_hold = asyncio.Event()
        tasks = []
        for _ in range(3):
            here = asyncio.Event()
            tasks.append(asyncio.create_task(want_two()))
            await here.wait()
        all_hold.set()
        await asyncio.gather(*tasks)
        assert len(told) == 1
        assert str(told[0]).count(f"{__file__}:") == 1
        assert "(3 times)" in str(told[0])
        assert "want_two" in str(told[0])
        assert pool.stats().leased == pool.stats().waiting == 0


async def test_a_task_that_enters_a_second_block_of_a_pool_of_one_is_told_at_once(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        with pytest.raises(PoolDeadlock, match="is held by a block"):
            async with pool.acquire(), pool.acquire(timeout=LONG):
                pass
        async with pool.transaction():
            with pytest.raises(PoolDeadlock):
                await pool.acquire(timeout=LONG)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(pool.acquire())
            with pytest.raises(PoolDeadlock):
                await stack.enter_async_context(pool.acquire(timeout=LONG))
        assert pool.stats().leased == pool.stats().waiting == 0


async def test_a_connection_taken_by_hand_is_waited_for_because_another_task_may_give_it_back(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        asyncio.get_running_loop().call_later(0.02, pool.release, conn)
        async with pool.acquire(timeout=LONG):
            pass


async def test_a_task_that_ends_its_block_early_may_wait_for_another_one(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool, pool.acquire() as conn:
        await conn.close()
        async with pool.acquire(timeout=LONG) as other:
            await other.execute("select 1")


async def test_a_block_is_nobody_elses_fault_when_its_task_waits_for_something_else(dsn: str) -> None:
    async def hold() -> None:
        async with pool.acquire():
            holding.set()
            await done.wait()

    async with Pool(dsn, max_size=2) as pool:
        holding, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold())
        await holding.wait()
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0.05)
            done.set()
            async with pool.acquire(timeout=LONG):
                await task


async def test_a_task_that_is_gone_is_not_taken_for_the_one_that_comes_after_it(dsn: str) -> None:
    """A block that its generator keeps open has outlived its task; the next one may be at the same address."""

    async def numbers() -> AsyncGenerator[int, None]:
        async with pool.acquire():
            yield 1

    async def start() -> None:
        await anext(generator)

    async def want() -> None:
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0.05)

    async with Pool(dsn, max_size=1) as pool:
        generator = numbers()
        await asyncio.create_task(start())
        gc.collect()
        for _ in range(5):
            await asyncio.create_task(want())
        await generator.aclose()


async def test_a_generator_that_was_left_half_way_is_closed_by_the_loop_and_its_connection_waited_for(dsn: str) -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        async with pool.acquire():
            yield 1
            yield 2

    async with Pool(dsn, max_size=1) as pool:
        async for _ in numbers():
            break
        gc.collect()
        async with pool.acquire(timeout=LONG):
            pass


def test_a_generator_that_another_thread_goes_on_with_is_waited_for(dsn: str) -> None:
    """As web frameworks do it with a dependency, and with an answer that is streamed."""

    def number() -> Generator[int, None, None]:
        with pool.acquire():
            yield 1

    def want() -> None:
        waits.set()
        with pool.acquire(timeout=LONG):
            pass

    with SyncPool(dsn, max_size=1) as pool, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        waits = threading.Event()
        dependency = number()
        one.submit(next, dependency).result()
        wanting = one.submit(want)
        waits.wait(LONG)
        eventually_blocking(lambda: pool.stats().waiting == 1 or wanting.done())
        other.submit(dependency.close).result()
        wanting.result()


async def test_a_task_that_is_dropped_in_its_block_is_collected_and_its_place_comes_back(dsn: str) -> None:
    """The pool knows who holds what, and does not keep it alive."""

    async def hold() -> None:
        async with pool.acquire():
            holding.set()
            await asyncio.get_running_loop().create_future()  # which nobody else knows

    async with Pool(dsn, max_size=1) as pool:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # of a task that is destroyed
        holding = asyncio.Event()
        task = asyncio.create_task(hold())
        await holding.wait()
        del task
        gc.collect()
        await eventually(lambda: pool.stats().leased == 0)
        async with pool.acquire(timeout=LONG):
            pass


async def test_cancelled_and_timed_out_waiters_complete_no_circle(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        first = await pool.acquire()
        async with pool.acquire():
            with pytest.raises(TimeoutError), anyio.fail_after(0.02):
                await pool.acquire(timeout=LONG)
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0.02)
            await pool.release(first)
            async with pool.acquire(timeout=LONG):
                with pytest.raises(PoolDeadlock):
                    await pool.acquire(timeout=LONG)


# --- threads ------------------------------------------------------------------------------------------------


def test_of_threads_that_each_hold_one_and_want_another_the_last_is_told_and_the_others_go_on(dsn: str) -> None:
    told: list[PoolDeadlock] = []

    def want_two() -> None:
        with pool.acquire() as conn:
            conn.execute("select 1")
            all_hold.wait(LONG)
            try:
                with pool.acquire(timeout=LONG) as second:
                    second.execute("select 2")
            except PoolDeadlock as deadlock:
                told.append(deadlock)

    with SyncPool(dsn, max_size=3, acquire_timeout=LONG) as pool, ThreadPoolExecutor(3) as executor:
        all_hold = threading.Barrier(3)
        for future in [executor.submit(want_two) for _ in range(3)]:
            future.result()
        assert len(told) == 1
        assert str(told[0]).count(f"{__file__}:") == 1
        assert "(3 times)" in str(told[0])
        assert pool.stats().leased == pool.stats().waiting == 0


def test_a_thread_that_enters_a_second_block_of_a_pool_of_one_is_told_at_once(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(PoolDeadlock), pool.acquire(), pool.acquire(timeout=LONG):
            pass
        with pool.transaction(), pytest.raises(PoolDeadlock):
            pool.getconn(timeout=LONG)
        assert pool.stats().leased == pool.stats().waiting == 0


def test_a_connection_of_getconn_is_waited_for_because_another_thread_may_put_it_back(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        threading.Timer(0.02, pool.putconn, [conn]).start()
        with pool.acquire(timeout=LONG):
            pass


def test_a_thread_that_was_in_a_block_before_may_wait_like_any_other(dsn: str) -> None:
    """What it held then is another one's now, who has it by hand."""
    with SyncPool(dsn, max_size=1) as pool:
        with pool.acquire():
            pass
        conn = pool.getconn()
        threading.Timer(0.05, pool.putconn, [conn]).start()
        pool.putconn(pool.getconn(timeout=LONG))


def test_a_thread_that_is_gone_is_not_taken_for_the_one_that_comes_after_it(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        block = pool.acquire()
        errors: list[PoolError] = []

        def want() -> None:
            try:
                pool.getconn(timeout=0.05)
            except PoolError as error:
                errors.append(error)

        for work in (block.__enter__, want, want, want):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert [type(error) for error in errors] == [PoolTimeout] * 3
        block.__exit__(None, None, None)
        eventually_blocking(lambda: pool.stats().leased == 0)
