"""The milliseconds: how soon a pool knows what became of its sessions, how long it takes to open and close.

    python benchmarks/health.py [--rounds N] [--json] [--url URL] [--uvloop]

Ours, and psycopg_pool where it does the same. Every round has a new pool of 10 connections; it needs
the right to call pg_terminate_backend.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import harness
import psycopg
from harness import Table
from psycopg_pool import AsyncConnectionPool

from asyncpool import Pool

if TYPE_CHECKING:
    from contenders import Block

SIZE = 10
APPLICATION = "asyncpool benchmark"
LOOK_EVERY = 0.0002
GIVE_UP_AFTER = 2.0

# --- the two pools, as far as they are looked at here -------------------------------------------------------


class Watched(Protocol):
    name: str

    def block(self) -> Block: ...
    def idle(self) -> int: ...
    def connects(self) -> int: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...


class Ours:
    name = "asyncpool"

    def __init__(self, url: str) -> None:
        self._pool = Pool(url, min_size=SIZE, max_size=SIZE, autocommit=True, application_name=APPLICATION)
        self.block = self._pool.acquire

    def idle(self) -> int:
        return self._pool.stats().idle

    def connects(self) -> int:
        return self._pool.stats().connects

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close()


class Theirs:
    name = "psycopg_pool"

    def __init__(self, url: str) -> None:
        options = {"autocommit": True, "application_name": APPLICATION}
        self._pool = AsyncConnectionPool(url, min_size=SIZE, max_size=SIZE, open=False, kwargs=options)
        self.block = self._pool.connection

    def idle(self) -> int:
        return int(self._pool.get_stats()["pool_available"])

    def connects(self) -> int:
        return int(self._pool.get_stats()["connections_num"])

    async def open(self) -> None:
        await self._pool.open(wait=True)

    async def close(self) -> None:
        await self._pool.close()


@dataclass(frozen=True, slots=True)
class Observer:
    """A session beside the pool's, which asks the server what it thinks."""

    session: psycopg.AsyncConnection[Any]

    async def backends(self) -> list[int]:
        query = "select pid from pg_stat_activity where application_name = %s"
        cursor = await self.session.execute(query, (APPLICATION,))
        return [pid for (pid,) in await cursor.fetchall()]

    async def none_left(self) -> None:
        while await self.backends():  # noqa: ASYNC110 - the server does not tell
            await asyncio.sleep(LOOK_EVERY)

    async def terminate(self, pids: list[int]) -> None:
        await self.session.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) as pid", (pids,))


async def until(condition: Callable[[], bool]) -> float | None:
    """Seconds until it holds, looked at every 0.2 ms; None if it does not within two seconds."""
    start = perf_counter()
    while not condition():
        if perf_counter() - start > GIVE_UP_AFTER:
            return None
        await asyncio.sleep(LOOK_EVERY)
    return perf_counter() - start


# --- what is measured: each returns seconds, or None where it did not happen --------------------------------


@asynccontextmanager
async def opened(pool: Watched) -> AsyncIterator[Watched]:
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


async def opening(pool: Watched, _: Observer) -> float | None:
    start = perf_counter()
    async with opened(pool):
        return perf_counter() - start


async def knowing_that_one_ended(pool: Watched, observer: Observer) -> float | None:
    async with opened(pool):
        [victim, *_] = await observer.backends()
        await observer.terminate([victim])
        return await until(lambda: pool.idle() < SIZE)


async def replacing_one_that_ended(pool: Watched, observer: Observer) -> float | None:
    return await _replacing(1, pool, observer)


async def replacing_all_that_ended(pool: Watched, observer: Observer) -> float | None:
    return await _replacing(SIZE, pool, observer)


async def _replacing(number: int, pool: Watched, observer: Observer) -> float | None:
    async with opened(pool):
        victims = (await observer.backends())[:number]
        start = perf_counter()
        await observer.terminate(victims)
        replaced = await until(lambda: pool.connects() == SIZE + number and pool.idle() == SIZE)
        return perf_counter() - start if replaced is not None else None


async def cancelling(pool: Watched, observer: Observer) -> float | None:
    """From the cancellation of a running statement until its connection, the same, is idle again."""

    async def sleep() -> None:
        async with pool.block() as connection:
            await connection.execute("select pg_sleep(10)")

    async with opened(pool):
        before = await observer.backends()
        task = asyncio.create_task(sleep())
        await asyncio.sleep(0.05)
        start = perf_counter()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: pool.idle() == SIZE)
        elapsed = perf_counter() - start
        return elapsed if set(await observer.backends()) == set(before) else None


async def closing(pool: Watched, _: Observer) -> float | None:
    await pool.open()
    start = perf_counter()
    await pool.close()
    return perf_counter() - start


async def closing_until_the_server_agrees(pool: Watched, observer: Observer) -> float | None:
    await pool.open()
    start = perf_counter()
    await pool.close()
    await observer.none_left()
    return perf_counter() - start


Measurement = Callable[[Watched, Observer], Awaitable[float | None]]
MEASUREMENTS: dict[str, Measurement] = {
    f"open(), {SIZE} connections": opening,
    "an idle session ended: until the pool knows": knowing_that_one_ended,
    "an idle session ended: until it is replaced": replacing_one_that_ended,
    f"all {SIZE} ended: until all are replaced": replacing_all_that_ended,
    "a cancelled statement: until its connection is idle again": cancelling,
    f"close(), {SIZE} idle connections": closing,
    "close(): until the server counts none of them": closing_until_the_server_agrees,
}

# --- the run ------------------------------------------------------------------------------------------------

Figures = dict[str, dict[str, list[float | None]]]


async def measure(url: str, rounds: int) -> Figures:
    figures: Figures = {name: {Ours.name: [], Theirs.name: []} for name in MEASUREMENTS}
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as session:
        observer = Observer(session)
        for index in range(rounds + 1):
            for name, measurement in MEASUREMENTS.items():
                for kind in (Ours, Theirs):
                    if None in figures[name][kind.name]:
                        continue
                    await observer.none_left()
                    seconds = await measurement(kind(url), observer)
                    if index > 0:  # the first round warms up
                        figures[name][kind.name].append(seconds)
    return figures


def milliseconds(figures: list[float | None]) -> list[str]:
    """Median and worst."""
    seconds = [figure for figure in figures if figure is not None]
    if len(seconds) < len(figures):
        return ["does not", ""]
    return [f"{statistics.median(seconds) * 1e3:.1f}", f"{max(seconds) * 1e3:.1f}"]


def table(figures: Figures) -> Table:
    columns = ["milliseconds", Ours.name, "worst", Theirs.name, "worst"]
    rows = [
        [name, *milliseconds(of_both[Ours.name]), *milliseconds(of_both[Theirs.name])]
        for name, of_both in figures.items()
    ]
    note = f"Looked at every {LOOK_EVERY * 1e3:.1f} ms. does not: not in {GIVE_UP_AFTER:.0f} s of no use."
    return Table(columns, rows, note)


def main() -> None:
    parser = harness.options("how soon the pool knows, opens and closes", rounds=10)
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    arguments = parser.parse_args()
    loop = "uvloop" if arguments.uvloop else "asyncio"
    with harness.server(arguments.url) as url:
        where = f"{harness.machine(url)}, {loop}"
        figures = harness.run(measure(url, arguments.rounds), loop)
    if arguments.json:
        harness.show_json({"machine": where, "seconds": figures})
        return
    print(f"median and worst of {arguments.rounds} rounds\n{where}\n")
    harness.show([table(figures)])


if __name__ == "__main__":
    main()
