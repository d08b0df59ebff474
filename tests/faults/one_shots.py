"""One-shot statements that know their own answers, and what became of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from kit.load import PAUSE, Load
from kit.waiting import eventually

from asyncpool import PoolError, StatementOutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator

    import pytest
    from kit.servers import Admin

    from asyncpool import Pool

# Its first parameter is what it returns, its second how many seconds that takes.
SLEEP = "select %s::int from pg_sleep(%s)"
# The same, of which nothing is known yet: nothing is sent behind it.
UNKNOWN_SLEEP = "select %s::int from pg_sleep(%s) -- never seen before"
# Longer than any test.
FOR_EVER = 600.0


class Ledger:
    """A table without any constraint, and what those who write into it were told."""

    def __init__(self, admin: Admin, name: str) -> None:
        self.name = name
        self.acknowledged: set[int] = set()
        self.in_doubt: set[int] = set()
        """Nobody knows: those that are under way, and those whose outcome is unknown."""
        self.insert = f"insert into {name} values (%s)".encode()
        self.insert_returning = f"insert into {name} values (%s) returning id".encode()
        # Takes the seconds, too.
        self.slow_insert = f"insert into {name} select %s::int from pg_sleep(%s) returning id".encode()
        self._admin = admin
        self._numbers = itertools.count(1)
        admin.execute(f"drop table if exists {name}")
        admin.execute(f"create table {name} (id integer)")

    def drop(self) -> None:
        self._admin.execute(f"drop table {self.name}")

    def next(self) -> int:
        """A number that no other row has."""
        return next(self._numbers)

    @contextmanager
    def writing(self, number: int) -> Iterator[None]:
        """The block writes this row with one statement: in doubt if it is cancelled or its outcome is unknown. After
        any other error it must not be there.
        """
        self.in_doubt.add(number)
        try:
            yield
        except StatementOutcomeUnknown:
            raise
        except Exception:
            self.in_doubt.discard(number)
            raise
        self.in_doubt.discard(number)
        self.acknowledged.add(number)

    def rows(self) -> list[int]:
        """Those that were written under a number of `next`, or another above 0."""
        return sorted(row for (row,) in self._admin.execute(f"select id from {self.name} where id > 0"))

    def assert_true(self) -> None:
        """Every acknowledged row is there, none twice, and none that was refused."""
        rows = Counter(self.rows())
        assert [row for row, count in rows.items() if count > 1] == [], "there twice"
        assert sorted(self.acknowledged - set(rows)) == [], "acknowledged, and not there"
        assert sorted(set(rows) - self.acknowledged - self.in_doubt) == [], (
            "there, and its caller was told that it is not"
        )


@contextmanager
def ledger_on(admin: Admin, application_name: str) -> Iterator[Ledger]:
    """One for a test."""
    ledger = Ledger(admin, application_name.replace("-", "_") + "_ledger")
    yield ledger
    admin.terminate_busy(application_name)  # of a test that failed midway: they would keep the table
    ledger.drop()


@dataclass
class OneShotLoad(Load):
    """One-shot statements that go on from a number of tasks."""

    reads: int = 0
    writes: int = 0
    unexpected: list[BaseException] = field(default_factory=list)


@asynccontextmanager
async def under_one_shots(
    pool: Pool[Any], ledger: Ledger, tasks: int, *, retry: bool = False, timeout: float | None = None
) -> AsyncIterator[OneShotLoad]:
    """That many tasks read and write while the block lasts; each answer is that to its own question, or else the test
    fails. Errors are collected.
    """
    load = OneShotLoad()
    tokens = itertools.count(1_000_000)

    async def value() -> None:
        token = next(tokens)
        found = await pool.fetchval("select %s::int", [token], retry=retry, timeout=timeout)
        assert found == token, f"asked for {token}, answered {found}"

    async def row() -> None:
        token = next(tokens)
        found = await pool.fetchrow("select %s::int, %s::text", [token, str(token)], retry=retry, timeout=timeout)
        assert found == (token, str(token)), f"asked for {token}, answered {found}"

    async def rows() -> None:
        token = next(tokens)
        found = await pool.fetch("select %s::int + generate_series(1, 3)", [token], retry=retry, timeout=timeout)
        assert found == [(token + n,) for n in (1, 2, 3)], f"asked for {token}, answered {found}"

    async def write() -> None:
        number = ledger.next()
        with ledger.writing(number):
            assert await pool.execute(ledger.insert, [number], timeout=timeout) == "INSERT 0 1"

    async def write_returning() -> None:
        number = ledger.next()
        with ledger.writing(number):
            found = await pool.fetchval(ledger.insert_returning, [number], timeout=timeout)
            assert found == number, f"wrote {number}, was told {found}"

    kinds: list[Callable[[], Awaitable[None]]] = [value, write, row, write_returning, rows]

    async def work(first: int) -> None:
        for number in itertools.count(first):
            if load.stopping:
                return
            kind = kinds[number % len(kinds)]
            began = time.monotonic()
            try:
                await kind()
            except psycopg.Error as error:
                load.note(began, error)
                await asyncio.sleep(PAUSE)
            else:
                load.note(began, None)
                load.reads += kind in (value, row, rows)
                load.writes += kind in (write, write_returning)

    async with asyncio.TaskGroup() as group:
        for number in range(tasks):
            group.create_task(work(number))
        try:
            yield load
        finally:
            load.stopping = True


def assert_outcomes_are_unknown(errors: Iterable[BaseException | None], cause: type[Exception] | None = None) -> None:
    """Each is what a statement is told that was sent, and whose connection was lost, and says by what."""
    for error in errors:
        assert type(error) is StatementOutcomeUnknown, repr(error)
        assert not isinstance(error, PoolError)
        assert isinstance(error, psycopg.errors.TransactionResolutionUnknown)
        assert error.sqlstate == "08007"
        assert isinstance(error.__cause__, cause or psycopg.Error), repr(error.__cause__)


def lanes_take(monkeypatch: pytest.MonkeyPatch, *, slow: float = FOR_EVER) -> None:
    """A lane takes what is known, however long that took; from `slow` on, in seconds, it has a lease of its own."""
    monkeypatch.setattr("asyncpool._core.lanes.LANE_WORK", FOR_EVER)
    monkeypatch.setattr("asyncpool._core.lanes.SLOW", slow)


async def learn(pool: Pool[Any], *statements: Any) -> None:
    """Have it known of these that they are quick, if they are not told to sleep. Their numbers are less than 0."""
    for statement in statements:
        for number in range(-3, 0):
            await pool.fetchval(statement, [number, 0.0])


async def send(statement: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a statement, and let it be sent if it may."""
    task = asyncio.create_task(statement)
    await asyncio.sleep(0)
    return task


async def ended(tasks: Iterable[asyncio.Task[Any]], timeout: float = 20.0) -> list[BaseException | None]:
    """How each has ended, when all have: by an error, a cancellation among them, or not."""
    found = list(tasks)
    _, pending = await asyncio.wait(found, timeout=timeout)
    assert not pending, f"{len(pending)} statements have no end"
    return [asyncio.CancelledError() if task.cancelled() else task.exception() for task in found]


async def assert_quiet(pool: Pool[Any], admin: Admin, application_name: str) -> None:
    """Nobody holds or waits for anything, and the server counts what the pool counts."""
    await eventually(lambda: _is_quiet(pool), timeout=20)
    await eventually(lambda: admin.sessions(application_name) == pool.stats().size, timeout=20)


def _is_quiet(pool: Pool[Any]) -> bool:
    stats = pool.stats()
    return stats.idle == stats.size and stats.waiting == 0
