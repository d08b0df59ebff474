"""Blocks that wait for each other: when the machine refuses, whom, and when it must not."""

from __future__ import annotations

import pytest
from kit.invariants import CLOSING, CONNECTING
from kit.virtual_pool import VirtualPool, opened_pool

from asyncpool._core.effects import Refusal
from asyncpool._core.machine import PoolMachine
from asyncpool._core.policy import ConnectFailure


def held_by_blocks(count: int) -> VirtualPool:
    """A pool of `count`, each place the lease of a block of task 0, 1, …"""
    pool = opened_pool(min_size=count, max_size=count, max_connecting=count)
    for task in range(count):
        pool.acquire(owner=task, in_block=True)
    assert not pool.queue
    return pool


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("in_block", [True, False])
def test_who_completes_the_circle_is_refused_and_nobody_else(count: int, in_block: bool) -> None:
    pool = held_by_blocks(count)
    waiters = [pool.acquire(owner=task, in_block=in_block) for task in range(count)]
    assert pool.refused == {waiters[-1]: Refusal.DEADLOCK}
    assert pool.queue == waiters[:-1]


def test_those_that_wait_go_on_when_the_refused_one_ends_its_block() -> None:
    pool = held_by_blocks(2)
    pool.acquire(owner=0)
    pool.acquire(owner=1)
    mine = next(waiter for waiter in pool.held if waiter.owner == 1)
    pool.release(mine)
    assert not pool.queue


def test_who_waits_and_holds_nothing_completes_no_circle() -> None:
    pool = held_by_blocks(2)
    pool.acquire(owner=0)
    for stranger in range(10, 15):
        pool.acquire(owner=stranger)
    assert not pool.refused
    pool.acquire(owner=1)
    assert list(pool.refused.values()) == [Refusal.DEADLOCK]


@pytest.mark.parametrize("in_block", [True, False])
def test_one_lease_whose_owner_does_not_wait_answers_for_all_who_come(
    monkeypatch: pytest.MonkeyPatch, in_block: bool
) -> None:
    pool = opened_pool(min_size=2, max_size=2)
    for task in range(2):
        pool.acquire(owner=task, in_block=in_block)
    questions = 0
    ask = PoolMachine._is_circle

    def count_and_ask(machine: PoolMachine) -> bool:
        nonlocal questions
        questions += 1
        return ask(machine)

    monkeypatch.setattr(PoolMachine, "_is_circle", count_and_ask)
    for stranger in range(10, 110):
        pool.acquire(owner=stranger)
    assert questions == 1


def test_a_task_that_holds_all_of_them_is_refused_at_once() -> None:
    pool = opened_pool(min_size=3, max_size=3, max_connecting=3)
    for _ in range(3):
        pool.acquire(owner="greedy", in_block=True)
    pool.acquire(owner="greedy")
    assert list(pool.refused.values()) == [Refusal.DEADLOCK]


def test_a_connection_held_by_hand_may_come_back_from_anywhere() -> None:
    pool = opened_pool(min_size=2, max_size=2)
    by_hand = pool.acquire(owner=0)
    pool.acquire(owner=1, in_block=True)
    pool.acquire(owner=0)
    pool.acquire(owner=1)
    assert not pool.refused
    pool.release(by_hand)
    assert not pool.refused


def test_there_is_no_circle_while_a_place_is_on_its_way() -> None:
    pool = held_by_blocks(2)
    pool.discard(next(iter(pool.held)))
    pool.acquire(owner=0)
    pool.acquire(owner=1)
    assert pool.count(CLOSING) == 1
    assert not pool.refused
    pool.finish_close()
    pool.connect()
    assert not pool.refused
    assert len(pool.queue) == 1


@pytest.mark.parametrize("gone", [0, 1])
def test_a_circle_is_seen_that_began_while_a_place_was_on_its_way(gone: int) -> None:
    pool = held_by_blocks(2)
    pool.acquire(owner="earlier", in_block=True)
    pool.discard(next(waiter for waiter in pool.held if waiter.owner == gone))
    pool.acquire(owner=1 - gone)
    pool.finish_close()
    pool.connect()
    assert [waiter.owner for waiter in pool.held] == [1 - gone, "earlier"]
    pool.acquire(owner="earlier")
    assert list(pool.refused.values()) == [Refusal.DEADLOCK]


def test_what_was_granted_before_is_not_held_against_its_next_user() -> None:
    pool = held_by_blocks(1)
    waiter = pool.acquire(owner="next")
    pool.acquire(owner="after that")
    (mine,) = pool.held
    pool.release(mine)
    pool.acquire(owner=0)  # it ended its block, and waits for another one
    assert list(pool.held) == [waiter]
    assert not pool.refused


def test_a_caller_who_does_not_wait_is_told_of_the_time_and_not_of_the_circle() -> None:
    pool = held_by_blocks(1)
    pool.acquire(timeout=0, owner=0)
    assert list(pool.refused.values()) == [Refusal.TIMEOUT]


def test_a_smaller_max_size_can_complete_a_circle() -> None:
    pool = opened_pool(min_size=1, max_size=2)
    pool.acquire(owner=0, in_block=True)
    waiter = pool.acquire(owner=0)
    pool.fail_connect(ConnectFailure.TRANSIENT)
    assert not pool.count(CONNECTING)
    assert not pool.refused
    pool.resize(1, 1)
    assert pool.refused == {waiter: Refusal.DEADLOCK}


def test_the_last_connection_that_goes_can_complete_a_circle() -> None:
    pool = opened_pool(min_size=2, max_size=2)
    pool.acquire(owner=0, in_block=True)
    by_hand = pool.acquire(owner=1)
    waiter = pool.acquire(owner=0)
    pool.resize(1, 1)
    pool.release(by_hand)
    assert not pool.refused
    pool.finish_close()
    assert pool.refused == {waiter: Refusal.DEADLOCK}


@pytest.mark.parametrize("loose", [0, 1])
def test_a_block_that_others_may_end_is_in_no_circle(loose: int) -> None:
    pool = held_by_blocks(2)
    slot = next(slot for waiter, slot in pool.held.items() if waiter.owner == loose)
    pool.machine._is_bound = lambda asked: asked is not slot
    pool.blocks -= {waiter for waiter, held in pool.held.items() if held is slot}  # as the invariants see it
    pool.acquire(owner=0)
    pool.acquire(owner=1)
    assert not pool.refused
