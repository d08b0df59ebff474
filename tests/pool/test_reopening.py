"""A pool that was closed, or whose event loop is gone, can be opened again, in whatever event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import loop_factories, on_both_loops
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolClosed, PoolError, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from kit.loops import LoopFactory
    from kit.servers import Admin
    from psycopg import AsyncConnection

    from asyncpool.cli.embedded import EmbeddedServer

each_loop = pytest.mark.parametrize("factory", loop_factories().values(), ids=loop_factories())


def run(work: Coroutine[Any, Any, Any], factory: LoopFactory) -> Any:
    """As `asyncio.run(work, loop_factory=factory)`, which Python 3.11 does not have."""
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


async def answer(pool: Pool[Any]) -> Any:
    async with pool.acquire() as connection:
        row = await (await connection.execute("select 41 + 1")).fetchone()
        assert row is not None
        return row[0]


# --- in the same event loop ---------------------------------------------------------------------------------


@on_both_loops
async def test_a_closed_pool_works_as_ever_when_it_is_opened_again(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn, min_size=2)
    for _ in range(3):
        async with pool:
            assert await answer(pool) == 42
            assert admin.sessions(application_name) == 2
            assert pool.stats().acquires == 1
        with pytest.raises(PoolClosed):
            await pool.acquire()
        assert pool.stats().size == 0


@on_both_loops
async def test_a_pool_that_could_not_open_opens_when_the_cause_is_gone(
    private_server: EmbeddedServer, private_dsn: str
) -> None:
    pool = Pool(private_dsn, min_size=2, backoff_initial=0.01)
    await asyncio.to_thread(private_server.stop)
    with pytest.raises(psycopg.OperationalError):
        await pool.open(timeout=0)
    with pytest.raises(PoolTimeout):
        await pool.open(timeout=0.1)
    await asyncio.to_thread(private_server.start)
    async with pool:
        assert await answer(pool) == 42


async def test_a_connection_kept_from_before_is_of_no_use_and_no_harm(dsn: str) -> None:
    pool = Pool(dsn, max_size=1)
    async with pool:
        kept = await pool.acquire()
        await pool.close(timeout=0)
    async with pool:
        with pytest.raises(psycopg.OperationalError):
            await kept.execute("select 1")
        with suppress(PoolError):
            await pool.release(kept)
        with suppress(PoolError):
            await kept.close()
        assert await answer(pool) == 42
        assert pool.stats().idle == 1


# --- in another event loop ----------------------------------------------------------------------------------


@each_loop
def test_a_pool_serves_one_event_loop_after_the_other(
    dsn: str, admin: Admin, application_name: str, factory: LoopFactory
) -> None:
    pool = Pool(dsn, min_size=2)

    async def main() -> Any:
        async with pool:
            return await answer(pool)

    assert [run(main(), factory) for _ in range(3)] == [42, 42, 42]
    assert admin.sessions(application_name) == 0


@each_loop
def test_a_pool_whose_event_loop_was_closed_counts_as_closed(
    dsn: str, admin: Admin, application_name: str, factory: LoopFactory
) -> None:
    pool = Pool(dsn, min_size=2)
    run(pool.open(), factory)
    assert "closed" in repr(pool)
    assert pool.stats().size == 0
    assert pool.holders() == []

    async def ask() -> None:
        with pytest.raises(PoolClosed):
            await pool.acquire()
        with pytest.raises(PoolClosed):
            pool.drain()
        await pool.close()

    run(ask(), factory)
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


@each_loop
def test_a_pool_whose_event_loop_was_closed_opens_in_the_next_one(
    dsn: str, admin: Admin, application_name: str, factory: LoopFactory
) -> None:
    pool = Pool(dsn, min_size=2, max_size=2)

    async def use_and_leave_open() -> Any:
        await pool.open()
        return await answer(pool)

    async def use_and_close() -> Any:
        async with pool:
            await eventually(lambda: admin.sessions(application_name) == 2)  # those left behind are gone
            return await answer(pool)

    assert run(use_and_leave_open(), factory) == 42
    assert run(use_and_leave_open(), factory) == 42
    assert run(use_and_close(), factory) == 42
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


@each_loop
def test_a_lease_from_a_closed_event_loop_is_refused_and_harms_nobody(dsn: str, factory: LoopFactory) -> None:
    pool = Pool(dsn, max_size=1)

    async def leave_a_lease() -> AsyncConnection[Any]:
        await pool.open()
        return await pool.acquire()

    async def go_on(left: AsyncConnection[Any]) -> None:
        async with pool:
            with pytest.raises(psycopg.OperationalError):
                await left.execute("select 1")
            with pytest.raises(PoolError):
                await pool.release(left)
            assert await answer(pool) == 42
            assert pool.stats().idle == 1

    run(go_on(run(leave_a_lease(), factory)), factory)


@each_loop
def test_an_event_loop_closed_in_the_middle_of_everything_leaves_a_pool_that_opens_again(
    dsn: str, admin: Admin, application_name: str, factory: LoopFactory
) -> None:
    pool = Pool(dsn, min_size=1, max_size=3, reset="session", check_interval=0)

    async def leave_in_the_middle() -> None:
        await pool.open()
        work = [asyncio.create_task(answer(pool)) for _ in range(9)]
        await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        pool.drain()

    async def go_on() -> Any:
        async with pool:
            return await answer(pool)

    for _ in range(5):
        run(leave_in_the_middle(), factory)
    assert run(go_on(), factory) == 42
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


@each_loop
def test_opening_again_and_again_leaves_no_threads_behind(dsn: str, factory: LoopFactory) -> None:
    pool = Pool(dsn)
    before = threading.enumerate()
    for _ in range(3):
        run(pool.open(), factory)
    run(pool.open(), factory)
    assert threading.enumerate() == before
    # As nobody closes it, it would warn when it is collected.
    run(_open_and_close(pool), factory)


async def _open_and_close(pool: Pool[Any]) -> None:
    async with pool:
        pass
