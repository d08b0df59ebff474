"""Blocks that wait for each other: when the machine refuses, whom, and when it must not."""

from __future__ import annotations

import pytest
from kit.invariants import CLOSING, CONNECTING
from kit.virtual_pool import VirtualPool, opened_pool

from asyncpool._core.effects import Refusal
from asyncpool._core.machine import PoolMachine
from asyncpool._core.policy import ConnectFailure
from asyncpool._core.queue import Waiter


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


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[PoolMachine]:
    """Whenever a machine looks at its leases for a circle, it is noted here."""
    asked: list[PoolMachine] = []
    ask = PoolMachine._is_circle

    def note_and_ask(machine: PoolMachine) -> bool:
        asked.append(machine)
        return ask(machine)

    monkeypatch.setattr(PoolMachine, "_is_circle", note_and_ask)
    return asked


@pytest.mark.parametrize("in_block", [True, False])
def test_one_lease_whose_owner_does_not_wait_answers_for_all_who_come(
    questions: list[PoolMachine], in_block: bool
) -> None:
    pool = opened_pool(min_size=2, max_size=2)
    for task in range(2):
        pool.acquire(owner=task, in_block=in_block)
    for stranger in range(10, 110):
        pool.acquire(owner=stranger)
    assert len(questions) == 1


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


def test_a_block_whose_owner_is_gone_is_in_no_circle() -> None:
    """And none of whom nobody knows who they are stands for it."""
    pool = held_by_blocks(1)
    for slot in pool.held.values():
        slot.owner = lambda: None  # as a weak reference says it
    pool.acquire()
    group = pool.acquire_for(None)
    assert not pool.join(group, None)
    assert not pool.refused


@pytest.mark.parametrize("loose", [0, 1])
def test_a_block_that_others_may_end_is_in_no_circle(loose: int) -> None:
    pool = held_by_blocks(2)
    slot = next(slot for waiter, slot in pool.held.items() if waiter.owner == loose)
    pool.machine._is_bound = lambda asked: asked is not slot
    pool.blocks -= {waiter for waiter, held in pool.held.items() if held is slot}  # as the invariants see it
    pool.acquire(owner=0)
    pool.acquire(owner=1)
    assert not pool.refused


# --- many who wait in one place -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_group_with_the_one_in_it_who_completes_the_circle_is_refused(count: int) -> None:
    pool = held_by_blocks(count)
    for task in range(count - 1):
        pool.acquire(owner=task)
    group = pool.acquire_for("stranger", count - 1)
    assert pool.refused == {group: Refusal.DEADLOCK}


def test_a_group_that_comes_with_all_of_the_circle_is_refused() -> None:
    pool = held_by_blocks(3)
    group = pool.acquire_for(2, 0, 1)
    assert pool.refused == {group: Refusal.DEADLOCK}


def test_a_group_is_asked_about_whoever_answered_for_all_before() -> None:
    """Among its members may be the very owner whose lease did."""
    pool = held_by_blocks(2)
    pool.acquire(owner="stranger")
    witness = pool.machine._witness
    assert witness is not None
    assert witness.owner is not None
    owner = witness.owner()
    assert isinstance(owner, int)
    pool.acquire_for("another", 1 - owner)
    assert not pool.refused
    group = pool.acquire_for("another", owner)
    assert pool.refused == {group: Refusal.DEADLOCK}


@pytest.mark.parametrize("first", [0, 1])
def test_who_joins_a_group_and_completes_the_circle_may_not_and_the_others_wait_on(first: int) -> None:
    pool = held_by_blocks(2)
    group = pool.acquire_for(first)
    assert not pool.join(group, "stranger")
    assert pool.join(group, 1 - first)
    assert pool.queue == [group]
    assert pool.members[group] == [first, "stranger"]
    assert not pool.refused


def test_who_waits_alone_completes_a_circle_with_those_in_groups() -> None:
    pool = held_by_blocks(3)
    first, second = pool.acquire_for(0), pool.acquire_for("stranger", 1)
    waiter = pool.acquire(owner=2)
    assert pool.refused == {waiter: Refusal.DEADLOCK}
    assert pool.queue == [first, second]
    assert pool.join(first, 2)


def test_the_members_of_several_groups_make_one_circle() -> None:
    pool = held_by_blocks(3)
    pool.acquire_for(0, "stranger")
    second = pool.acquire_for(1)
    third = pool.acquire_for("another")
    assert pool.join(third, 2)
    assert pool.join(second, 2)
    group = pool.acquire_for(2)
    assert pool.refused == {group: Refusal.DEADLOCK}


def test_who_is_in_a_group_and_holds_nothing_completes_no_circle() -> None:
    pool = held_by_blocks(2)
    group = pool.acquire_for(0)
    assert not any(pool.join(group, stranger) for stranger in range(10, 15))
    pool.acquire_for(*range(20, 25))
    assert not pool.refused
    assert pool.join(group, 1)


def test_members_of_whom_nobody_knows_who_they_are_complete_no_circle() -> None:
    pool = held_by_blocks(2)
    group = pool.acquire_for(None, 0, None)
    assert not pool.join(group, None)
    assert list(group.owners()) == [0]
    assert not pool.refused


def test_who_has_left_a_group_is_in_no_circle() -> None:
    pool = held_by_blocks(2)
    group = pool.acquire_for(0, "stranger")
    pool.leave(group, 0)
    assert not pool.join(group, 1)
    assert pool.join(group, 0)


@pytest.mark.parametrize("size", [2, 3])
def test_there_is_no_circle_while_a_group_has_a_place(size: int) -> None:
    """It goes back whatever they do who wait for it."""
    pool = opened_pool(min_size=size, max_size=size, max_connecting=size)
    for task in range(size - 1):
        pool.acquire(owner=task, in_block=True)
    lane = pool.acquire_for(0)
    assert lane.slot is not None
    group = pool.acquire_for("stranger")
    assert not any(pool.join(group, task) for task in range(size - 1))
    assert not pool.refused
    pool.release(lane)
    assert group.slot is not None


def test_there_is_no_circle_while_a_place_is_leased_by_hand() -> None:
    pool = opened_pool(min_size=2, max_size=2)
    pool.acquire(owner=0, in_block=True)
    by_hand = pool.acquire(owner=1)
    group = pool.acquire_for(0, 1)
    assert not pool.join(group, 1)
    assert not pool.refused
    pool.release(by_hand)
    assert group.slot is not None


def test_there_is_no_circle_while_a_place_is_on_its_way_for_a_group() -> None:
    pool = held_by_blocks(2)
    pool.discard(next(waiter for waiter in pool.held if waiter.owner == 1))
    group = pool.acquire_for(1)
    assert not pool.join(group, 0)
    pool.finish_close()
    assert not pool.join(group, 0)
    pool.connect()
    assert group.slot is not None
    assert not pool.refused


def test_who_joins_a_group_that_has_its_connection_already_does_not_wait_for_one() -> None:
    pool = held_by_blocks(2)
    group = pool.acquire_for(0)
    pool.release(next(waiter for waiter in pool.held if waiter.owner == 1))
    pool.acquire(owner=1)
    assert group.slot is not None
    assert not pool.join(group, 1)
    assert not pool.refused


def test_one_lease_whose_owner_does_not_wait_answers_for_all_who_join(questions: list[PoolMachine]) -> None:
    pool = opened_pool(min_size=1, max_size=1)
    pool.acquire(owner=0, in_block=True)
    group = pool.acquire_for("first")
    questions.clear()
    assert not any(pool.join(group, stranger) for stranger in range(10, 110))
    assert not questions
    assert pool.join(group, 0)


def test_a_lease_that_came_back_answers_for_nobody_who_joins() -> None:
    pool = opened_pool(min_size=2, max_size=2)
    pool.acquire(owner=0, in_block=True)
    by_hand = pool.acquire()
    next_one = pool.acquire(owner=1, in_block=True)
    group = pool.acquire_for(0)
    assert pool.machine._witness is by_hand.slot
    pool.discard(by_hand)
    pool.finish_work()
    assert next_one.slot is not None
    assert pool.join(group, 1)


def test_a_circle_is_seen_that_somebody_joined_while_connecting_failed() -> None:
    """The lease that answered for all who come is that of the one who joined."""
    pool = opened_pool(min_size=2, max_size=2, backoff_initial=1, backoff_max=1)
    for task in range(2):
        pool.acquire(owner=task, in_block=True)
    next_one = pool.acquire(owner="next", in_block=True)
    group = pool.acquire_for("stranger")
    witness = pool.machine._witness
    assert witness is not None
    assert witness.owner is not None
    owner = witness.owner()
    pool.discard(next(waiter for waiter in pool.held if waiter.owner != owner))
    pool.finish_close()
    pool.fail_connect(ConnectFailure.TRANSIENT)
    assert not pool.join(group, owner)
    pool.advance(1)
    pool.connect()
    assert next_one.slot is not None
    waiter = pool.acquire(owner="next")
    assert pool.refused == {waiter: Refusal.DEADLOCK}


def test_a_smaller_max_size_can_complete_a_circle_with_a_group() -> None:
    pool = opened_pool(min_size=1, max_size=2)
    pool.acquire(owner=0, in_block=True)
    group = pool.acquire_for("stranger", 0)
    pool.fail_connect(ConnectFailure.TRANSIENT)
    assert not pool.refused
    pool.resize(1, 1)
    assert pool.refused == {group: Refusal.DEADLOCK}


@pytest.mark.parametrize("last", ["group", "waiter"])
def test_of_those_in_a_circle_the_last_to_have_come_is_refused(last: str) -> None:
    pool = opened_pool(min_size=3, max_size=3, max_connecting=3)
    for task in range(2):
        pool.acquire(owner=task, in_block=True)
    by_hand = pool.acquire()
    if last == "group":
        pool.acquire(owner=0)
        expected: Waiter = pool.acquire_for("stranger", 1)
    else:
        pool.acquire_for("stranger", 0)
        expected = pool.acquire(owner=1)
    pool.acquire_for("another", None)
    pool.acquire(owner="third")
    pool.resize(1, 2)
    assert not pool.refused
    pool.discard(by_hand)
    pool.finish_close()
    assert pool.refused == {expected: Refusal.DEADLOCK}


def test_nobody_is_refused_when_fewer_places_leave_one_whose_owner_does_not_wait() -> None:
    pool = opened_pool(min_size=2, max_size=3)
    for task in range(2):
        pool.acquire(owner=task, in_block=True)
    group = pool.acquire_for(0, "stranger")
    pool.fail_connect(ConnectFailure.TRANSIENT)
    pool.resize(1, 2)
    assert not pool.refused
    assert pool.queue == [group]
    assert pool.join(group, 1)
