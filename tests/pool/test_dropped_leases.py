"""A lease that is dropped without release comes back when it is collected, and its owner is told."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually
from psycopg import sql

from asyncpool import CloseReason, Pool

from .leftovers import stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]


@contextmanager
def drop_reported(*words: str) -> Iterator[None]:
    with pytest.warns(ResourceWarning, match="dropped without release") as caught:
        yield
    messages = [str(warning.message) for warning in caught]
    assert all(word in message for message in messages for word in words), messages


async def assert_came_back(pool: Pool[Connection], pid: int) -> None:
    """The place is free, and the connection, of which nobody knows what it was in the middle of, is closed."""
    await eventually(lambda: pool.stats().closes == {CloseReason.LEASE_LOST: 1})
    async with pool.acquire(timeout=10) as conn:
        assert conn.info.backend_pid != pid
        await conn.execute("select 1")


@on_both_loops
async def test_a_dropped_lease_comes_back_with_a_warning_that_names_where_it_was_acquired(dsn: str) -> None:
    async with Pool(dsn, max_size=1, name="orders") as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        with drop_reported("orders", "test_dropped_leases.py", "test_a_dropped_lease_comes_back"):
            del conn
            gc.collect()
            await assert_came_back(pool, pid)


async def test_with_debug_the_warning_has_the_whole_stack(dsn: str) -> None:
    async def acquire_somewhere(pool: Pool[Connection]) -> Connection:
        return await pool.acquire()

    async with Pool(dsn, max_size=1, debug=True) as pool:
        conn = await acquire_somewhere(pool)
        pid = conn.info.backend_pid
        with drop_reported("in acquire_somewhere", "in test_with_debug_the_warning_has_the_whole_stack"):
            del conn
            gc.collect()
            await assert_came_back(pool, pid)


async def test_who_waits_gets_the_place_of_a_dropped_lease(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        waiting = asyncio.ensure_future(pool.acquire(timeout=30))
        await eventually(lambda: pool.stats().waiting == 1)
        with drop_reported():
            del conn
            gc.collect()
            conn = await waiting
        await conn.execute("select 1")
        await conn.rollback()
        await pool.release(conn)


async def test_a_lease_dropped_in_a_transaction_is_rolled_back(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        await conn.execute(sql.SQL("insert into {} values (1)").format(sql.Identifier(table)))
        with drop_reported():
            del conn
            gc.collect()
            await assert_came_back(pool, pid)
        locks = "select count(*) from pg_locks where relation = %s::regclass"
        await eventually(lambda: admin.value(locks, [table]) == 0)
        assert admin.value(f"select count(*) from {table}") == 0


async def test_a_lease_held_by_an_exceptions_traceback_comes_back_with_it(dsn: str) -> None:
    async def fail(pool: Pool[Connection]) -> None:
        conn = await pool.acquire()
        await conn.execute("select 1/0")

    async with Pool(dsn, max_size=1) as pool:
        task = asyncio.create_task(fail(pool))
        await asyncio.wait([task])
        error = task.exception()
        assert isinstance(error, psycopg.errors.DivisionByZero)
        gc.collect()
        assert pool.stats().leased == 1
        with drop_reported("fail"):
            del task, error
            gc.collect()
            await eventually(lambda: pool.stats().closes == {CloseReason.LEASE_LOST: 1})


async def test_a_cancelled_task_that_held_a_lease_gives_it_back_when_it_is_forgotten(dsn: str) -> None:
    async def hold(pool: Pool[Connection]) -> None:
        conn = await pool.acquire()
        await conn.execute("select pg_sleep(600)")

    async with Pool(dsn, max_size=1) as pool:
        task = asyncio.create_task(hold(pool))
        await eventually(lambda: pool.stats().leased == 1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        with drop_reported("hold"):
            del task
            gc.collect()
            await eventually(lambda: pool.stats().closes == {CloseReason.LEASE_LOST: 1})


@pytest.mark.parametrize("left", ["pipeline", "transaction", "stream"])
async def test_a_lease_dropped_in_the_middle_of_something_comes_back(dsn: str, left: str) -> None:
    async def leave(conn: Connection) -> None:
        if left == "pipeline":
            await conn.pipeline().__aenter__()
            await conn.execute("select 1")
        elif left == "transaction":
            await conn.transaction().__aenter__()
        else:
            await anext(stream(conn, "select generate_series(1, 100000)"))

    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        # The generators of psycopg's context managers end in the event loop, and only then let go.
        with drop_reported():
            await leave(conn)
            del conn
            gc.collect()
            await assert_came_back(pool, pid)


@on_both_loops
async def test_a_lease_that_another_thread_drops_comes_back(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        held = [await pool.acquire()]
        pid = held[0].info.backend_pid
        with drop_reported():
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
            await assert_came_back(pool, pid)


async def test_a_block_in_an_async_generator_that_is_dropped_ends_as_after_an_exception(
    dsn: str, admin: Admin, table: str
) -> None:
    async def rows(pool: Pool[Connection]) -> AsyncIterator[int]:
        async with pool.acquire() as conn:
            await conn.execute(sql.SQL("insert into {} values (1)").format(sql.Identifier(table)))
            yield 1
            yield 2

    async with Pool(dsn, max_size=1) as pool:
        async for _ in rows(pool):
            break
        await eventually(lambda: pool.stats().idle == 1)
        assert pool.stats().closes == {}
        assert admin.value(f"select count(*) from {table}") == 0


async def test_an_acquire_that_nobody_awaits_takes_nothing(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pool.acquire()
        gc.collect()
        assert pool.stats().leased == 0
        assert pool.stats().acquires == 0


async def test_a_pool_survives_any_number_of_dropped_leases(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        with drop_reported():
            for number in range(1, 11):
                await pool.acquire(timeout=10)
                gc.collect()
                await eventually(lambda: pool.stats().closes.get(CloseReason.LEASE_LOST) == number)  # noqa: B023
        assert pool.stats().leased == 0
        await eventually(lambda: admin.sessions(application_name) == pool.stats().size)


async def test_a_lease_that_outlives_its_pool_is_dropped_in_silence(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        await pool.close(timeout=0)
    del conn
    gc.collect()
    await asyncio.sleep(0)


def test_a_lease_that_outlives_its_event_loop_ends_its_session(dsn: str, admin: Admin, application_name: str) -> None:
    async def leave_all_behind() -> tuple[Pool[Connection], Connection]:
        pool = Pool(dsn, max_size=1)
        await pool.open()
        return pool, await pool.acquire()

    pool, conn = asyncio.run(leave_all_behind())
    assert admin.sessions(application_name) == 1
    del conn
    gc.collect()
    asyncio.run(eventually(lambda: admin.sessions(application_name) == 0))
    pools = [pool]
    del pool
    with pytest.warns(ResourceWarning, match="dropped without being closed"):
        pools.clear()
