"""A server goes away and comes back: how soon each pool works again, and what its users get to see of it.

    python benchmarks/outage.py [--rounds N] [--seconds S ...] [--size N] [--only NAME] [--json] [--uvloop]

It starts a server of its own, which it stops (`fast`), leaves stopped for S seconds, and starts again, once for every
contender in every round, in an order drawn anew, each with a new pool. Twice: with nobody who asks for a connection
before the server is back, and then one client; and with as many clients as connections, who never stop asking.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import harness
import psycopg
from contenders import Contender
from harness import Table

from asyncpool.cli.embedded import EmbeddedServer

APPLICATION = "asyncpool benchmark"
COUNTED = 100  # requests, from when the server is back
# Long enough for the connections that there are to be in use at the same time.
WORK = "select pg_sleep(0.005)"
# A client whose request has failed asks again after this: else it would fail thousands of times in a second.
PAUSE = 0.01
LOOK_EVERY = 0.005
# From when the server is back. More than the 30 s that two of the pools let a caller wait by default.
GIVE_UP_AFTER = 45.0
# After the last request that counts: does the pool come to its full size by itself?
THEN_WAIT = 10.0

# --- the contenders -----------------------------------------------------------------------------------------

Request = Callable[[], Awaitable[None]]
Opened = Callable[[str, int], AbstractAsyncContextManager[Request]]


@asynccontextmanager
async def asyncpool(url: str, size: int) -> AsyncIterator[Request]:
    from asyncpool import Pool

    async with Pool(url, min_size=size, max_size=size, autocommit=True) as pool:

        async def request() -> None:
            async with pool.acquire() as connection:
                await connection.execute(WORK)

        yield request


def psycopg_pool(*, check: bool) -> Opened:
    @asynccontextmanager
    async def opened(url: str, size: int) -> AsyncIterator[Request]:
        from psycopg_pool import AsyncConnectionPool

        options: dict[str, Any] = {"check": AsyncConnectionPool.check_connection} if check else {}
        pool = AsyncConnectionPool(
            url, min_size=size, max_size=size, open=False, kwargs={"autocommit": True}, **options
        )
        await pool.open(wait=True)

        async def request() -> None:
            async with pool.connection() as connection:
                await connection.execute(WORK)

        try:
            yield request
        finally:
            await pool.close()

    return opened


@asynccontextmanager
async def asyncpg(url: str, size: int) -> AsyncIterator[Request]:
    import asyncpg  # type: ignore[import-untyped, unused-ignore]

    pool = await asyncpg.create_pool(url, min_size=size, max_size=size)

    async def request() -> None:
        async with pool.acquire() as connection:
            await connection.execute(WORK)

    try:
        yield request
    finally:
        pool.terminate()


@dataclass(frozen=True)
class Entrant:
    """One row of a table. All is at its defaults but for the size, autocommit, and what the name says."""

    contender: Contender[Any]
    opened: Opened

    @property
    def name(self) -> str:
        return self.contender.name


def entrant(name: str, opened: Opened, *modules: str) -> Entrant:
    return Entrant(Contender(name, modules, (), _never), opened)


async def _never(_url: str, _size: int) -> Any:
    raise NotImplementedError


ENTRANTS = [
    entrant("asyncpool", asyncpool, "asyncpool.pool", "psycopg"),
    entrant("psycopg_pool", psycopg_pool(check=False), "psycopg_pool", "psycopg"),
    entrant("psycopg_pool, check=", psycopg_pool(check=True), "psycopg_pool", "psycopg"),
    entrant("asyncpg", asyncpg, "asyncpg"),
]

# --- the server ---------------------------------------------------------------------------------------------


def outage(server: EmbeddedServer, seconds: float) -> float:
    """Stop it, and start it after so many seconds. Returns when it let a client in, on the clock of `perf_counter`:
    the beginning of the first attempt that succeeded, of those that are made here, one after the other.
    """
    server.stop("fast")
    time.sleep(seconds)
    # It takes a moment longer to hear of it; the next `stop` waits until it has.
    threading.Thread(target=server.start, name="start the server").start()
    while True:
        began = time.perf_counter()
        with suppress(psycopg.OperationalError):
            psycopg.connect(server.host_dsn()).close()
            return began


# --- one outage ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What one outage came to for one pool. Times are seconds from when the server let clients in; None is never.

    `whole` is when the server counted as many sessions as the pool is to have.
    """

    first_success: float | None = None
    counted: int = 0
    errors: int = 0
    slowest: float = 0.0
    whole: float | None = None
    kinds: dict[str, int] = field(default_factory=dict)


class Clients:
    """Tasks that ask for a connection and use it, again and again, and what came of it since the server is back."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.back: float | None = None
        self.outcome = Outcome()
        self.done = asyncio.Event()
        self.stopping = False

    async def ask(self) -> None:
        while not self.stopping:
            began = time.perf_counter()
            try:
                await self._request()
            except Exception as error:  # noqa: BLE001 - whatever the pool raises is what is counted
                self._note(began, error)
                await asyncio.sleep(PAUSE)
            else:
                self._note(began, None)

    def _note(self, began: float, error: Exception | None) -> None:
        now = time.perf_counter()
        if self.back is None or now < self.back or self.done.is_set():
            return
        outcome = self.outcome
        outcome.counted += 1
        outcome.slowest = max(outcome.slowest, now - max(began, self.back))
        if error is not None:
            outcome.errors += 1
            kind = type(error).__name__
            outcome.kinds[kind] = outcome.kinds.get(kind, 0) + 1
        elif outcome.first_success is None:
            outcome.first_success = now - self.back
        if outcome.counted == COUNTED:
            self.done.set()


@dataclass(frozen=True)
class Situation:
    """Who asks for connections, and when."""

    title: str
    ask_during_the_outage: bool
    clients: Callable[[int], int]


SITUATIONS = [
    Situation("nobody asks before the server is back, then one client", False, lambda _: 1),
    Situation("as many clients as connections ask all the time", True, lambda size: size),
]


async def suffer(server: EmbeddedServer, entrant: Entrant, situation: Situation, size: int, seconds: float) -> Outcome:
    """One pool through one outage."""
    async with AsyncExitStack() as stack:
        request = await stack.enter_async_context(entrant.opened(server.host_dsn(application_name=APPLICATION), size))
        clients = Clients(request)
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            tasks.extend(asyncio.create_task(clients.ask()) for _ in range(situation.clients(size)))

        if situation.ask_during_the_outage:
            begin()
            await asyncio.sleep(0.2)
        clients.back = await asyncio.to_thread(outage, server, seconds)
        if not situation.ask_during_the_outage:
            begin()
        observing = asyncio.create_task(observe(server, clients, size))
        with suppress(TimeoutError):
            await asyncio.wait_for(clients.done.wait(), GIVE_UP_AFTER)
        with suppress(TimeoutError):
            await asyncio.wait_for(observing, THEN_WAIT)
        # Not by cancellation alone: a pool may swallow that.
        clients.stopping = True
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return clients.outcome


async def observe(server: EmbeddedServer, clients: Clients, size: int) -> None:
    """Until the server counts all sessions of the pool."""
    query = "select count(*) from pg_stat_activity where application_name = %s"
    async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as session:
        while True:
            cursor = await session.execute(query, [APPLICATION])
            row = await cursor.fetchone()
            assert row is not None
            if row[0] >= size:
                assert clients.back is not None
                clients.outcome.whole = time.perf_counter() - clients.back
                return
            await asyncio.sleep(LOOK_EVERY)


# --- the run ------------------------------------------------------------------------------------------------

Outcomes = dict[str, dict[float, dict[str, list[Outcome]]]]


async def measure(
    server: EmbeddedServer, entrants: Sequence[Entrant], lengths: Sequence[float], size: int, rounds: int
) -> Outcomes:
    """By situation, length and contender: one outcome for each round."""
    order = random.Random(0)
    turns = [(situation, seconds, one) for situation in SITUATIONS for seconds in lengths for one in entrants]
    outcomes: Outcomes = {}
    for situation, seconds, one in turns:
        outcomes.setdefault(situation.title, {}).setdefault(seconds, {})[one.name] = []
    for number in range(rounds):
        order.shuffle(turns)
        for situation, seconds, one in turns:
            print(f"round {number + 1}: {one.name}, {seconds:g} s, {situation.title}", file=sys.stderr)
            outcome = await suffer(server, one, situation, size, seconds)
            outcomes[situation.title][seconds][one.name].append(outcome)
    return outcomes


def milliseconds(times: list[float | None]) -> list[str]:
    """Median and worst."""
    reached = [time for time in times if time is not None]
    if not reached:
        return ["never", ""]
    worst = "never" if len(reached) < len(times) else f"{max(reached) * 1e3:,.0f}"
    return [f"{statistics.median(reached) * 1e3:,.0f}", worst]


def table(of_all: dict[str, list[Outcome]], size: int) -> Table:
    columns = ["", "first success, ms", "worst", "errors", "worst", "slowest, ms", f"all {size}, ms", "worst"]
    rows = []
    for name, outcomes in of_all.items():
        errors = [outcome.errors for outcome in outcomes]
        rows.append(
            [
                name,
                *milliseconds([outcome.first_success for outcome in outcomes]),
                f"{statistics.median(errors):g}",
                str(max(errors)),
                f"{max(outcome.slowest for outcome in outcomes) * 1e3:,.0f}",
                *milliseconds([outcome.whole for outcome in outcomes]),
            ]
        )
    return Table(columns, rows, kinds(of_all))


def kinds(of_all: dict[str, list[Outcome]]) -> str:
    """Which errors there were, over all rounds."""
    parts = []
    for name, outcomes in of_all.items():
        total: dict[str, int] = {}
        for outcome in outcomes:
            for kind, number in outcome.kinds.items():
                total[kind] = total.get(kind, 0) + number
        short = sum(outcome.counted < COUNTED for outcome in outcomes)
        if total:
            parts.append(f"{name}: " + ", ".join(f"{number} {kind}" for kind, number in sorted(total.items())))
        if short:
            parts.append(f"{name}: in {short} rounds fewer than {COUNTED} requests within {GIVE_UP_AFTER:g} s")
    return "Errors: " + "; ".join(parts) if parts else "No errors."


LEGEND = f"""\
median and worst of {{rounds}} rounds; milliseconds since the server let clients in
errors, slowest: of the first {COUNTED} requests that ended after that. all: until the server counts as many sessions
as the pool is to have; never: not within {THEN_WAIT:g} s of the last of these requests."""


def main() -> None:
    parser = argparse.ArgumentParser(description="how soon a pool works again after an outage of the server")
    parser.add_argument("--rounds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2.0], help="of the outage (default: 2)")
    parser.add_argument("--size", type=int, default=10, help="connections of the pool (default: %(default)s)")
    parser.add_argument("--only", action="append", help="this contender; may be given again")
    parser.add_argument("--json", action="store_true", help="print JSON, every round included, and no table")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's own loop")
    arguments = parser.parse_args()
    loop = "uvloop" if arguments.uvloop else "asyncio"
    # What the pools say of each failed attempt.
    logging.disable(logging.CRITICAL)
    able = harness.installed([one.contender for one in ENTRANTS])
    entrants = [one for one in ENTRANTS if one.contender in able and one.name in (arguments.only or [one.name])]
    with EmbeddedServer(host_authentication="trust", settings={"max_connections": 200}) as server:
        where = f"{harness.machine(server.dsn())}, {loop}"
        outcomes = harness.run(measure(server, entrants, arguments.seconds, arguments.size, arguments.rounds), loop)
    if arguments.json:
        listed = {
            title: {
                f"{seconds:g} s": {name: [asdict(outcome) for outcome in found] for name, found in of_all.items()}
                for seconds, of_all in by_length.items()
            }
            for title, by_length in outcomes.items()
        }
        harness.show_json({"machine": where, "size": arguments.size, "outcomes": listed})
        return
    print(f"{LEGEND.format(rounds=arguments.rounds)}\n{where}\n")
    for title, by_length in outcomes.items():
        for seconds, of_all in by_length.items():
            print(f"An outage of {seconds:g} s; {title}:")
            harness.show([table(of_all, arguments.size)])


if __name__ == "__main__":
    main()
