"""How many connections there are: growth, `max_connecting`, what failing connects do, shrinking after `max_idle`."""

from __future__ import annotations

import pytest
from kit.invariants import CHECKING, CLOSING, CONNECTING, IDLE, LEASED, RECYCLING
from kit.virtual_pool import VirtualPool, opened_pool, virtual_pool

from asyncpool._core.effects import Refusal
from asyncpool._core.policy import NEVER, ConnectFailure
from asyncpool.events import CloseReason

FINAL, REFUSED, TRANSIENT = ConnectFailure
STATES = (CONNECTING, IDLE, LEASED, CHECKING, RECYCLING, CLOSING)


def sizes(pool: VirtualPool) -> dict[str, int]:
    """The states that occur, and how often."""
    return {state.name.lower(): pool.count(state) for state in STATES if pool.count(state)}


# --- growth -------------------------------------------------------------------------------------------------


def test_a_pool_without_min_size_connects_when_somebody_asks() -> None:
    pool = opened_pool()
    assert pool.machine.size == 0
    pool.acquire()
    assert sizes(pool) == {"connecting": 1}
    pool.connect()
    assert sizes(pool) == {"leased": 1}


def test_it_grows_by_one_for_each_who_waits_up_to_max_size() -> None:
    pool = opened_pool(max_size=3)
    waiters = [pool.acquire() for _ in range(5)]
    assert sizes(pool) == {"connecting": 3}
    pool.finish_work()
    assert [waiter.slot is not None for waiter in waiters] == [True] * 3 + [False] * 2


def test_it_does_not_grow_for_what_an_idle_connection_can_serve() -> None:
    pool = opened_pool(min_size=2, max_size=9)
    for _ in range(5):
        first, second = pool.acquire(), pool.acquire()
        pool.release(first)
        pool.release(second)
    assert pool.machine.connects == 2


def test_it_does_not_grow_for_what_is_coming_back_from_a_check_or_a_rollback() -> None:
    pool = opened_pool(min_size=2, max_size=9, check_interval=10)
    holder = pool.acquire()
    pool.advance(10)
    pool.release_dirty(holder)
    assert sizes(pool) == {"checking": 1, "recycling": 1}
    pool.acquire()
    pool.acquire()
    assert not pool.count(CONNECTING)
    pool.acquire()
    assert pool.count(CONNECTING) == 1


def test_a_connect_outlives_the_caller_that_caused_it() -> None:
    pool = opened_pool()
    waiter = pool.acquire()
    pool.cancel(waiter)
    pool.connect()
    assert sizes(pool) == {"idle": 1}


def test_no_more_than_max_connecting_connect_at_once() -> None:
    pool = virtual_pool(min_size=7, max_size=9, max_connecting=3).open()
    for left in (3, 3, 3, 3, 3, 2, 1):
        assert pool.count(CONNECTING) == left
        pool.connect()
    assert sizes(pool) == {"idle": 7}


def test_a_place_is_free_only_when_its_session_is_over() -> None:
    pool = opened_pool(min_size=1, max_size=1)
    pool.discard(pool.acquire())
    waiter = pool.acquire()
    assert sizes(pool) == {"closing": 1}
    pool.finish_close()
    assert sizes(pool) == {"connecting": 1}
    pool.connect()
    assert waiter.slot is not None


def test_min_size_is_made_up_for_when_a_connection_is_lost() -> None:
    pool = opened_pool(min_size=2, max_size=3)
    pool.disconnect(pool.slots(IDLE)[0])
    assert pool.count(CONNECTING) == 1


# --- failures -----------------------------------------------------------------------------------------------


def test_while_the_server_fails_one_connect_at_a_time_probes() -> None:
    pool = virtual_pool(min_size=4, max_size=8, backoff_initial=1, backoff_max=4).open()
    for _ in range(4):
        pool.fail_connect(REFUSED)
    for _ in range(20):
        assert pool.count(CONNECTING) == 0
        pool.advance(4)
        assert pool.count(CONNECTING) == 1
        pool.acquire()
        assert pool.count(CONNECTING) == 1
        pool.fail_connect(REFUSED)


def test_after_the_first_success_all_that_are_missing_connect() -> None:
    pool = virtual_pool(min_size=4, max_size=8, backoff_initial=1, backoff_max=4).open()
    for _ in range(4):
        pool.fail_connect(REFUSED)
    pool.advance(4)
    pool.connect()
    assert pool.count(CONNECTING) == 3


def test_nobody_connects_after_a_failure_when_nobody_needs_it() -> None:
    pool = opened_pool()
    pool.cancel(pool.acquire())
    pool.fail_connect()
    assert pool.wake_at == NEVER
    pool.advance(1000)
    assert pool.machine.size == 0
    assert pool.machine.connect_errors == 1


def test_every_failed_connect_is_counted() -> None:
    pool = virtual_pool(min_size=3, max_size=3, backoff_max=4).open()
    for failure in (REFUSED, TRANSIENT, FINAL):
        pool.fail_connect(failure)
    assert pool.machine.connect_errors == 3


def test_a_server_that_refuses_is_given_backoff_initial_whatever_is_drawn() -> None:
    pool = virtual_pool(lambda: 0.0, min_size=1, backoff_initial=1).open()
    pool.fail_connect(REFUSED)
    assert not pool.count(CONNECTING)
    pool.advance(1)
    assert pool.count(CONNECTING) == 1
    pool.fail_connect(TRANSIENT)
    assert pool.count(CONNECTING) == 1, "no pause at all was drawn"


def test_a_connection_that_was_there_but_unfit_counts_as_closed_for_its_reason() -> None:
    pool = opened_pool()
    pool.acquire()
    pool.fail_connect(FINAL, reason=CloseReason.CONFIGURE_FAILED)
    assert pool.machine.closes == {CloseReason.CONFIGURE_FAILED: 1}
    assert pool.machine.connect_errors == 1
    assert pool.machine.connects == 0


def test_a_final_error_fails_all_waiters_at_once_if_there_is_no_connection() -> None:
    pool = opened_pool(max_size=2)
    waiters = [pool.acquire() for _ in range(3)]
    pool.fail_connect(FINAL)
    assert pool.refused == dict.fromkeys(waiters, Refusal.CANNOT_CONNECT)


def test_a_final_error_fails_nobody_while_there_is_a_connection() -> None:
    pool = opened_pool(min_size=1, max_size=2)
    holder = pool.acquire()
    waiter = pool.acquire()
    pool.fail_connect(FINAL)
    assert not pool.refused
    pool.release(holder)
    assert waiter.slot is not None


@pytest.mark.parametrize("failure", [REFUSED, TRANSIENT])
def test_an_error_that_may_pass_fails_nobody(failure: ConnectFailure) -> None:
    pool = opened_pool(backoff_max=4)
    waiter = pool.acquire(60)
    for _ in range(10):
        pool.fail_connect(failure)
        pool.advance(4)
    pool.connect()
    assert waiter.slot is not None


# --- max_idle -----------------------------------------------------------------------------------------------


def used_pool(size: int, **options: object) -> VirtualPool:
    """A pool that has grown to this size, every connection released in this instant."""
    pool = opened_pool(**options)  # type: ignore[arg-type]
    waiters = [pool.acquire() for _ in range(size)]
    pool.finish_work()
    for waiter in waiters:
        pool.release(waiter)
    return pool


def test_it_shrinks_to_min_size_after_max_idle() -> None:
    pool = used_pool(5, min_size=2, max_idle=60, check_interval=None)
    pool.advance(59)
    assert sizes(pool) == {"idle": 5}
    pool.advance(1)
    assert sizes(pool) == {"idle": 2, "closing": 3}
    assert pool.closes == {CloseReason.MAX_IDLE: 3}
    pool.advance(1000)
    assert pool.count(IDLE) == 2


def test_pings_do_not_count_as_use() -> None:
    pool = used_pool(3, max_idle=60, check_interval=7)
    for _ in range(60):
        pool.finish_work()
        pool.advance(1)
    assert pool.count(IDLE) == 0


def test_what_is_used_again_and_again_stays_and_the_rest_goes() -> None:
    pool = used_pool(3, max_idle=60, check_interval=None)
    for _ in range(20):
        pool.advance(10)
        pool.release(pool.acquire())
    assert pool.count(IDLE) == 1


def test_without_max_idle_it_never_shrinks() -> None:
    pool = used_pool(3, max_idle=None, max_lifetime=None, check_interval=None)
    pool.advance(1e9)
    assert pool.count(IDLE) == 3
    assert pool.wakes == 0


def test_after_a_freeze_a_caller_is_served_before_the_pool_shrinks() -> None:
    pool = used_pool(2, max_idle=60, check_interval=30)
    pool.freeze(1000)
    waiter = pool.acquire()
    pool.pass_check()
    assert waiter.slot is not None
