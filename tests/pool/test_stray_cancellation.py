"""Somebody cancels every task of the event loop, the pool's included: no place is lost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually

from asyncpool import Pool, PoolError

from .client_state import Connection, first_value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kit.servers import Admin


def cancel_all_others() -> int:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    return len(others)


async def release_in_transaction(pool: Pool[Connection]) -> None:
    conn = await pool.acquire()
    await conn.execute("select 1")
    await pool.release(conn)


async def release_in_the_middle(pool: Pool[Connection]) -> None:
    conn = await pool.acquire()
    cursor = conn.cursor()
    async with cursor.copy("copy (select generate_series(1, 100000)) to stdout") as copy:
        await copy.read()
    await pool.release(conn)


async def drain(pool: Pool[Connection]) -> None:
    pool.drain()


async def check(pool: Pool[Connection]) -> None:
    checking = asyncio.ensure_future(pool.check())
    await asyncio.sleep(0)
    checking.add_done_callback(lambda _: None)


async def grow(pool: Pool[Connection]) -> None:
    pool.resize(2, 2)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("work", [release_in_transaction, release_in_the_middle, drain, check, grow])
async def test_the_pool_works_on_after_all_its_tasks_were_cancelled(
    dsn: str,
    admin: Admin,
    application_name: str,
    work: Callable[[Pool[Connection]], Awaitable[None]],
    turns: int,
) -> None:
    async with Pool(dsn, min_size=1, max_size=2, acquire_timeout=10, backoff_max=0.1) as pool:
        await work(pool)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancel_all_others()
        await asyncio.sleep(0)
        conns = [await pool.acquire() for _ in range(2)]
        for conn in conns:
            assert await first_value(conn, "select 1") == 1
            await conn.commit()
            await pool.release(conn)
        await eventually(lambda: admin.sessions(application_name) == pool.stats().size <= 2)


async def test_a_connect_that_was_cancelled_before_it_began_is_made_up_for(dsn: str) -> None:
    async with Pool(dsn, min_size=0, max_size=1, backoff_max=0.1) as pool:
        waiting = asyncio.ensure_future(pool.acquire(timeout=10))
        await asyncio.sleep(0)
        assert pool.stats().connecting == 1
        assert cancel_all_others() >= 2
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        conn = await pool.acquire(timeout=10)
        await pool.release(conn)


async def test_an_open_whose_connects_are_cancelled_goes_on_or_fails_but_does_not_hang(dsn: str) -> None:
    pool = Pool(dsn, min_size=2, max_size=2, backoff_max=0.1)
    opening = asyncio.ensure_future(pool.open(timeout=10))
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task(), opening}:
        task.cancel()
    try:
        await opening
    except PoolError:
        return
    assert pool.stats().idle == 2
    await pool.close()


async def test_a_close_whose_tasks_are_cancelled_ends(dsn: str, admin: Admin, application_name: str) -> None:
    pool = Pool(dsn, min_size=2, max_size=2)
    await pool.open()
    closing = asyncio.ensure_future(pool.close())
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task(), closing}:
        task.cancel()
    await asyncio.wait_for(closing, 10)
    await eventually(lambda: admin.sessions(application_name) == 0)
