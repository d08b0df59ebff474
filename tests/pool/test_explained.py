"""A PoolTimeout says what is wrong: a leak, a lock, a slow statement, a pool too small, a server that is not there."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import weakref
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Holder, Pool, PoolDeadlock, PoolTimeout
from asyncpool.events import seconds_in_words

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kit.mortal_server import MortalServer

    from .leftovers import Connection


def line_here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


@asynccontextmanager
async def held_by(pool: Pool[Connection], name: str, *statements: bytes) -> AsyncIterator[asyncio.Task[None]]:
    """A task of that name holds a connection, on which it has run these, until the block ends."""
    over = asyncio.Event()

    async def hold() -> None:
        conn = await pool.acquire()
        with suppress(psycopg.Error):
            for statement in statements:
                await conn.execute(statement)
        started.set()
        await over.wait()
        await pool.release(conn)

    started = asyncio.Event()
    task = asyncio.create_task(hold(), name=name)
    await asyncio.wait_for(started.wait(), 20)
    try:
        yield task
    finally:
        over.set()
        await task


async def refused(pool: Pool[Connection], timeout: float = 0.05) -> PoolTimeout:
    with pytest.raises(PoolTimeout) as error:
        await pool.acquire(timeout)
    return error.value


@on_both_loops
async def test_it_names_the_leases_that_are_held_longest_with_task_place_time_and_transaction(dsn: str) -> None:
    async with Pool(dsn, max_size=4, name="orders") as pool:
        async with (
            held_by(pool, "idle one"),
            held_by(pool, "in the midst", b"select 1"),
            held_by(pool, "failed one", b"nonsense"),
            held_by(pool, "latest"),
        ):
            error = await refused(pool)
        owners = [holder.owner for holder in error.holders]
        assert owners == ["task 'idle one'", "task 'in the midst'", "task 'failed one'"]
        states = [holder.transaction for holder in error.holders]
        assert states == ["idle", "in a transaction", "in a failed transaction"]
        held_for = [holder.held_for for holder in error.holders]
        assert held_for == sorted(held_for, reverse=True)
        assert all(holder.site.startswith(f"{__file__}:") and "hold" in holder.site for holder in error.holders)
        text = str(error)
        assert text.startswith("orders: no connection within 0.0")
        assert "4 in use, 0 idle, 0 connecting, 0 others waiting, max_size 4" in text
        for holder in error.holders:
            assert str(holder) in text
        assert "latest" not in text


@on_both_loops
async def test_its_attributes_say_what_its_text_says(dsn: str) -> None:
    async with Pool(dsn, max_size=1, name="orders") as pool, held_by(pool, "holder"):
        error = await refused(pool)
    assert error.pool == "orders"
    assert 0.05 <= error.waited < 20
    assert (error.position, error.in_use, error.idle, error.connecting, error.max_size) == (1, 1, 0, 0, 1)
    assert error.connect_error_age is None
    assert error.__cause__ is None
    assert f"within {error.waited:.3g} s, number 1 of 1 in the queue" in str(error)


async def test_it_says_how_many_were_ahead(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool, held_by(pool, "holder"):
        patient = [asyncio.ensure_future(_acquire(pool, None)) for _ in range(3)]
        await eventually(lambda: pool.stats().waiting == 3)
        hasty = asyncio.ensure_future(_acquire(pool, 0.05))
        await eventually(lambda: pool.stats().waiting == 4)
        last = asyncio.ensure_future(_acquire(pool, None))
        (error,) = await asyncio.gather(hasty, return_exceptions=True)
        assert isinstance(error, PoolTimeout)
        assert error.position == 4
        assert "number 4 of 5 in the queue" in str(error)
        for task in (*patient, last):
            task.cancel()
        await asyncio.wait([*patient, last])


async def _acquire(pool: Pool[Connection], timeout: float | None) -> None:
    async with pool.acquire(timeout):
        pass


async def test_those_who_are_refused_together_are_numbered_as_they_stood(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool, held_by(pool, "holder"):
        errors = await asyncio.gather(*(_acquire(pool, 0.05) for _ in range(20)), return_exceptions=True)
    places = [error.position for error in errors if isinstance(error, PoolTimeout)]
    assert len(places) == 20
    assert places[0] == 1
    assert all(place is not None and place >= 1 for place in places)


# --- what it may be -----------------------------------------------------------------------------------------


async def test_if_nobody_gave_one_back_it_may_be_a_leak_a_lock_or_a_slow_statement(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool, held_by(pool, "one"), held_by(pool, "two"):
        assert "none came back meanwhile: look there for a leak, a lock or a slow" in str(await refused(pool))


async def test_if_they_came_back_and_went_to_others_the_pool_may_be_too_small(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        first = await pool.acquire()
        ahead = asyncio.ensure_future(pool.acquire().__aenter__())
        await eventually(lambda: pool.stats().waiting == 1)
        hasty = asyncio.ensure_future(_acquire(pool, 0.3))
        await eventually(lambda: pool.stats().waiting == 2)
        await pool.release(first)
        (error,) = await asyncio.gather(hasty, return_exceptions=True)
        assert "they came back and went to others" in str(error)
        await pool.release(await ahead)


@on_both_loops
async def test_who_waits_for_another_than_the_one_that_it_holds_is_told(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool, held_by(pool, "somebody else"):
        mine = await pool.acquire()
        assert "who waited holds one of them" in str(await refused(pool))
        with pytest.raises(PoolTimeout, match="who waited holds one of them"):
            await pool.fetchval("select 1", timeout=0.05)
        await pool.release(mine)


async def test_where_there_is_room_no_such_guess_is_made(mortal: MortalServer, application_name: str) -> None:
    async with Pool(mortal.dsn(application_name), min_size=1, max_size=2, backoff_initial=0.01) as pool:
        mortal.stop("immediate")
        try:
            error = await refused(pool, 1.0)
        finally:
            mortal.start()
        assert "came back" not in str(error)
        assert error.connect_error_age is not None
        assert 0 <= error.connect_error_age < 60
        assert isinstance(error.__cause__, psycopg.OperationalError)
        assert str(error.__cause__) in str(error)
        assert "last connect error, " in str(error)


async def test_at_open_it_says_the_same(application_name: str) -> None:
    pool = Pool("host=127.0.0.1 port=1", name="orders", backoff_initial=0.01)
    with pytest.raises(PoolTimeout, match=r"orders: min_size=1 was not connected within 0\.2 s") as error:
        await pool.open(timeout=0.2)
    assert (error.value.pool, error.value.max_size, error.value.position) == ("orders", 10, None)
    assert error.value.connect_error_age is not None
    assert isinstance(error.value.__cause__, psycopg.OperationalError)


async def test_a_refusal_at_once_makes_no_guess_and_names_no_place(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool, held_by(pool, "holder"):
        error = await refused(pool, 0)
    assert "no connection within 0 s; 1 in use" in str(error)
    assert error.position is None
    assert "came back" not in str(error)


# --- holders ------------------------------------------------------------------------------------------------


async def test_a_lease_whose_task_has_ended_is_told_from_one_whose_task_goes_on(dsn: str) -> None:
    kept: list[Connection] = []

    async def take() -> None:
        kept.append(await pool.acquire())

    async with Pool(dsn, max_size=1) as pool:
        await asyncio.create_task(take(), name="short-lived")
        await eventually(lambda: [each.owner for each in pool.holders()] == ["a task that has ended"])
        await pool.release(kept.pop())


async def test_a_lease_keeps_its_task_from_nothing(dsn: str) -> None:
    """That would keep all that the task's frames hold."""
    kept: list[Connection] = []

    class Payload:
        pass

    alive: Any = None

    async def take() -> None:
        nonlocal alive
        payload = Payload()
        alive = weakref.ref(payload)
        kept.append(await pool.acquire())

    async with Pool(dsn, max_size=1) as pool:
        await asyncio.create_task(take())
        await eventually(lambda: alive() is None)
        await pool.release(kept.pop())


async def test_lanes_are_named_as_what_they_are(dsn: str) -> None:
    async with Pool(dsn, max_size=1, lanes=1) as pool:
        for _ in range(2):
            await pool.fetchval("select pg_sleep(0)")
        slow = asyncio.ensure_future(pool.fetchval("select 1 from pg_sleep(0.2)"))
        await eventually(lambda: pool.stats().leased == 1)
        (holder,) = pool.holders()
        assert str(holder).startswith("one-shot statements for 0")
        await slow


async def test_lanes_are_no_leases_of_who_had_the_connection_before(dsn: str) -> None:
    async with Pool(dsn, max_size=1, lanes=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("select 1")
        slow = asyncio.create_task(pool.fetchval("select 1 from pg_sleep(0.3)"))
        await eventually(lambda: pool.stats().leased == 1)
        assert "who waited holds" not in str(await refused(pool))
        await slow


@on_both_loops
async def test_who_was_refused_is_not_kept_by_what_it_was_told(dsn: str) -> None:
    """A cycle would keep its task, and all that hangs on that, until the garbage collector runs."""
    async with Pool(dsn, max_size=1) as pool, held_by(pool, "holder"):

        async def wait() -> None:
            with suppress(PoolTimeout):
                await pool.acquire(0.01)

        waiting = asyncio.create_task(wait())
        gone = weakref.ref(waiting)
        gc.disable()
        try:
            await waiting
            del waiting
            await eventually(lambda: gone() is None, timeout=1)
        finally:
            gc.enable()


def test_an_error_that_was_pickled_says_the_same() -> None:
    holder = Holder("app.py:1 in main", 1.5, 42, None, "task 'main'", "idle")
    error = PoolTimeout("no connection", pool="orders", waited=1.0, position=2, in_use=3, holders=(holder,))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert vars(again) == vars(error)


# --- the others ---------------------------------------------------------------------------------------------


async def test_a_deadlock_names_each_place_once_and_what_to_do_instead(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        together = asyncio.Barrier(2)

        async def greedy() -> None:
            async with pool.acquire():
                await together.wait()
                async with pool.acquire():
                    pass

        errors = await asyncio.gather(greedy(), greedy(), return_exceptions=True)
        (error,) = [each for each in errors if each is not None]
        assert isinstance(error, PoolDeadlock)
        assert str(error).count("greedy") == 1
        assert "(2 times)" in str(error)


async def test_who_forgets_to_await_is_told_so(dsn: str) -> None:
    async with Pool(dsn) as pool:
        unawaited: Any = pool.acquire()
        with pytest.raises(AttributeError, match="`await` what acquire"):
            unawaited.execute("select 1")
        assert not hasattr(unawaited, "cursor")


@pytest.mark.parametrize("value", ["yes", 1, None])
async def test_track_outcome_is_true_or_false(dsn: str, value: Any) -> None:
    async with Pool(dsn) as pool:
        with pytest.raises(TypeError, match="track_outcome must be True or False"):
            pool.transaction(track_outcome=value)


async def test_who_is_just_being_woken_is_not_taken_for_the_holder_before(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        mine = await pool.acquire()
        next_one = asyncio.create_task(_acquire(pool, None))
        await eventually(lambda: pool.stats().waiting == 1)
        pool.release(mine)
        (holder,) = pool.holders()
        assert (holder.owner, holder.site) == ("a caller who is being woken", "unknown")
        await next_one


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("connection", "async with pool.acquire"), ("getconn", "await pool.acquire"), ("putconn", "pool.release")],
)
def test_a_method_of_another_pool_is_told_by_what_to_replace_it(name: str, remedy: str) -> None:
    pool = Pool("")
    with pytest.raises(AttributeError, match=f"Pool has no '{name}': use `?{remedy}"):
        getattr(pool, name)
    assert not hasattr(pool, name)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.00123, "0.00123 s"), (1.5, "1.5 s"), (99.94, "99.9 s"), (1800.4, "1,800 s")]
)
def test_a_long_time_is_told_in_whole_seconds(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words
    assert f" for {words}" in str(Holder("app.py:1 in main", seconds, 1, owner="task 'a'", transaction="idle"))
