"""Durations counted in buckets of fixed bounds: what they cost is bounded, whatever comes."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

SHORTEST = 0.0001
"""Seconds up to which durations are not told apart: less than a round trip to a server takes."""

# Each doubling of time is four buckets, so that a quantile is at most a quarter off; the last bound is 1.9 hours.
_STEPS, _DOUBLINGS = 4, 26
BOUNDS = tuple(SHORTEST * 2**doubling * (1 + step / _STEPS) for doubling in range(_DOUBLINGS) for step in range(_STEPS))
"""The greatest durations, in seconds, that each bucket but the last counts; the last has no bound."""


# How many durations are counted together.
GATHERED = 500


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations in seconds, as they were counted at one instant."""

    counts: tuple[int, ...]
    """How many there are in each bucket; see BOUNDS."""
    sum: float
    """All together. Those that are not told apart (see SHORTEST) add nothing."""
    max: float
    """The longest; 0 if there are none."""

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name):.3g}" for name in ("p50", "p90", "p99", "max"))
        return f"<Histogram of {self.count} durations: {', '.join(shown)}>"

    @property
    def count(self) -> int:
        """How many durations there are."""
        return sum(self.counts)

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p90(self) -> float:
        """What nine of ten do not exceed."""
        return self.quantile(0.9)

    @property
    def p99(self) -> float:
        """What 99 of 100 do not exceed."""
        return self.quantile(0.99)

    def quantile(self, share: float) -> float:
        """The duration that this share of all, from 0 to 1, does not exceed, to a quarter; 0 if there are none.

        Raises ValueError for a share outside of that.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share!r}")
        rank = share * self.count
        below = 0
        for bucket, count in enumerate(self.counts):
            if count and below + count >= rank:
                lower = BOUNDS[bucket - 1] if bucket else 0.0
                upper = min(BOUNDS[bucket], self.max) if bucket < len(BOUNDS) else self.max
                return min(self.max, lower + (upper - lower) * max(0.0, rank - below) / count)
            below += count
        return 0.0

    def cumulative(self) -> list[tuple[float, int]]:
        """Each bound, in seconds, and how many durations do not exceed it."""
        return list(zip(BOUNDS, accumulate(self.counts), strict=False))


EMPTY = Histogram((0,) * (len(BOUNDS) + 1), 0.0, 0.0)


class Durations:
    """Counts durations. Any thread may, and so may a finalizer or a signal handler in the midst of it."""

    __slots__ = ("_is_counting", "_items", "_lock", "_unrecorded")

    def __init__(self) -> None:
        # What was counted, and behind it durations that are still to be.
        self._items: list[Any] = [EMPTY]
        self._is_counting = False
        self._unrecorded = 0
        self._lock = threading.RLock()

    @property
    def count(self) -> int:
        """How many were recorded."""
        counted, *others = self._items
        return int(counted.count) + len(others)

    def record(self, seconds: float) -> None:
        """Count one. It is a third of what it takes to look for its bucket at once."""
        items = self._items
        items.append(seconds)
        if len(items) > GATHERED:
            self._count()

    def _count(self) -> None:
        with self._lock:
            if self._is_counting:
                return
            try:
                self._is_counting = True
                items = self._items.copy()
                # In one step, so that whatever ends this early leaves each of them there once.
                self._items[: len(items)] = [_counted(items)]
            finally:
                self._is_counting = False

    def snapshot(self, total: int | None = None) -> Histogram:
        """What was counted so far. `total`: how many there are with the shortest, which were not recorded."""
        with self._lock:
            self._count()
            histogram = _counted(self._items.copy())
            if total is None:
                return histogram
            # Another thread may have recorded one that is not among the total yet: what was told once stays so.
            self._unrecorded = max(self._unrecorded, total - histogram.count)
            shortest = histogram.counts[0] + self._unrecorded
        longest = max(histogram.max, SHORTEST if shortest else 0.0)
        return Histogram((shortest, *histogram.counts[1:]), histogram.sum, longest)


def _counted(items: list[Any]) -> Histogram:
    """The histogram that is the first of them, with the durations behind it."""
    histogram: Histogram
    histogram, *durations = items
    if not durations:
        return histogram
    durations.sort()
    counts = list(histogram.counts)
    begin = 0
    while begin < len(durations):
        bucket = bisect_left(BOUNDS, durations[begin])
        end = bisect_right(durations, BOUNDS[bucket], begin) if bucket < len(BOUNDS) else len(durations)
        counts[bucket] += end - begin
        begin = end
    told_apart = sum(durations[bisect_right(durations, SHORTEST) :])
    return Histogram(tuple(counts), histogram.sum + told_apart, max(histogram.max, durations[-1]))
