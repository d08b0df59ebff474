"""`lend` and `take_back` do what `take` and `give_back` do, in other words: the same walks through both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from core.test_random_walks import STEPS, Walk
from kit import virtual_pool

from asyncpool._core.machine import PoolMachine
from asyncpool._core.policy import NEVER
from asyncpool._core.states import PoolPhase, SlotState
from asyncpool._io.locked_machine import LockedMachine, ThreadWaiter
from asyncpool._io.session import NOT_LEASED, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncpool._core.effects import Effects
    from asyncpool._core.queue import Waiter
    from asyncpool._core.slot import Slot
    from asyncpool.config import PoolConfig
    from asyncpool.events import CloseReason

HERE = (lambda: None).__code__


class VirtualThreadWaiter(ThreadWaiter):
    """One that a VirtualPool can make."""

    def __init__(self, deadline: float, owner: object) -> None:
        super().__init__(deadline, 0.0)
        self.owner: Any = owner


class HotMachine(LockedMachine):
    """Takes and gives back by `lend` and `take_back` where they can do it."""

    def __init__(self, config: PoolConfig, draw: Callable[[], float]) -> None:
        super().__init__(config, draw, lambda slot: True, self.was_disturbed)
        self.lent = self.taken_back = 0

    def was_disturbed(self) -> None:
        raise AssertionError("it has called itself from outside")

    def take(self, now: float) -> Slot | None:
        connection = self.lend(now, -NEVER, HERE, 0)
        if connection is None:
            return None
        self.lent += 1
        slot: Slot = connection.slot
        return slot

    def end(self, slot: Slot) -> tuple[Any, Any]:
        """Its session and the connection, as they are at the end of a lease."""
        session: Any = slot.resource
        connection = SimpleNamespace(slot=slot)
        if session.granted_to is not None:
            self.lend_granted(slot)
        assert session.lease == slot.uses
        return session, connection

    def give_back(self, slot: Slot, answered_at: float, now: float) -> Effects:
        session, connection = self.end(slot)
        session.reader.answered_at = answered_at
        first = next(iter(self.waiters), None)
        if self.take_back(connection, session, slot.uses, now):
            self.taken_back += 1
            return (first,) if first is not None else ()
        session.lease, session.connection = NOT_LEASED, connection
        return super().give_back(slot, answered_at, now)

    def withdraw(self, waiter: Waiter, now: float) -> Effects:
        slot = waiter.slot
        if slot is not None and slot.state is SlotState.LEASED:  # here also of one that was lent
            session, connection = self.end(slot)
            session.lease, session.connection = NOT_LEASED, connection
        return super().withdraw(waiter, now)

    def recycle(self, slot: Slot, now: float) -> Effects:
        session, connection = self.end(slot)
        session.lease, session.connection = NOT_LEASED, connection
        return super().recycle(slot, now)

    def discard(self, slot: Slot, reason: CloseReason, now: float) -> Effects:
        session, connection = self.end(slot)
        session.lease, session.connection = NOT_LEASED, connection
        return super().discard(slot, reason, now)

    def connected(self, slot: Slot, now: float) -> Effects:
        if slot.state is SlotState.CONNECTING:
            session: Any = Session.__new__(Session)
            session.slot, session.lease, session.granted_to = slot, NOT_LEASED, None
            session.touched = session.held_warned = session.is_noted = False
            session.alive_at, session.reader = 0.0, SimpleNamespace(answered_at=now)
            session.connection = SimpleNamespace(slot=slot)
            slot.resource = session
        return super().connected(slot, now)


def history_of(seed: int, machine_class: Callable[[PoolConfig, Callable[[], float]], PoolMachine]) -> tuple[Any, ...]:
    """Everything that a walk has come by, and the machine."""
    walk = Walk(seed)
    pool = walk.pool
    pool.machine = machine = machine_class(pool.config, pool.draw)
    history: list[object] = []

    def step(effects: Effects) -> None:
        history.append(
            (
                [(type(effect).__name__.removeprefix("Virtual"), described(effect)) for effect in effects],
                [slot.number for slot in machine.idle_slots()],
                sorted(map(facts_of, machine.slots())),
                (machine.phase, machine.waiting, machine.acquires, machine.timeouts, machine._wake_at),
                dict(machine.closes),
            )
        )
        type(pool)._step(pool, effects)

    pool._step = step  # type: ignore[method-assign]
    walk.take(STEPS)
    walk.close_down()
    assert machine.phase is PoolPhase.CLOSED
    return history, machine


def described(effect: Any) -> object:
    slot = getattr(effect, "slot", None)
    return slot.number if slot is not None else getattr(effect, "refusal", getattr(effect, "when", None))


def facts_of(slot: Slot) -> tuple[object, ...]:
    names = ("number", *sorted(set(slot.__slots__) - {"number", "resource", "owner"}))
    owner = slot.owner() if slot.owner is not None else None
    return (*(getattr(slot, name) for name in names), str(owner))


@pytest.fixture(autouse=True)
def waiters_that_threads_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_pool, "Waiter", VirtualThreadWaiter)


@pytest.mark.parametrize("seed", range(40))
def test_lend_and_take_back_do_what_take_and_give_back_do(seed: int) -> None:
    expected, _ = history_of(seed, PoolMachine)
    found, machine = history_of(seed, HotMachine)
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert other == one, step
    assert not machine._postponed


def test_the_walks_go_the_hot_path() -> None:
    """Else they would prove nothing."""
    machines = [history_of(seed, HotMachine)[1] for seed in range(20)]
    assert sum(machine.lent for machine in machines) > 100
    assert sum(machine.taken_back for machine in machines) > 50
