"""What it costs to be observed: acquire and release alone, with an observer that does nothing, and with OpenTelemetry.

    python benchmarks/metrics.py [--rounds N] [--rate N] [--seconds S] [--json] [--url URL] [--uvloop]

Each of the contenders is a pool of ours with 10 connections, in the same process. It needs opentelemetry-sdk.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import harness
from harness import Samples, Table
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)

from asyncpool import Pool
from asyncpool.metrics.opentelemetry import Instrumentation, instrument

SIZE = 10
TASKS = 200
CLOSED_LOOP = 30_000  # so many pairs that an observer is never too far behind to be told of all
NOTHING, NO_OP, IN_MEMORY, PERIODIC = "nothing", "an observer that does nothing", "OTel, in memory", "OTel, periodic"

# What is measured, per acquire + release.
CLOSED, CLOSED_CPU = "closed loop, µs", "CPU"
SEEN, SEEN_MEDIAN, SEEN_99, PACED_CPU = "paced, mean µs", "median", "99th percentile", "CPU, µs"


class Discard(MetricExporter):
    """Takes what a periodic reader collects, and sends it nowhere."""

    def export(self, metrics_data: MetricsData, timeout_millis: float = 0, **_: Any) -> MetricExportResult:
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        pass


@dataclass
class Observed:
    """A pool, and how to wait until everything that it has done is told."""

    pool: Pool
    catch_up: Callable[[], object]
    dropped: Callable[[], int]


def observed(name: str, pool: Pool) -> Observed:
    if name == NOTHING:
        return Observed(pool, lambda: None, lambda: 0)
    if name == NO_OP:
        observation = pool.observe(lambda event: None)
        return Observed(pool, observation.flush, lambda: observation.dropped)
    reader = InMemoryMetricReader() if name == IN_MEMORY else PeriodicExportingMetricReader(Discard(), 1000)
    instrumentation: Instrumentation = instrument(pool, MeterProvider([reader]))
    return Observed(pool, reader.collect, lambda: instrumentation.dropped)


async def closed_loop(contender: Observed) -> dict[str, float]:
    """One task that does nothing else, as fast as it can."""
    acquire, release = contender.pool.acquire, contender.pool.release
    cpu, start = process_time(), perf_counter()
    for _ in range(CLOSED_LOOP):
        await release(await acquire())
    elapsed = perf_counter() - start
    contender.catch_up()
    return {CLOSED: elapsed / CLOSED_LOOP, CLOSED_CPU: (process_time() - cpu) / CLOSED_LOOP}


async def paced(contender: Observed, rate: float, seconds: float) -> dict[str, float]:
    """Tasks that acquire, release and think, `rate` times a second together."""
    acquire, release = contender.pool.acquire, contender.pool.release
    took: list[float] = []
    think = TASKS / rate
    end = perf_counter() + seconds

    async def client(number: int) -> None:
        await asyncio.sleep(think * number / TASKS)
        while perf_counter() < end:
            start = perf_counter()
            await release(await acquire())
            took.append(perf_counter() - start)
            await asyncio.sleep(think)

    cpu = process_time()
    await asyncio.gather(*map(client, range(TASKS)))
    contender.catch_up()
    cpu = process_time() - cpu
    return {
        SEEN: statistics.mean(took),
        SEEN_MEDIAN: statistics.median(took),
        SEEN_99: statistics.quantiles(took, n=100)[98],
        PACED_CPU: cpu / len(took),
    }


async def measure(url: str, rounds: int, rate: float, seconds: float) -> tuple[Samples, dict[str, int]]:
    names = [NOTHING, NO_OP, IN_MEMORY, PERIODIC]
    contenders: dict[str, Observed] = {}
    for name in names:
        pool = Pool(url, name=name, min_size=SIZE, max_size=SIZE, autocommit=True)
        await pool.open()
        contenders[name] = observed(name, pool)
    samples = Samples()
    order = random.Random(0)
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            gc.collect()
            figures = await closed_loop(contenders[name]) | await paced(contenders[name], rate, seconds)
            if number:  # the first round warms up
                for case, figure in figures.items():
                    samples.add(case, name, figure)
    for contender in contenders.values():
        await contender.pool.close()
    return samples, {name: contender.dropped() for name, contender in contenders.items()}


def table(samples: Samples, cases: list[str], note: str) -> Table:
    """Medians, and in brackets the median of the differences, within each round, to a pool that nobody observes."""
    rows = []
    for name in (NOTHING, NO_OP, IN_MEMORY, PERIODIC):
        row = [name]
        for case in cases:
            figures = samples.of(case, name)
            more = statistics.median(a - b for a, b in zip(figures, samples.of(case, NOTHING), strict=True))
            extra = "" if name == NOTHING else f" ({more * 1e6:+.1f})"
            row.append(f"{statistics.median(figures) * 1e6:.1f}{extra}")
        rows.append(row)
    return Table(["per acquire + release", *cases], rows, note)


def main() -> None:
    parser = harness.options("what it costs to be observed", rounds=5)
    parser.add_argument("--rate", type=float, default=5000, help="acquires per second when paced (default: 5000)")
    parser.add_argument("--seconds", type=float, default=2, help="of a paced sample (default: 2)")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    arguments = parser.parse_args()
    loop = "uvloop" if arguments.uvloop else "asyncio"
    with harness.server(arguments.url) as url:
        where = f"{harness.machine(url)}, {loop}"
        measuring = measure(url, arguments.rounds, arguments.rate, arguments.seconds)
        samples, dropped = harness.run(measuring, loop)
    if arguments.json:
        harness.show_json({"machine": where, "seconds": samples.figures, "dropped": dropped})
        return
    print(f"medians of {arguments.rounds} rounds, and in brackets what it is more than nothing\n{where}\n")
    closed = "One task, at full speed. CPU: the process, until all is told and collected."
    harness.show([table(samples, [CLOSED, CLOSED_CPU], closed)])
    note = f"{TASKS} tasks that think in between, {arguments.rate:g} acquires/s together. CPU: with what pacing takes."
    harness.show([table(samples, [SEEN, SEEN_MEDIAN, SEEN_99, PACED_CPU], note)])
    for name, number in dropped.items():
        if number:
            print(f"{name}: {number} events were not told", file=sys.stderr)


if __name__ == "__main__":
    main()
