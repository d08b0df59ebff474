"""What a caller is told who gets no connection: why, who has them, and what is wrong with the server."""

from __future__ import annotations

import heapq
from collections import Counter
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING

from .._core.effects import Refusal
from .._core.states import SlotState
from ..errors import PoolClosed, PoolDeadlock, PoolError, PoolTimeout, TooManyWaiting
from ..events import seconds_in_words
from .connect_errors import words_of
from .holders import describe, holders_of, holds
from .session import Session

if TYPE_CHECKING:
    from .runner import Runner

# How many of the longest-held leases a message names.
NAMED = 3

_leased_at = attrgetter("leased_at")


def refused(runner: Runner, refusal: Refusal, began: float, owner: object, position: int) -> PoolError:
    """The error for a caller, that task or thread, who began to wait then. `position` in the queue: 0 if there is none,
    or it is not known.
    """
    name = runner.config.name
    error: PoolError
    if refusal is Refusal.CLOSED:
        return PoolClosed(f"{name} is closed")
    if refusal is Refusal.TOO_MANY_WAITING:
        return TooManyWaiting(f"{name}: {runner.waiting} callers are waiting, as max_waiting allows")
    if refusal is Refusal.DEADLOCK:
        return PoolDeadlock(
            f"{name}: every connection ({runner.machine.size}) is held by a block that waits for another one, acquired"
            f" at {_sites(runner)}: let a task hold one at a time, or pass on the one that it has (one-shot statements"
            " inside of a block: run them on the block's connection)"
        )
    if refusal is Refusal.TIMEOUT:
        waited = monotonic() - began
        if waited < 0.001:
            return timed_out(runner, "no connection within 0 s", waited, owner)
        place = _place(position, runner.waiting)
        return timed_out(runner, f"no connection within {seconds_in_words(waited)}{place}", waited, owner, position)
    error = PoolError(f"{name}: cannot connect: {connect_error_words(runner)}")
    error.__cause__ = runner.last_connect_error
    return error


def _place(position: int, waiting: int) -> str:
    """`position` is that of who has just left the queue, 0 if it is not known; `waiting`: how many are left there."""
    return f", number {position:,} of {max(position, waiting + 1):,} in the queue" if position else ""


def timed_out(runner: Runner, what: str, waited: float, owner: object = None, position: int = 0) -> PoolTimeout:
    """The error that explains itself: the state, who holds connections, and the last connect error, its cause."""
    machine, now = runner.machine, monotonic()
    held = holders_of(heapq.nsmallest(NAMED, machine.leases(), key=_leased_at), now)
    text = f"{runner.config.name}: {what}; {describe_sizes(runner, 'others waiting')}"
    if held:
        text += f"; held longest: {describe(held)}"
    if reason := _reason(runner, waited, owner):
        text += f"; {reason}"
    failed = runner.last_connect_error
    age = None if failed is None else now - runner.last_connect_error_at
    error = PoolTimeout(
        text + describe_connect_error(runner),
        pool=runner.config.name,
        waited=waited,
        position=position or None,
        in_use=machine.count(SlotState.LEASED),
        idle=machine.count(SlotState.IDLE),
        connecting=machine.count(SlotState.CONNECTING),
        max_size=machine.max_size,
        holders=tuple(held),
        connect_error_age=age,
    )
    error.__cause__ = failed
    return error


def _reason(runner: Runner, waited: float, owner: object) -> str | None:
    """What the state says of the cause, if it says anything."""
    leases = runner.machine.leases()
    if len(leases) < runner.machine.max_size or waited < 0.001:
        return None
    if owner is not None and any(holds(slot, owner) for slot in leases):
        return "who waited holds one of them: let it use that one, or give it back first"
    if monotonic() - max(slot.leased_at for slot in leases) >= waited:
        return "none came back meanwhile: look there for a leak, a lock or a slow statement"
    return "they came back and went to others: hold them for less time, or raise max_size (see `asyncpool tune`)"


def _sites(runner: Runner) -> str:
    sites = Counter(slot.resource.site for slot in runner.machine.leases() if isinstance(slot.resource, Session))
    return "; ".join(f"{site} ({count} times)" if count > 1 else site for site, count in sites.items())


def describe_sizes(runner: Runner, waiting: str = "waiting") -> str:
    """The sizes, in words."""
    count = runner.machine.count
    return (
        f"{count(SlotState.LEASED)} in use, {count(SlotState.IDLE)} idle, {count(SlotState.CONNECTING)} connecting,"
        f" {runner.waiting} {waiting}, max_size {runner.machine.max_size}"
    )


def describe_connect_error(runner: Runner) -> str:
    """If the pool has not connected since."""
    if runner.last_connect_error is None:
        return ""
    age = monotonic() - runner.last_connect_error_at
    return f"; last connect error, {age:.1f} s ago: {connect_error_words(runner)}"


def connect_error_words(runner: Runner) -> str:
    """What the last connect error says."""
    return words_of(runner.last_connect_error) if runner.last_connect_error is not None else "no reason is known"
