"""What the machine wants done: each effect is carried out by the runner, which reports the outcome back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

from .queue import Waiter

if TYPE_CHECKING:
    from ..events import CloseReason
    from .slot import Slot


class Refusal(IntEnum):
    """Why a waiter gets no connection."""

    TIMEOUT = 0
    CLOSED = 1
    TOO_MANY_WAITING = 2
    CANNOT_CONNECT = 3
    DEADLOCK = 4


@dataclass(slots=True)
class Connect:
    """Open a connection for this slot. Outcome: `connected` or `connect_failed`."""

    slot: Slot


@dataclass(slots=True)
class Check:
    """Ask the server whether it still answers on this slot. Outcome: `check_passed` or `check_failed`."""

    slot: Slot


@dataclass(slots=True)
class Recycle:
    """Roll back and reset. Outcome: `recycled` or `recycle_failed`."""

    slot: Slot


@dataclass(slots=True)
class Close:
    """Stop whatever runs on this slot, end its session, wait for the server's end of it. Outcome: `closed`."""

    slot: Slot
    reason: CloseReason


@dataclass(slots=True)
class Refuse:
    """The waiter has left the queue without a connection: wake it with an error."""

    waiter: Waiter
    refusal: Refusal
    position: int = 0  # where in the queue it was; 0 if that is not known


@dataclass(slots=True)
class WakeAt:
    """Call `wake` at this time, in place of the time asked for before."""

    when: float


@dataclass(slots=True)
class Opened:
    """`min_size` connections are there."""


@dataclass(slots=True)
class OpeningFailed:
    """The server's answer is final, or the single round of `open(timeout=0)` has failed."""


@dataclass(slots=True)
class Closed:
    """The last slot is gone."""


# A waiter among the effects has been granted a slot, and holds it already: wake it.
Effect: TypeAlias = Waiter | Connect | Check | Recycle | Close | Refuse | WakeAt | Opened | OpeningFailed | Closed
Effects: TypeAlias = Sequence[Effect]

NO_EFFECTS: Effects = ()
