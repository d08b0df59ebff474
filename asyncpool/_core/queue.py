"""The callers that wait for a connection: first come, first served, each with a deadline of its own."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from .policy import NEVER

if TYPE_CHECKING:
    from .slot import Slot


# How far a place in the queue is counted: of many who are refused at once, each is looked for.
COUNTED = 1000


class Waiter:
    """A caller in the queue. `slot` is set when it is granted one. `owner` is the task or thread that stands still."""

    __slots__ = ("deadline", "owner", "slot")

    def __init__(self, deadline: float, owner: object = None) -> None:
        self.deadline = deadline
        self.owner = owner
        self.slot: Slot | None = None

    def owners(self) -> Iterable[object]:
        """Who stands still for it."""
        return () if self.owner is None else (self.owner,)


class GroupWaiter(Waiter):
    """One place in the queue for many, who all go on when it is granted; `members` are those who stand still."""

    __slots__ = ("_members",)

    def __init__(self, deadline: float, members: Callable[[], Iterable[object]]) -> None:
        super().__init__(deadline)
        self._members = members

    def owners(self) -> Iterable[object]:
        """Who stands still for it."""
        return (owner for owner in self._members() if owner is not None)


class WaiterQueue(OrderedDict[Waiter, None]):
    """The waiters in their order. Every operation costs the same however many wait.

    Most come with the same timeout, so that their deadlines are in the order of the queue and the first waiter's is
    the next. Only those that are not go into a heap.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest = -NEVER  # of the deadlines that are in order
        self._early: list[tuple[float, int, Waiter]] = []  # a heap of the others; may hold waiters that have left
        self._numbers = 0

    def append(self, waiter: Waiter) -> None:
        """Put a waiter at the end."""
        if waiter.deadline >= self._latest or not self:
            self._latest = waiter.deadline
        else:
            self._numbers += 1
            heapq.heappush(self._early, (waiter.deadline, self._numbers, waiter))
        self[waiter] = None

    def pop_first(self) -> Waiter:
        """Take the one that has waited longest."""
        waiter, _ = self.popitem(last=False)
        if self._early:
            self._forget_early()
        return waiter

    def discard(self, waiter: Waiter) -> None:
        """Take a waiter out, if it is there."""
        if waiter in self:
            del self[waiter]
            if self._early:
                self._forget_early()

    def pop_overdue(self, now: float) -> Iterator[tuple[Waiter, int]]:
        """Take out all whose deadline has come, with their places in the queue, from 1; 0 if that is far back."""
        popped = 0
        while self and (first := next(iter(self))).deadline <= now:
            del self[first]
            popped += 1
            yield first, popped
        early = self._early
        while early and (early[0][0] <= now or early[0][2] not in self):
            _, _, waiter = heapq.heappop(early)
            if waiter in self:
                ahead = next((number for number, other in enumerate(islice(self, COUNTED)) if other is waiter), None)
                del self[waiter]
                yield waiter, 0 if ahead is None else popped + ahead + 1

    def next_deadline(self) -> float:
        """No later than the first deadline: that of a waiter that has left may still count.

        Whoever is in order behind the first waiter has a later deadline than it, be the first in order or early.
        """
        first = next(iter(self)).deadline if self else NEVER
        return min(first, self._early[0][0]) if self._early else first

    def clear(self) -> None:
        """Let all go."""
        super().clear()
        self._early.clear()

    def _forget_early(self) -> None:
        """Drop those that have left from the heap, once they are the majority: a constant cost per waiter."""
        if len(self._early) > 2 * len(self) + 64:
            self._early = [entry for entry in self._early if entry[2] in self]
            heapq.heapify(self._early)
