"""What is prepared on a session: by psycopg's threshold and bound, and again when the server has dropped or refused it.

A connection's leases and one-shot statements share what is prepared on it: a text is prepared once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from psycopg.rows import dict_row, tuple_row

from asyncpool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]

# One session, so that a lease looks at that of the lane.
ONE: dict[str, Any] = {"min_size": 1, "max_size": 1, "lanes": 1}

# More often than psycopg's `prepare_threshold`, which is 5.
OFTEN = 8

PREPARED = "select name, statement from pg_prepared_statements order by prepare_time, name"

pytestmark = pytest.mark.usefixtures("nothing_is_slow")


async def prepared(pool: Pool[Any]) -> list[str]:
    """The texts that are prepared on the pool's only session, in the order of that."""
    async with pool.acquire() as conn:
        cursor = conn.cursor(row_factory=tuple_row)
        await cursor.execute(
            "select 'looking'", prepare=False
        )  # what is one too many is deallocated with the next statement
        await cursor.execute(PREPARED, prepare=False)
        rows = await cursor.fetchall()
    return [statement for _, statement in rows]


def with_prepared_max(count: int | None) -> Any:
    async def configure(conn: Connection) -> None:
        conn.prepared_max = count

    return configure


# --- when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1, 2, 5])
async def test_a_statement_is_prepared_when_it_was_executed_as_often_as_the_threshold(dsn: str, threshold: int) -> None:
    async with Pool(dsn, prepare_threshold=threshold, **ONE) as pool:
        for number in range(threshold):
            assert await pool.fetchval("select %s::int", [number]) == number
            assert await prepared(pool) == []
        for number in range(3):
            assert await pool.fetchval("select %s::int", [number]) == number
            assert await prepared(pool) == ["select $1::int"]


async def test_the_threshold_is_psycopgs_own_by_default(dsn: str, plain: Connection) -> None:
    assert plain.prepare_threshold == 5
    async with Pool(dsn, **ONE) as pool:
        for times in range(1, 8):
            await pool.fetch("select 1")
            assert await prepared(pool) == (["select 1"] if times > 5 else [])


@on_both_loops
async def test_without_a_threshold_nothing_is_prepared(dsn: str) -> None:
    async with Pool(dsn, prepare_threshold=None, **ONE) as pool:
        for _ in range(OFTEN):
            numbers = await asyncio.gather(*(pool.fetchval("select %s", [number]) for number in range(20)))
            assert numbers == list(range(20))
            assert await pool.fetchval("select 'the same'") == "the same"
            with pytest.raises(psycopg.errors.DivisionByZero):
                await pool.fetch("select 1/0")
        # The session's own word, without the help of our names.
        assert await pool.fetch("select name from pg_prepared_statements") == []


async def test_statements_in_flight_together_are_prepared_once(dsn: str) -> None:
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        await pool.fetchval("select 'known'")
        for _ in range(3):
            numbers = await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(100)))
            assert numbers == list(range(100))
        assert sorted(await prepared(pool)) == ["select $1::int", "select 'known'"]


async def test_each_kind_of_parameters_is_prepared_by_itself(dsn: str) -> None:
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for _ in range(3):
            for value in (1, 100_000, 10**12, 10**30, "text"):
                assert await pool.fetchval("select %s", [value]) == value
        assert await prepared(pool) == ["select $1"] * 5


async def test_a_statement_that_the_server_refused_leaves_nothing_prepared_that_would_be_believed(dsn: str) -> None:
    """Whether its Parse failed or only its execution: the next ones get what is theirs."""
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for _ in range(3):
            outcomes = await asyncio.gather(
                *(
                    pool.fetchval(text, [0])
                    for text in ("select 1 / %s", "selec %s", "select %s::no_type")
                    for _ in "ab"
                ),
                return_exceptions=True,
            )
            assert [type(error) for error in outcomes] == [
                psycopg.errors.DivisionByZero,
                psycopg.errors.DivisionByZero,
                psycopg.errors.SyntaxError,
                psycopg.errors.SyntaxError,
                psycopg.errors.UndefinedObject,
                psycopg.errors.UndefinedObject,
            ]
        assert await pool.fetchval("select 1 / %s", [1]) == 1
        assert set(await prepared(pool)) <= {"select 1 / $1"}


async def test_a_statement_that_could_not_be_parsed_at_first_can_be_later(dsn: str, table: str) -> None:
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for _ in range(3):
            with pytest.raises(psycopg.errors.UndefinedTable):
                await pool.fetch(f"select * from {table}_later".encode())
        await pool.execute(f"create table {table}_later as select 1 as one".encode())
        try:
            for _ in range(3):
                assert await pool.fetch(f"select * from {table}_later".encode()) == [(1,)]
        finally:
            await pool.execute(f"drop table {table}_later".encode())
        with pytest.raises(psycopg.errors.UndefinedTable):
            await pool.fetch(f"select * from {table}_later".encode())


# --- how many -----------------------------------------------------------------------------------------------


async def test_no_more_are_kept_than_prepared_max_and_those_go_that_were_used_last_the_longest_ago(
    dsn: str,
) -> None:
    async with Pool(dsn, prepare_threshold=0, configure=with_prepared_max(3), **ONE) as pool:
        for name in "abc":
            await pool.fetch(f"select '{name}'".encode())
        assert sorted(await prepared(pool)) == ["select 'a'", "select 'b'", "select 'c'"]
        await pool.fetch("select 'a'")
        await pool.fetch("select 'd'")
        assert sorted(await prepared(pool)) == ["select 'a'", "select 'c'", "select 'd'"]
        await pool.fetch("select 'c'")
        await pool.fetch("select 'e'")
        await pool.fetch("select 'b'")  # again
        assert sorted(await prepared(pool)) == ["select 'b'", "select 'c'", "select 'e'"]


@on_both_loops
async def test_the_bound_holds_for_many_texts_in_flight_together(dsn: str) -> None:
    async with Pool(dsn, prepare_threshold=0, configure=with_prepared_max(5), **ONE) as pool:
        for _ in range(5):
            calls = [pool.fetchval(f"select %s::int + {number % 40}".encode(), [number]) for number in range(400)]
            assert await asyncio.gather(*calls) == [number + number % 40 for number in range(400)]
            assert len(await prepared(pool)) <= 5


async def test_texts_without_end_leave_no_more_behind_than_the_bound(dsn: str) -> None:
    """A text of its own for each statement is what careless code does: neither side may keep them all."""
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for number in range(500):
            assert await pool.fetchval(f"select {number}".encode()) == number
        texts = await prepared(pool)
        assert len(texts) <= 100  # psycopg's `prepared_max`
        assert "select 499" in texts
        assert "select 0" not in texts


@on_both_loops
async def test_what_one_has_prepared_is_the_others_too(dsn: str) -> None:
    """A lease and a one-shot statement in turn, in flight with others or not, never meet a name that is taken."""
    async with Pool(dsn, prepare_threshold=1, configure=with_prepared_max(2), **ONE) as pool:
        for number in range(40):
            text = f"select %s::int + {number % 4 // 2 * 10}".encode()
            assert await pool.fetchval(text, [number]) == number + number % 4 // 2 * 10
            async with pool.acquire() as conn:
                cursor = await conn.execute(text, [number])
                assert await cursor.fetchone() == (number + number % 4 // 2 * 10,)
            texts = [f"select %s::int + {other}".encode() for other in range(number % 6)]
            numbers = await asyncio.gather(*(pool.fetchval(text, [number]) for text in texts * 2))
            assert numbers == [number + other for other in range(number % 6)] * 2
            assert len(await prepared(pool)) <= 2
    async with Pool(dsn, prepare_threshold=1, **ONE) as pool:
        await pool.fetchval("select %s::int", [1])
        async with pool.acquire() as conn:
            await conn.execute("select %s::int", [2])
        await pool.fetchval("select %s::int", [3])
        assert await prepared(pool) == ["select $1::int"]


async def test_a_lease_whose_transaction_fails_and_a_dropped_object_forget_nothing_that_is_there(
    dsn: str, table: str
) -> None:
    """Psycopg deallocates all it has prepared when it sees a ROLLBACK, a DROP or an ALTER: lanes go along with it."""
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for number in range(6):
            assert await pool.fetchval("select %s::int", [number]) == number
            await pool.execute(f"create table {table}_more as select 1 as one".encode())
            assert await pool.fetch(f"select * from {table}_more".encode()) == [(1,)]
            if number % 2:
                await pool.execute(f"drop table {table}_more".encode())
            else:
                async with pool.acquire() as conn:
                    await conn.execute(f"drop table {table}_more".encode())
                    await conn.commit()
                    await conn.execute("select %s::int", [number])
                    await conn.rollback()
            assert await pool.fetchval("select %s::int", [number]) == number


# --- the server no longer has it, or no longer wants it -----------------------------------------------------


@on_both_loops
async def test_a_table_that_was_changed_is_seen_as_it_is_now(dsn: str, table: str, admin: Admin) -> None:
    """The server refuses the plan that it has: 0A000, "cached plan must not change result type"."""
    select = f"select * from {table}".encode()
    admin.execute(f"insert into {table} values (1)")
    async with Pool(dsn, prepare_threshold=0, row_factory=dict_row, **ONE) as pool:
        expected: dict[str, Any] = {"id": 1}
        for number in range(5):
            assert await pool.fetch(select) == [expected]
            assert await prepared(pool) != []
            admin.execute(f"alter table {table} add column c{number} text default 'new'")
            expected |= {f"c{number}": "new"}
            rows = await asyncio.gather(*(pool.fetchrow(select) for _ in range(50)))
            assert rows == [expected] * 50
            assert select.decode() in await prepared(pool)
        assert pool.stats().closes == {}


async def test_a_column_that_changed_its_type_is_seen_as_it_is_now(dsn: str, table: str, admin: Admin) -> None:
    select = f"select id from {table} where id = %s".encode()
    admin.execute(f"insert into {table} values (1)")
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for type_name, expected in (("bigint", 1), ("float8", 1.0), ("int", 1)):
            assert await pool.fetchval(select, [1]) == 1
            admin.execute(f"alter table {table} alter column id type {type_name}")
            values = await asyncio.gather(*(pool.fetchval(select, [1], binary=binary) for binary in (False, True)))
            assert [repr(value) for value in values] == [repr(expected)] * 2


async def test_what_is_prepared_again_was_not_executed_before(dsn: str, table: str, admin: Admin) -> None:
    """An INSERT whose result has changed is refused before it does anything, and happens once."""
    insert = f"insert into {table} (id) values (%s) returning *".encode()
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for turn in range(4):
            numbers = range(turn * 100, turn * 100 + 50)
            rows = await asyncio.gather(*(pool.fetchrow(insert, [number]) for number in numbers))
            assert rows == [(number, *range(turn)) for number in numbers]
            admin.execute(f"alter table {table} add column c{turn} int default {turn}")
    assert admin.value(f"select count(*) from {table}") == 200


@on_both_loops
@pytest.mark.parametrize("command", ["deallocate all", "discard all", "discard plans", "deallocate by name"])
async def test_what_the_user_of_a_lease_deallocates_is_prepared_again(
    dsn: str, table: str, admin: Admin, command: str
) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, prepare_threshold=0, autocommit=True, **ONE) as pool:
        for turn in range(4):
            numbers = range(turn * 100, turn * 100 + 50)
            statuses = await asyncio.gather(*(pool.execute(insert, [number]) for number in numbers))
            assert statuses == ["INSERT 0 1"] * 50
            assert await pool.fetchval("select 'another'") == "another"
            async with pool.acquire() as conn:
                if command == "deallocate by name":
                    cursor = await conn.execute(PREPARED, prepare=False)
                    for name, _ in await cursor.fetchall():
                        await conn.execute(f"deallocate {name}".encode(), prepare=False)
                else:
                    await conn.execute(command.encode(), prepare=False)
        assert pool.stats().connects == 1
    assert admin.value(f"select count(*) from {table}") == 200


@on_both_loops
@pytest.mark.parametrize("reset", ["session", "discard"])
async def test_a_reset_that_deallocates_harms_nothing(dsn: str, reset: Any) -> None:
    async with Pool(dsn, prepare_threshold=0, reset=reset, **ONE) as pool:
        for number in range(20):
            assert await pool.fetchval("select %s::int", [number]) == number
            assert await asyncio.gather(*(pool.fetchval("select %s", [n]) for n in range(20))) == list(range(20))
            async with pool.acquire() as conn:
                await conn.execute("select 1")
        assert pool.stats().closes == {}


@pytest.fixture
def counting(admin: Admin, table: str) -> Iterator[str]:
    """The name of a sequence, which counts executions: it is not rolled back."""
    admin.execute(f"create sequence {table}_executions")
    yield f"{table}_executions"
    admin.execute(f"drop sequence {table}_executions")


ERRCODES = {"feature_not_supported": psycopg.errors.FeatureNotSupported}
ERRCODES |= {"invalid_sql_statement_name": psycopg.errors.InvalidSqlStatementName}  # type: ignore[dict-item]


@pytest.mark.parametrize("threshold", [0, None])
@pytest.mark.parametrize("errcode", ERRCODES)
@pytest.mark.parametrize("message", ["mine", "cached plan must not change result type"])
async def test_the_same_errors_of_ones_own_are_told_and_what_raised_them_is_executed_once(
    dsn: str, admin: Admin, counting: str, errcode: str, threshold: int | None, message: str
) -> None:
    """Only what the server says of our own prepared statement means that it did nothing."""
    statement = (
        f"do $$ begin perform nextval('{counting}');"
        f" raise exception using errcode = '{errcode}', message = '{message}'; end $$"
    ).encode()
    async with Pool(dsn, prepare_threshold=threshold, **ONE) as pool:
        for number in range(1, 4):
            with pytest.raises(ERRCODES[errcode], match=message):
                await pool.execute(statement)
            assert admin.value(f"select last_value from {counting}") == number
        assert await pool.fetchval("select 1") == 1


async def test_a_statement_of_the_users_own_that_is_not_there_is_told(dsn: str, counting: str, admin: Admin) -> None:
    """EXECUTE in a function asks for a prepared statement of the user's, not for one of ours."""
    statement = f"do $$ begin perform nextval('{counting}'); execute 'execute not_there'; end $$".encode()
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for number in range(1, 4):
            with pytest.raises(psycopg.errors.InvalidSqlStatementName, match="not_there"):
                await pool.execute(statement)
            assert admin.value(f"select last_value from {counting}") == number


async def test_a_feature_that_is_not_supported_is_told(dsn: str, table: str) -> None:
    async with Pool(dsn, prepare_threshold=0, **ONE) as pool:
        for _ in range(3):
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                await pool.execute(f"select distinct id from {table} for update".encode())
        assert await pool.fetchval("select 1") == 1


async def test_several_sessions_prepare_each_for_itself(dsn: str) -> None:
    async with Pool(dsn, prepare_threshold=1, min_size=3, max_size=3, lanes=3) as pool:
        for _ in range(10):
            numbers = await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(500)))
            assert numbers == list(range(500))
        pool.drain()
        for number in range(10):
            assert await pool.fetchval("select %s::int", [number]) == number
