"""However many statements there are: little is in flight, little is kept, and the event loop is everybody's."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from kit.loops import on_both_loops
from kit.proxy import Towards
from kit.waiting import eventually
from psycopg.rows import dict_row

from asyncpool import Pool
from asyncpool._core.lanes import MAX_BYTES, MAX_STATEMENTS

from .gate import PASS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kit.proxy import Proxy
    from psycopg.rows import RowMaker

    from .gate import Gate

pytestmark = pytest.mark.usefixtures("nothing_is_slow", "nothing_stalls")

ONE: dict[str, Any] = {"min_size": 1, "max_size": 1, "lanes": 1}

QUICK = "select %s::int"
GREAT = "select length(%s::text)"

# Bytes that a statement in the queue may take, all in all: it is a task, which alone takes 1,000, a future and what it
# is made of; some 2,000 were seen on Python 3.11.
MEMORY_OF_A_STATEMENT = 5000

# Seconds of processor time in one turn of the event loop: ten times what is promised.
LONGEST_TURN = 0.5


async def until_still(count: Callable[[], int]) -> int:
    """Wait until a number no longer changes."""
    last, looks = -1, 0

    def is_still() -> bool:
        nonlocal last, looks
        now = count()
        looks = looks + 1 if now == last else 0
        last = now
        return looks >= 20

    await eventually(is_still, timeout=30)
    return last


@asynccontextmanager
async def watched_turns() -> AsyncIterator[list[float]]:
    """How much processor time this thread spent in each turn of the event loop: others on the machine do not count."""
    turns: list[float] = []
    stopping = False

    async def watch() -> None:
        while not stopping:
            began = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - began)

    watching = asyncio.create_task(watch())
    try:
        yield turns
    finally:
        stopping = True
        await watching


# --- in flight ----------------------------------------------------------------------------------------------


@on_both_loops
async def test_no_more_statements_are_in_flight_than_the_bound(proxied_dsn: str, proxy: Proxy, gate: Gate) -> None:
    async with Pool(proxied_dsn, check_interval=None, prepare_threshold=0, **ONE) as pool:
        for _ in range(3):
            await pool.fetchval(PASS, [gate.key])
            await pool.fetchval(QUICK, [1])

        def sent() -> int:
            return sum(link.received(Towards.SERVER) for link in proxy.links)

        before = sent()
        await pool.fetchval(QUICK, [1])
        bytes_of_one = sent() - before
        with gate.closed():
            before = sent()
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            tasks = [asyncio.create_task(pool.fetchval(QUICK, [1])) for _ in range(20_000)]
            await eventually(lambda: gate.waiting() == 1)
            in_flight = await until_still(sent) - before
            assert in_flight <= (MAX_STATEMENTS + 5) * bytes_of_one
            assert 20_001 - pool.stats().waiting <= MAX_STATEMENTS
            assert 20_001 - pool.stats().waiting > MAX_STATEMENTS / 2, "it is a pipeline"
        assert await asyncio.gather(slow, *tasks) == [1] * 20_001


@on_both_loops
async def test_no_more_bytes_are_in_flight_than_the_bound(proxied_dsn: str, proxy: Proxy, gate: Gate) -> None:
    """But for the last statement, which may be of any size."""
    size = MAX_BYTES // 8
    async with Pool(proxied_dsn, check_interval=None, **ONE) as pool:
        await pool.fetchval(PASS, [gate.key])
        await pool.fetchval(GREAT, ["x"])

        def sent() -> int:
            return sum(link.received(Towards.SERVER) for link in proxy.links)

        with gate.closed():
            before = sent()
            slow = asyncio.create_task(pool.fetchval(PASS, [gate.key]))
            text = "x" * size
            tasks = [asyncio.create_task(pool.fetchval(GREAT, [text])) for _ in range(300)]
            await eventually(lambda: gate.waiting() == 1)
            in_flight = await until_still(sent) - before
            assert in_flight <= MAX_BYTES + size + 10_000
            assert 8 <= 301 - pool.stats().waiting <= 10
        assert await slow == 1
        assert await asyncio.gather(*tasks) == [size] * 300


async def test_a_statement_that_is_greater_than_the_bound_passes(dsn: str) -> None:
    async with Pool(dsn, **ONE) as pool:
        for _ in range(2):
            sizes = [1, 3 * MAX_BYTES, 2, MAX_BYTES, 5 * MAX_BYTES, 3]
            assert await asyncio.gather(*(pool.fetchval(GREAT, ["x" * size]) for size in sizes)) == sizes


@on_both_loops
async def test_great_parameters_and_great_results_at_once_do_not_block_each_other(dsn: str) -> None:
    """The server reads nothing more while nobody takes what it has to say: whoever only sends waits for ever."""
    async with Pool(dsn, **ONE) as pool:
        for _ in range(2):
            echoes = [pool.fetchval("select %s::text", ["x" * 2_000_000]) for _ in range(20)]
            async with asyncio.timeout(40):
                assert await asyncio.gather(*echoes) == ["x" * 2_000_000] * 20


# --- in the queue -------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_hundred_thousand_statements_at_once_are_all_answered(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        numbers = range(100_000)
        assert await asyncio.gather(*(pool.fetchval(QUICK, [n]) for n in numbers)) == list(numbers)
        assert pool.stats().one_shots == 100_000
        await eventually(lambda: pool.stats().leased == 0)


async def memory_of_a_queue(pool: Pool[Any], count: int, timeout: float | None) -> tuple[float, float]:
    """How many bytes a statement takes that waits for the only connection, and how many when it was answered."""
    lease = await pool.acquire()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    tasks = [asyncio.create_task(pool.fetchval(QUICK, [number], timeout=timeout)) for number in range(count)]
    await eventually(lambda: pool.stats().waiting == count, timeout=30)
    queued = tracemalloc.get_traced_memory()[0] - before
    await pool.release(lease)
    await asyncio.gather(*tasks)
    del tasks
    await eventually(lambda: pool.stats().leased == 0)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - before
    return queued / count, left / count


@pytest.mark.timeout(120)
async def test_a_statement_in_the_queue_takes_little_memory_and_leaves_nothing_behind(dsn: str) -> None:
    """The same for those with a timeout, whose timers are to go with them."""
    async with Pool(dsn, **ONE) as pool:
        await pool.fetchval(QUICK, [0])
        tracemalloc.start()
        try:
            await memory_of_a_queue(pool, 15_000, 1000.0)  # in which Python's own tables grow
            for timeout in (1000.0, None):
                queued, left = await memory_of_a_queue(pool, 15_000, timeout)
                assert queued < MEMORY_OF_A_STATEMENT
                assert left < MEMORY_OF_A_STATEMENT / 10  # the tables grow in their own time
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("count", [50, 500])
async def test_who_goes_takes_his_parameters_with_him(dsn: str, count: int) -> None:
    """Also while nothing can be sent, and the queue does not move."""
    size = 20_000_000 // count

    async def queue_and_go() -> None:
        tasks = [asyncio.create_task(pool.fetchval(GREAT, [f"{number}{'x' * size}"])) for number in range(count)]
        await eventually(lambda: pool.stats().waiting == count + 1)
        assert tracemalloc.get_traced_memory()[0] - before > count * size
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async with Pool(dsn, **ONE) as pool:
        await pool.fetchval(GREAT, ["x"])
        tracemalloc.start()
        try:
            async with pool.acquire():
                staying = asyncio.create_task(pool.fetchval(GREAT, ["stays"]))
                await asyncio.sleep(0)
                before = tracemalloc.get_traced_memory()[0]
                await queue_and_go()
                gc.collect()
                assert tracemalloc.get_traced_memory()[0] - before < count * size / 10
            assert await staying == 5
        finally:
            tracemalloc.stop()


# --- the event loop -----------------------------------------------------------------------------------------


def costly_row(cursor: object) -> RowMaker[Any]:
    """Rows that take a while to make, and hardly any memory."""

    def make(values: Sequence[Any]) -> Any:
        for _ in range(4):
            str(values)
        return values[0] % 10

    return make


@on_both_loops
@pytest.mark.timeout(120)
async def test_a_result_of_a_million_rows_leaves_the_event_loop_to_others(dsn: str) -> None:
    query = "select n from generate_series(1, 1000000) as n"
    async with Pool(dsn, max_size=3) as pool:
        async with watched_turns() as turns:
            rows = await pool.fetch(query, row_factory=costly_row)
        assert rows == [*range(1, 10), 0] * 100_000
        assert max(turns) < LONGEST_TURN
        assert sum(turns) > 1.3 * LONGEST_TURN, "in one piece it would be seen"


@on_both_loops
async def test_many_statements_leave_the_event_loop_to_others(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        tasks = [asyncio.create_task(pool.fetchval(QUICK, [number])) for number in range(50_000)]
        await asyncio.sleep(0)  # in which all of them begin
        async with watched_turns() as turns:
            assert await asyncio.gather(*tasks) == list(range(50_000))
        assert max(turns) < LONGEST_TURN


async def test_others_are_answered_while_many_rows_are_made(dsn: str) -> None:
    async with Pool(dsn, max_size=3, row_factory=dict_row) as pool:
        many = asyncio.create_task(pool.fetch("select n, n as m from generate_series(1, 200000) as n"))
        answered = 0
        while not many.done():
            assert await pool.fetchval(QUICK, [answered]) == answered
            answered += 1
        assert (await many)[-1] == {"n": 200_000, "m": 200_000}
        assert answered > 10


@pytest.mark.parametrize("sender", ["fetch", "fetchrow", "fetchval", "execute"])
async def test_who_goes_while_a_great_result_comes_or_its_rows_are_made_harms_nobody(dsn: str, sender: str) -> None:
    query = "select n, repeat('x', 100) from generate_series(1, 100000) as n"
    async with Pool(dsn, **ONE) as pool:
        await pool.fetchval(QUICK, [0])
        for turns in (1, 10, 100, 300, 1000):
            task = asyncio.create_task(getattr(pool, sender)(query))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            beside = asyncio.create_task(pool.fetchval(QUICK, [turns]))
            await asyncio.wait([task])
            assert await beside == turns
        assert pool.stats().connects == 1
        assert pool.stats().closes == {}
