"""Pings in the background and before hand-out; what one dead connection says about the others."""

from __future__ import annotations

import pytest
from kit.invariants import CHECKING, CLOSING, CONNECTING, IDLE, LEASED, RECYCLING
from kit.virtual_pool import VirtualPool, opened_pool

from asyncpool.events import CloseReason

# --- check_interval -----------------------------------------------------------------------------------------


def test_an_idle_connection_is_pinged_when_check_interval_has_passed_since_the_last_answer() -> None:
    pool = opened_pool(min_size=1, check_interval=30)
    pool.advance(29)
    assert pool.count(IDLE) == 1
    pool.advance(1)
    assert pool.count(CHECKING) == 1
    pool.pass_check()
    pool.advance(29)
    assert pool.count(IDLE) == 1
    pool.advance(1)
    assert pool.count(CHECKING) == 1


def test_a_statement_is_as_good_as_a_ping() -> None:
    pool = opened_pool(min_size=1, check_interval=30)
    pool.advance(29)
    pool.release(pool.acquire())
    pool.advance(29)
    assert pool.count(IDLE) == 1
    pool.advance(1)
    assert pool.count(CHECKING) == 1


def test_a_lease_without_a_statement_is_not() -> None:
    pool = opened_pool(min_size=1, check_interval=30)
    pool.advance(29)
    pool.release(pool.acquire(), answered_at=pool.now - 29)
    pool.advance(1)
    assert pool.count(CHECKING) == 1


def test_a_connection_that_comes_back_unverified_is_pinged_at_once() -> None:
    pool = opened_pool(min_size=1, check_interval=30)
    holder = pool.acquire()
    pool.advance(100)
    pool.release(holder, answered_at=pool.now - 31)
    assert pool.count(CHECKING) == 1


@pytest.mark.parametrize("seconds", [30, 31])
def test_after_a_freeze_a_connection_is_pinged_before_it_is_handed_out(seconds: float) -> None:
    pool = opened_pool(min_size=2, check_interval=30)
    pool.freeze(seconds)
    waiter = pool.acquire()
    assert waiter.slot is None
    assert pool.count(CHECKING) == 2
    assert not pool.count(CONNECTING)
    pool.pass_check()
    assert waiter.slot is not None


def test_check_interval_0_pings_on_every_acquire_one_connection_for_each_caller() -> None:
    pool = opened_pool(min_size=3, check_interval=0)
    for _ in range(3):
        pool.advance(1)
        waiter = pool.acquire()
        assert pool.count(CHECKING) == 1
        pool.pass_check()
        assert waiter.slot is not None
        pool.advance(1)
        pool.release(waiter)


def test_check_interval_0_pings_the_one_that_was_idle_for_the_shortest_time() -> None:
    pool = opened_pool(min_size=3, max_size=3, check_interval=0)
    holders = [pool.acquire() for _ in range(3)]
    slots = [holder.slot for holder in holders]
    for holder in holders:
        pool.advance(1)
        pool.release(holder)
    pool.advance(1)
    pool.acquire()
    assert pool.slots(CHECKING) == [slots[2]]


@pytest.mark.parametrize(("check_interval", "age"), [(0, 1), (30, 30)])
def test_what_comes_back_unverified_is_pinged_for_those_who_wait_and_may_answer_before_the_others(
    check_interval: float, age: float
) -> None:
    pool = opened_pool(min_size=2, max_size=2, check_interval=check_interval)
    holder = pool.acquire()
    pool.advance(age)
    waiter = pool.acquire()
    assert pool.count(CHECKING) == 1
    pool.release(holder, answered_at=pool.now - age)
    assert waiter.slot is None
    assert pool.count(CHECKING) == 2
    pool.pass_check(holder.slot)
    assert waiter.slot is holder.slot


def test_check_interval_0_pings_for_who_waits_even_what_has_answered_its_last_user_in_this_instant() -> None:
    pool = opened_pool(min_size=1, max_size=1, check_interval=0)
    holder = pool.acquire()
    pool.advance(1)
    waiter = pool.acquire()
    pool.release(holder, answered_at=pool.now)
    assert pool.count(CHECKING) == 1
    assert waiter.slot is None


def test_check_interval_0_pings_nothing_in_the_background() -> None:
    pool = opened_pool(min_size=3, check_interval=0, max_lifetime=None)
    pool.advance(1e6)
    assert pool.count(IDLE) == 3
    assert pool.wakes == 0


def test_check_interval_none_never_pings() -> None:
    pool = opened_pool(min_size=3, check_interval=None, max_lifetime=None)
    pool.advance(1e6)
    assert pool.acquire().slot is not None
    assert pool.wakes == 0


def test_a_quiet_pool_wakes_for_its_pings_only() -> None:
    pool = opened_pool(min_size=3, check_interval=30, max_lifetime=None)
    for _ in range(100):
        pool.advance(30)
        pool.finish_work()
    assert pool.wakes == 100


def test_a_check_that_fails_closes_the_connection_and_serves_the_caller_otherwise() -> None:
    pool = opened_pool(min_size=1, max_size=2, check_interval=0)
    pool.advance(1)
    waiter = pool.acquire()
    pool.fail_check()
    assert pool.closes == {CloseReason.CHECK_FAILED: 1}
    pool.finish_work()
    assert waiter.slot is not None


def test_check_pings_every_idle_connection() -> None:
    pool = opened_pool(min_size=3, check_interval=None)
    pool.check()
    assert pool.count(CHECKING) == 3
    pool.finish_work()
    assert pool.count(IDLE) == 3


def test_a_connection_whose_reset_fails_is_closed_and_replaced() -> None:
    pool = opened_pool(min_size=1)
    pool.release_dirty(pool.acquire())
    assert pool.count(RECYCLING) == 1
    pool.fail_recycle()
    assert pool.closes == {CloseReason.RESET_FAILED: 1}
    pool.finish_work()
    assert pool.count(IDLE) == 1


# --- one is dead --------------------------------------------------------------------------------------------


def lose_idle(pool: VirtualPool) -> None:
    pool.disconnect(pool.slots(IDLE)[0])


def lose_leased(pool: VirtualPool) -> None:
    pool.discard(pool.acquire(), CloseReason.DISCONNECTED)


def lose_under_check(pool: VirtualPool) -> None:
    holders = [pool.acquire() for _ in range(2)]
    pool.check()
    for holder in holders:
        pool.release(holder)
    pool.fail_check(CloseReason.DISCONNECTED)


def find_read_only(pool: VirtualPool) -> None:
    pool.discard(pool.acquire(), CloseReason.READ_ONLY)


def lose_in_recycling(pool: VirtualPool) -> None:
    pool.release_dirty(pool.acquire())
    pool.fail_recycle(CloseReason.DISCONNECTED)


@pytest.mark.parametrize("lose", [lose_idle, lose_leased, lose_under_check, lose_in_recycling, find_read_only])
@pytest.mark.parametrize("check_interval", [None, 0, 30])
def test_when_one_is_dead_all_idle_ones_must_answer_first(lose: object, check_interval: float | None) -> None:
    pool = opened_pool(min_size=3, max_size=3, check_interval=check_interval)
    assert callable(lose)
    lose(pool)
    assert (pool.count(CHECKING), pool.count(CLOSING)) == (2, 1)
    waiter = pool.acquire()
    assert waiter.slot is None
    pool.pass_check()
    assert waiter.slot is not None


@pytest.mark.parametrize("check_interval", [None, 0, 30])
def test_when_a_lease_finds_its_server_read_only_all_idle_ones_must_answer_first(check_interval: float | None) -> None:
    pool = opened_pool(min_size=3, max_size=3, check_interval=check_interval)
    holder = pool.acquire()
    assert holder.slot is not None
    pool.release_dirty(holder)
    pool.fail_recycle(CloseReason.READ_ONLY)
    assert (pool.count(CHECKING), pool.count(CLOSING)) == (2, 1)
    assert pool.acquire().slot is None


def test_no_pause_of_failed_connects_delays_the_checks() -> None:
    pool = opened_pool(min_size=3, max_size=4)
    lose_idle(pool)
    pool.fail_check()
    pool.fail_check()
    assert pool.count(CONNECTING) == 1
    pool.fail_connect()
    assert pool.count(CHECKING) == 0
    assert pool.count(CLOSING) == 3


def test_those_that_connected_afterwards_are_trusted() -> None:
    pool = opened_pool(min_size=2, max_size=4)
    holders = [pool.acquire() for _ in range(2)]
    pool.disconnect(pool.slots(LEASED)[0])
    waiters = [pool.acquire() for _ in range(2)]
    pool.finish_work()
    for waiter in waiters:
        pool.release(waiter)
    for holder in holders:
        pool.discard(holder, CloseReason.DISCONNECTED)
    assert pool.count(IDLE) == 2
    assert pool.count(CHECKING) == 0


@pytest.mark.parametrize("earlier_drains", [0, 1, 2])
def test_a_drained_one_that_is_dead_says_nothing_about_those_that_came_after_it(earlier_drains: int) -> None:
    pool = opened_pool(min_size=2, max_size=3)
    for _ in range(earlier_drains):
        pool.drain()
        pool.finish_work()
    holder = pool.acquire()
    pool.drain()
    pool.finish_work()
    pool.discard(holder, CloseReason.DISCONNECTED)
    assert pool.count(IDLE) == 1
    assert pool.count(CHECKING) == 0


def test_a_lease_tells_a_session_that_the_server_has_ended_from_one_that_is_to_be_replaced() -> None:
    pool = opened_pool(min_size=1, max_size=1)
    pool.acquire()
    [slot] = pool.slots(LEASED)
    assert not slot.is_disconnected
    pool.drain()
    assert not slot.is_disconnected
    pool.disconnect(slot)
    assert slot.is_disconnected


def test_a_leased_connection_that_is_dead_is_not_handed_to_the_next() -> None:
    pool = opened_pool(min_size=1, max_size=1)
    holder = pool.acquire()
    waiter = pool.acquire()
    pool.disconnect(pool.slots(LEASED)[0])
    pool.release(holder)
    assert waiter.slot is None
    assert pool.closes == {CloseReason.DISCONNECTED: 1}


@pytest.mark.parametrize("state", [CHECKING, RECYCLING])
def test_a_disconnect_that_comes_with_the_last_answer_is_not_forgotten(state: object) -> None:
    """The watch tells it once; the work may still end well, its answer having been read already."""
    pool = opened_pool(min_size=1, max_size=1)
    if state is CHECKING:
        pool.check()
    else:
        pool.release_dirty(pool.acquire())
    [slot] = pool.machine.slots()
    assert slot.state is state
    pool.disconnect(slot)
    pool.tell(slot, slot.state, well=True)
    assert slot.state is CLOSING
    assert pool.closes == {CloseReason.DISCONNECTED: 1}
