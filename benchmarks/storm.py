"""What is left of a pool after tasks were cancelled on it: the same storm for ours, psycopg_pool and asyncpg's pool.

    python benchmarks/storm.py [--rounds N] [--json] [--url URL] [--tasks N] [--at-once N] [--seed N] [--pool NAME]

Every round has a new pool of 4 connections. Each task takes a connection in a block, asks the server something that
takes 0 to 5 ms, and is cancelled after 0 to 20 ms; the choices come from the seed and are the same for every pool.
Then everything is quiet for a second, and all 4 connections are asked for at once, for at most `--patience` seconds.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import harness
import psycopg
from harness import Table

SIZE = 4
QUIET = 1.0
APPLICATION = "asyncpool benchmark, storm"

Block = Callable[[], AbstractAsyncContextManager[Any]]
Ask = Callable[[Any, int, float], Awaitable[int]]


@dataclass(frozen=True)
class Contender:
    """A pool, open: how a block of it is had, and a question asked on its connection."""

    block: Block
    ask: Ask
    close: Callable[[], Awaitable[Any]]


async def _ask_psycopg(conn: Any, token: int, seconds: float) -> int:
    cursor = await conn.execute("select %s::int, pg_sleep(%s)", (token, seconds))
    return int((await cursor.fetchone())[0])


async def _ask_asyncpg(conn: Any, token: int, seconds: float) -> int:
    return int((await conn.fetchrow("select $1::int, pg_sleep($2)", token, seconds))[0])


async def open_asyncpool(url: str) -> Contender:
    from asyncpool import Pool

    pool = Pool(url, min_size=SIZE, max_size=SIZE, application_name=APPLICATION)
    await pool.open()
    return Contender(pool.acquire, _ask_psycopg, pool.close)


async def open_psycopg_pool(url: str) -> Contender:
    from psycopg_pool import AsyncConnectionPool

    kwargs = {"application_name": APPLICATION}
    pool = AsyncConnectionPool(url, min_size=SIZE, max_size=SIZE, open=False, kwargs=kwargs)
    await pool.open(wait=True)
    return Contender(pool.connection, _ask_psycopg, pool.close)


async def open_asyncpg(url: str) -> Contender:
    import asyncpg

    settings = {"application_name": APPLICATION}
    pool = await asyncpg.create_pool(url, min_size=SIZE, max_size=SIZE, server_settings=settings)
    return Contender(pool.acquire, _ask_asyncpg, lambda: asyncio.wait_for(pool.close(), 5))


POOLS = {"asyncpool": open_asyncpool, "psycopg_pool": open_psycopg_pool, "asyncpg": open_asyncpg}


# --- the storm ----------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one storm has left behind."""

    left: int = 0
    """Connections that can be had afterwards, of `SIZE`."""
    sessions: int = 0
    """What the server counts then."""
    replaced: int = 0
    """Sessions that were there before the storm, and are not any more."""
    wrong_answers: int = 0
    swallowed: int = 0
    """Cancelled tasks that went on, or ended with another error."""
    hanging: int = 0
    """Tasks that had not ended when the patience was over."""


async def cancel_task(work: Callable[[], Awaitable[None]], delay: float, outcome: Outcome) -> None:
    await _cancel(work, delay, outcome, again=0)


async def cancel_task_again(work: Callable[[], Awaitable[None]], delay: float, outcome: Outcome) -> None:
    """As somebody does who wants it gone: an impatient shutdown, or a scope inside of another."""
    await _cancel(work, delay, outcome, again=5)


async def _cancel(work: Callable[[], Awaitable[None]], delay: float, outcome: Outcome, again: int) -> None:
    task = asyncio.ensure_future(work())
    await asyncio.sleep(delay)
    cancelled = task.cancel()
    for _ in range(again):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait((task,))
    if cancelled and not task.cancelled():
        outcome.swallowed += 1
    elif not task.cancelled():
        task.exception()


async def cancel_scope(work: Callable[[], Awaitable[None]], delay: float, outcome: Outcome) -> None:
    try:
        with anyio.move_on_after(delay) as scope:
            await work()
    except Exception:  # noqa: BLE001 — whatever it is: the scope was to end it
        outcome.swallowed += scope.cancel_called


async def race(one: Callable[[int, float], Awaitable[None]], seed: int, options: Any, outcome: Outcome) -> None:
    """The first of `--at-once` tasks wins, and the others are cancelled; then the next ones, until all were run."""
    rng = random.Random(seed)
    for first in range(0, options.tasks, options.at_once):
        tasks = [
            asyncio.ensure_future(one(number, rng.uniform(0, 0.005)))
            for number in range(first, first + options.at_once)
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        cancelled = [task for task in tasks if task.cancel()]
        await asyncio.wait(tasks)
        outcome.swallowed += sum(not task.cancelled() for task in cancelled)


WAYS: dict[str, Any] = {
    "task.cancel()": cancel_task,
    "task.cancel() 6 times": cancel_task_again,
    "anyio scope": cancel_scope,
    "the first one wins": race,
}


async def storm(pool: Contender, way: Any, seed: int, options: Any) -> Outcome:
    outcome = Outcome()
    numbers = iter(range(options.tasks))

    async def lane() -> None:
        for number in numbers:
            rng = random.Random(f"{seed}/{number}")
            seconds, delay = rng.uniform(0, 0.005), rng.uniform(0, 0.02)
            await way(lambda number=number, seconds=seconds: one(number, seconds), delay, outcome)

    async def one(number: int, seconds: float) -> None:
        async with pool.block() as conn:
            outcome.wrong_answers += await pool.ask(conn, number, seconds) != number

    if way is race:
        lanes = [asyncio.ensure_future(race(one, seed, options, outcome))]
    else:
        lanes = [asyncio.ensure_future(lane()) for _ in range(options.at_once)]
    _, hanging = await asyncio.wait(lanes, timeout=options.tasks * 0.05 + options.patience)
    outcome.hanging = len(hanging)
    for task in hanging:
        task.cancel()
    await asyncio.wait(lanes, timeout=options.patience)
    return outcome


async def count_left(pool: Contender, patience: float) -> int:
    """How many connections can be had at the same time, and answer."""
    async with AsyncExitStack() as stack:
        left = 0
        for number in range(SIZE):
            try:
                async with asyncio.timeout(patience):
                    conn = await stack.enter_async_context(pool.block())
                    left += await pool.ask(conn, number, 0.0) == number
            except Exception as error:  # noqa: BLE001 — told by what is not counted
                print(f"    {type(error).__name__}: {error}", file=sys.stderr)
        return left


def server_pids(url: str) -> set[int]:
    with psycopg.connect(url, autocommit=True) as conn:
        found = conn.execute("select pid from pg_stat_activity where application_name = %s", (APPLICATION,))
        return {pid for (pid,) in found}


async def one_round(name: str, way: str, url: str, seed: int, options: Any) -> Outcome:
    # What is left hanging by a pool must not be told again when the loop ends.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    pool = await POOLS[name](url)
    before = server_pids(url)
    outcome = await storm(pool, WAYS[way], seed, options)
    await asyncio.sleep(QUIET)
    outcome.left = await count_left(pool, options.patience)
    after = server_pids(url)
    outcome.sessions = len(after)
    outcome.replaced = len(before - after)
    try:
        await asyncio.wait_for(pool.close(), options.patience + 5)
    except TimeoutError:
        print(f"    {name} does not close", file=sys.stderr)
    return outcome


# --- the table ----------------------------------------------------------------------------------------------

NOTE = (
    "left: the connections that could still be had, in each round; the rest is summed over the rounds.\n"
    "replaced: sessions that are gone. swallowed: cancelled tasks that went on, or raised something else."
)


def main() -> None:
    parser = harness.options(__doc__ or "", rounds=5)
    parser.add_argument("--tasks", type=int, default=500, help="in each storm (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=20, help="how many of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first round (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds (default: %(default)s)")
    parser.add_argument("--pool", choices=sorted(POOLS), action="append", help="only these; may be repeated")
    options = parser.parse_args()
    rows = []
    document: dict[str, Any] = {}
    with harness.server(options.url) as url:
        where = harness.machine(url)
        for way in WAYS:
            for name in options.pool or POOLS:
                outcomes = [
                    harness.run(one_round(name, way, url, options.seed + number, options), "asyncio")
                    for number in range(options.rounds)
                ]
                total: Counter[str] = Counter()
                for outcome in outcomes:
                    total.update(vars(outcome))
                left = " ".join(str(outcome.left) for outcome in outcomes)
                kept = ("replaced", "wrong_answers", "swallowed", "hanging")
                rows.append([f"{name}, {way}", left, *(str(total[column]) for column in kept)])
                document[f"{name}, {way}"] = [vars(outcome) for outcome in outcomes]
    columns = ["", f"left of {SIZE}", "replaced", "wrong answers", "swallowed", "hanging"]
    if options.json:
        harness.show_json({"machine": where, "tasks": options.tasks, "seed": options.seed, "storms": document})
    else:
        what = (
            f"{where}\n{options.rounds} rounds of {options.tasks} tasks, {options.at_once} at once; seed {options.seed}"
        )
        harness.show([Table(columns, rows, f"{what}\n{NOTE}")])


if __name__ == "__main__":
    main()
