"""Placeholders, parameters and adapters are psycopg's: each statement gives what psycopg's own connection gives."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import ipaddress
import itertools
import sys
import uuid
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from psycopg import sql
from psycopg.adapt import AdaptersMap, Dumper, Loader
from psycopg.pq import Format
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.json import Json, Jsonb, set_json_loads
from psycopg.types.multirange import Multirange
from psycopg.types.numeric import Int2, Int4, Int8
from psycopg.types.range import Range, TimestamptzRange

from asyncpool import Pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]

# More often than psycopg's `prepare_threshold`: first as they are, then prepared.
OFTEN = 8


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Count(enum.IntEnum):
    ONE = 1


class Point(NamedTuple):
    x: int
    y: int


VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    32_767,
    32_768,
    2**31,
    2**63 - 1,
    2**63,
    10**30,
    Int2(1),
    Int4(1),
    Int8(1),
    1.5,
    float("inf"),
    Decimal("1.2300"),
    Decimal("NaN"),
    "",
    "text",
    "'quoted' \\ %s %% é € 𝄞",
    b"",
    b"\x00\xff'\\",
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    dt.date(2024, 2, 29),
    dt.time(12, 30, 15, 5),
    dt.datetime(2024, 2, 29, 12),  # without a time zone is a type of its own
    dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC),
    dt.timedelta(days=-1, seconds=5),
    uuid.UUID(int=2**100),
    ipaddress.IPv4Address("10.0.0.1"),
    ipaddress.IPv6Network("fe80::/64"),
    Json({"a": [1, None]}),
    Jsonb({"a": [1, "é"]}),
    [],
    [1, 2, None],
    [1, 10**12],
    [[1, 2], [3, 4]],
    ["a", None, "b,c", '"d"'],
    [1.5],
    [dt.date(2024, 1, 1)],
    [uuid.UUID(int=1)],
    Range(1, 10),
    TimestamptzRange(dt.datetime(2024, 1, 1, tzinfo=dt.UTC), None),
    Multirange([Range(1, 2), Range(5, 10**12)]),
    (1, "two", None),
    Color.BLUE,
    Count.ONE,
]

PLACEHOLDERS = ["%s", "%b", "%t"]


async def both(pool: Pool[Any], plain: Connection, query: Any, params: Any, *, binary: bool = False) -> Any:
    """What the pool gives and what psycopg does; the type of the error if there is one."""

    async def by_psycopg() -> Any:
        cursor = await plain.execute(query, params, prepare=True, binary=binary)
        return await cursor.fetchall()

    return [await _outcome(call) for call in (pool.fetch(query, params, binary=binary), by_psycopg())]


async def _outcome(call: Any) -> Any:
    try:
        rows = await call
    except (psycopg.Error, TypeError, ValueError) as error:
        return type(error), str(error)
    return repr(rows), [[type(value) for value in row] for row in rows]


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
async def test_values_of_each_type_pass_as_through_psycopg(
    dsn: str, plain: Connection, placeholder: str, binary: bool, way: dict[str, Any]
) -> None:
    await plain.set_autocommit(True)
    queries = [f"select {placeholder}".encode(), f"select pg_typeof({placeholder})::text".encode()]
    async with Pool(dsn, **way) as pool:
        for value, query in itertools.product(VALUES, queries):
            ours, psycopgs = await both(pool, plain, query, [value], binary=binary)
            assert ours == psycopgs, value


async def test_values_of_all_types_may_follow_each_other_in_the_same_text(
    dsn: str, plain: Connection, way: dict[str, Any]
) -> None:
    await plain.set_autocommit(True)
    query = b"select %s, %s"
    async with Pool(dsn, prepare_threshold=0, **way) as pool:
        for pair in itertools.pairwise([*VALUES, *VALUES[::-1]]):
            ours, psycopgs = await both(pool, plain, query, pair)
            assert ours == psycopgs, pair


SIZES = [1, 100_000, 10**12, 10**30, -5, 2**31 - 1, 2**31, True, 1.5, Decimal(1)]


@pytest.mark.parametrize("threshold", [0, 1, 5, None])
async def test_the_size_of_an_int_may_change_between_calls(
    dsn: str, plain: Connection, threshold: int | None, way: dict[str, Any]
) -> None:
    """Psycopg sends each int as the smallest type that holds it: the same text is another statement each time."""
    cursor = await plain.execute("select %s, pg_typeof(%s)::text", [1, 1])
    expected = [
        await (await cursor.execute("select %s, pg_typeof(%s)::text", [size, size])).fetchall() for size in SIZES
    ]
    async with Pool(dsn, prepare_threshold=threshold, **way) as pool:

        async def ask(size: Any) -> list[Any]:
            return await pool.fetch("select %s, pg_typeof(%s)::text", [size, size])

        for _ in range(OFTEN):
            assert [await ask(size) for size in SIZES] == expected
        assert await asyncio.gather(*map(ask, SIZES * OFTEN)) == expected * OFTEN


async def test_ints_of_all_sizes_go_into_one_column(dsn: str, admin: Admin, table: str, way: dict[str, Any]) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, prepare_threshold=1, **way) as pool:
        for number in (1, 100_000, 1, 2, 100_001, 2_000_000_000, 3):
            await pool.execute(f"delete from {table} where id = %s".encode(), [number])
            await pool.execute(insert, [number])
        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            await pool.execute(insert, [10**12])
        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            await pool.execute(insert, [10**30])
        await pool.execute(insert, [4])
    assert admin.value(f"select sum(id) from {table}") == 1 + 2 + 3 + 4 + 100_000 + 100_001 + 2_000_000_000


async def test_the_elements_of_a_list_may_change_their_type_between_calls(
    dsn: str, plain: Connection, way: dict[str, Any]
) -> None:
    """Psycopg's dumper of a list is of the kind of its elements, and may be kept from call to call."""
    lists: list[list[Any]] = [[1], [10**12], [None], ["a"], [], [1.5], [10**30], [Decimal(1)], [1], [b"a"]]
    await plain.set_autocommit(True)
    async with Pool(dsn, prepare_threshold=1, **way) as pool:
        for _ in range(OFTEN):
            for value in lists:
                ours, psycopgs = await both(pool, plain, "select %s", [value])
                assert ours == psycopgs, value


async def test_a_value_that_is_none_at_first_has_a_type_later(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, prepare_threshold=0, **way) as pool:
        for _ in range(3):
            for value in (None, 1, None, "one", None, [1]):
                assert await pool.fetchval("select %s", [value]) == value


# --- placeholders -------------------------------------------------------------------------------------------


async def test_parameters_have_places_or_names(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for turn in range(OFTEN):
            assert await pool.fetchrow("select %s::int, %s::text", [turn, "b"]) == (turn, "b")
            assert await pool.fetchrow("select %s::int, %s::text", (turn, "b")) == (turn, "b")
            assert await pool.fetchrow("select %s::int, %s::text", Point(turn, 2)) == (turn, "2")
            named = "select %(b)s::text, %(a)s::int, %(b)s::text"
            assert await pool.fetchrow(named, {"a": turn, "b": "x"}) == ("x", turn, "x")
            assert await pool.fetchrow(named, {"more": 0, "b": "y", "a": turn}) == ("y", turn, "y")
            assert await pool.fetchrow(named, MappingProxyType({"b": "z", "a": turn})) == ("z", turn, "z")
            assert await pool.fetchrow("select %(a)b::int", {"a": turn}) == (turn,)


async def test_a_percent_sign_is_doubled_if_there_are_parameters_as_with_psycopg(dsn: str, way: dict[str, Any]) -> None:
    """An empty list is parameters: the same text without any is another statement."""
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetchval("select '%%'") == "%%"
            assert await pool.fetchval("select '%%'", []) == "%"
            assert await pool.fetchval("select '%%'", {}) == "%"
            assert await pool.fetchval("select 10 % 4") == 2
            assert await pool.fetchval("select 10 %% %s", [4]) == 2
            assert await pool.fetchval("select '%s'") == "%s"


async def test_the_same_text_as_str_bytes_and_sql_is_the_same_statement(dsn: str, way: dict[str, Any]) -> None:
    texts: list[Any] = ["select %s::int, 'é'", "select %s::int, 'é'".encode(), sql.SQL("select %s::int, 'é'")]
    async with Pool(dsn, **way) as pool:
        for turn in range(OFTEN):
            for text in texts:
                assert await pool.fetchrow(text, [turn]) == (turn, "é")


async def test_queries_may_be_composed(dsn: str, table: str, way: dict[str, Any]) -> None:
    insert = sql.SQL("insert into {} ({}) values ({})").format(
        sql.Identifier(table), sql.Identifier("id"), sql.Placeholder()
    )
    select = sql.SQL("select {}, {}, id from {} where id = {id}").format(
        sql.Literal("it's"), sql.Literal([1, 2]), sql.Identifier(table), id=sql.Placeholder("id")
    )
    async with Pool(dsn, **way) as pool:
        for number in range(OFTEN):
            assert await pool.execute(insert, [number]) == "INSERT 0 1"
            assert await pool.fetch(select, {"id": number}) == [("it's", [1, 2], number)]
        assert await pool.executemany(insert, [(100,), (101,)]) == 2
        assert await pool.fetchval(sql.SQL("select count(*) from {}").format(sql.Identifier(table))) == OFTEN + 2


@pytest.mark.skipif(sys.version_info < (3, 14), reason="there are no template strings before Python 3.14")
async def test_queries_may_be_template_strings(dsn: str, way: dict[str, Any]) -> None:
    # As text, because earlier versions could not read it.
    templates = eval("lambda number, name: t'select {number}::int as {name:i}, {number:b}::int'")
    async with Pool(dsn, **way) as pool:
        for number in (*range(OFTEN), 10**6):
            assert await pool.fetchrow(templates(number, "a name")) == (number, number)


async def test_tokens_of_the_servers_own_kind_are_the_servers_to_judge(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            with pytest.raises(psycopg.DatabaseError):
                await pool.fetchval("select $1")
            assert await pool.fetchval("select '$1 %%s' || %s::text", ["x"]) == "$1 %sx"


MISTAKES: list[tuple[Any, Any]] = [
    ("select %s", [object()]),
    ("select %s", [[1, "a"]]),
    ("select %s, %s", [1]),
    ("select %s", [1, 2]),
    ("select %s", []),
    ("select %(a)s", {}),
    ("select %(a)s", [1]),
    ("select %s", {"a": 1}),
    ("select %s, %(a)s", {"a": 1}),
    ("select %d", [1]),
    ("select %", [1]),
    ("select %(a", {"a": 1}),
    ("select %s", "x"),
    ("select %s", 5),
    ("select %s", {1}),
    ("select %s", ["a\0b"]),
    ("select %s", ["\ud800"]),
    ("select %b", [Json(object())]),
    (5, None),
    (None, None),
    ("select '\ud800'", None),
]


@pytest.mark.parametrize(("query", "params"), MISTAKES)
async def test_mistakes_in_parameters_are_told_in_psycopgs_words(
    dsn: str, plain: Connection, query: Any, params: Any, way: dict[str, Any]
) -> None:
    await plain.set_autocommit(True)
    async with Pool(dsn, **way) as pool:
        for _ in range(3):
            ours, psycopgs = await both(pool, plain, query, params)
            assert ours[0] is psycopgs[0]
            assert isinstance(psycopgs[0], type)
            if psycopgs[0] is not TypeError:  # of those psycopg has no words of its own
                assert ours[1] == psycopgs[1]
            assert await pool.fetchval("select %s", [1]) == 1
        assert pool.stats().closes == {}


# --- adapters -----------------------------------------------------------------------------------------------


class Money:
    """An amount, that psycopg knows nothing of."""

    def __init__(self, amount: int) -> None:
        self.amount = amount


class MoneyDumper(Dumper):
    oid = psycopg.adapters.types["numeric"].oid

    def dump(self, obj: Money) -> bytes:
        return f"{obj.amount}.00".encode()


class TextInt(Loader):
    """Says that a number came as text."""

    format = Format.TEXT

    def load(self, data: Any) -> str:
        return f"text {bytes(data).decode()}"


class BinaryInt(Loader):
    format = Format.BINARY

    def load(self, data: Any) -> str:
        return f"binary {int.from_bytes(data, 'big')}"


async def register(conn: Connection) -> None:
    conn.adapters.register_dumper(Money, MoneyDumper)
    conn.adapters.register_loader("int4", TextInt)
    conn.adapters.register_loader("int4", BinaryInt)
    set_json_loads(lambda data: f"loaded {data!s}", conn)


async def test_adapters_that_configure_registers_are_used(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, configure=register, **way) as pool:
        for turn in range(OFTEN):
            assert await pool.fetchval("select %s", [Money(turn)]) == Decimal(f"{turn}.00")
            assert await pool.fetchval("select %s::int", [turn]) == f"text {turn}"
            assert await pool.fetchval("select %s::int", [turn], binary=True) == f"binary {turn}"
            assert await pool.fetch("select %s::int", [turn], binary=True) == [(f"binary {turn}",)]
            assert await pool.fetchrow("select %s::int, 1::int", [turn], binary=True) == (f"binary {turn}", "binary 1")
            assert str(await pool.fetchval("select '[1]'::jsonb")).startswith("loaded ")
            # Literals are adapted on the client.
            assert await pool.fetchval(sql.SQL("select {}").format(sql.Literal(Money(turn)))) == Decimal(turn)


async def test_adapters_of_the_pools_context_are_used(dsn: str, way: dict[str, Any]) -> None:
    class Context:
        adapters = AdaptersMap(psycopg.adapters)
        connection = None

    Context.adapters.register_dumper(Money, MoneyDumper)
    async with Pool(dsn, context=Context(), **way) as pool:
        assert await pool.fetchval("select %s", [Money(7)]) == Decimal(7)


async def test_adapters_that_a_lease_registers_are_not_for_one_shots(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, max_size=1, **way) as pool:
        for _ in range(2):
            assert await pool.fetchval("select 1") == 1
            async with pool.acquire() as conn:
                await register(conn)
                cursor = await conn.execute("select 1")
                assert await cursor.fetchone() == ("text 1",)


async def test_types_of_the_database_that_configure_looks_up_are_used(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    admin.execute(f"create type {table}_point as (x int, y int)")
    admin.execute(f"create type {table}_color as enum ('red', 'blue')")

    async def configure(conn: Connection) -> None:
        point = await CompositeInfo.fetch(conn, f"{table}_point")
        color = await EnumInfo.fetch(conn, f"{table}_color")
        assert point is not None
        assert color is not None
        register_composite(point, conn, factory=Point)
        register_enum(color, conn, Color, mapping={Color.RED: "red", Color.BLUE: "blue"})

    try:
        async with Pool(dsn, configure=configure, **way) as pool:
            for turn in range(OFTEN):
                value = Point(turn, -turn)
                assert await pool.fetchval("select %s", [value]) == value
                assert await pool.fetchval("select %s", [[value, value]]) == [value, value]
                assert await pool.fetchval("select %s", [value], binary=True) == value
                row: Sequence[Any] | None = await pool.fetchrow("select %s, %s", [Color.BLUE, [Color.RED]])
                assert row == (Color.BLUE, [Color.RED])
    finally:
        admin.execute(f"drop type {table}_point")
        admin.execute(f"drop type {table}_color")
