"""Who gets which connection: waiters in their order, idle connections newest first, deadlines, refusals."""

from __future__ import annotations

from random import Random

import pytest
from kit.invariants import CHECKING, CONNECTING, IDLE, LEASED, RECYCLING
from kit.virtual_pool import VirtualPool, opened_pool, virtual_pool

from asyncpool._core.effects import NO_EFFECTS, Connect, Refusal, Refuse, WakeAt
from asyncpool._core.machine import IllegalMove
from asyncpool._core.queue import COUNTED, Waiter
from asyncpool.events import CloseReason


def busy_pool(size: int = 1, **options: object) -> tuple[VirtualPool, list[Waiter]]:
    """A pool at its `max_size`, with every connection leased; and the leases."""
    pool = opened_pool(min_size=size, max_size=size, **options)  # type: ignore[arg-type]
    return pool, [pool.acquire() for _ in range(size)]


@pytest.mark.parametrize("check_interval", [30, None])
@pytest.mark.parametrize("untouched", [False, True])
def test_an_idle_connection_is_taken_and_given_back_without_settling(
    check_interval: float | None, untouched: bool
) -> None:
    pool = opened_pool(min_size=1, check_interval=check_interval)
    pool.advance(10)
    waiter = pool.acquire()
    assert waiter.slot is not None
    assert waiter.slot.state is LEASED
    pool.release(waiter, answered_at=pool.now - 10 if untouched else pool.now)
    assert pool.effects is NO_EFFECTS


def test_who_comes_to_a_full_pool_waits_without_settling() -> None:
    pool, _ = busy_pool(2)
    pool.acquire(30)
    for _ in range(3):
        pool.acquire(30)
        assert pool.effects is NO_EFFECTS


def test_waiters_are_served_in_the_order_of_their_coming() -> None:
    pool, [holder] = busy_pool()
    waiters = [pool.acquire() for _ in range(5)]
    for waiter in waiters:
        assert waiter is pool.queue[0]
        pool.release(holder)
        assert waiter.slot is not None
        holder = waiter


def test_of_several_idle_connections_the_one_released_last_is_taken_first() -> None:
    pool, holders = busy_pool(4)
    released = []
    for index in (2, 0, 3, 1):
        pool.advance(1)
        released.append(holders[index].slot)
        pool.release(holders[index])
    assert [pool.acquire().slot for _ in range(4)] == released[::-1]


def test_a_ping_does_not_change_the_order_of_the_idle() -> None:
    pool, holders = busy_pool(3, check_interval=30, max_idle=None)
    slots = [holder.slot for holder in holders]
    for holder in holders:
        pool.advance(1)
        pool.release(holder)
    pool.check()
    for slot in slots[::-1]:
        pool.pass_check(slot)
    assert [pool.acquire().slot for _ in range(3)] == slots[::-1]


def test_waiters_too_get_the_connection_that_was_idle_for_the_shortest_time() -> None:
    """When several become free to hand out in the same instant, for fewer waiters."""
    pool, holders = busy_pool(3, check_interval=0)
    slots = [holder.slot for holder in holders]
    for holder in holders:
        pool.advance(1)
        pool.release(holder)
    pool.check()
    for slot in slots:
        pool.pass_check(slot)
    assert pool.acquire().slot is slots[2]


def test_a_group_has_one_place_however_many_are_in_it_and_is_served_in_its_turn() -> None:
    pool, [holder] = busy_pool(max_waiting=3)
    waiters = [pool.acquire(), pool.acquire_for(*range(100)), pool.acquire()]
    assert not pool.refused
    for waiter in waiters:
        assert waiter is pool.queue[0]
        pool.release(holder)
        assert waiter in pool.held
        holder = waiter


def test_a_group_without_members_keeps_its_place_until_it_is_withdrawn() -> None:
    pool, [holder] = busy_pool()
    group, another, last = pool.acquire_for(), pool.acquire_for(), pool.acquire()
    pool.cancel(group)
    pool.release(holder)
    assert another.slot is not None
    pool.cancel(another)
    assert last.slot is not None


def test_who_comes_behind_a_group_that_waits_for_ever_has_a_time_limit_of_its_own() -> None:
    pool, _ = busy_pool()
    group, waiter = pool.acquire_for("member"), pool.acquire(5)
    pool.advance(5)
    assert pool.refused == {waiter: Refusal.TIMEOUT}
    assert pool.queue == [group]


def test_a_cancelled_waiter_loses_its_place_and_no_other() -> None:
    pool, [holder] = busy_pool()
    first, second, third = (pool.acquire() for _ in range(3))
    pool.cancel(second)
    pool.release(holder)
    pool.release(first)
    assert second.slot is None
    assert third.slot is not None


def test_a_grant_that_finds_its_caller_gone_goes_to_the_next() -> None:
    pool, [holder] = busy_pool()
    first, second = pool.acquire(), pool.acquire()
    pool.release(holder)
    pool.cancel(first)
    assert second.slot is not None
    pool.cancel(second)
    assert pool.count(IDLE) == 1


def test_a_grant_that_finds_its_caller_gone_and_its_connection_shut_down_is_nothing() -> None:
    pool, [holder] = busy_pool()
    waiter = pool.acquire()
    pool.release(holder)
    pool.close()
    pool.sever()
    pool.cancel(waiter)
    assert not pool.effects
    pool.finish_work()
    pool.cancel(waiter)
    assert pool.closed == 1


def test_a_waiter_is_refused_when_its_time_is_over_and_not_before() -> None:
    pool, _ = busy_pool()
    waiter = pool.acquire(5)
    pool.advance(4.875)
    assert waiter not in pool.refused
    pool.advance(0.125)
    assert pool.refused == {waiter: Refusal.TIMEOUT}
    assert pool.machine.timeouts == 1


def test_each_waiter_has_a_time_limit_of_its_own() -> None:
    pool, [holder] = busy_pool()
    patient, hurried, for_ever, quick = (pool.acquire(timeout) for timeout in (9, 3, None, 1))
    pool.advance(2)
    assert set(pool.refused) == {quick}
    pool.advance(2)
    assert set(pool.refused) == {quick, hurried}
    pool.advance(1000)
    assert set(pool.refused) == {quick, hurried, patient}
    pool.release(holder)
    assert for_ever.slot is not None


def test_the_whole_queue_has_one_wake_up() -> None:
    pool, _ = busy_pool(max_idle=None, max_lifetime=None, check_interval=None)
    wake_ups = 0
    for number in range(1000):
        pool.acquire(30 + number)
        wake_ups += pool.emitted(WakeAt)
    assert wake_ups == 1
    pool.acquire(10)
    assert pool.emitted(WakeAt) == 1, "one that is due sooner brings it forward"


def test_deadlines_of_those_who_left_do_not_pile_up() -> None:
    pool, [holder] = busy_pool()
    pool.acquire(None)  # with somebody patient before them, none of their deadlines is in the queue's order
    for number in range(3000):
        waiter = pool.acquire(1000)
        if number % 2:
            pool.cancel(waiter)
        else:
            first = pool.queue[0]
            pool.release(holder)
            holder = first
    assert len(pool.machine.waiters._early) < 100


@pytest.mark.parametrize("step", [0, 0.5], ids=["at the same time", "one after the other"])
def test_those_who_come_with_the_same_timeout_need_no_heap(step: float) -> None:
    pool, _ = busy_pool()
    for _ in range(10):
        pool.acquire(30)
        pool.advance(step)
    assert not pool.machine.waiters._early
    pool.acquire(1)
    assert len(pool.machine.waiters._early) == 1


def test_of_those_whose_time_is_over_together_the_first_to_have_come_is_told_first() -> None:
    pool, _ = busy_pool()
    pool.acquire(None)
    waiters = [pool.acquire(5) for _ in range(5)]
    pool.advance(5)
    assert list(pool.refused) == waiters


@pytest.mark.parametrize("seed", range(10))
def test_every_deadline_is_kept_whatever_their_order(seed: int) -> None:
    random = Random(seed)
    pool, [holder] = busy_pool()
    for _ in range(300):
        timeout = random.choice([None, 1, 3, 3, 3, 20])
        pool.acquire(timeout)
        if random.random() < 0.3:
            pool.cancel(random.choice(pool.queue))
        if pool.queue and random.random() < 0.2:
            first = pool.queue[0]
            pool.release(holder)
            holder = first
        pool.advance(random.choice([0, 0.25, 2]))
        assert all(waiter.deadline > pool.now for waiter in pool.queue)


def test_a_timer_that_fires_early_loses_nothing() -> None:
    pool, _ = busy_pool()
    waiter = pool.acquire(5)
    pool.freeze(4.9999)
    pool.wake()
    assert waiter not in pool.refused
    pool.advance(0.001)
    assert waiter in pool.refused


def test_a_timer_that_fires_late_serves_first_what_can_be_served() -> None:
    pool, [holder] = busy_pool()
    first, second = pool.acquire(5), pool.acquire(5)
    pool.freeze(20)
    pool.release(holder)
    assert first.slot is not None
    pool.wake()
    assert second in pool.refused


def test_timeout_0_takes_what_is_idle() -> None:
    pool = opened_pool(min_size=1)
    assert pool.acquire(0).slot is not None


def test_timeout_0_never_waits_and_makes_the_pool_grow_for_the_next() -> None:
    pool = opened_pool(max_size=2)
    waiter = pool.acquire(0)
    assert pool.refused == {waiter: Refusal.TIMEOUT}
    assert pool.count(CONNECTING) == 1
    pool.connect()
    assert pool.acquire(0).slot is not None


def test_timeout_0_on_a_full_pool_is_refused_at_once() -> None:
    pool, _ = busy_pool()
    waiter = pool.acquire(0)
    assert pool.refused == {waiter: Refusal.TIMEOUT}


def test_more_than_max_waiting_are_refused_at_once() -> None:
    pool, [holder] = busy_pool(max_waiting=2)
    first, second, third = (pool.acquire() for _ in range(3))
    assert pool.refused == {third: Refusal.TOO_MANY_WAITING}
    pool.release(holder)
    fourth = pool.acquire()
    assert first.slot is not None
    assert {second, fourth} == set(pool.queue)


def test_max_waiting_0_takes_what_is_idle_and_makes_the_pool_grow() -> None:
    pool = opened_pool(max_size=2, max_waiting=0)
    waiter = pool.acquire()
    assert pool.refused == {waiter: Refusal.TOO_MANY_WAITING}
    assert pool.emitted(Connect) == 1
    pool.finish_work()
    assert pool.acquire().slot is not None


def test_nobody_is_queued_in_a_pool_that_is_not_open() -> None:
    pool = virtual_pool(min_size=1)
    before = pool.acquire()
    pool.open()
    pool.finish_work()
    holder = pool.acquire()
    pool.close()
    while_closing = pool.acquire()
    pool.release(holder)
    pool.finish_work()
    after = pool.acquire()
    assert pool.refused == dict.fromkeys([before, while_closing, after], Refusal.CLOSED)


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    pool, [holder] = busy_pool(check_interval=10)
    first = pool.acquire()
    pool.advance(20)
    pool.release(holder, answered_at=pool.now - 20)
    assert pool.count(CHECKING) == 1
    newcomer = pool.acquire()
    pool.pass_check()
    assert first.slot is not None
    assert newcomer.slot is None


@pytest.mark.parametrize("waiting", [0, 2], ids=["nobody waits", "others wait"])
def test_a_connection_cannot_be_given_back_twice(waiting: int) -> None:
    pool, [holder] = busy_pool()
    slot = holder.slot
    assert slot is not None
    pool.release_dirty(holder)
    for _ in range(waiting):
        pool.acquire()
    with pytest.raises(IllegalMove, match="give_back of <Slot 1 RECYCLING>"):
        pool.machine.give_back(slot, pool.now, pool.now)
    with pytest.raises(IllegalMove, match="<Slot 1 RECYCLING> to RECYCLING"):
        pool.machine.recycle(slot, pool.now)
    with pytest.raises(IllegalMove, match="discard of <Slot 1 RECYCLING>"):
        pool.machine.discard(slot, CloseReason.LEASE_LOST, pool.now)
    assert slot.state is RECYCLING


# --- the place in the queue, and what counts as a lease -----------------------------------------------------


def places(effects: object) -> list[tuple[Waiter, int]]:
    assert isinstance(effects, list)
    return [(effect.waiter, effect.position) for effect in effects if isinstance(effect, Refuse)]


def test_those_whose_time_is_over_together_have_the_places_in_which_they_stood() -> None:
    pool, _ = busy_pool()
    waiters = [pool.acquire(5) for _ in range(3)]
    pool.acquire(9)
    pool.advance(5)
    assert places(pool.effects) == [(waiter, place) for place, waiter in enumerate(waiters, 1)]


def test_who_has_less_time_than_those_ahead_of_him_has_his_place_behind_them() -> None:
    pool, _ = busy_pool()
    for _ in range(2):
        pool.acquire(30)
    hasty = pool.acquire(1)
    pool.acquire(30)
    hastier = pool.acquire(0.5)
    pool.advance(0.5)
    assert places(pool.effects) == [(hastier, 5)]
    pool.advance(0.5)
    assert places(pool.effects) == [(hasty, 3)]


def test_places_behind_those_whose_time_is_over_too_count_them() -> None:
    pool, _ = busy_pool()
    first = pool.acquire(2)
    pool.acquire(30)
    hasty = pool.acquire(2)
    pool.advance(2)
    assert places(pool.effects) == [(first, 1), (hasty, 3)]


@pytest.mark.parametrize(("ahead", "place"), [(COUNTED - 1, COUNTED), (COUNTED, 0)])
def test_a_place_far_back_is_not_counted(ahead: int, place: int) -> None:
    """Many who are refused at once are each looked for."""
    machine = busy_pool()[0].machine
    for _ in range(ahead):
        machine.enqueue(Waiter(1000.0), 0.0)
    hasty = Waiter(1.0)
    machine.enqueue(hasty, 0.0)
    assert places(machine.wake(1.0)) == [(hasty, place)]


@pytest.mark.parametrize("refusal", [Refusal.CLOSED, Refusal.TOO_MANY_WAITING])
def test_who_stands_nowhere_has_no_place(refusal: Refusal) -> None:
    pool, _ = busy_pool(max_waiting=0)
    if refusal is Refusal.CLOSED:
        pool.machine.close(0.0)
    waiter = Waiter(1.0)
    assert places(list(pool.machine.enqueue(waiter, 0.0))) == [(waiter, 0)]


def test_a_grant_that_nobody_has_had_is_no_lease() -> None:
    pool, [holder] = busy_pool()
    waiter = pool.acquire()
    pool.release(holder)
    assert pool.machine.acquires == 2
    pool.cancel(waiter)
    assert pool.machine.acquires == 1


@pytest.mark.parametrize("was_granted", [False, True])
def test_a_lease_that_was_none_is_not_counted(was_granted: bool) -> None:
    pool, [holder] = busy_pool()
    pool.acquire()
    pool.release(holder)
    machine = pool.machine
    before = machine.immediate
    assert machine.acquires == 2
    machine.note_unused(was_granted=was_granted)
    assert machine.acquires == 1
    assert machine.immediate == (before if was_granted else before - 1)


def test_who_stood_in_the_queue_was_not_served_at_once() -> None:
    pool, [holder] = busy_pool()
    before = pool.machine.immediate
    pool.acquire()
    pool.release(holder)
    assert (pool.machine.acquires, pool.machine.immediate) == (2, before)
