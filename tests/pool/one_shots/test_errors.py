"""An error is that of one caller: psycopg's own, complete, and the statements beside it do not notice."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually
from psycopg.adapt import Dumper, Loader
from psycopg.rows import class_row

from asyncpool import Pool

from .gate import INSERTED
from .readings import Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from kit.servers import Admin
    from psycopg.rows import RowMaker

    from .gate import Gate

    Call = Callable[[Pool[Any]], Coroutine[Any, Any, Any]]

Connection = psycopg.AsyncConnection[Any]

# More often than psycopg's `prepare_threshold`: first unknown, then known, then prepared.
OFTEN = 8

DIAGNOSTICS = [name for name in dir(psycopg.errors.Diagnostic) if not name.startswith("_")]

COMPLETE = """do $$ begin raise exception using
    message = 'the message', detail = 'the detail', hint = 'the hint', errcode = 'XX123', column = 'a column',
    constraint = 'a constraint', datatype = 'a type', table = 'a table', schema = 'a schema'; end $$"""
SERIALIZATION = "do $$ begin raise exception 'try again' using errcode = 'serialization_failure'; end $$"

# Statements that the server refuses; {table} has a column `id integer unique deferrable initially deferred`.
REFUSED: dict[str, tuple[str, Any]] = {
    "syntax": ("selec %s", [1]),
    "syntax far inside": ("select 1,\n\n  2 frm %s", [1]),
    "no such table": ("select * from no_such_table where id = %s", [1]),
    "no such column": ("select no_such_column from {table}", None),
    "no such function": ("select no_such_function(%s)", [1]),
    "wrong type": ("select %s + true", [1]),
    "value of the wrong type": ("select %s::int", ["no number"]),
    "out of range": ("insert into {table} values (%s)", [10**12]),
    "division by zero": ("select 1 / %s", [0]),
    "division by zero in the third row": ("select 1 / (3 - n) from generate_series(1, %s) as n", [5]),
    "deferred constraint": ("insert into {table} values (%s), (%s)", [-1, -1]),
    "deferred constraint of what returns": ("insert into {table} values (%s), (%s) returning id", [-1, -1]),
    "exception of one's own": (COMPLETE, None),
    "serialization": (SERIALIZATION, None),
    "several commands": ("select 1; select 2", None),
    "several commands with a parameter": ("insert into {table} values (%s); select 2", [-1]),
    "several commands that would be refused alone": ("select 1; begin", None),
    "too many for the server": ("select {many}", None),
}
each_refused = pytest.mark.parametrize("refused", REFUSED)


def refused_query(name: str, table: str) -> tuple[bytes, Any]:
    query, params = REFUSED[name]
    many = ", ".join(["1"] * 2000)
    return query.replace("{table}", table).replace("{many}", many).encode(), params


async def among_neighbours(pool: Pool[Any], table: str, wrong: Awaitable[Any]) -> BaseException:
    """The error of a call that is made between ten others, in the same turn of the event loop, which succeed."""
    insert = f"insert into {table} values (%s)".encode()
    before = [pool.fetchval("select %s::int", [number]) for number in range(5)]
    after = [pool.fetchval("select %s::int", [number]) for number in range(5)]
    outcomes = await asyncio.gather(
        *before, pool.execute(insert, [1]), wrong, pool.execute(insert, [2]), *after, return_exceptions=True
    )
    error = outcomes.pop(6)
    assert outcomes == [*range(5), "INSERT 0 1", "INSERT 0 1", *range(5)]
    assert isinstance(error, BaseException), error
    return error


async def fails_alone(pool: Pool[Any], admin: Admin, table: str, call: Call) -> list[BaseException]:
    """Its errors, each time among neighbours: these have done what they were to do, and the connection lives."""
    # Known, so that they are sent before and behind it.
    await pool.fetchval("select %s::int", [0])
    await pool.execute(f"insert into {table} values (%s)".encode(), [0])
    errors = []
    for _ in range(OFTEN):
        admin.execute(f"delete from {table}")
        errors.append(await among_neighbours(pool, table, call(pool)))
        assert admin.execute(f"select id from {table} order by id") == [(1,), (2,)]
    assert pool.stats().closes == {}
    assert pool.stats().connect_errors == 0
    return errors


# --- the server's -------------------------------------------------------------------------------------------


@each_refused
async def test_what_the_server_refuses_is_told_to_its_caller_in_full(
    dsn: str, plain: Connection, admin: Admin, table: str, refused: str, way: dict[str, Any]
) -> None:
    await plain.set_autocommit(True)
    query, params = refused_query(refused, table)
    with pytest.raises(psycopg.Error) as expected:
        await plain.execute(query, params, prepare=True)
    async with Pool(dsn, **way) as pool:
        for error in await fails_alone(pool, admin, table, lambda pool: pool.fetch(query, params)):
            assert type(error) is type(expected.value)
            assert isinstance(error, psycopg.Error)
            assert str(error) == str(expected.value)
            assert error.sqlstate == expected.value.sqlstate
            for name in DIAGNOSTICS:
                assert getattr(error.diag, name) == getattr(expected.value.diag, name), name


async def test_diagnostics_are_complete(dsn: str) -> None:
    async with Pool(dsn) as pool:
        with pytest.raises(psycopg.DatabaseError, match="the message") as error:
            await pool.execute(COMPLETE)
        diag = error.value.diag
        assert diag.sqlstate == error.value.sqlstate == "XX123"
        assert (diag.message_detail, diag.message_hint) == ("the detail", "the hint")
        assert (diag.schema_name, diag.table_name, diag.column_name) == ("a schema", "a table", "a column")
        assert (diag.datatype_name, diag.constraint_name) == ("a type", "a constraint")
        with pytest.raises(psycopg.errors.SyntaxError) as error_of_syntax:
            await pool.execute("select 1 frm x y")
        assert error_of_syntax.value.diag.statement_position == "14"


@on_both_loops
async def test_good_ones_and_bad_ones_by_turns_get_what_is_theirs(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(3):
            calls = [pool.fetchval("select 10 / %s", [number % 2]) for number in range(200)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert outcomes[1::2] == [10] * 100
            assert {type(error) for error in outcomes[::2]} == {psycopg.errors.DivisionByZero}
            assert len(set(map(id, outcomes[::2]))) == 100, "an error object is one caller's"
        assert pool.stats().closes == {}


async def test_a_serialization_failure_can_simply_be_sent_again(dsn: str, admin: Admin, table: str, gate: Gate) -> None:
    """One that the server finds by itself: two sessions change the same row."""
    admin.execute(f"insert into {table} values (1)")
    update = f"update {table} set id = id + 1 where pg_advisory_xact_lock_shared(%s) is not null".encode()
    options = "-c default_transaction_isolation=repeatable\\ read"
    async with Pool(dsn, options=options, max_size=2) as pool:
        await pool.fetchval("select %s::int", [0])
        with gate.closed():
            updating = asyncio.create_task(pool.execute(update, [gate.key]))
            beside = [asyncio.create_task(pool.fetchval("select %s::int", [number])) for number in range(5)]
            await eventually(lambda: gate.waiting() == 1)
            admin.execute(f"update {table} set id = 10")
        with pytest.raises(psycopg.errors.SerializationFailure):
            await updating
        assert await asyncio.gather(*beside) == list(range(5))
        assert await pool.execute(update, [gate.key]) == "UPDATE 1"
    assert admin.execute(f"select id from {table}") == [(11,)]


async def test_the_servers_statement_timeout_ends_that_statement_only(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    # That of a role, a database or the server would do the same.
    async with Pool(dsn, options="-c statement_timeout=500", max_size=1, **way) as pool:
        await pool.fetchval("select %s::int", [0])
        await pool.execute(f"insert into {table} values (%s)".encode(), [0])
        error = await among_neighbours(pool, table, pool.execute("select pg_sleep(60)"))
        assert isinstance(error, psycopg.errors.QueryCanceled)
        assert "statement timeout" in str(error)
        assert pool.stats().closes == {}


async def test_what_the_deferred_constraint_refuses_is_not_acknowledged(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    """The server says INSERT before it commits: only the end of its transaction tells."""
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, **way) as pool:
        for turn in range(OFTEN):
            numbers = [turn * 10 + number for number in (1, 2, 2, 3, 1, 4)]
            outcomes = await asyncio.gather(*(pool.execute(insert, [n]) for n in numbers), return_exceptions=True)
            refused = [isinstance(outcome, psycopg.errors.UniqueViolation) for outcome in outcomes]
            assert [outcome == "INSERT 0 1" for outcome in outcomes] == [not was for was in refused]
            assert sum(refused) == 2
            assert admin.value(f"select count(*) from {table}") == (turn + 1) * 4


# --- psycopg's ----------------------------------------------------------------------------------------------


MISTAKEN: dict[str, Call] = {
    "no adapter": lambda pool: pool.fetch("select %s", [object()]),
    "too few": lambda pool: pool.fetch("select %s::int, %s", [1]),
    "too many": lambda pool: pool.fetch("select %s::int", [1, 2]),
    "no name": lambda pool: pool.fetch("select %(name)s", {}),
    "no such placeholder": lambda pool: pool.fetch("select %d", [1]),
    "no parameters": lambda pool: pool.fetch("select %s", "text"),
    "a zero byte": lambda pool: pool.fetch("select %s::text", ["\0"]),
    "no text": lambda pool: pool.fetch("select %s::text", ["\ud800"]),
    "a list of many kinds": lambda pool: pool.fetch("select %s", [[1, "a"]]),
    "no query": lambda pool: pool.fetch(cast(Any, None)),
}


@pytest.mark.parametrize("mistake", MISTAKEN)
async def test_what_psycopg_refuses_is_told_to_its_caller_and_never_sent(
    dsn: str, admin: Admin, table: str, mistake: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, **way) as pool:
        for error in await fails_alone(pool, admin, table, MISTAKEN[mistake]):
            assert isinstance(error, (psycopg.ProgrammingError, psycopg.DataError, TypeError, UnicodeError))


@on_both_loops
@pytest.mark.parametrize("mistake", MISTAKEN)
async def test_a_mistake_in_the_first_statement_on_a_connection_costs_nobody_the_connection(
    dsn: str, mistake: str
) -> None:
    """Nothing is to be waited for: the connection is back at once, and the same one."""
    async with Pool(dsn, min_size=1, max_size=1) as pool:
        for _ in range(3):
            with pytest.raises((psycopg.Error, TypeError, UnicodeError)):
                await MISTAKEN[mistake](pool)
            async with pool.acquire(timeout=20) as conn:
                await conn.execute("select 1")
        assert (pool.stats().connects, pool.stats().closes) == (1, {})


async def test_seventy_thousand_parameters_are_refused_and_the_connection_goes_on(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    """More than the protocol can count: libpq finds out when the statement is to be sent."""
    many = [1] * 70_000
    query = f"select 1 where 1 in ({', '.join(['%s'] * len(many))})".encode()
    async with Pool(dsn, **way) as pool:
        for _ in range(2):
            error = await among_neighbours(pool, table, pool.fetch(query, many))
            assert isinstance(error, (psycopg.ProgrammingError, psycopg.OperationalError))
            assert "65535" in str(error)
            admin.execute(f"delete from {table}")
        assert pool.stats().closes == {}


async def test_as_many_parameters_as_the_protocol_can_count_pass(dsn: str, way: dict[str, Any]) -> None:
    query = f"select {' + '.join(['%s::int'] * 1000)}".encode()
    array = f"select array_length(array[{', '.join(['%s'] * 65_535)}], 1)".encode()
    async with Pool(dsn, **way) as pool:
        for _ in range(3):
            assert await pool.fetchval(query, [2] * 1000) == 2000
        assert await pool.fetchval(array, [1] * 65_535) == 65_535


# --- the user's code ----------------------------------------------------------------------------------------


class Unadaptable:
    """Its dumper raises what it is made with."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class RaisingDumper(Dumper):
    def dump(self, obj: Unadaptable) -> bytes:
        raise obj.error


class RaisingLoader(Loader):
    def load(self, data: Any) -> Any:
        raise {b"7": LookupError, b"8": StopIteration}[bytes(data)]("mine")


async def register(conn: Connection) -> None:
    conn.adapters.register_dumper(Unadaptable, RaisingDumper)
    conn.adapters.register_loader("int2", RaisingLoader)


def raising_factory(error: type[BaseException]) -> Any:
    def factory(cursor: object) -> RowMaker[Any]:
        raise error("mine")

    return factory


def raising_maker(error: type[BaseException]) -> Any:
    def factory(cursor: object) -> RowMaker[Any]:
        def make(values: Sequence[Any]) -> Any:
            raise error("mine")

        return make

    return factory


def raising_in_the_midst(cursor: object) -> RowMaker[Any]:
    def make(values: Sequence[Any]) -> Any:
        if values[0] == 5000:
            raise LookupError("mine")
        return values

    return make


ROWS = "select n from generate_series(1, 10000) as n"
ONES_OWN: dict[str, Call] = {
    "factory": lambda pool: pool.fetch("select 1", row_factory=raising_factory(LookupError)),
    "factory of one row": lambda pool: pool.fetchrow("select 1", row_factory=raising_factory(LookupError)),
    "maker": lambda pool: pool.fetch("select 1", row_factory=raising_maker(LookupError)),
    "maker of one row": lambda pool: pool.fetchrow("select 1", row_factory=raising_maker(LookupError)),
    "maker in the midst": lambda pool: pool.fetch(ROWS, row_factory=raising_in_the_midst),
    "loader": lambda pool: pool.fetch("select 7::int2"),
    "loader of one row": lambda pool: pool.fetchrow("select 7::int2"),
    "loader of one value": lambda pool: pool.fetchval("select 7::int2"),
    "dumper": lambda pool: pool.fetch("select %s", [Unadaptable(LookupError("mine"))]),
}
# What neither a future nor a generator may raise.
STOPPING: dict[str, Call] = {
    "factory": lambda pool: pool.fetch("select 1", row_factory=raising_factory(StopIteration)),
    "maker": lambda pool: pool.fetch("select 1", row_factory=raising_maker(StopIteration)),
    "loader": lambda pool: pool.fetch("select 8::int2"),
    "dumper": lambda pool: pool.fetch("select %s", [Unadaptable(StopIteration("mine"))]),
}


@pytest.mark.parametrize("place", ONES_OWN)
async def test_what_the_users_code_raises_is_its_callers(
    dsn: str, admin: Admin, table: str, place: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, configure=register, **way) as pool:
        for error in await fails_alone(pool, admin, table, ONES_OWN[place]):
            assert isinstance(error, LookupError)
            assert str(error) == "mine"


@pytest.mark.parametrize("place", STOPPING)
async def test_a_stop_iteration_of_the_users_code_is_its_callers_in_some_form(
    dsn: str, admin: Admin, table: str, place: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, configure=register, **way) as pool:
        for error in await fails_alone(pool, admin, table, STOPPING[place]):
            assert isinstance(error, (RuntimeError, StopIteration))


async def test_a_row_that_fits_no_object_is_its_callers_error(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, row_factory=class_row(Reading), **way) as pool:
        for error in await fails_alone(pool, admin, table, lambda pool: pool.fetch("select 1 as no_field")):
            assert isinstance(error, TypeError)


async def test_a_value_that_python_does_not_have_is_its_callers_error(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, **way) as pool:
        for error in await fails_alone(pool, admin, table, lambda pool: pool.fetch("select 'infinity'::date")):
            assert isinstance(error, psycopg.DataError)
            assert "date too large" in str(error)


async def test_the_statement_was_executed_though_its_rows_could_not_be_made(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    insert = f"insert into {table} values (%s) returning id".encode()
    async with Pool(dsn, **way) as pool:
        with pytest.raises(LookupError, match="mine"):
            await pool.fetch(insert, [1], row_factory=raising_maker(LookupError))
    assert admin.execute(f"select id from {table}") == [(1,)]


async def test_a_dumper_that_uses_the_pool_itself_finds_it_in_order(dsn: str, way: dict[str, Any]) -> None:
    """Whatever a dumper does, it does it in the midst of a send."""
    tasks: list[asyncio.Task[Any]] = []

    class Asking(Dumper):
        def dump(self, obj: Asked) -> bytes:
            tasks.append(asyncio.ensure_future(pool.fetchval("select 'asked'")))
            return b"asking"

    class Asked:
        """Of a type of its own."""

    async def configure(conn: Connection) -> None:
        conn.adapters.register_dumper(Asked, Asking)

    async with Pool(dsn, configure=configure, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetchval("select %s::text", [Asked()]) == "asking"
        assert await asyncio.gather(*tasks) == ["asked"] * OFTEN


async def test_a_row_maker_that_uses_the_pool_itself_finds_it_in_order(dsn: str, way: dict[str, Any]) -> None:
    tasks: list[asyncio.Task[Any]] = []

    def asking(cursor: object) -> Any:
        def make(values: Sequence[Any]) -> Any:
            tasks.append(asyncio.ensure_future(pool.fetchval("select %s::int", [len(tasks)])))
            return values

        return make

    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch("select generate_series(1, 10)", row_factory=asking)
        assert await asyncio.gather(*tasks) == list(range(10 * OFTEN))


async def test_an_error_of_an_insert_leaves_nothing_behind(
    dsn: str, admin: Admin, table: str, gate: Gate, way: dict[str, Any]
) -> None:
    """One of several rows: that the first were fine does not matter."""
    insert = f"insert into {table} {INSERTED} union all select 1 / %s".encode()
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            with pytest.raises(psycopg.errors.DivisionByZero):
                await pool.execute(insert, [5, gate.key, 0])
    assert admin.value(f"select count(*) from {table}") == 0
