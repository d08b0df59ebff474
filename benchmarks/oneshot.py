"""A single statement for each request of 200 tasks: one-shots and leases of this pool, other pools, and pgbench.

    python benchmarks/oneshot.py [--rounds N] [--seconds S] [--json] [--url URL] [--loop asyncio|uvloop|both]
        [--tasks N] [--statement insert|select] [--only NAME ...] [--lanes N ...]
        [--durable [--commit-delay US]] [--tcp] [--latency MS]
    python benchmarks/oneshot.py --profile SECONDS

Everybody has 10 connections in autocommit. A request inserts a row (int, float8, jsonb), or reads one by its id. Each
event loop has a process of its own. `--profile` runs one-shots and nothing else, in this process, for a profiler to
look at.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import distance
import harness
import oneshot_contenders as entrants
import pgbench
import psycopg
from contenders import Contender
from harness import Samples, Table
from oneshot_contenders import INSERT, ONE_SHOTS, SCHEMA, STATEMENTS, Carrier, Request, Sample

CONNECTIONS = 10
MANY = 10_000
# A sample with so many tasks takes longer, in times of the others: each of them is to have its turn many times.
MANY_LASTS = 4
WARM_UP = 0.3
# One task alone: so many statements in a burst, whose median counts, and so many bursts of each kind in a round.
BURST = 200
BURSTS = 8

# --- the server ---------------------------------------------------------------------------------------------

SETTINGS: dict[str, str | int] = {"max_connections": 200}


def durable(delay: int) -> dict[str, str | int]:
    """A server whose commits wait for the disk. Before it writes, the first of those that commit together sleeps for
    `delay` µs, with the others waiting for it: as on a disk that is so much slower.
    """
    return {
        **SETTINGS,
        "fsync": "on",
        "synchronous_commit": "on",
        "commit_delay": delay,
        "commit_siblings": 0,
    }


@contextmanager
def tables(url: str) -> Iterator[None]:
    """The two tables, in a schema of their own that is dropped in the end."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"drop schema if exists {SCHEMA} cascade")
        conn.execute(f"create schema {SCHEMA}")
        for name in ("reading", "known"):
            # Autovacuum would come in the midst of somebody's sample, and not of everybody's.
            conn.execute(
                f"create table {SCHEMA}.{name} (id bigint generated always as identity primary key, device int,"
                " at timestamptz default now(), value float8, payload jsonb) with (autovacuum_enabled = off)"
            )
        conn.execute(
            f"insert into {SCHEMA}.known (device, value, payload) select i, i * 0.5, %s from generate_series(1, %s) i",
            (entrants.PAYLOAD, entrants.ROWS),
        )
        conn.execute(f"vacuum (analyze) {SCHEMA}.known")
    try:
        yield
    finally:
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(f"drop schema {SCHEMA} cascade")


def durability(url: str) -> str:
    """What a commit waits for, in the server's own words."""
    settings = ("fsync", "synchronous_commit", "commit_delay")
    with psycopg.connect(url) as conn:
        found = conn.execute("select name || ' ' || setting from pg_settings where name = any(%s)", (list(settings),))
        return ", ".join(sorted(row[0] for row in found))


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """One sample: who carries which statement, for how many tasks, and the row of the table that it belongs to."""

    row: str
    carrier: Carrier
    statement: str
    tasks: int
    lasts: int = 1


def processor(statement: str) -> str:
    """The case of the processor time that the client takes for one."""
    return f"{statement}, processor"


def alone(statement: str) -> str:
    """The case of one task, with nobody beside it."""
    return f"{statement}, alone"


def with_many(name: str) -> str:
    return f"{name}, {MANY:,} tasks"


def turns_of(carriers: Mapping[str, Carrier], options: argparse.Namespace) -> list[Turn]:
    turns = []
    for statement in options.statement:
        turns += [Turn(name, carrier, statement, options.tasks) for name, carrier in carriers.items()]
        # Where a commit waits for the disk so many tasks would take their time, and tell the same as fewer.
        if ONE_SHOTS in carriers and not options.durable:
            turns.append(Turn(with_many(ONE_SHOTS), carriers[ONE_SHOTS], statement, MANY, MANY_LASTS))
    return turns


async def take(turn: Turn, seconds: float, conn: psycopg.AsyncConnection[Any]) -> Sample:
    """Let it carry, and see that what it took for stored is in the table, once."""
    await conn.execute(f"truncate {SCHEMA}.reading")
    gc.collect()
    sample = await turn.carrier.carry(turn.statement, turn.tasks, seconds * turn.lasts)
    if turn.statement == INSERT:
        cursor = await conn.execute(f"select count(*) from {SCHEMA}.reading")
        if (found := await cursor.fetchone()) != (sample.statements,):
            raise RuntimeError(f"{turn.row}: {sample.statements} rows were acknowledged, in the table: {found}")
    return sample


async def measure(options: argparse.Namespace) -> Samples:
    """Each round takes each turn once, in an order drawn anew."""
    order, samples = random.Random(0), Samples()
    async with (
        harness.opened(chosen(options), options.url, CONNECTIONS) as carriers,
        await psycopg.AsyncConnection.connect(options.url, autocommit=True) as conn,
    ):
        turns = turns_of(carriers, options)
        for turn in turns:
            await take(turn, min(WARM_UP, options.seconds), conn)
        gc.collect()
        gc.freeze()
        for _ in range(options.rounds):
            order.shuffle(turns)
            for turn in turns:
                sample = await take(turn, options.seconds, conn)
                samples.add(turn.statement, turn.row, sample.seconds / sample.statements)
                samples.add(processor(turn.statement), turn.row, sample.cpu_seconds / sample.statements)
            if ONE_SHOTS in carriers:
                await latency_alone(options, samples, order)
        gc.unfreeze()
    return samples


# --- one task alone -----------------------------------------------------------------------------------------

ONE_SHOT, HELD, LEASE = "a one-shot", "on a leased connection", "with a lease for each"


async def latency_alone(options: argparse.Namespace, samples: Samples, order: random.Random) -> None:
    """In a pool of one connection: two server sessions differ by more than what is looked for."""
    async with entrants.our_pool(options.url, 1) as pool:
        for statement in options.statement:
            ways = ways_alone(pool, statement)
            for way in ways.values():
                await way()
            for _ in range(BURSTS):
                for name in order.sample(list(ways), len(ways)):
                    samples.add(alone(statement), name, await ways[name]())


def ways_alone(pool: Any, statement: str) -> dict[str, Callable[[], Coroutine[Any, Any, float]]]:
    async def one_shots() -> float:
        return await burst(entrants.one_shot_requests(pool)[statement])

    async def held() -> float:
        async with pool.acquire() as connection:
            return await burst(entrants.requests_on(connection)[statement])

    async def leases() -> float:
        return await burst(entrants.lease_requests(pool.acquire)[statement])

    return {ONE_SHOT: one_shots, HELD: held, LEASE: leases}


async def burst(request: Request) -> float:
    """The median of the seconds that each of some requests took, one after the other."""
    times = []
    for key in range(1, BURST + 1):
        start = perf_counter()
        await request(key)
        times.append(perf_counter() - start)
    return statistics.median(times)


# --- the tables ---------------------------------------------------------------------------------------------

Found = dict[str, Samples]
"""What was measured on each event loop."""


def rate_table(samples: Samples, loop: str, options: argparse.Namespace) -> Table:
    columns = [f"{options.tasks} tasks, {loop}"]
    for statement in options.statement:
        columns += [f"{statement}, 1/s", "±", "one-shots", "CPU, µs"]
    rows = []
    for name in rows_in_order(samples, options):
        row = [name]
        for statement in options.statement:
            seconds = samples.median(statement, name)
            assert seconds is not None
            row += [
                f"{1 / seconds:,.0f}",
                samples.spread(statement, name),
                harness.times(samples.ratio((statement, name), (statement, ONE_SHOTS))),
                harness.microseconds(samples.median(processor(statement), name)),
            ]
        rows.append(row)
    note = (
        f"one-shots: their rate, in times of this one, {harness.LEGEND}\n"
        "CPU: processor time of the client's process for each statement, the server's not included."
    )
    return Table(columns, rows, note if pgbench.find() else f"{note}\nLeft out: {pgbench.MISSING}")


def rows_in_order(samples: Samples, options: argparse.Namespace) -> list[str]:
    first, *others = (one.name for one in entrants.listed(options.lanes))
    return sorted(samples.figures[options.statement[0]], key=[first, with_many(first), *others].index)


def alone_table(found: Found, options: argparse.Namespace) -> Table:
    columns = ["One task alone, µs"]
    rows = [[ONE_SHOT], [HELD], [LEASE]]
    for loop, samples in found.items():
        for statement in options.statement:
            case = alone(statement)
            columns += [f"{loop}, {statement}", "ratio"]
            for row in rows:
                ratio = samples.ratio((case, row[0]), (case, HELD))
                row += [harness.microseconds(samples.median(case, row[0])), f"×{ratio:.3f}"]
    note = (
        f"Medians of {BURSTS} bursts of {BURST} in each round, in turns, on one server session, in autocommit.\n"
        f"ratio: to a statement {HELD} all the time, burst by burst."
    )
    return Table(columns, rows, note)


# --- the goals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of the one-shots, and where the figure is found."""

    text: str
    bound: float
    figure: Callable[[Samples, str], float | None]
    is_least: bool = True
    unit: str = "×"

    def cells(self, samples: Samples, statement: str) -> list[str]:
        figure = self.figure(samples, statement)
        if figure is None:
            return ["", ""]
        met = figure >= self.bound if self.is_least else figure <= self.bound
        return [f"{self.unit}{figure:.2f}" if self.unit else f"{figure:.1f}", "yes" if met else "no"]


def rate_beside(name: str) -> Callable[[Samples, str], float | None]:
    return lambda samples, statement: samples.ratio((statement, name), (statement, ONE_SHOTS))


def rate_with_many(samples: Samples, statement: str) -> float | None:
    return samples.ratio((statement, ONE_SHOTS), (statement, with_many(ONE_SHOTS)))


def latency_beside_held(samples: Samples, statement: str) -> float | None:
    return samples.ratio((alone(statement), ONE_SHOT), (alone(statement), HELD))


def processor_time(samples: Samples, statement: str) -> float | None:
    seconds = samples.median(processor(statement), ONE_SHOTS)
    return seconds and seconds * 1e6


GOALS = [
    Goal(f"rate, of {entrants.ASYNCPG}: ≥ 10", 10, rate_beside(entrants.ASYNCPG)),
    Goal(f"rate, of {entrants.ASYNCPG_WITHOUT_RESET}: ≥ 4", 4, rate_beside(entrants.ASYNCPG_WITHOUT_RESET)),
    Goal(f"rate, of {entrants.PSYCOPG_POOL}: ≥ 12", 12, rate_beside(entrants.PSYCOPG_POOL)),
    Goal("rate, of pgbench: ≥ 1", 1, rate_beside(entrants.PGBENCH)),
    Goal(f"rate at {MANY:,} tasks, of that at fewer: ≥ 0.85", 0.85, rate_with_many),
    Goal(f"latency alone, of that {HELD}: ≤ 1", 1, latency_beside_held, is_least=False),
    Goal("CPU for each statement: ≤ 30 µs", 30, processor_time, is_least=False, unit=""),
]


def goal_table(found: Found, options: argparse.Namespace) -> Table:
    columns = ["The goals of one-shots"]
    rows = [[goal.text] for goal in GOALS]
    for loop, samples in found.items():
        for statement in options.statement:
            columns += [f"{loop}, {statement}", "met"]
            for goal, row in zip(GOALS, rows, strict=True):
                row.extend(goal.cells(samples, statement))
    return Table(columns, rows, "The goals are those of this benchmark as it is by default. Empty: not measured.")


# --- the run ------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[Contender[Carrier]]:
    listed = entrants.listed(options.lanes)
    if options.only:
        listed = [one for one in listed if any(part in one.name for part in options.only)]
    ready = harness.installed(listed)
    if pgbench.find() is None:
        print(f"left out: {pgbench.MISSING}", file=sys.stderr)
        ready = [one for one in ready if one.name != entrants.PGBENCH]
    return ready


async def profile(options: argparse.Namespace) -> None:
    """Only one-shots, and what they took; the profiler is the caller's."""
    lanes = options.lanes[0] if options.lanes else None
    one_shots = await entrants.open_one_shots(options.url, CONNECTIONS, lanes)
    for statement in options.statement:
        sample = await one_shots.carry(statement, options.tasks, options.profile)
        rate, cpu = sample.statements / sample.seconds, sample.cpu_seconds / sample.statements
        print(f"{statement}: {rate:,.0f}/s, {cpu * 1e6:.1f} µs of processor time for each")
    await one_shots.close()


def measured_elsewhere(options: argparse.Namespace, loop: str) -> Samples:
    """The same in a process of its own: two kinds of event loop in one would share a heap."""
    # By the standard input, as the URL may hold a password.
    told = json.dumps({**vars(options), "loop": loop}).encode()
    answer = subprocess.run([sys.executable, __file__, "--worker"], check=True, input=told, stdout=subprocess.PIPE)
    return Samples(json.loads(answer.stdout))


def parsed() -> argparse.Namespace:
    parser = harness.options("one statement for each request", rounds=8)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each sample (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--statement", choices=STATEMENTS, action="append", help="only this one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name contains one of these")
    parser.add_argument("--lanes", type=int, nargs="+", metavar="N", help="one-shots on so many lanes as well, each")
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--durable", action="store_true", help="commits wait for the disk; --lanes 1 2 4 if not given")
    parser.add_argument("--commit-delay", type=int, default=0, metavar="US", help="of --durable: the disk's, in µs")
    parser.add_argument("--tcp", action="store_true", help="to the embedded server by TCP, not by a Unix socket")
    parser.add_argument("--latency", type=float, default=0, metavar="MS", help="a server so far away, each way")
    parser.add_argument("--profile", type=float, metavar="SECONDS", help="run one-shots only, for a profiler")
    parser.add_argument("--worker", action="store_true", help="internal: read JSON, measure here, print JSON")
    options = parser.parse_args()
    if options.worker:
        return argparse.Namespace(**{**json.load(sys.stdin), "worker": True})
    if options.url and (options.durable or options.tcp):
        parser.error("--durable and --tcp are for an embedded server: no --url, no DATABASE_URL")
    options.statement = options.statement or list(STATEMENTS)
    options.lanes = options.lanes or ([1, 2, 4] if options.durable else [])
    return options


def loops_to_run(wanted: str) -> list[str]:
    loops = ["asyncio", "uvloop"] if wanted == "both" else [wanted]
    if "uvloop" in loops and not harness.has_uvloop():
        print("left out: uvloop (not installed)", file=sys.stderr)
        loops.remove("uvloop")
    return loops


def main() -> None:
    options = parsed()
    if options.worker:
        harness.show_json(harness.run(measure(options), options.loop).figures)
        return
    loops = loops_to_run(options.loop)
    settings = durable(options.commit_delay) if options.durable else SETTINGS
    with harness.server(options.url, settings, tcp=options.tcp) as near, tables(near):
        where = f"{harness.machine(near)}, {durability(near)}, {distance.told(near, options.latency)}"
        with distance.distant(near, options.latency) as options.url:
            if options.profile:
                harness.run(profile(options), loops[0])
                return
            found = {loop: measured_elsewhere(options, loop) for loop in loops}
    if options.json:
        harness.show_json({"machine": where, "seconds": {loop: samples.figures for loop, samples in found.items()}})
        return
    print(f"one statement for each request, median of {options.rounds} interleaved rounds\n{where}\n")
    shown = [rate_table(samples, loop, options) for loop, samples in found.items()]
    if all(alone(statement) in samples.figures for samples in found.values() for statement in options.statement):
        shown.append(alone_table(found, options))
        if not options.durable:
            shown.append(goal_table(found, options))
    harness.show(shown)


if __name__ == "__main__":
    main()
