"""What can be observed of a pool from outside: why connections close, what it counts, who holds what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


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
    acquires: int
    timeouts: int
    one_shots: int
    """One-shot statements that were answered."""
    connects: int
    connect_errors: int
    abandoned: int
    """Sessions whose end the server did not confirm in time, since construction."""
    closes: Mapping[CloseReason, int]


@dataclass(frozen=True, slots=True)
class Holder:
    """A lease: where the connection was acquired (`file:line in function`) and for how many seconds it is held."""

    site: str
    held_for: float
    backend_pid: int
    stack: str | None = None
    """The full stack of the acquire, with `debug`."""
