"""Prometheus: a collector that reads `pool.stats()` when it is scraped, and costs nothing in between.

    from asyncpool.metrics.prometheus import Collector
    from prometheus_client import REGISTRY

    REGISTRY.register(Collector(pool))

Needs the extra `prometheus`: pip install 'asyncpool-pg[prometheus]'.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..events import CloseReason, PoolStats
from ..histogram import BOUNDS, Histogram
from ..pool import Pool
from ..sync import SyncPool

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
except ImportError as error:
    raise ImportError(
        "asyncpool.metrics.prometheus needs pip install 'asyncpool-pg[prometheus]'"
        " (from a clone: pip install '.[prometheus]')"
    ) from error

AnyPool = Pool[Any] | SyncPool[Any]
Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily

# Each doubling from 0.1 ms to 105 s: bounds of the pool's own, so that no duration is counted in a wrong bucket.
BUCKETS = BOUNDS[: 4 * 20 + 1 : 4]

_STATES = ("connecting", "idle", "leased", "checking", "recycling", "closing")

# What is read of each pool, under what name, and what that says.
_GAUGES: tuple[tuple[str, str, Callable[[PoolStats], float]], ...] = (
    ("asyncpool_min_size", "Connections that are kept warm.", lambda stats: stats.min_size),
    ("asyncpool_max_size", "The most connections that there may be.", lambda stats: stats.max_size),
    ("asyncpool_waiting", "Callers in line, those of one-shot statements included.", lambda stats: stats.waiting),
)
_COUNTERS: tuple[tuple[str, str, Callable[[PoolStats], float]], ...] = (
    ("asyncpool_acquires", "Leases.", lambda stats: stats.acquires),
    ("asyncpool_acquires_waited", "Leases for which the caller stood in line.", lambda stats: stats.waited),
    ("asyncpool_timeouts", "Callers who were refused after their time in line.", lambda stats: stats.timeouts),
    ("asyncpool_cancelled", "Callers who left the line by themselves.", lambda stats: stats.cancelled),
    ("asyncpool_returned_bad", "Leases that ended in the middle of something.", lambda stats: stats.returned_bad),
    ("asyncpool_one_shots", "One-shot statements that were answered.", lambda stats: stats.one_shots),
    ("asyncpool_connects", "Connects that succeeded.", lambda stats: stats.connects),
    ("asyncpool_connect_errors", "Connects that failed.", lambda stats: stats.connect_errors),
    (
        "asyncpool_abandoned",
        "Sessions whose end the server did not confirm in time.",
        lambda stats: stats.abandoned,
    ),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[PoolStats], Histogram]], ...] = (
    ("asyncpool_acquire_wait_seconds", "How long leases were waited for.", lambda stats: stats.wait),
    ("asyncpool_hold_seconds", "How long connections were held.", lambda stats: stats.hold),
    ("asyncpool_connect_seconds", "How long it took to connect.", lambda stats: stats.connect),
)


class Collector:
    """The metrics of one or several pools, for a `prometheus_client.CollectorRegistry`.

    The totals, but for `asyncpool_abandoned_total`, begin at 0 when a pool is opened again, as they do when a process
    starts anew: `rate()` and `increase()` allow for that. A pool that is dropped is reported no longer.

    Raises TypeError for what is no pool, and ValueError for a second one of the same name.
    """

    def __init__(self, *pools: AnyPool) -> None:
        self._pools: tuple[weakref.ref[AnyPool], ...] = ()
        self._adding = threading.Lock()
        for pool in pools:
            self.add(pool)

    def add(self, pool: AnyPool) -> None:
        """Report that one as well. Raises as the constructor."""
        if not isinstance(pool, (Pool, SyncPool)):
            raise TypeError(f"pool must be a Pool or a SyncPool, not a {type(pool).__name__}")
        with self._adding:
            present = list(self._present())
            if any(pool.name == other.name for other in present):
                raise ValueError(f"there is a pool {pool.name!r} already: give each a name= of its own")
            self._pools = tuple(weakref.ref(each) for each in (*present, pool))

    def remove(self, pool: AnyPool) -> None:
        """Report that one no longer."""
        with self._adding:
            self._pools = tuple(weakref.ref(each) for each in self._present() if each is not pool)

    def _present(self) -> Iterator[AnyPool]:
        for reference in self._pools:
            if (pool := reference()) is not None:
                yield pool

    def describe(self) -> Iterable[Family]:
        """The metrics without figures: what the registry asks for their names."""
        return families([])

    def collect(self) -> Iterable[Family]:
        """The metrics as they are now, of each pool at one instant."""
        return families([pool.stats() for pool in self._present()])


def families(pools: list[PoolStats]) -> Iterator[Family]:
    """Each metric, of all these pools."""
    connections = GaugeMetricFamily("asyncpool_connections", "Connections by state.", labels=["pool", "state"])
    for stats in pools:
        for state in _STATES:
            connections.add_metric([stats.name, state], getattr(stats, state))
    yield connections
    for name, words, read in _GAUGES:
        gauge = GaugeMetricFamily(name, words, labels=["pool"])
        for stats in pools:
            gauge.add_metric([stats.name], read(stats))
        yield gauge
    for name, words, read in _COUNTERS:
        counter = CounterMetricFamily(name, words, labels=["pool"])
        for stats in pools:
            counter.add_metric([stats.name], read(stats))
        yield counter
    yield _closes(pools)
    for name, words, durations in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, words, labels=["pool"])
        for stats in pools:
            _add(histogram, stats.name, durations(stats))
        yield histogram


def _closes(pools: list[PoolStats]) -> CounterMetricFamily:
    closes = CounterMetricFamily(
        "asyncpool_closes", "Connections that the pool closed, by reason.", labels=["pool", "reason"]
    )
    for stats in pools:
        for reason in CloseReason:  # those with 0 too: `increase()` does not see what a series begins with
            closes.add_metric([stats.name, reason.value], stats.closes.get(reason, 0))
    return closes


def _add(family: HistogramMetricFamily, pool: str, durations: Histogram) -> None:
    counts = dict(durations.cumulative())
    buckets = [(str(bound), counts[bound]) for bound in BUCKETS]
    family.add_metric([pool], buckets=[*buckets, ("+Inf", durations.count)], sum_value=durations.sum)
