"""The command line: `python -m asyncpool`, or `asyncpool`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from asyncpool.cli.demo import command as demo
from asyncpool.cli.doctor import command as doctor
from asyncpool.cli.extras import MissingExtra
from asyncpool.cli.top import command as top
from asyncpool.cli.tune import command as tune

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

COULD_NOT_RUN = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments`, by default the process's, name. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="asyncpool", description="A PostgreSQL connection pool for asyncio.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo.add_command(commands)
    doctor.add_command(commands)
    tune.add_command(commands)
    top.add_command(commands)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.run(parsed, parser)
    except MissingExtra as missing:
        print(f"asyncpool: {missing}", file=sys.stderr)
        return COULD_NOT_RUN
    return status
