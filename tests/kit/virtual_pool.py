"""A pool in virtual time: the machine, a clock, and the world that its effects ask for, which a test plays.

After every step everything that must hold is checked (`kit.invariants`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncpool._core.effects import (
    Check,
    Close,
    Closed,
    Connect,
    Opened,
    OpeningFailed,
    Recycle,
    Refusal,
    Refuse,
    WakeAt,
)
from asyncpool._core.machine import PoolMachine
from asyncpool._core.policy import NEVER, ConnectFailure
from asyncpool._core.queue import GroupWaiter, Waiter
from asyncpool._core.slot import Slot
from asyncpool.config import PoolConfig
from asyncpool.events import CloseReason
from kit import invariants
from kit.invariants import CHECKING, CLOSING, CONNECTING, GONE, IDLE, RECYCLING, History

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self, Unpack

    from asyncpool._core.effects import Effect, Effects
    from asyncpool._core.states import SlotState
    from asyncpool.options import CommonOptions

WORK: dict[type[Effect], SlotState] = {
    Connect: CONNECTING,
    Check: CHECKING,
    Recycle: RECYCLING,
    Close: CLOSING,
}

# What was found wrong with one connection may be wrong with all that are as old.
CATCHING = (CloseReason.DISCONNECTED, CloseReason.READ_ONLY)


@dataclass
class VirtualPool:
    """A machine and its world. What a caller holds is its `Waiter`; work in flight ends when the test says so."""

    config: PoolConfig
    draw: Callable[[], float] = lambda: 0.5
    now: float = 1000.0
    wake_at: float = NEVER
    work: dict[Slot, SlotState] = field(default_factory=dict)
    superseded: dict[Slot, SlotState] = field(default_factory=dict)  # its outcome may still come, until the close's
    queue: list[Waiter] = field(default_factory=list)
    held: dict[Waiter, Slot] = field(default_factory=dict)
    blocks: set[Waiter] = field(default_factory=set)  # whose lease only their owner will end
    members: dict[Waiter, list[object]] = field(default_factory=dict)  # of groups: who stands still for each
    severed: list[Waiter] = field(default_factory=list)  # find their connection shut down
    refused: dict[Waiter, Refusal] = field(default_factory=dict)
    histories: dict[Slot, History] = field(default_factory=dict)
    numbers: set[int] = field(default_factory=set)  # of all slots ever
    effects: Effects = ()  # of the last step
    closes: Counter[CloseReason] = field(default_factory=Counter)
    refusals: Counter[Refusal] = field(default_factory=Counter)
    leases: int = 0
    connects: int = 0
    late_outcomes: int = 0
    told_late: bool = False
    was_opened: bool = False
    opened: int = 0
    opening_failed: int = 0
    closed: int = 0
    wakes: int = 0
    size_before: int = 0
    machine: PoolMachine = field(init=False)

    def __post_init__(self) -> None:
        self.machine = PoolMachine(self.config, self.draw)

    # --- what the machine says ------------------------------------------------------------------------------

    def count(self, state: SlotState) -> int:
        return self.machine.count(state)

    def slots(self, state: SlotState) -> list[Slot]:
        """Oldest first; idle ones in the machine's order."""
        if state is IDLE:
            return self.machine.idle_slots()
        return in_order(slot for slot in self.machine.slots() if slot.state is state)

    def emitted(self, kind: type[Effect]) -> int:
        """How many effects of this kind the last step had."""
        return sum(isinstance(effect, kind) for effect in self.effects)

    def emitted_closes(self) -> list[Close]:
        """What the last step closed."""
        return [effect for effect in self.effects if isinstance(effect, Close)]

    # --- callers --------------------------------------------------------------------------------------------

    def acquire(self, timeout: float | None = None, owner: object = None, *, in_block: bool = False) -> Waiter:
        """A caller asks for a connection, and is served, queued or refused."""
        waiter = Waiter(NEVER if timeout is None else self.now + timeout, owner)
        if in_block:
            self.blocks.add(waiter)
        self._ask(waiter)
        return waiter

    def acquire_for(self, *members: object) -> GroupWaiter:
        """Many ask for one connection together, and have one place in the queue."""
        waiter = GroupWaiter(NEVER, lambda: self.members[waiter])
        self.members[waiter] = list(members)
        self._ask(waiter)
        return waiter

    def join(self, group: GroupWaiter, owner: object) -> bool:
        """One more asks for the connection of a group. Whether it may not."""
        self.members[group].append(owner)
        is_refused = self.machine.joined(group, owner)
        if is_refused:
            assert invariants.is_circle(self), "a false alarm"
            self.members[group].remove(owner)
        self._step(())
        return is_refused

    def leave(self, group: GroupWaiter, owner: object) -> None:
        """One of a group does not wait any more."""
        self.members[group].remove(owner)

    def owners(self, waiter: Waiter) -> list[object]:
        """Who stands still for this place in the queue."""
        return self.members.get(waiter, [waiter.owner])

    def _ask(self, waiter: Waiter) -> None:
        newest = max((self.histories[slot].free_since for slot in self.slots(IDLE)), default=-NEVER)
        slot = self.machine.take(self.now)
        if slot is None:
            self.queue.append(waiter)
            self._step(self.machine.enqueue(waiter, self.now))
        else:
            assert self.histories[slot].free_since == newest, "not the one that was idle for the shortest time"
            waiter.slot = slot
            self._hand_out(waiter, slot)
            self._step(())

    def cancel(self, waiter: Waiter) -> None:
        """The caller is gone, in the queue or just after its grant."""
        if waiter in self.queue:
            self.queue.remove(waiter)
        slot = self.held.pop(waiter, None)
        if slot is not None:
            self.histories[slot].free_since = self.now
        self.leases -= waiter.slot is not None  # nobody has had it
        self._step(self.machine.withdraw(waiter, self.now))

    def release(self, waiter: Waiter, answered_at: float | None = None) -> None:
        """A clean connection comes back; the server answered on it just now, or then."""
        slot = self._end_lease(waiter)
        answered_at = self.now if answered_at is None else answered_at
        history = self.histories[slot]
        history.answered_at = max(history.answered_at, answered_at)
        self._step(self.machine.give_back(slot, history.answered_at, self.now))

    def release_dirty(self, waiter: Waiter) -> None:
        """A connection comes back that wants a rollback."""
        self._step(self.machine.recycle(self._end_lease(waiter), self.now))

    def discard(self, waiter: Waiter, reason: CloseReason = CloseReason.RETURNED_BUSY) -> None:
        """A connection comes back that nobody can use."""
        slot = self._end_lease(waiter)
        if reason in CATCHING:
            self._suspect(slot.generation)
        self._step(self.machine.discard(slot, reason, self.now))

    def _end_lease(self, waiter: Waiter) -> Slot:
        slot = self.held.pop(waiter)
        self.histories[slot].free_since = self.now
        return slot

    def _hand_out(self, waiter: Waiter, slot: Slot) -> None:
        history = self.histories[slot]
        history.leases += 1
        self.leases += 1
        invariants.check_hand_out(self, slot, history)
        assert slot not in self.held.values(), "owned twice"
        self.held[waiter] = slot
        slot.owner = (lambda: waiter.owner) if waiter in self.blocks else None  # as its caller does, when it runs

    # --- outcomes -------------------------------------------------------------------------------------------

    def _end_work(self, slot: Slot | None, state: SlotState) -> Slot:
        """The slot, by default the oldest in this state, whose outcome is about to be told."""
        if slot is None:
            slot = self.slots(state)[0]
        if self.work[slot] is state:
            del self.work[slot]
        else:
            assert self.superseded.pop(slot) is state, "the test tells an outcome of work that nobody does"
            self.late_outcomes += 1
            self.told_late = True
        return slot

    def connect(self, slot: Slot | None = None) -> Slot:
        """This connect succeeds, by default the oldest. The other outcomes are told in the same way."""
        slot = self._end_work(slot, CONNECTING)
        history = self.histories[slot]
        if slot.state is CONNECTING:
            self.connects += 1
            history.born = history.answered_at = history.free_since = self.now
        self._step(self.machine.connected(slot, self.now))
        return slot

    def fail_connect(
        self,
        failure: ConnectFailure = ConnectFailure.TRANSIENT,
        slot: Slot | None = None,
        reason: CloseReason | None = None,
    ) -> None:
        slot = self._end_work(slot, CONNECTING)
        if reason is not None and slot.state is CONNECTING:
            self.closes[reason] += 1
        self._step(self.machine.connect_failed(slot, failure, self.now, reason))
        if slot.state is GONE:
            del self.histories[slot]

    def pass_check(self, slot: Slot | None = None) -> None:
        slot = self._end_work(slot, CHECKING)
        self._answered(slot)
        self._step(self.machine.check_passed(slot, self.now))

    def fail_check(self, reason: CloseReason = CloseReason.CHECK_FAILED, slot: Slot | None = None) -> None:
        slot = self._end_work(slot, CHECKING)
        if slot.state is CHECKING:
            self._suspect(slot.generation)
        self._step(self.machine.check_failed(slot, reason, self.now))

    def finish_recycle(self, slot: Slot | None = None) -> None:
        slot = self._end_work(slot, RECYCLING)
        self._answered(slot)
        self._step(self.machine.recycled(slot, self.now))

    def fail_recycle(self, reason: CloseReason = CloseReason.RESET_FAILED, slot: Slot | None = None) -> None:
        slot = self._end_work(slot, RECYCLING)
        if reason in CATCHING and slot.state is RECYCLING:
            self._suspect(slot.generation)
        self._step(self.machine.recycle_failed(slot, reason, self.now))

    def finish_close(self, slot: Slot | None = None) -> None:
        slot = self._end_work(slot, CLOSING)
        self.superseded.pop(slot, None)
        self._step(self.machine.closed(slot, self.now))
        del self.histories[slot]

    def tell(self, slot: Slot, state: SlotState, *, well: bool) -> None:
        """The outcome of the work that belongs to this state."""
        well_or_not: dict[SlotState, tuple[Callable[..., object], Callable[..., object]]] = {
            CONNECTING: (self.connect, self.fail_connect),
            CHECKING: (self.pass_check, self.fail_check),
            RECYCLING: (self.finish_recycle, self.fail_recycle),
            CLOSING: (self.finish_close, self.finish_close),
        }
        well_or_not[state][not well](slot=slot)

    def finish_work(self) -> None:
        """Everything that is under way ends well, and what follows from it, until nothing is under way."""
        while self.work:
            slot = in_order(self.work)[0]
            self.tell(slot, self.work[slot], well=True)

    def disconnect(self, slot: Slot) -> None:
        """The server ends a session, and the watch sees it."""
        self.histories[slot].barred = True
        self._suspect(slot.generation)
        self._step(self.machine.disconnected(slot, self.now))

    def _answered(self, slot: Slot) -> None:
        history = self.histories[slot]
        history.answered_at = self.now
        history.suspect = False

    def _suspect(self, generation: int) -> None:
        for slot in self.slots(IDLE):
            self.histories[slot].suspect |= slot.generation <= generation

    # --- administration -------------------------------------------------------------------------------------

    def open(self, *, single_round: bool = False) -> Self:
        self.opened = self.opening_failed = self.closed = 0
        self.was_opened = True
        self.severed.clear()
        self._step(self.machine.open(self.now, single_round=single_round))
        return self

    def close(self) -> None:
        self._step(self.machine.close(self.now))

    def sever(self) -> None:
        self.severed.extend(self.held)
        self.held.clear()
        self._step(self.machine.sever(self.now))

    def resize(self, min_size: int, max_size: int) -> None:
        self._step(self.machine.resize(min_size, max_size, self.now))

    def drain(self) -> None:
        for slot in self.machine.slots():
            self.histories[slot].barred = True
        self._step(self.machine.drain(self.now))

    def check(self) -> None:
        for slot in self.slots(IDLE):
            self.histories[slot].suspect = True
        self._step(self.machine.check(self.now))

    # --- time -----------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Time passes, and every wake-up comes when it was asked for."""
        end = self.now + seconds
        while self.wake_at <= end:
            self.now = max(self.now, self.wake_at)
            self.wake()
        self.now = end

    def freeze(self, seconds: float) -> None:
        """Time passes and nothing runs."""
        self.now += seconds

    def wake(self) -> None:
        """The timer fires."""
        self.wakes += 1
        self.wake_at = NEVER
        self._step(self.machine.wake(self.now))

    # --- effects --------------------------------------------------------------------------------------------

    def _step(self, effects: Effects) -> None:
        assert not (self.told_late and effects), "an outcome that came late has had an effect"
        self.told_late = False
        self.effects = effects
        for effect in effects:
            self._perform(effect)
        invariants.check_all(self)
        self.size_before = self.machine.size

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, (Connect, Check, Recycle, Close)):
            self._start(effect)
        elif isinstance(effect, Waiter):
            assert effect is self.queue[0], "not first come, first served"
            assert effect.slot is not None
            self._hand_out(self.queue.pop(0), effect.slot)
        elif isinstance(effect, Refuse):
            self._refuse(effect)
        elif isinstance(effect, WakeAt):
            assert effect.when > self.now, "a wake-up in the past, or a busy loop"
            assert effect.when != NEVER, "no timer takes that"
            self.wake_at = effect.when
        elif isinstance(effect, Opened):
            self.opened += 1
        elif isinstance(effect, OpeningFailed):
            self.opening_failed += 1
        else:
            assert isinstance(effect, Closed), effect
            self.closed += 1
            self.wake_at = NEVER  # what the runner does

    def _start(self, effect: Connect | Check | Recycle | Close) -> None:
        slot = effect.slot
        if isinstance(effect, Connect):
            assert slot.number not in self.numbers, "connected twice"
            self.numbers.add(slot.number)
            self.histories[slot] = History()
        if isinstance(effect, Close):
            assert self.work.get(slot) is not CLOSING, "closed twice"
            assert isinstance(effect.reason, CloseReason), "closed for no reason"
            if slot in self.work:
                self.superseded[slot] = self.work[slot]
            self.closes[effect.reason] += 1
            self.histories[slot].barred = True
        else:
            assert slot not in self.work, f"{slot!r} is given work while it has some"
        self.work[slot] = WORK[type(effect)]

    def _refuse(self, effect: Refuse) -> None:
        assert effect.waiter not in self.refused, "refused twice"
        if effect.refusal is Refusal.TIMEOUT:
            assert effect.waiter.deadline <= self.now, "refused before its time"
        if effect.refusal is Refusal.DEADLOCK:
            assert invariants.is_circle(self), "a false alarm"
            holders = {waiter.owner for waiter in self.held}
            assert holders.intersection(self.owners(effect.waiter)), "refused, and nobody is helped"
        self.queue.remove(effect.waiter)
        self.refused[effect.waiter] = effect.refusal
        self.refusals[effect.refusal] += 1


def in_order(slots: Iterable[Slot]) -> list[Slot]:
    """Oldest first: whatever order they come in, a test that picks one can be repeated."""
    return sorted(slots, key=lambda slot: slot.number)


def virtual_pool(draw: Callable[[], float] = lambda: 0.5, **options: Unpack[CommonOptions]) -> VirtualPool:
    """A pool with these options, not opened. Without any it has no connection until somebody asks for one."""
    options.setdefault("min_size", 0)
    return VirtualPool(PoolConfig(**options), draw)


def opened_pool(draw: Callable[[], float] = lambda: 0.5, **options: Unpack[CommonOptions]) -> VirtualPool:
    """The same, open, with `min_size` connected."""
    pool = virtual_pool(draw, **options).open()
    pool.finish_work()
    return pool
