"""Who waits for how long, and who gets which connection."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolError, PoolTimeout, TooManyWaiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from psycopg import AsyncConnection

FOREVER = 1000.0


@asynccontextmanager
async def exhausted(dsn: str, **options: Any) -> AsyncIterator[tuple[Pool[Any], AsyncConnection[Any]]]:
    """A pool of one connection, and that connection, leased; whoever still waits at the end is cancelled."""
    async with Pool(dsn, min_size=1, max_size=1, **options) as pool:
        before = asyncio.all_tasks()
        connection = await pool.acquire()
        try:
            yield pool, connection
        finally:
            others = asyncio.all_tasks() - before
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            with suppress(PoolError):  # released in the test
                await pool.release(connection)


async def hold_briefly(pool: Pool[Any], timeout: float | None = FOREVER) -> int:
    async with pool.acquire(timeout=timeout) as connection:
        await asyncio.sleep(0)
        return int(connection.info.backend_pid)


def enqueue(pool: Pool[Any], timeout: float | None = FOREVER) -> asyncio.Task[int]:
    return asyncio.create_task(hold_briefly(pool, timeout))


# --- many ---------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_thousand_tasks_share_five_connections_and_never_one_at_once(dsn: str) -> None:
    in_use: set[int] = set()

    async def use(number: int) -> int:
        async with pool.acquire() as connection:
            pid = connection.info.backend_pid
            assert pid not in in_use
            in_use.add(pid)
            cursor = await connection.execute("select %s::int", [number])
            answer = await cursor.fetchone()
            in_use.remove(pid)
            assert answer is not None
            return int(answer[0])

    async with Pool(dsn, min_size=0, max_size=5) as pool:
        assert await asyncio.gather(*map(use, range(1000))) == list(range(1000))
        assert pool.stats().acquires == 1000
        assert pool.stats().idle == pool.stats().size == 5


# --- the order ----------------------------------------------------------------------------------------------


@on_both_loops
async def test_those_who_wait_are_served_in_the_order_they_came(dsn: str) -> None:
    served: list[int] = []

    async def note(number: int) -> None:
        # A later deadline, or an earlier one, makes no difference.
        async with pool.acquire(timeout=FOREVER - number if number % 2 else None):
            served.append(number)
            await asyncio.sleep(0)

    async with exhausted(dsn) as (pool, connection):
        tasks = [asyncio.create_task(note(number)) for number in range(50)]
        await eventually(lambda: pool.stats().waiting == 50)
        for number in (0, 7, 30, 49):
            tasks[number].cancel()
        await pool.release(connection)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [number for number in range(50) if number not in {0, 7, 30, 49}]


async def test_who_releases_and_asks_again_does_not_overtake_who_waits(dsn: str) -> None:
    async with exhausted(dsn) as (pool, connection):
        waiting = enqueue(pool)
        await eventually(lambda: pool.stats().waiting == 1)
        await pool.release(connection)
        again = await pool.acquire()
        assert waiting.done()
        await pool.release(again)


async def test_of_the_idle_connections_the_one_used_last_is_taken_first(dsn: str) -> None:
    async with Pool(dsn, min_size=4, max_size=4) as pool:
        connections = [await pool.acquire() for _ in range(4)]
        pids = [connection.info.backend_pid for connection in connections]
        for connection in connections:
            await pool.release(connection)
        again = [await pool.acquire() for _ in range(4)]
        assert [connection.info.backend_pid for connection in again] == pids[::-1]
        for connection in again:
            await pool.release(connection)


# --- timeouts -----------------------------------------------------------------------------------------------


@on_both_loops
async def test_who_has_waited_for_the_timeout_gets_an_error_that_says_how_things_stand(dsn: str) -> None:
    async with exhausted(dsn) as (pool, connection):
        with pytest.raises(PoolTimeout, match=r"1 in use, 0 idle.*max_size 1") as error:
            await pool.acquire(timeout=0.05)
        assert isinstance(error.value, TimeoutError)
        assert isinstance(error.value, PoolError)
        assert pool.name in str(error.value)
        assert pool.stats().timeouts == 1
        await pool.release(connection)
        assert pool.stats().idle == 1  # nobody else was meant to get it


async def test_the_timeout_of_a_call_is_its_own_and_acquire_timeout_that_of_all_others(dsn: str) -> None:
    async with exhausted(dsn, acquire_timeout=0.3) as (pool, connection):
        order: list[str] = []

        async def note(name: str, **timeout: float | None) -> None:
            try:
                await pool.release(await pool.acquire(**timeout))
                order.append(f"{name} served")
            except PoolTimeout:
                order.append(f"{name} timed out")

        tasks = [
            asyncio.create_task(note("for ever", timeout=None)),
            asyncio.create_task(note("long", timeout=FOREVER)),
            asyncio.create_task(note("default")),
            asyncio.create_task(note("short", timeout=0.05)),
        ]
        await eventually(lambda: len(order) == 2)
        await pool.release(connection)
        await asyncio.gather(*tasks)
    assert order == ["short timed out", "default timed out", "for ever served", "long served"]


async def test_acquire_timeout_none_waits_for_ever(dsn: str) -> None:
    async with exhausted(dsn, acquire_timeout=None) as (pool, connection):
        waiting = asyncio.ensure_future(pool.acquire())
        with pytest.raises(PoolTimeout):  # as long as another one's whole wait it waits at least
            await pool.acquire(timeout=0.1)
        assert not waiting.done()
        await pool.release(connection)
        await pool.release(await waiting)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), True, "1"])
async def test_an_impossible_timeout_is_refused_when_there_is_something_to_wait_for(dsn: str, timeout: Any) -> None:
    async with exhausted(dsn) as (pool, _):
        with pytest.raises((ValueError, TypeError), match="timeout"):
            await pool.acquire(timeout=timeout)
        assert pool.stats().waiting == 0


# --- timeout=0 ----------------------------------------------------------------------------------------------


def step(pool: Pool[Any]) -> AsyncConnection[Any]:
    """`await pool.acquire(timeout=0)`, failing if that would wait: a refusal yields to the event loop, once."""
    steps = pool.acquire(timeout=0).__await__()
    try:
        assert next(steps) is None, "it waits for something"
        next(steps)
    except StopIteration as done:
        connection: AsyncConnection[Any] = done.value
        return connection
    raise AssertionError("it waits")


@pytest.mark.parametrize("options", [{"acquire_timeout": 0}, {"max_waiting": 0}], ids=["timeout", "max_waiting"])
async def test_who_is_refused_and_tries_again_at_once_does_not_freeze_the_event_loop(
    dsn: str, options: dict[str, Any]
) -> None:
    async with Pool(dsn, min_size=1, max_size=1, **options) as pool:
        connection = await pool.acquire()

        async def insist() -> None:
            while True:
                with suppress(PoolTimeout, TooManyWaiting):
                    await pool.release(await pool.acquire())
                    return

        insisting = asyncio.create_task(insist())
        for _ in range(10):
            await asyncio.sleep(0)
        await pool.release(connection)
        await asyncio.wait_for(insisting, 30)


@on_both_loops
async def test_without_waiting_there_is_an_idle_connection_or_an_error(dsn: str) -> None:
    async with Pool(dsn, min_size=1, max_size=1) as pool:
        connection = step(pool)
        with pytest.raises(PoolTimeout):
            step(pool)
        await pool.release(connection)
        await pool.release(step(pool))


async def test_without_waiting_the_pool_grows_all_the_same(dsn: str) -> None:
    async with Pool(dsn, min_size=0, max_size=2) as pool:
        with pytest.raises(PoolTimeout):
            step(pool)
        await eventually(lambda: pool.stats().idle == 1)
        first = step(pool)
        with pytest.raises(PoolTimeout):
            step(pool)
        await eventually(lambda: pool.stats().idle == 1)
        await pool.release(step(pool))
        await pool.release(first)


async def test_without_waiting_nobody_overtakes_who_waits(dsn: str) -> None:
    async with exhausted(dsn) as (pool, connection):
        waiting = enqueue(pool)
        await eventually(lambda: pool.stats().waiting == 1)
        await pool.release(connection)
        with pytest.raises(PoolTimeout):
            step(pool)
        await waiting


# --- max_waiting --------------------------------------------------------------------------------------------


async def test_one_more_than_max_waiting_is_refused_at_once(dsn: str) -> None:
    async with exhausted(dsn, max_waiting=3) as (pool, connection):
        tasks = [enqueue(pool) for _ in range(3)]
        await eventually(lambda: pool.stats().waiting == 3)
        with pytest.raises(TooManyWaiting, match="3"):
            await pool.acquire()
        tasks[1].cancel()
        await eventually(lambda: pool.stats().waiting == 2)
        tasks[1] = enqueue(pool)  # there is room again
        await eventually(lambda: pool.stats().waiting == 3)
        await pool.release(connection)
        await asyncio.gather(*tasks)


async def test_max_waiting_does_not_count_who_is_served_at_once(dsn: str) -> None:
    async with Pool(dsn, min_size=2, max_size=2, max_waiting=0) as pool:
        async with pool.acquire(), pool.acquire():
            with pytest.raises(TooManyWaiting):
                await pool.acquire()
        async with pool.acquire():
            pass


# --- who leaves ---------------------------------------------------------------------------------------------


@on_both_loops
async def test_what_was_granted_to_a_cancelled_task_goes_to_the_next(dsn: str) -> None:
    async with exhausted(dsn) as (pool, connection):
        first, second = enqueue(pool), enqueue(pool)
        await eventually(lambda: pool.stats().waiting == 2)
        pid = connection.info.backend_pid
        await pool.release(connection)  # granted to the first, which has not run yet
        first.cancel()
        assert await second == pid
        assert first.cancelled()
        assert pool.stats().idle == 1


@on_both_loops
async def test_tasks_that_give_up_at_any_moment_leave_the_pool_as_it_was(dsn: str) -> None:
    async with Pool(dsn, min_size=2, max_size=2) as pool:
        for round_number in range(30):
            tasks = [enqueue(pool) for _ in range(20)]
            for number, task in enumerate(tasks):
                if number % 3 == round_number % 3:
                    task.cancel()
                if number % 5 == 0:
                    await asyncio.sleep(0)
            await asyncio.gather(*tasks, return_exceptions=True)
        assert (pool.stats().idle, pool.stats().waiting, pool.stats().size) == (2, 0, 2)
        assert not pool.stats().closes


# --- the timer ----------------------------------------------------------------------------------------------


class Timers:
    """The timers that are set in a loop; `live` are those that wait for their time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set: list[asyncio.TimerHandle] = []
        call_at = loop.call_at

        def noted_call_at(
            when: float, callback: Callable[..., object], *args: Any, **context: Any
        ) -> asyncio.TimerHandle:
            handle = call_at(when, callback, *args, **context)
            self.set.append(handle)
            return handle

        monkeypatch.setattr(loop, "call_at", noted_call_at)  # asyncio's call_later() calls it

    @property
    def live(self) -> int:
        return sum(not handle.cancelled() for handle in self.set)


async def test_a_thousand_waiters_have_one_timer(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with exhausted(dsn) as (pool, _):
        timers = Timers(asyncio.get_running_loop(), monkeypatch)
        tasks = [enqueue(pool) for _ in range(1000)]
        await asyncio.sleep(0)
        assert pool.stats().waiting == 1000
        assert len(timers.set) <= 1
        for task in tasks[:500]:
            task.cancel()
        await asyncio.sleep(0)
        assert len(timers.set) <= 1


async def test_ever_nearer_deadlines_have_one_timer_between_them(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with exhausted(dsn, check_interval=None, max_idle=None, max_lifetime=None) as (pool, _):
        timers = Timers(asyncio.get_running_loop(), monkeypatch)
        for number in range(1000):
            enqueue(pool, FOREVER - number / 2)
        await asyncio.sleep(0)
        assert pool.stats().waiting == 1000
        assert timers.live == 1


async def test_each_of_many_deadlines_is_kept(dsn: str) -> None:
    async with exhausted(dsn) as (pool, _):
        loop = asyncio.get_running_loop()
        began = loop.time()
        waited: list[tuple[float, float]] = []

        async def note(timeout: float) -> None:
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=timeout)
            waited.append((timeout, loop.time() - began))

        await asyncio.gather(*(note(0.5 - number / 1000) for number in range(400)))
        assert len(waited) == 400
        assert all(seconds >= timeout for timeout, seconds in waited)
