"""The server has no place for another session (53300): the pool serves on with what it has."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.load import under_load
from kit.loops import on_both_loops
from kit.mortal_server import APPLICATION_USER
from kit.waiting import eventually
from psycopg import errors as e

from asyncpool import Pool, PoolTimeout

from .recovery import assert_whole, backend_pid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.mortal_server import MortalServer

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

PLACES = 5


@dataclass(frozen=True)
class Full:
    """A server with PLACES sessions for a user, and its words when they are taken."""

    mortal: MortalServer
    user: str
    words: str

    def dsn(self, application_name: str) -> str:
        return self.mortal.dsn(application_name, user=self.user)


def limits(user: str, words: str, superuser_reserved: int, reserved: int) -> Any:
    settings = {
        # One is for the session by which the test looks at the server.
        "max_connections": PLACES + superuser_reserved + reserved + 1,
        "superuser_reserved_connections": superuser_reserved,
        "reserved_connections": reserved,
    }
    return pytest.param((settings, user, words), id=words.partition(" ")[0] + f"-{reserved}")


every_kind_of_full = pytest.mark.parametrize(
    "full",
    [
        limits("postgres", "sorry, too many clients already", 0, 0),
        limits(APPLICATION_USER, "reserved for roles with the SUPERUSER attribute", 3, 0),
        limits(APPLICATION_USER, "reserved for roles with privileges of the", 1, 2),
    ],
    indirect=True,
)
one_kind_of_full = pytest.mark.parametrize(
    "full", [limits(APPLICATION_USER, "reserved for roles with the SUPERUSER attribute", 3, 0)], indirect=True
)


@pytest.fixture
def full(mortal: MortalServer, request: pytest.FixtureRequest) -> Iterator[Full]:
    settings, user, words = request.param
    with mortal.settings(restart=True, **settings):
        mortal.admin.value("select 1")
        yield Full(mortal, user, words)


@every_kind_of_full
async def test_requests_are_served_by_the_connections_that_there_are(full: Full, application_name: str) -> None:
    async with Pool(full.dsn(application_name), min_size=0, max_size=3 * PLACES) as pool:
        async with under_load(pool, 4 * PLACES) as load:
            await eventually(lambda: full.words in repr(pool), timeout=20)
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 500, timeout=20)
        assert load.errors == []
        assert pool.stats().idle <= PLACES
        await assert_whole(pool, full.mortal, application_name)


@on_both_loops
@one_kind_of_full
async def test_who_waits_is_not_failed_but_served_by_the_next_release(full: Full, application_name: str) -> None:
    async with Pool(full.dsn(application_name), max_size=2 * PLACES) as pool, AsyncExitStack() as leases:
        held = [await leases.enter_async_context(pool.acquire()) for _ in range(PLACES)]
        pids = {conn.info.backend_pid for conn in held}
        waiting = [asyncio.create_task(request(pool)) for _ in range(10)]
        await eventually(lambda: pool.stats().connect_errors > 3)
        assert not any(task.done() for task in waiting)
        await leases.aclose()
        assert set(await asyncio.gather(*waiting)) <= pids


async def request(pool: Pool[Connection]) -> int:
    async with pool.acquire() as conn:
        return await backend_pid(conn)


@one_kind_of_full
async def test_attempts_follow_the_backoff_and_not_the_requests(full: Full, application_name: str) -> None:
    options: dict[str, Any] = {"backoff_initial": 0.2, "backoff_max": 1.0}
    async with Pool(full.dsn(application_name), min_size=0, max_size=2 * PLACES, **options) as pool:
        async with under_load(pool, 4 * PLACES) as load:
            await eventually(lambda: pool.stats().connect_errors > 0)
            errors, began = pool.stats().connect_errors, time.monotonic()
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + 1000, timeout=30)
            attempts, seconds = pool.stats().connect_errors - errors, time.monotonic() - began
        # Full jitter: on average two in 0.2 s at first, later two a second. By the requests it would be hundreds.
        assert attempts < 20 + 10 * seconds
        assert load.errors == []


@one_kind_of_full
async def test_who_can_be_served_by_nobody_is_told_why_in_time(full: Full, application_name: str) -> None:
    pool = Pool(full.dsn(application_name), min_size=PLACES + 1, max_size=PLACES + 1)
    with pytest.raises(PoolTimeout, match=full.words) as caught:
        await pool.open(timeout=1)
    assert isinstance(caught.value.__cause__, e.TooManyConnections)
    async with Pool(full.dsn(application_name), max_size=PLACES + 1) as pool, AsyncExitStack() as leases:
        for _ in range(PLACES):
            await leases.enter_async_context(pool.acquire())
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await eventually(lambda: pool.stats().connect_errors > 0)
        began = time.monotonic()
        with pytest.raises(PoolTimeout, match=full.words) as caught:
            await pool.acquire(timeout=0.5)
        assert 0.5 <= time.monotonic() - began < 1.5
        assert isinstance(caught.value.__cause__, e.TooManyConnections)


@one_kind_of_full
async def test_places_that_others_give_up_are_taken_without_being_asked(full: Full, application_name: str) -> None:
    pool = Pool(full.dsn(application_name), min_size=PLACES, max_size=PLACES, backoff_max=0.5)
    with ExitStack() as others:
        for _ in range(PLACES - 1):
            others.enter_context(psycopg.connect(full.dsn("asyncpool-test-others")))
        await pool.open(wait=False)
        # Of several that arrive together the server may refuse each one, as it counts the others.
        await eventually(lambda: pool.stats().connect_errors > 2 and pool.stats().idle == 1)
    async with pool:
        await eventually(lambda: pool.stats().idle == PLACES)
        await assert_whole(pool, full.mortal, application_name)


@one_kind_of_full
async def test_connections_are_replaced_at_the_end_of_their_lifetime_on_a_full_server(
    full: Full, application_name: str
) -> None:
    options: dict[str, Any] = {"min_size": PLACES, "max_size": 2 * PLACES, "max_lifetime": 1.0, "backoff_max": 0.3}
    async with Pool(full.dsn(application_name), **options) as pool:
        async with under_load(pool, 4 * PLACES) as load:
            await eventually(lambda: pool.stats().connects >= 3 * PLACES, timeout=20)
        assert load.errors == []
        assert pool.stats().connect_errors > 0
