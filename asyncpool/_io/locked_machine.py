"""PoolMachine for several threads: one lock, and what the event loop has to do in the order in which it was decided."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from .._core.effects import NO_EFFECTS, Effect, Effects, Refusal, Refuse
from .._core.machine import PoolMachine
from .._core.queue import Waiter
from .._core.slot import Slot
from .._core.states import SlotState
from ..config import PoolConfig
from ..events import CloseReason

P = ParamSpec("P")

LEASED = SlotState.LEASED


class ThreadWaiter(Waiter):
    """A thread in the queue."""

    __slots__ = ("_gate", "began", "error")

    def __init__(self, deadline: float, began: float) -> None:
        self.deadline = deadline
        self.slot = None
        self.began = began
        self.error: Exception | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self) -> None:
        """Wait until `wake`. Ctrl-C is raised from here."""
        self._gate.acquire()

    def wake(self) -> None:
        """Let the thread go on; to be called once."""
        self._gate.release()


def _locked(
    method: Callable[Concatenate[PoolMachine, P], Effects],
) -> Callable[Concatenate[LockedMachine, P], Effects]:
    def call(self: LockedMachine, /, *args: P.args, **kwargs: P.kwargs) -> Effects:
        with self.lock:
            effects = method(self, *args, **kwargs)
            return self._keep_for_loop(effects) if effects else NO_EFFECTS

    call.__doc__ = method.__doc__
    return call


class LockedMachine(PoolMachine):
    """Any thread may call it. It returns the waiters that are to be woken, which any thread may do; all other effects
    go into `for_loop`. The lock is never held across I/O or a callback.
    """

    def __init__(self, config: PoolConfig, draw: Callable[[], float]) -> None:
        super().__init__(config, draw)
        self.lock = threading.RLock()  # the machine's methods call each other
        self.for_loop: deque[Effect] = deque()

    def _keep_for_loop(self, effects: Effects) -> Effects:
        at_once = [effect for effect in effects if isinstance(effect, (Waiter, Refuse))]
        self.for_loop.extend(effect for effect in effects if not isinstance(effect, (Waiter, Refuse)))
        return at_once

    def take(self, now: float) -> Slot | None:
        """Lease a connection that is idle."""
        with self.lock:
            return PoolMachine.take(self, now)

    # A lease that ends in its thread may have been severed by close() in that instant.

    def give_back(self, slot: Slot, answered_at: float, now: float) -> Effects:
        """A lease ends and the connection is clean."""
        with self.lock:
            if slot.state is not LEASED:
                return NO_EFFECTS
            effects = PoolMachine.give_back(self, slot, answered_at, now)
            return self._keep_for_loop(effects) if effects else NO_EFFECTS

    def recycle(self, slot: Slot, now: float) -> Effects:
        """A lease ends and the connection needs a rollback or a reset."""
        with self.lock:
            return self._keep_for_loop(super().recycle(slot, now)) if slot.state is LEASED else NO_EFFECTS

    def discard(self, slot: Slot, reason: CloseReason, now: float) -> Effects:
        """A lease ends and the connection cannot be used any more."""
        with self.lock:
            return self._keep_for_loop(super().discard(slot, reason, now)) if slot.state is LEASED else NO_EFFECTS

    def enqueue_unless_exhausted(self, waiter: Waiter, now: float) -> Effects:
        """Like `enqueue`, but refuses if every place is leased, or will be to those who wait already."""
        with self.lock:
            if len(self._leased) + len(self._waiters) >= self.max_size:
                return (Refuse(waiter, Refusal.TOO_MANY_WAITING),)
            return self.enqueue(waiter, now)

    enqueue = _locked(PoolMachine.enqueue)
    withdraw = _locked(PoolMachine.withdraw)
    connected = _locked(PoolMachine.connected)
    connect_failed = _locked(PoolMachine.connect_failed)
    check_passed = _locked(PoolMachine.check_passed)
    check_failed = _locked(PoolMachine.check_failed)
    recycled = _locked(PoolMachine.recycled)
    recycle_failed = _locked(PoolMachine.recycle_failed)
    closed = _locked(PoolMachine.closed)
    disconnected = _locked(PoolMachine.disconnected)
    wake = _locked(PoolMachine.wake)
    open = _locked(PoolMachine.open)
    close = _locked(PoolMachine.close)
    sever = _locked(PoolMachine.sever)
    resize = _locked(PoolMachine.resize)
    drain = _locked(PoolMachine.drain)
    check = _locked(PoolMachine.check)
