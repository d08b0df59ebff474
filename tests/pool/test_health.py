"""Dead connections: known soon, replaced, and never handed out; and the pings that find the silent ones."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import CloseReason, Pool, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]

# Seconds: more than the pool allows for what has arrived at the socket to be noticed (1 ms).
BUSY = 0.02


async def use(conn: Connection) -> int:
    """Its server process, asked from the server."""
    cursor = await conn.execute("select pg_backend_pid()")
    row: Any = await cursor.fetchone()
    await conn.commit()
    return int(row[0])


def last_heard(admin: Admin, pid: int) -> object:
    """When the server last began or ended to work for this session."""
    return admin.value("select state_change from pg_stat_activity where pid = %s", [pid])


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Clock:
    """The time as the package sees it; it can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for name, module in list(sys.modules.items()):
        if name.startswith("asyncpool.") and getattr(module, "monotonic", None) is time.monotonic:
            monkeypatch.setattr(module, "monotonic", clock)
    return clock


# --- ended by the server ------------------------------------------------------------------------------------


@on_both_loops
async def test_an_idle_session_that_the_server_ended_is_known_and_replaced(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=2, max_size=2, check_interval=None) as pool:
        first = admin.pids(application_name)
        admin.terminate(*first)
        await eventually(lambda: pool.stats().closes == {CloseReason.DISCONNECTED: 2})
        await eventually(lambda: pool.stats().idle == 2)
        assert not set(first) & set(admin.pids(application_name))
        assert pool.stats().connects == 4


async def test_an_idle_session_beyond_min_size_is_not_replaced(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=0, max_size=2, check_interval=None) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        admin.terminate(pid)
        await eventually(lambda: pool.stats().size == 0)
        assert pool.stats().connects == 1


@on_both_loops
async def test_a_session_that_ended_while_the_loop_was_busy_is_not_handed_out(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=3, max_size=3, check_interval=None) as pool:
        for _ in range(5):
            conns = [await pool.acquire() for _ in range(3)]
            pids = {conn.info.backend_pid for conn in conns}
            for conn in conns:
                await pool.release(conn)
            admin.terminate(*pids)  # this blocks, as a handler would that computes for long
            time.sleep(BUSY)  # noqa: ASYNC251
            async with pool.acquire() as conn:
                assert await use(conn) not in pids


async def test_without_waiting_too_no_ended_session_is_handed_out(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, max_size=1, check_interval=None) as pool:
        async with pool.acquire(timeout=0) as conn:
            pid = conn.info.backend_pid
        admin.terminate(pid)
        time.sleep(BUSY)  # noqa: ASYNC251
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)


async def test_a_session_that_ended_while_it_was_leased_is_not_handed_out_again(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, max_size=1, check_interval=None) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        admin.terminate(pid)
        time.sleep(BUSY)  # noqa: ASYNC251
        await pool.release(conn)
        async with pool.acquire() as conn:
            assert await use(conn) != pid
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


async def test_a_session_that_ended_in_a_lease_that_noticed_is_replaced(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, max_size=1, check_interval=None) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        admin.terminate(pid)
        with pytest.raises(psycopg.OperationalError):
            await use(conn)
        await pool.release(conn)
        async with pool.acquire() as conn:
            assert await use(conn) != pid


@pytest.mark.parametrize("changed", [False, True])
async def test_who_waits_gets_no_session_that_ended(dsn: str, admin: Admin, changed: bool) -> None:
    async with Pool(dsn, max_size=1, check_interval=None) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        if changed:
            conn.prepare_threshold = None
        waiting = asyncio.ensure_future(pool.acquire(timeout=30))
        await eventually(lambda: pool.stats().waiting == 1)
        admin.terminate(pid)
        time.sleep(BUSY)  # noqa: ASYNC251
        await pool.release(conn)
        conn = await waiting
        assert await use(conn) != pid
        await pool.release(conn)


async def test_one_dead_connection_makes_the_pool_ask_all_the_idle_ones(dsn: str, admin: Admin) -> None:
    asked: list[int] = []

    async def check(conn: Connection) -> None:
        asked.append(await use(conn))

    async with Pool(dsn, min_size=3, max_size=3, check_interval=None, check=check) as pool:
        conns = [await pool.acquire() for _ in range(3)]
        first, *others = [conn.info.backend_pid for conn in conns]
        for conn in conns:
            await pool.release(conn)
        assert asked == []
        admin.terminate(first)
        await eventually(lambda: sorted(asked) == sorted(others))
        await eventually(lambda: pool.stats().idle == 3)


async def test_the_death_of_a_session_disturbs_no_other_ones_statement(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=2, max_size=2, check_interval=None) as pool:
        async with pool.acquire() as conn:
            async with pool.acquire() as other:
                pid = other.info.backend_pid
            await conn.execute("create temp table t (id int)")
            admin.terminate(pid)
            await eventually(lambda: pool.stats().closes == {CloseReason.DISCONNECTED: 1})
            await conn.execute("insert into t values (1)")
        await eventually(lambda: pool.stats().connects == 3)


# --- pings --------------------------------------------------------------------------------------------------


async def test_idle_connections_are_pinged_in_the_background(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=2, max_size=2, check_interval=0.05) as pool:
        conns = [await pool.acquire() for _ in range(2)]
        pids = [conn.info.backend_pid for conn in conns]
        for conn in conns:
            await pool.release(conn)
        for _ in range(2):
            before = [last_heard(admin, pid) for pid in pids]
            await eventually(
                lambda: all(last_heard(admin, pid) != t for pid, t in zip(pids, before, strict=True))  # noqa: B023
            )
        assert pool.stats().connects == 2


async def test_a_connection_in_use_is_not_pinged(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=2, max_size=2, check_interval=0.05) as pool, pool.acquire() as conn:
        pid = await use(conn)
        async with pool.acquire() as other:
            idle = other.info.backend_pid
        before = last_heard(admin, pid)
        for _ in range(3):
            pinged = last_heard(admin, idle)
            await eventually(lambda: last_heard(admin, idle) != pinged)  # noqa: B023
        assert last_heard(admin, pid) == before


async def test_a_connection_is_not_pinged_sooner_than_check_interval_after_the_server_last_answered(
    dsn: str, admin: Admin
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = await use(conn)
        before = last_heard(admin, pid)
        for _ in range(3):
            async with pool.acquire():
                pass
        assert last_heard(admin, pid) == before


async def test_with_check_interval_zero_every_acquire_pings(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, max_size=1, check_interval=0) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        for _ in range(3):
            before = last_heard(admin, pid)
            async with pool.acquire() as conn:
                assert conn.info.backend_pid == pid
                assert last_heard(admin, pid) != before


async def test_without_check_interval_nothing_is_ever_pinged(dsn: str, admin: Admin, clock: Clock) -> None:
    async with Pool(dsn, max_size=1, check_interval=None, max_lifetime=None, max_idle=None) as pool:
        async with pool.acquire() as conn:
            pid = await use(conn)
        before = last_heard(admin, pid)
        clock.ahead += 1_000_000
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            assert last_heard(admin, pid) == before


async def test_after_the_process_was_frozen_a_connection_is_pinged_before_it_is_handed_out(
    dsn: str, admin: Admin, clock: Clock
) -> None:
    async with Pool(dsn, max_size=1, check_interval=30, max_lifetime=None, max_idle=None) as pool:
        async with pool.acquire() as conn:
            pid = await use(conn)
        before = last_heard(admin, pid)
        clock.ahead += 31
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            assert last_heard(admin, pid) != before


async def test_a_check_of_ones_own_takes_the_place_of_the_ping(dsn: str, clock: Clock) -> None:
    checked: list[int] = []

    async def check(conn: Connection) -> None:
        checked.append(await use(conn))

    pool = Pool(dsn, max_size=1, check_interval=30, check=check, max_lifetime=None, max_idle=None)
    async with pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        assert checked == []
        clock.ahead += 31
        async with pool.acquire():
            assert checked == [pid]


async def test_pings_are_no_use_for_max_idle(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=0, max_size=1, check_interval=0.05, max_idle=0.5) as pool:
        async with pool.acquire() as conn:
            pid = await use(conn)
        before = last_heard(admin, pid)
        await eventually(lambda: last_heard(admin, pid) != before)
        await eventually(lambda: pool.stats().closes == {CloseReason.MAX_IDLE: 1})


async def test_pings_do_not_change_who_is_handed_out_next(dsn: str, clock: Clock) -> None:
    async with Pool(dsn, min_size=3, max_size=3, check_interval=30, max_lifetime=None) as pool:
        conns = [await pool.acquire() for _ in range(3)]
        order = [conn.info.backend_pid for conn in conns]
        for conn in conns:
            await pool.release(conn)
        clock.ahead += 31
        await pool.check()
        await eventually(lambda: pool.stats().idle == 3)
        again = [await pool.acquire() for _ in range(3)]
        assert [conn.info.backend_pid for conn in again] == order[::-1]
        for conn in again:
            await pool.release(conn)


async def test_check_pings_every_idle_connection_at_once(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, min_size=3, max_size=3) as pool:
        conns = [await pool.acquire() for _ in range(3)]
        pids = [conn.info.backend_pid for conn in conns]
        for conn in conns:
            await pool.release(conn)
        before = [last_heard(admin, pid) for pid in pids]
        await pool.check()
        assert all(last_heard(admin, pid) != t for pid, t in zip(pids, before, strict=True))
        assert pool.stats().idle == 3


# --- a server that says nothing -----------------------------------------------------------------------------


async def test_a_connection_that_does_not_answer_the_ping_is_replaced(private_dsn: str, private_admin: Admin) -> None:
    pool = Pool(private_dsn, max_size=1, check_interval=0, check_timeout=0.5)
    async with pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        with frozen(pid):
            async with pool.acquire(timeout=30) as conn:
                assert await use(conn) != pid
            assert pool.stats().closes == {CloseReason.CHECK_FAILED: 1}
            assert pool.stats().abandoned == 1
        await eventually(
            lambda: not private_admin.execute("select from pg_stat_activity where pid = %s", [pid]), timeout=30
        )


async def test_check_closes_what_does_not_answer(private_dsn: str) -> None:
    async with Pool(private_dsn, min_size=2, max_size=2, check_timeout=0.5) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        with frozen(pid):
            await pool.check()
            assert pool.stats().closes == {CloseReason.CHECK_FAILED: 1}
            await eventually(lambda: pool.stats().idle == 2, timeout=10)


async def test_who_waits_for_a_ping_gets_another_connection_if_one_comes_back_first(private_dsn: str) -> None:
    async with Pool(private_dsn, min_size=2, max_size=2, check_interval=0, check_timeout=60) as pool:
        conn = await pool.acquire()
        async with pool.acquire() as other:
            silent = other.info.backend_pid
        with frozen(silent):
            waiting = asyncio.ensure_future(pool.acquire(timeout=30))
            await eventually(lambda: pool.stats().checking == 1)
            await pool.release(conn)
            got = await waiting
            assert got.info.backend_pid != silent
            await pool.release(got)
