"""OpenTelemetry: the connection-pool metrics of the semantic conventions for databases, `db.client.connection.*`.

    from asyncpool.metrics.opentelemetry import instrument

    instrumentation = instrument(pool)

Needs the extra `otel`: pip install 'asyncpool-pg[otel]'.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..events import Acquired, Connected, Event, PoolStats, Released, TimedOut
from ..pool import Pool
from ..sync import SyncPool

try:
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter_provider
except ImportError as error:
    raise ImportError(
        "asyncpool.metrics.opentelemetry needs pip install 'asyncpool-pg[otel]' (from a clone: pip install '.[otel]')"
    ) from error

POOL_NAME = "db.client.connection.pool.name"
STATE = "db.client.connection.state"

# Of the conventions whose names these are. https://opentelemetry.io/docs/specs/semconv/database/database-metrics/
SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

# The conventions advise of none for these three. From less than a round trip to longer than the default
# `acquire_timeout`, in seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

AnyPool = Pool[Any] | SyncPool[Any]


def instrument(pool: AnyPool, meter_provider: MeterProvider | None = None) -> Instrumentation:
    """Report a pool's metrics, from now on, to a provider: by default to the global one, which may be set later.

    Give each pool a `name` of its own: the figures of pools of one name are added up. A pool that is dropped is
    reported no longer. Raises TypeError for what is no pool, and ValueError if the pool is instrumented already.
    """
    if not isinstance(pool, (Pool, SyncPool)):
        raise TypeError(f"pool must be a Pool or a SyncPool, not a {type(pool).__name__}")
    with _lock:
        instruments = _instruments_of(meter_provider)
        instruments.reporting = tuple(each for each in instruments.reporting if not each.is_of(None))
        if any(each.is_of(pool) for each in instruments.reporting):
            raise ValueError(f"{pool.name} is instrumented already: stop() what that has returned first")
        return Instrumentation(pool, instruments)


class Instrumentation:
    """A pool that is being reported, until `stop()`."""

    def __init__(self, pool: AnyPool, instruments: _Instruments) -> None:
        self._pool = weakref.ref(pool)
        self._name = pool.name
        self._instruments = instruments
        self._observation = pool.observe(instruments.observer(pool.name))
        instruments.reporting = (*instruments.reporting, self)

    def __repr__(self) -> str:
        state = "reports" if self in self._instruments.reporting else "stopped"
        return f"<Instrumentation of {self._name!r}: {state}>"

    @property
    def dropped(self) -> int:
        """Events that are missing in the histograms and in the timeouts, as there were more than could be recorded."""
        return self._observation.dropped

    def stop(self) -> None:
        """Report no more. What has happened so far is in the counter and the histograms, for the next collection."""
        self._observation.stop()
        self._observation.flush()
        with _lock:
            reporting = self._instruments.reporting
            self._instruments.reporting = tuple(each for each in reporting if each is not self)

    def is_of(self, pool: AnyPool | None) -> bool:
        """Whether it reports that pool, or, for None, one that is gone."""
        return self._pool() is pool

    def read(self) -> PoolStats | None:
        """The pool's figures, when all that has happened before is recorded; None if it is gone."""
        self._observation.flush()
        pool = self._pool()
        return pool.stats() if pool is not None else None


class _Instruments:
    """The instruments of one provider, which all pools share."""

    def __init__(self, meter: Meter) -> None:
        self.reporting: tuple[Instrumentation, ...] = ()
        self._timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            unit="{timeout}",
            description="The number of connection timeouts that have occurred trying to obtain a connection from the"
            " pool.",
        )
        histograms = {
            "create_time": "The time it took to create a new connection.",
            "wait_time": "The time it took to obtain an open connection from the pool.",
            "use_time": "The time between borrowing a connection and returning it to the pool.",
        }
        self._created, self._waited, self._used = (
            meter.create_histogram(
                f"db.client.connection.{name}",
                unit="s",
                description=description,
                explicit_bucket_boundaries_advisory=BUCKETS,
            )
            for name, description in histograms.items()
        )
        for name, unit, description, read in _SIZES:
            meter.create_observable_up_down_counter(
                f"db.client.connection.{name}",
                callbacks=[_callback(weakref.ref(self), read)],
                unit=unit,
                description=description,
            )

    def observer(self, pool: str) -> Callable[[Event], None]:
        """What records the events of a pool of that name. In the thread of its observation: that takes 5 µs each."""
        attributes = {POOL_NAME: pool}
        waited, used, created = self._waited.record, self._used.record, self._created.record
        timeouts = self._timeouts

        def record(event: Event) -> None:
            if isinstance(event, Acquired):
                waited(event.waited, attributes)
            elif isinstance(event, Released):
                used(event.held, attributes)
            elif isinstance(event, Connected):
                created(event.took, attributes)
            elif isinstance(event, TimedOut):
                timeouts.add(1, attributes)

        return record

    def observe(self, read: _Read) -> Iterator[Observation]:
        """The sum of a figure over the pools of each name."""
        sums: Counter[tuple[tuple[str, str], ...]] = Counter()
        for instrumentation in self.reporting:
            if (stats := instrumentation.read()) is not None:
                for figure, state in read(stats):
                    sums[(POOL_NAME, stats.name), *state] += figure
        for attributes, figure in sums.items():
            yield Observation(figure, dict(attributes))


# Figures of a pool, each with the attributes that it has besides the pool's name.
_Read = Callable[[PoolStats], Iterable[tuple[int, tuple[tuple[str, str], ...]]]]


def _count(stats: PoolStats) -> Iterable[tuple[int, tuple[tuple[str, str], ...]]]:
    """Used is what nobody else can have now. What is being connected or closed is in no state of the conventions'."""
    yield stats.idle, ((STATE, "idle"),)
    yield stats.leased + stats.checking + stats.recycling, ((STATE, "used"),)


_SIZES: tuple[tuple[str, str, str, _Read], ...] = (
    (
        "count",
        "{connection}",
        "The number of connections that are currently in state described by the `state` attribute.",
        _count,
    ),
    (
        "idle.max",
        "{connection}",
        "The maximum number of idle open connections allowed.",
        lambda stats: [(stats.max_size, ())],
    ),
    (
        "idle.min",
        "{connection}",
        "The minimum number of idle open connections allowed.",
        lambda stats: [(stats.min_size, ())],
    ),
    ("max", "{connection}", "The maximum number of open connections allowed.", lambda stats: [(stats.max_size, ())]),
    (
        "pending_requests",
        "{request}",
        "The number of current pending requests for an open connection.",
        lambda stats: [(stats.waiting, ())],
    ),
)


def _callback(
    instruments: weakref.ref[_Instruments], read: _Read
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        found = instruments()
        return found.observe(read) if found is not None else ()

    return observe


# OpenTelemetry forgets a callback never, and takes none for an instrument that is there: one set for each provider.
_known: weakref.WeakKeyDictionary[MeterProvider, _Instruments] = weakref.WeakKeyDictionary()
_of_global: _Instruments | None = None  # made for a stand-in of the global provider, which is that one's once it is set
# Never taken in a callback, nor in a finalizer: collecting holds a lock of the SDK, which making instruments needs too.
_lock = threading.Lock()


def _instruments_of(provider: MeterProvider | None) -> _Instruments:
    global _of_global
    current = get_meter_provider()
    chosen = provider if provider is not None else current
    found = _known.get(chosen)
    if found is None and chosen is current:
        found = _of_global
    if found is None:
        _known[chosen] = found = _Instruments(chosen.get_meter("asyncpool", schema_url=SCHEMA_URL))
        if chosen is current:
            _of_global = found
    return found
