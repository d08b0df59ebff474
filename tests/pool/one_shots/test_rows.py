"""Row factories: that of the call, of the pool, or of what `configure` set on the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from psycopg.rows import args_row, class_row, dict_row, kwargs_row, namedtuple_row, scalar_row, tuple_row

from asyncpool import Pool

from .readings import QUERY, Reading

if TYPE_CHECKING:
    from psycopg.rows import RowMaker

Connection = psycopg.AsyncConnection[Any]

# More often than psycopg's `prepare_threshold`: first as they are, then prepared.
OFTEN = 8

EXPECTED: list[tuple[Any, Any]] = [
    (tuple_row, (7, 0.5)),
    (dict_row, {"device": 7, "value": 0.5}),
    (class_row(Reading), Reading(7, 0.5)),
    (scalar_row, 7),
    (args_row(lambda device, value: [device, value]), [7, 0.5]),
    (kwargs_row(lambda **fields: sorted(fields)), ["device", "value"]),
]
each_factory = pytest.mark.parametrize(
    ("factory", "row"), EXPECTED, ids=["tuple", "dict", "class", "scalar", "args", "kwargs"]
)


@each_factory
async def test_a_call_may_say_what_its_rows_are(dsn: str, factory: Any, row: Any, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch(QUERY, [7, 0.5], row_factory=factory) == [row]
            assert await pool.fetchrow(QUERY, [7, 0.5], row_factory=factory) == row
            assert await pool.fetch(QUERY, [7, 0.5]) == [(7, 0.5)], "that was for that call only"
            assert await pool.fetch(f"{QUERY} where false".encode(), [7, 0.5], row_factory=factory) == []


@each_factory
async def test_the_pools_factory_is_that_of_all_other_calls(
    dsn: str, factory: Any, row: Any, way: dict[str, Any]
) -> None:
    async with Pool(dsn, row_factory=factory, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch(QUERY, [7, 0.5]) == [row]
            assert await pool.fetchrow(QUERY, [7, 0.5]) == row
            assert await pool.fetchrow(QUERY, [7, 0.5], row_factory=tuple_row) == (7, 0.5)


async def test_a_named_tuple_has_the_names_of_the_columns(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, row_factory=namedtuple_row, **way) as pool:
        for _ in range(OFTEN):
            row: Any = await pool.fetchrow('select 1 as a, 2 as "größe", 3 as "a b"')
            assert row._fields == ("a", "größe", "a_b")
            assert row == (1, 2, 3)


@each_factory
async def test_fetchval_and_execute_do_not_care_for_the_pools_factory(
    dsn: str, factory: Any, row: Any, way: dict[str, Any]
) -> None:
    async with Pool(dsn, row_factory=factory, **way) as pool:
        # No rows that a Reading could be made of.
        assert await pool.fetchval("select 1 as no_field, 2 as neither") == 1
        assert await pool.fetchval("select 1 where false") is None
        assert await pool.execute("select 1 as no_field, 2 as neither") == "SELECT 1"


async def test_a_factory_that_configure_sets_is_the_pools(dsn: str, way: dict[str, Any]) -> None:
    async def configure(conn: Connection) -> None:
        conn.row_factory = dict_row

    async with Pool(dsn, configure=configure, **way) as pool:
        assert await pool.fetchrow(QUERY, [7, 0.5]) == {"device": 7, "value": 0.5}


async def test_a_factory_that_a_lease_sets_is_that_of_the_lease_only(dsn: str, way: dict[str, Any]) -> None:
    pool: Pool[Any]
    async with Pool(dsn, max_size=1, **way) as pool:
        async with pool.acquire() as conn:
            conn.row_factory = dict_row
            await conn.execute("select 1")
        assert await pool.fetchrow(QUERY, [7, 0.5]) == (7, 0.5)


# --- the user's own -----------------------------------------------------------------------------------------


class Seen:
    """A factory that notes what it sees of its cursor, and how often it is asked for a row."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.rows = 0

    def __call__(self, cursor: psycopg.AsyncCursor[Any]) -> RowMaker[list[Any]]:
        columns = cursor.description
        result = cursor.pgresult
        self.seen.append(
            (
                None if columns is None else [(column.name, *column[1:]) for column in columns],
                result and (result.status, result.ntuples, result.nfields),
                cursor.adapters.types["int4"].oid,
            )
        )

        def make(values: Sequence[Any]) -> list[Any]:
            self.rows += 1
            return [column.name for column in columns or ()] + list(values)

        return make


QUERIES: list[tuple[bytes, Any]] = [
    (b"select %s::int as a, 'x'::varchar(5) as b, 1.5::numeric(5, 2) as c", [1]),
    ("select 1 as größe, 2 as größe".encode(), None),
    (b"select", None),
    (b"select 1 where false", None),
    (b"select generate_series(1, 10)", None),
]


@pytest.mark.parametrize(("query", "params"), QUERIES)
async def test_a_factory_of_ones_own_sees_the_cursor_that_psycopg_would_show(
    dsn: str, plain: Connection, query: bytes, params: Any, way: dict[str, Any]
) -> None:
    expected = Seen()
    cursor = plain.cursor(row_factory=expected)
    await cursor.execute(query, params)
    rows = await cursor.fetchall()
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            seen = Seen()
            assert await pool.fetch(query, params, row_factory=seen) == rows
            assert seen.seen[-1] == expected.seen[-1]
            assert await pool.fetchrow(query, params, row_factory=seen) == (rows[0] if rows else None)


async def test_a_factory_of_ones_own_can_ask_how_many_rows_there_are(dsn: str, table: str, way: dict[str, Any]) -> None:
    def counting(cursor: psycopg.AsyncCursor[Any]) -> RowMaker[Any]:
        return lambda values: (cursor.rowcount, cursor.statusmessage)

    async with Pool(dsn, row_factory=counting, **way) as pool:
        assert await pool.fetch("select generate_series(1, 3)") == [(3, "SELECT 3")] * 3
        assert await pool.fetchrow("select generate_series(1, 3)") == (3, "SELECT 3")
        insert = f"insert into {table} values (1), (2) returning id".encode()
        assert await pool.fetchrow(insert) == (2, "INSERT 0 2")


async def test_fetchrow_makes_one_row_of_many(dsn: str, way: dict[str, Any]) -> None:
    seen = Seen()
    async with Pool(dsn, **way) as pool:
        row = await pool.fetchrow("select n from generate_series(1, 1000) as n", row_factory=seen)
        assert row == ["n", 1]
        assert seen.rows == 1


async def test_a_factory_is_asked_for_each_statement_anew(dsn: str, way: dict[str, Any]) -> None:
    """What it gives back may be for one result only."""

    def numbering(cursor: psycopg.AsyncCursor[Any]) -> Callable[[Sequence[Any]], tuple[int, Any]]:
        count = 0

        def make(values: Sequence[Any]) -> tuple[int, Any]:
            nonlocal count
            count += 1
            return count, values[0]

        return make

    async with Pool(dsn, row_factory=numbering, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch("select generate_series(5, 7)") == [(1, 5), (2, 6), (3, 7)]


@on_both_loops
async def test_calls_with_different_factories_run_side_by_side(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            calls = [pool.fetchrow(QUERY, [7, 0.5], row_factory=factory) for factory, _ in EXPECTED]
            assert await asyncio.gather(*calls) == [row for _, row in EXPECTED]


async def test_columns_that_change_under_the_same_text_are_seen(dsn: str, table: str, way: dict[str, Any]) -> None:
    """A factory's names are those of this result, not of the one before it."""
    select = f"select * from {table}".encode()
    async with Pool(dsn, row_factory=dict_row, **way) as pool:
        await pool.execute(f"insert into {table} values (1)".encode())
        for turn in range(OFTEN):
            row = await pool.fetchrow(select)
            assert row == {"id": 1} | {f"more_{number}": number for number in range(turn)}
            await pool.execute(f"alter table {table} add column more_{turn} int default {turn}".encode())
