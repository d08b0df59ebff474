"""`resize` and `drain` at run time: what goes at once, what goes when it comes back, what takes its place."""

from __future__ import annotations

from kit.invariants import CHECKING, CLOSING, CONNECTING, IDLE, LEASED, RECYCLING
from kit.virtual_pool import opened_pool, virtual_pool

from asyncpool.events import CloseReason

# --- resize -------------------------------------------------------------------------------------------------


def test_a_greater_min_size_is_connected_at_once() -> None:
    pool = opened_pool(min_size=1, max_size=2)
    pool.resize(3, 4)
    pool.finish_work()
    assert pool.count(IDLE) == 3


def test_a_greater_max_size_lets_those_who_wait_have_more() -> None:
    pool = opened_pool(min_size=1, max_size=1)
    pool.acquire()
    waiters = [pool.acquire() for _ in range(3)]
    pool.resize(1, 3)
    pool.finish_work()
    assert [waiter.slot is not None for waiter in waiters] == [True, True, False]


def test_idle_connections_in_excess_close_at_once_longest_idle_first() -> None:
    pool = opened_pool(min_size=3, max_size=3)
    holders = [pool.acquire() for _ in range(3)]
    for holder in holders:
        pool.advance(1)
        pool.release(holder)
    pool.resize(1, 1)
    assert pool.slots(IDLE) == [holders[-1].slot]
    assert pool.closes == {CloseReason.SHRUNK: 2}


def test_a_smaller_min_size_alone_closes_nothing() -> None:
    pool = opened_pool(min_size=3, max_size=5, max_idle=60, check_interval=None)
    pool.resize(1, 5)
    assert pool.count(IDLE) == 3
    pool.advance(60)
    assert pool.count(IDLE) == 1


def test_leased_connections_in_excess_close_when_they_come_back_and_no_more_than_those() -> None:
    pool = opened_pool(min_size=5, max_size=5)
    holders = [pool.acquire() for _ in range(4)]
    pool.resize(2, 2)
    assert pool.count(IDLE) == 0
    for holder in holders[:2]:
        pool.release(holder)
        assert [close.reason for close in pool.emitted_closes()] == [CloseReason.SHRUNK]
    pool.release_dirty(holders[2])
    pool.release(holders[3])
    pool.finish_work()
    assert pool.count(IDLE) == 2
    assert pool.closes == {CloseReason.SHRUNK: 3}


def test_an_excess_that_comes_back_for_a_rollback_closes_instead() -> None:
    pool = opened_pool(min_size=2, max_size=2)
    holders = [pool.acquire() for _ in range(2)]
    pool.resize(1, 1)
    pool.release_dirty(holders[0])
    assert pool.count(CLOSING) == 1
    pool.release_dirty(holders[1])
    assert pool.count(RECYCLING) == 1


def test_an_excess_that_was_being_checked_or_rolled_back_closes_when_that_is_done() -> None:
    pool = opened_pool(min_size=3, max_size=3, max_idle=None)
    holders = [pool.acquire() for _ in range(2)]
    for holder in holders:
        pool.release_dirty(holder)
    pool.check()
    assert (pool.count(CHECKING), pool.count(RECYCLING)) == (1, 2)
    pool.resize(1, 1)
    pool.finish_work()
    assert pool.machine.size == pool.count(IDLE) == 1


def test_connects_in_excess_are_called_off_before_anything_that_is_connected() -> None:
    pool = virtual_pool(min_size=4, max_size=4).open()
    pool.connect()
    pool.resize(1, 2)
    assert (pool.count(IDLE), pool.count(CONNECTING), pool.count(CLOSING)) == (1, 1, 2)
    called_off = pool.slots(CLOSING)[0]
    pool.connect(called_off)  # it was there already when it was told to stop
    assert called_off.state is CLOSING
    pool.finish_work()
    assert pool.count(IDLE) == 2


def test_a_connect_that_is_not_in_excess_goes_on() -> None:
    pool = virtual_pool(min_size=2, max_size=4).open()
    pool.resize(2, 2)
    assert not pool.effects
    assert pool.count(CONNECTING) == 2


def test_what_waits_is_served_by_the_smaller_pool() -> None:
    pool = opened_pool(min_size=3, max_size=3)
    holders = [pool.acquire() for _ in range(3)]
    waiters = [pool.acquire() for _ in range(3)]
    pool.resize(1, 1)
    for holder in holders:
        pool.release(holder)
    for waiter in waiters:
        assert waiter.slot is not None
        pool.release(waiter)
    assert pool.count(IDLE) == 1


def test_an_opening_pool_whose_min_size_is_lowered_to_what_is_there_is_open() -> None:
    pool = virtual_pool(min_size=3, max_size=3).open()
    pool.connect()
    assert pool.opened == 0
    pool.resize(1, 3)
    assert pool.opened == 1


# --- drain --------------------------------------------------------------------------------------------------


def test_drain_replaces_the_idle_ones_at_once() -> None:
    pool = opened_pool(min_size=2, max_size=4)
    old = pool.machine.slots()
    pool.drain()
    assert pool.count(IDLE) == 0
    assert pool.closes == {CloseReason.DRAINED: 2}
    pool.finish_work()
    assert pool.count(IDLE) == 2
    assert not set(old) & set(pool.machine.slots())


def test_drain_replaces_the_leased_ones_when_they_come_back_even_if_somebody_waits() -> None:
    pool = opened_pool(min_size=1, max_size=1)
    holder = pool.acquire()
    pool.drain()
    assert holder.slot is not None
    assert holder.slot.state is LEASED
    waiter = pool.acquire()
    pool.release(holder)
    assert waiter.slot is None
    assert pool.closes == {CloseReason.DRAINED: 1}
    pool.finish_work()
    assert waiter.slot not in (None, holder.slot)


def test_drain_spares_nothing_that_is_on_its_way() -> None:
    pool = opened_pool(min_size=2, max_size=3)
    pool.release_dirty(pool.acquire())
    pool.check()
    pool.acquire()
    pool.acquire()
    pool.acquire()
    assert (pool.count(CHECKING), pool.count(RECYCLING), pool.count(CONNECTING)) == (1, 1, 1)
    old = pool.machine.slots()
    pool.drain()
    assert pool.count(CLOSING) == 3
    for slot in old:
        pool.tell(slot, pool.superseded[slot], well=True)
        assert slot.state is CLOSING
    pool.finish_work()
    assert pool.count(LEASED) == 3
    assert not set(old) & set(pool.machine.slots())


def test_what_connects_after_a_drain_is_not_drained() -> None:
    pool = opened_pool(min_size=1, max_size=2)
    pool.drain()
    pool.finish_work()
    pool.release(pool.acquire())
    assert pool.count(IDLE) == 1
    assert pool.closes == {CloseReason.DRAINED: 1}
