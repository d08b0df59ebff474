"""A pool at one instant, as one line of JSON for who looks from another process. No secrets are in it."""

from __future__ import annotations

import json
import os
import time
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._core.states import SlotState
from ..events import Holder, PoolStats
from ..histogram import Histogram
from .holders import holders_of
from .refusals import connect_error_words
from .statistics import stats_of

if TYPE_CHECKING:
    from .runner import Runner

FORMAT = 1
"""What a reader can rely on; one more when what it knows is no longer there."""

# Together they bound the line, and with it what a client who does not read can make the system keep.
MOST_HOLDERS = 50
LONGEST_WORDS = 200
LONGEST_ERROR = 1000
# Seconds within which two snapshots are of one look at the pool.
SAME_LOOK = 3.0

_STATES = (
    SlotState.LEASED,
    SlotState.IDLE,
    SlotState.CONNECTING,
    SlotState.CHECKING,
    SlotState.RECYCLING,
    SlotState.CLOSING,
)
_TOTALS = (
    "acquires",
    "immediate",
    "waited",
    "timeouts",
    "cancelled",
    "returned_bad",
    "one_shots",
    "connects",
    "connect_errors",
    "abandoned",
)


class Snapshots:
    """Makes one after the other of a pool that has just been opened."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._opened_at = monotonic()
        self._before = (self._opened_at, 0)

    def take(self) -> bytes:
        """The line, its end included."""
        runner, machine, now = self._runner, self._runner.machine, monotonic()
        stats = stats_of(runner.config.name, (machine.min_size, machine.max_size), runner, runner.driver.abandoned)
        holders = holders_of(islice(machine.leases(), MOST_HOLDERS), now)
        told = {
            "format": FORMAT,
            "pool": stats.name,
            "pid": os.getpid(),
            "at": round(time.time(), 3),
            "open_for": _seconds(now - self._opened_at),
            "phase": runner.phase.name.lower(),
            "sizes": _sizes(stats),
            "waiting": stats.waiting,
            "acquires_per_second": self._rate(stats.acquires, now),
            **_totals(stats),
            "holders": [_holder(holder) for holder in holders],
            "connect_error": _connect_error(runner, now),
        }
        return json.dumps(told, separators=(",", ":")).encode() + b"\n"

    def _rate(self, acquires: int, now: float) -> float:
        """Since the last snapshot; if that is too old to say anything of now, since the pool was opened."""
        at, before = self._before if now < self._before[0] + SAME_LOOK else (self._opened_at, 0)
        self._before = now, acquires
        return round((acquires - before) / (now - at), 1) if now > at else 0.0


def _totals(stats: PoolStats) -> dict[str, Any]:
    return {
        "totals": {total: getattr(stats, total) for total in _TOTALS},
        "closes": {reason.value: count for reason, count in stats.closes.items()},
        "wait": _histogram(stats.wait),
        "hold": _histogram(stats.hold),
        "connect": _histogram(stats.connect),
    }


def _sizes(stats: PoolStats) -> dict[str, int]:
    states = {state.name.lower(): getattr(stats, state.name.lower()) for state in _STATES}
    return {"min": stats.min_size, "max": stats.max_size, "all": stats.size, **states}


def _histogram(histogram: Histogram) -> dict[str, Any]:
    """`counts` is without the empty buckets at its end."""
    used = max((bucket for bucket, count in enumerate(histogram.counts, 1) if count), default=0)
    return {
        "count": histogram.count,
        "sum": _seconds(histogram.sum),
        "p50": _seconds(histogram.p50),
        "p90": _seconds(histogram.p90),
        "p99": _seconds(histogram.p99),
        "max": _seconds(histogram.max),
        "counts": histogram.counts[:used],
    }


def _seconds(seconds: float) -> float:
    return round(seconds, 6)


def _holder(holder: Holder) -> dict[str, Any]:
    return {
        "site": _shortened(holder.site),
        "owner": _shortened(holder.owner),
        "held_for": _seconds(holder.held_for),
        "transaction": holder.transaction,
        "pid": holder.backend_pid,
    }


def _shortened(words: str) -> str:
    """The end of a path tells more than its beginning."""
    return words if len(words) <= LONGEST_WORDS else "…" + words[1 - LONGEST_WORDS :]


def _connect_error(runner: Runner, now: float) -> dict[str, Any] | None:
    """The last one, if the pool has not connected since."""
    if runner.last_connect_error is None:
        return None
    return {"text": connect_error_words(runner)[:LONGEST_ERROR], "age": _seconds(now - runner.last_connect_error_at)}
