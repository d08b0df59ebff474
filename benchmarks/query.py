"""How many small statements a second a pool carries: 200 tasks on 10 connections, `select 1` each time.

    python benchmarks/query.py [--rounds N] [--json] [--url URL] [--loop asyncio|uvloop|both]

Every contender is in autocommit, takes a connection for each statement by `async with`, and fetches the row.
Each event loop has a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from time import perf_counter
from typing import Any

import contenders
import harness
from contenders import OpenPool
from harness import Case, Samples, Table

SIZE = 10
TASKS = 200
CASE = f"{TASKS} tasks on {SIZE} connections"


async def select_one(pool: OpenPool, count: int) -> float:
    """Seconds per statement, over at least `count` of them."""
    block, select, turns = pool.block, pool.select_one, max(1, count // TASKS)

    async def work() -> None:
        for _ in range(turns):
            async with block() as connection:
                await select(connection)

    finished = asyncio.gather(*(asyncio.create_task(work()) for _ in range(TASKS)))
    start = perf_counter()
    await finished
    return (perf_counter() - start) / (turns * TASKS)


async def measure(url: str, rounds: int) -> Samples:
    ready = harness.installed([*contenders.BASELINES, *contenders.POOLS])
    async with harness.opened(ready, url, SIZE) as pools:
        return await harness.interleaved([Case(CASE, select_one, seconds=0.3)], pools, rounds)


def measured_elsewhere(url: str, rounds: int, loop: str) -> Samples:
    """The same in a process of its own: two kinds of event loop in one would share a heap."""
    command = [sys.executable, __file__, "--worker", loop, "--rounds", str(rounds), "--url", url]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return Samples(json.loads(answer))


def rate_table(samples: dict[str, Samples]) -> Table:
    """Statements a second, and how many times psycopg_pool's they are."""
    columns = [CASE]
    for loop in samples:
        columns += [f"{loop}, 1/s", "±", "ratio"]
    rows = []
    for contender in [*contenders.BASELINES, *contenders.POOLS]:
        if any(one.of(CASE, contender.name) for one in samples.values()):
            row = [contender.name]
            for one in samples.values():
                row += rate_cells(one, contender.name)
            rows.append(row)
    note = (
        f"ratio: the rate, in times that of {contenders.PSYCOPG_POOL}, {harness.LEGEND}\n"
        "In brackets: a turn of the event loop in place of the statement, the harness's own limit."
    )
    return Table(columns, rows, note)


def rate_cells(samples: Samples, name: str) -> list[str]:
    seconds = samples.median(CASE, name)
    if seconds is None:
        return ["", "", ""]
    ratio = samples.ratio((CASE, contenders.PSYCOPG_POOL), (CASE, name))
    return [f"{1 / seconds:,.0f}", samples.spread(CASE, name), harness.times(ratio)]


def loops_to_run(wanted: str) -> list[str]:
    loops = ["asyncio", "uvloop"] if wanted == "both" else [wanted]
    if "uvloop" in loops and not harness.has_uvloop():
        print("left out: uvloop (not installed)", file=sys.stderr)
        loops.remove("uvloop")
    return loops


def main() -> None:
    parser = harness.options("acquire + select 1, in autocommit", rounds=5)
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--worker", choices=["asyncio", "uvloop"], help="internal: measure here, print JSON")
    arguments: Any = parser.parse_args()
    if arguments.worker:
        samples = harness.run(measure(arguments.url, arguments.rounds), arguments.worker)
        harness.show_json(samples.figures)
        return
    with harness.server(arguments.url) as url:
        where = harness.machine(url)
        loops = loops_to_run(arguments.loop)
        found = {loop: measured_elsewhere(url, arguments.rounds, loop) for loop in loops}
    if arguments.json:
        harness.show_json({"machine": where, "seconds": {loop: one.figures for loop, one in found.items()}})
        return
    print(f"acquire + select 1, median of {arguments.rounds} interleaved rounds\n{where}\n")
    harness.show([rate_table(found)])


if __name__ == "__main__":
    main()
