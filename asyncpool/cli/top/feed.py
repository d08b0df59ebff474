"""What a pool tells of itself on its monitor socket, read and compared with what it told before."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncpool.events import Holder
from asyncpool.histogram import BOUNDS, Histogram

if TYPE_CHECKING:
    from typing import Self

# What this program can read; the pool's own is in its first field.
FORMAT = 1
# Seconds for the first line, which an idle event loop sends at once.
FIRST_LINE_WITHIN = 5.0
# A line has some kilobytes: what is longer than this is no pool's.
LONGEST_LINE = 1_000_000


class NotReadable(Exception):
    """Nothing is to be had from the socket; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool at one instant."""

    line: str
    """As it came."""
    pool: str
    pid: int
    open_for: float
    """Seconds."""
    phase: str
    sizes: dict[str, int]
    waiting: int
    totals: dict[str, int]
    wait: Histogram
    hold: Histogram
    connect: Histogram
    holders: list[Holder]
    connect_error: tuple[str, float] | None
    """What the last one says, and its age in seconds."""


def parse(line: bytes) -> Snapshot:
    """A line of the monitor's. Raises NotReadable."""
    try:
        told = json.loads(line)
        if "refused" in told:
            raise NotReadable(f"the pool lets nobody else in: {printable(told['refused'])}")
        if told["format"] != FORMAT:
            raise NotReadable(f"it speaks format {told['format']!r}, and this program {FORMAT}: use the pool's version")
        return _snapshot(line.decode().strip(), told)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NotReadable("somebody listens there who is no pool's monitor") from None


def _snapshot(line: str, told: dict[str, Any]) -> Snapshot:
    error = told["connect_error"]
    return Snapshot(
        line=line,
        pool=printable(told["pool"]),
        pid=int(told["pid"]),
        open_for=float(told["open_for"]),
        phase=printable(told["phase"]),
        sizes={str(state): int(count) for state, count in told["sizes"].items()},
        waiting=int(told["waiting"]),
        totals={str(total): int(count) for total, count in told["totals"].items()},
        wait=_histogram(told["wait"]),
        hold=_histogram(told["hold"]),
        connect=_histogram(told["connect"]),
        holders=sorted(map(_holder, told["holders"]), key=lambda holder: -holder.held_for),
        connect_error=None if error is None else (printable(error["text"]), float(error["age"])),
    )


def _histogram(told: dict[str, Any]) -> Histogram:
    counts = tuple(map(int, told["counts"]))
    missing = len(BOUNDS) + 1 - len(counts)
    if missing < 0:
        raise ValueError("it has other buckets than ours")
    return Histogram(counts + (0,) * missing, float(told["sum"]), float(told["max"]))


def _holder(told: dict[str, Any]) -> Holder:
    return Holder(
        site=printable(told["site"]),
        held_for=float(told["held_for"]),
        backend_pid=int(told["pid"]),
        owner=printable(told["owner"]),
        transaction=printable(told["transaction"]),
    )


def printable(text: object) -> str:
    """Without what would move a terminal's cursor: names are the application's."""
    return "".join(character if character.isprintable() else " " for character in str(text))


@dataclass(frozen=True, slots=True)
class Look:
    """A pool now, and as it was when it was looked at before, if that is the same opening of it."""

    now: Snapshot
    before: Snapshot | None = None

    def then(self, now: Snapshot) -> Look:
        """The next one."""
        before = self.now
        is_same = before.pid == now.pid and before.open_for < now.open_for
        grows = all(count >= before.totals.get(total, 0) for total, count in now.totals.items())
        return Look(now, before if is_same and grows else None)

    def rate(self, total: str) -> float | None:
        """How many of these there were in each second since the last look; None at the first one."""
        if self.before is None:
            return None
        return (self.now.totals[total] - self.before.totals[total]) / (self.now.open_for - self.before.open_for)

    def since(self, which: str) -> Histogram | None:
        """The durations of a histogram since the last look; None at the first one."""
        if self.before is None:
            return None
        now: Histogram = getattr(self.now, which)
        return difference(now, getattr(self.before, which))


def difference(now: Histogram, before: Histogram) -> Histogram:
    """What was counted in between. The longest of it is known to its bucket only."""
    # A duration may be counted after the lease that it belongs to: a bucket seems to lose one then.
    counts = tuple(max(0, one - other) for one, other in zip(now.counts, before.counts, strict=True))
    used = max((bucket for bucket, count in enumerate(counts) if count), default=None)
    longest = 0.0 if used is None else now.max if used == len(BOUNDS) else min(now.max, BOUNDS[used])
    return Histogram(counts, max(0.0, now.sum - before.sum), longest)


class Feed:
    """A connection to a monitor socket.

    Raises NotReadable, as its methods do.
    """

    def __init__(self, path: str) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise NotReadable("Python has no Unix sockets on this system")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._received = b""
        try:
            self._socket.settimeout(FIRST_LINE_WITHIN)
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise NotReadable(_reason(error, path)) from None
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Look no longer."""
        self._socket.close()

    def first(self) -> Snapshot:
        """The first snapshot, which is waited for."""
        deadline = time.monotonic() + FIRST_LINE_WITHIN
        while (left := deadline - time.monotonic()) > 0:
            if select.select((self,), (), (), left)[0] and (snapshot := self.receive()) is not None:
                return snapshot
        raise NotReadable(
            f"no answer within {FIRST_LINE_WITHIN:g} s: the pool's event loop is blocked, or it is no pool"
        )

    def receive(self) -> Snapshot | None:
        """The latest that has come, if anything has."""
        try:
            received = self._socket.recv(65536)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise NotReadable(f"the connection is lost: {error.strerror}") from None
        if not received:
            raise NotReadable("the pool was closed")
        *lines, self._received = (self._received + received).split(b"\n")
        if len(self._received) > LONGEST_LINE:
            raise NotReadable("somebody listens there who is no pool's monitor")
        return parse(lines[-1]) if lines else None


def _reason(error: OSError, path: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file: is the pool open, with monitor= this path?"
    if isinstance(error, ConnectionRefusedError):
        if not _is_socket(path):
            return "this is no socket"
        return "nobody listens there: the process that made it has ended"
    if isinstance(error, PermissionError):
        return "permission denied: only the user who runs the pool may look"
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return "nobody answers: the pool's event loop is blocked"
    return error.strerror or str(error)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True  # gone meanwhile
