"""Those who can carry a single statement for a request, each behind the same call.

The pools are opened by the adapters of `contenders.py` where these have what is needed: 10 connections in autocommit,
defaults otherwise. A request is a coroutine, or function, of its own for everybody, as it would be in a service.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, Protocol

import contenders
import pgbench
from contenders import Block, Contender

if TYPE_CHECKING:
    from asyncpool import Pool

# --- the statements -----------------------------------------------------------------------------------------

INSERT, SELECT = "insert", "select"
STATEMENTS = (INSERT, SELECT)

SCHEMA = "asyncpool_benchmark"
ROWS = 10_000
PAYLOAD = '{"celsius": 21.5, "humidity": 0.43, "battery": 3.01}'

INSERT_SQL = f"insert into {SCHEMA}.reading (device, value, payload) values ({{}}, {{}}, {{}})"
SELECT_SQL = f"select id, device, value, payload from {SCHEMA}.known where id = {{}}"
# Psycopg's and psycopg2's placeholders, and the server's own, which asyncpg takes.
INSERT_PERCENT, SELECT_PERCENT = INSERT_SQL.format("%s", "%s", "%s"), SELECT_SQL.format("%s")
INSERT_DOLLAR, SELECT_DOLLAR = INSERT_SQL.format("$1", "$2", "$3"), SELECT_SQL.format("$1")


def values(key: int) -> tuple[int, float, str]:
    """What the request of this key inserts."""
    return key, key * 0.5, PAYLOAD


def keys() -> Iterator[int]:
    """The id of each known row in turn, for ever."""
    return itertools.cycle(range(1, ROWS + 1))


# --- what a contender can do --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """What was answered in a time, and the processor time that the client's process took for it."""

    statements: int
    seconds: float
    cpu_seconds: float


class Carrier(Protocol):
    """A contender, open: it carries requests of one statement for at least so many seconds."""

    async def carry(self, statement: str, tasks: int, seconds: float) -> Sample: ...

    @property
    def close(self) -> Callable[[], Awaitable[Any]]: ...


Request = Callable[[int], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class InTasks:
    """Each task sends its next request when it has the answer to the last."""

    requests: Mapping[str, Request]
    close: Callable[[], Awaitable[Any]]

    async def carry(self, statement: str, tasks: int, seconds: float) -> Sample:
        request, next_key, answered = self.requests[statement], keys().__next__, 0

        async def work() -> None:
            nonlocal answered
            while perf_counter() < end:
                await request(next_key())
                answered += 1

        finished = asyncio.gather(*(asyncio.create_task(work()) for _ in range(tasks)))
        cpu_start, start = process_time(), perf_counter()
        end = start + seconds
        await finished
        return Sample(answered, perf_counter() - start, process_time() - cpu_start)


@dataclass(frozen=True, slots=True)
class InThreads:
    """The same in as many threads as there are connections, whatever the number of tasks."""

    requests: Mapping[str, Callable[[int], Any]]
    threads: int
    close: Callable[[], Awaitable[Any]]

    async def carry(self, statement: str, tasks: int, seconds: float) -> Sample:
        return await asyncio.to_thread(self._carry, self.requests[statement], seconds)

    def _carry(self, request: Callable[[int], Any], seconds: float) -> Sample:
        next_key = keys().__next__

        def work(end: float) -> int:
            answered = 0
            while perf_counter() < end:
                request(next_key())
                answered += 1
            return answered

        with ThreadPoolExecutor(self.threads) as executor:
            cpu_start, start = process_time(), perf_counter()
            answered = sum(executor.map(work, [start + seconds] * self.threads))
            return Sample(answered, perf_counter() - start, process_time() - cpu_start)


# --- ours ---------------------------------------------------------------------------------------------------


def our_pool(url: str, size: int, lanes: int | None = None) -> Pool[Any]:
    """`lanes=None`: as many as the pool has by default."""
    from asyncpool import Pool

    options: dict[str, Any] = {} if lanes is None else {"lanes": lanes}
    return Pool(url, min_size=size, max_size=size, autocommit=True, **options)


async def open_one_shots(url: str, size: int, lanes: int | None = None) -> InTasks:
    pool = our_pool(url, size, lanes)
    await pool.open()
    return InTasks(one_shot_requests(pool), pool.close)


def one_shot_requests(pool: Any) -> Mapping[str, Request]:
    async def insert(key: int) -> None:
        await pool.execute(INSERT_PERCENT, values(key))

    async def select(key: int) -> None:
        row = await pool.fetchrow(SELECT_PERCENT, (key,))
        assert row[0] == key

    return {INSERT: insert, SELECT: select}


async def open_leases(url: str, size: int) -> InTasks:
    pool = await contenders.open_asyncpool(url, size)
    return InTasks(lease_requests(pool.block), pool.close)


# --- others -------------------------------------------------------------------------------------------------


def requests_on(connection: Any) -> Mapping[str, Request]:
    """On one connection of psycopg's class, all the time."""

    async def insert(key: int) -> None:
        await connection.execute(INSERT_PERCENT, values(key))

    async def select(key: int) -> None:
        cursor = await connection.execute(SELECT_PERCENT, (key,))
        row = await cursor.fetchone()
        assert row[0] == key

    return {INSERT: insert, SELECT: select}


async def open_psycopg_pool(url: str, size: int) -> InTasks:
    pool = await contenders.open_psycopg_pool(url, size)
    return InTasks(lease_requests(pool.block), pool.close)


def lease_requests(block: Callable[[], Block]) -> Mapping[str, Request]:
    """Each request takes a connection of psycopg's class for its statement."""

    async def insert(key: int) -> None:
        async with block() as connection:
            await connection.execute(INSERT_PERCENT, values(key))

    async def select(key: int) -> None:
        async with block() as connection:
            cursor = await connection.execute(SELECT_PERCENT, (key,))
            row = await cursor.fetchone()
        assert row[0] == key

    return {INSERT: insert, SELECT: select}


async def open_asyncpg(url: str, size: int) -> InTasks:
    pool = await contenders.open_asyncpg(url, size)
    return InTasks(_asyncpg_requests(pool.block), pool.close)


async def open_asyncpg_without_reset(url: str, size: int) -> InTasks:
    pool = await contenders.open_asyncpg_without_reset(url, size)
    return InTasks(_asyncpg_requests(pool.block), pool.close)


def _asyncpg_requests(block: Callable[[], Block]) -> Mapping[str, Request]:
    # As asyncpg's own `pool.execute()` and `pool.fetchrow()` do it.
    async def insert(key: int) -> None:
        async with block() as connection:
            await connection.execute(INSERT_DOLLAR, *values(key))

    async def select(key: int) -> None:
        async with block() as connection:
            row = await connection.fetchrow(SELECT_DOLLAR, key)
        assert row[0] == key

    return {INSERT: insert, SELECT: select}


async def open_psycopg2(url: str, size: int) -> InThreads:
    from psycopg2.pool import ThreadedConnectionPool

    pool = ThreadedConnectionPool(size, size, url)
    connections = [pool.getconn() for _ in range(size)]
    for connection in connections:
        connection.autocommit = True
        pool.putconn(connection)

    async def close() -> None:
        pool.closeall()

    return InThreads(_psycopg2_requests(pool), size, close)


def _psycopg2_requests(pool: Any) -> Mapping[str, Callable[[int], None]]:
    # Its pool raises in place of waiting: as many threads as connections are the most that it can serve.
    def insert(key: int) -> None:
        connection = pool.getconn()
        with connection.cursor() as cursor:
            cursor.execute(INSERT_PERCENT, values(key))
        pool.putconn(connection)

    def select(key: int) -> None:
        connection = pool.getconn()
        with connection.cursor() as cursor:
            cursor.execute(SELECT_PERCENT, (key,))
            row = cursor.fetchone()
        pool.putconn(connection)
        assert row[0] == key

    return {INSERT: insert, SELECT: select}


# --- the yardstick ------------------------------------------------------------------------------------------

# `:key` is drawn by pgbench itself for each transaction; `:payload` is a variable of its command line.
_PGBENCH_SCRIPTS = {
    INSERT: (
        f"\\set key random(1, {ROWS})\n\\set value :key * 0.5\n"
        + INSERT_SQL.format(":key", ":value", ":payload")
        + ";\n"
    ),
    SELECT: f"\\set key random(1, {ROWS})\n" + SELECT_SQL.format(":key") + ";\n",
}


@dataclass(slots=True)
class InPgbench:
    """The same statements by pgbench, a C program that does nothing with the answers: a client for each connection."""

    run: pgbench.Run
    rate: dict[str, float]
    """Transactions a second as of the last time, by statement: pgbench is told how many, not how long."""

    async def carry(self, statement: str, tasks: int, seconds: float) -> Sample:
        count = max(100, int(self.rate.get(statement, 10_000) * seconds))
        script, variables = _PGBENCH_SCRIPTS[statement], {"payload": PAYLOAD}
        report = await asyncio.to_thread(self.run, script, variables, count)
        self.rate[statement] = report.rate
        return Sample(report.transactions, report.transactions / report.rate, report.cpu_seconds)

    async def close(self) -> None:
        """There is nothing to close: each run has connections of its own."""


async def open_pgbench(url: str, size: int) -> InPgbench:
    return InPgbench(functools.partial(pgbench.run, url, size), {})


# --- the list -----------------------------------------------------------------------------------------------

ONE_SHOTS = "asyncpool, one-shots"
LEASES = "asyncpool, leases"
ASYNCPG = "asyncpg"
ASYNCPG_WITHOUT_RESET = contenders.ASYNCPG_WITHOUT_RESET
PSYCOPG_POOL = contenders.PSYCOPG_POOL
PSYCOPG2 = "psycopg2.pool, threads"
PGBENCH = "(pgbench, in C)"

_OTHERS: list[Contender[Carrier]] = [
    Contender(LEASES, ("asyncpool",), (), open_leases),
    Contender(ASYNCPG_WITHOUT_RESET, ("asyncpg",), ("asyncpg",), open_asyncpg_without_reset),
    Contender(ASYNCPG, ("asyncpg",), ("asyncpg",), open_asyncpg),
    Contender(PSYCOPG_POOL, ("psycopg_pool",), ("psycopg-pool",), open_psycopg_pool),
    Contender(PSYCOPG2, ("psycopg2",), ("psycopg2-binary",), open_psycopg2),
    Contender(PGBENCH, (), (), open_pgbench),
]


def with_lanes(lanes: int) -> str:
    return f"{ONE_SHOTS}, lanes={lanes}"


def listed(lanes: Sequence[int]) -> list[Contender[Carrier]]:
    """All of them: our one-shots on the default number of lanes and on each of these, and the others."""
    modules = ("asyncpool",)
    ours: list[Contender[Carrier]] = [Contender(ONE_SHOTS, modules, (), open_one_shots)]
    for number in lanes:
        opener = functools.partial(open_one_shots, lanes=number)
        ours.append(Contender(with_lanes(number), modules, (), opener))
    return [*ours, *_OTHERS]
