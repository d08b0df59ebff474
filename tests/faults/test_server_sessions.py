"""Sessions that the server ends one by one: by hand, or because they were idle for too long."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.load import under_load
from kit.loops import on_both_loops
from kit.waiting import eventually, eventually_blocking
from psycopg import errors as e

from asyncpool import CloseReason, Pool

from .recovery import assert_whole, backend_pid

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.mortal_server import MortalServer

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

SIZE = 5
# Only sessions that are meant to end are given it: a machine may always be too busy to use the others in time.
IDLE_TIMEOUT = "100ms"


def pool_of(dsn: str | Callable[[], str], size: int = SIZE, **options: Any) -> Pool[Connection]:
    return Pool(dsn, min_size=size, max_size=size, **options)


async def request(pool: Pool[Connection]) -> int:
    """The server process that served it."""
    async with pool.acquire() as conn:
        return await backend_pid(conn)


async def requests(pool: Pool[Connection], number: int) -> set[int]:
    """So many at once, all of which must succeed: the server processes that served them."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(request(pool)) for _ in range(number)]
    return {task.result() for task in tasks}


def with_impatient_sessions(mortal: MortalServer, application_name: str, count: int) -> Callable[[], str]:
    """A conninfo by which the server has patience with each session but the first ones: those soon end."""
    impatient = mortal.dsn(application_name, options=f"-c idle_session_timeout={IDLE_TIMEOUT}")
    dsns = chain(repeat(impatient, count), repeat(mortal.dsn(application_name)))
    return lambda: next(dsns)


async def impatient_sessions(pool: Pool[Connection]) -> list[int]:
    """Their server processes, of those that it still has."""
    async with AsyncExitStack() as stack:
        conns = [await stack.enter_async_context(pool.acquire()) for _ in range(pool.stats().max_size)]
        return [conn.info.backend_pid for conn in conns if conn.info.options]


# --- pg_terminate_backend -----------------------------------------------------------------------------------


@on_both_loops
async def test_after_all_idle_sessions_were_terminated_no_acquire_fails(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name), 20) as pool:
        for _ in range(5):
            terminated = mortal.admin.pids(application_name)
            assert len(terminated) == 20
            mortal.terminate(*terminated)
            assert not await requests(pool, 50) & set(terminated)
            await assert_whole(pool, mortal, application_name)


async def test_some_terminated_idle_sessions_fail_no_acquire_and_cost_the_others_nothing(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name), 10) as pool:
        before = mortal.admin.pids(application_name)
        mortal.terminate(*before[::2])
        assert not await requests(pool, 30) & set(before[::2])
        await assert_whole(pool, mortal, application_name)
        assert set(before[1::2]) < set(mortal.admin.pids(application_name))
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 5}


@on_both_loops
async def test_the_user_of_a_terminated_session_is_told_and_nobody_else_notices(
    mortal: MortalServer, application_name: str
) -> None:
    async def sleep() -> None:
        async with pool.acquire() as conn:
            await conn.execute("select pg_sleep(600)")

    async with pool_of(mortal.dsn(application_name), autocommit=True) as pool:
        async with under_load(pool, 2 * SIZE) as load:
            for _ in range(5):
                sleeping = asyncio.create_task(sleep())
                [pid] = await eventually(lambda: sleepers(mortal, application_name))
                mortal.terminate(pid)
                with pytest.raises(e.AdminShutdown):
                    await sleeping
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 100)
        assert load.errors == []
        await assert_whole(pool, mortal, application_name)


def sleepers(mortal: MortalServer, application_name: str) -> list[int]:
    """The sessions that sleep for long."""
    found = mortal.admin.execute(
        "select pid from pg_stat_activity"
        " where application_name = %s and state = 'active' and query like '%%pg_sleep(600)'",
        [application_name],
    )
    return [pid for (pid,) in found]


async def test_all_sessions_terminated_in_use_fail_once_each_and_are_replaced(
    mortal: MortalServer, application_name: str
) -> None:
    async def sleep() -> None:
        async with pool.acquire() as conn:
            await conn.execute("select pg_sleep(600)")

    async with pool_of(mortal.dsn(application_name)) as pool:
        sleeping = [asyncio.create_task(sleep()) for _ in range(SIZE)]
        await eventually(lambda: len(sleepers(mortal, application_name)) == SIZE)
        waiting = [asyncio.create_task(request(pool)) for _ in range(20)]
        await eventually(lambda: pool.stats().waiting == 20)
        mortal.terminate(*sleepers(mortal, application_name))
        assert {type(x) for x in await asyncio.gather(*sleeping, return_exceptions=True)} == {e.AdminShutdown}
        await asyncio.gather(*waiting)
        await assert_whole(pool, mortal, application_name)


# --- idle_session_timeout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unseen", [False, True], ids=["seen", "unseen"])
async def test_sessions_that_were_idle_too_long_for_the_server_are_nobodys_error(
    mortal: MortalServer, application_name: str, unseen: bool
) -> None:
    for _ in range(4):
        async with pool_of(with_impatient_sessions(mortal, application_name, SIZE)) as pool:
            impatient = await impatient_sessions(pool)
            # All of them: a statement that crosses the server's own decision on its way fails in any pool.
            if unseen:  # until the pool is asked for connections: its event loop stands still
                eventually_blocking(lambda: mortal.have_ended(impatient))  # noqa: B023
            else:
                await eventually(lambda: mortal.have_ended(impatient))  # noqa: B023
            assert not await requests(pool, 3 * SIZE) & set(impatient)
            assert pool.stats().closes == {CloseReason.DISCONNECTED: SIZE}
            await assert_whole(pool, mortal, application_name)


async def test_pings_keep_idle_sessions_alive_where_check_interval_is_shorter(
    mortal: MortalServer, application_name: str
) -> None:
    # The setting is the session's own here: it holds for no one else.
    options = "-c idle_session_timeout=3s"
    with_pings = pool_of(mortal.dsn(application_name, options=options), 2, check_interval=0.1)
    without = pool_of(mortal.dsn(application_name + "-without", options=options), 2, check_interval=None)
    async with with_pings as pool, without:
        # One is enough: at its end the other is pinged, and goes on; later two may end in the same moment.
        await eventually(lambda: without.stats().closes.get(CloseReason.DISCONNECTED, 0) > 0)
        assert pool.stats().closes == {}
        assert pool.stats().connects == 2


async def test_a_lease_that_did_nothing_for_too_long_is_its_holders_error_alone(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name), autocommit=True) as pool:
        async with under_load(pool, 2 * SIZE) as load:
            async with pool.acquire() as conn:
                pid = conn.info.backend_pid
                await conn.execute(f"set idle_session_timeout = '{IDLE_TIMEOUT}'".encode())
                await eventually(lambda: pid not in mortal.admin.pids(application_name))
                with pytest.raises(e.IdleSessionTimeout):
                    await conn.execute("select 1")
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 100)
        assert load.errors == []
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


async def test_a_lease_that_timed_out_unused_is_replaced_when_it_comes_back(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(with_impatient_sessions(mortal, application_name, 1), 1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            if conn.info.options:  # else it has ended already
                await eventually(lambda: mortal.have_ended([pid]))
        assert await request(pool) != pid


# --- idle_in_transaction_session_timeout --------------------------------------------------------------------


async def test_a_transaction_that_was_idle_too_long_is_its_holders_error_alone(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name), autocommit=True) as pool:
        async with under_load(pool, 2 * SIZE) as load:
            with pytest.raises(e.IdleInTransactionSessionTimeout):
                async with pool.acquire() as conn, conn.transaction():
                    await be_idle_for_too_long(conn, mortal, application_name)
                    await conn.execute("select 1")
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 100)
        assert load.errors == []
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


async def be_idle_for_too_long(conn: Connection, mortal: MortalServer, application_name: str) -> None:
    """In a transaction, until the server has ended it and its session."""
    pid = conn.info.backend_pid
    await conn.execute(f"set local idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}'".encode())
    await eventually(lambda: pid not in mortal.admin.pids(application_name))


async def test_a_transaction_cut_off_before_its_commit_is_not_taken_for_committed(
    mortal: MortalServer, application_name: str
) -> None:
    mortal.admin.execute("create table acknowledged (id int)")
    try:
        async with pool_of(mortal.dsn(application_name), 1) as pool:
            with pytest.raises(psycopg.Error):
                async with pool.acquire() as conn:
                    await conn.execute("insert into acknowledged values (1)")
                    await be_idle_for_too_long(conn, mortal, application_name)
            await request(pool)
            assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}
        assert mortal.admin.value("select count(*) from acknowledged") == 0
    finally:
        mortal.admin.execute("drop table acknowledged")
