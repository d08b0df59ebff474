"""Who no longer waits goes at once: what was not sent never is, what was sent is executed and its answer dropped."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolTimeout, StatementOutcomeUnknown, StatementTimeout

from .gate import INSERTED, PASS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kit.proxy import Proxy
    from kit.servers import Admin

    from .gate import Gate

pytestmark = [on_both_loops, pytest.mark.usefixtures("nothing_is_slow", "nothing_stalls")]

# Nobody waits for that long, in seconds: it is there to fail the test.
LONG = 20.0
# How long whoever gives up waits, in seconds.
SHORT = 0.1

ONE: dict[str, Any] = {"min_size": 1, "max_size": 1, "lanes": 1}

Call: TypeAlias = Callable[[], Coroutine[Any, Any, Any]]
GivingUp: TypeAlias = Callable[[Call, Callable[[], Awaitable[object]]], Coroutine[Any, Any, None]]


async def cancelled(call: Call, ready: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.create_task(call())
    await ready()
    task.cancel()
    await asyncio.wait([task], timeout=LONG)
    assert task.cancelled()


async def in_a_timeout_block(call: Call, ready: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT):
            await call()


async def in_wait_for(call: Call, ready: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call(), SHORT)


async def in_a_cancel_scope(call: Call, ready: Callable[[], Awaitable[object]]) -> None:
    with anyio.move_on_after(SHORT) as scope:
        await call()
    assert scope.cancelled_caught


async def in_a_task_group_that_fails(call: Call, ready: Callable[[], Awaitable[object]]) -> None:
    async def fail() -> None:
        await ready()
        raise LookupError("mine")

    tasks: list[asyncio.Task[Any]] = []
    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            tasks.append(group.create_task(call()))
            group.create_task(fail())
    assert tasks[0].cancelled()


WAYS: list[GivingUp] = [cancelled, in_a_timeout_block, in_wait_for, in_a_cancel_scope, in_a_task_group_that_fails]
each_way = pytest.mark.parametrize("give_up", WAYS, ids=lambda way: way.__name__)


async def soon() -> None:
    """Long enough for whatever is to be sent."""
    for _ in range(5):
        await asyncio.sleep(0)


async def at_the_gate(gate: Gate) -> None:
    await soon()
    await eventually(lambda: gate.waiting() == 1)


async def known(pool: Pool[Any], table: str, gate: Gate) -> None:
    """The statements of these tests are known to be quick: several of them are in flight together."""
    for number in range(3):
        await pool.execute(f"insert into {table} {INSERTED}".encode(), [number, gate.key])
        await pool.fetchval("select %s::int", [0])
    await pool.execute(f"delete from {table}".encode())


def ids(admin: Admin, table: str) -> list[int]:
    return [number for (number,) in admin.execute(f"select id from {table} order by id")]


@pytest.fixture
async def waiting_lane(dsn: str, table: str, gate: Gate) -> AsyncIterator[tuple[Pool[Any], Callable[[int], Call]]]:
    """A pool of one connection, whose statements are known, and what inserts a number when the gate is open."""
    async with Pool(dsn, **ONE) as pool:
        await known(pool, table, gate)

        def inserting(number: int) -> Call:
            return lambda: pool.execute(f"insert into {table} {INSERTED}".encode(), [number, gate.key])

        yield pool, inserting


Lane: TypeAlias = tuple[Pool[Any], Callable[[int], Call]]


# --- not sent -----------------------------------------------------------------------------------------------


@each_way
async def test_what_waits_for_a_connection_is_never_sent(dsn: str, table: str, admin: Admin, give_up: GivingUp) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, **ONE) as pool:
        async with pool.acquire():
            before = asyncio.create_task(pool.execute(insert, [1]))
            await eventually(lambda: pool.stats().waiting == 1)
            giving_up = give_up(
                lambda: pool.execute(insert, [2]), lambda: eventually(lambda: pool.stats().waiting == 2)
            )
            await asyncio.create_task(giving_up)  # in this one it would be a deadlock
            assert pool.stats().waiting == 1
            after = asyncio.create_task(pool.execute(insert, [3]))
            await eventually(lambda: pool.stats().waiting == 2)
        assert await asyncio.gather(*[before, after]) == ["INSERT 0 1"] * 2
        assert ids(admin, table) == [1, 3]
        await eventually(lambda: pool.stats().leased == 0)


@each_way
async def test_what_waits_behind_an_unknown_statement_is_never_sent(
    dsn: str, table: str, admin: Admin, gate: Gate, give_up: GivingUp
) -> None:
    """Nothing is sent behind one that was never timed, and here is no other connection."""
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, **ONE) as pool:
        await pool.execute(insert, [1])
        with gate.closed():
            unknown = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            await eventually(lambda: gate.waiting() == 1)
            await give_up(lambda: pool.execute(insert, [2]), soon)
            kept = asyncio.create_task(pool.execute(insert, [3]))
            await soon()
        assert await asyncio.gather(*[unknown, kept]) == [1, "INSERT 0 1"]
        assert ids(admin, table) == [1, 3]


async def test_cancelled_in_the_turn_in_which_it_began_it_is_not_sent(dsn: str, table: str, admin: Admin) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, **ONE) as pool:
        await pool.execute(insert, [1])
        tasks = [asyncio.create_task(pool.execute(insert, [number])) for number in range(2, 10)]
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert ids(admin, table) == [1, 3, 5, 7, 9]


async def test_a_timeout_of_what_was_not_sent_is_a_pool_timeout(dsn: str, table: str, admin: Admin) -> None:
    insert = f"insert into {table} values (1)".encode()
    async with Pool(dsn, **ONE) as pool:
        async with pool.acquire():
            outcomes = await asyncio.gather(
                pool.execute(insert, timeout=SHORT),
                pool.fetch(insert, timeout=SHORT),
                pool.fetchrow(insert, timeout=SHORT),
                pool.fetchval(insert, timeout=SHORT),
                return_exceptions=True,
            )
            assert {type(outcome) for outcome in outcomes} == {PoolTimeout}
            assert pool.stats().waiting == 0
        assert await pool.fetchval("select 1") == 1
        assert ids(admin, table) == []


# --- sent ---------------------------------------------------------------------------------------------------


@each_way
async def test_what_was_sent_is_executed_and_nobody_beside_it_notices(
    waiting_lane: Lane, table: str, admin: Admin, gate: Gate, give_up: GivingUp
) -> None:
    pool, inserting = waiting_lane
    pid = await pool.fetchval("select pg_backend_pid()")
    with gate.closed():
        first = asyncio.create_task(inserting(1)())
        before = asyncio.create_task(inserting(2)())
        giving_up = asyncio.create_task(give_up(inserting(3), lambda: at_the_gate(gate)))
        await soon()
        after = [asyncio.create_task(inserting(number)()) for number in (4, 5)]
        await giving_up  # though the server is still at work
        assert gate.waiting() == 1
        assert not any(task.done() for task in (first, before, *after))
    assert await asyncio.gather(first, before, *after) == ["INSERT 0 1"] * 4
    assert ids(admin, table) == [1, 2, 3, 4, 5]
    assert await pool.fetchval("select pg_backend_pid()") == pid
    assert pool.stats().closes == {}


@each_way
async def test_the_one_that_the_server_works_on_is_let_end(
    waiting_lane: Lane, table: str, admin: Admin, gate: Gate, give_up: GivingUp
) -> None:
    """It is in front: to cancel it on the server could hit the one behind it."""
    pool, inserting = waiting_lane
    with gate.closed():
        giving_up = asyncio.create_task(give_up(inserting(1), lambda: at_the_gate(gate)))
        await soon()
        behind = asyncio.create_task(inserting(2)())
        await giving_up
        assert gate.waiting() == 1
    assert await behind == "INSERT 0 1"
    assert ids(admin, table) == [1, 2]
    assert pool.stats().connects == 1


async def test_when_nobody_waits_any_more_the_connection_comes_back_with_the_last_answer(
    waiting_lane: Lane, table: str, admin: Admin, gate: Gate
) -> None:
    pool, inserting = waiting_lane
    with gate.closed():
        tasks = [asyncio.create_task(inserting(number)()) for number in range(5)]
        await eventually(lambda: gate.waiting() == 1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    await eventually(lambda: pool.stats().leased == 0)
    assert ids(admin, table) == [0, 1, 2, 3, 4]
    assert await inserting(5)() == "INSERT 0 1"
    assert pool.stats().connects == 1


async def test_the_timeout_of_what_was_sent_says_that_its_outcome_is_unknown(
    waiting_lane: Lane, table: str, admin: Admin, gate: Gate
) -> None:
    pool, inserting = waiting_lane
    insert = f"insert into {table} {INSERTED}".encode()
    with gate.closed():
        beside = [asyncio.create_task(inserting(1)())]
        calls = [
            pool.execute(insert, [2, gate.key], timeout=SHORT),
            pool.fetch(insert, [3, gate.key], timeout=SHORT * 2),
            pool.fetchrow(insert, [4, gate.key], timeout=SHORT),
            pool.fetchval(insert, [5, gate.key], timeout=SHORT),
        ]
        timed_out = asyncio.gather(*calls, return_exceptions=True)
        await soon()
        beside.append(asyncio.create_task(inserting(6)()))
        outcomes = await timed_out
        assert {type(outcome) for outcome in outcomes} == {StatementTimeout}
        assert gate.waiting() == 1
    error = outcomes[0]
    assert isinstance(error, StatementTimeout)
    assert isinstance(error, TimeoutError)
    assert isinstance(error, StatementOutcomeUnknown)
    assert isinstance(error, psycopg.OperationalError)
    assert error.sqlstate == "08007"
    assert pool.name in str(error)
    assert await asyncio.gather(*beside) == ["INSERT 0 1"] * 2
    assert ids(admin, table) == [1, 2, 3, 4, 5, 6]
    assert pool.stats().closes == {}


async def test_a_timeout_that_is_over_in_the_moment_of_the_answer_is_one_or_the_other(
    waiting_lane: Lane, table: str, admin: Admin, gate: Gate
) -> None:
    """Whatever was acknowledged is there, and whatever timed out was told so once."""
    pool, _ = waiting_lane
    acknowledged: set[int] = set()
    refused: set[int] = set()
    insert = f"insert into {table} values (%s)".encode()

    async def send(number: int) -> None:
        try:
            await pool.execute(insert, [number], timeout=random.choice([0.0005, 0.001, 0.002, 0.004]))
        except StatementTimeout:
            pass
        except PoolTimeout:
            refused.add(number)
        else:
            acknowledged.add(number)

    for turn in range(20):
        await asyncio.gather(*(send(turn * 100 + number) for number in range(100)))
    await pool.fetchval("select 1")
    present = ids(admin, table)
    assert len(set(present)) == len(present)
    assert acknowledged <= set(present)
    assert not refused & set(present)
    assert pool.stats().closes == {}


async def test_executemany_that_is_cancelled_does_nothing(dsn: str, table: str, admin: Admin, gate: Gate) -> None:
    insert = f"insert into {table} {INSERTED}".encode()
    async with Pool(dsn, max_size=1, cancel_timeout=LONG) as pool:
        pid = await pool.fetchval("select pg_backend_pid()")
        with gate.closed():
            many = [(number, gate.key) for number in range(10)]
            task = asyncio.create_task(pool.executemany(insert, many))
            await eventually(lambda: gate.waiting() == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(lambda: gate.waiting() == 0)  # it has a connection of its own: there it can be cancelled
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SHORT):
                    await pool.executemany(insert, many)
        assert await pool.fetchval("select pg_backend_pid()") == pid
        assert ids(admin, table) == []


# --- never on the server ------------------------------------------------------------------------------------


async def test_no_statement_is_ever_cancelled_on_the_server(
    proxied_dsn: str, proxy: Proxy, table: str, admin: Admin, gate: Gate
) -> None:
    async with Pool(proxied_dsn, **ONE) as pool:
        await known(pool, table, gate)
        links = proxy.arrivals
        insert = f"insert into {table} {INSERTED}".encode()
        for turn in range(5):
            with gate.closed():
                tasks = [asyncio.create_task(pool.execute(insert, [turn * 10 + n, gate.key])) for n in range(10)]
                await eventually(lambda: gate.waiting() == 1)
                for task in tasks[turn % 2 :: 2]:
                    task.cancel()
                with pytest.raises(StatementTimeout):
                    await pool.fetchval("select %s::int", [1], timeout=SHORT)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [outcome for outcome in outcomes if isinstance(outcome, psycopg.Error)] == []
            assert outcomes.count("INSERT 0 1") == 5
        assert await pool.fetchval("select 1") == 1
        assert proxy.arrivals == links, "a request to cancel is a connection of its own"
        assert ids(admin, table) == list(range(50))


async def test_those_who_give_up_at_any_moment_harm_nobody(dsn: str, table: str, admin: Admin) -> None:
    """Each that stays gets what is its own; each INSERT that was acknowledged is there once."""
    chance = random.Random(random.random())
    insert = f"insert into {table} values (%s) returning id, %s::text".encode()
    acknowledged: list[int] = []

    async def send(number: int) -> None:
        token = f"token {number}"
        match number % 4:
            case 0:
                assert await pool.fetchrow(insert, [number, token]) == (number, token)
                acknowledged.append(number)
            case 1:
                assert await pool.fetchval("select %s::text", [token]) == token
            case 2:
                assert await pool.fetchval(f"select %s::text -- {number % 13}".encode(), [token]) == token
            case _:
                with pytest.raises(psycopg.errors.RaiseException, match=token):
                    await pool.execute(f"do $$ begin raise exception '{token}'; end $$".encode())

    async with Pool(dsn, min_size=0, max_size=3, lanes=2) as pool:
        stayed = 0
        for turn in range(30):
            tasks = [asyncio.create_task(send(turn * 100 + number)) for number in range(100)]
            victims = chance.sample(tasks, 40)
            for victim in victims:
                for _ in range(chance.choice([0, 0, 0, 1, 3])):
                    await asyncio.sleep(0)
                victim.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    assert task.exception() is None
                    stayed += 1
        assert stayed > 1000
        await eventually(lambda: pool.stats().leased == 0)
        present = ids(admin, table)
        assert len(set(present)) == len(present)
        assert set(acknowledged) <= set(present)
        assert (pool.stats().waiting, pool.stats().closes) == (0, {})
