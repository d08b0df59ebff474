"""Lanes are connections of the pool like any others: on demand, under `max_size`, shared with leases, replaced."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.sampler import Sampler
from kit.waiting import eventually

from asyncpool import CloseReason, Pool, PoolClosed, PoolDeadlock, PoolTimeout, StatementOutcomeUnknown, TooManyWaiting
from asyncpool._core.lanes import LOOK_EVERY

from .flow import STATEMENT, flowing
from .gate import PASS

if TYPE_CHECKING:
    from kit.servers import Admin, Server

    from .gate import Gate

Connection = psycopg.AsyncConnection[Any]

# Nobody waits for that long, in seconds: it is there to fail the test.
LONG = 20.0


async def ask_many(pool: Pool[Any], count: int) -> None:
    numbers = range(count)
    assert await asyncio.gather(*(pool.fetchval("select %s::int", [n]) for n in numbers)) == list(numbers)


# --- the option ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1.0, "1", True, None])
def test_lanes_are_counted_with_an_int(lanes: Any) -> None:
    with pytest.raises(TypeError, match="lanes must be an int"):
        Pool("host=/nowhere", lanes=lanes)


def test_there_are_no_fewer_than_zero_lanes() -> None:
    with pytest.raises(ValueError, match="lanes must be 0 or more"):
        Pool("host=/nowhere", lanes=-1)


async def test_more_lanes_than_connections_are_no_mistake(dsn: str) -> None:
    async with Pool(dsn, max_size=2, lanes=10) as pool:
        await ask_many(pool, 500)
        assert pool.stats().size <= 2


async def test_without_lanes_each_statement_takes_a_lease_of_its_own(
    dsn: str, admin: Admin, application_name: str, gate: Gate
) -> None:
    async with Pool(dsn, min_size=0, max_size=3, lanes=0) as pool:
        await pool.fetch(PASS, [gate.key])
        with gate.closed():
            tasks = [asyncio.create_task(pool.fetchval(PASS, [gate.key])) for _ in range(5)]
            await eventually(lambda: gate.waiting() == 3)
            assert pool.stats().leased == 3
            assert pool.stats().waiting == 2
        assert await asyncio.gather(*tasks) == [1] * 5
        assert pool.stats().acquires == pool.stats().one_shots == 6
        assert admin.sessions(application_name) == 3


# --- on demand ----------------------------------------------------------------------------------------------


async def test_lanes_open_on_demand_and_are_given_back_when_idle(
    dsn: str, admin: Admin, application_name: str, gate: Gate
) -> None:
    async with Pool(dsn, min_size=0, max_size=5) as pool:
        assert admin.sessions(application_name) == 0
        with gate.closed():
            task = asyncio.create_task(pool.fetch(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            assert pool.stats().leased == 1
        await task
        await eventually(lambda: pool.stats().leased == 0)
        assert pool.stats().idle == admin.sessions(application_name)


@on_both_loops
async def test_a_lane_is_back_a_turn_of_the_loop_after_its_last_answer(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        for _ in range(20):
            assert await pool.fetchval("select 1") == 1
            for _ in range(3):
                await asyncio.sleep(0)
            async with pool.acquire(timeout=0) as conn:
                await conn.execute("select 1")


@pytest.mark.usefixtures("nothing_is_slow", "nothing_stalls")
@pytest.mark.parametrize("lanes", [1, 2, 3])
async def test_quick_statements_are_served_by_no_more_connections_than_there_are_lanes(
    dsn: str, admin: Admin, application_name: str, lanes: int
) -> None:
    async with Pool(dsn, min_size=0, max_size=10, lanes=lanes) as pool:
        async with flowing(pool, 200) as flow:
            await flow.more(5000)
        assert len(flow.sessions) <= lanes
        assert admin.sessions(application_name) <= lanes


@pytest.mark.usefixtures("nothing_is_slow", "nothing_stalls")
async def test_many_statements_take_few_leases(dsn: str) -> None:
    """What makes them cheap: the checkout is for all that are in flight together."""
    async with Pool(dsn, max_size=1) as pool:
        async with flowing(pool, 100) as flow:
            await flow.more(5000)
        assert pool.stats().one_shots == flow.answered
        assert pool.stats().acquires < flow.answered / 20


@on_both_loops
@pytest.mark.parametrize("order", [1, -1])
async def test_a_lane_that_comes_when_nobody_needs_it_any_more_is_given_back(dsn: str, order: int) -> None:
    """Both connections come back in the same turn, and one is enough for all statements that wait."""
    async with Pool(dsn, min_size=2, max_size=2, lanes=2) as pool:
        await pool.fetchval("select %s::int", [0])
        leases = [await pool.acquire(), await pool.acquire()]
        tasks = [asyncio.create_task(pool.fetchval("select %s::int", [number])) for number in range(2)]
        await eventually(lambda: pool.stats().waiting == 2)
        for connection in leases[::order]:  # one of them was a lane before, the other never was
            await pool.release(connection)
        assert await asyncio.gather(*tasks) == [0, 1]
        await eventually(lambda: pool.stats().leased == 0)
        assert pool.stats().idle == 2
        assert pool.stats().closes == {}


async def test_a_single_statement_asks_for_a_single_connection(dsn: str) -> None:
    """However long connecting takes: a second one would have nothing to do."""
    connecting = asyncio.Event()
    asked = 0

    async def conninfo() -> str:
        nonlocal asked
        asked += 1
        await connecting.wait()
        return dsn

    async with Pool(conninfo, min_size=0, max_size=5, lanes=3) as pool:
        task = asyncio.create_task(pool.fetchval("select 1"))
        await asyncio.sleep(20 * LOOK_EVERY)  # in which it is looked after again and again
        assert asked == 1
        connecting.set()
        assert await task == 1
        assert pool.stats().connects == 1


async def test_idle_connections_that_were_lanes_are_closed_like_others(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=0, max_idle=0.1) as pool:
        await ask_many(pool, 10)
        await eventually(lambda: admin.sessions(application_name) == 0)
        assert set(pool.stats().closes) == {CloseReason.MAX_IDLE}
        await ask_many(pool, 10)


# --- under max_size -----------------------------------------------------------------------------------------


@on_both_loops
async def test_lanes_and_leases_together_are_never_more_than_max_size(
    dsn: str, server: Server, application_name: str
) -> None:
    leases = 0

    async def lease() -> None:
        nonlocal leases
        for _ in range(20):
            async with pool.acquire() as conn:
                await conn.execute("select pg_sleep(0.001)")
            leases += 1

    with Sampler(server.dsn, application_name, nameless_too=False) as sampler:
        async with Pool(dsn, min_size=0, max_size=3, lanes=2) as pool, flowing(pool, 50) as flow:
            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(lease())
            await flow.more(100)
            assert pool.stats().size <= 3
    assert leases == 400
    assert sampler.most <= 3


@on_both_loops
@pytest.mark.parametrize("max_size", [1, 2])
async def test_leases_are_served_while_statements_never_end(dsn: str, max_size: int) -> None:
    async with Pool(dsn, min_size=0, max_size=max_size, acquire_timeout=LONG) as pool, flowing(pool, 50) as flow:
        await flow.more(100)

        async def lease() -> None:
            for _ in range(10):
                async with pool.acquire() as conn:
                    cursor = await conn.execute("select 'a lease'")
                    assert await cursor.fetchone() == ("a lease",)

        await asyncio.gather(*(lease() for _ in range(10)))
        await flow.more(100)


@on_both_loops
@pytest.mark.parametrize("max_size", [1, 2])
async def test_statements_are_served_while_leases_never_end(dsn: str, max_size: int) -> None:
    stopping = False
    leases = 0

    async def lease() -> None:
        nonlocal leases
        while not stopping:
            async with pool.acquire() as conn:
                await conn.execute("select 1")
                leases += 1

    async with Pool(dsn, min_size=0, max_size=max_size, acquire_timeout=LONG) as pool, asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(lease())
        await eventually(lambda: leases > 50)
        async with flowing(pool, 20) as flow:
            await flow.more(200)
            before = leases
            await eventually(lambda: leases > before + 50)
        stopping = True


async def test_those_who_wait_are_served_in_the_order_they_came_leases_and_statements(dsn: str) -> None:
    """All statements that wait stand where the first of them stands."""
    order: list[str] = []

    async def lease(name: str) -> None:
        async with pool.acquire() as conn:
            order.append(name)
            await conn.execute("select 1")

    async def ask(name: str) -> None:
        await pool.fetchval("select 1")
        order.append(name)

    async with Pool(dsn, min_size=1, max_size=1) as pool:
        async with pool.acquire():
            tasks = [asyncio.create_task(lease("first lease"))]
            await eventually(lambda: pool.stats().waiting == 1)
            tasks.append(asyncio.create_task(ask("statement")))
            await eventually(lambda: pool.stats().waiting == 2)
            tasks.append(asyncio.create_task(lease("second lease")))
            await eventually(lambda: pool.stats().waiting == 3)
        await asyncio.gather(*tasks)
    assert order == ["first lease", "statement", "second lease"]


async def test_each_statement_that_is_not_sent_is_one_that_waits(dsn: str) -> None:
    async with Pool(dsn, min_size=1, max_size=1) as pool:
        async with pool.acquire():
            tasks = [asyncio.create_task(pool.fetchval("select %s::int", [number])) for number in range(100)]
            await eventually(lambda: pool.stats().waiting > 0)
            assert pool.stats().waiting == 100
            tasks[7].cancel()
            await eventually(lambda: pool.stats().waiting == 99)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [outcome for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError)] == [
            number for number in range(100) if number != 7
        ]
        assert pool.stats().waiting == 0


# --- inside of a block --------------------------------------------------------------------------------------


@on_both_loops
async def test_inside_of_a_block_statements_go_on_another_connection(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, max_size=2, **way) as pool, pool.acquire() as conn:
        await conn.execute(f"insert into {table} values (1)".encode())
        assert await pool.fetchval(f"select count(*) from {table}".encode()) == 0, "a transaction of its own"
        await pool.execute(f"insert into {table} values (2)".encode())
        assert admin.execute(f"select id from {table}") == [(2,)]


@on_both_loops
async def test_inside_of_a_block_that_holds_the_only_connection_it_is_told_at_once(
    dsn: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, max_size=1, acquire_timeout=None, **way) as pool:
        for _ in range(3):
            async with asyncio.timeout(LONG):
                async with pool.acquire() as conn:
                    with pytest.raises(PoolDeadlock):
                        await pool.execute("select 1")
                    with pytest.raises(PoolDeadlock):
                        await pool.executemany("select %s", [(1,)])
                    await conn.execute("select 1")
            assert pool.stats().leased == 0
            assert await pool.fetchval("select 1") == 1


@on_both_loops
async def test_a_deadlock_is_told_to_one_and_the_statements_of_others_wait_on(dsn: str) -> None:
    async with Pool(dsn, max_size=1, acquire_timeout=LONG) as pool:
        async with pool.acquire():
            others = [asyncio.create_task(pool.fetchval("select %s::int", [number])) for number in range(5)]
            await eventually(lambda: pool.stats().waiting == 5)
            with pytest.raises(PoolDeadlock):
                await pool.fetchval("select 5")
            others += [asyncio.create_task(pool.fetchval("select %s::int", [number])) for number in range(5, 10)]
            await asyncio.sleep(0)
            with pytest.raises(PoolDeadlock):
                await pool.fetchval("select 6")
            assert not any(task.done() for task in others)
        assert await asyncio.gather(*others) == list(range(10))


async def test_of_two_blocks_that_each_send_a_statement_the_second_is_told(dsn: str) -> None:
    outcomes: list[str] = []
    both_hold = asyncio.Barrier(2)

    async def hold_and_ask(name: str) -> None:
        async with pool.acquire(), asyncio.timeout(LONG):
            await both_hold.wait()
            try:
                await pool.execute("select 1")
                outcomes.append("served")
            except PoolDeadlock:
                outcomes.append("told")

    async with Pool(dsn, max_size=2, acquire_timeout=None) as pool:
        await asyncio.gather(hold_and_ask("first"), hold_and_ask("second"))
        assert outcomes == ["told", "served"]
        assert pool.stats().leased == pool.stats().waiting == 0


async def test_a_task_whose_statement_waits_is_one_that_waits(dsn: str) -> None:
    """A block that asks for a second connection completes the circle, though the first in it has sent a statement."""
    async with Pool(dsn, max_size=2, acquire_timeout=None) as pool:
        holding = asyncio.Event()

        async def hold_and_ask() -> int:
            async with pool.acquire():
                holding.set()
                return int(await pool.fetchval("select 1"))

        async with pool.acquire(), asyncio.timeout(LONG):
            task = asyncio.create_task(hold_and_ask())
            await holding.wait()
            await eventually(lambda: pool.stats().waiting == 1)
            with pytest.raises(PoolDeadlock):
                await pool.acquire()
        assert await task == 1


async def test_nobody_is_told_of_a_deadlock_while_a_lane_is_at_work(dsn: str, gate: Gate) -> None:
    """Its connection comes back when it has been answered: whoever waits for it has something to wait for."""
    async with Pool(dsn, max_size=2, acquire_timeout=LONG) as pool, pool.acquire():
        with gate.closed():
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            quick = asyncio.create_task(pool.fetchval("select 1"))
            second = asyncio.ensure_future(pool.acquire())
            await eventually(lambda: pool.stats().waiting > 0)
            assert not quick.done()
            assert not second.done()
        await pool.release(await second)
        assert await asyncio.gather(*[slow, quick]) == [1, 1]


# --- how long one waits -------------------------------------------------------------------------------------


@on_both_loops
async def test_acquire_timeout_bounds_the_time_until_a_statement_is_sent(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, max_size=1, acquire_timeout=0.1, **way) as pool:
        async with pool.acquire():
            sent = (asyncio.create_task(pool.execute(insert, [number])) for number in range(20))
            outcomes = await asyncio.gather(*sent, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {PoolTimeout}
            assert pool.stats().waiting == 0
        await pool.fetchval("select 1")
        assert pool.stats().timeouts == 20
    assert admin.value(f"select count(*) from {table}") == 0


async def test_acquire_timeout_does_not_bound_how_long_a_statement_takes(
    dsn: str, gate: Gate, way: dict[str, Any]
) -> None:
    async with Pool(dsn, max_size=1, acquire_timeout=0.1, **way) as pool:
        with gate.closed():
            task = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            with pytest.raises(PoolTimeout):  # somebody else, for that time
                await pool.acquire()
        assert await task == 1


async def test_each_statement_that_waits_has_its_own_timeout(dsn: str) -> None:
    async with Pool(dsn, max_size=1, acquire_timeout=None) as pool:
        async with pool.acquire():
            waiting = {
                timeout: asyncio.create_task(pool.fetchval("select 1", timeout=timeout))
                for timeout in (None, LONG, 0.05, 0.2, 0.1)
            }
            for timeout in (0.05, 0.1, 0.2):
                with pytest.raises(PoolTimeout):
                    await waiting[timeout]
            assert not waiting[None].done()
            assert not waiting[LONG].done()
        assert await asyncio.gather(*[waiting[None], waiting[LONG]]) == [1, 1]


async def test_one_more_unsent_statement_than_max_waiting_is_refused_at_once(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, min_size=1, max_size=1, max_waiting=3, **way) as pool:
        async with pool.acquire():
            tasks = [asyncio.create_task(pool.fetchval("select %s::int", [number])) for number in range(3)]
            await asyncio.sleep(0)
            for _ in range(2):
                with pytest.raises(TooManyWaiting, match="3 callers"):
                    await pool.fetchval("select 1")
            tasks.pop().cancel()
            await asyncio.sleep(0)
            tasks.append(asyncio.create_task(pool.fetchval("select 2")))  # there is room again
            await asyncio.sleep(0)
            with pytest.raises(TooManyWaiting):
                await pool.fetchval("select 1")
        assert await asyncio.gather(*tasks) == [0, 1, 2]


@pytest.mark.usefixtures("nothing_is_slow")
@pytest.mark.parametrize("lanes", [0, 1, 2])
async def test_with_max_waiting_zero_one_statement_after_the_other_is_served(dsn: str, lanes: int) -> None:
    async with Pool(dsn, min_size=1, max_size=1, max_waiting=0, lanes=lanes) as pool:
        for number in range(20):
            assert await pool.fetchval("select %s::int", [number]) == number


# --- replaced like others -----------------------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("max_size", [1, 3])
async def test_a_drain_replaces_lanes_under_statements_that_never_end(
    dsn: str, admin: Admin, application_name: str, max_size: int
) -> None:
    def are_gone(pids: set[int]) -> bool:
        return not pids & set(admin.pids(application_name))

    async with Pool(dsn, min_size=1, max_size=max_size) as pool:
        async with flowing(pool, 50) as flow:
            for _ in range(3):
                await flow.more(50)
                pids = set(admin.pids(application_name))
                pool.drain()
                await flow.another_session()
                await eventually(partial(are_gone, pids))
        assert set(pool.stats().closes) == {CloseReason.DRAINED}


@on_both_loops
@pytest.mark.parametrize("max_size", [1, 3])
async def test_a_lane_past_its_lifetime_is_replaced_under_statements_that_never_end(dsn: str, max_size: int) -> None:
    async with Pool(dsn, min_size=1, max_size=max_size, max_lifetime=0.2) as pool:
        async with flowing(pool, 50) as flow:
            await eventually(lambda: len(flow.sessions) >= 4)
        assert CloseReason.MAX_LIFETIME in pool.stats().closes
        assert pool.stats().connect_errors == 0


@on_both_loops
@pytest.mark.parametrize("max_size", [1, 3])
async def test_with_max_uses_one_a_lane_is_used_for_one_lease(dsn: str, max_size: int) -> None:
    async with Pool(dsn, min_size=0, max_size=max_size, max_uses=1) as pool:
        sessions = []
        for _ in range(5):
            row = await pool.fetchrow(STATEMENT, [1])
            assert row is not None
            sessions.append(row[1])
            await eventually(lambda: pool.stats().leased == 0)
        assert len(set(sessions)) == 5
        async with flowing(pool, 20) as flow:
            await flow.more(500)


async def test_a_resize_takes_lanes_away_and_gives_more_under_statements_that_never_end(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, min_size=3, max_size=5, lanes=3) as pool, flowing(pool, 100) as flow:
        for least, most in ((0, 1), (3, 5), (1, 2), (0, 1)):
            pool.resize(least, most)
            await flow.more(200)
            allowed = range(least, most + 1)
            await eventually(lambda: admin.sessions(application_name) in allowed)  # noqa: B023 — in this round only
            await flow.more(200)


@on_both_loops
@pytest.mark.parametrize("patience", [5.0, 0])
async def test_a_close_lets_what_was_sent_be_answered_and_refuses_the_rest(
    dsn: str, admin: Admin, application_name: str, table: str, patience: float
) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, min_size=0, max_size=2) as pool:
        await pool.execute(insert, [-1])
        tasks = [asyncio.create_task(pool.execute(insert, [number])) for number in range(5000)]
        await eventually(lambda: pool.stats().one_shots > 100)
        await pool.close(timeout=patience)
        assert admin.sessions(application_name) == 0
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    acknowledged = sum(outcome == "INSERT 0 1" for outcome in outcomes)
    unknown = sum(isinstance(outcome, StatementOutcomeUnknown) for outcome in outcomes)
    refused = sum(isinstance(outcome, PoolClosed) for outcome in outcomes)
    assert acknowledged + unknown + refused == 5000
    assert refused > 0
    if patience:
        assert unknown == 0
    assert acknowledged + 1 <= admin.value(f"select count(*) from {table}") <= acknowledged + 1 + unknown


async def test_a_close_waits_for_a_statement_that_is_at_work(dsn: str, gate: Gate, way: dict[str, Any]) -> None:
    async with Pool(dsn, max_size=2, **way) as pool:
        with gate.closed():
            at_work = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            closing = asyncio.create_task(pool.close(timeout=LONG))
            await asyncio.sleep(0)
            with pytest.raises(PoolClosed):
                await pool.fetchval("select 1")
            assert not closing.done()
        assert await at_work == 1
        await closing


async def test_a_close_that_waits_no_longer_ends_statements_whose_outcome_is_unknown(
    dsn: str, admin: Admin, application_name: str, gate: Gate
) -> None:
    async with Pool(dsn, max_size=2) as pool:
        with gate.closed():
            at_work = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            await pool.close(timeout=0.05)
            with pytest.raises(StatementOutcomeUnknown):
                await at_work
            assert admin.sessions(application_name) == 0


async def test_a_lane_at_work_is_told_of_among_the_holders(dsn: str, gate: Gate) -> None:
    """A close that has waited in vain, and a timeout, say who holds the connections: a lane is one of those."""
    async with Pool(dsn, max_size=1) as pool:
        with gate.closed():
            at_work = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            holders = pool.holders()
            assert [holder.backend_pid for holder in holders] != []
            assert all(holder.site for holder in holders)
        await at_work
        await eventually(lambda: pool.holders() == [])


async def test_a_busy_lane_is_no_lease_that_was_forgotten(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """`long_held_after` is there to find those; a lane is held for as long as there are statements."""
    async with Pool(dsn, max_size=1, long_held_after=0.05) as pool, flowing(pool, 20) as flow:
        await flow.more(20)
        async with Pool(dsn, min_size=0, max_idle=0.1, application_name="asyncpool-test-clock") as clock:
            for _ in range(3):
                await clock.fetchval("select 1")
                await eventually(lambda: clock.stats().size == 0)
    assert [record.getMessage() for record in caplog.records if "held" in record.getMessage()] == []


# --- leases and lanes on one connection ---------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("reset", ["rollback", "session", "discard"])
async def test_one_connection_is_a_lease_and_a_lane_by_turns(dsn: str, table: str, admin: Admin, reset: Any) -> None:
    async with Pool(dsn, min_size=0, max_size=1, reset=reset) as pool:
        for number in range(20):
            await pool.execute(f"insert into {table} values (%s)".encode(), [number])
            async with pool.acquire() as conn:
                await conn.execute(f"insert into {table} values (%s)".encode(), [100 + number])
                async with conn.pipeline():
                    await conn.execute(f"update {table} set id = id".encode())
            async with pool.transaction() as conn:
                await conn.execute("select 1")
            conn = await pool.acquire()
            await conn.execute(f"delete from {table}".encode())
            await pool.release(conn)  # rolled back
            assert await pool.fetchval(f"select count(*) from {table}".encode()) == 2 * number + 2
        assert pool.stats().connects == 1
    assert admin.value(f"select count(*) from {table}") == 40


async def test_statements_find_the_session_as_leases_leave_it(dsn: str) -> None:
    """What was set on the server stays with `reset="rollback"`, and goes with "session"."""
    modes: list[Literal["rollback", "session"]] = ["rollback", "session"]
    for reset in modes:
        async with Pool(dsn, max_size=1, reset=reset) as pool:
            own = await pool.fetchval("show application_name")
            async with pool.acquire() as conn:
                await conn.execute("set application_name = 'a name'")
            expected = "a name" if reset == "rollback" else own
            assert await pool.fetchval("show application_name") == expected


async def test_setup_prepares_the_connection_for_each_statement(dsn: str) -> None:
    tenants = iter(range(1000))
    seen: list[int] = []

    async def setup(conn: Connection) -> None:
        tenant = next(tenants)
        await conn.execute("select set_config('asyncpool.tenant', %s, false)", [str(tenant)])
        await conn.commit()
        seen.append(tenant)

    async with Pool(dsn, max_size=3, setup=setup) as pool:
        numbers = await asyncio.gather(
            *(pool.fetchval("select current_setting('asyncpool.tenant')::int") for _ in range(50))
        )
        assert sorted(numbers) == sorted(seen) == list(range(50))
        assert pool.stats().acquires == 50


async def test_many_blocks_inside_of_each_other_leave_a_place_for_statements(dsn: str) -> None:
    async with Pool(dsn, max_size=5) as pool, AsyncExitStack() as stack:
        for depth in range(4):
            await stack.enter_async_context(pool.acquire())
            assert await pool.fetchval("select %s::int", [depth]) == depth
        await stack.enter_async_context(pool.acquire())
        with pytest.raises(PoolDeadlock):
            await pool.fetchval("select 1")
