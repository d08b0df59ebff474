"""A cancelled statement ends on the server, and its connection goes on."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool

from .interruptions import OPERATIONS, PAUSES, WAYS, Operation, Pause, Way, execute

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = on_both_loops

# Seconds. So long that nothing here is severed because the machine is slow.
PATIENCE = 25.0

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


def is_asleep(admin: Admin, application_name: str) -> bool:
    asleep = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    return bool(admin.value(asleep, [application_name]))


@each_way
@each_operation
async def test_a_cancelled_statement_ends_and_its_connection_goes_on(
    dsn: str, admin: Admin, application_name: str, way: Way, operation: Operation
) -> None:
    async with Pool(dsn, max_size=1, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def work() -> None:
            async with pool.acquire() as conn:
                await operation(conn)

        await way(work, lambda: is_asleep(admin, application_name))
        assert pool.stats().leased == 0
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            cursor = await conn.execute("select 'fine'")
            assert await cursor.fetchall() == [("fine",)]
        assert pool.stats().closes == {}


@each_way
@pytest.mark.parametrize("pause", PAUSES, ids=lambda pause: pause.__name__)
async def test_what_is_cancelled_between_two_pieces_ends_and_its_connection_goes_on(
    dsn: str, way: Way, pause: Pause
) -> None:
    async with Pool(dsn, max_size=1, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        half_way = asyncio.Event()

        async def work() -> None:
            async with pool.acquire() as conn:
                await pause(conn, half_way)

        await way(work, half_way.is_set)
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            cursor = await conn.execute("select 'fine'")
            assert await cursor.fetchall() == [("fine",)]
        assert pool.stats().closes == {}


async def test_a_cancellation_never_hits_the_next_statement(dsn: str) -> None:
    """The request to cancel may arrive after the statement ended by itself: then nobody may be at work yet."""
    async with Pool(dsn, max_size=1, autocommit=True, cancel_timeout=PATIENCE) as pool:
        for turns in range(40):
            async with pool.acquire() as conn:
                task = asyncio.create_task(conn.execute("select 1"))
                for _ in range(turns % 4):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                await conn.execute("select pg_sleep(0.01)")
        assert pool.stats().connects == 1


@each_way
async def test_the_connection_can_be_used_right_after_a_cancellation_in_the_same_block(
    dsn: str, admin: Admin, application_name: str, way: Way
) -> None:
    async with Pool(dsn, autocommit=True, cancel_timeout=PATIENCE) as pool, pool.acquire() as conn:
        await way(lambda: execute(conn), lambda: is_asleep(admin, application_name))
        cursor = await conn.execute("select 'fine'")
        assert await cursor.fetchall() == [("fine",)]


@each_way
async def test_a_transaction_goes_on_after_a_statement_that_was_cancelled_in_a_nested_one(
    dsn: str, admin: Admin, application_name: str, table: str, way: Way
) -> None:
    async with Pool(dsn, cancel_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:

            async def insert_and_sleep() -> None:
                async with conn.transaction():
                    await conn.execute(f"insert into {table} values (2)".encode())
                    await execute(conn)

            await conn.execute(f"insert into {table} values (1)".encode())
            await way(insert_and_sleep, lambda: is_asleep(admin, application_name))
            await conn.execute(f"insert into {table} values (3)".encode())
        assert admin.execute(f"select id from {table} order by id") == [(1,), (3,)]


@each_way
async def test_waiting_for_notifications_can_be_cancelled(dsn: str, admin: Admin, way: Way) -> None:
    async with Pool(dsn, autocommit=True, max_size=1) as pool, pool.acquire() as conn:
        waiting = asyncio.Event()

        async def wait_for_one() -> None:
            async with aclosing(conn.notifies()) as notifications:
                waiting.set()
                await anext(notifications)

        await conn.execute("listen here")
        await way(wait_for_one, waiting.is_set)
        admin.execute("notify here, 'after all'")
        async with aclosing(conn.notifies(timeout=10)) as notifications:
            assert (await anext(notifications)).payload == "after all"


async def test_a_big_result_that_is_cancelled_while_it_arrives_leaves_a_clean_connection(dsn: str) -> None:
    async with Pool(dsn, max_size=1, cancel_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def fetch() -> None:
            async with pool.acquire() as conn:
                await conn.execute("select repeat('x', 1000) from generate_series(1, 200000)")

        for turns in (1, 2, 5, 10, 50, 200):
            task = asyncio.create_task(fetch())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            async with pool.acquire() as conn:
                assert conn.info.backend_pid == pid
                cursor = await conn.execute("select 'fine'")
                assert await cursor.fetchall() == [("fine",)]


async def test_a_big_statement_that_is_cancelled_while_it_is_sent_leaves_a_clean_connection(dsn: str) -> None:
    async with Pool(dsn, max_size=1, cancel_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            cursor = await conn.execute("select length(%s)", ["x" * 20_000_000])
            assert await cursor.fetchone() == (20_000_000,)

        async def send() -> None:
            async with pool.acquire() as conn:
                await conn.execute("select length(%s)", ["x" * 20_000_000])

        for turns in (1, 2, 5, 10, 50):
            task = asyncio.create_task(send())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            async with pool.acquire() as conn:
                assert conn.info.backend_pid == pid
                cursor = await conn.execute("select 'fine'")
                assert await cursor.fetchall() == [("fine",)]


async def test_a_statement_that_waits_for_another_tasks_statement_can_be_cancelled(
    dsn: str, admin: Admin, application_name: str
) -> None:
    """The one that runs is not disturbed."""
    async with Pool(dsn, max_size=1) as pool, pool.acquire() as conn:
        running = asyncio.create_task(conn.execute("select pg_sleep(0.3)"))
        await eventually(lambda: is_asleep(admin, application_name) or running.done())
        waiting = asyncio.create_task(conn.execute("select 1"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await running


async def test_a_cancellation_when_a_pipeline_has_just_been_entered_keeps_the_connection(dsn: str) -> None:
    async with Pool(dsn, min_size=1, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def enter() -> None:
            async with pool.acquire() as conn:
                # as if what never waits for the server had kept the event loop from the others for long
                cast(Any, conn)._session.reader.yielded_at = 0.0
                async with conn.pipeline():
                    await asyncio.Event().wait()

        for turns in range(1, 6):
            task = asyncio.create_task(enter())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), task.exception()

        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
