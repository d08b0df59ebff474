"""What it costs to take a connection and give it back: uncontended, contended, and with 10,000 waiting.

    python benchmarks/acquire.py [--rounds N] [--json] [--url URL] [--uvloop]

No statement is run on any connection. Figures are the pool's own work, plus what the harness costs,
which the two baselines show.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from time import perf_counter
from typing import TYPE_CHECKING, Any

import contenders
import harness
from contenders import OpenPool
from harness import Case, Samples, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

SIZE = 10
TASKS = 200
FEW, MANY = 100, 10_000

# --- uncontended: one task, nobody else ---------------------------------------------------------------------


async def by_hand(pool: OpenPool, count: int) -> float:
    acquire, release = pool.acquire, pool.release
    start = perf_counter()
    for _ in range(count):
        connection = await acquire()
        await release(connection)
    return (perf_counter() - start) / count


async def as_block(pool: OpenPool, count: int) -> float:
    block = pool.block
    start = perf_counter()
    for _ in range(count):
        async with block():
            pass
    return (perf_counter() - start) / count


# --- contended: 200 tasks on 10 connections -----------------------------------------------------------------
# Each holds its connection for one turn of the event loop: without that, whoever runs would never let go of
# the processor while it holds one, and nobody would ever wait.


async def tasks_by_hand(pool: OpenPool, count: int) -> float:
    acquire, release, turns = pool.acquire, pool.release, max(1, count // TASKS)

    async def work() -> None:
        for _ in range(turns):
            connection = await acquire()
            await asyncio.sleep(0)
            await release(connection)

    return await _all_of(work) / (turns * TASKS)


async def tasks_as_block(pool: OpenPool, count: int) -> float:
    block, turns = pool.block, max(1, count // TASKS)

    async def work() -> None:
        for _ in range(turns):
            async with block():
                await asyncio.sleep(0)

    return await _all_of(work) / (turns * TASKS)


async def _all_of(work: Callable[[], Coroutine[Any, Any, None]]) -> float:
    finished = asyncio.gather(*(asyncio.create_task(work()) for _ in range(TASKS)))
    start = perf_counter()
    await finished
    return perf_counter() - start


# --- a long queue -------------------------------------------------------------------------------------------


def with_waiting(waiting: int) -> harness.Measure:
    """Cost of an acquire and its release while `waiting` tasks stand in the queue, all the time: whoever had
    a connection goes to the end of the queue again. The queue is built before the clock starts, and emptied
    after it stops.
    """

    async def measure(pool: OpenPool, count: int) -> float:
        acquire, release = pool.acquire, pool.release
        done, stopped = 0, 0.0

        async def work() -> None:
            nonlocal done, stopped
            while done < count:
                connection = await acquire()
                await asyncio.sleep(0)
                await release(connection)
                done += 1
                if done == count:
                    stopped = perf_counter()

        held = [await acquire() for _ in range(SIZE)]
        finished = asyncio.gather(*(asyncio.create_task(work()) for _ in range(waiting + SIZE)))
        await _parked()
        # What the harness has just built for the queue is not for the pool to pay.
        gc.collect()
        start = perf_counter()
        for connection in held:
            await release(connection)
        await finished
        return (stopped - start) / count

    return measure


async def _parked() -> None:
    # Every pool here has its waiters in the queue by their first turn; the others are for good measure.
    for _ in range(10):
        await asyncio.sleep(0)


async def bytes_per_waiter(pool: OpenPool) -> float:
    """Bytes that Python allocates for one of 10,000 waiters, less those of a task on a bare future."""

    async def on_pool() -> None:
        await pool.release(await pool.acquire())

    never = asyncio.get_running_loop().create_future

    async def on_future() -> None:
        await never()

    held = [await pool.acquire() for _ in range(SIZE)]
    bare = await _bytes_per_task(on_future)
    waiting = await _bytes_per_task(on_pool)
    for connection in held:
        await pool.release(connection)
    return waiting - bare


async def _bytes_per_task(work: Callable[[], Coroutine[Any, Any, None]]) -> float:
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tasks = [asyncio.create_task(work()) for _ in range(MANY)]
    await _parked()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return (after - before) / MANY


# --- the run ------------------------------------------------------------------------------------------------

QUEUES = frozenset([contenders.SEMAPHORE, contenders.OURS, contenders.PSYCOPG_POOL, contenders.ASYNCPG_WITHOUT_RESET])
BY_HAND, AS_BLOCK = "by hand", "async with"
TASKS_BY_HAND, TASKS_AS_BLOCK = f"{TASKS} tasks, by hand", f"{TASKS} tasks, async with"
FEW_WAITING, MANY_WAITING = f"{FEW:,} waiting", f"{MANY:,} waiting"

CASES = [
    Case(BY_HAND, by_hand),
    Case(AS_BLOCK, as_block),
    Case(TASKS_BY_HAND, tasks_by_hand, seconds=0.1),
    Case(TASKS_AS_BLOCK, tasks_as_block, seconds=0.1),
    Case(FEW_WAITING, with_waiting(FEW), count=MANY, only=QUEUES),
    Case(MANY_WAITING, with_waiting(MANY), count=MANY, only=QUEUES),
]


async def measure(url: str, rounds: int) -> tuple[Samples, dict[str, float]]:
    ready = harness.installed([*contenders.BASELINES, *contenders.POOLS])
    async with harness.opened(ready, url, SIZE) as pools:
        samples = await harness.interleaved(CASES, pools, rounds)
        # After the clocks: tracemalloc slows everything down.
        memory = {name: await bytes_per_waiter(pool) for name, pool in pools.items() if name in QUEUES}
    return samples, memory


def reference(samples: Samples) -> str:
    """Ratios are to our own pool; to psycopg_pool where ours is not there."""
    return contenders.OURS if samples.of(BY_HAND, contenders.OURS) else contenders.PSYCOPG_POOL


def cost_table(samples: Samples, title: str, cases: dict[str, str]) -> Table:
    """`cases`: what a case is called in the head of the table, and in the samples."""
    to = reference(samples)
    columns = [f"{title}, µs"]
    for head in cases:
        columns += [head, "±", "ratio"]
    rows = []
    for name in in_listed_order(samples.figures[BY_HAND]):
        row = [name]
        for case in cases.values():
            row += [
                harness.microseconds(samples.median(case, name)),
                samples.spread(case, name),
                harness.times(samples.ratio((case, name), (case, to))),
            ]
        rows.append(row)
    return Table(columns, rows, f"ratio: to {to}, {harness.LEGEND}")


def queue_table(samples: Samples, memory: dict[str, float]) -> Table:
    columns = ["A long queue, µs", FEW_WAITING, MANY_WAITING, "ratio", "bytes per waiter"]
    rows = [
        [
            name,
            harness.microseconds(samples.median(FEW_WAITING, name)),
            harness.microseconds(samples.median(MANY_WAITING, name)),
            f"×{samples.ratio((MANY_WAITING, name), (FEW_WAITING, name)):.2f}",
            f"{memory[name]:,.0f}",
        ]
        for name in in_listed_order(samples.figures[MANY_WAITING])
    ]
    note = (
        f"ratio: of {MANY_WAITING} to {FEW_WAITING}. bytes: by tracemalloc, {MANY:,} waiting, "
        "beyond those of a task on a bare future."
    )
    return Table(columns, rows, note)


def in_listed_order(names: Iterable[str]) -> list[str]:
    listed = [contender.name for contender in [*contenders.BASELINES, *contenders.POOLS]]
    return sorted(names, key=listed.index)


def main() -> None:
    parser = harness.options("acquire and release, without a statement", rounds=5)
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    arguments = parser.parse_args()
    loop = "uvloop" if arguments.uvloop else "asyncio"
    with harness.server(arguments.url) as url:
        where = f"{harness.machine(url)}, {loop}"
        samples, memory = harness.run(measure(url, arguments.rounds), loop)
    if arguments.json:
        harness.show_json({"machine": where, "seconds": samples.figures, "bytes_per_waiter": memory})
        return
    print(f"acquire + release, {SIZE} connections, median of {arguments.rounds} interleaved rounds\n{where}\n")
    harness.show(
        [
            cost_table(samples, "Uncontended", {"by hand": BY_HAND, "async with": AS_BLOCK}),
            cost_table(samples, f"{TASKS} tasks", {"by hand": TASKS_BY_HAND, "async with": TASKS_AS_BLOCK}),
            queue_table(samples, memory),
        ]
    )


if __name__ == "__main__":
    main()
