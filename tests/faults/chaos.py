"""Storm after storm, for minutes: `nox -s chaos`, or `PYTHONPATH=tests python -m faults.chaos`.

The seed is printed first, a table of verdicts last. Each storm has a seed of its own, drawn from it, by which it can be
run alone.
"""

from __future__ import annotations

import argparse
import platform
import random
import resource
import secrets
import sys
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

import rich.box
from rich.console import Console
from rich.table import Table

from asyncpool.cli.embedded import EmbeddedServer

from .storms.engine import run_storm
from .storms.grounds import Grounds
from .storms.kinds import KINDS, Kind

if TYPE_CHECKING:
    from .storms.record import Record

SEED_BITS = 32
# Errors that are named in the table; the others are counted as one.
MOST_ERRORS = 6


@dataclass
class Sum:
    """All storms of one kind."""

    runs: int = 0
    failed: int = 0
    tasks: int = 0
    operations: int = 0
    cancels: int = 0
    connects: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        self.runs += 1
        self.failed += bool(record.violations)
        self.tasks += record.operations["tasks"]
        self.operations += sum(record.operations.values())
        self.cancels += sum(record.cancels.values())
        self.connects += record.stats.connects if record.stats is not None else 0
        self.errors += record.errors


def main() -> int:
    options = _options()
    console = Console()
    console.width = max(console.width, 150)
    seed = options.seed if options.seed is not None else secrets.randbits(SEED_BITS)
    console.print(f"seed {seed}", highlight=False)
    console.print(f"Python {platform.python_version()}, {platform.system()}, {platform.machine()}", highlight=False)
    sums: dict[str, Sum] = {}
    _allow_many_descriptors()
    with EmbeddedServer(settings={"max_connections": 200}) as shared, EmbeddedServer() as own:
        for kind, storm_seed in _storms(options, seed):
            _run(kind, storm_seed, own if kind.needs_own_server else shared, sums, console)
    console.print(_table(sums))
    failed = sum(one.failed for one in sums.values())
    console.print(f"seed {seed}: {f'{failed} storms FAILED' if failed else 'nothing was lost'}", highlight=False)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chaos", description="Storms of cancelled tasks, on a pool that must lose nothing."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long (default: %(default)g)")
    parser.add_argument("--seconds", type=float, help="the same in seconds")
    parser.add_argument("--seed", type=int, help="of the whole run (default: drawn)")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these; may be repeated")
    parser.add_argument("--storm", type=int, help="run only the storm of this seed, of the one --kind")
    options = parser.parse_args()
    if options.storm is not None and len(options.kind or ()) != 1:
        parser.error("--storm needs the --kind of that storm")
    return options


def _storms(options: argparse.Namespace, seed: int) -> list[tuple[Kind, int]] | _Endless:
    kinds = [KINDS[name] for name in options.kind or KINDS]
    if options.storm is not None:
        return [(kinds[0], options.storm)]
    return _Endless(kinds, seed, options.seconds if options.seconds is not None else 60 * options.minutes)


class _Endless:
    """Kinds by their weights, each storm with a seed of its own, until the time is over."""

    def __init__(self, kinds: list[Kind], seed: int, seconds: float) -> None:
        self._kinds = kinds
        self._rng = random.Random(seed)
        self._ends = monotonic() + seconds

    def __iter__(self) -> _Endless:
        return self

    def __next__(self) -> tuple[Kind, int]:
        if monotonic() > self._ends:
            raise StopIteration
        (kind,) = self._rng.choices(self._kinds, [kind.weight for kind in self._kinds])
        return kind, self._rng.getrandbits(SEED_BITS)


def _run(kind: Kind, seed: int, server: EmbeddedServer, sums: dict[str, Sum], console: Console) -> None:
    plan = kind.plan(seed)
    began = monotonic()
    server.start()  # if the last storm has left it stopped
    grounds = Grounds(server.dsn(), server if kind.needs_own_server else None)
    try:
        record = run_storm(plan, grounds)
    finally:
        grounds.close()
    sums.setdefault(kind.name, Sum()).add(record)
    verdict = "FAILED" if record.violations else "ok"
    line = f"{monotonic() - began:6.1f} s  {verdict:6}  {kind.name} {seed}: {plan.describe()}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    for violation in record.violations:
        console.print(f"    {violation}", highlight=False, markup=False, soft_wrap=True)
    if record.violations:
        again = f"nox -s chaos -- --kind '{kind.name}' --storm {seed}"
        console.print(f"    again: {again}", highlight=False, markup=False, soft_wrap=True)


def _table(sums: dict[str, Sum]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("storms", no_wrap=True)
    for column in ("runs", "tasks", "operations", "cancelled", "connects"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("errors by class")
    table.add_column("verdict", no_wrap=True)
    for name in [name for name in KINDS if name in sums]:
        one = sums[name]
        figures = (one.runs, one.tasks, one.operations, one.cancels, one.connects)
        verdict = f"{one.failed} FAILED" if one.failed else "ok"
        table.add_row(name, *(f"{figure:,}" for figure in figures), _in_words(one.errors), verdict)
    return table


def _in_words(errors: Counter[str]) -> str:
    named = errors.most_common(MOST_ERRORS)
    words = [f"{name} {count:,}" for name, count in named]
    if others := sum(errors.values()) - sum(count for _, count in named):
        words.append(f"others {others:,}")
    return ", ".join(words)


def _allow_many_descriptors() -> None:
    """Servers, clients and duplicates of sockets: more than the 256 that macOS starts with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
