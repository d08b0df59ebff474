"""The server stops and comes back: who was in the middle of something gets the error, everyone else a connection."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.load import under_load
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout

from .recovery import assert_no_more_failed_than_were_in_use, assert_whole, backend_pid

if TYPE_CHECKING:
    from kit.mortal_server import MortalServer, Way

    from asyncpool.cli.embedded import StopMode

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

SIZE = 6
TASKS = 15
OUTAGE = 1.0
# Ten times what the pool is to keep to, for machines that are busy.
FIRST_SUCCESS = 2.0
BACK_AT_MIN_SIZE = 10.0


def pool_of(dsn: str, size: int = SIZE) -> Pool[Connection]:
    return Pool(dsn, min_size=size, max_size=size)


# --- under load ---------------------------------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
async def test_a_restart_under_load_fails_what_was_in_use_and_nothing_else(
    mortal: MortalServer, application_name: str, mode: StopMode
) -> None:
    async with pool_of(mortal.dsn(application_name)) as pool:
        async with under_load(pool, TASKS) as load:
            await eventually(lambda: len(load.requests) > 10 * TASKS)
            opened = await asyncio.to_thread(mortal.restart, mode)
            await eventually(lambda: len(load.successes_since(opened)) > 10 * TASKS)
        assert_no_more_failed_than_were_in_use(load, SIZE, opened)
        await assert_whole(pool, mortal, application_name)


@pytest.mark.parametrize("way", ["tcp", "unix"])
async def test_after_an_outage_under_load_the_first_success_comes_soon(
    mortal: MortalServer, application_name: str, way: Way
) -> None:
    async with pool_of(mortal.dsn(application_name, way)) as pool:
        async with under_load(pool, TASKS) as load:
            await eventually(lambda: len(load.requests) > 10 * TASKS)
            opened = await asyncio.to_thread(mortal.outage, OUTAGE)
            await eventually(lambda: len(load.successes_since(opened)) > 10 * TASKS)
        assert load.first_success_since(opened) < FIRST_SUCCESS
        assert_no_more_failed_than_were_in_use(load, SIZE, opened)
        await assert_whole(pool, mortal, application_name)


async def test_a_killed_backend_takes_all_sessions_with_it_and_all_come_back(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name)) as pool:
        async with under_load(pool, TASKS) as load:
            await eventually(lambda: len(load.requests) > 10 * TASKS)
            before = mortal.admin.pids(application_name)
            mortal.kill_backend(before[0])
            await eventually(lambda: sum(pool.stats().closes.values()) >= SIZE)
            opened = await asyncio.to_thread(mortal.start)  # when it lets somebody in
            await eventually(lambda: len(load.successes_since(opened)) > 10 * TASKS)
        assert_no_more_failed_than_were_in_use(load, SIZE, opened)
        assert not set(before) & set(mortal.admin.pids(application_name))
        await assert_whole(pool, mortal, application_name)


async def test_a_killed_backend_that_was_idle_is_nobodys_error(mortal: MortalServer, application_name: str) -> None:
    async with pool_of(mortal.dsn(application_name)) as pool:
        before = set(mortal.admin.pids(application_name))
        mortal.kill_backend(min(before))
        # All of them: the postmaster ends the others when it hears of that one, and perhaps in the midst of a request.
        await eventually(lambda: mortal.have_ended(before))
        async with asyncio.TaskGroup() as group:
            found = [group.create_task(self_of(pool)) for _ in range(TASKS)]
        assert not before & {task.result() for task in found}
        await assert_whole(pool, mortal, application_name)


async def self_of(pool: Pool[Connection]) -> int:
    async with pool.acquire() as conn:
        return await backend_pid(conn)


async def test_during_a_smart_shutdown_the_pool_serves_on_with_what_it_has(
    mortal: MortalServer, application_name: str
) -> None:
    async with Pool(mortal.dsn(application_name), min_size=SIZE, max_size=2 * SIZE) as pool:
        async with under_load(pool, 2 * SIZE + 3) as load:
            await eventually(lambda: pool.stats().connects == 2 * SIZE)
            mortal.begin_smart_shutdown()
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 200)
            assert load.errors == []
            assert pool.stats().connect_errors == 0
            # All are let go of: the server ends, and the requests wait for it to come back.
            pool.drain()
            await asyncio.to_thread(mortal.stop, "smart")
            await eventually(lambda: pool.stats().connect_errors > 0)
            opened = await asyncio.to_thread(mortal.start)
            await eventually(lambda: len(load.successes_since(opened)) > 200)
        assert load.errors == []
        await assert_whole(pool, mortal, application_name)


# --- without load: everything is stale when the server is back ----------------------------------------------


@on_both_loops
async def test_however_many_went_stale_the_pool_is_soon_back_at_min_size(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name), 50) as pool:
        before = set(mortal.admin.pids(application_name))
        assert len(before) == 50
        opened = await asyncio.to_thread(mortal.outage, OUTAGE)
        async with pool.acquire() as conn:
            assert await backend_pid(conn) not in before
        assert time.monotonic() - opened < FIRST_SUCCESS
        await eventually(lambda: pool.stats().idle == 50)
        assert time.monotonic() - opened < BACK_AT_MIN_SIZE
        await assert_whole(pool, mortal, application_name)


async def test_a_restart_that_nobody_saw_costs_the_next_requests_no_error(
    mortal: MortalServer, application_name: str
) -> None:
    """The whole restart happens while the event loop is busy: every connection goes stale unseen."""
    async with pool_of(mortal.dsn(application_name)) as pool:
        for mode in ("fast", "immediate", "kill", "fast"):
            before = set(mortal.admin.pids(application_name))
            mortal.restart(mode)
            async with asyncio.TaskGroup() as group:
                found = [group.create_task(self_of(pool)) for _ in range(TASKS)]
            assert not before & {task.result() for task in found}
            await assert_whole(pool, mortal, application_name)


async def test_who_waits_through_an_outage_is_served_in_order(mortal: MortalServer, application_name: str) -> None:
    order: list[int] = []

    async def request(number: int) -> None:
        async with pool.acquire() as conn:
            order.append(number)
            await conn.execute("select 1")

    async with pool_of(mortal.dsn(application_name)) as pool:
        await asyncio.to_thread(mortal.stop)
        await eventually(lambda: pool.stats().connect_errors > 0)
        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(request(number))
            await eventually(lambda: pool.stats().waiting == 40)
            await asyncio.to_thread(mortal.start)
        assert order == list(range(40))
        await assert_whole(pool, mortal, application_name)


async def test_who_cannot_wait_for_the_end_of_an_outage_is_told_what_is_wrong(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name)) as pool:
        await asyncio.to_thread(mortal.stop)
        await eventually(lambda: pool.stats().connect_errors > 0)
        began = time.monotonic()
        with pytest.raises(PoolTimeout, match=r"Connection refused") as caught:
            await pool.acquire(timeout=0.3)
        assert 0.3 <= time.monotonic() - began < 1.3
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        await asyncio.to_thread(mortal.start)
        await assert_whole(pool, mortal, application_name)


# --- the database system is starting up ---------------------------------------------------------------------


async def test_a_server_that_is_starting_up_is_waited_for(mortal: MortalServer, application_name: str) -> None:
    async with pool_of(mortal.dsn(application_name)) as pool:
        await asyncio.to_thread(mortal.stop, "immediate")
        await asyncio.to_thread(mortal.start_in_recovery)
        waiting = asyncio.create_task(self_of(pool))
        before = pool.stats().connect_errors
        await eventually(lambda: pool.stats().connect_errors > before + 2)
        with pytest.raises(PoolTimeout, match="the database system is starting up") as caught:
            await pool.acquire(timeout=0.5)
        assert isinstance(caught.value.__cause__, psycopg.errors.CannotConnectNow)
        opened = await asyncio.to_thread(mortal.end_recovery)
        await waiting
        assert time.monotonic() - opened < FIRST_SUCCESS
        await assert_whole(pool, mortal, application_name)


async def test_a_pool_opens_when_the_server_has_started_up(mortal: MortalServer, application_name: str) -> None:
    pool = pool_of(mortal.dsn(application_name))
    await asyncio.to_thread(mortal.stop, "immediate")
    await asyncio.to_thread(mortal.start_in_recovery)
    with pytest.raises(psycopg.errors.CannotConnectNow, match="the database system is starting up"):
        await pool.open(timeout=0)
    opening = asyncio.create_task(pool.open())
    await eventually(lambda: pool.stats().connect_errors > 2)
    assert not opening.done()
    await asyncio.to_thread(mortal.end_recovery)
    await opening
    await assert_whole(pool, mortal, application_name)
    await pool.close()
