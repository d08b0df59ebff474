"""`max_lifetime` and `max_uses`: at acquire, at release and on the timer, with as little harm as the size allows."""

from __future__ import annotations

from itertools import cycle

import pytest
from kit.invariants import CLOSING, CONNECTING, IDLE, LEASED
from kit.virtual_pool import VirtualPool, opened_pool

from asyncpool._core.policy import ConnectFailure
from asyncpool.events import CloseReason

LIFETIME = 1000.0
SOONEST = 900.0  # with all of the jitter


def aging_pool(*draws: float, min_size: int, max_size: int) -> VirtualPool:
    """Nothing but `max_lifetime` happens to it; born in this instant, with these draws for its connections."""
    return opened_pool(
        cycle(draws).__next__,
        min_size=min_size,
        max_size=max_size,
        max_lifetime=LIFETIME,
        max_idle=None,
        check_interval=None,
    )


# --- on the timer -------------------------------------------------------------------------------------------


def test_at_the_end_of_its_life_an_idle_connection_is_replaced_and_the_replacement_comes_first() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=2)
    [old] = pool.slots(IDLE)
    pool.advance(949.9)
    assert pool.machine.size == 1
    pool.advance(0.1)
    assert (pool.count(IDLE), pool.count(CONNECTING)) == (1, 1)
    assert pool.acquire().slot is old, "it serves until the replacement is there"
    pool.connect()
    assert old.state is LEASED


def test_the_old_one_goes_when_the_replacement_is_there() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=2)
    [old] = pool.slots(IDLE)
    pool.advance(950)
    new = pool.connect()
    assert old.state is CLOSING
    assert pool.slots(IDLE) == [new]
    assert pool.closes == {CloseReason.MAX_LIFETIME: 1}


def test_those_that_retire_together_are_replaced_one_after_the_other() -> None:
    pool = aging_pool(0.5, min_size=3, max_size=6)
    pool.advance(950)
    for _ in range(3):
        assert pool.count(CONNECTING) == 1
        pool.connect()
    assert pool.machine.connects == 6
    assert not pool.count(CONNECTING)


def test_each_connection_has_jitter_of_its_own_drawn_once_at_birth() -> None:
    pool = aging_pool(0.0, 0.25, 0.5, 0.75, min_size=4, max_size=5)
    pool.advance(SOONEST)
    assert pool.machine.connects == 4
    for connects in (5, 6, 7):
        pool.advance(25)
        pool.finish_work()
        assert pool.machine.connects == connects
        assert pool.count(IDLE) == 4
    pool.advance(25)
    pool.finish_work()
    assert pool.machine.connects == 8


def test_at_max_size_one_after_the_other_makes_room() -> None:
    pool = aging_pool(0.5, min_size=3, max_size=3)
    pool.advance(950)
    for left in (3, 2, 1):
        assert pool.count(CLOSING) == 1
        assert pool.count(IDLE) == 2
        pool.finish_close()
        assert pool.count(CONNECTING) == 1
        assert pool.count(IDLE) == 2
        assert pool.closes == {CloseReason.MAX_LIFETIME: 4 - left}
        pool.connect()
    assert pool.count(IDLE) == 3
    assert not pool.work


def test_what_min_size_does_not_want_goes_without_a_replacement() -> None:
    pool = aging_pool(0.5, min_size=0, max_size=3)
    pool.acquire()
    pool.connect()
    pool.release(next(iter(pool.held)))
    pool.advance(949)
    assert pool.count(IDLE) == 1
    pool.advance(1)
    pool.finish_work()
    assert pool.machine.size == 0


def test_a_full_pool_keeps_its_connections_while_the_server_lets_nobody_in() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=2)
    pool.acquire()
    pool.cancel(pool.acquire())
    pool.fail_connect(ConnectFailure.REFUSED)
    pool.release(next(iter(pool.held)))
    pool.resize(1, 1)
    pool.advance(999)
    assert pool.count(IDLE) == 1
    pool.advance(1)
    assert pool.closes == {CloseReason.MAX_LIFETIME: 1}


def test_past_max_lifetime_it_goes_even_without_a_replacement() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=2)
    pool.advance(950)
    pool.fail_connect(ConnectFailure.REFUSED)
    pool.advance(49)
    assert pool.count(IDLE) == 1
    pool.advance(1)
    assert pool.count(IDLE) == 0
    assert pool.closes == {CloseReason.MAX_LIFETIME: 1}


def test_a_connection_released_past_its_time_is_replaced_without_any_other_input() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=2)
    pool.advance(940)
    holder = pool.acquire()
    pool.advance(30)
    pool.release(holder)
    assert pool.count(CONNECTING) == 1
    pool.connect()
    assert pool.closes == {CloseReason.MAX_LIFETIME: 1}


def test_what_retires_while_it_is_leased_is_replaced_then_and_closed_when_it_comes_back() -> None:
    """A lease may last past `max_lifetime`, and would leave a hole in `min_size` at its end."""
    pool = aging_pool(0.5, min_size=1, max_size=2)
    holder = pool.acquire()
    old = holder.slot
    assert old is not None
    pool.advance(949.9)
    assert pool.machine.size == 1
    pool.advance(0.1)
    assert pool.count(CONNECTING) == 1
    new = pool.connect()
    pool.advance(LIFETIME)
    assert not pool.count(CONNECTING), "one replacement is enough"
    pool.release(holder)
    assert old.state is CLOSING
    assert new.state in (IDLE, CLOSING), "it may have come to its own end meanwhile"


def test_of_those_that_retire_while_they_are_leased_only_what_min_size_wants_is_replaced() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=9)
    for _ in range(3):
        pool.acquire()
    pool.finish_work()
    assert pool.count(LEASED) == 3
    pool.advance(950)
    assert pool.count(CONNECTING) == 1
    pool.finish_work()
    assert pool.machine.connects == 4
    for holder in list(pool.held):
        pool.release(holder)
        pool.finish_work()
    assert pool.count(IDLE) == 1
    assert pool.machine.connects == 4


# --- at acquire and at release ------------------------------------------------------------------------------


def test_past_max_lifetime_a_connection_is_not_handed_out_even_if_nobody_woke_the_pool() -> None:
    pool = aging_pool(0.5, min_size=1, max_size=2)
    [old] = pool.slots(IDLE)
    pool.freeze(LIFETIME)
    waiter = pool.acquire()
    assert old.state is CLOSING
    pool.finish_work()
    assert waiter.slot not in (None, old)


@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize("dirty", [False, True])
def test_past_max_lifetime_a_connection_that_comes_back_is_closed(waiting: int, dirty: bool) -> None:
    pool = aging_pool(0.5, min_size=1, max_size=1)
    holder = pool.acquire()
    waiters = [pool.acquire() for _ in range(waiting)]
    pool.advance(LIFETIME)
    assert holder.slot is not None
    assert holder.slot.state is LEASED, "nobody takes it away from its holder"
    (pool.release_dirty if dirty else pool.release)(holder)
    assert pool.closes == {CloseReason.MAX_LIFETIME: 1}
    pool.finish_work()
    assert all(waiter.slot is not None for waiter in waiters)


def test_in_a_pool_that_is_never_idle_retirements_are_spaced_and_not_all_at_max_lifetime() -> None:
    pool = aging_pool(0.0, 0.25, 0.5, 0.75, min_size=4, max_size=4)
    holders = [pool.acquire() for _ in range(4)]
    most_at_once = 0
    while pool.now < 1000.0 + LIFETIME + 10:
        pool.advance(5)
        pool.acquire()
        pool.release(holders.pop(0))
        most_at_once = max(most_at_once, pool.count(CLOSING) + pool.count(CONNECTING))
        pool.finish_work()
        holders = list(pool.held)
    assert pool.closes[CloseReason.MAX_LIFETIME] == 4
    assert most_at_once == 1


def test_at_max_size_those_who_wait_are_served_by_the_others_while_one_retires() -> None:
    pool = aging_pool(0.5, min_size=2, max_size=2)
    holders = [pool.acquire() for _ in range(2)]
    first, second = pool.acquire(), pool.acquire()
    pool.advance(950)
    pool.release(holders[0])
    assert pool.count(CLOSING) == 1
    pool.release(holders[1])
    assert first.slot is holders[1].slot
    pool.finish_work()
    assert second.slot is not None


# --- max_uses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_uses", [1, 3])
def test_a_connection_is_leased_max_uses_times_and_then_replaced(max_uses: int) -> None:
    pool = opened_pool(min_size=1, max_size=1, max_uses=max_uses)
    for round_number in range(1, 4):
        slots = set()
        for _ in range(max_uses):
            holder = pool.acquire()
            assert holder.slot is not None
            slots.add(holder.slot)
            pool.release(holder)
        assert len(slots) == 1
        assert pool.closes == {CloseReason.MAX_USES: round_number}
        pool.finish_work()


def test_max_uses_holds_for_those_who_waited_too() -> None:
    pool = opened_pool(min_size=1, max_size=1, max_uses=2)
    holder = pool.acquire()
    waiters = [pool.acquire() for _ in range(3)]
    slots = [holder.slot]
    for waiter in waiters:
        pool.release(holder)
        pool.finish_work()
        slots.append(waiter.slot)
        holder = waiter
    assert slots[0] is slots[1] is not slots[2]
    assert slots[2] is slots[3]


def test_the_last_use_is_not_rolled_back_in_vain() -> None:
    pool = opened_pool(min_size=1, max_size=1, max_uses=1)
    pool.release_dirty(pool.acquire())
    assert pool.count(CLOSING) == 1


@pytest.mark.parametrize("check_interval", [None, 10 * LIFETIME])
def test_what_was_given_back_in_time_is_not_handed_out_past_its_end_by_a_late_timer(
    check_interval: float | None,
) -> None:
    pool = opened_pool(min_size=1, max_size=1, max_lifetime=LIFETIME, max_idle=None, check_interval=check_interval)
    holder = pool.acquire()
    pool.release(holder)
    pool.freeze(LIFETIME)
    assert pool.acquire().slot is None
