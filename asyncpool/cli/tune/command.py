"""`asyncpool tune`: how large the pool should be, measured with the user's own statement on his own server."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from asyncpool.cli.arguments import add_server, required_server_of, seconds, whole_number
from asyncpool.cli.capacity import QUESTION, capacity_of
from asyncpool.cli.refusals import explain
from asyncpool.cli.signals import interruptible, run_interruptibly
from asyncpool.cli.tune import report
from asyncpool.cli.tune.chart import check_can_draw, draw
from asyncpool.cli.tune.knee import recommend
from asyncpool.cli.tune.statement import Statement, StatementFailed, params_argument, query_argument, try_out
from asyncpool.cli.tune.sweep import DEFAULT_SECONDS, Sweep, check_there_is_time, plan, seconds_for
from asyncpool.conninfo import Redactor, parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool.cli.arguments import Commands
    from asyncpool.cli.capacity import Capacity
    from asyncpool.cli.tune.statement import Trial
    from asyncpool.cli.tune.sweep import Plan, Progress

# What is indented is printed as it is, and has to fit a terminal of 80 columns.
DESCRIPTION = """\
How large should the pool be? Many tasks do one statement again and again, each
time in a transaction on a connection that they take from the pool and give
back, with no pause: with a pool of 1, then of 2, 3, 4, 6, 8, 12, ...
connections, until two sizes in a row do not raise the rate by more than 5 %.
Recommended is the smallest size whose rate is within 5 % of the best, or
within more, where passes of the same size differ by more. The transactions
are rolled back, unless --commit is given.

One-shot statements (pool.fetch) are measured beside them, in a pool of that
size. They commit by themselves, so that this is done only with --commit, or
if the statement only reads: if the server lets it run in a READ ONLY
transaction, in which it is tried out first.
"""

EPILOG = """\
exit status:
  0     a size is recommended
  1     the statement fails; or nothing can be recommended: the rate was still
        rising at the largest size, the time was up, too few statements ended
        to tell a rate from, or passes of the same size differed too much
  2     it could not run: wrong arguments, no connection, or too few are free
  130   Ctrl-C (143: SIGTERM); what was measured until then is shown

keys of --json:
  ok
        whether the exit status is 0; if nothing could be measured, there is
        besides only error: {kind, message, fix}
  max_size, conclusive, reason, notes
        what is recommended; if not conclusive, max_size is the best that was
        seen, or null
  client_limited
        this process was the limit, not the pool or the server
  ended
        "flat" (further sizes did not raise the rate), "largest size",
        "time is up" or "interrupted"
  sizes
        a list, of each size: size, statements, statements_per_second (the
        median of the passes), of_each_pass, mean_ms, p50_ms, p99_ms (from
        asking for a connection to giving it back; null if there was no time
        to measure it), wait_share (of that), processor_share (of one core),
        processor_wait_share (of the time, for which the client could have
        worked, and had no core)
  one_shots
        the same, with connections for size; null if not measured
  free_connections, processes
        how many connections the server has free, how many such pools fit
  statements_committed
        with --commit: how many, those included that were not counted
  server_version, query, committed, tasks, seconds_per_size
"""

DONE, FAILED, COULD_NOT_RUN = 0, 1, 2

DEFAULT_MAX_SIZE = 32
DEFAULT_TASKS = 64
DEFAULT_MAX_SECONDS = 180.0

CONNECT_TIMEOUT = 10
# Without --seconds a statement that is tried out is given this long.
PATIENCE = 20.0
# Of --max-seconds so many seconds, but no larger share, are for ending: statements are cancelled, sessions closed.
ENDING, ENDING_SHARE = 0.3, 0.1


class Refused(Exception):
    """What was asked for is not to be done on this server; the message says what may be."""


def add_command(commands: Commands) -> None:
    """Add `tune` and its options."""
    parser = commands.add_parser(
        "tune",
        help="find out how large the pool should be for a statement of yours",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_server(parser)
    _add_statement(parser)
    _add_bounds(parser)
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE", help="draw the rate and p99 over the size into a .svg or .png"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=lambda options: run(options, parser))


def _add_statement(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--query",
        required=True,
        type=query_argument,
        metavar="SQL",
        help="the statement, with %%s or %%(name)s where its values are. It gets the same values each time: an UPDATE"
        " of one row waits for that row's lock",
    )
    parser.add_argument(
        "--params",
        type=params_argument,
        metavar="JSON",
        help="its values: a JSON list for %%s, an object for %%(name)s",
    )
    parser.add_argument("--commit", action="store_true", help="commit each transaction; what it writes stays")
    parser.add_argument(
        "--no-prepare",
        action="store_true",
        help="prepare nothing, as with prepare_threshold=None, which some poolers want",
    )


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    """How much of it, and for how long."""
    parser.add_argument(
        "--tasks",
        type=whole_number(at_least=1),
        metavar="N",
        help=f"how many tasks ask at the same time (default: {DEFAULT_TASKS}, or twice --max-size)",
    )
    parser.add_argument(
        "--max-size",
        type=whole_number(at_least=1),
        metavar="N",
        help=f"the largest size to measure (default: {DEFAULT_MAX_SIZE}, or half of the connections that are free)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds(at_least=0.05, at_most=86400),
        metavar="S",
        help=f"how long each size is measured (default: {DEFAULT_SECONDS:g}; more for a slow statement)",
    )
    parser.add_argument(
        "--max-seconds",
        type=seconds(at_least=0.05, at_most=86400),
        default=DEFAULT_MAX_SECONDS,
        metavar="S",
        help=f"how long all of it may take (default: {DEFAULT_MAX_SECONDS:g})",
    )
    parser.add_argument("--force", action="store_true", help="take more than half of the connections that are free")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a .svg nor a .png")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a directory that can be")
    return path


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, and print the answer. Returns the exit status."""
    url = required_server_of(options.url, parser)
    if options.tasks and options.max_size and options.tasks < options.max_size:
        parser.error(
            f"--tasks {options.tasks} cannot use --max-size {options.max_size} connections: give at least as many tasks"
        )
    if options.plot:
        check_can_draw()
    secrets = Redactor(url, {})
    with interruptible() as interruption:
        try:
            parse(url, {})
            return _Tuning(url, options).run()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return interruption.exit_status
        except StatementFailed as failure:
            _say_why_not(options, "statement", secrets.redact(str(failure)), None)
            return FAILED
        except psycopg.Error as error:
            message, refusal = explain(error, url)
            _say_why_not(options, refusal.kind, message, refusal.fix if refusal.is_known else None)
        except Refused as refused:
            _say_why_not(options, "refused", str(refused), None)
        return COULD_NOT_RUN


def _say_why_not(options: argparse.Namespace, kind: str, message: str, fix: str | None) -> None:
    if options.json:
        print(json.dumps({"ok": False, "error": {"kind": kind, "message": message, "fix": fix}}, indent=2))
        return
    print(f"asyncpool tune: {message}", file=sys.stderr)
    if fix is not None:
        print(f"fix: {fix}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """What is known before anything is measured."""

    server_version: str
    capacity: Capacity
    trial: Trial
    plan: Plan


class _Tuning:
    """One run of the command."""

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url = url
        self._options = options
        self._ends_at = float("inf")
        self._is_connected = False
        self._statement = Statement(options.query, options.params, options.commit, not options.no_prepare)
        self._prepared: _Preparation | None = None
        self._sweep: Sweep | None = None

    def run(self) -> int:
        """Returns the exit status. What was measured is shown also after Ctrl-C, which is raised all the same."""
        interrupted: KeyboardInterrupt | None = None
        try:
            with report.progress(as_json=self._options.json) as progress, _errors_only():
                run_interruptibly(lambda: self._measure(progress))
        except KeyboardInterrupt as interruption:
            interrupted = interruption
        except StatementFailed as failure:
            if committed := self._committed():
                raise StatementFailed(f"{failure}\n{report.about_committed(committed)}") from failure
            raise
        found = self._report()
        if found and (found.readings or not interrupted):
            self._show(found)
        if interrupted:
            raise interrupted
        return DONE if found and found.recommendation.conclusive else FAILED

    async def _measure(self, progress: Progress) -> None:
        at_most = self._options.max_seconds
        self._ends_at = asyncio.get_running_loop().time() + at_most - min(ENDING, at_most * ENDING_SHARE)
        prepared = self._prepared = await self._prepare_in_time()
        progress.say(self._announcement(prepared))
        self._sweep = Sweep(self._url, self._statement, prepared.plan, progress)
        await self._sweep.run()

    def _remaining(self) -> float:
        return max(0.0, self._ends_at - asyncio.get_running_loop().time())

    async def _prepare_in_time(self) -> _Preparation:
        limit = asyncio.timeout_at(self._ends_at)
        try:
            async with limit:
                return await self._prepare()
        except TimeoutError:
            option, seconds = "--seconds", self._options.seconds or PATIENCE
            if limit.expired():
                option, seconds = "--max-seconds", self._options.max_seconds
            if not self._is_connected:
                raise Refused(f"no connection within --max-seconds {seconds:g}") from None
            raise StatementFailed(
                f"the statement did not end within {seconds:g} s: give more with {option}, or a quicker statement"
            ) from None

    async def _prepare(self) -> _Preparation:
        """Look at the server and the statement, by a session that ends before the others begin."""
        options = self._options
        async with await psycopg.AsyncConnection.connect(
            self._url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT,
            fallback_application_name="asyncpool tune",
        ) as conn:
            self._is_connected = True
            row = await (await conn.execute(QUESTION)).fetchone()
            if row is None:
                raise Refused("the server does not tell how many connections are free")
            capacity = capacity_of(row)
            largest = _largest(options, capacity)
            trial = await try_out(conn, self._statement, options.seconds or PATIENCE)
            version = str(conn.info.parameter_status("server_version"))
        planned = plan(
            largest=largest,
            tasks=options.tasks or max(DEFAULT_TASKS, 2 * largest),
            seconds=seconds_for(options.seconds, trial),
            most_seconds=self._remaining(),
            trial=trial,
            one_shots=options.commit or trial.only_reads,
        )
        check_there_is_time(self._remaining(), options.max_seconds, planned)
        return _Preparation(version, capacity, trial, planned)

    def _announcement(self, prepared: _Preparation) -> str:
        planned = prepared.plan
        how = "committed" if self._options.commit else "rolled back"
        return (
            f"PostgreSQL {prepared.server_version}: {planned.tasks} tasks, a pool of 1 to {planned.sizes[-1]},"
            f" transactions are {how}; {planned.at_most:.0f} s at most"
        )

    def _committed(self) -> int:
        if self._prepared is None or self._sweep is None or not self._statement.commit:
            return 0
        return self._prepared.trial.committed + self._sweep.executed

    def _report(self) -> report.Report | None:
        prepared, sweep = self._prepared, self._sweep
        if prepared is None or sweep is None:
            return None
        return report.Report(
            server_version=prepared.server_version,
            statement=self._statement,
            plan=prepared.plan,
            readings=sweep.readings,
            one_shots=sweep.one_shots,
            without_one_shots=None
            if prepared.plan.one_shots
            else "they commit by themselves, and the statement writes; --commit allows it",
            ending=sweep.ending,
            recommendation=recommend(sweep.readings, sweep.ending),
            free=prepared.capacity.free,
            limit=prepared.capacity.limit,
            committed=self._committed(),
        )

    def _show(self, found: report.Report) -> None:
        if self._options.json:
            print(report.as_json(found), flush=True)  # before a picture that cannot be written
        else:
            report.show(found)
        if self._options.plot and found.readings:
            draw(found, self._options.plot)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without the pool's advice to commit what is meant to be rolled back."""
    logger = logging.getLogger("asyncpool")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _largest(options: argparse.Namespace, capacity: Capacity) -> int:
    """The largest size to measure. Raises Refused if that would take too much of what the server has free."""
    allowed = capacity.free if options.force else capacity.free // 2
    wanted: int = options.max_size or min(DEFAULT_MAX_SIZE, options.tasks or DEFAULT_MAX_SIZE)
    if allowed < 1 or (options.max_size and wanted > allowed):
        too_many = f"--max-size {wanted} is too many" if options.max_size else "no pool can be measured"
        are_free = "connection is free" if capacity.free == 1 else "connections are free"
        all_or_half = "that is all there are" if options.force else "more than half of them are taken with --force only"
        raise Refused(
            f"{too_many}: {capacity.free} {are_free} ({capacity.limit}), and {all_or_half}; at most {allowed}"
        )
    return min(wanted, allowed)
