"""How many connections there are: at the start, on demand, after a while, and when the sizes are changed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout
from asyncpool.events import CloseReason

if TYPE_CHECKING:
    from kit.servers import Admin
    from psycopg import AsyncConnection

    from asyncpool.cli.embedded import EmbeddedServer


async def acquire(pool: Pool[Any], count: int) -> list[AsyncConnection[Any]]:
    return [await pool.acquire() for _ in range(count)]


async def release(pool: Pool[Any], connections: list[AsyncConnection[Any]]) -> None:
    for connection in connections:
        await pool.release(connection)


async def used_pid(pool: Pool[Any]) -> int:
    """The server process that the next acquire leads to."""
    async with pool.acquire() as connection:
        return int(connection.info.backend_pid)


async def idle_for(seconds: float, dsn: str) -> None:
    """Until a pool with this `max_idle` has closed a connection: so long others had their chance, too."""
    async with Pool(dsn, min_size=0, max_idle=seconds, application_name="asyncpool-test-clock") as clock:
        for _ in range(2):
            await used_pid(clock)
            await eventually(lambda: clock.stats().size == 0, timeout=10 * seconds + 5)


# --- the start ----------------------------------------------------------------------------------------------


@on_both_loops
async def test_min_size_is_connected_when_open_returns(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=6, max_size=10, max_connecting=2):
        assert admin.sessions(application_name) == 6


async def test_a_pool_without_min_size_opens_without_a_connection(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=0):
        assert admin.sessions(application_name) == 0


async def test_opening_without_waiting_connects_in_the_background(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn, min_size=3)
    await pool.open(wait=False)
    assert admin.sessions(application_name) < 3
    await eventually(lambda: admin.sessions(application_name) == 3)
    await pool.close()


async def test_no_more_than_max_connecting_connects_run_at_once(dsn: str) -> None:
    running, most = 0, 0
    proceed = asyncio.Event()

    async def conninfo() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await proceed.wait()
        running -= 1
        return dsn

    async with Pool(conninfo, min_size=0, max_size=20, max_connecting=3) as pool:
        leases = [asyncio.create_task(acquire(pool, 1)) for _ in range(12)]
        await eventually(lambda: running == 3)
        proceed.set()
        for connections in await asyncio.gather(*leases):
            await release(pool, connections)
        assert most == 3
        assert pool.stats().size == 12


# --- growing ------------------------------------------------------------------------------------------------


async def test_one_user_after_the_other_needs_one_connection(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=0, max_size=10) as pool:
        pids = {await used_pid(pool) for _ in range(50)}
        assert pids == set(admin.pids(application_name))
        assert len(pids) == 1


async def test_it_grows_by_as_many_as_are_used_at_once(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=1, max_size=10) as pool:
        connections = await acquire(pool, 4)
        await release(pool, connections)
        assert admin.sessions(application_name) == 4


async def test_at_max_size_one_waits(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=0, max_size=2) as pool:
        connections = await acquire(pool, 2)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0.05)
        assert admin.sessions(application_name) == 2
        await release(pool, connections)


# --- shrinking ----------------------------------------------------------------------------------------------


async def test_what_nobody_uses_goes_after_max_idle_down_to_min_size(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=2, max_size=6, max_idle=0.2) as pool:
        connections = await acquire(pool, 6)
        last_returned = [connection.info.backend_pid for connection in connections[-2:]]
        await release(pool, connections)
        await eventually(lambda: admin.sessions(application_name) == 2)
        assert sorted(admin.pids(application_name)) == sorted(last_returned)
        await idle_for(0.2, dsn)
        assert sorted(admin.pids(application_name)) == sorted(last_returned)
        assert pool.stats().closes == {CloseReason.MAX_IDLE: 4}


async def test_a_ping_is_no_use(dsn: str, admin: Admin, application_name: str) -> None:
    pings = 0

    async def check(connection: AsyncConnection[Any]) -> None:
        nonlocal pings
        pings += 1

    async with Pool(dsn, min_size=0, max_idle=0.5, check_interval=0.02, check=check) as pool:
        await used_pid(pool)
        await eventually(lambda: admin.sessions(application_name) == 0)
        assert pings > 1


async def test_what_is_used_now_and_then_stays(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=0, max_idle=1.0) as pool:
        await used_pid(pool)
        pids = admin.pids(application_name)
        clock = asyncio.create_task(idle_for(0.6, dsn))  # twice so long: longer than max_idle
        while not clock.done():
            await used_pid(pool)
            await asyncio.sleep(0.01)
        assert admin.pids(application_name) == pids


# --- max_uses and max_lifetime ------------------------------------------------------------------------------


async def test_a_connection_is_used_max_uses_times(dsn: str) -> None:
    async with Pool(dsn, min_size=0, max_uses=3) as pool:
        pids = [await used_pid(pool) for _ in range(9)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]
        assert pids == sorted(pids, key=pids.index)  # three times the first, then three times the second, …


async def test_a_connection_past_its_lifetime_ends_when_it_is_returned(dsn: str) -> None:
    async with Pool(dsn, min_size=0, max_size=1, max_lifetime=0.1) as pool:
        (old,) = await acquire(pool, 1)
        pid = old.info.backend_pid
        next_pid = asyncio.create_task(used_pid(pool))
        await idle_for(0.1, dsn)
        assert (await old.execute("select 1")).rownumber == 0  # while it is used it lives on
        await pool.release(old)
        assert await next_pid != pid
        assert CloseReason.MAX_LIFETIME in pool.stats().closes


async def test_a_connection_past_its_lifetime_is_not_handed_out(dsn: str) -> None:
    async with Pool(dsn, min_size=1, max_size=1, max_lifetime=0.2) as pool:
        pid = await used_pid(pool)
        time.sleep(0.25)  # noqa: ASYNC251 — the loop is busy past the lifetime: no timer can help
        assert await used_pid(pool) != pid


async def test_a_connection_past_its_lifetime_is_replaced_though_nobody_uses_it(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=2, max_size=2, max_lifetime=0.2):
        pids = set(admin.pids(application_name))

        def replaced() -> bool:
            present = admin.pids(application_name)
            return len(present) == 2 and not pids & set(present)

        await eventually(replaced)


async def test_the_replacement_is_there_before_the_old_one_goes(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth of the lifetime is for the replacement: the whole of it, as chance will have it, for a busy machine.
    monkeypatch.setattr("random.random", lambda: 0.999)
    async with Pool(dsn, min_size=1, max_size=2, max_lifetime=5.0) as pool:
        pid = await used_pid(pool)
        while CloseReason.MAX_LIFETIME not in pool.stats().closes:
            async with pool.acquire(timeout=0):  # would raise at a moment without a connection
                pass
            await asyncio.sleep(0.002)
        assert await used_pid(pool) != pid


# --- resize -------------------------------------------------------------------------------------------------


async def test_a_raised_min_size_is_connected(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=0, max_size=2) as pool:
        pool.resize(4, 8)
        await eventually(lambda: admin.sessions(application_name) == 4)
        assert (pool.stats().min_size, pool.stats().max_size) == (4, 8)


async def test_a_raised_max_size_serves_those_who_wait(dsn: str) -> None:
    async with Pool(dsn, min_size=0, max_size=1) as pool:
        connections = await acquire(pool, 1)
        waiting = [asyncio.create_task(acquire(pool, 1)) for _ in range(3)]
        await eventually(lambda: pool.stats().waiting == 3)
        pool.resize(0, 4)
        for served in await asyncio.gather(*waiting):
            connections += served
        await release(pool, connections)


async def test_idle_connections_in_excess_go_at_once_and_leased_ones_when_returned(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=0, max_size=6) as pool:
        connections = await acquire(pool, 6)
        await release(pool, connections[:3])
        pool.resize(0, 2)
        await eventually(lambda: admin.sessions(application_name) == 3)
        assert (await connections[3].execute("select 1")).rownumber == 0
        await release(pool, connections[3:])
        await eventually(lambda: admin.sessions(application_name) == 2)
        assert pool.stats().closes == {CloseReason.SHRUNK: 4}


async def test_connections_that_are_being_recycled_count_for_the_new_size(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=0, max_size=4, reset="session") as pool:
        connections = await acquire(pool, 4)
        for connection in connections:
            await connection.execute("select 1")
        await release(pool, connections)
        assert pool.stats().recycling == 4
        pool.resize(0, 1)
        await eventually(lambda: admin.sessions(application_name) == 1)


async def test_a_closed_pool_opens_with_the_sizes_it_was_given_last(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn, min_size=1, max_size=1)
    pool.resize(3, 5)
    async with pool:
        assert admin.sessions(application_name) == 3
        pool.resize(2, 5)
    async with pool:
        assert admin.sessions(application_name) == 2


# --- drain --------------------------------------------------------------------------------------------------


async def test_a_drain_replaces_idle_connections_now_and_leased_ones_when_returned(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=3, max_size=4) as pool:
        before = set(admin.pids(application_name))
        (connection,) = await acquire(pool, 1)
        leased = connection.info.backend_pid
        pool.drain()
        await eventually(lambda: before & set(admin.pids(application_name)) == {leased})
        assert (await connection.execute("select 1")).rownumber == 0
        await pool.release(connection)
        await eventually(lambda: len(now := admin.pids(application_name)) == 3 and not before & set(now))
        assert pool.stats().closes == {CloseReason.DRAINED: 3}


# --- what the server does not confirm -----------------------------------------------------------------------


@on_both_loops
async def test_a_session_whose_end_the_server_does_not_confirm_in_time_is_counted_as_abandoned(
    private_server: EmbeddedServer, private_dsn: str, private_admin: Admin, application_name: str
) -> None:
    async with Pool(private_dsn, min_size=1, max_size=1, check_timeout=0.2) as pool:
        frozen = await used_pid(pool)
        os.kill(frozen, signal.SIGSTOP)
        try:
            pool.drain()
            assert pool.stats().size == 1  # its place is kept as long as there is hope
            await eventually(lambda: pool.stats().abandoned == 1)
            assert await used_pid(pool) != frozen
            assert private_admin.sessions(application_name) == 1 + pool.stats().abandoned
        finally:
            os.kill(frozen, signal.SIGCONT)
        await eventually(lambda: private_admin.sessions(application_name) == 1)
