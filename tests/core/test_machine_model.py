"""PoolMachine under hypothesis: any sequence of inputs, shrunk to the shortest that breaks what must hold.

`VirtualPool` plays the world and checks the invariants after every step.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kit.invariants import CHECKING, CLOSING, CONNECTING, LEASED, RECYCLING
from kit.virtual_pool import VirtualPool, in_order, virtual_pool

from asyncpool._core.policy import ConnectFailure
from asyncpool._core.states import PoolPhase
from asyncpool.events import CloseReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    from asyncpool._core.queue import Waiter
    from asyncpool._core.slot import Slot
    from asyncpool._core.states import SlotState

    T = TypeVar("T")

picks = st.integers(0, 7)
timeouts = st.sampled_from([None, 0, 0.5, 4])
spans = st.sampled_from([0.125, 0.5, 1, 2, 5, 15])
ages = st.sampled_from([0, 1, 100])
failures = st.sampled_from(ConnectFailure)


def pick_from(candidates: Sequence[T], pick: int) -> T:
    return candidates[pick % len(candidates)]


def while_some_are(state: SlotState) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return precondition(lambda model: model.pool.count(state) > 0)


class PoolMachineModel(RuleBasedStateMachine):
    pool: VirtualPool

    @initialize(
        sizes=st.tuples(st.integers(0, 4), st.integers(1, 4)),
        seed=st.integers(0, 3),
        max_waiting=st.sampled_from([None, 0, 2]),
        max_lifetime=st.sampled_from([None, 3, 20]),
        max_idle=st.sampled_from([None, 2, 9]),
        max_uses=st.sampled_from([None, 1, 3]),
        max_connecting=st.integers(1, 3),
        check_interval=st.sampled_from([None, 0, 1, 6]),
    )
    def open(self, sizes: tuple[int, int], seed: int, **options: Any) -> None:
        low, high = sorted(sizes)
        options |= {"min_size": low, "max_size": high, "backoff_initial": 0.5, "backoff_max": 2}
        self.pool = virtual_pool(Random(seed).random, **options).open()

    def slot(self, state: SlotState, pick: int) -> Slot:
        return pick_from(self.pool.slots(state), pick)

    def holder(self, pick: int) -> Waiter:
        return pick_from(list(self.pool.held), pick)

    # --- callers --------------------------------------------------------------------------------------------

    @rule(timeout=timeouts)
    def acquire(self, timeout: float | None) -> None:
        self.pool.acquire(timeout)

    @while_some_are(LEASED)
    @rule(pick=picks, age=ages)
    def release(self, pick: int, age: float) -> None:
        self.pool.release(self.holder(pick), self.pool.now - age)

    @while_some_are(LEASED)
    @rule(pick=picks)
    def release_dirty(self, pick: int) -> None:
        self.pool.release_dirty(self.holder(pick))

    @while_some_are(LEASED)
    @rule(pick=picks, reason=st.sampled_from([CloseReason.DISCONNECTED, CloseReason.LEASE_LOST]))
    def discard(self, pick: int, reason: CloseReason) -> None:
        self.pool.discard(self.holder(pick), reason)

    @precondition(lambda self: self.leavers())
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        self.pool.cancel(pick_from(self.leavers(), pick))

    def leavers(self) -> list[Waiter]:
        """In the queue, or just granted, refused or shut down."""
        pool = self.pool
        return [*pool.queue, *pool.held, *pool.severed, *pool.refused]

    # --- outcomes -------------------------------------------------------------------------------------------

    @while_some_are(CONNECTING)
    @rule(pick=picks)
    def connect(self, pick: int) -> None:
        self.pool.connect(self.slot(CONNECTING, pick))

    @while_some_are(CONNECTING)
    @rule(pick=picks, failure=failures)
    def fail_connect(self, pick: int, failure: ConnectFailure) -> None:
        self.pool.fail_connect(failure, self.slot(CONNECTING, pick))

    @while_some_are(CHECKING)
    @rule(pick=picks, passes=st.booleans())
    def end_check(self, pick: int, passes: bool) -> None:
        end = self.pool.pass_check if passes else self.pool.fail_check
        end(slot=self.slot(CHECKING, pick))

    @while_some_are(RECYCLING)
    @rule(pick=picks, passes=st.booleans())
    def end_recycle(self, pick: int, passes: bool) -> None:
        end = self.pool.finish_recycle if passes else self.pool.fail_recycle
        end(slot=self.slot(RECYCLING, pick))

    @while_some_are(CLOSING)
    @rule(pick=picks)
    def end_close(self, pick: int) -> None:
        self.pool.finish_close(self.slot(CLOSING, pick))

    @precondition(lambda self: self.pool.superseded)
    @rule(pick=picks, well=st.booleans())
    def tell_late_outcome(self, pick: int, well: bool) -> None:
        slot = pick_from(in_order(self.pool.superseded), pick)
        self.pool.tell(slot, self.pool.superseded[slot], well=well)

    @rule(pick=picks)
    def disconnect(self, pick: int) -> None:
        if slots := [slot for slot in self.pool.machine.slots() if slot.state is not CONNECTING]:
            self.pool.disconnect(pick_from(in_order(slots), pick))

    # --- administration and time ----------------------------------------------------------------------------

    @rule(sizes=st.tuples(st.integers(0, 5), st.integers(1, 5)))
    def resize(self, sizes: tuple[int, int]) -> None:
        self.pool.resize(min(sizes), max(sizes))

    @rule()
    def drain(self) -> None:
        self.pool.drain()

    @rule()
    def check(self) -> None:
        self.pool.check()

    @rule()
    def close(self) -> None:
        self.pool.close()

    @precondition(lambda self: self.pool.machine.phase is PoolPhase.CLOSING)
    @rule()
    def sever(self) -> None:
        self.pool.sever()

    @precondition(lambda self: self.pool.machine.phase is PoolPhase.CLOSED)
    @rule(single_round=st.booleans())
    def reopen(self, single_round: bool) -> None:
        self.pool.open(single_round=single_round)

    @rule(span=spans)
    def advance(self, span: float) -> None:
        self.pool.advance(span)

    @rule(span=spans)
    def freeze(self, span: float) -> None:
        self.pool.freeze(span)

    def teardown(self) -> None:
        """However it went, the pool can be closed."""
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.close()
        pool.sever()
        pool.finish_work()
        assert pool.machine.phase is PoolPhase.CLOSED
        assert not pool.machine.slots()


TestPoolMachine = PoolMachineModel.TestCase
TestPoolMachine.settings = settings(max_examples=80, stateful_step_count=60, deadline=None, print_blob=True)
