"""What the benchmarks share: the server, the rounds, the arithmetic and the printing."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import psycopg
from contenders import Contender, Opened, OpenPool


class Closes(Protocol):
    """What every open contender can do."""

    @property
    def close(self) -> Callable[[], Awaitable[Any]]: ...


Result = TypeVar("Result")
Open = TypeVar("Open", bound=Closes)
Measure = Callable[[OpenPool, int], Awaitable[float]]

# --- the command line ---------------------------------------------------------------------------------------


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="how many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, every round included, and no table")
    parser.add_argument(
        "--url",
        default=os.environ.get("DATABASE_URL"),
        help="a running server (default: DATABASE_URL, else an embedded one is started)",
    )
    return parser


# --- the server and the loop --------------------------------------------------------------------------------


@contextmanager
def server(url: str | None, settings: Mapping[str, str | int] | None = None, *, tcp: bool = False) -> Iterator[str]:
    """The URL of a running PostgreSQL: the given one, or an embedded one that lives as long as the block, with these
    settings, and reached by TCP in place of a Unix socket if `tcp`.
    """
    if url:
        yield url
        return
    from asyncpool.cli.embedded import EmbeddedServer

    with EmbeddedServer(settings=settings, host_authentication="trust" if tcp else None) as running:
        yield running.host_dsn() if tcp else running.dsn()


def run(main: Coroutine[Any, Any, Result], loop: str) -> Result:
    """Run `main` on a new event loop of the kind named: asyncio or uvloop."""
    if loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    return asyncio.run(main)


def has_uvloop() -> bool:
    return importlib.util.find_spec("uvloop") is not None


def machine(url: str) -> str:
    """One line on where this was measured; never the URL, which may hold a password."""
    with psycopg.connect(url) as connection:
        server_version = connection.info.parameter_status("server_version")
    return (
        f"{platform.python_implementation()} {platform.python_version()}, PostgreSQL {server_version}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )


def installed(contenders: Sequence[Contender[Opened]]) -> list[Contender[Opened]]:
    """Those that can run here; a line on stderr for each that cannot."""
    ready = []
    for contender in contenders:
        if missing := contender.missing():
            print(f"left out: {contender.name} (not installed: {', '.join(missing)})", file=sys.stderr)
        else:
            ready.append(contender)
    return ready


@asynccontextmanager
async def opened(contenders: Sequence[Contender[Open]], url: str, size: int) -> AsyncIterator[dict[str, Open]]:
    """All pools open at once, by name, so that rounds can be interleaved."""
    async with AsyncExitStack() as stack:
        pools: dict[str, Open] = {}
        for contender in contenders:
            pool = await contender.open(url, size)
            stack.push_async_callback(_close, pool)
            pools[contender.name] = pool
        yield pools


async def _close(pool: Closes) -> None:
    await pool.close()


# --- rounds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One column: `measure(pool, n)` does a thing n times and returns the seconds that one of them took."""

    name: str
    measure: Measure
    seconds: float = 0.05
    """How long one sample is to take; n is chosen accordingly, per contender."""
    count: int | None = None
    """n itself, where it is part of what is measured."""
    only: frozenset[str] = frozenset()
    """The contenders it is measured for; all of them if empty."""

    def covers(self, contender: str) -> bool:
        return not self.only or contender in self.only


@dataclass(slots=True)
class Samples:
    """For each case and contender, one figure per round, in the order of the rounds."""

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, case: str, contender: str, figure: float) -> None:
        self.figures.setdefault(case, {}).setdefault(contender, []).append(figure)

    def of(self, case: str, contender: str) -> list[float]:
        return self.figures.get(case, {}).get(contender, [])

    def median(self, case: str, contender: str) -> float | None:
        figures = self.of(case, contender)
        return statistics.median(figures) if figures else None

    def ratio(self, above: tuple[str, str], below: tuple[str, str]) -> float | None:
        """Median over the rounds of the ratio within a round: what slowed a whole round cancels out."""
        pairs = list(zip(self.of(*above), self.of(*below), strict=False))
        return statistics.median(one / other for one, other in pairs) if pairs else None

    def spread(self, case: str, contender: str) -> str:
        """Half of what lies between the lowest and the highest round, in percent of the median."""
        figures = self.of(case, contender)
        return f"{(max(figures) - min(figures)) / 2 / statistics.median(figures):.0%}"


async def interleaved(cases: Sequence[Case], pools: dict[str, OpenPool], rounds: int) -> Samples:
    """Each round measures each case for each contender, in an order drawn anew: nobody always follows
    the same neighbour, and a slow second of the machine hits all alike.
    """
    order = random.Random(0)
    counts = await _warm_up(cases, pools)
    samples = Samples()
    # What exists by now is not worth looking at again, or each sample would pay for everybody's objects.
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        turns = list(counts)
        order.shuffle(turns)
        for case, name in turns:
            gc.collect()
            samples.add(case.name, name, await case.measure(pools[name], counts[case, name]))
    gc.unfreeze()
    return samples


async def _warm_up(cases: Sequence[Case], pools: dict[str, OpenPool]) -> dict[tuple[Case, str], int]:
    """Run everything once before it counts, and choose how often each is repeated in a sample."""
    counts: dict[tuple[Case, str], int] = {}
    for case in cases:
        for name, pool in pools.items():
            if case.covers(name):
                counts[case, name] = case.count or await _count_for(case, pool)
                if case.count:
                    await case.measure(pool, case.count)
    return counts


async def _count_for(case: Case, pool: OpenPool) -> int:
    await case.measure(pool, 1_000)
    return max(1_000, int(case.seconds / await case.measure(pool, 1_000)))


# --- printing -----------------------------------------------------------------------------------------------


LEGEND = "round by round. ±: half of what lies between the extreme rounds."


@dataclass(frozen=True, slots=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    note: str


def show(tables: Sequence[Table]) -> None:
    """Print with rich where it is installed, in plain columns otherwise."""
    for table in tables:
        if importlib.util.find_spec("rich") is not None:
            _show_rich(table)
        else:
            _show_plain(table)


def _show_rich(table: Table) -> None:
    import rich.box
    import rich.console
    import rich.table

    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    # A figure must not be cut off: in a narrow terminal, or in none, the lines are as long as they are.
    console = rich.console.Console()
    console.width = max(console.width, 200)
    console.print(drawn)
    console.print(f"{table.note}\n", highlight=False, markup=False, soft_wrap=True)


def _show_plain(table: Table) -> None:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]
    for name, *figures in lines:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        print(name.ljust(widths[0]), *cells, sep="  ")
    print(f"{table.note}\n")


def show_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"×{ratio:.2f}" if ratio < 10 else f"×{ratio:.1f}"


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.2f}" if seconds < 1e-5 else f"{seconds * 1e6:.1f}"
