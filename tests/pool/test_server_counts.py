"""Never more sessions than `max_size`, as the server counts them, at any instant, whatever happens."""

from __future__ import annotations

import asyncio
import gc
import random
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.sampler import Sampler
from kit.waiting import eventually

from asyncpool import Pool, PoolError, PoolTimeout
from asyncpool.events import CloseReason

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kit.servers import Admin, Server

pytestmark = on_both_loops

MAX_SIZE = 3
TASKS = 12


@pytest.fixture
def sampler(server: Server, application_name: str, admin: Admin) -> Sampler:
    admin.value("select 1")  # its session, too, is nameless at first: have it there before anything is counted
    return Sampler(server.dsn, application_name, nameless_too=server.embedded is not None)


async def use(pool: Pool[Any]) -> None:
    async with pool.acquire() as conn:
        await conn.execute("select 1")


async def work_until(
    pool: Pool[Any], done: Callable[[], bool], use: Callable[[Pool[Any]], Awaitable[None]] = use
) -> None:
    """Keep `TASKS` tasks at the pool until `done()`."""

    async def go_on() -> None:
        while not done():
            await use(pool)

    await asyncio.gather(*(go_on() for _ in range(TASKS)))


def closed(pool: Pool[Any], reason: CloseReason) -> int:
    return pool.stats().closes.get(reason, 0)


async def test_growth_stops_at_max_size(dsn: str, sampler: Sampler) -> None:
    with sampler:
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE, max_connecting=100) as pool:
            await asyncio.gather(*(use(pool) for _ in range(100)))
            held = [await pool.acquire() for _ in range(MAX_SIZE)]
            await eventually(lambda: sampler.most >= MAX_SIZE)
            for conn in held:
                await pool.release(conn)
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_new_connection_waits_until_the_server_has_ended_the_used_up_one(dsn: str, sampler: Sampler) -> None:
    with sampler:
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE, max_uses=1) as pool:
            await work_until(pool, lambda: closed(pool, CloseReason.MAX_USES) >= 150)
    assert 0 < sampler.most <= MAX_SIZE


async def test_short_lives_do_not_overlap(dsn: str, sampler: Sampler) -> None:
    with sampler:
        async with Pool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE, max_lifetime=0.02) as pool:
            await work_until(pool, lambda: closed(pool, CloseReason.MAX_LIFETIME) >= 60)
            await eventually(lambda: closed(pool, CloseReason.MAX_LIFETIME) >= 90)  # nobody uses it: the timer's
    assert 0 < sampler.most <= MAX_SIZE


async def test_shrinking_and_growing_again_stays_within_the_size(dsn: str, sampler: Sampler) -> None:
    with sampler:
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE, max_idle=0.01) as pool:
            while closed(pool, CloseReason.MAX_IDLE) < 30:
                await asyncio.gather(*(use(pool) for _ in range(TASKS)))
                await eventually(lambda: pool.stats().idle < MAX_SIZE)
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_drain_replaces_one_by_one_place(dsn: str, sampler: Sampler) -> None:
    async def drain_now_and_then(pool: Pool[Any]) -> None:
        await use(pool)
        if random.random() < 0.1:
            pool.drain()

    with sampler:
        async with Pool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE) as pool:
            await work_until(pool, lambda: closed(pool, CloseReason.DRAINED) >= 60, drain_now_and_then)
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_resize_holds_for_the_server_once_the_excess_is_returned(
    dsn: str, server: Server, application_name: str
) -> None:
    async with Pool(dsn, min_size=0, max_size=2 * MAX_SIZE) as pool:
        leased = [await pool.acquire() for _ in range(2 * MAX_SIZE)]
        pool.resize(0, MAX_SIZE)
        for connection in leased:
            await pool.release(connection)
        await eventually(lambda: pool.stats().size == MAX_SIZE)
        with Sampler(server.dsn, application_name, nameless_too=server.embedded is not None) as smaller:
            await work_until(pool, lambda: pool.stats().acquires > 300)
            pool.drain()
            await work_until(pool, lambda: pool.stats().acquires > 600)
        assert 0 < smaller.most <= MAX_SIZE


async def test_resizing_to_and_fro_never_exceeds_the_larger_size(dsn: str, sampler: Sampler) -> None:
    async def resize_now_and_then(pool: Pool[Any]) -> None:
        await use(pool)
        if random.random() < 0.1:
            pool.resize(0, random.randint(1, MAX_SIZE))

    with sampler:
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE) as pool:
            await work_until(pool, lambda: closed(pool, CloseReason.SHRUNK) >= 40, resize_now_and_then)
    assert 0 < sampler.most <= MAX_SIZE


async def test_what_the_server_terminates_is_replaced_within_the_size(
    dsn: str, admin: Admin, application_name: str, sampler: Sampler
) -> None:
    terminated = 0

    async def use_or_lose(pool: Pool[Any]) -> None:
        nonlocal terminated
        with suppress(psycopg.OperationalError):
            await use(pool)
        if random.random() < 0.1 and (pids := admin.pids(application_name)):
            admin.execute("select pg_terminate_backend(%s)", [random.choice(pids)])  # without waiting for it
            terminated += 1

    with sampler:
        async with Pool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE, backoff_initial=0.001) as pool:
            await work_until(pool, lambda: terminated >= 40, use_or_lose)
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_connect_that_is_given_up_keeps_its_place_until_the_server_has_ended_it(
    dsn: str, sampler: Sampler
) -> None:
    with sampler:
        async with Pool(
            dsn, min_size=0, max_size=MAX_SIZE, connect_timeout=0.002, backoff_initial=0.001, backoff_max=0.001
        ) as pool:

            async def try_to_use(pool: Pool[Any]) -> None:
                with suppress(PoolTimeout):
                    async with pool.acquire(timeout=0.05):
                        pool.drain()

            def have_been_given_up() -> bool:
                stats = pool.stats()
                # On a busy machine most come before the timer is looked at.
                return stats.connect_errors > 0 and stats.connect_errors + stats.connects >= 100

            await work_until(pool, have_been_given_up, try_to_use)
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_cancelled_open_has_no_session_on_the_server_when_it_returns(
    dsn: str, admin: Admin, application_name: str, sampler: Sampler
) -> None:
    pool = Pool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE)
    cancelled = 0
    with sampler:
        for milliseconds in range(40):
            opening = asyncio.create_task(pool.open())
            await asyncio.sleep(milliseconds / 4000)
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await opening
            if opening.cancelled():
                cancelled += 1
                assert admin.sessions(application_name) == 0
                assert "closed" in repr(pool)
            await pool.close()
    assert cancelled, "every open() was faster than its cancellation"
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_close_in_the_middle_of_connecting_leaves_no_session(
    dsn: str, admin: Admin, application_name: str, sampler: Sampler
) -> None:
    pool = Pool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE)
    with sampler:
        for milliseconds in range(40):
            await pool.open(wait=False)
            await asyncio.sleep(milliseconds / 4000)
            await pool.close(timeout=0)
            assert admin.sessions(application_name) == 0
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_pool_reopened_right_after_it_severed_its_leases_stays_within_the_size(
    dsn: str, admin: Admin, application_name: str, sampler: Sampler
) -> None:
    pool = Pool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE)

    async def hold() -> None:
        with suppress(psycopg.OperationalError):
            async with pool.acquire() as connection:
                await connection.execute("select pg_sleep(60)")

    with sampler:
        for _ in range(10):
            await pool.open()
            holders = [asyncio.create_task(hold()) for _ in range(MAX_SIZE)]
            await eventually(lambda: admin.states(application_name) == ["active"] * MAX_SIZE)
            await pool.close(timeout=0)
            await asyncio.gather(*holders)
    assert 0 < sampler.most <= MAX_SIZE
    assert pool.stats().abandoned == 0


# Survives the cancel request for a while, so that its connection has to be shut down.
STUBBORN = """do $$ begin
    perform pg_sleep(60);
exception when query_canceled then
    perform pg_sleep(0.05);
end $$"""


async def test_a_statement_that_is_shut_down_keeps_its_place_until_the_server_has_ended_it(
    dsn: str, sampler: Sampler
) -> None:
    async def be_cancelled(pool: Pool[Any]) -> None:
        async with pool.acquire() as connection:
            with suppress(TimeoutError, psycopg.OperationalError):
                async with asyncio.timeout(0.01):
                    await connection.execute(STUBBORN)

    with sampler:
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE, cancel_timeout=0.005) as pool:
            with suppress(PoolError):  # of the block, whose transaction is lost
                await work_until(pool, lambda: pool.stats().connects >= 30, be_cancelled)
    assert 0 < sampler.most <= MAX_SIZE


async def test_connections_that_come_back_unusable_are_replaced_within_the_size(dsn: str, sampler: Sampler) -> None:
    async def misuse(pool: Pool[Any]) -> None:
        connection = await pool.acquire()
        stream = connection.cursor().stream("select generate_series(1, 100000)")
        await anext(stream)
        await pool.release(connection)
        with suppress(Exception):
            await stream.aclose()

    with sampler:
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE) as pool:
            await work_until(pool, lambda: closed(pool, CloseReason.RETURNED_BUSY) >= 40, misuse)
    assert 0 < sampler.most <= MAX_SIZE


async def test_a_dropped_lease_is_replaced_within_the_size(dsn: str, sampler: Sampler) -> None:
    async def drop(pool: Pool[Any]) -> None:
        await pool.acquire()
        gc.collect(0)

    with sampler, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        async with Pool(dsn, min_size=0, max_size=MAX_SIZE) as pool:
            await work_until(pool, lambda: closed(pool, CloseReason.LEASE_LOST) >= 40, drop)
    assert 0 < sampler.most <= MAX_SIZE


async def test_cancelling_every_task_of_the_loop_again_and_again_loses_no_place(dsn: str, sampler: Sampler) -> None:
    async def work(pool: Pool[Any]) -> None:
        while True:
            with suppress(PoolError, psycopg.OperationalError):
                await use(pool)

    async with Pool(dsn, min_size=1, max_size=MAX_SIZE, max_uses=5, backoff_initial=0.001, backoff_max=0.01) as pool:
        with sampler:
            for number in range(1, 21):
                workers = [asyncio.create_task(work(pool)) for _ in range(TASKS)]
                await eventually(lambda: pool.stats().acquires > 20 * number, timeout=20)  # noqa: B023
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                await asyncio.wait(workers)
            connections = [await pool.acquire() for _ in range(MAX_SIZE)]
            for connection in connections:
                await pool.release(connection)
        assert sampler.most <= MAX_SIZE + pool.stats().abandoned
