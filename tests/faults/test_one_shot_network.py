"""One-shot statements on a network that resets, stalls, cuts short or garbles what is under way on a lane."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.proxy import BYTE_BY_BYTE, FAIR, GARBAGE, STALLED, Proxy, Towards, Weather
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout, StatementOutcomeUnknown, StatementTimeout

from .deadlines import ends_within
from .one_shots import (
    SLEEP,
    UNKNOWN_SLEEP,
    Ledger,
    assert_outcomes_are_unknown,
    assert_quiet,
    ended,
    lanes_take,
    learn,
    ledger_on,
    send,
    under_one_shots,
)

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

CHECK_TIMEOUT = 0.2
CANCEL_TIMEOUT = 0.2
SECONDS: dict[str, Any] = {"check_timeout": CHECK_TIMEOUT, "cancel_timeout": CANCEL_TIMEOUT, "connect_timeout": 5}
TIMEOUT = 0.3
# More than the sockets and the proxy take between them.
MUCH = "x" * 30_000_000


@pytest.fixture
def ledger(admin: Admin, application_name: str) -> Iterator[Ledger]:
    with ledger_on(admin, application_name) as ledger:
        yield ledger


@pytest.fixture(autouse=True)
def nothing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes_take(monkeypatch)


@dataclass(frozen=True)
class Cut:
    """What becomes of the bytes in one direction of a lane on which much is under way."""

    name: str
    weather: Weather
    towards: Towards

    def __str__(self) -> str:
        return f"{self.name} towards the {self.towards.value}"


# An answer takes some 70 bytes, a statement 90.
CUTS = [
    Cut(f"{what} after {count} bytes", Weather(**{f"{what}_after": count}), towards)
    for what in ("reset", "close", "stall")
    for count in (0, 1, 150, 700)
    for towards in Towards
] + [Cut("garbage", GARBAGE, towards) for towards in Towards]


# --- one lane -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
@on_both_loops
async def test_wherever_the_line_is_cut_each_statement_was_acknowledged_or_its_outcome_is_unknown(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, ledger: Ledger, cut: Cut
) -> None:
    """A line that is dead without a word costs each caller the time that he has set himself."""

    async def write(number: int) -> None:
        with ledger.writing(number):
            assert await pool.fetchval(ledger.slow_insert, [number, 0.0], timeout=timeout) == number

    # What the system tells of comes long before.
    is_silent = "stall" in cut.name
    timeout = TIMEOUT if is_silent else 20.0
    async with Pool(proxied_dsn, min_size=0, max_size=1, lanes=1, **SECONDS) as pool:
        await learn(pool, ledger.slow_insert)
        (link,) = proxy.open_links
        link.apply(cut.weather, cut.towards)
        with ends_within(TIMEOUT, str(cut)):
            errors = await ended([await send(write(number)) for number in range(1, 21)])
        told = {type(error) for error in errors if error is not None}
        if is_silent:
            # All were sent, unless this was so slow that the lane had been silent for a moment.
            told.discard(PoolTimeout)
        assert told == {StatementTimeout if is_silent else StatementOutcomeUnknown}
        assert len(ledger.acknowledged) < 20
        assert await pool.fetchval(SLEEP, [1, 0.0], timeout=20) == 1
        link.reset()  # so that the server hears of its end too: it may wait for the rest of a statement
        await assert_quiet(pool, admin, application_name)
        ledger.assert_true()


@on_both_loops
async def test_a_loss_that_is_found_while_sending_is_told_as_any_other(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, ledger: Ledger
) -> None:
    """The event loop has not heard of it when libpq finds the socket dead, and closes it."""
    async with Pool(proxied_dsn, max_size=2, lanes=1, **SECONDS) as pool:
        await learn(pool, ledger.slow_insert)

        def cut() -> None:
            for link in proxy.open_links:
                link.reset()
            time.sleep(0.02)

        for _ in range(5):
            first = asyncio.create_task(pool.fetchval(ledger.slow_insert, [-1, 0.0]))
            asyncio.get_running_loop().call_soon(cut)
            tasks = [asyncio.create_task(pool.execute(ledger.slow_insert, [-1, 0.0])) for _ in range(100)]
            errors = [error for error in await ended([first, *tasks]) if error is not None]
            assert errors
            assert_outcomes_are_unknown(errors, psycopg.OperationalError)
            assert await pool.fetchval(SLEEP, [1, 0.0]) == 1
        await assert_quiet(pool, admin, application_name)


@on_both_loops
async def test_while_a_lane_is_silent_all_others_are_served_elsewhere(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str
) -> None:
    """When the network is there again nothing was lost at all."""
    async with Pool(proxied_dsn, max_size=2, lanes=1, **SECONDS) as pool:
        await learn(pool, SLEEP)
        (link,) = proxy.open_links
        link.apply(STALLED)
        silent = [await send(pool.fetchval(SLEEP, [number, 0.0])) for number in range(3)]
        silent += [await send(pool.fetchval(UNKNOWN_SLEEP, [3, 0.0]))]
        for number in range(200):
            assert await pool.fetchval("select %s::int", [number], timeout=20) == number
        assert not any(task.done() for task in silent)
        link.apply(FAIR)
        assert await ended(silent) == [None] * 4
        assert [task.result() for task in silent] == [0, 1, 2, 3]
        await assert_quiet(pool, admin, application_name)
        assert pool.stats().connects == 2


@pytest.mark.parametrize("towards", [*Towards, None])
@pytest.mark.parametrize("end", ["cancel", "timeout"])
@on_both_loops
async def test_a_silent_lane_for_which_nobody_waits_gives_up_its_place(
    proxy: Proxy, proxied_dsn: str, end: str, towards: Towards | None
) -> None:
    async with Pool(proxied_dsn, max_size=1, lanes=1, **SECONDS) as pool:
        await learn(pool, SLEEP)
        (link,) = proxy.open_links
        link.apply(STALLED, towards)
        timeout = TIMEOUT if end == "timeout" else None
        tasks = [await send(pool.fetchval(SLEEP, [number, 0.0], timeout=timeout)) for number in range(20)]
        if end == "cancel":
            for task in tasks:
                task.cancel()
        with ends_within((timeout or 0) + CANCEL_TIMEOUT + CHECK_TIMEOUT, "a place on a silent lane"):
            async with pool.acquire(timeout=20) as conn:
                await conn.execute("select 1")
        found = {type(error) for error in await ended(tasks)}
        if end == "timeout":
            found.discard(PoolTimeout)  # of those that were not sent: a lane takes so much work and no more
        assert found == {StatementTimeout if end == "timeout" else asyncio.CancelledError}
        proxy.clear()


async def test_a_silent_lane_is_kept_for_as_long_as_somebody_waits(proxy: Proxy, proxied_dsn: str) -> None:
    async with Pool(proxied_dsn, max_size=1, lanes=1, **SECONDS) as pool:
        await learn(pool, SLEEP)
        proxy.apply(STALLED)
        tasks = [await send(pool.fetchval(SLEEP, [number, 0.0])) for number in range(3)]
        for task in tasks[::2]:
            task.cancel()
        await asyncio.sleep(2 * CANCEL_TIMEOUT + CHECK_TIMEOUT)
        assert pool.stats().leased == 1
        proxy.clear()
        assert await tasks[1] == 1
        assert pool.stats().connects == 1


async def test_a_lane_on_which_nothing_could_be_sent_gives_up_its_place_on_a_silent_network(
    proxy: Proxy, proxied_dsn: str
) -> None:
    """It was opened for a statement that could not be converted, and has asked for the round trip's length."""
    async with Pool(proxied_dsn, max_size=1, lanes=1, **SECONDS) as pool:
        proxy.links[0].apply(STALLED)
        (error,) = await ended([await send(pool.fetchval("select %s", [object()]))])
        assert isinstance(error, psycopg.ProgrammingError)
        with ends_within(CANCEL_TIMEOUT + CHECK_TIMEOUT, "a place on a silent lane"):
            async with pool.acquire(timeout=20):
                pass


async def test_a_lane_on_which_nothing_could_be_sent_may_be_lost_as_any_other(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(proxied_dsn, max_size=1, lanes=1, **SECONDS) as pool:
        proxy.links[0].apply(STALLED, Towards.SERVER)
        (error,) = await ended([await send(pool.fetchval("select %s", [object()]))])
        assert isinstance(error, psycopg.ProgrammingError)
        assert pool.stats().leased == 1
        admin.terminate(*admin.pids(application_name))
        await eventually(lambda: pool.stats().leased == 0)
        assert await pool.fetchval(SLEEP, [1, 0.0], timeout=20) == 1
        await assert_quiet(pool, admin, application_name)


@pytest.mark.parametrize("retry", [False, True])
async def test_the_error_of_a_statement_that_could_not_be_sent_stands_though_its_connection_is_lost_then(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, retry: bool
) -> None:
    async with Pool(proxied_dsn, max_size=1, lanes=0, **SECONDS) as pool:
        proxy.links[0].apply(STALLED, Towards.SERVER)  # the round trip is still to be measured
        task = await send(pool.fetchval("select %s", [object()], retry=retry))
        await eventually(lambda: pool.stats().leased == 1)
        admin.terminate(*admin.pids(application_name))
        (error,) = await ended([task])
        assert isinstance(error, psycopg.ProgrammingError)
        assert await pool.fetchval(SLEEP, [1, 0.0], timeout=20) == 1
        await assert_quiet(pool, admin, application_name)


# --- much at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "timeout"])
@on_both_loops
async def test_a_statement_that_is_greater_than_the_network_takes_is_left_when_its_time_is_over(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, end: str
) -> None:
    """It is sent in part, so that nothing else can be sent on that connection any more."""
    async with Pool(proxied_dsn, max_size=1, lanes=1, **SECONDS) as pool:
        await learn(pool, SLEEP)
        (link,) = proxy.open_links
        link.apply(STALLED, Towards.SERVER)
        task = await send(pool.fetchval("select %s::text", [MUCH], timeout=TIMEOUT if end == "timeout" else None))
        await eventually(lambda: link.received(Towards.SERVER) > 100_000)
        if end == "cancel":
            task.cancel()
        (error,) = await ended([task])
        assert isinstance(error, StatementTimeout if end == "timeout" else asyncio.CancelledError)
        assert await pool.fetchval(SLEEP, [1, 0.0], timeout=20) == 1
        proxy.clear()
        await assert_quiet(pool, admin, application_name)


@on_both_loops
async def test_a_statement_that_is_greater_than_the_network_takes_goes_on_with_it(
    proxy: Proxy, proxied_dsn: str
) -> None:
    async with Pool(proxied_dsn, max_size=1, lanes=1, **SECONDS) as pool:
        await learn(pool, SLEEP)
        proxy.apply(STALLED)
        task = await send(pool.fetchval("select length(%s::text)", [MUCH]))
        behind = await send(pool.fetchval(SLEEP, [1, 0.0]))
        await asyncio.sleep(2 * CANCEL_TIMEOUT)
        proxy.clear()
        assert await ended([task, behind]) == [None, None]
        assert (task.result(), behind.result()) == (len(MUCH), 1)
        assert pool.stats().connects == 1


@pytest.mark.parametrize("is_reset", [True, False])
@pytest.mark.parametrize("lanes", [0, 1])
@on_both_loops
async def test_a_connection_that_ends_while_much_is_being_sent_is_lost_as_any_other(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, lanes: int, is_reset: bool
) -> None:
    """libpq closes the socket while the event loop waits until it takes more."""

    async def on_a_lease() -> None:
        async with pool.acquire() as conn:
            await conn.execute("select length(%s::text)", [MUCH])

    async with Pool(proxied_dsn, max_size=1, lanes=lanes, autocommit=True, **SECONDS) as pool:
        for one_shot in (True, False):
            await learn(pool, SLEEP)
            (link,) = proxy.open_links
            link.apply(STALLED, Towards.SERVER)
            received = link.received(Towards.SERVER)
            statement = pool.fetchval("select length(%s::text)", [MUCH]) if one_shot else on_a_lease()
            task = await send(statement)
            await eventually(lambda: link.received(Towards.SERVER) > received + 100_000)  # noqa: B023
            if is_reset:
                link.reset()
            else:
                link.half_close(Towards.CLIENT)
            (error,) = await ended([task])
            if one_shot:
                assert_outcomes_are_unknown([error], psycopg.OperationalError)
            assert isinstance(error, psycopg.OperationalError)
            assert await pool.fetchval(SLEEP, [1, 0.0], timeout=20) == 1
            link.reset()
        await assert_quiet(pool, admin, application_name)


# --- under load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weather", [BYTE_BY_BYTE, Weather(piece=7, latency=0.002), Weather(latency=0.03)], ids=["bytes", "pieces", "late"]
)
@on_both_loops
async def test_however_slowly_the_answers_come_everybody_gets_his_own(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, ledger: Ledger, weather: Weather
) -> None:
    async with Pool(proxied_dsn, max_size=2, lanes=2) as pool:
        proxy.apply(weather)
        async with under_one_shots(pool, ledger, 10) as load:
            await eventually(lambda: min(load.reads, load.writes) > 40, timeout=30)
        assert load.errors == []
        ledger.assert_true()
        proxy.clear()
        await assert_quiet(pool, admin, application_name)


@pytest.mark.parametrize(("max_size", "lanes", "threshold"), [(1, 0, 5), (1, 1, 0), (2, 1, None), (4, 2, 5)])
@on_both_loops
async def test_a_network_that_fails_again_and_again_loses_nothing_that_was_acknowledged(
    proxy: Proxy,
    proxied_dsn: str,
    admin: Admin,
    application_name: str,
    ledger: Ledger,
    max_size: int,
    lanes: int,
    threshold: int | None,
) -> None:
    rng = Random(f"{max_size} {lanes} {threshold}")
    options: dict[str, Any] = {**SECONDS, "max_size": max_size, "lanes": lanes, "prepare_threshold": threshold}
    async with Pool(proxied_dsn, min_size=0, **options) as pool:
        async with under_one_shots(pool, ledger, 12, timeout=0.5) as load:
            for _ in range(15):
                served = len(load.successes_since(0.0))
                await eventually(lambda: len(load.successes_since(0.0)) > served + 12, timeout=20)  # noqa: B023
                links = proxy.open_links
                if not links:
                    continue
                link = rng.choice(links)
                what = rng.choice(("reset_after", "close_after", "stall_after", "latency"))
                value: Any = 0.01 if what == "latency" else rng.randrange(300)
                link.apply(Weather(**{what: value}), rng.choice((*Towards, None)))
            for link in proxy.open_links:
                link.apply(FAIR)
        assert {type(error) for error in load.errors} <= {StatementOutcomeUnknown, StatementTimeout, PoolTimeout}
        proxy.clear()
        await assert_quiet(pool, admin, application_name)
        ledger.assert_true()
