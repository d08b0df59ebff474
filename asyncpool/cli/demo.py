"""`asyncpool demo`: the workload that the pool exists for, on a PostgreSQL of its own or a given one."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg

from asyncpool.cli import report
from asyncpool.cli.display import display
from asyncpool.cli.embedded import EmbeddedServer, EmbeddedServerError
from asyncpool.cli.readings import Readings
from asyncpool.cli.rounds import Target, run_rounds
from asyncpool.cli.signals import interruptible, undisturbed
from asyncpool.cli.workload import Refused, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool.cli.display import Display
    from asyncpool.cli.rounds import RoundResult

DESCRIPTION = """\
Many devices send payloads, and each payload becomes a row: with a connection per payload, through the
pool, and through the pool while the server ends all its sessions half-way. Then the figures side by side, and
whether the table has exactly what was acknowledged; the exit status is 1 if not.
"""

FAILED = 1
COULD_NOT_RUN = 2


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` and its options."""
    parser = commands.add_parser(
        "demo", help="see the pool carry a workload on a real PostgreSQL", description=DESCRIPTION
    )
    parser.add_argument("--devices", type=_positive, default=200, metavar="N", help="senders (default: 200)")
    parser.add_argument(
        "--payloads", type=_positive, default=4000, metavar="N", help="of all of them (default: 4000)"
    )
    parser.add_argument(
        "--min-size", type=_not_negative, default=2, metavar="N", help="the pool's (default: 2)"
    )
    parser.add_argument(
        "--max-size", type=_positive, default=10, metavar="N", help="the pool's (default: 10)"
    )
    parser.add_argument(
        "--url",
        default=os.environ.get("DATABASE_URL") or None,
        help="a server to use instead of an embedded one; the demo keeps to a schema of its own, and drops it"
        " (default: DATABASE_URL)",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the demo. Returns the exit status."""
    if options.min_size > options.max_size:
        parser.error(f"--min-size {options.min_size} is more than --max-size {options.max_size}")
    with interruptible() as interruption:
        try:
            return _run(options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return interruption.exit_status
        except (EmbeddedServerError, Refused, psycopg.Error, TimeoutError) as error:
            print(f"asyncpool demo: {error}", file=sys.stderr)
            return COULD_NOT_RUN


def _run(options: argparse.Namespace) -> int:
    workload = Workload(options.devices, options.payloads)
    with display(as_json=options.json) as shown, _conninfo(options.url, shown) as conninfo:
        with Readings(conninfo) as readings:
            target = Target(conninfo, readings, options.min_size, options.max_size)
            shown.say(
                f"PostgreSQL {readings.server_version}: {workload.payloads:,} payloads of {workload.devices:,}"
                f" devices; a pool of {target.min_size} to {target.max_size}"
            )
            results = asyncio.run(run_rounds(target, workload, shown))
            version = readings.server_version
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
    if (footnote := report.footnote(results, shared_server=shared_server)) is not None:
        print(f"{footnote}\n")
    print("\n".join(report.verdicts(results)))
