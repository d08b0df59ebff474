"""What can be observed of a pool from outside: what happens, what it counts, who holds what, why connections close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from .histogram import Histogram


class CloseReason(StrEnum):
    """Why the pool closed a connection; the value is the word in logs and metrics."""

    MAX_IDLE = "max_idle"
    MAX_LIFETIME = "max_lifetime"
    MAX_USES = "max_uses"
    SHRUNK = "shrunk"
    DRAINED = "drained"
    DISCONNECTED = "disconnected"
    CHECK_FAILED = "check_failed"
    RESET_FAILED = "reset_failed"
    READ_ONLY = "read_only"
    SETUP_FAILED = "setup_failed"
    CONFIGURE_FAILED = "configure_failed"
    RETURNED_BUSY = "returned_busy"
    DISCARDED = "discarded"
    LEASE_LOST = "lease_lost"
    POOL_CLOSED = "pool_closed"


class CommitStatus(StrEnum):
    """What `commit_status()` says of a transaction whose COMMIT was lost."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    IN_PROGRESS = "in progress"
    """The server still works on it, or has not noticed yet that its client is gone. Ask again."""
    NOTHING_WRITTEN = "nothing written"
    """It had no id, so that there was nothing to lose but what a COMMIT itself does, such as NOTIFY."""
    UNKNOWN = "unknown"
    """Not tracked, another server or timeline, too long ago, or a crash since then which may have lost it."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool at one instant. `size` is the sum of the connections; totals count since the pool was last opened."""

    name: str
    min_size: int
    max_size: int
    size: int
    connecting: int
    idle: int
    leased: int
    checking: int
    recycling: int
    closing: int
    waiting: int
    """Callers in line, those of one-shot statements included."""
    acquires: int
    """Leases: `immediate` and `waited` together."""
    immediate: int
    """Leases for which a connection was there."""
    waited: int
    """Leases for which the caller stood in line."""
    timeouts: int
    cancelled: int
    """Callers who left the line by a cancellation, or Ctrl-C."""
    returned_bad: int
    """Leases that ended with the connection lost, in the middle of something, or, by hand, in a transaction."""
    one_shots: int
    """One-shot statements that were answered."""
    connects: int
    connect_errors: int
    abandoned: int
    """Sessions whose end the server did not confirm in time, since construction."""
    closes: Mapping[CloseReason, int]
    wait: Histogram
    """How long leases were waited for; 0 for the immediate ones."""
    hold: Histogram
    """How long connections were held."""
    connect: Histogram
    """How long it took to connect, `configure` included; of the connects that succeeded."""


def seconds_in_words(seconds: float) -> str:
    """To three digits, and to the second."""
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


@dataclass(frozen=True, slots=True)
class Holder:
    """A lease: who has a connection, since when, and what for."""

    site: str
    """Where it was acquired: `file:line in function`."""
    held_for: float
    """Seconds."""
    backend_pid: int
    stack: str | None = None
    """The full stack of the acquire, with `debug`."""
    owner: str = ""
    """The name of the task, or thread, that acquired it."""
    transaction: str = ""
    """What the connection is in: `idle`, `active`, `in a transaction`, `in a failed transaction`, `lost`."""

    def __str__(self) -> str:
        if not self.owner:  # no lease of anybody's
            return f"{self.site} for {seconds_in_words(self.held_for)}"
        held_for = seconds_in_words(self.held_for)
        return f"{self.owner} for {held_for}, {self.transaction}, acquired at {self.site}"


# --- what happens -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened in a pool."""

    pool: str
    """The pool's name."""
    at: float
    """When, by `time.monotonic()`."""


@dataclass(frozen=True, slots=True)
class Queued(Event):
    """A caller has begun to stand in line for a connection, be it for a lease or for its one-shot statement."""

    waiting: int
    """How many stand there now."""


@dataclass(frozen=True, slots=True)
class Acquired(Event):
    """A caller has got a connection."""

    waited: float
    """Seconds in line; 0 if there was a connection."""


@dataclass(frozen=True, slots=True)
class Released(Event):
    """A lease has ended."""

    held: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class TimedOut(Event):
    """A caller was refused a connection after its time in line."""

    waited: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Connecting(Event):
    """A connection is being made."""


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """It is there, and configured."""

    took: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class ConnectError(Event):
    """It could not be made."""

    took: float
    """Seconds."""
    error: Exception


@dataclass(frozen=True, slots=True)
class ConnectionClosed(Event):
    """A connection is being closed."""

    reason: CloseReason


@dataclass(frozen=True, slots=True)
class LaneOpened(Event):
    """A connection has begun to carry one-shot statements."""


@dataclass(frozen=True, slots=True)
class LaneClosed(Event):
    """It carries them no longer."""

    served: float
    """For how many seconds it did."""
    is_lost: bool
    """Whether the connection was lost, with the statements that were under way."""


class Observer(Protocol):
    """Called for each event, one after the other, in a thread of its own: see `Pool.observe`."""

    def __call__(self, event: Event, /) -> object:
        """Take notice. What it returns is ignored, what it raises is logged."""
