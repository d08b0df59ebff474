"""A task that is cancelled is back in time, whether the server can hear of it or not."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from kit.loops import on_uvloop
from kit.proxy import FAIR, STALLED, Proxy, Towards, Weather
from pool.interruptions import (
    PAUSES,
    WAYS,
    Connection,
    Operation,
    Pause,
    Way,
    anyio_scope,
    commit,
    copy_in,
    copy_out,
    end_of_copy_in,
    end_of_pipeline,
    end_of_transaction_block,
    execute,
    execute_several,
    execute_under_autocommit,
    executemany,
    executemany_returning,
    inside_transaction_blocks,
    pipeline,
    pipeline_in_transaction_block,
    read_stream,
    read_stream_by_chunks,
    start_of_copy_out,
    task_cancel,
)
from psycopg.conninfo import make_conninfo

from asyncpool import Pool

from .deadlines import MARGIN, check_overrun, figures

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from kit.servers import Admin, Server

pytestmark = pytest.mark.usefixtures("no_bug_reported")

CANCEL_TIMEOUT = 0.25
CHECK_TIMEOUT = 0.25
PATIENCE = 25.0
LATENCY = 0.3

DIRECTIONS = {"to server": Towards.SERVER, "to client": Towards.CLIENT, "both ways": None}
each_death = pytest.mark.parametrize("deaf", DIRECTIONS.values(), ids=DIRECTIONS)
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


async def inside_transaction_block(conn: Connection) -> None:
    async with conn.transaction():
        await execute(conn)


# How many round trips each takes to end: one in which TCP connects for the request to cancel, one in which the request
# goes there and the statement's error comes back. After that psycopg ends its blocks: a ROLLBACK is one, that to a
# savepoint two, the end of a pipeline one. In a scope of anyio's that last wait is cancelled again, in vain, by a
# request for which TCP has to connect as well.
ROUND_TRIPS: dict[Operation, int] = {
    execute: 2,
    execute_under_autocommit: 2,
    execute_several: 2,
    executemany: 2,
    executemany_returning: 3,
    commit: 2,
    end_of_transaction_block: 2,
    inside_transaction_block: 3,
    inside_transaction_blocks: 5,
    pipeline: 3,
    end_of_pipeline: 2,
    pipeline_in_transaction_block: 4,
    copy_out: 2,
    start_of_copy_out: 2,
    copy_in: 2,
    end_of_copy_in: 2,
    read_stream: 2,
    read_stream_by_chunks: 2,
}
ENDED_BY_PIPELINE = (executemany_returning, pipeline, pipeline_in_transaction_block)
OPERATIONS = list(ROUND_TRIPS)


def asleep(admin: Admin, application_name: str) -> int:
    """How many of these sessions sleep in the middle of a statement."""
    sleeping = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    return int(admin.value(sleeping, [application_name]))


def at(pause: Pause, half_way: asyncio.Event) -> Callable[[Connection], Awaitable[None]]:
    return lambda conn: pause(conn, half_way)


class Cancelled:
    """A lease that is cancelled while the network is dead, in a pool of one place, and the time that it was back."""

    def __init__(self, dsn: str, name: str) -> None:
        self.name = name
        self.pool: Pool[Connection] = Pool(
            dsn, min_size=0, max_size=1, cancel_timeout=CANCEL_TIMEOUT, check_timeout=CHECK_TIMEOUT
        )
        self.pid = 0
        self.back_at = 0.0

    async def cancel(self, way: Way, do: Callable[[Connection], Awaitable[None]], busy: Callable[[], bool]) -> None:
        async with self.pool.acquire() as conn:
            self.pid = conn.info.backend_pid

        async def work() -> None:
            try:
                async with self.pool.acquire() as conn:
                    await do(conn)
            finally:
                self.back_at = time.monotonic()

        await way(work, busy)
        assert self.pool.stats().leased == 0

    async def check(self, cancelled_at: float, way: Way) -> None:
        """It was back in time, and the place is free for a connection that works."""
        check_overrun(f"cancel_timeout, {self.name}, {way.__name__}", self.back_at - cancelled_at, CANCEL_TIMEOUT)
        async with self.pool.acquire(timeout=20) as conn:
            assert conn.info.backend_pid != self.pid
            cursor = await conn.execute("select 'fine'")
            assert await cursor.fetchall() == [("fine",)]


@asynccontextmanager
async def all_cancelled(dsn: str, works: Iterable[Callable[..., object]]) -> AsyncIterator[list[Cancelled]]:
    async with AsyncExitStack() as stack:
        leases = [Cancelled(dsn, work.__name__) for work in works]
        for lease in leases:
            await stack.enter_async_context(lease.pool)
        yield leases


@each_death
@each_way
async def test_a_cancelled_task_is_back_within_cancel_timeout_when_the_network_is_dead(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, way: Way, deaf: Towards | None
) -> None:
    """Every operation at once, each in a pool of its own."""
    dead_since: list[float] = []

    def all_asleep_and_dead() -> bool:
        if not dead_since and asleep(admin, application_name) == len(OPERATIONS):
            proxy.apply(STALLED, deaf)
            dead_since.append(time.monotonic())
        return bool(dead_since)

    async with all_cancelled(proxied_dsn, OPERATIONS) as leases:
        cancelling = [
            lease.cancel(way, operation, all_asleep_and_dead)
            for lease, operation in zip(leases, OPERATIONS, strict=True)
        ]
        await asyncio.gather(*cancelling)
        proxy.apply(FAIR)
        await asyncio.gather(*(lease.check(dead_since[0], way) for lease in leases))


@pytest.mark.parametrize("way", [task_cancel, anyio_scope], ids=lambda way: way.__name__)
@on_uvloop
async def test_so_it_is_on_uvloop(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, way: Way
) -> None:
    await test_a_cancelled_task_is_back_within_cancel_timeout_when_the_network_is_dead(
        proxy, proxied_dsn, admin, application_name, way, None
    )


@each_death
@each_way
async def test_one_that_is_cancelled_between_two_pieces_is_back_in_time_as_well(
    proxy: Proxy, proxied_dsn: str, way: Way, deaf: Towards | None
) -> None:
    dead_since: list[float] = []
    half_way = {pause: asyncio.Event() for pause in PAUSES}

    def all_half_way_and_dead() -> bool:
        if not dead_since and all(event.is_set() for event in half_way.values()):
            proxy.apply(STALLED, deaf)
            dead_since.append(time.monotonic())
        return bool(dead_since)

    async with all_cancelled(proxied_dsn, PAUSES) as leases:
        cancelling = [
            lease.cancel(way, at(pause, half_way[pause]), all_half_way_and_dead)
            for lease, pause in zip(leases, PAUSES, strict=True)
        ]
        await asyncio.gather(*cancelling)
        proxy.apply(FAIR)
        await asyncio.gather(*(lease.check(dead_since[0], way) for lease in leases))


@pytest.mark.parametrize("way", [task_cancel, anyio_scope], ids=lambda way: way.__name__)
async def test_a_cancelled_task_is_back_within_two_round_trips_when_the_server_can_hear_it(
    server: Server, admin: Admin, application_name: str, way: Way
) -> None:
    """Those in which blocks of psycopg's end come on top. Every operation at once, each in a network of its own."""
    round_trips: dict[str, int] = {}
    took: dict[str, float] = {}
    slow_since: list[float] = []
    proxies: list[Proxy] = []

    def all_asleep_and_slow() -> bool:
        if not slow_since and asleep(admin, application_name) == len(OPERATIONS):
            for proxy in proxies:
                proxy.apply(Weather(latency=LATENCY))
                proxy.count_round_trips()
            slow_since.append(time.monotonic())
        return bool(slow_since)

    async def cancel_one(proxy: Proxy, operation: Operation) -> None:
        dsn = make_conninfo(proxy.dsn, application_name=application_name)
        async with Pool(dsn, min_size=0, max_size=1, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
            async with pool.acquire() as conn:
                pid = conn.info.backend_pid

            async def work() -> None:
                try:
                    async with pool.acquire() as conn:
                        await operation(conn)
                finally:
                    round_trips[operation.__name__] = proxy.round_trips
                    took[operation.__name__] = time.monotonic() - slow_since[0]

            await way(work, all_asleep_and_slow)
            proxy.clear()
            async with pool.acquire() as conn:
                assert conn.info.backend_pid == pid
                cursor = await conn.execute("select 'fine'")
                assert await cursor.fetchall() == [("fine",)]
            assert pool.stats().closes == {}

    with ExitStack() as stack:
        proxies += [stack.enter_context(Proxy(server.dsn)) for _ in OPERATIONS]
        await asyncio.gather(*(map(cancel_one, proxies, OPERATIONS)))
    for name, count in round_trips.items():
        figures.info("%s: %d round trips, %.0f ms of %.0f", name, count, 1000 * took[name], 2000 * LATENCY * count)
    expected = {
        operation.__name__: count + (way is anyio_scope and operation in ENDED_BY_PIPELINE)
        for operation, count in ROUND_TRIPS.items()
    }
    assert round_trips == expected
    for name, count in expected.items():
        assert took[name] < count * 2 * LATENCY + MARGIN


@on_uvloop
async def test_so_many_round_trips_it_takes_on_uvloop(server: Server, admin: Admin, application_name: str) -> None:
    await test_a_cancelled_task_is_back_within_two_round_trips_when_the_server_can_hear_it(
        server, admin, application_name, anyio_scope
    )
