"""What must hold of a PoolMachine after every step, whatever the step was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncpool._core.effects import Close, Connect, Opened, Refusal, Refuse
from asyncpool._core.policy import NEVER
from asyncpool._core.states import PoolPhase, SlotState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool._core.slot import Slot
    from kit.virtual_pool import VirtualPool

CONNECTING, IDLE, LEASED, CHECKING, RECYCLING, CLOSING, GONE = SlotState

BUSY = (CONNECTING, CHECKING, RECYCLING, CLOSING)


@dataclass
class History:
    """What the world remembers of a connection by itself, to judge the machine by."""

    born: float = NEVER
    answered_at: float = -NEVER
    free_since: float = -NEVER
    leases: int = 0
    suspect: bool = False  # must answer before anybody gets it
    barred: bool = False  # nobody may get it any more


def check_all(pool: VirtualPool) -> None:
    check_ownership(pool)
    check_bounds(pool)
    check_totals(pool)
    check_phase(pool)
    if is_serving(pool):
        check_queue(pool)
        check_growth(pool)
        check_nothing_is_left_undone(pool)
        assert not is_circle(pool), "nobody can go on, and nobody was told"
        check_wake_up(pool)


def check_ownership(pool: VirtualPool) -> None:
    """Every slot is in one place, and work is under way on exactly those whose state says so."""
    machine = pool.machine
    slots = machine.slots()
    members = [(state, slot) for state in SlotState if state is not GONE for slot in machine._members[state]]
    assert len(members) == len(slots) == machine.size, "a slot is lost, or in two places"
    assert {slot for _, slot in members} == set(slots)
    assert all(slot.state is state for state, slot in members), "counts differ from states"
    assert pool.work == {slot: slot.state for slot in slots if slot.state in BUSY}, "work and states differ"
    leased = machine.leases()
    assert len(leased) == len(pool.held), "a lease is lost, or owned twice"
    assert set(leased) == set(pool.held.values())
    idle = machine.idle_slots()
    assert idle == sorted(idle, key=lambda slot: pool.histories[slot].free_since), "not in the order of release"


def check_bounds(pool: VirtualPool) -> None:
    machine = pool.machine
    if machine.size > machine.max_size:
        # Only after a resize: it shrinks, and what can go is going.
        assert machine.size <= pool.size_before, "more than max_size"
        if machine.size - machine.count(CLOSING) > machine.max_size:
            assert not machine.count(IDLE), "idle beyond max_size"
            assert not machine.count(CONNECTING), "connecting beyond max_size"
    assert machine.count(CONNECTING) <= pool.config.max_connecting


def check_totals(pool: VirtualPool) -> None:
    machine = pool.machine
    assert machine.acquires == pool.leases
    assert machine.connects == pool.connects
    assert machine.timeouts == pool.refusals[Refusal.TIMEOUT]
    assert machine.closes == pool.closes


def check_phase(pool: VirtualPool) -> None:
    machine = pool.machine
    phase = machine.phase
    assert pool.opened <= 1
    assert pool.closed == (phase is PoolPhase.CLOSED and pool.was_opened)
    if pool.emitted(Opened):
        # Those whose time was up in the same step were there.
        assert usable(pool) + pool.emitted(Close) >= machine.min_size, "told that min_size is there, and it is not"
    if phase is PoolPhase.OPENING:
        assert not pool.opened
        assert usable(pool) < machine.min_size, "min_size is there, and nobody was told"
    elif phase is PoolPhase.OPEN:
        assert pool.opened
    else:
        assert not pool.queue, "a waiter is forgotten by a closing pool"
        assert not machine.waiting
        assert set(machine.slots()) == set(pool.held.values()) | set(pool.slots(CLOSING))
        assert (phase is PoolPhase.CLOSED) == (machine.size == 0)


def check_queue(pool: VirtualPool) -> None:
    machine = pool.machine
    assert list(machine.waiters) == pool.queue, "a waiter is forgotten, or out of turn"
    if pool.queue:
        idle = machine.idle_slots()
        assert not [slot for slot in idle if may_be_handed_out(pool, slot)], "idle while somebody waits"
        assert not idle or coming(pool) >= len(pool.queue), "unchecked while somebody waits"


def check_growth(pool: VirtualPool) -> None:
    """No connect is begun that neither the waiters nor `min_size` nor a replacement need."""
    if not pool.emitted(Connect):
        return
    machine = pool.machine
    backoff = machine._backoff
    asked = len(pool.queue) + pool.emitted(Refuse)  # those with `timeout=0` have asked too
    connecting = machine.count(CONNECTING)
    for_waiters = coming(pool) <= asked
    for_min_size = machine.size - machine.count(CLOSING) <= machine.min_size
    retiring = sum(slot.retires_at <= pool.now for slot in (*machine.idle_slots(), *machine.leases()))
    as_replacement = connecting == 1 and retiring > max(0, usable(pool) - machine.min_size)
    assert for_waiters or for_min_size or as_replacement, "more connects than are needed"
    assert machine.size <= machine.max_size
    assert backoff.not_before <= pool.now, "a connect during the pause"
    assert connecting == 1 or not backoff.failing, "more than one probes a server that fails"


def check_nothing_is_left_undone(pool: VirtualPool) -> None:
    """What can be done at this moment was done, unless the wake-up for it is late."""
    if pool.wake_at <= pool.now:
        return
    machine = pool.machine
    if may_connect(pool):
        assert len(pool.queue) <= coming(pool), "somebody waits, and nobody connects"
        assert machine.size - machine.count(CLOSING) >= machine.min_size, "below min_size, and nobody connects"
    retiring = [slot for slot in machine.idle_slots() if slot.retires_at <= pool.now]
    leased = [slot for slot in machine.leases() if slot.retires_at <= pool.now]
    if may_connect(pool) and len(retiring) + len(leased) > max(0, usable(pool) - machine.min_size):
        assert machine.count(CONNECTING), "past max_lifetime when it comes back, and not replaced"
    if retiring:
        assert usable(pool) <= machine.min_size, "past max_lifetime, and not needed"
        replaced = machine.count(CONNECTING) or machine.count(CLOSING)
        assert replaced or machine._backoff.failing, "past max_lifetime, and not replaced"


def is_circle(pool: VirtualPool) -> bool:
    """Whether every place is the lease of a block, and the owner of each waits for another one."""
    waiting = {owner for waiter in pool.queue for owner in pool.owners(waiter)}
    return (
        len(pool.queue) > 0
        and pool.machine.size == len(pool.held) >= pool.machine.max_size
        and all(waiter in pool.blocks and waiter.owner in waiting for waiter in pool.held)
    )


def check_wake_up(pool: VirtualPool) -> None:
    """A wake-up stands for everything that will be due, so that a quiet pool needs no other input."""
    due = min(due_times(pool), default=NEVER)
    assert pool.wake_at <= due, f"due in {due - pool.now:g} s, wake-up in {pool.wake_at - pool.now:g} s"


def due_times(pool: VirtualPool) -> Iterator[float]:
    machine, config = pool.machine, pool.config
    for waiter in pool.queue:
        yield waiter.deadline
    backoff = machine._backoff
    demand = len(pool.queue) > coming(pool) or machine.size - machine.count(CLOSING) < machine.min_size
    if demand and machine.size < machine.max_size and not machine.count(CONNECTING):
        yield backoff.not_before
    for slot in machine.leases():
        if slot.retires_at > pool.now:
            yield slot.retires_at
    for slot in machine.idle_slots():
        history = pool.histories[slot]
        if config.max_lifetime is not None:
            yield history.born + config.max_lifetime
        if slot.retires_at > pool.now:
            yield slot.retires_at
        if config.check_interval:
            yield history.answered_at + config.check_interval
        if config.max_idle is not None and usable(pool) > machine.min_size:
            yield history.free_since + config.max_idle


def check_hand_out(pool: VirtualPool, slot: Slot, history: History) -> None:
    """Judged by what the world remembers, not by the machine's own notes."""
    config = pool.config
    assert slot.state is LEASED
    assert not history.barred, "handed out after its end"
    assert not history.suspect, "handed out without having answered"
    if config.max_lifetime is not None:
        assert pool.now < history.born + config.max_lifetime, "handed out past max_lifetime"
    if config.max_uses is not None:
        assert history.leases <= config.max_uses, "handed out more often than max_uses"
    if config.check_interval is not None:
        unverified_for = pool.now - history.answered_at
        assert unverified_for == 0 or unverified_for < config.check_interval, "handed out unverified"


def is_serving(pool: VirtualPool) -> bool:
    return pool.machine.phase in (PoolPhase.OPENING, PoolPhase.OPEN)


def usable(pool: VirtualPool) -> int:
    """How many are connected and not being closed."""
    machine = pool.machine
    return machine.size - machine.count(CLOSING) - machine.count(CONNECTING)


def coming(pool: VirtualPool) -> int:
    """How many may be idle soon."""
    machine = pool.machine
    return machine.count(CONNECTING) + machine.count(CHECKING) + machine.count(RECYCLING)


def may_connect(pool: VirtualPool) -> bool:
    machine = pool.machine
    backoff = machine._backoff
    at_once = 1 if backoff.failing else pool.config.max_connecting
    room = machine.size < machine.max_size and machine.count(CONNECTING) < at_once
    return room and backoff.not_before <= pool.now


def may_be_handed_out(pool: VirtualPool, slot: Slot) -> bool:
    return pool.now < slot.fresh_until or slot.verified_at == pool.now < slot.expires_at
