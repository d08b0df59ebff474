"""All processes of the server are stopped (SIGSTOP): it neither answers nor ends, and goes on later (SIGCONT)."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.load import under_load
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout

from .recovery import assert_whole, backend_pid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kit.mortal_server import MortalServer

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

SIZE = 6
CONNECT_TIMEOUT = 0.3
CHECK_TIMEOUT = 0.4
CANCEL_TIMEOUT = 0.2
# What a busy machine may add to a deadline.
MARGIN = 1.0


def pool_of(dsn: str, **options: Any) -> Pool[Connection]:
    given: dict[str, Any] = {
        "min_size": SIZE,
        "max_size": SIZE,
        "connect_timeout": CONNECT_TIMEOUT,
        "check_timeout": CHECK_TIMEOUT,
        "cancel_timeout": CANCEL_TIMEOUT,
        "backoff_max": 0.5,
        **options,
    }
    return Pool(dsn, **given)


@asynccontextmanager
async def lasts(seconds: float) -> AsyncIterator[None]:
    """What is done in it ends no sooner than after `seconds`, and not much later."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert seconds - 0.01 <= took < seconds + MARGIN, f"{took:.3f} s"


@asynccontextmanager
async def at_most(seconds: float) -> AsyncIterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds + MARGIN, f"{took:.3f} s"


async def test_a_server_that_stood_still_for_a_moment_costs_no_request_and_no_connection(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name), connect_timeout=10, check_timeout=10) as pool:
        before = set(mortal.admin.pids(application_name))
        async with under_load(pool, 2 * SIZE) as load:
            await eventually(lambda: len(load.requests) > 100)
            with mortal.frozen():
                await asyncio.sleep(0.5)
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 100)
        assert load.errors == []
        assert set(mortal.admin.pids(application_name)) == before
        await assert_whole(pool, mortal, application_name)


@on_both_loops
async def test_nobody_waits_past_his_deadline_and_all_is_well_when_it_goes_on(
    mortal: MortalServer, application_name: str
) -> None:
    async with pool_of(mortal.dsn(application_name)) as pool:
        with mortal.frozen():
            # A connection that was heard of just now is handed out; what runs on it is cut off by its user.
            for _ in range(2):
                async with lasts(0.2 + CANCEL_TIMEOUT):
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.2), pool.acquire() as conn:
                            await conn.execute("select 1")
            async with at_most(CHECK_TIMEOUT * 2):
                await pool.check()
            assert pool.stats().idle == 0
            async with lasts(0.5):
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(timeout=0.5)
            await eventually(lambda: pool.stats().connect_errors > 0)
            with pytest.raises(PoolTimeout, match=r"timeout expired after 0\.3 s") as caught:
                await pool.acquire(timeout=0.1)
            assert isinstance(caught.value.__cause__, psycopg.errors.ConnectionTimeout)
            waiting = asyncio.create_task(request(pool))
            await eventually(lambda: pool.stats().waiting == 1)
        await waiting
        await assert_whole(pool, mortal, application_name)


async def request(pool: Pool[Connection]) -> int:
    async with pool.acquire() as conn:
        return await backend_pid(conn)


async def test_acquires_that_ping_first_keep_their_deadlines_too(mortal: MortalServer, application_name: str) -> None:
    async with pool_of(mortal.dsn(application_name), check_interval=0) as pool:
        with mortal.frozen():
            for timeout in (0.2, 0.6):
                async with lasts(timeout):
                    results = await asyncio.gather(
                        *(pool.acquire(timeout=timeout) for _ in range(20)), return_exceptions=True
                    )
                assert {type(result) for result in results} == {PoolTimeout}
        await request(pool)
        await assert_whole(pool, mortal, application_name)


async def test_a_load_with_deadlines_keeps_them_and_goes_on_afterwards(
    mortal: MortalServer, application_name: str
) -> None:
    """Each task gives itself a tenth of a second: it may take the time for cancelling longer, and no more."""
    longest = 0.0
    done = timed_out = 0
    stopping = False

    async def work() -> None:
        nonlocal longest, done, timed_out
        while not stopping:
            began = time.monotonic()
            try:
                async with asyncio.timeout(0.1), pool.acquire() as conn:
                    await conn.execute("select 1")
                done += 1
            except (TimeoutError, psycopg.OperationalError):
                timed_out += 1
                await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)

    async with pool_of(mortal.dsn(application_name)) as pool, asyncio.TaskGroup() as group:
        for _ in range(3 * SIZE):
            group.create_task(work())
        await eventually(lambda: done > 100)
        with mortal.frozen():
            await asyncio.sleep(1.5)
        before = done
        await eventually(lambda: done > before + 100)
        stopping = True
        assert timed_out > 3 * SIZE
        assert longest < 0.1 + CANCEL_TIMEOUT + MARGIN
        await eventually(lambda: pool.stats().leased == pool.stats().waiting == 0)
        await assert_whole(pool, mortal, application_name)


async def test_a_pool_closes_in_time_and_its_sessions_end_when_the_server_goes_on(
    mortal: MortalServer, application_name: str
) -> None:
    async def use() -> None:
        async with pool.acquire() as conn:
            await conn.execute("select 1")

    pool = pool_of(mortal.dsn(application_name))
    await pool.open()
    with mortal.frozen():
        using = asyncio.create_task(use())
        await eventually(lambda: pool.stats().leased == 1)
        async with at_most(0.3 + 2 * CHECK_TIMEOUT):
            await pool.close(timeout=0.3)
        with pytest.raises(psycopg.OperationalError):
            await using
        assert pool.stats().size == 0
        assert pool.stats().abandoned == SIZE
    await eventually(lambda: mortal.strangers() == 0, timeout=20)


async def test_a_pool_that_cannot_open_leaves_nothing_on_the_server(
    mortal: MortalServer, application_name: str
) -> None:
    pool = pool_of(mortal.dsn(application_name))
    with mortal.frozen():
        async with at_most(0.5 + 2 * CHECK_TIMEOUT):
            with pytest.raises(PoolTimeout):
                await pool.open(timeout=0.5)
        async with at_most(CONNECT_TIMEOUT + 2 * CHECK_TIMEOUT):
            with pytest.raises(psycopg.errors.ConnectionTimeout):
                await pool.open(timeout=0)
    # What it had sent is read now: a login whose client is gone.
    await eventually(lambda: mortal.strangers() == 0, timeout=20)
    async with pool:
        await assert_whole(pool, mortal, application_name)
