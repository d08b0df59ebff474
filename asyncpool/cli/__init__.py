"""The command line: `python -m asyncpool`, or `asyncpool`."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from asyncpool import __version__
from asyncpool.cli.arguments import CommandParser, Parser
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
    _open_what_is_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As with standard error, names with other characters than it has do not end the command.
        sys.stdout.reconfigure(errors="replace")
    parser = Parser(prog="asyncpool", description="A PostgreSQL connection pool for asyncio.")
    parser.add_argument("--version", action="version", version=f"asyncpool {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=CommandParser)
    demo.add_command(commands)
    doctor.add_command(commands)
    tune.add_command(commands)
    top.add_command(commands)
    parsed = parser.parse_args(arguments)
    status: int | None = None
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()
    except MissingExtra as missing:
        print(f"asyncpool: {missing}", file=sys.stderr)
        return COULD_NOT_RUN
    except BrokenPipeError:  # whoever read it has seen enough
        _forget_output()
    except OSError as error:  # a full disk, most likely
        print(f"asyncpool: the output cannot be written: {error}", file=sys.stderr)
        status = COULD_NOT_RUN
        _forget_output()
    return 0 if status is None else status


def _open_what_is_closed() -> None:
    """Of a stream that the shell closed (`>&-`) Python makes None, for which print() takes standard output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It is open until the process ends, of which no ResourceWarning is to be made.
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, closefd=False))  # noqa: SIM115


def _forget_output() -> None:
    """The interpreter's own flush at exit must not fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
