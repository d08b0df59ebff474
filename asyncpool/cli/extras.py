"""What the commands need beyond the package itself: rich, to print with."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class MissingExtra(Exception):
    """A library of an extra is not installed; the message says how to get it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"this needs {library}: {install_hint(extra)}")


def install_hint(extra: str) -> str:
    """How an extra is installed."""
    return f"pip install 'asyncpool-pg[{extra}]' (from a clone: pip install '.[{extra}]')"


def console(*, stderr: bool = False) -> Console:
    """A terminal to print on, or what stands in its place: as wide as it is, without colours where none are wanted.

    Raises MissingExtra.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise MissingExtra("rich", "cli") from None

    class Output(Console):
        def on_broken_pipe(self) -> None:
            # Whoever read it has seen enough. rich would end the program with a status that means something else here.
            with suppress(SystemExit):
                super().on_broken_pipe()

    return Output(stderr=stderr, highlight=False)
