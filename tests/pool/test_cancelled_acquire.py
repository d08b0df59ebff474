"""A caller that is cancelled while it acquires, at whatever moment, takes nothing with it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout

from .leftovers import stream

if TYPE_CHECKING:
    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]


async def assert_nothing_lost(pool: Pool[Connection]) -> None:
    """Nobody waits, nothing is leased, and every place can be taken."""
    assert pool.stats().waiting == 0
    await eventually(lambda: pool.stats().leased == 0)
    conns = [await pool.acquire(timeout=10) for _ in range(pool.stats().max_size)]
    with pytest.raises(PoolTimeout):
        await pool.acquire(timeout=0)
    for conn in conns:
        await conn.execute("select 1")
        await conn.commit()
        await pool.release(conn)


async def take(pool: Pool[Connection]) -> None:
    async with pool.acquire() as conn:
        await conn.execute("select 1")


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()


async def test_a_caller_cancelled_before_it_began_takes_nothing(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        task = asyncio.create_task(take(pool))
        await cancel(task)
        assert pool.stats().acquires == 0
        await assert_nothing_lost(pool)


async def test_a_caller_cancelled_in_the_queue_leaves_it(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire():
            first, second = (asyncio.create_task(take(pool)) for _ in range(2))
            await eventually(lambda: pool.stats().waiting == 2)
            await cancel(first)
            assert pool.stats().waiting == 1
        await second
        await assert_nothing_lost(pool)


async def test_a_connection_granted_to_a_cancelled_caller_goes_to_the_next(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        first, second = (asyncio.create_task(take(pool)) for _ in range(2))
        await eventually(lambda: pool.stats().waiting == 2)
        await pool.release(conn)  # it is first's from now on, but first has not run yet
        await cancel(first)
        await second
        assert pool.stats().connects == 1
        await assert_nothing_lost(pool)


async def test_a_caller_cancelled_before_it_is_granted_a_connection_in_the_same_turn(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        task = asyncio.create_task(take(pool))
        await eventually(lambda: pool.stats().waiting == 1)
        task.cancel()
        await pool.release(conn)
        await asyncio.wait([task])
        assert task.cancelled()
        await assert_nothing_lost(pool)


async def test_a_connect_outlives_the_caller_that_caused_it(dsn: str) -> None:
    async with Pool(dsn, min_size=0, max_size=1) as pool:
        task = asyncio.create_task(take(pool))
        await asyncio.sleep(0)
        assert pool.stats().connecting == 1
        await cancel(task)
        await eventually(lambda: pool.stats().idle == 1)
        await assert_nothing_lost(pool)
        assert pool.stats().connects == 1


async def test_a_caller_cancelled_while_its_connection_is_checked_takes_nothing(dsn: str) -> None:
    checking = asyncio.Event()
    go_on = asyncio.Event()

    async def check(conn: Connection) -> None:
        checking.set()
        await go_on.wait()

    async with Pool(dsn, max_size=1, check_interval=0, check=check) as pool:
        task = asyncio.create_task(take(pool))
        await checking.wait()
        await cancel(task)
        go_on.set()
        await assert_nothing_lost(pool)
        assert pool.stats().connects == 1


async def test_a_caller_cancelled_in_setup_gives_the_connection_back(dsn: str) -> None:
    in_setup = asyncio.Event()
    go_on = asyncio.Event()

    async def setup(conn: Connection) -> None:
        in_setup.set()
        await go_on.wait()

    async with Pool(dsn, max_size=1, setup=setup) as pool:
        task = asyncio.create_task(take(pool))
        await in_setup.wait()
        await cancel(task)
        assert pool.stats().leased == 0
        go_on.set()
        await assert_nothing_lost(pool)


async def test_a_caller_cancelled_in_a_statement_of_setup_gives_the_connection_back(
    dsn: str, admin: Admin, application_name: str
) -> None:
    slow = True

    async def setup(conn: Connection) -> None:
        if slow:
            await conn.execute("select pg_sleep(600)")

    async with Pool(dsn, max_size=1, setup=setup, check_timeout=60, cancel_timeout=25) as pool:
        task = asyncio.create_task(take(pool))
        await eventually(lambda: admin.asleep(application_name) == 1)
        await cancel(task)
        slow = False
        await assert_nothing_lost(pool)
        assert pool.stats().connects == 1


async def test_an_acquire_in_a_cancelled_scope_takes_nothing(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await take(pool)
        await assert_nothing_lost(pool)


async def test_a_caller_whose_timeout_is_over_leaves_the_queue(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pool.acquire()
        assert pool.stats().waiting == 0
        await pool.release(conn)
        await assert_nothing_lost(pool)


@on_both_loops
@pytest.mark.parametrize("max_size", [1, 3])
async def test_cancelled_at_every_turn_of_the_loop_nothing_is_lost(dsn: str, max_size: int) -> None:
    """Connect, queue, grant, statement, commit, rollback: one of the callers is hit in each of them."""
    async with Pool(dsn, min_size=0, max_size=max_size, cancel_timeout=25) as pool:
        for turns in range(50):
            tasks = [asyncio.create_task(take(pool)) for _ in range(2 * max_size)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            failures = [o for o in outcomes if o is not None and not isinstance(o, asyncio.CancelledError)]
            assert failures == []
            assert [o for o in outcomes[1::2] if o is not None] == []
        await assert_nothing_lost(pool)
        assert pool.stats().connects <= max_size


async def test_cancelled_at_every_turn_of_the_loop_with_all_callables_nothing_is_lost(dsn: str) -> None:
    async def use(conn: Connection) -> None:
        await conn.execute("select 1")
        await conn.commit()

    pool = Pool(dsn, min_size=0, max_size=2, check_interval=0, setup=use, check=use, reset=use, cancel_timeout=25)
    async with pool:
        for turns in range(60):
            tasks = [asyncio.create_task(take(pool)) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
        await assert_nothing_lost(pool)


async def use_much(pool: Pool[Connection]) -> None:
    """Each kind of statement that a cancellation may hit, quick ones all."""
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("create temp table if not exists much (id int)")
        async with conn.transaction():
            await conn.cursor().executemany("insert into much values (%s)", [(1,), (2,)])
        async with conn.cursor().copy("copy much from stdin") as copy:
            await copy.write_row([3])
        async with conn.cursor().copy("copy much to stdout") as copy:
            while await copy.read():
                pass
        async with conn.pipeline():
            await conn.execute("select 1")
            await conn.execute("select 2")
        async with aclosing(stream(conn, "select * from much")) as rows:
            async for _ in rows:
                pass


@on_both_loops
@pytest.mark.parametrize("within_scope", [False, True])
@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_cancelled_at_every_turn_of_the_loop_a_connection_is_never_the_price(
    dsn: str, within_scope: bool, reset: Any
) -> None:
    """Nor what psycopg knows of the statements that it prepared."""
    pool = Pool(dsn, max_size=1, reset=reset, prepare_threshold=0, cancel_timeout=25, check_timeout=25)
    async with pool:

        async def work(scope: anyio.CancelScope) -> None:
            with scope:
                await use_much(pool)

        for turns in range(400):
            scope = anyio.CancelScope()
            task = asyncio.create_task(work(scope))
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.done():
                break
            if within_scope:
                scope.cancel()
            else:
                task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None, task.exception()
        assert pool.stats().connects == 1
        await assert_nothing_lost(pool)
