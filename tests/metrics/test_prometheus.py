"""The Prometheus collector, scraped over HTTP with the real client library and read with its parsers."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from kit.waiting import eventually
from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from asyncpool import Pool, PoolTimeout, SyncPool
from asyncpool.events import CloseReason
from asyncpool.histogram import BOUNDS, Durations
from asyncpool.metrics.prometheus import BUCKETS, Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

NAMES = {
    "asyncpool_connections": "gauge",
    "asyncpool_min_size": "gauge",
    "asyncpool_max_size": "gauge",
    "asyncpool_waiting": "gauge",
    "asyncpool_acquires": "counter",
    "asyncpool_acquires_waited": "counter",
    "asyncpool_timeouts": "counter",
    "asyncpool_cancelled": "counter",
    "asyncpool_returned_bad": "counter",
    "asyncpool_one_shots": "counter",
    "asyncpool_connects": "counter",
    "asyncpool_connect_errors": "counter",
    "asyncpool_abandoned": "counter",
    "asyncpool_closes": "counter",
    "asyncpool_acquire_wait_seconds": "histogram",
    "asyncpool_hold_seconds": "histogram",
    "asyncpool_connect_seconds": "histogram",
}


def scrape(port: int, accept: str = "") -> dict[str, Metric]:
    """The families that a server of metrics shows, by name, in the format that is asked for."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
        is_open = "openmetrics" in response.headers["Content-Type"]
    assert is_open == bool(accept)
    return {family.name: family for family in (parse_openmetrics if is_open else parse_text)(text)}


def figures(families: dict[str, Metric]) -> dict[tuple[str, ...], float]:
    """The value of each sample, by its name without `asyncpool_`, its pool and what else it has, but for 0."""
    return {
        (sample.name.removeprefix("asyncpool_"), *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
        if sample.value and not sample.name.endswith(("_bucket", "_sum", "_created"))
    }


@contextmanager
def served(collector: Collector) -> Iterator[int]:
    """The port of the client library's own server, with this collector alone."""
    registry = CollectorRegistry()
    registry.register(collector)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def use(pool: Pool) -> None:
    async with pool.acquire():
        pass


def of_now(collector: Collector) -> dict[tuple[str, ...], float]:
    return figures({family.name: family for family in collector.collect()})


@pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["text", "OpenMetrics"])
async def test_every_figure_is_exact_when_it_is_scraped(dsn: str, accept: str) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        with served(Collector(pool)) as port:
            for _ in range(3):
                await use(pool)
            assert await pool.fetchval("select 1") == 1
            await eventually(lambda: pool.stats().leased == 0)
            first, second = await pool.acquire(), await pool.acquire()
            waiting = asyncio.create_task(use(pool))
            await eventually(lambda: pool.stats().waiting == 1)
            for _ in range(2):
                with pytest.raises(PoolTimeout):
                    await pool.acquire(timeout=0.01)
            families = await asyncio.to_thread(scrape, port, accept)
            await pool.release(first)
            await waiting
            await pool.release(second)
            later = await asyncio.to_thread(scrape, port, accept)
    assert {name: family.type for name, family in families.items()} == NAMES
    fixed = {("min_size", "p"): 1, ("max_size", "p"): 2, ("one_shots_total", "p"): 1, ("timeouts_total", "p"): 2}
    assert figures(families) == fixed | {
        ("connections", "p", "leased"): 2,
        ("waiting", "p"): 1,
        ("acquires_total", "p"): 5,
        ("acquires_waited_total", "p"): 1,  # until the pool had grown
        ("connects_total", "p"): 2,
        ("acquire_wait_seconds_count", "p"): 5,
        ("hold_seconds_count", "p"): 3,
        ("connect_seconds_count", "p"): 2,
    }
    seen = figures(later)
    assert seen["acquires_waited_total", "p"] == 2
    assert seen["hold_seconds_count", "p"] == 6


async def test_ended_connections_are_counted_by_their_reason_also_those_that_never_occurred(dsn: str) -> None:
    async with Pool(dsn, name="p", min_size=2, max_size=2) as pool:
        with served(Collector(pool)) as port:
            pool.drain()
            await eventually(lambda: pool.stats().idle == 2)
            families = await asyncio.to_thread(scrape, port)
    counts = {sample.labels["reason"]: sample.value for sample in families["asyncpool_closes"].samples}
    assert counts == {reason.value: 2.0 if reason is CloseReason.DRAINED else 0.0 for reason in CloseReason}


async def test_durations_are_in_the_bucket_in_which_the_pool_has_counted_them(dsn: str) -> None:
    async with Pool(dsn, name="p", min_size=1, max_size=1) as pool:
        durations = Durations()
        for bound in BOUNDS:
            for seconds in (bound * 0.999, bound, bound * 1.001):
                durations.record(seconds)
        pool._runner.leases.holds = durations  # type: ignore[union-attr]
        with served(Collector(pool)) as port:
            families = await asyncio.to_thread(scrape, port)
        hold = pool.stats().hold
    samples = families["asyncpool_hold_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert list(buckets) == [*map(str, BUCKETS), "+Inf"]
    assert set(BUCKETS) <= set(BOUNDS)
    recorded = [bound * factor for bound in BOUNDS for factor in (0.999, 1, 1.001)]
    for bound, count in buckets.items():
        assert count == sum(seconds <= float(bound) for seconds in recorded), bound
    [total] = [sample.value for sample in samples if sample.name.endswith("_sum")]
    assert total == hold.sum


async def test_pools_are_told_apart_and_a_closed_one_starts_at_zero_when_it_is_opened_again(dsn: str) -> None:
    one, two = Pool(dsn, name="one", min_size=1, max_size=1), Pool(dsn, name="two", min_size=1, max_size=1)
    collector = Collector(one)
    collector.add(two)
    async with one:
        for _ in range(3):
            await use(one)
    async with two, two.acquire():
        seen = of_now(collector)
        assert seen["acquires_total", "one"] == 3
        assert seen["acquires_total", "two"] == 1
        assert ("connections", "one", "idle") not in seen
        assert seen["connections", "two", "leased"] == 1
    async with one:
        assert ("acquires_total", "one") not in of_now(collector)
        collector.remove(two)
        assert {key[1] for key in of_now(collector)} == {"one"}


def test_a_blocking_pool_behind_a_wsgi_application(dsn: str) -> None:
    class Silent(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
            """Nothing."""

    registry = CollectorRegistry()
    with SyncPool(dsn, name="p", min_size=1, max_size=1) as pool:
        registry.register(Collector(pool))
        with pool.acquire(), make_server("127.0.0.1", 0, make_wsgi_app(registry), handler_class=Silent) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            seen = figures(scrape(server.server_port))
            thread.join()
    assert seen["connections", "p", "leased"] == 1
    assert seen["acquires_total", "p"] == 1


def test_a_registry_takes_it_before_any_pool_is_open_and_refuses_a_second_one() -> None:
    class Unread(SyncPool[Any]):
        def stats(self) -> Any:
            raise AssertionError("read, though nobody scrapes")

    registry = CollectorRegistry()
    pool = Unread(name="p")
    registry.register(Collector(pool))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(Collector())


def test_a_second_pool_of_the_same_name_is_refused_until_the_first_is_gone(dsn: str) -> None:
    pools = [Pool(dsn, name="p"), Pool(dsn, name="p")]
    collector = Collector(pools[0])
    with pytest.raises(ValueError, match="there is a pool 'p' already: give each a name= of its own"):
        collector.add(pools[1])
    with pytest.raises(ValueError, match="there is a pool 'p' already"):
        Collector(pools[0], pools[0])
    del pools[0]
    gc.collect()
    assert of_now(collector) == {}
    collector.add(pools[0])
    assert of_now(collector)["max_size", "p"] == 10


def test_what_is_no_pool_is_refused() -> None:
    pool: Any = "postgresql://app:secret@localhost/app"
    with pytest.raises(TypeError, match="pool must be a Pool or a SyncPool, not a str"):
        Collector(pool)


async def test_no_observer_is_needed(dsn: str) -> None:
    async with Pool(dsn, min_size=1) as pool:
        with served(Collector(pool)) as port:
            await asyncio.to_thread(scrape, port)
        assert not pool._observations


def test_without_the_extra_the_error_says_what_to_install() -> None:
    script = """
import sys
sys.modules["prometheus_client"] = sys.modules["prometheus_client.core"] = None
try:
    import asyncpool.metrics.prometheus
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    needs = "asyncpool.metrics.prometheus needs pip install 'asyncpool-pg[prometheus]'"
    assert done.stdout == f"{needs} (from a clone: pip install '.[prometheus]')\n"
