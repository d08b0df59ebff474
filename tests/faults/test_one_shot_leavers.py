"""Callers of one-shot statements who leave, in whatever moment: nobody gets another's answer, and no place is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops

from asyncpool import Pool, PoolClosed, PoolTimeout, StatementTimeout

from .one_shots import (
    FOR_EVER,
    SLEEP,
    UNKNOWN_SLEEP,
    Ledger,
    assert_quiet,
    ended,
    lanes_take,
    learn,
    ledger_on,
    send,
)

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

CANCEL_TIMEOUT = 0.2


@pytest.fixture
def ledger(admin: Admin, application_name: str) -> Iterator[Ledger]:
    with ledger_on(admin, application_name) as ledger:
        yield ledger


@pytest.fixture(autouse=True)
def nothing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes_take(monkeypatch)


@pytest.mark.parametrize(("max_size", "lanes", "threshold"), [(1, 0, 5), (1, 1, 0), (3, 2, None), (3, 2, 5)])
@on_both_loops
async def test_after_thousands_that_were_given_up_everybody_gets_the_answer_to_his_own(
    dsn: str, admin: Admin, application_name: str, ledger: Ledger, max_size: int, lanes: int, threshold: int | None
) -> None:
    rng = Random(f"{max_size} {lanes} {threshold}")

    async def use(pool: Pool[Connection], first: int) -> None:
        for number in range(first, first + 30):
            timeout = rng.choice((None, None, 0.0001, 0.001, 0.01))
            with ledger.writing(number):
                if rng.random() < 0.5:
                    found = await pool.fetchval(ledger.insert_returning, [number], timeout=timeout)
                else:
                    found = await pool.fetchval(ledger.slow_insert, [number, rng.choice((0.0, 0.002))], timeout=timeout)
                assert found == number
            assert await pool.fetchrow("select %s::int, %s::text", [number, "x"]) == (number, "x")

    async with Pool(dsn, min_size=0, max_size=max_size, lanes=lanes, prepare_threshold=threshold) as pool:
        tasks = [asyncio.create_task(use(pool, 1000 * n)) for n in range(1, 101)]
        for task in rng.sample(tasks, 60):
            await asyncio.sleep(rng.choice((0, 0, 0.001, 0.004)))
            task.cancel()
        told = {type(error) for error in await ended(tasks, timeout=60)}
        assert told <= {type(None), asyncio.CancelledError, PoolTimeout, StatementTimeout}
        await assert_quiet(pool, admin, application_name)
        ledger.assert_true()
        assert await asyncio.gather(*(pool.fetchval("select %s::int", [n]) for n in range(100))) == list(range(100))


# --- a caller that is cancelled when its statement was refused ----------------------------------------------


async def assert_those_who_wait_are_served(pool: Pool[Connection]) -> None:
    """Nobody who has left counts any more, so that who waits now does."""
    async with pool.acquire(timeout=5):
        waiting = await send(pool.fetchval("select 'mine'", timeout=5))
        await asyncio.sleep(0.01)
        assert pool.stats().waiting == 1
    assert await waiting == "mine"
    assert pool.stats().waiting == 0


async def test_one_that_could_not_be_sent_and_is_cancelled_leaves_nothing_behind(dsn: str) -> None:
    async with Pool(dsn, max_size=1, lanes=1) as pool:
        for _ in range(5):
            task = await send(pool.fetchval("select %s", [object()]))
            task.cancel()
            await asyncio.wait([task])
        await assert_those_who_wait_are_served(pool)


async def test_one_whose_time_is_over_in_the_turn_in_which_it_is_cancelled_leaves_nothing_behind(dsn: str) -> None:
    """A timeout of the caller's own that is as long as `acquire_timeout` is common."""
    async with Pool(dsn, max_size=1, lanes=1, acquire_timeout=0.05) as pool:
        async with pool.acquire():

            async def give_up() -> None:
                async with asyncio.timeout(0.1):
                    await pool.fetchval("select 1")

            tasks = [await send(give_up()) for _ in range(5)]
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251  # the loop finds both overdue at once
            assert {type(error) for error in await ended(tasks)} <= {TimeoutError, PoolTimeout}
        await assert_those_who_wait_are_served(pool)


async def test_a_pool_that_is_closed_in_the_turn_of_a_grant_sends_nothing_more(
    dsn: str, admin: Admin, application_name: str, ledger: Ledger
) -> None:
    pool = Pool(dsn, max_size=1, lanes=1)
    await pool.open()
    await learn(pool, SLEEP)
    conn = await pool.acquire()
    waiting = await send(pool.execute(ledger.insert, [1]))
    closing = asyncio.create_task(pool.close())
    pool.release(conn)
    assert isinstance((await ended([waiting]))[0], PoolClosed)
    assert isinstance((await ended([await send(pool.fetchval(SLEEP, [1, 0.0]))]))[0], PoolClosed)
    await closing
    assert ledger.rows() == []
    assert admin.sessions(application_name) == 0


# --- a place that nobody waits for --------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 0.1])
@pytest.mark.parametrize("retry", [False, True])
@on_both_loops
async def test_a_lane_for_which_nobody_waits_any_more_gives_up_its_place(
    dsn: str, admin: Admin, application_name: str, retry: bool, timeout: float | None
) -> None:
    """`cancel_timeout` after it has stalled: whatever runs there would keep everybody else from it."""
    async with Pool(dsn, max_size=1, lanes=1, cancel_timeout=CANCEL_TIMEOUT) as pool:
        left = await send(pool.fetchval(UNKNOWN_SLEEP, [1, FOR_EVER], retry=retry, timeout=timeout))
        (gone,) = admin.pids(application_name)
        waiting = asyncio.create_task(_lease(pool))
        if timeout is None:
            await asyncio.sleep(3 * CANCEL_TIMEOUT)
            assert not waiting.done()  # somebody waits for it
            left.cancel()
        await ended([waiting])
        assert waiting.result() != gone
        assert admin.pids(application_name) == [waiting.result()]
        assert isinstance((await ended([left]))[0], asyncio.CancelledError if timeout is None else StatementTimeout)
        assert await pool.fetchval(SLEEP, [4, 0.0]) == 4
        await assert_quiet(pool, admin, application_name)
        assert pool.stats().abandoned == 0


@on_both_loops
async def test_a_lane_for_which_nobody_waits_gives_up_its_place_however_much_it_has_to_do(
    dsn: str, admin: Admin, application_name: str
) -> None:
    """The server has read all of it, and would do one after the other."""
    async with Pool(dsn, max_size=1, lanes=1, cancel_timeout=CANCEL_TIMEOUT, check_timeout=20) as pool:
        await learn(pool, SLEEP)
        tasks = [await send(pool.fetchval(SLEEP, [number, FOR_EVER])) for number in range(10)]
        assert pool.stats().waiting == 0
        (gone,) = admin.pids(application_name)
        for task in tasks:
            task.cancel()
        assert await _lease(pool) != gone
        await assert_quiet(pool, admin, application_name)
        assert pool.stats().abandoned == 0


async def _lease(pool: Pool[Connection]) -> int:
    async with pool.acquire(timeout=20) as conn:
        return conn.info.backend_pid


async def test_a_lane_for_which_nobody_waits_is_left_alone_if_it_is_not_stalled(dsn: str) -> None:
    """What it does is at its end soon."""
    async with Pool(dsn, max_size=1, lanes=1, cancel_timeout=CANCEL_TIMEOUT) as pool:
        await learn(pool, SLEEP)
        for _ in range(10):
            tasks = [await send(pool.fetchval(SLEEP, [number, 0.01])) for number in range(5)]
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0.02)
        assert await pool.fetchval(SLEEP, [1, 0.0]) == 1
        assert pool.stats().connects == 1
