"""PoolMachine: who gets which connection, what is connected, checked and closed, and when.

Requests and outcomes come in as method calls, with the time as argument; effects come out. It does no I/O and
looks at no clock. One thread calls it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from operator import attrgetter

from ..config import PoolConfig
from ..events import CloseReason
from .effects import (
    NO_EFFECTS,
    Check,
    Close,
    Closed,
    Connect,
    Effect,
    Effects,
    Opened,
    OpeningFailed,
    Recycle,
    Refusal,
    Refuse,
    WakeAt,
)
from .policy import NEVER, Backoff, ConnectFailure, retirement
from .queue import GroupWaiter, Waiter, WaiterQueue
from .slot import Slot
from .states import LEGAL_MOVES, LEGAL_PHASES, PoolPhase, SlotState

_idle_since = attrgetter("idle_since")
_number = attrgetter("number")  # the order of sets is that of memory: the same inputs are to have the same effects

# What happened to one connection for such a reason may have happened to all of its generation.
_CATCHING = (CloseReason.DISCONNECTED, CloseReason.READ_ONLY)

CONNECTING, IDLE, LEASED, CHECKING, RECYCLING, CLOSING, GONE = SlotState


class IllegalMove(AssertionError):
    """A bug in asyncpool: a life cycle was asked to do what its table forbids."""


class PoolMachine:
    """The pool's decisions. `draw` returns a random float in [0, 1); `is_bound` says of a lease with an owner whether
    nobody else can end it.
    """

    __slots__ = (
        "_backoff",
        "_check_interval",
        "_checking",
        "_closing",
        "_config",
        "_connecting",
        "_draw",
        "_effects",
        "_idle",
        "_is_bound",
        "_leased",
        "_max_idle",
        "_max_uses",
        "_members",
        "_numbers",
        "_recycling",
        "_single_round",
        "_slots",
        "_turned_away",
        "_wake_at",
        "_witness",
        "closes",
        "connect_errors",
        "connects",
        "generation",
        "max_size",
        "min_size",
        "phase",
        "timeouts",
        "unused",
        "uses_of_gone",
        "uses_of_waiters",
        "waiters",
    )

    def __init__(
        self, config: PoolConfig, draw: Callable[[], float], is_bound: Callable[[Slot], bool] = lambda slot: True
    ) -> None:
        self._config = config
        self._draw = draw
        self._is_bound = is_bound
        self.min_size = config.min_size
        self.max_size = config.max_size
        self._check_interval = NEVER if config.check_interval is None else config.check_interval
        self._max_idle = NEVER if config.max_idle is None else config.max_idle
        self._max_uses = NEVER if config.max_uses is None else config.max_uses
        self.phase = PoolPhase.CLOSED
        self.generation = 0
        self._single_round = False
        self._slots: set[Slot] = set()
        self._idle: list[Slot] = []  # sorted by idle_since: the next to be handed out is the last
        self._leased: set[Slot] = set()
        self._connecting: set[Slot] = set()
        self._checking: set[Slot] = set()
        self._recycling: set[Slot] = set()
        self._closing: set[Slot] = set()
        self._members: tuple[set[Slot] | list[Slot], ...] = (
            self._connecting,
            self._idle,
            self._leased,
            self._checking,
            self._recycling,
            self._closing,
        )
        self.waiters = WaiterQueue()
        self._backoff = Backoff(config.backoff_initial, config.backoff_max)
        self._turned_away = 0  # callers for whom the queue is too long, while they are being refused
        self._wake_at = NEVER
        self._witness: Slot | None = None  # a lease whose owner did not wait when that was last asked
        self._effects: list[Effect] = []
        self._numbers = 0
        self.uses_of_gone = 0
        self.uses_of_waiters = 0  # leases that were granted to who stood in the queue; not those that nobody has had
        self.unused = 0  # leases that nobody has had
        self.timeouts = 0
        self.connects = 0
        self.connect_errors = 0
        self.closes: dict[CloseReason, int] = {}

    # --- what can be read -----------------------------------------------------------------------------------

    def count(self, state: SlotState) -> int:
        """How many slots are in this state."""
        return len(self._members[state])

    @property
    def size(self) -> int:
        """How many places are taken, as the server may count them."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """How many callers are in the queue."""
        return len(self.waiters)

    @property
    def acquires(self) -> int:
        """How many leases there have been that somebody has had."""
        return self.uses_of_gone + sum(slot.uses for slot in tuple(self._slots)) - self.unused

    @property
    def immediate(self) -> int:
        """How many of them stood in no queue."""
        return self.acquires - self.uses_of_waiters

    def leases(self) -> list[Slot]:
        """The leased slots, longest held first."""
        return sorted(self._leased, key=lambda slot: slot.leased_at)

    def idle_slots(self) -> list[Slot]:
        """The idle slots, longest idle first."""
        return list(self._idle)

    def slots(self) -> list[Slot]:
        """Every slot."""
        return list(self._slots)

    # --- requests -------------------------------------------------------------------------------------------
    # One that calls another names PoolMachine: who overrides them, to lock them, is asked from outside only.

    def take(self, now: float) -> Slot | None:
        """Lease the connection that was idle for the shortest time, if it may be handed out as it is."""
        if self._idle:
            slot = self._idle[-1]
            if now < slot.fresh_until:
                # `_move` in line: with that in `give_back`, a sixth of the cost of acquire and release.
                self._idle.pop()
                slot.state = LEASED
                self._leased.add(slot)
                slot.leased_at = now
                slot.uses += 1
                if slot.uses >= self._max_uses:
                    self._doom(slot, CloseReason.MAX_USES)
                return slot
        return None

    def enqueue(self, waiter: Waiter, now: float) -> Effects:
        """Put a caller whom `take` could not serve at the end of the queue."""
        if self.phase not in (PoolPhase.OPENING, PoolPhase.OPEN):
            return (Refuse(waiter, Refusal.CLOSED),)
        max_waiting = self._config.max_waiting
        if max_waiting is not None and len(self.waiters) >= max_waiting and not isinstance(waiter, GroupWaiter):
            return self._turn_away(waiter, now)  # a group is counted by those who are in it
        self.waiters.append(waiter)
        deadline = waiter.deadline
        if self._idle or len(self._slots) < self.max_size or deadline <= now:
            self._witness = None
            return self._settle(now)
        # One lease whose owner does not wait is proof that there is no circle, until that owner comes to the queue:
        # so the question costs little, however many wait.
        witness = self._witness
        if (
            witness is None
            or witness.state is not LEASED
            or (witness.owner and witness.owner() is waiter.owner)
            or isinstance(waiter, GroupWaiter)
        ) and self._is_circle():
            self.waiters.discard(waiter)
            return (Refuse(waiter, Refusal.DEADLOCK),)
        if deadline < self._wake_at:
            self._wake_at = deadline
            return (WakeAt(deadline),)
        return NO_EFFECTS

    def joined(self, waiter: Waiter, owner: object) -> bool:
        """One more stands still for a waiter in the queue. Whether that completes a circle, and is to be refused."""
        if waiter not in self.waiters or self._idle or len(self._slots) < self.max_size:
            self._witness = None  # as in `enqueue`: when that is so no longer, the question is to be asked
            return False
        witness = self._witness
        is_proof = witness is not None and witness.state is LEASED and not (witness.owner and witness.owner() is owner)
        return not is_proof and self._is_circle()

    def note_unused(self, *, was_granted: bool) -> None:
        """A lease was none: its connection had ended, or it carries one-shot statements. `was_granted`: to a waiter."""
        self.unused += 1
        self.uses_of_waiters -= was_granted

    def _turn_away(self, waiter: Waiter, now: float) -> Effects:
        """The queue is full: refuse, but grow as for a waiter, so that a later caller finds a connection."""
        self._turned_away = 1
        effects = self._settle(now)
        self._turned_away = 0
        return [*effects, Refuse(waiter, Refusal.TOO_MANY_WAITING)]

    def withdraw(self, waiter: Waiter, now: float) -> Effects:
        """The caller is gone: take it out of the queue; what it was granted already goes to the next one."""
        slot = waiter.slot
        if slot is None:
            self.waiters.discard(waiter)
            return NO_EFFECTS
        PoolMachine.note_unused(self, was_granted=True)
        if slot.state is not LEASED:
            return NO_EFFECTS  # severed meanwhile
        return PoolMachine.give_back(self, slot, slot.verified_at, now)

    def give_back(self, slot: Slot, answered_at: float, now: float) -> Effects:
        """A lease ends and the connection is clean; the server last answered on it at `answered_at`."""
        if slot.state is not LEASED:
            raise IllegalMove(f"give_back of {slot!r}")
        if now >= slot.expires_at:
            return PoolMachine.discard(self, slot, slot.doom, now)
        if len(self._slots) > self.max_size and self._excess() > 0:
            return PoolMachine.discard(self, slot, CloseReason.SHRUNK, now)
        slot.idle_since = now
        slot.verified_at = answered_at
        fresh_until = answered_at + self._check_interval
        slot.fresh_until = fresh_until if fresh_until < slot.expires_at else slot.expires_at  # noqa: FURB136  # min() is slow
        if self.waiters and now < fresh_until and now < slot.retires_at:
            return (self._hand_over(slot, now),)
        self._leased.remove(slot)  # `_move` in line, as in `take`; nobody has been idle for a shorter time
        slot.state = IDLE
        self._idle.append(slot)
        if self.waiters:
            if now >= slot.fresh_until:
                self._start_check(slot)  # also if others are being checked already: it may be here before them
            return self._settle(now)
        if slot.fresh_until < self._wake_at or slot.retires_at < self._wake_at:
            return self._settle(now)
        return NO_EFFECTS

    def recycle(self, slot: Slot, now: float) -> Effects:
        """A lease ends and the connection needs a rollback or a reset before anyone else may have it."""
        if now >= slot.expires_at:
            return PoolMachine.discard(self, slot, slot.doom, now)
        if self._excess() > 0:
            return PoolMachine.discard(self, slot, CloseReason.SHRUNK, now)
        slot.idle_since = now
        self._move(slot, RECYCLING)
        return (Recycle(slot),)

    def discard(self, slot: Slot, reason: CloseReason, now: float) -> Effects:
        """A lease ends and the connection cannot be used any more."""
        if slot.state is not LEASED:
            raise IllegalMove(f"discard of {slot!r}")
        if reason in _CATCHING:
            self._suspect(slot.generation)
        self._close(slot, reason)
        return self._settle(now)

    # --- outcomes -------------------------------------------------------------------------------------------

    def connected(self, slot: Slot, now: float) -> Effects:
        """A connection is there. Ignored if its slot is being closed already: that `Close` sees to it."""
        if slot.state is not CONNECTING:
            return NO_EFFECTS
        self.connects += 1
        self._backoff.succeeded()
        slot.retires_at = retirement(now, self._config.max_lifetime, self._draw())
        slot.expires_at = retirement(now, self._config.max_lifetime, 0.0)
        self._verified(slot, now)
        slot.idle_since = now
        self._move(slot, IDLE)
        self._note_opened()
        return self._settle(now)

    def connect_failed(
        self, slot: Slot, failure: ConnectFailure, now: float, reason: CloseReason | None = None
    ) -> Effects:
        """No connection came of it, and the server counts none for it any more.

        `reason` is why a connection was closed that was there, but not fit for use.
        """
        if slot.state is not CONNECTING:
            return NO_EFFECTS
        self.connect_errors += 1
        if reason is not None:
            self.closes[reason] = self.closes.get(reason, 0) + 1
        self._backoff.failed(failure, now, self._draw())
        self._move(slot, GONE)
        if self.phase is PoolPhase.OPENING and (failure is ConnectFailure.FINAL or self._single_round):
            self._effects.append(OpeningFailed())
        if failure is ConnectFailure.FINAL and not self._usable():
            self._refuse_all(Refusal.CANNOT_CONNECT)
        return self._settle(now)

    def check_passed(self, slot: Slot, now: float) -> Effects:
        """The server answered. Its place among the idle is that of before: a ping is no use."""
        if slot.state is not CHECKING:
            return NO_EFFECTS
        self._verified(slot, now)
        self._move(slot, IDLE)
        return self._settle(now)

    def check_failed(self, slot: Slot, reason: CloseReason, now: float) -> Effects:
        """The connection is dead or useless; the others of its generation may be."""
        if slot.state is not CHECKING:
            return NO_EFFECTS
        self._suspect(slot.generation)
        self._close(slot, reason)
        return self._settle(now)

    def recycled(self, slot: Slot, now: float) -> Effects:
        """The connection is clean again, and the server has answered on it."""
        if slot.state is not RECYCLING:
            return NO_EFFECTS
        self._verified(slot, now)
        self._move(slot, IDLE)
        return self._settle(now)

    def recycle_failed(self, slot: Slot, reason: CloseReason, now: float) -> Effects:
        """The connection could not be cleaned."""
        if slot.state is not RECYCLING:
            return NO_EFFECTS
        if reason in _CATCHING:
            self._suspect(slot.generation)
        self._close(slot, reason)
        return self._settle(now)

    def closed(self, slot: Slot, now: float) -> Effects:
        """The session is over."""
        self._move(slot, GONE)
        return self._settle(now)

    def disconnected(self, slot: Slot, now: float) -> Effects:
        """The server has ended this session. While somebody works on it, the error is theirs to see first."""
        self._suspect(slot.generation)
        if slot.state is IDLE:
            self._close(slot, CloseReason.DISCONNECTED)
        elif slot.state in (LEASED, CHECKING, RECYCLING):
            self._doom(slot, CloseReason.DISCONNECTED)
        return self._settle(now)

    def wake(self, now: float) -> Effects:
        """The time of the last `WakeAt` has come."""
        self._wake_at = NEVER
        return self._settle(now)

    # --- administration -------------------------------------------------------------------------------------

    def open(self, now: float, *, single_round: bool) -> Effects:
        """Start connecting `min_size`. `single_round`: the first failed connect is the answer."""
        self._enter(PoolPhase.OPENING)
        self._single_round = single_round
        self._wake_at = NEVER
        self._backoff.succeeded()
        self._note_opened()
        return self._settle(now)

    def close(self, now: float) -> Effects:
        """Refuse all waiters and close everything but the leases, which close when they are given back."""
        if self.phase in (PoolPhase.CLOSED, PoolPhase.CLOSING):
            return NO_EFFECTS
        self._enter(PoolPhase.CLOSING)
        self._refuse_all(Refusal.CLOSED)
        for slot in sorted(self._slots, key=_number):
            if slot.state is LEASED:
                self._doom(slot, CloseReason.POOL_CLOSED)
            elif slot.state is not CLOSING:
                self._close(slot, CloseReason.POOL_CLOSED)
        return self._settle(now)

    def sever(self, now: float) -> Effects:
        """Close what is still leased while the pool closes."""
        for slot in sorted(self._leased, key=_number):
            self._close(slot, CloseReason.POOL_CLOSED)
        return self._settle(now)

    def resize(self, min_size: int, max_size: int, now: float) -> Effects:
        """Change the bounds. Idle connections in excess close at once, leased ones when given back."""
        self.min_size = min_size
        self.max_size = max_size
        for slot in sorted(self._connecting, key=_number)[: max(0, self._excess())]:
            self._close(slot, CloseReason.SHRUNK)
        self._note_opened()
        return self._settle(now)

    def drain(self, now: float) -> Effects:
        """Replace every connection: idle ones now, leased ones when given back."""
        self.generation += 1
        for slot in sorted(self._slots, key=_number):
            if slot.state in (IDLE, CONNECTING, CHECKING, RECYCLING):
                self._close(slot, CloseReason.DRAINED)
            elif slot.state is LEASED:
                self._doom(slot, CloseReason.DRAINED)
        return self._settle(now)

    def check(self, now: float) -> Effects:
        """Ping every idle connection."""
        for slot in self._idle:
            slot.fresh_until = slot.verified_at = -NEVER
        return self._settle(now)

    # --- the two life cycles --------------------------------------------------------------------------------

    def _move(self, slot: Slot, to: SlotState) -> None:
        """The one place where a slot changes its state, but for the hot moves of `take` and `give_back`, and those of
        LockedMachine's `lend`, `take_back` and mending.
        """
        state = slot.state
        if to not in LEGAL_MOVES[state]:
            raise IllegalMove(f"{slot!r} to {to.name}")
        idle = self._idle
        if state is LEASED:
            self._leased.remove(slot)
        elif state is IDLE and idle[-1] is slot:
            idle.pop()
        else:
            self._members[state].remove(slot)
        slot.state = to
        if to is LEASED:
            self._leased.add(slot)
        elif to is not IDLE:
            self._admit(slot, to)
        elif not idle or idle[-1].idle_since <= slot.idle_since:
            idle.append(slot)
        else:
            insort(idle, slot, key=_idle_since)

    def _admit(self, slot: Slot, state: SlotState) -> None:
        if state is GONE:
            self._slots.remove(slot)
            self.uses_of_gone += slot.uses
        else:
            self._members[state].add(slot)  # type: ignore[union-attr]  # only IDLE's is a list

    def _enter(self, phase: PoolPhase) -> None:
        """The one place where the pool changes its phase."""
        if phase not in LEGAL_PHASES[self.phase]:
            raise IllegalMove(f"pool from {self.phase.name} to {phase.name}")
        self.phase = phase

    def _doom(self, slot: Slot, reason: CloseReason) -> None:
        """Have it closed as soon as nobody holds it."""
        slot.expires_at = -NEVER
        slot.doom = reason

    def _close(self, slot: Slot, reason: CloseReason) -> None:
        self._move(slot, CLOSING)
        self.closes[reason] = self.closes.get(reason, 0) + 1
        self._effects.append(Close(slot, reason))

    def _verified(self, slot: Slot, now: float) -> None:
        slot.verified_at = now
        slot.fresh_until = min(now + self._check_interval, slot.expires_at)

    def _suspect(self, generation: int) -> None:
        """One connection was found dead: no idle one of its generation is handed out before it has answered."""
        self.generation = max(self.generation, generation + 1)
        for slot in self._idle:
            if slot.generation <= generation:
                slot.fresh_until = slot.verified_at = -NEVER

    def _usable(self) -> int:
        return len(self._slots) - len(self._closing) - len(self._connecting)

    def _excess(self) -> int:
        return len(self._slots) - len(self._closing) - self.max_size

    def _note_opened(self) -> None:
        if self.phase is PoolPhase.OPENING and self._usable() >= self.min_size:
            self._enter(PoolPhase.OPEN)
            self._effects.append(Opened())

    # --- what follows from every input ----------------------------------------------------------------------

    def _settle(self, now: float) -> Effects:
        """Derive all that follows from the state as it is now, and hand out the effects gathered so far."""
        if self.phase in (PoolPhase.OPENING, PoolPhase.OPEN):
            self._retire(now)
            self._serve(now)
            self._shrink(now)
            self._check_overdue(now)
            self._grow(now)
            self._refuse_overdue(now)
            self._refuse_deadlocked()
            self._schedule(now)
        elif self.phase is PoolPhase.CLOSING and not self._slots:
            self._enter(PoolPhase.CLOSED)
            self._effects.append(Closed())
        effects, self._effects = self._effects, []
        return effects

    def _retire(self, now: float) -> None:
        """Close idle connections that nobody may have any more, and replace those whose time has come."""
        for slot in self._idle[:]:
            if now >= slot.expires_at:
                self._close(slot, slot.doom)
        for slot in self._idle[: max(0, self._excess())]:
            self._close(slot, CloseReason.SHRUNK)
        for slot in self._retiring(now):
            # Its replacement comes first where the size allows; at max_size one at a time makes room.
            full = len(self._slots) >= self.max_size and not (self._closing or self._connecting)
            if self._usable() > self.min_size or (full and not self._backoff.failing):
                self._close(slot, CloseReason.MAX_LIFETIME)

    def _shrink(self, now: float) -> None:
        """Close connections above `min_size` that nobody has used for `max_idle`."""
        for slot in self._idle[:]:
            if self._usable() <= self.min_size or now < slot.idle_since + self._max_idle:
                break
            self._close(slot, CloseReason.MAX_IDLE)

    def _retiring(self, now: float) -> list[Slot]:
        return [slot for slot in self._idle if now >= slot.retires_at]

    def _serve(self, now: float) -> None:
        """Give idle connections to waiters; send stale ones to be checked, no more than waiters need."""
        fresh = [slot for slot in self._idle if now < slot.fresh_until or slot.verified_at == now]
        while self.waiters and fresh:
            slot = fresh.pop()
            self._move(slot, LEASED)
            self._effects.append(self._hand_over(slot, now))
        for slot in self._idle[::-1]:
            if len(self.waiters) <= self._coming():
                break
            self._start_check(slot)

    def _hand_over(self, slot: Slot, now: float) -> Waiter:
        """Ownership changes before the waiter is woken: one that is cancelled meanwhile withdraws."""
        slot.owner = None  # until it is known: whoever was granted a lease does not wait
        waiter = self.waiters.pop_first()
        waiter.slot = slot
        slot.leased_at = now
        slot.uses += 1
        self.uses_of_waiters += 1
        if slot.uses >= self._max_uses:
            self._doom(slot, CloseReason.MAX_USES)
        return waiter

    def _coming(self) -> int:
        """How many connections are on their way to the idle ones."""
        return len(self._connecting) + len(self._checking) + len(self._recycling)

    def _start_check(self, slot: Slot) -> None:
        self._move(slot, CHECKING)
        self._effects.append(Check(slot))

    def _check_overdue(self, now: float) -> None:
        """Ping idle connections in the background when the server has not answered for `check_interval`."""
        if self._check_interval == 0:
            suspects = [slot for slot in self._idle if slot.verified_at == -NEVER]
        else:
            suspects = [slot for slot in self._idle if now >= slot.fresh_until]
        for slot in suspects:
            self._start_check(slot)

    def _wanted(self, now: float) -> int:
        """How many connects the waiters, `min_size` and retirements ask for."""
        for_waiters = len(self.waiters) + self._turned_away - self._coming()
        for_min_size = self.min_size - (len(self._slots) - len(self._closing))
        for_retirement = 1 if not self._connecting and self._to_replace(now) > 0 else 0
        return max(for_waiters, for_min_size, for_retirement)

    def _to_replace(self, now: float) -> int:
        """How many retire, or will when they are given back, perhaps past `max_lifetime`, and have no replacement.

        Less than 0 if there are more replacements than that.
        """
        retiring = sum(now >= slot.retires_at for members in (self._idle, self._leased) for slot in members)
        return retiring - max(0, self._usable() - self.min_size)

    def _grow(self, now: float) -> None:
        at_once = 1 if self._backoff.failing else self._config.max_connecting
        if now < self._backoff.not_before:
            return
        room = min(self.max_size - len(self._slots), at_once - len(self._connecting))
        for _ in range(min(self._wanted(now), room)):
            self._numbers += 1
            slot = Slot(self._numbers, self.generation)
            self._slots.add(slot)
            self._connecting.add(slot)
            self._effects.append(Connect(slot))

    # --- deadlines ------------------------------------------------------------------------------------------

    def _refuse_overdue(self, now: float) -> None:
        for waiter, position in self.waiters.pop_overdue(now):
            self.timeouts += 1
            self._effects.append(Refuse(waiter, Refusal.TIMEOUT, position))

    def _refuse_all(self, refusal: Refusal) -> None:
        self._effects.extend(Refuse(waiter, refusal) for waiter in self.waiters)
        self.waiters.clear()

    # --- deadlock -------------------------------------------------------------------------------------------

    def _is_circle(self) -> bool:
        """Whether every place is the lease of a block whose owner waits. If not so, a lease that shows it is noted."""
        self._witness = None
        if len(self._leased) < len(self._slots):
            return False  # one is on its way
        waiting: set[int] | None = None  # not gathered if the first lease answers
        for slot in self._leased:
            if slot.owner is None or not self._is_bound(slot):
                self._witness = slot
                return False
            if waiting is None:
                waiting = {id(owner) for waiter in self.waiters for owner in waiter.owners()}
            if id(slot.owner()) not in waiting:
                self._witness = slot
                return False
        return True

    def _refuse_deadlocked(self) -> None:
        """Fewer places, and no newcomer, can complete a circle too: then the last to have come is refused."""
        if not self.waiters or len(self._slots) < self.max_size:
            return
        if (self._witness is None or self._witness.state is not LEASED) and self._leased and self._is_circle():
            owners = {id(slot.owner()) for slot in self._leased if slot.owner is not None}
            waiter = next(
                waiter for waiter in reversed(self.waiters) if any(id(owner) in owners for owner in waiter.owners())
            )
            self.waiters.discard(waiter)
            self._effects.append(Refuse(waiter, Refusal.DEADLOCK))

    def _schedule(self, now: float) -> None:
        """Ask to be woken when the next thing is due. An earlier wake-up that stands already is left alone."""
        when = min(self._due_times(now))
        if when < self._wake_at:
            self._wake_at = when
            self._effects.append(WakeAt(when))

    def _due_times(self, now: float) -> Iterator[float]:
        yield self.waiters.next_deadline()
        if self._backoff.not_before > now and self._wanted(now) > 0:
            yield self._backoff.not_before
        for slot in self._idle:
            yield min(slot.retires_at, slot.expires_at) if slot.retires_at > now else slot.expires_at
            if self._check_interval > 0:
                yield slot.fresh_until
        if self._idle and self._usable() > self.min_size:
            yield self._idle[0].idle_since + self._max_idle
        yield from (slot.retires_at for slot in self._leased if slot.retires_at > now)
        if self._leased:
            # A connection that comes back to idle asks for no wake-up on account of `max_idle`, to keep that path
            # short: look again when the first could be due.
            yield now + self._max_idle
