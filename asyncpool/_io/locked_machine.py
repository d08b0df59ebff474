"""PoolMachine for several threads: one lock, and what the event loop has to do in the order in which it was decided."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from .._core.effects import NO_EFFECTS, Check, Close, Connect, Effect, Effects, Recycle, Refusal, Refuse
from .._core.machine import PoolMachine
from .._core.policy import NEVER, ConnectFailure
from .._core.queue import Waiter
from .._core.slot import Slot
from .._core.states import SlotState
from ..config import PoolConfig
from ..events import CloseReason
from ..histogram import SHORTEST, Durations
from .session import NOT_LEASED, SEVERED, Session

P = ParamSpec("P")

IDLE, LEASED = SlotState.IDLE, SlotState.LEASED


class ThreadOwner:
    """Stands for a thread, alone of its kind as long as somebody holds it: a thread's ident is another's after it."""

    def __init__(self) -> None:
        self._ident = threading.get_ident()

    def __call__(self) -> ThreadOwner:
        """Itself, as a `Slot.owner` is asked."""
        return self

    def __str__(self) -> str:
        names = [thread.name for thread in threading.enumerate() if thread.ident == self._ident]
        return f"thread {names[0]!r}" if names else "a thread that has ended"


class _Current(threading.local):
    def __init__(self) -> None:
        self.owner = ThreadOwner()


current = _Current()


class ThreadWaiter(Waiter):
    """A thread in the queue. It is woken with a slot or a refusal."""

    __slots__ = ("_gate", "began", "position", "refusal", "wants_errors")

    def __init__(self, deadline: float, began: float, *, wants_errors: bool = False) -> None:
        self.deadline = deadline
        self.owner = current.owner
        self.slot = None
        self.began = began
        self.refusal: Refusal | None = None
        self.position = 0  # in the queue, when it was refused
        self.wants_errors = wants_errors  # it is refused as soon as a connect fails
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self) -> None:
        """Wait until `wake`. Ctrl-C is raised from here."""
        self._gate.acquire()

    def wake(self) -> None:
        """Let the thread go on, if it was not woken before."""
        with contextlib.suppress(RuntimeError):
            self._gate.release()


# How many calls deep a decision can get, with what leads to it and what brings its effects to the event loop.
_STACK = 30


def ensure_stack() -> None:
    """Raise RecursionError now, when nothing has been changed, if what follows might meet the limit half-way."""
    try:
        # On Python 3.11 calls of C functions count as well, of which there may be two to a frame.
        sys._getframe(sys.getrecursionlimit() // 3)
    except ValueError:
        return  # there are not that many
    reach(_STACK)


def reach(depth: int) -> None:
    """Call so deep, to see whether it is possible."""
    if depth:
        reach(depth - 1)


def _locked(
    method: Callable[Concatenate[PoolMachine, P], Effects],
) -> Callable[Concatenate[LockedMachine, P], Effects]:
    def call(self: LockedMachine, /, *args: P.args, **kwargs: P.kwargs) -> Effects:
        with self.lock:  # nothing is returned in here: Ctrl-C at the end of a call in `return` would leave it locked
            if self._deciding:
                effects = self._postpone(partial(method, self, *args, **kwargs), args[0] if args else None)
            else:
                self._deciding = True
                try:
                    effects = self._divide(method(self, *args, **kwargs))
                    self._deciding = False
                except BaseException:
                    self._mend()
                    raise
        return effects

    call.__doc__ = method.__doc__
    return call


_WORK: dict[SlotState, Callable[[Slot], Effect]] = {
    SlotState.CONNECTING: Connect,
    SlotState.CHECKING: Check,
    SlotState.RECYCLING: Recycle,
    SlotState.CLOSING: lambda slot: Close(slot, slot.doom),
}


class LockedMachine(PoolMachine):
    """Any thread may call it. It wakes waiters itself; the effects that it returns have been put into `for_loop`, from
    which the event loop takes them in the order of the decisions. The lock is never held across I/O or a callback.

    Two things may strike in the midst of a decision. After either, `on_disturbed` is called, which has to see to it
    that the event loop calls `carry_out_postponed` and `find_lost`.

    An exception that is no decision's own: Ctrl-C in the main thread, a lack of memory. Then everything is put where
    its state says.

    The garbage collector, which may run a finalizer that gives a connection back, in the thread that holds the lock.
    What it asks for is postponed; `lend` and `take_back` find nothing that they could do. Who would wait there is to
    be refused before.
    """

    def __init__(
        self,
        config: PoolConfig,
        draw: Callable[[], float],
        is_bound: Callable[[Slot], bool],
        on_disturbed: Callable[[], None],
    ) -> None:
        super().__init__(config, draw, is_bound)
        self.lock = threading.RLock()  # a finalizer's call must not wait for its own thread
        self._deciding = False  # whether who holds the lock is half-way
        self._postponed: deque[tuple[Callable[[], Effects], Slot | None, int]] = deque()
        self.for_loop: deque[Effect] = deque()
        self._on_disturbed = on_disturbed
        self.holds = Durations()

    def _divide(self, effects: Effects) -> Effects:
        for effect in effects:
            if type(effect) is ThreadWaiter:
                effect.wake()
            elif type(effect) is Refuse and isinstance(effect.waiter, ThreadWaiter):
                waiter = effect.waiter
                waiter.refusal, waiter.position = effect.refusal, effect.position
                waiter.wake()
            else:
                self.for_loop.append(effect)
        return effects

    def _hand_over(self, slot: Slot, now: float) -> Waiter:
        session: Session = slot.resource  # type: ignore[assignment]  # an object to PoolMachine, which never looks
        session.granted_to = next(iter(self.waiters)), slot.uses + 1
        return super()._hand_over(slot, now)

    def _postpone(self, decide: Callable[[], Effects], subject: object) -> Effects:
        slot = subject if isinstance(subject, Slot) else None
        self._postponed.append((decide, slot, slot.uses if slot is not None else 0))
        self._on_disturbed()
        return NO_EFFECTS

    def _mend(self) -> None:
        self._deciding = True
        try:
            self._put_right()
        finally:
            self._deciding = False
            self._on_disturbed()

    def _put_right(self) -> None:
        """Put every slot where its state says; a connection that was about to be lent is idle again."""
        self._divide(self._effects)
        self._effects = []
        for slot in tuple(self._slots):
            session = slot.resource
            if slot.state in (IDLE, LEASED) and isinstance(session, Session):
                self._mend_lease(slot, session)
            for state, members in zip(SlotState, self._members, strict=False):
                if slot in members and state is not slot.state:
                    members.remove(slot)
                elif slot not in members and state is slot.state:
                    members.append(slot) if isinstance(members, list) else members.add(slot)
            if slot.state is SlotState.GONE:
                self._admit(slot, SlotState.GONE)
        self._idle.sort(key=lambda slot: slot.idle_since)

    def _mend_lease(self, slot: Slot, session: Session) -> None:
        waiter, uses = session.granted_to or (None, 0)
        if waiter is not None and waiter not in self.waiters:
            slot.state = LEASED
            slot.uses = uses
            waiter.slot = slot
            self._divide((waiter,))
            return
        session.granted_to = None
        being_lent = session.lease == slot.uses and session.connection is not None
        self.unused += being_lent
        if being_lent or (slot not in self._leased and slot not in self._idle):
            slot.state = IDLE
            session.lease = NOT_LEASED

    # --- the hot path ---------------------------------------------------------------------------------------
    # These do what `take` and `give_back` do, for the common case and in one call: each further one is a tenth of the
    # whole cost.

    def lend(self, now: float, alive_since: float, code: CodeType, offset: int) -> Any:
        """Lease the connection that was idle for the shortest time, to a caller at this place of the code. None if
        there is none, or it may not be handed out as it is, or is not known to have been alive since then.
        """
        owner = current.owner
        mine = False
        try:
            self.lock.acquire()  # a `with` costs twice as much; in front of the `try`, Ctrl-C could leave it locked
            idle = self._idle
            if not idle or self._deciding:
                return None
            slot = idle[-1]
            session: Session = slot.resource  # type: ignore[assignment]  # an object to PoolMachine, which never looks
            if now >= slot.fresh_until or session.alive_at < alive_since or session.touched:
                return None
            mine = self._deciding = True
            slot.uses = session.lease = uses = slot.uses + 1  # first, so that `_mend_lease` knows what is going on
            idle.pop()
            slot.state = LEASED
            self._leased.add(slot)
            slot.owner = None
            slot.leased_at = now
            if uses >= self._max_uses:
                slot.expires_at = -NEVER  # `_doom` in line: at the recursion limit, no call may fail here
                slot.doom = CloseReason.MAX_USES
            session.site_code = code
            session.site_offset = offset
            session.holder = owner
            connection = session.connection
            session.connection = None
            self._deciding = False
            return connection
        except BaseException:
            if mine:
                self._deciding = False
                self._mend()
            raise
        finally:
            try:  # noqa: SIM105  # slow
                self.lock.release()
            except RuntimeError:
                pass  # Ctrl-C came before it was acquired

    def take_back(self, connection: Any, session: Session, lease: int, now: float) -> bool:
        """End that lease of a clean connection. False, and nothing done, if there is more to it: see `give_back`."""
        mine = False
        try:
            self.lock.acquire()  # as in `lend`
            slot: Slot = session.slot  # type: ignore[assignment]  # it has one while it is leased
            answered_at = session.reader.answered_at
            fresh_until = answered_at + self._check_interval
            if (
                slot.state is not LEASED
                or session.lease != lease  # somebody else has given it back in this instant
                or now >= slot.retires_at
                or now >= slot.expires_at
                or now >= fresh_until
                or fresh_until < self._wake_at
                or slot.retires_at < self._wake_at
                or len(self._slots) > self.max_size
                or session.is_noted
                or self._deciding
            ):
                return False
            held = now - slot.leased_at
            waiters = self.waiters
            if waiters or held > SHORTEST:
                ensure_stack()  # what is called then calls others
            mine = self._deciding = True  # so that no finalizer changes the queue while one looks at it
            if waiters and type(next(iter(waiters))) is not ThreadWaiter:
                mine = self._deciding = False
                return False  # the event loop is to be told
            session.lease = NOT_LEASED
            session.connection = connection
            slot.idle_since = now
            slot.verified_at = answered_at
            slot.fresh_until = fresh_until if fresh_until < slot.expires_at else slot.expires_at  # noqa: FURB136
            if waiters:
                self._hand_over(slot, now).wake()  # type: ignore[attr-defined]  # a ThreadWaiter
            else:
                self._leased.remove(slot)
                slot.state = IDLE
                self._idle.append(slot)
            self._deciding = False
            if held > SHORTEST:
                self.holds.record(held)
            return True
        except BaseException:
            if mine:
                self._deciding = False
                self._mend()
            raise
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
            session.connection = session.granted_to = None
            session.lease = slot.uses
            return connection

    def take(self, now: float) -> Slot | None:
        """Lease the connection that was idle for the shortest time, to the pool itself."""
        with self.lock:
            return super().take(now)

    def note_unused(self, *, was_granted: bool) -> None:
        """A lease was none."""
        with self.lock:
            super().note_unused(was_granted=was_granted)

    def joined(self, waiter: Waiter, owner: object) -> bool:
        """Whether one more who stands still for a waiter completes a circle."""
        with self.lock:
            return super().joined(waiter, owner)

    def _enqueue_unless_exhausted(self: PoolMachine, waiter: Waiter, now: float) -> Effects:
        """Like `enqueue`, but refuses if every place is leased, or will be to those who wait already."""
        if len(self._leased) + len(self.waiters) >= self.max_size:
            return (Refuse(waiter, Refusal.TOO_MANY_WAITING),)
        return PoolMachine.enqueue(self, waiter, now)

    def _connect_failed(
        self: PoolMachine, slot: Slot, failure: ConnectFailure, now: float, reason: CloseReason | None = None
    ) -> Effects:
        """No connection came of it."""
        effects = PoolMachine.connect_failed(self, slot, failure, now, reason)
        refused = [waiter for waiter in self.waiters if isinstance(waiter, ThreadWaiter) and waiter.wants_errors]
        for waiter in refused:
            self.waiters.discard(waiter)
        return [*effects, *(Refuse(waiter, Refusal.CANNOT_CONNECT) for waiter in refused)]

    def _withdraw(self: PoolMachine, waiter: Waiter, now: float) -> Effects:
        """The caller is gone, perhaps with the connection in its hands."""
        slot = waiter.slot
        if slot is not None and slot.state is LEASED and isinstance(slot.resource, Session):
            session = slot.resource
            session.granted_to = None
            if session.connection is None:  # Ctrl-C came at the end of `lend_granted`
                session.connection = session.reference() if session.reference is not None else None
                session.lease = NOT_LEASED
                if session.connection is None:
                    PoolMachine.note_unused(self, was_granted=True)
                    return PoolMachine.discard(self, slot, CloseReason.LEASE_LOST, now)
        return PoolMachine.withdraw(self, waiter, now)

    # A lease that ends in its thread may have been severed by close() in that instant.

    def _give_back(self: PoolMachine, slot: Slot, answered_at: float, now: float) -> Effects:
        """A lease ends and the connection is clean."""
        return PoolMachine.give_back(self, slot, answered_at, now) if slot.state is LEASED else NO_EFFECTS

    def _recycle(self: PoolMachine, slot: Slot, now: float) -> Effects:
        """A lease ends and the connection needs a rollback or a reset."""
        return PoolMachine.recycle(self, slot, now) if slot.state is LEASED else NO_EFFECTS

    def _discard(self: PoolMachine, slot: Slot, reason: CloseReason, now: float) -> Effects:
        """A lease ends and the connection cannot be used any more."""
        return PoolMachine.discard(self, slot, reason, now) if slot.state is LEASED else NO_EFFECTS

    # --- what the event loop calls --------------------------------------------------------------------------

    def carry_out_postponed(self) -> None:
        """Decide what finalizers have asked for in the midst of other decisions."""
        while self._postponed:
            decide, slot, uses = self._postponed.popleft()
            if slot is None or slot.uses == uses:  # else Ctrl-C came too, and the lease was ended for good
                self._carry_out(decide)

    def _decide(self: PoolMachine, decide: Callable[[], Effects]) -> Effects:
        return decide()

    def _find_lost(self: PoolMachine, under_way: Iterable[Slot]) -> Effects:
        """Work that was decided and is not under way: its effects were swallowed."""
        assert isinstance(self, LockedMachine)
        self._put_right()
        to_start = {*under_way, *(getattr(effect, "slot", None) for effect in self.for_loop)}
        return [_WORK[slot.state](slot) for slot in self._slots if slot not in to_start and slot.state in _WORK]

    def _sever(self: PoolMachine, now: float) -> Effects:
        """Close what is still leased while the pool closes. No thread can use it any more."""
        for slot in self.leases():
            assert isinstance(slot.resource, Session)
            slot.resource.lease = SEVERED
            slot.resource.touched = True
        return PoolMachine.sever(self, now)

    _carry_out = _locked(_decide)
    find_lost = _locked(_find_lost)
    enqueue_unless_exhausted = _locked(_enqueue_unless_exhausted)

    if not TYPE_CHECKING:  # their signatures are PoolMachine's
        give_back = _locked(_give_back)
        recycle = _locked(_recycle)
        discard = _locked(_discard)
        enqueue = _locked(PoolMachine.enqueue)
        withdraw = _locked(_withdraw)
        connected = _locked(PoolMachine.connected)
        connect_failed = _locked(_connect_failed)
        check_passed = _locked(PoolMachine.check_passed)
        check_failed = _locked(PoolMachine.check_failed)
        recycled = _locked(PoolMachine.recycled)
        recycle_failed = _locked(PoolMachine.recycle_failed)
        closed = _locked(PoolMachine.closed)
        disconnected = _locked(PoolMachine.disconnected)
        wake = _locked(PoolMachine.wake)
        open = _locked(PoolMachine.open)
        close = _locked(PoolMachine.close)
        sever = _locked(_sever)
        resize = _locked(PoolMachine.resize)
        drain = _locked(PoolMachine.drain)
        check = _locked(PoolMachine.check)
