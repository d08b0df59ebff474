"""What the commands' arguments have in common: their types, their errors, the server, and how the help is wrapped."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import textwrap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from asyncpool.conninfo import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn


class HelpFormatter(argparse.HelpFormatter):
    """Paragraphs are wrapped to the width of the terminal; what is indented keeps its lines, if they fit."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(self._fill_paragraph(paragraph, width, indent) for paragraph in paragraphs) + "\n"

    def _fill_paragraph(self, paragraph: str, width: int, indent: str) -> str:
        lines = paragraph.splitlines()
        if not any(line.startswith(" ") for line in lines):
            return textwrap.fill(" ".join(lines), width, initial_indent=indent, subsequent_indent=indent)
        return "\n".join(_wrapped(indent + line, width) for line in lines)


def _wrapped(line: str, width: int) -> str:
    """A line, gone on with below its second column, if it has two."""
    columns = re.match(r" *\S+ {2,}| *", line)
    assert columns is not None
    return textwrap.fill(line, width, subsequent_indent=" " * min(columns.end(), width // 2))


class Parser(argparse.ArgumentParser):
    """The parser of all: names the command that may have been meant, and no password of a misplaced URL."""

    _given: Sequence[str] = ()

    # The overloads of the typeshed are about the namespace, which is passed on as it is.
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # no overloads here
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._given, namespace)

    def error(self, message: str) -> NoReturn:
        for argument in self._given:
            message = Redactor(argument, {}).redact(message)
        if misspelt := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += _suggestion(misspelt[1], re.findall(r"\w+", misspelt[2]))
        super().error(message)


class CommandParser(Parser):
    """The parser of a command: what it does not know is told with its own usage, and the name that may be meant."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(**settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = [name for action in self._actions for name in action.option_strings]
        for argument in args or ():
            # Ahead of argparse, which would ask for what is required first.
            name = argument.partition("=")[0]
            if argument == "--":
                break
            if re.fullmatch(r"--\w[\w-]*", name) and not any(one.startswith(name) for one in known):
                self.error(f"unrecognized option {name}{_suggestion(name, known)}")
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


# What each command adds itself to.
Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"  # noqa: SLF001  # what add_subparsers() returns


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f": did you mean {close[0]}?" if close else ""


def whole_number(*, at_least: int) -> Callable[[str], int]:
    """The type of an argument."""

    def convert(text: str) -> int:
        # argparse would put the converter's name into the message of any other error.
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < at_least:
            raise argparse.ArgumentTypeError(f"{number:,} is less than {at_least}")
        return number

    return convert


def seconds(*, at_least: float, at_most: float) -> Callable[[str], float]:
    """The type of an argument."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if at_least <= (number := float(text)) <= at_most:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from {at_least:g} to {at_most:g}")

    return convert


def add_server(parser: argparse.ArgumentParser) -> None:
    """The argument that `required_server_of` wants."""
    parser.add_argument(
        "url", nargs="?", metavar="URL", help="the server, as a URL or key=value pairs (default: DATABASE_URL)"
    )


def server_of(given: str | None, parser: argparse.ArgumentParser) -> str | None:
    """The server that was named, or the one of the environment, if there is one. What is empty, as a variable that is
    not set, is no name.
    """
    if given is not None and not given.strip():
        parser.error("the URL is empty: name the server, or leave the URL out and set DATABASE_URL")
    server = os.environ.get("DATABASE_URL", "") if given is None else given
    return server if server.strip() else None


def required_server_of(given: str | None, parser: argparse.ArgumentParser) -> str:
    """The same, for a command that cannot do without."""
    server = server_of(given, parser)
    if server is None:
        parser.error("no server is named: give its URL, or set DATABASE_URL")
    return server
