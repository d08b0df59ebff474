"""The pool's life cycle: opening, final errors, closing with and without leases, opening again."""

from __future__ import annotations

import pytest
from kit.invariants import CHECKING, CLOSING, CONNECTING, IDLE, LEASED, RECYCLING
from kit.virtual_pool import opened_pool, virtual_pool

from asyncpool._core.effects import Close, Connect, Refusal
from asyncpool._core.machine import IllegalMove
from asyncpool._core.policy import ConnectFailure
from asyncpool._core.states import LEGAL_MOVES, LEGAL_PHASES, PoolPhase, SlotState
from asyncpool.events import CloseReason

FINAL, REFUSED, TRANSIENT = ConnectFailure


# --- opening ------------------------------------------------------------------------------------------------


def test_it_is_open_when_min_size_is_connected_and_is_so_once() -> None:
    pool = virtual_pool(min_size=3, max_size=5).open()
    for _ in range(2):
        pool.connect()
        assert pool.machine.phase is PoolPhase.OPENING
    pool.connect()
    assert pool.machine.phase is PoolPhase.OPEN
    pool.disconnect(pool.slots(IDLE)[0])
    pool.finish_work()
    assert pool.opened == 1


def test_without_min_size_it_is_open_at_once() -> None:
    pool = virtual_pool(min_size=0).open()
    assert pool.opened == 1
    assert not pool.work


def test_it_serves_while_it_opens() -> None:
    pool = virtual_pool(min_size=2).open()
    waiter = pool.acquire()
    pool.connect()
    assert waiter.slot is not None
    pool.connect()
    assert pool.opened == 1


def test_a_connection_lost_while_it_opens_is_made_up_for() -> None:
    pool = virtual_pool(min_size=2).open()
    pool.disconnect(pool.connect())
    pool.connect()
    assert pool.opened == 0
    pool.finish_work()
    assert pool.opened == 1


def test_a_final_error_is_the_answer_at_once() -> None:
    pool = virtual_pool(min_size=2).open()
    pool.fail_connect(FINAL)
    assert pool.opening_failed == 1


@pytest.mark.parametrize("failure", [REFUSED, TRANSIENT])
def test_an_error_that_may_pass_is_tried_again(failure: ConnectFailure) -> None:
    pool = virtual_pool(min_size=1, backoff_max=4).open()
    for _ in range(20):
        pool.fail_connect(failure)
        pool.advance(4)
    assert pool.opening_failed == 0
    pool.connect()
    assert pool.opened == 1


@pytest.mark.parametrize("failure", list(ConnectFailure))
def test_in_a_single_round_the_first_error_is_the_answer(failure: ConnectFailure) -> None:
    pool = virtual_pool(min_size=2).open(single_round=True)
    pool.connect()
    pool.fail_connect(failure)
    assert pool.opening_failed == 1


def test_once_it_is_open_no_error_says_that_opening_has_failed() -> None:
    pool = virtual_pool(min_size=1).open(single_round=True)
    pool.connect()
    pool.disconnect(pool.slots(IDLE)[0])
    pool.fail_connect(FINAL)
    assert pool.opening_failed == 0


def test_an_opening_that_has_failed_can_be_closed() -> None:
    pool = virtual_pool(min_size=3).open()
    pool.fail_connect(FINAL)
    pool.close()
    pool.finish_work()
    assert pool.closed == 1


# --- closing ------------------------------------------------------------------------------------------------


def test_an_empty_pool_is_closed_at_once() -> None:
    pool = opened_pool()
    pool.close()
    assert pool.closed == 1


def test_closing_ends_everything_but_the_leases_and_refuses_those_who_wait() -> None:
    pool = opened_pool(min_size=4, max_size=5)
    holder = pool.acquire()
    pool.release_dirty(pool.acquire())
    pool.check()
    pool.pass_check()
    assert (pool.count(IDLE), pool.count(CHECKING), pool.count(RECYCLING)) == (1, 1, 1)
    pool.close()
    assert (pool.count(LEASED), pool.count(CLOSING)) == (1, 3)
    assert pool.closes == {CloseReason.POOL_CLOSED: 3}
    pool.finish_work()
    assert pool.closed == 0
    pool.release(holder)
    pool.finish_work()
    assert pool.closed == 1


def test_those_who_wait_when_it_closes_are_refused_in_order() -> None:
    pool = opened_pool(max_size=1)
    waiters = [pool.acquire() for _ in range(3)]
    pool.close()
    assert list(pool.refused.items()) == [(waiter, Refusal.CLOSED) for waiter in waiters]


def test_connects_are_called_off_and_what_they_still_tell_is_ignored() -> None:
    pool = virtual_pool(min_size=3).open()
    succeeding, failing, silent = pool.slots(CONNECTING)
    pool.close()
    pool.connect(succeeding)
    pool.fail_connect(FINAL, failing)
    assert pool.count(CLOSING) == 3
    assert pool.opened == 0
    assert pool.opening_failed == 0
    pool.finish_close(succeeding)
    pool.finish_close(failing)
    assert pool.closed == 0
    pool.finish_close(silent)
    assert pool.closed == 1


@pytest.mark.parametrize("way", ["release", "release_dirty", "discard"])
def test_a_lease_that_ends_while_it_closes_ends_its_connection(way: str) -> None:
    pool = opened_pool(min_size=1)
    holder = pool.acquire()
    pool.close()
    getattr(pool, way)(holder)
    assert pool.count(CLOSING) == 1
    pool.finish_work()
    assert pool.closed == 1


def test_sever_closes_the_leases_that_keep_it_from_closing() -> None:
    pool = opened_pool(min_size=3)
    for _ in range(2):
        pool.acquire()
    pool.close()
    pool.sever()
    assert pool.emitted(Close) == 2
    pool.finish_work()
    assert pool.closed == 1


def test_closing_twice_is_closing_once() -> None:
    pool = opened_pool(min_size=1)
    pool.close()
    pool.close()
    assert not pool.effects
    pool.finish_work()
    pool.close()
    assert pool.closed == 1


def test_while_it_closes_nothing_is_connected_whatever_happens() -> None:
    pool = opened_pool(min_size=3, max_size=3)
    holder = pool.acquire()
    pool.close()
    pool.resize(3, 9)
    pool.drain()
    pool.check()
    pool.disconnect(pool.slots(LEASED)[0])
    pool.advance(10_000)
    assert not pool.count(CONNECTING)
    pool.release(holder)
    pool.finish_work()
    assert pool.closed == 1


def test_a_timer_that_fires_after_the_end_does_nothing() -> None:
    pool = opened_pool(min_size=1)
    pool.close()
    pool.finish_work()
    pool.wake()
    assert not pool.effects


def test_a_closed_pool_can_be_opened_again_and_keeps_its_totals() -> None:
    pool = opened_pool(min_size=1, check_interval=30)
    pool.release(pool.acquire())
    pool.close()
    pool.finish_work()
    pool.advance(1000)
    pool.open()
    assert pool.emitted(Connect) == 1
    pool.connect()
    assert pool.opened == 1
    assert pool.machine.connects == 2
    assert pool.machine.acquires == 1
    pool.advance(30)
    assert pool.count(CHECKING) == 1


def test_a_failure_before_it_was_closed_does_not_delay_the_next_opening() -> None:
    pool = virtual_pool(min_size=2, backoff_initial=10, backoff_max=10).open()
    pool.fail_connect(REFUSED)
    pool.close()
    pool.finish_work()
    pool.open()
    assert pool.count(CONNECTING) == 2


# --- the tables ---------------------------------------------------------------------------------------------


def test_a_pool_that_is_not_closed_cannot_be_opened() -> None:
    pool = virtual_pool(min_size=1).open()
    for act in (pool.connect, pool.close):
        with pytest.raises(IllegalMove, match="pool from OPEN"):
            pool.machine.open(pool.now, single_round=False)
        act()
    with pytest.raises(IllegalMove, match="pool from CLOSING to OPENING"):
        pool.machine.open(pool.now, single_round=False)


def test_every_state_can_be_left_for_the_end_and_the_end_for_nothing() -> None:
    ways = dict(LEGAL_MOVES)
    assert set(ways) == set(SlotState)
    assert ways.pop(SlotState.GONE) == frozenset()
    assert ways.pop(SlotState.CLOSING) == {SlotState.GONE}
    assert all(SlotState.CLOSING in moves for moves in ways.values())
    assert set(LEGAL_PHASES) == set(PoolPhase)


def test_an_end_that_is_told_twice_is_refused() -> None:
    pool = opened_pool(min_size=1)
    [slot] = pool.slots(IDLE)
    with pytest.raises(IllegalMove):
        pool.machine.closed(slot, pool.now)
    pool.disconnect(slot)
    pool.finish_close(slot)
    with pytest.raises(IllegalMove):
        pool.machine.closed(slot, pool.now)
