"""Durations counted in buckets of fixed bounds: what they cost is bounded, whatever comes."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

SHORTEST = 0.0001
"""Seconds up to which durations are not told apart: less than a round trip to a server takes."""

# Each doubling of time is four buckets, so that a quantile is at most a quarter off; the last bound is 1.9 hours.
_STEPS, _DOUBLINGS = 4, 26
BOUNDS = tuple(SHORTEST * 2**doubling * (1 + step / _STEPS) for doubling in range(_DOUBLINGS) for step in range(_STEPS))
"""The greatest durations, in seconds, that each bucket but the last counts; the last has no bound."""


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
    """Counts durations. Any thread may."""

    __slots__ = ("_counts", "_lock", "_max", "_sum", "_unrecorded")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0
        self._max = 0.0
        self._unrecorded = 0
        self._lock = threading.RLock()  # a finalizer may end a lease in the midst of this

    @property
    def count(self) -> int:
        """How many were recorded."""
        return sum(self._counts)

    def record(self, seconds: float) -> None:
        """Count one."""
        with self._lock:
            self._counts[bisect_left(BOUNDS, seconds)] += 1
            if seconds > SHORTEST:
                self._sum += seconds
            if seconds > self._max:
                self._max = seconds

    def snapshot(self, total: int | None = None) -> Histogram:
        """What was counted so far. `total`: how many there are with the shortest, which were not recorded."""
        with self._lock:
            counts, seconds, longest = self._counts.copy(), self._sum, self._max
            if total is not None:
                # Another thread may have recorded one that is not among the total yet: what was told once stays so.
                self._unrecorded = max(self._unrecorded, total - sum(counts))
                counts[0] += self._unrecorded
                longest = max(longest, SHORTEST if counts[0] else 0.0)
        return Histogram(tuple(counts), seconds, longest)
