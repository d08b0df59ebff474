"""One-shot statements and leases in one queue: who is refused, and that nobody else is."""

from __future__ import annotations

import asyncio

import pytest
from kit.waiting import eventually

from asyncpool import Pool, PoolDeadlock

# Nobody waits for that long: it is there to fail the test.
LONG = 20.0


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("tasks", [1, 2, 3])
async def test_of_blocks_that_each_want_a_one_shot_the_last_is_told_and_the_others_go_on(
    dsn: str, tasks: int, lanes: int
) -> None:
    asking: list[int] = []
    told: list[int] = []
    answers: list[int] = []

    async def want_both(number: int) -> None:
        async with pool.acquire() as conn:
            await conn.execute("select 1")
            await all_hold.wait()
            asking.append(number)
            try:
                answers.append(await pool.fetchval("select %s", (number,)))
            except PoolDeadlock:
                told.append(number)

    async with Pool(dsn, min_size=tasks, max_size=tasks, acquire_timeout=LONG, lanes=lanes) as pool:
        all_hold = asyncio.Event()
        running = [asyncio.create_task(want_both(number)) for number in range(tasks)]
        await eventually(lambda: pool.stats().leased == tasks)
        all_hold.set()
        await asyncio.gather(*running)
        assert told == asking[-1:]
        assert sorted(answers) == sorted(asking[:-1])
        await eventually(lambda: pool.stats().leased == pool.stats().waiting == 0)


@pytest.mark.parametrize("lanes", [1, 2, 4])
async def test_a_one_shot_that_waits_is_not_refused_for_a_second_lane_that_the_queue_has_no_room_for(
    dsn: str, lanes: int
) -> None:
    async with Pool(dsn, min_size=1, max_size=1, max_waiting=3, acquire_timeout=LONG, lanes=lanes) as pool:

        async def lease() -> None:
            async with pool.acquire() as conn:
                await conn.execute("select 1")

        async with pool.acquire():
            leases = [asyncio.create_task(lease()) for _ in range(2)]
            await eventually(lambda: pool.stats().waiting == 2)
            one_shot = asyncio.create_task(pool.fetchval("select 1"))
            await eventually(lambda: pool.stats().waiting == 3)
            done, _ = await asyncio.wait([one_shot], timeout=0.2)
            assert not done, one_shot.exception()
        assert await one_shot == 1
        await asyncio.gather(*leases)
