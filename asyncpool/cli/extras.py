"""What the commands need beyond the package itself: rich, to print with."""

from __future__ import annotations

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
    return Console(stderr=stderr, highlight=False)
