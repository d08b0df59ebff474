"""`asyncpool doctor`: is a server fit for a pool, and which options does the pool need there?"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psycopg

from asyncpool._io.connect_errors import ConnectFailed
from asyncpool.cli.arguments import add_server, required_server_of, seconds
from asyncpool.cli.doctor.examination import Examination
from asyncpool.cli.doctor.findings import Level, diagnose
from asyncpool.cli.extras import console
from asyncpool.cli.refusals import NoAnswer, explain
from asyncpool.cli.signals import interruptible, run_interruptibly

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from asyncpool.cli.arguments import Commands
    from asyncpool.cli.doctor.facts import Facts
    from asyncpool.cli.doctor.findings import Diagnosis
    from asyncpool.cli.refusals import Refusal

TIMEOUT = 5.0

DESCRIPTION = """\
Look at a PostgreSQL server as a pool would find it: how far it is, how many connections are free, whether a
pooler such as PgBouncer stands in between and in which mode, TLS, prepared statements, its role, and the
settings that bite pools. Every finding that is not ok names its remedy. In the end it says which options to give
the pool. It only reads, on three connections at most, which it closes.
"""

EPILOG = """\
exit status:
  0    nothing worse than a note
  1    there is a warning or a problem
  2    it could not be examined: no connection, or no answer

--json prints one object, whose keys stay:
  ok            whether the exit status is 0
  verdict       a sentence
  findings      a list of {level, topic, text, fix}; level is ok, note, warning or problem
  recommended   {options, line}: for Pool(...), as an object and as Python, where `conninfo` is the URL
  facts         what the findings rest upon; what could not be asked is null
or, with exit status 2:
  ok            false
  error         {kind, message, fix}
"""

WARNED = 1
COULD_NOT_RUN = 2

STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
MARGIN = max(map(len, Level)) + 2


def add_command(commands: Commands) -> None:
    """Add `doctor` and its options."""
    parser = commands.add_parser(
        "doctor",
        help="is a server fit for a pool, and which options does the pool need?",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_server(parser)
    parser.add_argument(
        "--timeout",
        type=seconds(at_least=0.01, at_most=3600),
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"for each address to connect to, and for each question (default: {TIMEOUT:g})",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    # Its own usage is what a wrong option gets, not that of all commands.
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Examine the server, and say what was found. Returns the exit status."""
    options.url = required_server_of(options.url, parser)
    screen = None if options.json else console()  # raises before the server is bothered
    with interruptible() as interruption:
        try:
            # Made in the loop: it reads the connection string, whose errors are told like those of a connect.
            facts = run_interruptibly(lambda: _examine(options.url, options.timeout))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return interruption.exit_status
        except (ConnectFailed, NoAnswer, psycopg.Error) as failed:
            return _say_why_not(failed, options)
    diagnosis = diagnose(facts)
    if screen is None:
        print(json.dumps(as_json(facts, diagnosis), indent=2))
    else:
        show(facts, diagnosis, screen)
    return 0 if diagnosis.is_fit else WARNED


async def _examine(url: str, timeout: float) -> Facts:
    return await Examination(url, timeout).run()


# --- it could not be examined --------------------------------------------------------------------------------


def _say_why_not(failed: Exception, options: argparse.Namespace) -> int:
    message, refusal = explain(failed, options.url, has_timeout_option=True)
    if options.json:
        error_as_json = {"kind": refusal.kind, "message": message, "fix": refusal.fix}
        print(json.dumps({"ok": False, "error": error_as_json}, indent=2))
    else:
        _show_refusal(message, refusal)
    return COULD_NOT_RUN


def _show_refusal(message: str, refusal: Refusal) -> None:
    screen = console(stderr=True)
    _print(screen, f"asyncpool doctor: {message}")
    _print(screen, f"fix: {refusal.fix}")


# --- what was found ------------------------------------------------------------------------------------------


def show(facts: Facts, diagnosis: Diagnosis, screen: Console) -> None:
    """Print it: wrapped in a terminal, a line for each finding and for each remedy in a pipe."""
    from rich.text import Text

    _print(screen, facts.place)
    _print(screen, "")
    for finding in diagnosis.findings:
        text = Text.assemble((f"{finding.topic}:", "bold"), f" {finding.text}")
        _print_finding(screen, Text(finding.level, STYLES[finding.level]), text)
        if finding.fix is not None:
            _print_finding(screen, Text(""), Text(f"fix: {finding.fix}"))
    _print(screen, "")
    _print(screen, diagnosis.verdict)
    _print(screen, "")
    # In one piece, whatever the width, so that it can be copied.
    screen.print(Text(diagnosis.line), soft_wrap=True)


def _print_finding(screen: Console, label: Text, text: Text) -> None:
    from rich.table import Table

    if not screen.is_terminal:
        screen.print(f"{label.plain:<{MARGIN}}{text.plain}", soft_wrap=True, markup=False)
        return
    grid = Table.grid(padding=0)
    grid.add_column(width=MARGIN)
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    screen.print(grid)


def _print(screen: Console, text: str) -> None:
    from rich.text import Text

    screen.print(Text(text), soft_wrap=not screen.is_terminal)


def as_json(facts: Facts, diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "ok": diagnosis.is_fit,
        "verdict": diagnosis.verdict,
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "recommended": {"options": diagnosis.options, "line": diagnosis.line},
        "facts": _facts_as_json(facts),
    }


def _facts_as_json(facts: Facts) -> dict[str, Any]:
    pooler, capacity = facts.pooler, facts.capacity
    return {
        "place": facts.place,
        "user": facts.user,
        "product": facts.product,
        "server_version": facts.server_version,
        "round_trip_ms": round(facts.round_trip_ms, 3),
        "connections": None if capacity is None else {**asdict(capacity), "free": capacity.free},
        "pooler": None
        if pooler is None
        else {
            "product": pooler.product,
            "version": pooler.version,
            "mode": pooler.mode.value if pooler.mode is not None else None,
            "settings": dict(pooler.settings),
        },
        "passed_on": facts.passed_on,
        "prepared_statements": facts.prepared.value,
        "tls": asdict(facts.tls),
        "is_standby": facts.is_standby,
        "settings": dict(facts.settings),
        "unanswered": dict(facts.unanswered),
    }
