"""What the demo shows while it runs: live bars in a terminal, lines elsewhere."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from asyncpool.cli.demo.report import QUEUE_HEADING, queue_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from rich.progress import Progress

    from asyncpool import PoolStats
    from asyncpool.cli.demo.rounds import RoundResult
    from asyncpool.cli.demo.workload import Tally

# A bar moves ten times a second; a log has a line every five seconds.
BAR_INTERVAL = 0.1
LINE_INTERVAL = 5.0


class Display(Protocol):
    """Where the demo says what it does."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def watching(
        self, title: str, tally: Tally, stats: Callable[[], PoolStats | None]
    ) -> AbstractAsyncContextManager[None]:
        """Show how far a round is, for as long as it takes, and what its pool says, if it has one."""
        ...

    def round_ended(self, result: RoundResult) -> None:
        """Sum a round up."""


def summary(result: RoundResult) -> str:
    """A round in one line."""
    parts = [f"{result.tally.acknowledged} payloads in {result.seconds:.1f} s"]
    if result.tally.refused:
        parts.append(f"{result.tally.refused} times turned away by the server")
    if result.terminated:
        parts.append(f"{result.terminated} sessions ended half-way")
    if result.tally.sent_again:
        parts.append(f"{result.tally.sent_again} payloads sent again")
    return ", ".join(parts)


class Lines:
    """Plain lines, for a pipe, a log, or a terminal without rich."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @asynccontextmanager
    async def watching(self, title: str, tally: Tally, stats: Callable[[], PoolStats | None]) -> AsyncIterator[None]:
        self.say(f"{title}: begins")
        progress = asyncio.create_task(self._report(title, tally, stats), name="report progress")
        try:
            yield
        finally:
            progress.cancel()

    async def _report(self, title: str, tally: Tally, stats: Callable[[], PoolStats | None]) -> None:
        begun = time.monotonic()
        while True:
            await asyncio.sleep(LINE_INTERVAL)
            seconds = time.monotonic() - begun
            queue = f", {now.waiting} waiting" if (now := stats()) is not None else ""
            self.say(f"{title}: {tally.acknowledged} of {tally.expected} after {seconds:.0f} s{queue}")

    def round_ended(self, result: RoundResult) -> None:
        self.say(f"{result.title}: {summary(result)}")


class Below:
    """What is shown below the bars."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __rich__(self) -> str:
        """For rich; nothing in it is markup."""
        return "\n".join(["", *self.lines]) if self.lines else ""


def in_ascii(stream: TextIO) -> bool:
    """Whether it takes no other characters than ASCII's."""
    try:
        "▁█".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


class Bars:
    """A bar for each round, one below the other, and below them the histograms of the pool that is at work."""

    def __init__(self, progress: Progress, below: Below, *, in_ascii: bool) -> None:
        self._progress = progress
        self._in_ascii = in_ascii
        self._below = below
        self.draw: Callable[[], object] = lambda: None  # at once, and not ten times a second

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    @asynccontextmanager
    async def watching(self, title: str, tally: Tally, stats: Callable[[], PoolStats | None]) -> AsyncIterator[None]:
        bar = self._progress.add_task(title, total=tally.expected, notes="")
        begun = time.perf_counter()

        def show() -> None:
            rate = tally.acknowledged / (time.perf_counter() - begun)
            notes = f"{rate:,.0f}/s"
            if tally.refused:
                notes += f", {tally.refused:,} refused"
            if tally.sent_again:
                notes += f", {tally.sent_again:,} sent again"
            if (now := stats()) is not None:
                queue = f"  {now.waiting:,} in line"
                lines = queue_lines(title, queue, now, in_ascii=self._in_ascii)
                self._below.lines = [QUEUE_HEADING, *lines] if now.acquires else []
            self._progress.update(bar, completed=tally.acknowledged, notes=notes)

        async def keep_showing() -> None:
            while True:
                show()
                await asyncio.sleep(BAR_INTERVAL)

        moving = asyncio.create_task(keep_showing(), name="move the bar")
        try:
            yield
        finally:
            moving.cancel()
            show()
            self.draw()  # however short the round was
            self._below.lines = []
            self._progress.stop_task(bar)

    def round_ended(self, result: RoundResult) -> None:
        """The bar says it all."""


@contextmanager
def display(*, as_json: bool) -> Iterator[Display]:
    """Bars if standard output is a terminal; lines if not. With JSON on standard output, lines beside it."""
    if as_json:
        yield Lines(sys.stderr)
    elif not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield Lines(sys.stdout)
    else:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[notes]}"),
        ]
        progress, below = Progress(*columns), Below()
        bars = Bars(progress, below, in_ascii=in_ascii(sys.stdout))  # here, before rich puts itself in its place
        with Live(Group(progress, below), refresh_per_second=1 / BAR_INTERVAL) as live:
            bars.draw = live.refresh
            yield bars
