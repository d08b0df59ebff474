"""Work for a pool, without a pause, and what became of each piece of it."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg

from .threads import in_threads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asyncpool import Pool, SyncPool

# A statement that takes a moment, so that connections are in use when something happens.
WORK = "select pg_sleep(0.002)"
# A worker that has failed does not try again sooner: else thousands of failures a second would hide what happens.
PAUSE = 0.01


@dataclass(frozen=True)
class Request:
    """From asking for a connection until it was given back, or something failed. Times are those of `monotonic`."""

    began: float
    ended: float
    error: psycopg.Error | None


@dataclass
class Load:
    """Requests that go on from a number of tasks or threads; those that have ended."""

    requests: list[Request] = field(default_factory=list)
    stopping: bool = False

    @property
    def errors(self) -> list[psycopg.Error]:
        """Those of all requests, in the order in which they failed."""
        return [request.error for request in self.requests if request.error is not None]

    def errors_since(self, when: float) -> list[psycopg.Error]:
        """Those of the requests that began after that time."""
        return [r.error for r in self.requests if r.error is not None and r.began > when]

    def successes_since(self, when: float) -> list[Request]:
        """The requests that ended well after that time."""
        return [r for r in self.requests if r.error is None and r.ended > when]

    def first_success_since(self, when: float) -> float:
        """How many seconds after that time a request ended well."""
        return min(r.ended for r in self.successes_since(when)) - when

    def note(self, began: float, error: psycopg.Error | None) -> None:
        self.requests.append(Request(began, time.monotonic(), error))


@asynccontextmanager
async def under_load(pool: Pool[Any], tasks: int) -> AsyncIterator[Load]:
    """That many tasks use the pool while the block lasts. Errors other than psycopg's fail the test."""
    load = Load()

    async def work() -> None:
        while not load.stopping:
            began = time.monotonic()
            try:
                async with pool.acquire() as conn:
                    await conn.execute(WORK)
            except psycopg.Error as error:
                load.note(began, error)
                await asyncio.sleep(PAUSE)
            else:
                load.note(began, None)

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
        try:
            yield load
        finally:
            load.stopping = True


@contextmanager
def under_blocking_load(pool: SyncPool[Any], threads: int) -> Iterator[Load]:
    """The same in threads."""
    load = Load()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                with pool.acquire() as conn:
                    conn.execute(WORK)
            except psycopg.Error as error:
                load.note(began, error)
                time.sleep(PAUSE)
            else:
                load.note(began, None)

    runnings = in_threads(threads, work)
    try:
        yield load
    finally:
        stop.set()
        for running in runnings:
            running.result()
