"""A statement that the server does not end: the caller is back in time, and the pool gets its place back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually

from asyncpool import Pool

from .interruptions import OPERATIONS, PAUSES, WAYS, Operation, Pause, Way, asyncio_timeout, execute, task_cancel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from kit.servers import Admin

    from asyncpool.cli.embedded import EmbeddedServer

Connection = psycopg.AsyncConnection[Any]

CANCEL_TIMEOUT = 0.2
CHECK_TIMEOUT = 0.2
# After this it counts as never: far more than both together, and less than any deadline of psycopg's own.
TOO_LATE = 4.0


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


@contextmanager
def thawed_at_the_end(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def impatient(dsn: str) -> Pool[Connection]:
    return Pool(dsn, min_size=0, max_size=1, cancel_timeout=CANCEL_TIMEOUT, check_timeout=CHECK_TIMEOUT)


async def assert_goes_on(pool: Pool[Connection], pid: int) -> None:
    async with pool.acquire(timeout=30) as conn:
        assert conn.info.backend_pid != pid
        await conn.execute("select 1")


async def ended(admin: Admin, pid: int) -> None:
    await eventually(lambda: not admin.execute("select 1 from pg_stat_activity where pid = %s", [pid]), timeout=30)


# Every operation in some ways, and one in all: the deadline does not depend on how often one is cancelled.
IN_SOME_WAYS: list[tuple[Operation, Way]] = [
    (operation, way) for operation in OPERATIONS for way in (task_cancel, asyncio_timeout)
]
COMBINATIONS = IN_SOME_WAYS + [(execute, way) for way in WAYS if (execute, way) not in IN_SOME_WAYS]


@pytest.mark.parametrize(("operation", "way"), COMBINATIONS, ids=lambda function: function.__name__)
async def test_a_frozen_server_process_holds_up_no_cancelled_caller(
    private_dsn: str, private_admin: Admin, way: Way, operation: Operation
) -> None:
    asleep = "select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'"
    async with impatient(private_dsn) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        frozen_at: list[float] = []

        def asleep_and_frozen() -> bool:
            if private_admin.execute(asleep, [pid]) and not frozen_at:
                freeze(pid)
                frozen_at.append(time.monotonic())
            return bool(frozen_at)

        async def work() -> None:
            async with pool.acquire() as conn:
                await operation(conn)

        with thawed_at_the_end(pid):
            await way(work, asleep_and_frozen)
            assert time.monotonic() - frozen_at[0] < TOO_LATE
            await assert_goes_on(pool, pid)
        # The server counted one session too many for a while, and the pool does not hide it.
        assert pool.stats().abandoned == 1
        await ended(private_admin, pid)


async def test_a_frozen_postmaster_holds_up_no_cancelled_caller(
    private_dsn: str, private_server: EmbeddedServer, private_admin: Admin
) -> None:
    """The request to cancel arrives nowhere, while the statement's own process is well."""
    assert private_server.postmaster_pid is not None
    private_admin.execute("select 1")  # it could not connect while the postmaster is frozen
    asleep = "select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'"
    async with impatient(private_dsn) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def work() -> None:
            async with pool.acquire() as conn:
                await execute(conn)

        with thawed_at_the_end(private_server.postmaster_pid):
            freeze(private_server.postmaster_pid)
            began = time.monotonic()
            await task_cancel(work, lambda: bool(private_admin.execute(asleep, [pid])))
            assert time.monotonic() - began < TOO_LATE
        await assert_goes_on(pool, pid)
        # The request was delivered late, to a session that is nobody's any more.
        await ended(private_admin, pid)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("pause", PAUSES, ids=lambda pause: pause.__name__)
async def test_what_lies_in_the_socket_does_not_pass_for_an_answer_to_the_cancellation(
    private_dsn: str, private_admin: Admin, way: Way, pause: Pause
) -> None:
    async with impatient(private_dsn) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        half_way = asyncio.Event()
        frozen_at: list[float] = []

        def half_way_and_frozen() -> bool:
            if half_way.is_set() and not frozen_at:
                freeze(pid)
                frozen_at.append(time.monotonic())
            return bool(frozen_at)

        async def work() -> None:
            async with pool.acquire() as conn:
                await pause(conn, half_way)

        with thawed_at_the_end(pid):
            await way(work, half_way_and_frozen)
            assert time.monotonic() - frozen_at[0] < TOO_LATE
            await assert_goes_on(pool, pid)
        await ended(private_admin, pid)


async def test_a_rollback_that_is_not_answered_costs_the_connection_not_the_place(
    private_dsn: str, private_admin: Admin
) -> None:
    async with impatient(private_dsn) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        await conn.execute("select 1")
        with thawed_at_the_end(pid):
            freeze(pid)
            await pool.release(conn)
            await assert_goes_on(pool, pid)
        await ended(private_admin, pid)


async def test_a_commit_at_the_blocks_end_that_is_not_answered_can_be_cancelled(
    private_dsn: str, private_admin: Admin
) -> None:
    async with impatient(private_dsn) as pool:
        committing = asyncio.Event()

        async def work() -> None:
            async with pool.acquire() as conn:
                await conn.execute("create temp table t (id int)")
                freeze(conn.info.backend_pid)
                committing.set()

        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        with thawed_at_the_end(pid):
            task = asyncio.create_task(work())
            await committing.wait()
            await asyncio.sleep(0)
            began = time.monotonic()
            task.cancel()
            await asyncio.wait([task], timeout=30)
            assert task.cancelled()
            assert time.monotonic() - began < TOO_LATE
            await assert_goes_on(pool, pid)
        await ended(private_admin, pid)


STEPS: dict[str, Callable[[Connection], Awaitable[object]]] = {
    "execute": lambda conn: conn.execute("select 1"),
    "start of a transaction block": lambda conn: conn.transaction().__aenter__(),
    "start of a pipeline": lambda conn: conn.pipeline().__aenter__(),
    "start of a copy": lambda conn: conn.cursor().copy("copy (select 1) to stdout").__aenter__(),
}


@pytest.mark.parametrize("step", STEPS)
async def test_whatever_a_caller_begins_with_a_frozen_server_process_it_can_be_cancelled(
    private_dsn: str, private_admin: Admin, step: str
) -> None:
    async with impatient(private_dsn) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        with thawed_at_the_end(pid):
            freeze(pid)

            async def begin() -> None:
                await STEPS[step](conn)
                await conn.execute("select 1")  # a pipeline begins without a word

            task = asyncio.create_task(begin())
            await asyncio.sleep(0.05)
            assert not task.done()
            began = time.monotonic()
            task.cancel()
            await asyncio.wait([task], timeout=30)
            assert task.cancelled()
            assert time.monotonic() - began < TOO_LATE
            await pool.release(conn)
            await assert_goes_on(pool, pid)
        await ended(private_admin, pid)
