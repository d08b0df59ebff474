"""One-shot statements whose connection is lost: what was sent has an unknown outcome, all else does as if nothing were.

The server ends a session, is killed, restarted or stopped (SIGSTOP); the network is the subject of
`test_one_shot_network.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout, StatementOutcomeUnknown, StatementTimeout
from asyncpool._core import lanes

from .one_shots import (
    FOR_EVER,
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
from .recovery import assert_whole

if TYPE_CHECKING:
    from kit.mortal_server import MortalServer

    from asyncpool.cli.embedded import StopMode

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]
End: TypeAlias = "Callable[[MortalServer, int], object]"

TASKS = 20
ENOUGH = 300


def terminate(mortal: MortalServer, pid: int) -> None:
    mortal.admin.execute("select pg_terminate_backend(%s)", [pid])


def kill(mortal: MortalServer, pid: int) -> None:
    mortal.kill_backend(pid)


def restart(mode: StopMode) -> End:
    return lambda mortal, _: mortal.restart(mode)


ENDS: dict[str, End] = {
    "terminated": terminate,
    "killed": kill,
    "fast": restart("fast"),
    "immediate": restart("immediate"),
    "all killed": restart("kill"),
}
each_end = pytest.mark.parametrize("end", [pytest.param(end, id=name) for name, end in ENDS.items()])

# On a lane, on a lease because there are no lanes, and on a lease because it is known as slow.
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "lane": ({"lanes": 1}, FOR_EVER),
    "lease": ({"lanes": 0}, FOR_EVER),
    "slow": ({"lanes": 1}, -1.0),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a pool for each of the ways that a statement may go."""
    options, slow = WAYS[request.param]
    lanes_take(monkeypatch, slow=slow)
    return options


@pytest.fixture
def ledger(mortal: MortalServer, application_name: str) -> Iterator[Ledger]:
    with ledger_on(mortal.admin, application_name) as ledger:
        yield ledger


async def at_work(mortal: MortalServer, application_name: str) -> int:
    """The session that is running a statement of the pool's."""
    found = await eventually(
        lambda: mortal.admin.execute(
            "select pid from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'",
            [application_name],
        ),
        timeout=20,
    )
    return int(found[0][0])


# --- one session --------------------------------------------------------------------------------------------


@each_end
@on_both_loops
async def test_the_outcome_of_a_statement_that_was_sent_is_unknown(
    mortal: MortalServer, application_name: str, ledger: Ledger, way: dict[str, Any], end: End
) -> None:
    async with Pool(mortal.dsn(application_name), min_size=0, max_size=2, **way) as pool:
        await learn(pool, SLEEP, ledger.slow_insert)
        writing = await send(pool.execute(ledger.slow_insert, [1, FOR_EVER]))
        pid = await at_work(mortal, application_name)
        await asyncio.to_thread(end, mortal, pid)
        assert_outcomes_are_unknown(await ended([writing]), psycopg.OperationalError)
        await asyncio.to_thread(mortal.start)
        assert 1 not in ledger.rows()
        assert await pool.fetchval(SLEEP, [2, 0.0], retry=True) == 2
        await assert_quiet(pool, mortal.admin, application_name)


async def test_the_servers_last_words_are_the_cause(
    mortal: MortalServer, application_name: str, way: dict[str, Any]
) -> None:
    async with Pool(mortal.dsn(application_name), **way) as pool:
        waiting = await send(pool.fetchval(SLEEP, [1, FOR_EVER]))
        terminate(mortal, await at_work(mortal, application_name))
        (error,) = await ended([waiting])
        assert_outcomes_are_unknown([error], psycopg.errors.AdminShutdown)
        assert "terminating connection due to administrator command" in str(error)
        assert pool.name in str(error)


@pytest.mark.parametrize("max_size", [1, 2])
@each_end
@on_both_loops
async def test_what_was_sent_with_it_is_unknown_and_what_was_not_succeeds(
    mortal: MortalServer,
    application_name: str,
    ledger: Ledger,
    max_size: int,
    end: End,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the rows of those that were sent none can be there, as the first of them never ended."""
    lanes_take(monkeypatch)
    async with Pool(mortal.dsn(application_name), min_size=0, max_size=max_size, lanes=1) as pool:
        await learn(pool, ledger.slow_insert)
        sent = [await send(pool.execute(ledger.slow_insert, [number, FOR_EVER])) for number in (1, 2)]
        sent += [await send(pool.execute(ledger.insert, [3]))]
        assert pool.stats().waiting == 0
        unsent = [await send(pool.fetchval(ledger.insert_returning, [number])) for number in range(10, 20)]
        assert pool.stats().waiting == 10
        if max_size == 1:
            pid = await at_work(mortal, application_name)
            await asyncio.to_thread(end, mortal, pid)
            await asyncio.to_thread(mortal.start)
        else:  # they do not wait for that
            assert await ended(unsent) == [None] * 10
            await asyncio.to_thread(end, mortal, await at_work(mortal, application_name))
            await asyncio.to_thread(mortal.start)
        assert_outcomes_are_unknown(await ended(sent), psycopg.OperationalError)
        assert await ended(unsent) == [None] * 10
        assert [task.result() for task in unsent] == list(range(10, 20))
        assert ledger.rows() == list(range(10, 20))
        await assert_quiet(pool, mortal.admin, application_name)


@each_end
@on_both_loops
async def test_those_that_only_read_are_sent_again(
    mortal: MortalServer, application_name: str, way: dict[str, Any], end: End
) -> None:
    async with Pool(mortal.dsn(application_name), min_size=0, max_size=2, **way) as pool:
        await learn(pool, SLEEP)
        reading = [await send(pool.fetchval(SLEEP, [number, 0.1], retry=True)) for number in (1, 2, 3)]
        reading += [await send(pool.fetchval(UNKNOWN_SLEEP, [4, 0.1], retry=True))]
        pid = await at_work(mortal, application_name)
        await asyncio.to_thread(end, mortal, pid)
        await asyncio.to_thread(mortal.start)
        assert await ended(reading) == [None] * 4
        assert [task.result() for task in reading] == [1, 2, 3, 4]
        await assert_quiet(pool, mortal.admin, application_name)


async def test_a_statement_that_ends_its_session_is_not_sent_for_ever(
    mortal: MortalServer, application_name: str, way: dict[str, Any]
) -> None:
    """Not even if it is declared to read only. The others that were under way with it have a fate of their own."""
    suicide = "select pg_terminate_backend(pg_backend_pid())"
    async with Pool(mortal.dsn(application_name), max_size=1, **way) as pool:
        before = pool.stats().connects
        (error,) = await ended([await send(pool.fetchval(suicide, retry=True))])
        assert_outcomes_are_unknown([error], psycopg.errors.AdminShutdown)
        assert await pool.fetchval("select 1") == 1
        assert pool.stats().connects - before == lanes.MAX_SENDS
        (error,) = await ended([await send(pool.fetchval(suicide))])
        assert_outcomes_are_unknown([error], psycopg.errors.AdminShutdown)
        assert await pool.fetchval("select 1") == 1
        assert pool.stats().connects - before == lanes.MAX_SENDS + 1
        await assert_quiet(pool, mortal.admin, application_name)


async def test_what_was_answered_before_the_session_ended_is_told(
    mortal: MortalServer, application_name: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop hears of all of it at once: of the answers, and of the end that came behind them."""
    lanes_take(monkeypatch)
    async with Pool(mortal.dsn(application_name), min_size=0, max_size=1, lanes=1) as pool:
        await learn(pool, ledger.slow_insert)
        answered = [await send(pool.fetchval(ledger.slow_insert, [number, 0.0])) for number in range(1, 6)]
        unknown = [await send(pool.fetchval(ledger.slow_insert, [number, FOR_EVER])) for number in (6, 7)]
        await asyncio.sleep(0)
        # The loop stands still meanwhile.
        while 5 not in ledger.rows():
            time.sleep(0.001)  # noqa: ASYNC251  # see above
        mortal.terminate(*mortal.admin.pids(application_name))
        assert await ended(answered) == [None] * 5
        assert [task.result() for task in answered] == [1, 2, 3, 4, 5]
        assert_outcomes_are_unknown(await ended(unknown), psycopg.errors.AdminShutdown)


# --- deadlines ----------------------------------------------------------------------------------------------


async def test_one_that_is_to_be_sent_again_waits_no_longer_than_any_other(
    mortal: MortalServer, application_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it keep those behind it from being told in time."""
    lanes_take(monkeypatch)
    async with Pool(mortal.dsn(application_name), max_size=1, lanes=1, acquire_timeout=0.5) as pool:
        await learn(pool, SLEEP)
        reading = [await send(pool.fetchval(SLEEP, [number, FOR_EVER], retry=True)) for number in (1, 2)]
        await at_work(mortal, application_name)
        await asyncio.to_thread(mortal.stop)
        behind = await send(pool.fetchval(SLEEP, [3, 0.0]))
        began = time.monotonic()
        assert [type(error) for error in await ended([*reading, behind])] == [PoolTimeout] * 3
        assert time.monotonic() - began < 3
        assert pool.stats().waiting == 0
        await asyncio.to_thread(mortal.start)
        assert await pool.fetchval(SLEEP, [4, 0.0]) == 4


async def test_one_that_ran_for_longer_than_anybody_may_wait_is_still_sent_again(
    mortal: MortalServer, application_name: str, way: dict[str, Any]
) -> None:
    """`acquire_timeout` bounds the time until it is sent, each time anew."""
    async with Pool(mortal.dsn(application_name), max_size=1, acquire_timeout=1.0, **way) as pool:
        reading = await send(pool.fetchval(SLEEP, [1, 1.3], retry=True))
        pid = await at_work(mortal, application_name)
        await asyncio.sleep(1.2)
        terminate(mortal, pid)
        assert await ended([reading]) == [None]
        assert reading.result() == 1


async def test_those_behind_one_that_is_sent_again_are_overdue_before_it(
    mortal: MortalServer, application_name: str
) -> None:
    async with Pool(mortal.dsn(application_name), max_size=1, lanes=1, acquire_timeout=1.0) as pool:
        reading = await send(pool.fetchval(SLEEP, [1, FOR_EVER], retry=True))
        await at_work(mortal, application_name)
        behind = await send(pool.fetchval(SLEEP, [2, 0.0]))
        await asyncio.sleep(0.7)
        await asyncio.to_thread(mortal.stop)
        first = asyncio.create_task(asyncio.wait([reading, behind], return_when=asyncio.FIRST_COMPLETED))
        done, _ = await first
        assert done == {behind}
        assert [type(error) for error in await ended([reading, behind])] == [PoolTimeout, PoolTimeout]
        await asyncio.to_thread(mortal.start)


async def test_a_timeout_for_the_whole_call_holds_through_an_outage(
    mortal: MortalServer, application_name: str, way: dict[str, Any]
) -> None:
    """Sent or unsent, again or for the first time: nothing is pending beyond it."""
    async with Pool(mortal.dsn(application_name), max_size=2, **way) as pool:
        await learn(pool, SLEEP)
        sent = [await send(pool.fetchval(SLEEP, [number, FOR_EVER], timeout=1.0)) for number in (1, 2)]
        again = await send(pool.fetchval(SLEEP, [3, FOR_EVER], timeout=1.0, retry=True))
        await at_work(mortal, application_name)
        began = time.monotonic()
        await asyncio.to_thread(mortal.stop)
        unsent = await send(pool.fetchval(UNKNOWN_SLEEP, [4, 0.0], timeout=1.0))
        errors = await ended([*sent, again, unsent])
        assert time.monotonic() - began < 3
        told = [type(error) for error in errors]
        assert set(told[:2]) <= {StatementOutcomeUnknown, PoolTimeout}  # with leases only two were sent
        assert told[2:] == [PoolTimeout, PoolTimeout]
        await asyncio.to_thread(mortal.start)
        assert await pool.fetchval(SLEEP, [5, 0.0]) == 5


# --- under load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [0, 1, 2])
@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
@on_both_loops
async def test_a_restart_under_load_costs_what_was_under_way_and_nothing_else(
    mortal: MortalServer, application_name: str, ledger: Ledger, mode: StopMode, lanes: int
) -> None:
    async with Pool(mortal.dsn(application_name), max_size=4, lanes=lanes) as pool:
        async with under_one_shots(pool, ledger, TASKS) as load:
            await eventually(lambda: len(load.requests) > ENOUGH, timeout=20)
            opened = await asyncio.to_thread(mortal.restart, mode)
            await eventually(lambda: len(load.successes_since(opened)) > ENOUGH, timeout=20)
        assert_outcomes_are_unknown(load.errors)
        assert len(load.errors) <= TASKS
        assert load.errors_since(opened) == []
        ledger.assert_true()
        assert min(load.reads, load.writes) > 0
        await assert_whole(pool, mortal, application_name)


@pytest.mark.parametrize("threshold", [None, 0, 5])
@pytest.mark.parametrize("max_size", [1, 4])
@on_both_loops
async def test_one_session_after_the_other_is_ended_under_load(
    mortal: MortalServer, application_name: str, ledger: Ledger, max_size: int, threshold: int | None
) -> None:
    async with Pool(mortal.dsn(application_name), max_size=max_size, lanes=2, prepare_threshold=threshold) as pool:
        async with under_one_shots(pool, ledger, TASKS) as load:
            for _ in range(12):
                served = len(load.successes_since(0.0))
                await eventually(lambda: len(load.successes_since(0.0)) > served + TASKS, timeout=20)  # noqa: B023
                for pid in mortal.admin.pids(application_name)[:2]:
                    terminate(mortal, pid)
        assert_outcomes_are_unknown(load.errors)
        ledger.assert_true()
        await assert_quiet(pool, mortal.admin, application_name)


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
@on_both_loops
async def test_a_restart_costs_those_that_only_read_nothing(
    mortal: MortalServer, application_name: str, mode: StopMode, way: dict[str, Any]
) -> None:
    tokens = itertools.count(1)
    answered = 0
    stopping = False

    async def read(pool: Pool[Connection]) -> None:
        nonlocal answered
        while not stopping:
            token = next(tokens)
            assert await pool.fetchval("select %s::int", [token], retry=True) == token
            answered += 1

    async with Pool(mortal.dsn(application_name), max_size=3, **way) as pool:
        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(read(pool))
            for _ in range(2):
                before = answered
                await eventually(lambda: answered > before + ENOUGH, timeout=20)  # noqa: B023
                await asyncio.to_thread(mortal.restart, mode)
            before = answered
            await eventually(lambda: answered > before + ENOUGH, timeout=20)
            stopping = True
        await assert_whole(pool, mortal, application_name)


async def test_a_smart_shutdown_costs_nothing(
    mortal: MortalServer, application_name: str, ledger: Ledger, way: dict[str, Any]
) -> None:
    async with Pool(mortal.dsn(application_name), min_size=2, max_size=4, **way) as pool:
        async with under_one_shots(pool, ledger, TASKS) as load:
            await eventually(lambda: len(load.requests) > ENOUGH, timeout=20)
            mortal.begin_smart_shutdown()
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + ENOUGH, timeout=20)
            pool.drain()
            await asyncio.to_thread(mortal.stop, "smart")
            opened = await asyncio.to_thread(mortal.start)
            await eventually(lambda: len(load.successes_since(opened)) > ENOUGH, timeout=20)
        assert load.errors == []
        ledger.assert_true()
        await assert_whole(pool, mortal, application_name)


async def test_a_restart_that_nobody_saw_costs_nothing(
    mortal: MortalServer, application_name: str, way: dict[str, Any]
) -> None:
    """Nothing was under way while the event loop was busy: every connection goes stale unseen."""
    async with Pool(mortal.dsn(application_name), min_size=3, max_size=3, **way) as pool:
        for mode in ("fast", "immediate", "kill"):
            mortal.restart(mode)
            answers = await asyncio.gather(*(pool.fetchval("select %s::int", [n]) for n in range(TASKS)))
            assert answers == list(range(TASKS))
            await assert_whole(pool, mortal, application_name)


# --- stopped ------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_server_that_stood_still_for_a_moment_costs_nothing(
    mortal: MortalServer, application_name: str, ledger: Ledger, way: dict[str, Any]
) -> None:
    async with Pool(mortal.dsn(application_name), min_size=2, max_size=3, **way) as pool:
        async with under_one_shots(pool, ledger, TASKS) as load:
            await eventually(lambda: len(load.requests) > ENOUGH, timeout=20)
            with mortal.frozen():
                await asyncio.sleep(0.5)
            served = len(load.requests)
            await eventually(lambda: len(load.requests) > served + ENOUGH, timeout=20)
        assert load.errors == []
        ledger.assert_true()
        await assert_quiet(pool, mortal.admin, application_name)


@on_both_loops
async def test_while_the_server_stands_still_each_has_an_end_in_its_own_time(
    mortal: MortalServer, application_name: str, ledger: Ledger, way: dict[str, Any]
) -> None:
    """Sent or not: by its own `timeout`, or by that of the pool's queue. What was sent may be executed all the same."""
    options: dict[str, Any] = {
        "acquire_timeout": 0.6,
        "cancel_timeout": 0.2,
        "check_timeout": 0.4,
        "connect_timeout": 0.3,
    }
    async with Pool(mortal.dsn(application_name), min_size=2, max_size=2, **options, **way) as pool:
        await learn(pool, ledger.slow_insert)
        with mortal.frozen():
            began = time.monotonic()

            async def write(number: int) -> None:
                with ledger.writing(number):
                    await pool.execute(ledger.slow_insert, [number, 0.0], timeout=0.3)

            tasks = [await send(write(number)) for number in range(1, 2 * lanes.MAX_STATEMENTS + 100)]
            errors = await ended(tasks)
            assert time.monotonic() - began < 3
            assert {type(error) for error in errors} == {StatementTimeout, PoolTimeout}
            with pytest.raises(PoolTimeout):
                await pool.execute(ledger.insert_returning, [10_000])
        assert await pool.fetchval(ledger.slow_insert, [-1, 0.0], timeout=20) == -1
        await assert_quiet(pool, mortal.admin, application_name)
        ledger.assert_true()
        assert 10_000 not in ledger.rows()


@pytest.mark.parametrize("timeout", [0, 0.2])
async def test_a_pool_that_is_closed_while_the_server_stands_still_leaves_nobody_waiting(
    mortal: MortalServer, application_name: str, timeout: float, way: dict[str, Any]
) -> None:
    pool = Pool(mortal.dsn(application_name), max_size=2, check_timeout=0.4, cancel_timeout=0.2, **way)
    await pool.open()
    await learn(pool, SLEEP)
    with mortal.frozen():
        tasks = [await send(pool.fetchval(SLEEP, [number, 0.0], retry=number % 2 == 0)) for number in range(20)]
        await pool.close(timeout)
        errors = await ended(tasks)
        assert {type(error).__name__ for error in errors} <= {"StatementOutcomeUnknown", "PoolClosed"}
        assert pool.stats().size == 0
    await eventually(lambda: mortal.strangers() == 0, timeout=20)
