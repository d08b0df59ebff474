"""Seeded random walks over PoolMachine in virtual time; `VirtualPool` checks what must hold after every step."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TYPE_CHECKING

import pytest
from kit.invariants import CHECKING, CONNECTING, RECYCLING
from kit.virtual_pool import VirtualPool, in_order, virtual_pool

from asyncpool._core.effects import Refusal
from asyncpool._core.policy import ConnectFailure
from asyncpool._core.queue import GroupWaiter
from asyncpool._core.states import PoolPhase
from asyncpool.events import CloseReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncpool.options import CommonOptions

SEEDS = range(60)
STEPS = 1200
TASKS = range(12)


def random_options(random: Random) -> CommonOptions:
    """Small sizes and near limits, so that everything happens to everything within a few steps."""
    max_size = random.choice([1, 2, 3, 5, 8])
    return {
        "min_size": random.randint(0, max_size),
        "max_size": max_size,
        "max_waiting": random.choice([None, None, 0, 2]),
        "max_lifetime": random.choice([None, 3, 20]),
        "max_idle": random.choice([None, 2, 9]),
        "max_uses": random.choice([None, 1, 4]),
        "max_connecting": random.choice([1, 2, 4]),
        "check_interval": random.choice([None, 0, 1, 6]),
        "backoff_initial": random.choice([0.125, 1]),
        "backoff_max": random.choice([1, 4]),
    }


class Walk:
    """One walk: callers come and go, connections are made and lost, administrators interfere."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.pool = virtual_pool(random.random, **random_options(random))
        # The server's mood: how often it refuses a connect, how often a connection turns out useless.
        self.refuses = random.choice([0, 0.1, 0.6])
        self.breaks = random.choice([0, 0.05, 0.4])
        self.keeps = random.choice([0, 0.5, 1])  # how often a caller keeps its connection to itself

    def actions(self) -> dict[Callable[[], None], int]:
        """What may happen, and how often."""
        return {
            self.acquire: 30,
            self.end_lease: 25,
            self.end_work: 30,
            self.let_time_pass: 15,
            self.give_up: 4,
            self.tell_late_outcome: 4,
            self.disconnect: 2,
            self.administrate: 2,
        }

    def take(self, steps: int) -> None:
        actions = self.actions()
        for action in self.random.choices(list(actions), weights=list(actions.values()), k=steps):
            if self.pool.machine.phase is PoolPhase.CLOSED:
                self.pool.open(single_round=self.random.random() < 0.2)
            action()

    def acquire(self) -> None:
        """One of a few tasks, if it is not waiting already; it may hold connections of which nobody else knows."""
        if free := self.free_tasks():
            owner = self.random.choice(free)
            in_block = self.random.random() < self.keeps
            self.pool.acquire(self.random.choice([None, 0, 0.5, 4]), owner, in_block=in_block)

    def free_tasks(self) -> list[int]:
        """Those that wait for nothing."""
        waiting = {owner for waiter in self.pool.queue for owner in self.pool.owners(waiter)}
        return [task for task in TASKS if task not in waiting]

    def end_lease(self) -> None:
        pool, random = self.pool, self.random
        if not pool.held:
            return
        waiter = random.choice(list(pool.held))
        way = random.random()
        if way < self.breaks:
            pool.discard(
                waiter, random.choice([CloseReason.DISCONNECTED, CloseReason.READ_ONLY, CloseReason.LEASE_LOST])
            )
        elif way < self.breaks + 0.2:
            pool.release_dirty(waiter)
        else:
            # Used until now, or until some time ago, or not at all.
            pool.release(waiter, answered_at=pool.now - random.choice([0, 0, 0, 1, 100]))

    def end_work(self) -> None:
        pool, random = self.pool, self.random
        if not pool.work:
            return
        slot = random.choice(in_order(pool.work))
        state = pool.work[slot]
        if state is CONNECTING and random.random() < self.refuses:
            pool.fail_connect(
                random.choice(list(ConnectFailure)), slot, random.choice([None, CloseReason.CONFIGURE_FAILED])
            )
        elif state is RECYCLING and random.random() < self.breaks:
            pool.fail_recycle(random.choice([CloseReason.DISCONNECTED, CloseReason.RESET_FAILED]), slot)
        else:
            pool.tell(slot, state, well=state is not CHECKING or random.random() >= self.breaks)

    def let_time_pass(self) -> None:
        pool, random = self.pool, self.random
        seconds = random.choice([0.125, 0.5, 0.5, 2, 15])
        if random.random() < 0.8:
            pool.advance(seconds)
        else:
            pool.freeze(seconds)
            if pool.wake_at <= pool.now and random.random() < 0.5:
                pool.wake()

    def give_up(self) -> None:
        """Somebody in the queue, or whose grant, refusal or shut-down has just come, is cancelled."""
        pool = self.pool
        leavers = [*pool.queue, *pool.held, *pool.severed, *list(pool.refused)[-1:]]
        if leavers:
            pool.cancel(self.random.choice(leavers))

    def tell_late_outcome(self) -> None:
        """Work that a close has interrupted may have ended before it noticed."""
        pool = self.pool
        if pool.superseded:
            slot = self.random.choice(in_order(pool.superseded))
            pool.tell(slot, pool.superseded[slot], well=self.random.random() < 0.5)

    def disconnect(self) -> None:
        slots = [slot for slot in in_order(self.pool.machine.slots()) if slot.state is not CONNECTING]
        if slots:
            self.pool.disconnect(self.random.choice(slots))

    def administrate(self) -> None:
        pool, random = self.pool, self.random
        deed = random.choice(["resize", "resize", "drain", "check", "close", "sever"])
        if deed == "resize":
            max_size = random.randint(1, 8)
            pool.resize(random.randint(0, max_size), max_size)
        elif deed == "sever":
            if pool.machine.phase is PoolPhase.CLOSING:
                pool.sever()
        else:
            getattr(pool, deed)()

    def close_down(self) -> None:
        pool = self.pool
        pool.close()
        while pool.held or pool.work:
            self.random.choice([self.end_lease, self.end_work, self.tell_late_outcome, self.disconnect])()


class CrowdedWalk(Walk):
    """Few places, most of them the leases of blocks, whose owners wait alone and in groups for more."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        random = self.random
        options: CommonOptions = {**random_options(random), "max_size": random.randint(1, 3), "min_size": 1}
        self.pool = virtual_pool(random.random, **options)
        self.keeps = 0.95
        self.joins_refused = 0

    def actions(self) -> dict[Callable[[], None], int]:
        return {
            self.acquire: 20,
            self.acquire_for_some: 6,
            self.join: 20,
            self.end_lease: 10,
            self.end_work: 20,
            self.let_time_pass: 6,
            self.give_up: 2,
            self.disconnect: 1,
            self.administrate: 1,
        }

    def acquire_for_some(self) -> None:
        """A group, of few or none, comes to the queue."""
        free = self.free_tasks()
        self.pool.acquire_for(*self.random.sample(free, min(len(free), self.random.randint(0, 2))))

    def join(self) -> None:
        """A task joins a group in the queue, or leaves it."""
        groups = [waiter for waiter in self.pool.queue if isinstance(waiter, GroupWaiter)]
        if not groups:
            return
        group = self.random.choice(groups)
        members, free = self.pool.members[group], self.free_tasks()
        if free and self.random.random() < 0.8:
            self.joins_refused += self.pool.join(group, self.random.choice(free))
        elif members:
            self.pool.leave(group, self.random.choice(members))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("walker", [Walk, CrowdedWalk])
def test_whatever_happens_the_invariants_hold_and_the_pool_can_be_closed(walker: type[Walk], seed: int) -> None:
    walk = walker(seed)
    walk.take(STEPS)
    walk.close_down()
    pool = walk.pool
    assert pool.machine.phase is PoolPhase.CLOSED
    assert pool.closed == 1
    assert not pool.machine.slots()


def test_the_same_inputs_have_the_same_effects() -> None:
    """Else no walk could be repeated. The pools live at the same time, so that no two slots share an address."""

    def closed_by_resize_and_drain() -> tuple[VirtualPool, list[int]]:
        pool = virtual_pool(min_size=8, max_size=8, max_connecting=8).open()
        pool.resize(1, 5)
        closes = pool.emitted_closes()
        pool.drain()
        return pool, [close.slot.number for close in [*closes, *pool.emitted_closes()]]

    runs = [closed_by_resize_and_drain() for _ in range(10)]
    assert len({tuple(numbers) for _, numbers in runs}) == 1


def test_the_walks_go_everywhere() -> None:
    """Else they would prove little."""
    refusals: Counter[Refusal] = Counter()
    reasons: Counter[CloseReason] = Counter()
    late_outcomes = 0
    for seed in SEEDS[:15]:
        walk = Walk(seed)
        walk.take(STEPS)
        refusals += walk.pool.refusals
        reasons += walk.pool.closes
        late_outcomes += walk.pool.late_outcomes
    assert set(refusals) == set(Refusal)
    assert set(reasons) >= {
        CloseReason.MAX_IDLE,
        CloseReason.MAX_LIFETIME,
        CloseReason.MAX_USES,
        CloseReason.SHRUNK,
        CloseReason.DRAINED,
        CloseReason.DISCONNECTED,
        CloseReason.CHECK_FAILED,
        CloseReason.RESET_FAILED,
        CloseReason.POOL_CLOSED,
        CloseReason.CONFIGURE_FAILED,
    }
    assert late_outcomes


def test_the_crowded_walks_end_in_every_kind_of_circle() -> None:
    refused_alone = refused_in_groups = joins_refused = 0
    for seed in SEEDS[:15]:
        walk = CrowdedWalk(seed)
        walk.take(STEPS)
        deadlocked = [waiter for waiter, refusal in walk.pool.refused.items() if refusal is Refusal.DEADLOCK]
        refused_in_groups += sum(isinstance(waiter, GroupWaiter) for waiter in deadlocked)
        refused_alone += sum(not isinstance(waiter, GroupWaiter) for waiter in deadlocked)
        joins_refused += walk.joins_refused
    assert refused_alone
    assert refused_in_groups
    assert joins_refused
