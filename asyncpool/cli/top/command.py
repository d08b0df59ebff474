"""`asyncpool top`: a live view of a pool that publishes itself on a Unix socket."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncpool.cli.extras import console
from asyncpool.cli.signals import interruptible
from asyncpool.cli.top.feed import Feed, Look, NotReadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.live import Live

    from asyncpool.cli.arguments import Commands

DESCRIPTION = """\
A live view of a pool that was made with monitor=PATH, in whatever process of yours: its connections, the queue,
how long is waited and held, and who holds what. q or Ctrl-C ends it. Where the output is no terminal it is printed
once. The exit status is 2 if the socket cannot be read.
"""

COULD_NOT_READ = 2
# Seconds between two tries to find a pool that is gone, and without a line after which it counts as stuck.
RETRY_AFTER = 1.0
SILENT_AFTER = 3.0


def add_command(commands: Commands) -> None:
    """Add `top` and its options."""
    parser = commands.add_parser("top", help="watch a running pool, over its monitor socket", description=DESCRIPTION)
    parser.add_argument("path", metavar="PATH", help="what the pool was given as its option `monitor`")
    parser.add_argument("--once", action="store_true", help="print the pool as it is now, and end")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, as the pool sends it, and end")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    terminal = None if options.json else console()
    with interruptible() as interruption:
        try:
            with Feed(options.path) as feed:
                look = Look(feed.first())
            if terminal is None:
                print(look.now.line)
            elif options.once or not sys.stdout.isatty() or terminal.is_dumb_terminal:
                _print(look, terminal)
            else:
                _watch(options.path, look, terminal)
        except NotReadable as reason:
            print(f"asyncpool top: {options.path}: {reason}", file=sys.stderr)
            return COULD_NOT_READ
        except KeyboardInterrupt:
            return 0 if interruption.signal_number == signal.SIGINT else interruption.exit_status
    return 0


def _print(look: Look, terminal: Console) -> None:
    from asyncpool.cli.top.view import PoolView

    terminal.print(PoolView(look))


def _watch(path: str, look: Look, terminal: Console) -> None:
    from rich.live import Live

    with _keys() as keyboard, Live(console=terminal, screen=True, auto_refresh=False) as live:
        Watch(path, look, live, keyboard).run()


class Watch:
    """The view, renewed with each line that comes, until a key ends it."""

    def __init__(self, path: str, look: Look, live: Live, keyboard: int | None) -> None:
        self._path = path
        self._look = look
        self._live = live
        self._keyboard = keyboard
        self._feed: Feed | None = None
        self._told_at = time.monotonic()
        self._tried_at = float("-inf")
        self._trouble: str | None = None

    def run(self) -> None:
        """Until q."""
        try:
            while True:
                self._show()
                if self._feed is None and time.monotonic() >= self._tried_at + RETRY_AFTER:
                    self._connect()
                if self._wait():
                    return
        finally:
            self._lose()

    def _connect(self) -> None:
        self._tried_at = time.monotonic()
        try:
            self._feed = Feed(self._path)
        except NotReadable as reason:
            self._trouble = f"gone, and awaited: {reason}"

    def _lose(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def _wait(self) -> bool:
        """For a line, or a key, or a second. Whether that is the end."""
        sources: list[int] = [source for source in (self._keyboard,) if source is not None]
        if self._feed is not None:
            sources.append(self._feed.fileno())
        ready, _, _ = select.select(sources, (), (), RETRY_AFTER)
        if self._keyboard is not None and self._keyboard in ready and self._is_the_end(self._keyboard):
            return True
        if self._feed is not None and self._feed.fileno() in ready:
            self._receive(self._feed)
        elif self._feed is not None and time.monotonic() > self._told_at + SILENT_AFTER:
            silent = time.monotonic() - self._told_at
            self._trouble = f"no news for {silent:.0f} s: its event loop is blocked, or the process is stopped"
        return False

    def _receive(self, feed: Feed) -> None:
        try:
            snapshot = feed.receive()
        except NotReadable as reason:
            self._lose()
            self._trouble = f"gone, and awaited: {reason}"
            return
        if snapshot is not None:
            self._look = self._look.then(snapshot)
            self._told_at = time.monotonic()
            self._trouble = None

    def _is_the_end(self, keyboard: int) -> bool:
        try:
            keys = os.read(keyboard, 64)
        except OSError:
            keys = b""
        if not keys:
            self._keyboard = None  # the terminal is gone, or has no more to say
        return b"q" in keys.lower()

    def _show(self) -> None:
        from asyncpool.cli.top.view import PoolView

        height = self._live.console.size.height
        self._live.update(PoolView(self._look, height=height, trouble=self._trouble), refresh=True)


@contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal's keys as they are struck, if standard input is one; afterwards as it was."""
    try:
        import termios
        import tty
    except ImportError:
        yield None
        return
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
