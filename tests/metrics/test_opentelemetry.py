"""The connection-pool metrics of the semantic conventions, as the real SDK reads them."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
from kit.waiting import eventually
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as Histograms
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics
from opentelemetry.semconv.schemas import Schemas

from asyncpool import Pool, PoolTimeout, SyncPool
from asyncpool.metrics.opentelemetry import BUCKETS, POOL_NAME, SCHEMA_URL, STATE, instrument

if TYPE_CHECKING:
    from collections.abc import Iterator

# The package of the conventions whose descriptions are ours. Others may have better words for the same.
WORDS_OF = "0.66b2"
PREFIX = "db.client.connection."
DELTA: dict[type, AggregationTemporality] = dict.fromkeys((Counter, Histogram), AggregationTemporality.DELTA)


class Sdk:
    """A provider with readers, each of which collects for itself."""

    def __init__(self) -> None:
        self.cumulative = InMemoryMetricReader()
        self.delta = InMemoryMetricReader(preferred_temporality=DELTA)
        self.provider = MeterProvider([self.cumulative, self.delta], shutdown_on_exit=False)

    def metrics(self, reader: InMemoryMetricReader | None = None) -> dict[str, Metric]:
        """What one collection brings, by name without the conventions' prefix."""
        data = (reader or self.cumulative).get_metrics_data()
        if data is None:
            return {}
        [resource] = data.resource_metrics
        [scope] = resource.scope_metrics
        assert scope.scope.name == "asyncpool"
        return {metric.name.removeprefix(PREFIX): metric for metric in scope.metrics}

    def figures(self, reader: InMemoryMetricReader | None = None) -> dict[tuple[str, ...], Any]:
        """The value, or of a histogram the count, of each metric, pool and state."""
        return {
            (name, *map(str, (point.attributes or {}).values())): getattr(point, "count", getattr(point, "value", None))
            for name, metric in self.metrics(reader).items()
            for point in metric.data.data_points
        }


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    made = Sdk()
    yield made
    made.provider.shutdown()


def sizes(pool: str, *, idle: int, used: int, pending: int = 0, low: int = 1, high: int = 2) -> dict[Any, int]:
    """The figures of a pool that are no totals."""
    return {
        ("count", pool, "idle"): idle,
        ("count", pool, "used"): used,
        ("idle.max", pool): high,
        ("idle.min", pool): low,
        ("max", pool): high,
        ("pending_requests", pool): pending,
    }


def totals(pool: str, **counts: int) -> dict[Any, int]:
    return {(name, pool): count for name, count in counts.items()}


async def use(pool: Pool, times: int = 1) -> None:
    for _ in range(times):
        async with pool.acquire():
            pass


# --- names, units, types ------------------------------------------------------------------------------------


def conventions() -> dict[str, tuple[str, str, str]]:
    """Unit, description and instrument of each metric, as the package of the conventions makes them."""
    found = {}

    class Meter:
        def __getattr__(self, method: str) -> Any:
            def create(*, name: str, unit: str, description: str) -> None:
                found[name] = (unit, description, method.removeprefix("create_"))

            return create

    meter: Any = Meter()
    for name, function in vars(db_metrics).items():
        if name.startswith("create_db_client_connection_"):
            function(meter)
    return found


async def test_all_metrics_of_the_conventions_are_there_with_their_units_words_and_types(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, min_size=1, max_size=1) as pool:
        instrumentation = instrument(pool, sdk.provider)
        pool.drain()  # a connect
        await eventually(lambda: pool.stats().idle == 1)
        connection = await pool.acquire()
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await pool.release(connection)
        metrics = sdk.metrics()
        assert {PREFIX + name for name in metrics} == set(conventions())
        for name, (unit, description, kind) in conventions().items():
            metric = metrics[name.removeprefix(PREFIX)]
            assert metric.unit == unit
            assert metric.description == description or version("opentelemetry-semantic-conventions") != WORDS_OF
            assert isinstance(metric.data, Histograms if kind == "histogram" else Sum)
            if isinstance(metric.data, Sum):
                assert metric.data.is_monotonic == (kind == "counter")
        instrumentation.stop()


def test_the_attributes_are_those_of_the_conventions() -> None:
    assert POOL_NAME == db_attributes.DB_CLIENT_CONNECTION_POOL_NAME
    assert STATE == db_attributes.DB_CLIENT_CONNECTION_STATE
    assert SCHEMA_URL in {each.value for each in Schemas}
    values = {each.value for each in db_attributes.DbClientConnectionStateValues}
    assert values == {"idle", "used"}


# --- figures ------------------------------------------------------------------------------------------------


async def test_every_figure_is_exact_after_leases_waits_and_timeouts(dsn: str, sdk: Sdk) -> None:
    pool = Pool(dsn, name="p", min_size=1, max_size=2)
    instrument(pool, sdk.provider)
    assert sdk.figures() == sizes("p", idle=0, used=0)
    async with pool:
        assert sdk.figures() == sizes("p", idle=1, used=0) | totals("p", create_time=1)
        await use(pool, 5)
        first = await pool.acquire()
        second = await pool.acquire()
        waiting = asyncio.create_task(use(pool))
        await eventually(lambda: pool.stats().waiting == 1)
        counted = totals("p", create_time=2, wait_time=7, use_time=5)
        assert sdk.figures() == sizes("p", idle=0, used=2, pending=1) | counted
        for _ in range(3):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0.01)
        await pool.release(first)
        await waiting
        await pool.release(second)
        counted = totals("p", create_time=2, wait_time=8, use_time=8, timeouts=3)
        assert sdk.figures() == sizes("p", idle=2, used=0) | counted
        pool.resize(0, 7)
        assert sdk.figures() == sizes("p", idle=2, used=0, low=0, high=7) | counted
    assert sdk.figures() == sizes("p", idle=0, used=0, low=0, high=7) | counted


async def test_durations_are_in_seconds_and_in_the_advised_buckets(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=1) as pool:
        instrument(pool, sdk.provider)
        connection = await pool.acquire()
        waiting = asyncio.create_task(use(pool))
        await asyncio.sleep(0.06)
        await pool.release(connection)
        await waiting
        metrics = sdk.metrics()
        [waited] = metrics["wait_time"].data.data_points
        [used] = metrics["use_time"].data.data_points
        assert isinstance(waited, HistogramDataPoint)
        assert isinstance(used, HistogramDataPoint)
        stats = pool.stats()
    assert waited.explicit_bounds == used.explicit_bounds == BUCKETS
    assert waited.min == 0.0
    assert 0 < waited.max <= stats.wait.max  # until it runs, and not until its grant
    assert used.max == pytest.approx(stats.hold.max, abs=1e-6)
    assert 0.05 < used.max < 20
    assert sum(used.bucket_counts) == used.count == 2


async def test_a_pool_that_is_closed_and_opened_again_goes_on_counting(dsn: str, sdk: Sdk) -> None:
    pool = Pool(dsn, name="p", min_size=1, max_size=2)
    instrument(pool, sdk.provider)
    for opening in range(1, 4):
        async with pool:
            await use(pool, 2)
            connection = await pool.acquire()
            other = await pool.acquire()
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0)
            await pool.release(connection)
            await pool.release(other)
        counted = totals("p", create_time=2, wait_time=4, use_time=4, timeouts=1)
        assert sdk.figures() == sizes("p", idle=0, used=0) | {key: opening * value for key, value in counted.items()}


async def test_a_reader_of_differences_gets_what_is_new(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        instrument(pool, sdk.provider)
        for times in (3, 4):
            await use(pool, times)
            expected = sizes("p", idle=1, used=0) | totals("p", wait_time=times, use_time=times)
            assert sdk.figures(sdk.delta) == expected
        assert sdk.figures(sdk.delta) == sizes("p", idle=1, used=0)
        assert sdk.figures() == sizes("p", idle=1, used=0) | totals("p", wait_time=7, use_time=7)


async def test_a_lane_is_in_use_though_nobody_has_acquired_it(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        instrument(pool, sdk.provider)
        slow = asyncio.create_task(pool.fetchval("select pg_sleep(1)"))
        await eventually(lambda: pool.stats().leased == 1)
        assert sdk.figures() == sizes("p", idle=0, used=1)  # and no lease is counted
        await slow


@pytest.mark.parametrize("state", ["connecting", "closing", "checking", "recycling"])
def test_checked_and_recycled_ones_are_used_and_others_are_not_counted(
    sdk: Sdk, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(name="p", min_size=1, max_size=2)
    changes: dict[str, Any] = {state: 2}
    stats = replace(pool.stats(), **changes)
    monkeypatch.setattr(pool, "stats", lambda: stats)
    instrumentation = instrument(pool, sdk.provider)
    used = 2 if state in ("checking", "recycling") else 0
    assert sdk.figures() == sizes("p", idle=0, used=used)
    instrumentation.stop()


def test_nothing_is_missing_of_what_many_threads_do_before_a_collection(dsn: str, sdk: Sdk) -> None:
    with SyncPool(dsn, name="p", min_size=2, max_size=2) as pool:
        instrument(pool, sdk.provider)

        def work() -> None:
            for _ in range(100):
                with pool.acquire():
                    pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        sdk.figures()  # while they work
        for thread in threads:
            thread.join()
        expected = sizes("p", idle=2, used=0, low=2) | totals("p", wait_time=400, use_time=400)
        assert sdk.figures() == expected


# --- several pools, and their ends --------------------------------------------------------------------------


async def test_pools_are_told_apart_by_their_names(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, name="a", min_size=1, max_size=2) as a, Pool(dsn, name="b", min_size=2, max_size=3) as b:
        first = instrument(a, sdk.provider)
        instrument(b, sdk.provider)
        await use(a, 2)
        await use(b, 3)
        of_a = totals("a", wait_time=2, use_time=2)
        of_b = sizes("b", idle=2, used=0, low=2, high=3) | totals("b", wait_time=3, use_time=3)
        assert sdk.figures() == sizes("a", idle=1, used=0) | of_a | of_b
        first.stop()
        await use(a)
        assert sdk.figures() == of_a | of_b


async def test_the_figures_of_pools_with_one_name_are_added_up(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=2) as one, Pool(dsn, name="p", min_size=1, max_size=2) as two:
        instrument(one, sdk.provider)
        instrument(two, sdk.provider)
        await use(one)
        await use(two)
        expected = sizes("p", idle=2, used=0, low=2, high=4) | totals("p", wait_time=2, use_time=2)
        assert sdk.figures() == expected


async def test_after_a_stop_what_came_before_it_is_there_and_nothing_else(dsn: str, sdk: Sdk) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        instrumentation = instrument(pool, sdk.provider)
        assert repr(instrumentation) == "<Instrumentation of 'p': reports>"
        await use(pool, 3)
        instrumentation.stop()
        instrumentation.stop()
        assert repr(instrumentation) == "<Instrumentation of 'p': stopped>"
        await use(pool, 2)
        assert sdk.figures(sdk.delta) == sdk.figures() == totals("p", wait_time=3, use_time=3)
        again = instrument(pool, sdk.provider)
        await use(pool)
        assert sdk.figures() == sizes("p", idle=1, used=0) | totals("p", wait_time=4, use_time=4)
        again.stop()


async def test_a_dropped_pool_is_reported_no_longer_but_what_it_did_is(dsn: str, sdk: Sdk) -> None:
    pools = [Pool(dsn, name="p", min_size=1, max_size=2)]
    instrumentation = instrument(pools[0], sdk.provider)
    async with pools[0]:
        await use(pools[0], 3)
    gone = weakref.ref(pools[0])
    pools.clear()
    gc.collect()
    assert gone() is None
    assert sdk.figures() == totals("p", create_time=1, wait_time=3, use_time=3)
    instrumentation.stop()
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        instrument(pool, sdk.provider)
        assert sdk.figures() == sizes("p", idle=1, used=0) | totals("p", create_time=1, wait_time=3, use_time=3)


async def test_the_same_pool_twice_is_refused_but_not_for_another_provider(dsn: str, sdk: Sdk) -> None:
    other = Sdk()
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        instrument(pool, sdk.provider)
        with pytest.raises(ValueError, match=r"p is instrumented already: stop\(\)"):
            instrument(pool, sdk.provider)
        instrument(pool, other.provider)
        await use(pool)
        expected = sizes("p", idle=1, used=0) | totals("p", wait_time=1, use_time=1)
        assert sdk.figures() == other.figures() == expected
    other.provider.shutdown()


def test_what_is_no_pool_is_refused(sdk: Sdk) -> None:
    pool: Any = "postgresql://app:secret@localhost/app"
    with pytest.raises(TypeError, match="pool must be a Pool or a SyncPool, not a str"):
        instrument(pool, sdk.provider)


# --- the global provider, and none --------------------------------------------------------------------------


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


GLOBAL = """
import sys
from asyncpool import SyncPool
from asyncpool.metrics.opentelemetry import instrument
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

reader = InMemoryMetricReader()
provider = MeterProvider([reader])
first = SyncPool(sys.argv[1], name="first")
second = SyncPool(sys.argv[1], name="second")
third = SyncPool(sys.argv[1], name="third")
if sys.argv[2] == "before":
    instrument(first)
    metrics.set_meter_provider(provider)
else:
    metrics.set_meter_provider(provider)
    instrument(first)
instrument(second)
instrument(third, provider)
for pool in first, second, third:
    with pool, pool.acquire():
        pass
[resource] = reader.get_metrics_data().resource_metrics
[scope] = resource.scope_metrics
for metric in scope.metrics:
    print(metric.name, len(metric.data.data_points))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_global_provider_may_be_set_before_or_after(dsn: str, when: str) -> None:
    lines = dict(line.split() for line in run(GLOBAL, dsn, when).splitlines())
    histograms = ("create_time", "wait_time", "use_time", "pending_requests", "max", "idle.max", "idle.min")
    assert lines == {PREFIX + "count": "6", **{PREFIX + name: "3" for name in histograms}}


def test_without_the_extra_the_error_says_what_to_install() -> None:
    script = """
import sys
sys.modules["opentelemetry"] = sys.modules["opentelemetry.metrics"] = None
try:
    import asyncpool.metrics.opentelemetry
except ImportError as error:
    print(error)
"""
    needs = "asyncpool.metrics.opentelemetry needs pip install 'asyncpool-pg[otel]'"
    assert run(script) == f"{needs} (from a clone: pip install '.[otel]')\n"


def test_a_process_that_ends_has_told_all_at_the_providers_shutdown(dsn: str) -> None:
    script = """
import sys
from asyncpool import SyncPool
from asyncpool.metrics.opentelemetry import instrument
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader

class Exporter(MetricExporter):
    def export(self, metrics_data, timeout_millis=0, **kwargs):
        for metric in metrics_data.resource_metrics[0].scope_metrics[0].metrics:
            if metric.name.endswith("use_time"):
                print(sum(point.count for point in metric.data.data_points))
        return MetricExportResult.SUCCESS

    def shutdown(self, timeout_millis=0, **kwargs):
        pass

    def force_flush(self, timeout_millis=0):
        return True

provider = MeterProvider([PeriodicExportingMetricReader(Exporter(), export_interval_millis=1e6)])
pool = SyncPool(sys.argv[1])
pool.open()
instrument(pool, provider)
for _ in range(50):
    with pool.acquire():
        pass
"""
    assert run(script, dsn) == "50\n"
