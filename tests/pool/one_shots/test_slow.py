"""Slow statements: the known ones have a connection to themselves, the others hold up no more than was sent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool

from .gate import PASS

if TYPE_CHECKING:
    from kit.servers import Admin

    from .gate import Gate

pytestmark = on_both_loops

QUICK = "select %s::int"

# Nobody waits for that long, in seconds: it is there to fail the test.
LONG = 20.0

# Rounds in which a text is timed: enough for an average that hardly changes any more.
ROUNDS = 40


async def quick_ones(pool: Pool[Any], tasks: int = 200, each: int = 5) -> None:
    """A number of tasks send statements one after the other, and each gets what is its own."""

    async def send(task: int) -> None:
        for number in range(each):
            assert await pool.fetchval(QUICK, [task * each + number]) == task * each + number

    async with asyncio.timeout(LONG):
        await asyncio.gather(*map(send, range(tasks)))


async def stalled(pool: Pool[Any]) -> list[asyncio.Task[Any]]:
    """Wait until what comes from now on goes elsewhere. Returns statements of which some were sent before that."""
    tasks: list[asyncio.Task[Any]] = []

    def is_answered() -> bool:
        tasks.append(asyncio.create_task(pool.fetchval(QUICK, [len(tasks)])))
        return any(task.done() for task in tasks)

    await eventually(is_answered, timeout=LONG)
    return tasks


async def known_as_quick(pool: Pool[Any], *statements: tuple[Any, Any]) -> None:
    """Until it does not matter any more that one of them took long when the machine was busy."""
    for query, params in statements:
        for _ in range(ROUNDS):
            await pool.fetch(query, params)


async def known_as_slow(pool: Pool[Any], gate: Gate) -> None:
    """What passes the gate has waited there."""
    for _ in range(3):
        with gate.closed():
            task = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            await asyncio.sleep(0.1)  # the time that it takes is what this is about
        assert await task == 1


# --- one that nobody knows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
async def test_while_a_statement_sleeps_all_others_go_on(
    dsn: str, admin: Admin, application_name: str, lanes: int
) -> None:
    async with Pool(dsn, max_size=3, lanes=lanes) as pool:
        await known_as_quick(pool, (QUICK, [0]))
        sleeping = asyncio.create_task(pool.execute("select pg_sleep(2)"))
        await asyncio.sleep(0)
        await quick_ones(pool, tasks=200, each=2)
        assert not sleeping.done()
        assert await sleeping == "SELECT 1"


async def test_an_unknown_statement_that_is_slow_holds_up_nobody(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=2, lanes=1) as pool:
        await known_as_quick(pool, (QUICK, [0]))
        with gate.closed():
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            # In the same turn of the event loop: these would be behind it.
            quick = [asyncio.create_task(pool.fetchval(QUICK, [number])) for number in range(50)]
            assert await asyncio.wait_for(asyncio.gather(*quick), LONG) == list(range(50))
            await quick_ones(pool)
            assert not slow.done()
        assert await slow == 1


async def test_several_unknown_statements_that_are_slow_hold_up_nobody(dsn: str, gate: Gate) -> None:
    """As long as there is a connection left."""
    async with Pool(dsn, max_size=5, lanes=1) as pool:
        await known_as_quick(pool, (QUICK, [0]))
        with gate.closed():
            slow = [
                asyncio.create_task(pool.fetchval(f"{PASS} -- {number}".encode(), [gate.key])) for number in range(4)
            ]
            await eventually(lambda: gate.waiting() == 4)
            await quick_ones(pool)
        assert await asyncio.gather(*slow) == [1] * 4


async def test_an_unknown_statement_that_is_quick_takes_its_turn(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        for number in range(200):
            text = f"select {number} + %s::int".encode()
            assert await asyncio.gather(*(pool.fetchval(text, [n]) for n in range(3))) == [number + n for n in range(3)]


async def test_with_a_single_connection_others_wait_and_are_served_then(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=1) as pool:
        await known_as_quick(pool, (QUICK, [0]))
        for _ in range(3):
            with gate.closed():
                slow = [asyncio.create_task(pool.fetchval(PASS, [gate.key])) for _ in range(3)]
                quick = asyncio.create_task(quick_ones(pool, 20))
                await eventually(lambda: gate.waiting() == 1)
                assert not quick.done()
            assert await asyncio.gather(*slow) == [1] * 3
            await quick


# --- one that is known as slow ------------------------------------------------------------------------------


async def test_a_statement_that_is_known_as_slow_takes_a_lease_of_its_own(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=3, lanes=1) as pool:
        await known_as_slow(pool, gate)
        await known_as_quick(pool, (QUICK, [0]))
        with gate.closed():
            slow = [asyncio.create_task(pool.fetchval(PASS, [gate.key])) for _ in range(2)]
            # In the same turn, and all by one lane: nothing of them is behind a slow one, not for a moment.
            quick = [asyncio.create_task(pool.fetchval(QUICK, [number])) for number in range(50)]
            assert await asyncio.wait_for(asyncio.gather(*quick), LONG) == list(range(50))
            await quick_ones(pool)
            await eventually(lambda: gate.waiting() == 2)
            assert len(pool.holders()) >= 2
        assert await asyncio.gather(*slow) == [1] * 2


async def test_slow_statements_are_as_many_at_once_as_there_are_connections(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=3, lanes=1) as pool:
        await known_as_slow(pool, gate)
        with gate.closed():
            slow = [asyncio.create_task(pool.fetchval(PASS, [gate.key])) for _ in range(10)]
            await eventually(lambda: gate.waiting() == 3)
            assert pool.stats().waiting == 7
        assert await asyncio.gather(*slow) == [1] * 10


async def test_a_slow_statement_that_is_cancelled_ends_on_the_server(dsn: str, gate: Gate) -> None:
    """It has its connection for itself: so it ends as on any lease, and the connection goes on."""
    async with Pool(dsn, max_size=1, cancel_timeout=20.0) as pool:
        await known_as_slow(pool, gate)
        pid = await pool.fetchval("select pg_backend_pid()")
        with gate.closed():
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            await eventually(lambda: gate.waiting() == 0)
            assert await pool.fetchval("select pg_backend_pid()") == pid


async def test_an_error_of_a_slow_statement_is_its_own(dsn: str, gate: Gate, table: str, admin: Admin) -> None:
    slow = "select 1 / (pg_advisory_xact_lock_shared(%s) is null)::int"
    async with Pool(dsn, max_size=2) as pool:
        for _ in range(3):
            with gate.closed():
                task = asyncio.create_task(pool.fetchval(slow, [gate.key]))
                await eventually(lambda: gate.waiting() == 1)
                await asyncio.sleep(0.05)  # the time that it takes is what this is about
            with pytest.raises(psycopg.errors.DivisionByZero):
                await task
        insert = f"insert into {table} select 1 where pg_sleep(0.05) is not null".encode()
        for number in range(1, 4):  # each a transaction of its own
            await pool.execute(insert)
            await pool.execute(f"update {table} set id = id + 10".encode())
            assert admin.value(f"select count(*) from {table}") == number


async def test_a_slow_statement_that_has_become_quick_goes_back_to_the_lanes(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=2, lanes=1) as pool:
        await known_as_slow(pool, gate)
        await known_as_quick(pool, (PASS, [gate.key]))
        leases = pool.stats().acquires
        assert await asyncio.gather(*(pool.fetchval(PASS, [gate.key]) for _ in range(50))) == [1] * 50
        # On lanes they share leases, of which each would have had its own.
        assert pool.stats().acquires - leases < 25


# --- one that was quick so far ------------------------------------------------------------------------------


async def test_a_quick_statement_that_meets_a_lock_holds_up_only_what_was_sent_behind_it(
    dsn: str, table: str, admin: Admin, gate: Gate
) -> None:
    async with Pool(dsn, max_size=2, lanes=1) as pool:
        await known_as_quick(pool, (PASS, [gate.key]), (QUICK, [0]))
        with gate.closed():
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            behind = [asyncio.create_task(pool.fetchval(QUICK, [number])) for number in range(5)]
            await eventually(lambda: gate.waiting() == 1)
            early = await stalled(pool)
            await quick_ones(pool)
            assert not slow.done()
        assert await slow == 1
        assert await asyncio.gather(*behind) == list(range(5))
        assert await asyncio.gather(*early) == list(range(len(early)))


async def test_a_flood_behind_a_quick_statement_that_meets_a_lock_goes_elsewhere(dsn: str, gate: Gate) -> None:
    """More than may be in flight: the rest is not sent when the lane stalls."""
    async with Pool(dsn, max_size=2, lanes=1) as pool:
        await known_as_quick(pool, (PASS, [gate.key]), (QUICK, [0]))
        with gate.closed():
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            flood = [asyncio.create_task(pool.fetchval(QUICK, [number])) for number in range(2000)]
            await eventually(lambda: sum(task.done() for task in flood) > 1000, timeout=20)
            assert not slow.done()
            held_up = sum(not task.done() for task in flood)
        assert await asyncio.gather(*flood) == list(range(2000))
        assert await slow == 1
        assert held_up < 1000


async def test_a_lane_that_has_stalled_takes_statements_again_when_it_goes_on(
    dsn: str, admin: Admin, application_name: str, gate: Gate
) -> None:
    async with Pool(dsn, min_size=0, max_size=2, lanes=1) as pool:
        await known_as_quick(pool, (PASS, [gate.key]), (QUICK, [0]))
        for _ in range(3):
            with gate.closed():
                slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
                await eventually(lambda: gate.waiting() == 1)
                early = await stalled(pool)
                await quick_ones(pool, 20)
            assert await slow == 1
            assert await asyncio.gather(*early) == list(range(len(early)))
            await quick_ones(pool, 20)
        await eventually(lambda: pool.stats().leased == 0)
        assert admin.sessions(application_name) <= 2
        assert pool.stats().closes == {}


async def test_one_that_meets_a_lock_now_and_then_is_not_slow_for_ever(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=3, lanes=1) as pool:
        await known_as_quick(pool, (PASS, [gate.key]))
        for _ in range(5):
            with gate.closed():
                slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
                await eventually(lambda: gate.waiting() == 1)
            assert await slow == 1
            await known_as_quick(pool, (PASS, [gate.key]))
        leases = pool.stats().acquires
        assert await asyncio.gather(*(pool.fetchval(PASS, [gate.key]) for _ in range(50))) == [1] * 50
        assert pool.stats().acquires - leases < 25


# --- with leases --------------------------------------------------------------------------------------------


async def test_a_stalled_lane_keeps_no_lease_from_the_other_connections(dsn: str, gate: Gate) -> None:
    async with Pool(dsn, max_size=2, lanes=1) as pool:
        with gate.closed():
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            for _ in range(20):
                async with pool.acquire() as conn:
                    await conn.execute("select 1")
                assert await pool.fetchval(QUICK, [1]) == 1
        assert await slow == 1
