"""What users see of it when a hundred connections of one age come to the end of their `max_lifetime`.

    python benchmarks/expiry.py [--rounds N] [--json] [--url URL] [--uvloop] [--lifetime SECONDS]

Each round has a quiet part and a turnover, in an order that alternates. In the turnover all connections of the pool are
in the last tenth of their life, so that every one is replaced: that they are as old as that is written into the pool,
the times at which they retire are drawn as the pool draws them. The two parts last equally long, a tenth of
`--lifetime`: with 50 s a connection retires every 50 ms, with the default of `max_lifetime` it would be every 3.6 s.

A server given by --url must allow 120 sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any

import harness
from harness import Table

from asyncpool import Pool
from asyncpool._core.policy import RETIREMENT_SPREAD, retirement
from asyncpool.cli.embedded import EmbeddedServer
from asyncpool.events import CloseReason

SIZE = 100


@dataclass(frozen=True, slots=True)
class Load:
    """Tasks that acquire, ask the server, hold the connection for a while, and pause. Times are seconds."""

    name: str
    max_size: int
    tasks: int
    hold: float
    pause: float
    from_due: bool = False
    """Count from when the pause was to end, so that a loop that is late is in it."""


LOADS = (
    Load("half in use", SIZE + 1, 50, 0.02, 0.03),
    Load("half in use, since due", SIZE + 1, 50, 0.02, 0.03, from_due=True),
    Load("half in use, full", SIZE, 50, 0.02, 0.03),
    Load("all in use, 50 wait", SIZE, 150, 0.1, 0.0),
)


# --- one part of a round ------------------------------------------------------------------------------------


async def acquire_for(pool: Pool[Any], load: Load, seconds: float) -> list[float]:
    """How long each acquire took."""
    until = perf_counter() + seconds
    times: list[float] = []

    async def user() -> None:
        chance = random.Random()
        due = perf_counter() + chance.uniform(0.0, load.hold + load.pause)
        while due < until:
            await asyncio.sleep(max(0.0, due - perf_counter()))
            began = due if load.from_due else perf_counter()
            async with pool.acquire() as connection:
                times.append(perf_counter() - began)
                await connection.execute("select 1")
                await asyncio.sleep(chance.uniform(0.5, 1.5) * load.hold)
            due = perf_counter() + chance.uniform(0.5, 1.5) * load.pause

    await asyncio.gather(*(user() for _ in range(load.tasks)))
    return times


def let_all_be_old(pool: Pool[Any], lifetime: float) -> None:
    """As if they had been connected together, when nine tenths of `lifetime` were still to come."""
    runner = pool._runner
    assert runner is not None
    now = monotonic()
    born = now - (1 - RETIREMENT_SPREAD) * lifetime
    for slot in runner.machine.slots():
        slot.retires_at = retirement(born, lifetime, random.random())
        slot.expires_at = retirement(born, lifetime, 0.0)
        slot.fresh_until = min(slot.fresh_until, slot.expires_at)
    runner.perform(runner.machine.wake(now))


@dataclass(frozen=True, slots=True)
class Part:
    p50: float
    p99: float
    acquires: int


def summary(times: list[float]) -> Part:
    cuts = statistics.quantiles(times, n=100)
    return Part(cuts[49], cuts[98], len(times))


async def part(pool: Pool[Any], load: Load, lifetime: float, *, old: bool) -> Part:
    gc.collect()
    retired = pool.stats().closes.get(CloseReason.MAX_LIFETIME, 0)
    if old:
        let_all_be_old(pool, lifetime)
    times = await acquire_for(pool, load, RETIREMENT_SPREAD * lifetime)
    if old:
        await asyncio.sleep(0.5)  # for the last of them
    retired = pool.stats().closes.get(CloseReason.MAX_LIFETIME, 0) - retired
    if old != (retired >= SIZE) or (not old and retired):
        raise SystemExit(f"{retired} connections retired: this is not what was to be measured")
    return summary(times)


# --- the run ------------------------------------------------------------------------------------------------

Rounds = dict[str, list[tuple[Part, Part]]]


async def measure(url: str, rounds: int, lifetime: float) -> Rounds:
    figures: Rounds = {load.name: [] for load in LOADS}
    for load in LOADS:
        options: dict[str, Any] = {
            "min_size": SIZE,
            "max_size": load.max_size,
            "max_lifetime": lifetime * 1000,
            "max_idle": None,
        }
        async with Pool(url, autocommit=True, **options) as pool:
            await acquire_for(pool, load, 1.0)
            for index in range(rounds):
                parts = {old: await part(pool, load, lifetime, old=old) for old in (index % 2 == 1, index % 2 == 0)}
                figures[load.name].append((parts[False], parts[True]))
    return figures


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def table(figures: Rounds) -> Table:
    columns = ["milliseconds", "quiet: p50", "p99", "turnover: p50", "p99", "ratio", "±"]
    rows = []
    for name, rounds in figures.items():
        row = [name]
        for index in (0, 1):
            parts = [both[index] for both in rounds]
            row += [
                milliseconds(statistics.median(part.p50 for part in parts)),
                milliseconds(statistics.median(part.p99 for part in parts)),
            ]
        ratios = [turnover.p99 / quiet.p99 for quiet, turnover in rounds]
        row += [harness.times(statistics.median(ratios)), f"{(max(ratios) - min(ratios)) / 2:.2f}"]
        rows.append(row)
    acquires = sum(part.acquires for rounds in figures.values() for both in rounds for part in both)
    note = (
        f"{SIZE} connections, {acquires} acquires. p50, p99: medians of the rounds.\n"
        f"ratio: of the p99, {harness.LEGEND}\n"
        "full: max_size is min_size, else it is one more. since due: counted from the end of the user's pause."
    )
    return Table(columns, rows, note)


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    if url:
        yield url
        return
    with EmbeddedServer(settings={"max_connections": SIZE + 50}) as running:
        yield running.dsn()


def main() -> None:
    parser = harness.options("acquires while a whole generation of connections is replaced", rounds=6)
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    parser.add_argument("--lifetime", type=float, default=50.0, help="a tenth of it is a part's length (%(default)s)")
    arguments = parser.parse_args()
    loop = "uvloop" if arguments.uvloop else "asyncio"
    with server(arguments.url) as url:
        where = f"{harness.machine(url)}, {loop}"
        figures = harness.run(measure(url, arguments.rounds, arguments.lifetime), loop)
    if arguments.json:
        rounds = {
            name: [{"quiet p99": quiet.p99, "turnover p99": turnover.p99} for quiet, turnover in of_load]
            for name, of_load in figures.items()
        }
        harness.show_json({"machine": where, "seconds": rounds})
        return
    print(f"median of {arguments.rounds} rounds, {arguments.lifetime * RETIREMENT_SPREAD:g} s each part\n{where}\n")
    harness.show([table(figures)])


if __name__ == "__main__":
    main()
