"""`asyncpool demo`: the workload that the pool exists for, on a PostgreSQL of its own or a given one."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg

from asyncpool.cli.arguments import server_of, whole_number
from asyncpool.cli.demo import report
from asyncpool.cli.demo.display import display, in_ascii
from asyncpool.cli.demo.readings import Readings
from asyncpool.cli.demo.rounds import Target, run_rounds
from asyncpool.cli.demo.workload import Refused, Workload
from asyncpool.cli.embedded import EmbeddedServer, EmbeddedServerError
from asyncpool.cli.refusals import explain
from asyncpool.cli.signals import interruptible, run_interruptibly, undisturbed
from asyncpool.conninfo import Redactor, parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool.cli.arguments import Commands
    from asyncpool.cli.demo.display import Display
    from asyncpool.cli.demo.rounds import RoundResult

DESCRIPTION = """\
Many devices send payloads, and each payload becomes a row: with a connection per payload, through the
pool, by its one-shot statements, and through the pool while the server ends all its sessions half-way. Then
the figures side by side, and whether the table has exactly what was acknowledged; the exit status is 1 if not.
"""

MIN_SIZE = 2

FAILED = 1
COULD_NOT_RUN = 2


def add_command(commands: Commands) -> None:
    """Add `demo` and its options."""
    parser = commands.add_parser(
        "demo", help="see the pool carry a workload on a real PostgreSQL", description=DESCRIPTION
    )
    for name, default, meaning in (
        ("--devices", 200, "how many send at the same time"),
        ("--payloads", 4000, "how many they send, all together"),
        ("--max-size", 10, "connections that the pool may open"),
    ):
        parser.add_argument(
            name,
            type=whole_number(at_least=1),
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--min-size",
        type=whole_number(at_least=0),
        metavar="N",
        help=f"connections that the pool keeps (default: {MIN_SIZE}, or --max-size if that is less)",
    )
    parser.add_argument(
        "--url",
        help="a server to use instead of an embedded one; the demo keeps to a schema of its own, and drops it"
        " (default: DATABASE_URL)",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the demo. Returns the exit status."""
    options.url = server_of(options.url, parser)
    if options.min_size is None:
        options.min_size = min(MIN_SIZE, options.max_size)
    if options.min_size > options.max_size:
        parser.error(f"--min-size {options.min_size} is more than --max-size {options.max_size}")
    with interruptible() as interruption:
        try:
            return _run(options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return interruption.exit_status
        except psycopg.Error as error:
            message, refusal = explain(error, options.url or "")
            print(f"asyncpool demo: {message}", file=sys.stderr)
            if refusal.is_known:
                print(f"fix: {refusal.fix}", file=sys.stderr)
            return COULD_NOT_RUN
        except (EmbeddedServerError, Refused, TimeoutError) as error:
            secrets = Redactor(options.url or "", {})
            print(f"asyncpool demo: {secrets.redact(str(error)).strip()}", file=sys.stderr)
            return COULD_NOT_RUN


def _run(options: argparse.Namespace) -> int:
    workload = Workload(options.devices, options.payloads)
    with (
        display(as_json=options.json) as shown,
        _conninfo(options.url, shown) as conninfo,
        Readings(conninfo) as readings,
    ):
        version = readings.server_version
        shown.say(
            f"PostgreSQL {version}: {workload.payloads:,} payloads of {workload.devices:,} devices;"
            f" a pool of {options.min_size} to {options.max_size}"
        )
        target = Target(conninfo, readings, options.min_size, options.max_size)
        results = run_interruptibly(lambda: run_rounds(target, workload, shown))
    if options.json:
        print(
            report.as_json(
                results,
                server_version=version,
                devices=workload.devices,
                payloads=workload.payloads,
                min_size=options.min_size,
                max_size=options.max_size,
            )
        )
    else:
        _print_report(results, shared_server=options.url is not None)
    return 0 if all(result.nothing_lost for result in results) else FAILED


@contextmanager
def _conninfo(url: str | None, shown: Display) -> Iterator[str]:
    """The given server, or an embedded one for as long as the demo runs."""
    if url is not None:
        # A malformed one is refused here, in words that do not repeat a password.
        parse(url, {})
        yield url
        return
    shown.say("starting a PostgreSQL in a temporary directory")
    server = EmbeddedServer()
    try:
        server.start()
        yield server.dsn()
    finally:
        with undisturbed():
            server.close()


def _print_report(results: list[RoundResult], *, shared_server: bool) -> None:
    print(f"\n{report.table(results)}\n")
    print(f"{report.queues(results, in_ascii=in_ascii(sys.stdout))}\n")
    if (footnote := report.footnote(results, shared_server=shared_server)) is not None:
        print(f"{footnote}\n")
    print("\n".join(report.verdicts(results)))
