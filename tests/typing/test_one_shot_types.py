"""What type checkers make of one-shot statements: they run over this file, and fail where an `assert_type` is wrong.

Nothing here is executed but the last lines, by which pytest sees that the file is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_type

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import DictRow, RowMaker, TupleRow, args_row, class_row, dict_row, scalar_row, tuple_row

from asyncpool import Pool, PoolError, PoolTimeout, StatementOutcomeUnknown, StatementTimeout, SyncPool


@dataclass
class Reading:
    """A row."""

    device: int
    value: float


class Audited(psycopg.AsyncConnection[DictRow]):
    """A connection class whose rows have a type."""


class AuditedBlocking(psycopg.Connection[DictRow]):
    """The same for threads."""


QUERY = "select device, value from reading where device = %s"


async def rows_are_tuples_by_default(pool: Pool) -> None:
    assert_type(await pool.execute(QUERY, [1]), str)
    assert_type(await pool.fetch(QUERY, [1]), list[TupleRow])
    assert_type(await pool.fetchrow(QUERY, [1]), TupleRow | None)
    assert_type(await pool.fetchval(QUERY, [1]), Any)
    assert_type(await pool.executemany(QUERY, [(1,), (2,)]), int)


async def the_pools_row_factory_types_the_rows() -> None:
    async with Pool(row_factory=class_row(Reading)) as readings:
        assert_type(await readings.fetch(QUERY, [1]), list[Reading])
        assert_type(await readings.fetchrow(QUERY, [1]), Reading | None)
        assert_type(await readings.fetchval(QUERY, [1]), Any)
        assert_type(await readings.execute(QUERY, [1]), str)
        for reading in await readings.fetch(QUERY, [1], timeout=1, retry=True, binary=True):
            assert_type(reading.value, float)
    async with Pool(row_factory=dict_row) as pool:
        assert_type(await pool.fetch(QUERY, [1]), list[DictRow])
        assert_type(await pool.fetchrow(QUERY, [1]), DictRow | None)


async def that_of_a_call_types_its_rows(pool: Pool, readings: Pool[psycopg.AsyncConnection[Reading]]) -> None:
    assert_type(await pool.fetch(QUERY, [1], row_factory=class_row(Reading)), list[Reading])
    assert_type(await pool.fetchrow(QUERY, [1], row_factory=class_row(Reading)), Reading | None)
    assert_type(await pool.fetch(QUERY, [1], row_factory=dict_row), list[DictRow])
    assert_type(await pool.fetchrow(QUERY, [1], row_factory=dict_row, timeout=None), DictRow | None)
    assert_type(await pool.fetch(QUERY, [1], row_factory=scalar_row), list[Any])
    assert_type(await readings.fetch(QUERY, [1], row_factory=tuple_row), list[TupleRow])
    assert_type(await readings.fetchrow(QUERY, [1], row_factory=tuple_row), TupleRow | None)
    assert_type(await readings.fetch(QUERY, [1], row_factory=None), list[Reading])

    def total(device: int, value: float) -> float:
        return device + value

    assert_type(await pool.fetch(QUERY, [1], row_factory=args_row(total)), list[float])


async def a_factory_of_ones_own_may_look_at_the_cursor(pool: Pool) -> None:
    def named(cursor: psycopg.AsyncCursor[Any]) -> RowMaker[list[str]]:
        names = [column.name for column in cursor.description or ()]

        def make(values: Sequence[Any]) -> list[str]:
            return [f"{name}={value}" for name, value in zip(names, values, strict=True)]

        return make

    assert_type(await pool.fetch(QUERY, [1], row_factory=named), list[list[str]])
    assert_type(await pool.fetchrow(QUERY, [1], row_factory=named), list[str] | None)


async def a_connection_class_does_not_tell_its_rows(pool: Pool[Audited]) -> None:
    assert_type(await pool.execute(QUERY, [1]), str)
    assert_type(await pool.fetch(QUERY, [1]), list[Any])
    assert_type(await pool.fetchrow(QUERY, [1]), Any)
    assert_type(await pool.fetch(QUERY, [1], row_factory=class_row(Reading)), list[Reading])


async def of_any_pool_the_rows_are_anything(pool: Pool[Any]) -> None:
    for row in await pool.fetch(QUERY, [1]):
        row.whatever()
    assert_type(await pool.fetch(QUERY, [1], row_factory=dict_row), list[DictRow])


async def queries_and_parameters_are_all_that_psycopg_takes(pool: Pool) -> None:
    await pool.execute("select 1")
    await pool.execute(b"select 1")
    await pool.execute(sql.SQL("select {}").format(sql.Literal(1)))
    await pool.execute("select %(a)s", {"a": 1})
    await pool.execute("select %s", (1,))

    def many() -> Iterator[tuple[int]]:
        yield (1,)

    await pool.executemany("select %s", many())
    await pool.executemany("select %(a)s", [{"a": 1}])


async def each_is_a_coroutine_which_tasks_may_run(pool: Pool) -> None:
    one: Coroutine[Any, Any, list[TupleRow]] = pool.fetch(QUERY, [1])
    task = asyncio.create_task(one)
    assert_type(await task, list[TupleRow])
    async with asyncio.TaskGroup() as group:
        assert_type(group.create_task(pool.execute(QUERY, [1])), asyncio.Task[str])


def threads_have_the_same(pool: SyncPool, readings: SyncPool[psycopg.Connection[Reading]]) -> None:
    assert_type(pool.execute(QUERY, [1], timeout=1, retry=True), str)
    assert_type(pool.fetch(QUERY, [1]), list[TupleRow])
    assert_type(pool.fetchrow(QUERY, [1]), TupleRow | None)
    assert_type(pool.fetchval(QUERY, [1]), Any)
    assert_type(pool.executemany(QUERY, [(1,), (2,)]), int)
    assert_type(pool.fetch(QUERY, [1], row_factory=dict_row), list[DictRow])
    assert_type(readings.fetch(QUERY, [1]), list[Reading])
    assert_type(readings.fetchrow(QUERY, [1]), Reading | None)


def and_the_same_of_connection_classes(pool: SyncPool[AuditedBlocking]) -> None:
    assert_type(pool.fetch(QUERY, [1]), list[Any])
    assert_type(pool.fetchrow(QUERY, [1]), Any)


async def errors_are_known_by_their_kinds(pool: Pool) -> None:
    try:
        await pool.execute(QUERY, [1], timeout=1)
    except StatementTimeout as error:
        unknown: StatementOutcomeUnknown = error
        timeout: TimeoutError = error
        assert_type(unknown.sqlstate, str | None)
        assert_type(timeout.errno, int | None)
    except PoolTimeout as refused:
        assert_type(refused.diag, psycopg.errors.Diagnostic)


def the_options_and_statistics_are_typed(pool: Pool) -> None:
    Pool(lanes=0)
    SyncPool(lanes=4)
    assert_type(pool.stats().one_shots, int)


async def what_is_wrong_is_seen(pool: Pool) -> None:
    await pool.execute(QUERY, [1], timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await pool.execute(QUERY, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await pool.execute(QUERY, [1], row_factory=dict_row)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await pool.fetchval(QUERY, [1], row_factory=dict_row)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await pool.executemany(QUERY, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Pool(lanes="1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_the_errors_are_what_their_types_say() -> None:
    assert issubclass(StatementTimeout, (StatementOutcomeUnknown, TimeoutError))
    assert issubclass(StatementOutcomeUnknown, psycopg.errors.TransactionResolutionUnknown)
    assert issubclass(StatementOutcomeUnknown, psycopg.OperationalError)
    assert not issubclass(StatementOutcomeUnknown, PoolError)
    assert not issubclass(PoolTimeout, StatementOutcomeUnknown)


@pytest.mark.parametrize("error", [StatementOutcomeUnknown, StatementTimeout])
def test_their_sqlstate_is_that_of_a_transaction_whose_resolution_is_unknown(
    error: type[StatementOutcomeUnknown],
) -> None:
    assert error.sqlstate == "08007"
