"""PoolMachine for several threads: one lock, and what the event loop has to do in the order in which it was decided."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import CodeType
from typing import Any, Concatenate, ParamSpec

from .._core.effects import NO_EFFECTS, Effect, Effects, Refusal, Refuse
from .._core.machine import PoolMachine
from .._core.queue import Waiter
from .._core.slot import Slot
from .._core.states import SlotState
from ..config import PoolConfig
from ..events import CloseReason
from .session import NOT_LEASED, Session

P = ParamSpec("P")

IDLE, LEASED = SlotState.IDLE, SlotState.LEASED


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
            return self._keep_for_loop(method(self, *args, **kwargs))

    call.__doc__ = method.__doc__
    return call


class LockedMachine(PoolMachine):
    """Any thread may call it, and may wake or refuse the waiters that it returns; all other effects go into `for_loop`
    as well, from which the event loop takes them. The lock is never held across I/O or a callback.
    """

    def __init__(self, config: PoolConfig, draw: Callable[[], float]) -> None:
        super().__init__(config, draw)
        self.lock = threading.RLock()  # the machine's methods call each other
        self.for_loop: deque[Effect] = deque()

    def _keep_for_loop(self, effects: Effects) -> Effects:
        for effect in effects:
            if type(effect) is not ThreadWaiter and type(effect) is not Refuse:
                self.for_loop.append(effect)
        return effects

    # --- the hot path ---------------------------------------------------------------------------------------
    # These do what `take` and `give_back` do, for the common case and in one call: each further one is a tenth of the
    # whole cost.

    def lend(self, now: float, alive_since: float, code: CodeType, offset: int) -> Any:
        """Lease the connection that was idle for the shortest time, to a caller at this place of the code. None if
        there is none, or it may not be handed out as it is, or is not known to have been alive since then.
        """
        try:
            self.lock.acquire()  # a `with` costs twice as much; in front of the `try`, Ctrl-C could leave it locked
            idle = self._idle
            if not idle:
                return None
            slot = idle[-1]
            session: Session = slot.resource  # type: ignore[assignment]  # an object to PoolMachine, which never looks
            if now >= slot.fresh_until or session.alive_at < alive_since or session.touched:
                return None
            idle.pop()
            slot.state = LEASED
            self._leased.add(slot)
            slot.leased_at = now
            slot.uses = session.lease = uses = slot.uses + 1
            if uses >= self._max_uses:
                self._doom(slot, CloseReason.MAX_USES)
            session.site_code = code
            session.site_offset = offset
            connection = session.connection
            session.connection = None
            return connection
        finally:
            try:  # noqa: SIM105  # slow
                self.lock.release()
            except RuntimeError:
                pass  # Ctrl-C came before it was acquired

    def take_back(self, connection: Any, session: Session, now: float) -> ThreadWaiter | bool:
        """End the lease of a clean connection. False, and nothing done, if there is more to it: see `give_back`.
        Otherwise True, or the waiter that has got the connection and is to be woken.
        """
        try:
            self.lock.acquire()  # as in `lend`
            slot: Slot = session.slot  # type: ignore[assignment]  # it has one while it is leased
            answered_at = session.reader.answered_at
            fresh_until = answered_at + self._check_interval
            if (
                slot.state is not LEASED
                or now >= slot.retires_at
                or now >= slot.expires_at
                or now >= fresh_until
                or fresh_until < self._wake_at
                or len(self._slots) > self.max_size
                or session.held_warned
            ):
                return False
            session.lease = NOT_LEASED
            session.connection = connection
            slot.idle_since = now
            slot.verified_at = answered_at
            slot.fresh_until = fresh_until if fresh_until < slot.expires_at else slot.expires_at  # noqa: FURB136
            if self.waiters:
                return self._hand_over(slot, now)  # type: ignore[return-value]  # all waiters are of that class here
            self._leased.remove(slot)
            slot.state = IDLE
            self._idle.append(slot)
            return True
        finally:
            try:  # noqa: SIM105  # slow
                self.lock.release()
            except RuntimeError:
                pass  # Ctrl-C came before it was acquired

    # --- requests -------------------------------------------------------------------------------------------

    def lend_granted(self, slot: Slot) -> Any:
        """The connection that a waiter was granted. None if close() has severed it since."""
        with self.lock:
            if slot.state is not LEASED:
                return None
            session: Session = slot.resource  # type: ignore[assignment]  # as in `lend`
            connection = session.connection
            session.connection = None
            session.lease = slot.uses
            return connection

    def enqueue_unless_exhausted(self, waiter: Waiter, now: float) -> Effects:
        """Like `enqueue`, but refuses if every place is leased, or will be to those who wait already."""
        with self.lock:
            if len(self._leased) + len(self.waiters) >= self.max_size:
                return (Refuse(waiter, Refusal.TOO_MANY_WAITING),)
            return self.enqueue(waiter, now)

    # A lease that ends in its thread may have been severed by close() in that instant.

    def give_back(self, slot: Slot, answered_at: float, now: float) -> Effects:
        """A lease ends and the connection is clean."""
        with self.lock:
            if slot.state is not LEASED:
                return NO_EFFECTS
            return self._keep_for_loop(super().give_back(slot, answered_at, now))

    def recycle(self, slot: Slot, now: float) -> Effects:
        """A lease ends and the connection needs a rollback or a reset."""
        with self.lock:
            return self._keep_for_loop(super().recycle(slot, now)) if slot.state is LEASED else NO_EFFECTS

    def discard(self, slot: Slot, reason: CloseReason, now: float) -> Effects:
        """A lease ends and the connection cannot be used any more."""
        with self.lock:
            return self._keep_for_loop(super().discard(slot, reason, now)) if slot.state is LEASED else NO_EFFECTS

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
