"""What `asyncpool tune` shows: progress, the table with its bars, the recommendation, and the same as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncpool.cli.extras import MissingExtra, console
from asyncpool.cli.tune.knee import (
    TOLERANCE,
    Ending,
    Obstacle,
    milliseconds,
    noise,
    percent,
    plus_minus,
    rate_of,
    tolerance,
)
from asyncpool.cli.words import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from asyncpool.cli.tune.knee import Reading, Recommendation
    from asyncpool.cli.tune.statement import Statement
    from asyncpool.cli.tune.sweep import Plan, Progress

# The table gives way on a narrow terminal: first the bars, then what is least needed.
NARROWEST_BARS = 8
WIDEST_BARS = 40

# One-shots beyond this many times the best rate of a lease would press its bars, or its curve, flat.
HIGHEST_IN_VIEW = 2.5

# A statement that takes as many seconds is named as the reason why the time did not suffice.
SLOW = 0.05


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known in the end. `free`: connections that the server had for us, and `limit` why no more;
    `committed`: how many statements were, those of the trial included.
    """

    server_version: str
    statement: Statement
    plan: Plan
    readings: Sequence[Reading]
    one_shots: Reading | None
    without_one_shots: str | None
    ending: Ending
    recommendation: Recommendation
    free: int
    limit: str
    committed: int = 0

    @property
    def processes(self) -> int | None:
        """How many processes with such a pool the server has room for."""
        size = self.recommendation.max_size
        return self.free // size if size else None


# --- while it runs ------------------------------------------------------------------------------------------


class Lines:
    """A line for each size, for a pipe or a log."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin_pass(self, title: str, done: float) -> None:
        """Lines tell what is done, not what begins."""

    def reading(self, title: str, reading: Reading) -> None:
        self.say(_first_figures(title, reading))


class Bars:
    """The same lines, above a bar and what is being measured."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False)

    def begin_pass(self, title: str, done: float) -> None:
        self._bar.update(self._task, completed=done, description=title)

    def reading(self, title: str, reading: Reading) -> None:
        self.say(_first_figures(title, reading))


def _first_figures(title: str, reading: Reading) -> str:
    return f"{title}: {rate_of(reading)}, p99 {milliseconds(reading.p99)} ms"


@contextmanager
def progress(*, as_json: bool) -> Iterator[Progress]:
    """A bar on standard error if that is a terminal; lines if not, and with JSON where rich is missing. Raises
    MissingExtra.
    """
    try:
        err = console(stderr=True)
    except MissingExtra:
        if not as_json:
            raise
        err = None
    if err is None or not err.is_terminal:
        yield Lines()
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Bar(*columns, console=err, transient=True) as bar:
        yield Bars(bar, bar.add_task("measuring", total=1.0))


# --- the table ----------------------------------------------------------------------------------------------


def show(report: Report) -> None:
    """Print everything on standard output."""
    out = console()
    if report.readings:
        out.print()
        _print_table(out, report)
    out.print()
    _print(out, headline(report.recommendation), style="bold")
    for note in notes(report):
        _print(out, f"- {note}")


def _print(out: Console, text: str, style: str | None = None) -> None:
    # In a pipe a sentence stays on its line: what reads it there finds it by that.
    out.print(text, style=style, markup=False, soft_wrap=not out.is_terminal)


def _print_table(out: Console, report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    headings = ["size", "statements/s", "p50 ms", "p99 ms", "waiting"]
    rows = [_cells(reading) for reading in report.readings]
    if report.one_shots:
        rows.append(["one-shots", *_cells(report.one_shots)[1:]])
    headings, rows = _narrowed(headings, rows, out.width)
    taken = sum(max(len(row[column]) for row in [headings, *rows]) + 2 for column in range(len(headings)))
    room = min(WIDEST_BARS, out.width - taken - 2)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    if room >= NARROWEST_BARS:
        table.add_column("", no_wrap=True)
    readings = [*report.readings, *([report.one_shots] if report.one_shots else [])]
    scale = max(reading.rate for reading in report.readings) * HIGHEST_IN_VIEW
    scale = min(scale, max(reading.rate for reading in readings)) or 1.0
    for reading, row in zip(readings, rows, strict=True):
        is_one_shots = reading is report.one_shots
        recommended = report.recommendation.max_size if report.recommendation.conclusive else None
        marked = not is_one_shots and reading.size == recommended
        style = "bold green" if marked else "cyan" if is_one_shots else ""
        bar = [Text(_bar(reading.rate / scale, room, out))] if room >= NARROWEST_BARS else []
        table.add_row(*(Text(cell) for cell in row), *bar, style=style)
    out.print(table)
    if room >= NARROWEST_BARS and any(reading.rate > scale for reading in readings):
        _print(out, f"{_bar(2, 1, out)} this bar is longer than there is room for")


def _cells(reading: Reading) -> list[str]:
    return [
        str(reading.size),
        rate_of(reading).removesuffix("/s"),
        milliseconds(reading.p50),
        milliseconds(reading.p99),
        "" if reading.wait_share is None else percent(reading.wait_share),
    ]


def _narrowed(headings: list[str], rows: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """Without columns at the end for which there is no room; the first two stay."""
    while len(headings) > 2:
        widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return headings, rows


def _bar(share: float, room: int, out: Console) -> str:
    full, beyond = "█▶" if (out.encoding or "").lower().startswith("utf") else "#>"
    return full * (room - 1) + beyond if share > 1 else full * max(1, round(share * room))


# --- the words ----------------------------------------------------------------------------------------------


def headline(recommendation: Recommendation) -> str:
    """The answer, with its reason."""
    if recommendation.max_size is None:
        return f"No recommendation. {recommendation.reason}"
    if not recommendation.conclusive:
        return f"No recommendation yet. {recommendation.reason}"
    return f"max_size={recommendation.max_size}: {recommendation.reason}"


def notes(report: Report) -> list[str]:
    """What one must know besides."""
    found = [*_what_to_do(report)]
    recommendation = report.recommendation
    if recommendation.client_limited:
        found.append(_about_the_client(_knee(report)))
    if recommendation.conclusive and (processes := report.processes) is not None:
        found.append(
            f"All services share the server: max_size × processes must stay within the {report.free} connections that"
            f" are free ({report.limit}), which is room for {processes} {'process' if processes == 1 else 'processes'}"
            " with such a pool."
        )
    found += _about_one_shots(report)
    found += _about_latencies(report)
    if report.committed:
        found.append(about_committed(report.committed))
    if recommendation.conclusive and (spread := noise(report.readings)) > TOLERANCE:
        found.append(
            f"Passes of the same size were {plus_minus(spread)} apart, so that rates are told apart only if they differ"
            f" by {percent(tolerance(report.readings))}: more --seconds make that finer."
        )
    return found


def _knee(report: Report) -> Reading:
    return next(reading for reading in report.readings if reading.size == report.recommendation.max_size)


def _about_the_client(knee: Reading) -> str:
    took, waited = percent(knee.processor_share), percent(knee.processor_wait_share)
    if knee.processor_wait_share > knee.processor_share:
        return (
            f"This machine is what limits here, not the pool: this process took {took} of a processor core and waited"
            f" for one {waited} of the time. Measure when it has less else to do, or from another one."
        )
    taken = f"took {took} of a processor core"
    if knee.processor_wait_share >= 0.005:
        taken += f" and waited for one {waited} of the time"
    return (
        f"The client is what limits here, not the pool: this process {taken}. More processes may carry more; a larger"
        " pool in one does not."
    )


def _what_to_do(report: Report) -> Iterator[str]:
    """Where nothing is recommended. Whoever interrupted it knows."""
    obstacle = report.recommendation.obstacle
    if report.ending is Ending.TIME_IS_UP:
        takes = report.plan.statement_seconds
        if report.plan.seconds_for_passes(0) <= report.plan.at_most:  # it is not --max-seconds that ended it
            yield (
                f"The {report.plan.at_most:.0f} s that were planned for were over: statements, or connecting, took"
                " longer under load than alone. Give fewer --tasks, or a smaller --max-size."
            )
            return
        slow = f"; the statement takes {takes:.2g} s" if takes >= SLOW else ""
        yield (
            f"The time was up{slow}: give a larger --max-seconds ({report.plan.enough_seconds} would do for all sizes),"
            " or less --seconds."
        )
    elif obstacle is Obstacle.STILL_RISING:
        yield (
            f"Give a larger --max-size, and --tasks to use it; {report.free} connections are free ({report.limit}),"
            " of which half are taken at most, all with --force."
        )
    elif obstacle is Obstacle.TOO_FEW and report.ending is not Ending.INTERRUPTED:
        yield "Give each size more time with --seconds."
    elif obstacle is Obstacle.RESTLESS:
        yield "Give each size more time with --seconds, or measure when client and server have less else to do."


def _about_one_shots(report: Report) -> Iterator[str]:
    if report.without_one_shots is not None:
        yield f"One-shots were not measured: {report.without_one_shots}."
    if not report.one_shots or not report.recommendation.conclusive:
        return
    knee, one_shots = _knee(report), report.one_shots
    times = one_shots.rate / knee.rate
    connections = count_of(one_shots.size, "connection")
    if times > 1 + TOLERANCE:
        yield (
            f"One-shots carried {rate_of(one_shots)} on {connections}, {times:.1f} times as many: where the statement"
            " stands alone, use pool.fetch() or pool.execute()."
        )
    else:
        yield f"One-shots carried {rate_of(one_shots)} on {connections}, {times:.2f} times as many."


def about_committed(number: int) -> str:
    """What is left behind."""
    were = "was committed, and what it wrote stays" if number == 1 else "were committed, and what they wrote stays"
    return f"{count_of(number, 'statement')} {were}."


def _about_latencies(report: Report) -> Iterator[str]:
    unknown = [str(reading.size) for reading in report.readings if reading.p99 is None]
    if report.one_shots and report.one_shots.p99 is None:
        unknown.append("one-shots")
    if unknown:
        yield (
            f"Latencies were not measured where there is a `-` ({', '.join(unknown)}): the time did not suffice for"
            f" each of {report.plan.tasks} tasks to be answered before. More --max-seconds or fewer --tasks show them."
        )


# --- for programs -------------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """Everything; the help of the command tells the keys. Times are in the units that their names say."""
    recommendation = report.recommendation
    return json.dumps(
        {
            "ok": recommendation.conclusive,
            "max_size": recommendation.max_size,
            "conclusive": recommendation.conclusive,
            "reason": recommendation.reason,
            "notes": notes(report),
            "client_limited": recommendation.client_limited,
            "ended": report.ending.value,
            "sizes": [_reading_as_json("size", reading) for reading in report.readings],
            "one_shots": _reading_as_json("connections", report.one_shots) if report.one_shots else None,
            "free_connections": report.free,
            "processes": report.processes,
            "server_version": report.server_version,
            "query": report.statement.query,
            "committed": report.statement.commit,
            "statements_committed": report.committed,
            "tasks": report.plan.tasks,
            "seconds_per_size": round(report.plan.seconds, 3),
        },
        indent=2,
    )


def _rounded_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _reading_as_json(size: str, reading: Reading) -> dict[str, Any]:
    return {
        size: reading.size,
        "statements": reading.statements,
        "statements_per_second": round(reading.rate, 2),
        "of_each_pass": [round(rate, 2) for rate in reading.rates],
        "mean_ms": _rounded_ms(reading.mean),
        "p50_ms": _rounded_ms(reading.p50),
        "p99_ms": _rounded_ms(reading.p99),
        "wait_share": None if reading.wait_share is None else round(reading.wait_share, 3),
        "processor_share": round(reading.processor_share, 3),
        "processor_wait_share": round(reading.processor_wait_share, 3),
    }
