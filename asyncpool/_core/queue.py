"""The callers that wait for a connection: first come, first served, each with a deadline of its own."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .policy import NEVER

if TYPE_CHECKING:
    from .slot import Slot


class Waiter:
    """A caller in the queue. `slot` is set when it is granted one."""

    __slots__ = ("deadline", "slot")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.slot: Slot | None = None


class WaiterQueue(OrderedDict[Waiter, None]):
    """The waiters in their order. Every operation costs the same however many wait."""

    def __init__(self) -> None:
        super().__init__()
        self._deadlines: list[tuple[float, int, Waiter]] = []  # a heap; may hold waiters that have left
        self._numbers = 0

    def append(self, waiter: Waiter) -> None:
        """Put a waiter at the end."""
        self[waiter] = None
        if waiter.deadline != NEVER:
            self._numbers += 1
            heapq.heappush(self._deadlines, (waiter.deadline, self._numbers, waiter))

    def pop_first(self) -> Waiter:
        """Take the one that has waited longest."""
        waiter, _ = self.popitem(last=False)
        self._forget_deadlines()
        return waiter

    def discard(self, waiter: Waiter) -> None:
        """Take a waiter out, if it is there."""
        if waiter in self:
            del self[waiter]
            self._forget_deadlines()

    def pop_overdue(self, now: float) -> Iterator[Waiter]:
        """Take out all whose deadline has come."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now or deadlines[0][2] not in self):
            _, _, waiter = heapq.heappop(deadlines)
            if waiter in self:
                del self[waiter]
                yield waiter

    def next_deadline(self) -> float:
        """No later than the first deadline: that of a waiter that has left may still count."""
        return self._deadlines[0][0] if self._deadlines else NEVER

    def clear(self) -> None:
        """Let all go."""
        super().clear()
        self._deadlines.clear()

    def _forget_deadlines(self) -> None:
        """Drop those of waiters that have left, once they are the majority: a constant cost per waiter."""
        if len(self._deadlines) > 2 * len(self) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self]
            heapq.heapify(self._deadlines)
