"""The rounds of the demo: a connection per payload, the pool, its one-shots, the pool losing all its sessions."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from asyncpool import Pool
from asyncpool.cli.demo.workload import Refused, Tally, Workload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpool import PoolStats
    from asyncpool.cli.demo.display import Display
    from asyncpool.cli.demo.readings import Readings
    from asyncpool.cli.demo.workload import Payload, Store


# Seconds between two looks at the queue.
QUEUE_INTERVAL = 0.01


@dataclass(frozen=True, slots=True)
class Target:
    """Where the payloads go, and through how large a pool."""

    conninfo: str
    readings: Readings
    min_size: int
    max_size: int


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round came to. Times are seconds.

    `sessions` is what the server counted, None if it does not count; `connected` what the client knows of.
    `terminated` is how many sessions the server was told to end half-way. `stats` is the pool's last word, if there was
    one, and `longest_queue` the most of its callers that were seen in line.
    """

    title: str
    seconds: float
    tally: Tally
    rows: int
    sessions: int | None
    connected: int
    terminated: int = 0
    stats: PoolStats | None = None
    longest_queue: int = 0

    @property
    def nothing_lost(self) -> bool:
        """Whether the table has exactly what was acknowledged, and that is everything."""
        return self.rows == self.tally.acknowledged == self.tally.expected

    @property
    def rate(self) -> float:
        """Payloads per second."""
        return self.tally.acknowledged / self.seconds

    def latency(self, share: float) -> float:
        """The time within which that share of the payloads was stored."""
        ordered = sorted(self.tally.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Round(ABC):
    """One round: what stores a payload, and what the client knows of the sessions it opened."""

    number: int
    title: str

    def __init__(self, target: Target, workload: Workload) -> None:
        self.target = target
        self.workload = workload
        self.tally = Tally(workload.payloads)
        self.connected = 0
        self.terminated = 0
        self.longest_queue = 0

    def stats(self) -> PoolStats | None:
        """The pool's, if the payloads go through one."""
        return None

    @abstractmethod
    def store(self) -> AbstractAsyncContextManager[Store]:
        """A way to store payloads, for as long as the round takes."""

    @property
    def application_name(self) -> str:
        return self.target.readings.application_name(self.number)

    async def run(self, display: Display) -> RoundResult:
        """Store the whole workload, and compare what the table has with what was acknowledged."""
        readings = self.target.readings
        before = await asyncio.to_thread(readings.sessions_opened, self.number)
        async with self.store() as store, display.watching(self.title, self.tally, self.stats):
            begun = time.perf_counter()
            await self.workload.run(store, self.tally)
            seconds = time.perf_counter() - begun
        after = await asyncio.to_thread(readings.sessions_opened, self.number)
        result = RoundResult(
            title=self.title,
            seconds=seconds,
            tally=self.tally,
            rows=await asyncio.to_thread(readings.rows, self.number),
            sessions=after - before if before is not None and after is not None else None,
            connected=self.connected,
            terminated=self.terminated,
            stats=self.stats(),
            longest_queue=self.longest_queue,
        )
        display.round_ended(result)
        return result


class ConnectionPerPayload(Round):
    """Every payload logs in, is stored, and leaves."""

    number = 1
    title = "connection per payload"

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        async def store(payload: Payload) -> None:
            try:
                conn = await psycopg.AsyncConnection.connect(
                    self.target.conninfo, application_name=self.application_name
                )
            except psycopg.OperationalError as error:
                raise Refused(str(error)) from error
            self.connected += 1
            async with conn:
                await self.target.readings.insert(conn, self.number, payload)

        yield store


class Pooled(Round):
    """The payloads share the pool's connections."""

    number = 2
    title = "the pool"
    _pool: Pool | None = None

    def stats(self) -> PoolStats | None:
        """The pool's."""
        return self._pool.stats() if self._pool is not None else None

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        self._pool = pool = Pool(
            self.target.conninfo,
            min_size=self.target.min_size,
            max_size=self.target.max_size,
            application_name=self.application_name,
        )
        async with pool:
            watching = asyncio.create_task(self._watch_queue(pool), name="watch the queue")
            try:
                yield partial(self.store_in, pool)
            finally:
                watching.cancel()
        self.connected = pool.stats().connects

    async def _watch_queue(self, pool: Pool) -> None:
        while True:
            self.longest_queue = max(self.longest_queue, pool.stats().waiting)
            await asyncio.sleep(QUEUE_INTERVAL)

    async def store_in(self, pool: Pool, payload: Payload) -> None:
        """Store a payload through the pool."""
        async with pool.acquire() as conn:
            await self.target.readings.insert(conn, self.number, payload)


class OneShots(Pooled):
    """Every payload is a one-shot statement."""

    number = 3
    title = "one-shot statements"

    async def store_in(self, pool: Pool, payload: Payload) -> None:
        """Store a payload through the pool."""
        await self.target.readings.insert(pool, self.number, payload)


class PooledAndTerminated(Pooled):
    """The pool again; half-way the server ends every session of it."""

    number = 4
    title = "sessions ended half-way"

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        async with super().store() as store:
            termination = asyncio.create_task(self._terminate_half_way(), name="terminate the sessions half-way")
            try:
                yield store
                await termination
            finally:
                termination.cancel()

    async def _terminate_half_way(self) -> None:
        await self.tally.half_way.wait()
        self.terminated = await asyncio.to_thread(self.target.readings.terminate, self.number)


async def run_rounds(target: Target, workload: Workload, display: Display) -> list[RoundResult]:
    """One round after the other, so that none disturbs another's figures."""
    kinds = (ConnectionPerPayload, Pooled, OneShots, PooledAndTerminated)
    return [await kind(target, workload).run(display) for kind in kinds]
