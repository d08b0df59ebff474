"""Somebody cancels every task of the event loop, the pool's own included: the next input repairs what it broke."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolClosed

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = on_both_loops

MOMENTS = [number / 4000 for number in range(0, 30, 2)]  # seconds: before, during and after a connect


async def use(pool: Pool[Any]) -> None:
    async with pool.acquire(timeout=30) as connection:
        await connection.execute("select 1")


async def cancel_everything() -> None:
    """Every task but this one, and wait until they have seen it."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def use_all(pool: Pool[Any]) -> None:
    """All places can be had at once: none is lost."""
    connections = [await pool.acquire(timeout=30) for _ in range(pool.stats().max_size)]
    for connection in connections:
        await connection.execute("select 1")
        await connection.commit()
        await pool.release(connection)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_while_it_connects(dsn: str, moment: float) -> None:
    pool = Pool(dsn, min_size=3, max_size=3, backoff_initial=0.01)
    await pool.open(wait=False)
    await asyncio.sleep(moment)
    await cancel_everything()
    await use_all(pool)
    await eventually(lambda: pool.stats().idle == 3)
    await pool.close()


@pytest.mark.parametrize("moment", MOMENTS[:5])
async def test_while_it_closes_connections(dsn: str, admin: Admin, application_name: str, moment: float) -> None:
    async with Pool(dsn, min_size=3, max_size=3, backoff_initial=0.01) as pool:
        pool.drain()
        await asyncio.sleep(moment)
        await cancel_everything()
        await use_all(pool)
        await eventually(lambda: pool.stats().idle == pool.stats().size == 3)
        # What was cancelled in the middle of its closing is over all the same.
        await eventually(lambda: admin.sessions(application_name) == 3)


@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_while_connections_are_checked_and_recycled(
    dsn: str, admin: Admin, application_name: str, reset: Any
) -> None:
    async with Pool(dsn, min_size=0, max_size=3, check_interval=0, reset=reset, backoff_initial=0.01) as pool:
        for turns in range(12):
            users = [asyncio.create_task(use(pool)) for _ in range(6)]
            released = await pool.acquire(timeout=30)
            await released.execute("select 1")
            await pool.release(released)
            for _ in range(turns):
                await asyncio.sleep(0)
            await cancel_everything()
            assert all(user.done() for user in users)
        await use_all(pool)
        await eventually(lambda: admin.sessions(application_name) == pool.stats().size)


@pytest.mark.parametrize("moment", MOMENTS[:5])
async def test_while_the_pool_is_being_closed(dsn: str, admin: Admin, application_name: str, moment: float) -> None:
    pool = Pool(dsn, min_size=3)
    await pool.open()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(moment)
    await cancel_everything()
    assert closing.done()
    await pool.close()
    with pytest.raises(PoolClosed):
        await pool.acquire()
    await eventually(lambda: admin.sessions(application_name) == 0)
    async with pool:
        await use_all(pool)
