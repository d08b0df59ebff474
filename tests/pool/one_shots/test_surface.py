"""What execute, fetch, fetchrow, fetchval and executemany give back, whichever way a statement goes."""

from __future__ import annotations

import asyncio
import inspect
import threading
import warnings
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually
from psycopg.rows import class_row, dict_row

from asyncpool import Pool, PoolClosed, WrongLoop

from .readings import Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from kit.servers import Admin

SENDERS = ["execute", "fetch", "fetchrow", "fetchval"]
each_sender = pytest.mark.parametrize("sender", SENDERS)

# More often than psycopg's `prepare_threshold`: first as they are, then prepared.
OFTEN = 8


# --- what comes back ----------------------------------------------------------------------------------------


async def test_execute_returns_the_status_message(dsn: str, table: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.execute(f"insert into {table} values (1), (2)".encode()) == "INSERT 0 2"
            assert await pool.execute(f"update {table} set id = id + %s".encode(), [10]) == "UPDATE 2"
            assert await pool.execute(f"select * from {table}".encode()) == "SELECT 2"
            assert await pool.execute(f"select * from {table} where id < %s".encode(), [0]) == "SELECT 0"
            assert await pool.execute(f"delete from {table} where id = %s".encode(), [0]) == "DELETE 0"
            assert await pool.execute(f"delete from {table}".encode()) == "DELETE 2"
        assert await pool.execute("do $$ begin end $$") == "DO"
        assert await pool.execute(f"create index on {table} (id)".encode()) == "CREATE INDEX"
        assert await pool.execute("show server_version") == "SHOW"


async def test_fetch_returns_all_rows_fetchrow_the_first_and_fetchval_its_first_column(
    dsn: str, way: dict[str, Any]
) -> None:
    query = "select n, n * 10 from generate_series(1, %s) as n"
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch(query, [3]) == [(1, 10), (2, 20), (3, 30)]
            assert await pool.fetchrow(query, [3]) == (1, 10)
            assert await pool.fetchval(query, [3]) == 1


async def test_without_rows_it_is_an_empty_list_or_none(dsn: str, way: dict[str, Any]) -> None:
    query = "select n from generate_series(1, %s) as n"
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch(query, [0]) == []
            assert await pool.fetchrow(query, [0]) is None
            assert await pool.fetchval(query, [0]) is None


async def test_a_statement_that_has_no_rows_gives_an_empty_list_or_none(
    dsn: str, table: str, admin: Admin, way: dict[str, Any]
) -> None:
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, **way) as pool:
        assert await pool.fetch(insert, [1]) == []
        assert await pool.fetchrow(insert, [2]) is None
        assert await pool.fetchval(insert, [3]) is None
        assert await pool.fetch(insert, [4], row_factory=dict_row) == []
        assert await pool.fetchrow(insert, [5], row_factory=class_row(Reading)) is None
    assert admin.execute(f"select id from {table} order by id") == [(1,), (2,), (3,), (4,), (5,)]


async def test_what_a_writing_statement_returns_is_fetched(dsn: str, table: str, way: dict[str, Any]) -> None:
    insert = f"insert into {table} values (%s), (%s) returning id, id * 2".encode()
    async with Pool(dsn, **way) as pool:
        assert await pool.fetch(insert, [1, 2]) == [(1, 2), (2, 4)]
        assert await pool.fetchrow(insert, [3, 4]) == (3, 6)
        assert await pool.fetchval(insert, [5, 6]) == 5
        assert await pool.execute(insert, [7, 8]) == "INSERT 0 2"


async def test_nulls_are_none(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.fetch("select null, null::int, %s::int", [None]) == [(None, None, None)]
            assert await pool.fetchval("select %s::text", [None]) is None
            assert await pool.fetchrow("select %s", [None]) == (None,)


async def test_rows_may_have_no_columns(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        assert await pool.fetch("select from generate_series(1, 3)") == [(), (), ()]
        assert await pool.fetchrow("select") == ()
        assert await pool.execute("select from generate_series(1, 3)") == "SELECT 3"


@pytest.mark.parametrize("query", ["", ";", " \n", "-- nothing", "/* nothing */"])
async def test_an_empty_query_is_executed_as_by_psycopg_and_gives_nothing(
    dsn: str, query: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(OFTEN):
            assert await pool.execute(query.encode()) == ""
            assert await pool.fetch(query.encode()) == []
            assert await pool.fetchrow(query.encode()) is None
            assert await pool.fetchval(query.encode()) is None
            assert await pool.fetchval("select 1") == 1


async def test_a_row_has_as_many_columns_as_the_server_allows(dsn: str, way: dict[str, Any]) -> None:
    columns = ", ".join(str(number) for number in range(1600))
    async with Pool(dsn, **way) as pool:
        assert await pool.fetchrow(f"select {columns}".encode()) == tuple(range(1600))


@on_both_loops
async def test_a_result_of_many_rows_is_complete_and_in_order(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        rows = await pool.fetch("select n, repeat('x', n %% 100) from generate_series(1, %s) as n", [100_000])
        assert rows == [(n, "x" * (n % 100)) for n in range(1, 100_001)]
        assert await pool.execute("select n from generate_series(1, 100000) as n") == "SELECT 100000"
        assert await pool.fetchval("select 'and on'") == "and on"


@on_both_loops
async def test_great_parameters_and_great_values_pass(dsn: str, way: dict[str, Any]) -> None:
    text, data = "é" * 3_000_000, bytes(range(256)) * 20_000
    async with Pool(dsn, **way) as pool:
        calls = [
            pool.fetchval("select %s::text", [text]),
            pool.fetchval("select %s::int", [1]),
            pool.fetchval("select %s::bytea", [data]),
            pool.fetchval("select %s::bytea", [data[1:]]),
            pool.fetchval("select %s::int", [2]),
        ]
        assert await asyncio.gather(*calls) == [text, 1, data, data[1:], 2]


# --- an implicit transaction of its own ---------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [False, True])
async def test_what_was_acknowledged_is_committed(
    dsn: str, table: str, admin: Admin, autocommit: bool, way: dict[str, Any]
) -> None:
    async with Pool(dsn, autocommit=autocommit, **way) as pool:
        for number in range(OFTEN):
            await pool.execute(f"insert into {table} values (%s)".encode(), [number])
            assert admin.value(f"select count(*) from {table}") == number + 1


async def test_what_cannot_run_inside_a_transaction_can_be_executed(
    dsn: str, table: str, admin: Admin, way: dict[str, Any]
) -> None:
    admin.execute(f"create procedure {table}_twice() language plpgsql as $$ begin commit; rollback; end $$")
    try:
        async with Pool(dsn, **way) as pool:
            for _ in range(OFTEN):
                commands = [f"vacuum {table}", f"call {table}_twice()", f"vacuum {table}"]
                outcomes = await asyncio.gather(*(pool.execute(command.encode()) for command in commands))
                assert outcomes == ["VACUUM", "CALL", "VACUUM"]
            query = f"create index concurrently on {table} (id)".encode()
            assert await pool.execute(query) == "CREATE INDEX"
    finally:
        admin.execute(f"drop procedure {table}_twice()")


async def test_a_connection_is_back_when_its_statements_are_answered_and_in_no_transaction(
    dsn: str, admin: Admin, application_name: str, way: dict[str, Any]
) -> None:
    async with Pool(dsn, **way) as pool:
        await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(100)))
        await eventually(lambda: pool.stats().leased == 0)
        await eventually(lambda: set(admin.states(application_name)) == {"idle"})
        async with pool.acquire() as conn:
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert conn.pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF
            cursor = await conn.execute("select 'a lease'")
            assert await cursor.fetchone() == ("a lease",)


async def test_the_client_settings_of_a_lease_after_it_are_those_of_the_pool(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, max_size=1, row_factory=dict_row, **way) as pool:
        await pool.fetchval("select 1")
        async with pool.acquire() as conn:
            assert conn.row_factory is dict_row
            assert not conn.autocommit
            await conn.execute("select 1")
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


# --- many at once -------------------------------------------------------------------------------------------


@on_both_loops
async def test_everybody_gets_the_answer_to_his_own_statement(dsn: str, way: dict[str, Any]) -> None:
    """Texts, types, factories and kinds of results are mixed, so that an answer of another would be seen."""

    async def ask(token: int) -> None:
        name = f"c{token % 37}"
        text = f"select %s::int as {name}, %s::text as {name}_text".encode()
        params = [token, f"token {token}"]
        match token % 5:
            case 0:
                assert await pool.fetch(text, params) == [(token, f"token {token}")]
            case 1:
                row = await pool.fetchrow(text, params, row_factory=dict_row)
                assert row == {name: token, f"{name}_text": f"token {token}"}
            case 2:
                assert await pool.fetchval(text, params, binary=True) == token
            case 3:
                count = token % 11
                status = await pool.execute("select %s from generate_series(1, %s)", [token, count])
                assert status == f"SELECT {count}"
            case _:
                with pytest.raises(psycopg.errors.RaiseException, match=f"token {token}"):
                    await pool.execute(f"do $$ begin raise exception 'token {token}'; end $$".encode())

    async with Pool(dsn, max_size=3, **way) as pool:
        await asyncio.gather(*map(ask, range(1500)))
        assert pool.stats().closes == {}


# --- the calls ----------------------------------------------------------------------------------------------


@each_sender
async def test_each_is_a_coroutine_that_sends_nothing_before_it_is_awaited(dsn: str, sender: str, table: str) -> None:
    async with Pool(dsn, min_size=0) as pool:
        call: Coroutine[Any, Any, Any] = getattr(pool, sender)(f"insert into {table} values (1)".encode())
        assert inspect.iscoroutine(call)
        with warnings.catch_warnings(action="ignore"):  # that it was never awaited
            call.close()
            del call
        await asyncio.sleep(0)
        assert pool.stats().connects == pool.stats().connecting == pool.stats().waiting == 0
        assert await pool.fetchval(f"select count(*) from {table}".encode()) == 0


@each_sender
async def test_a_pool_that_is_not_open_says_how_to_open_it(dsn: str, sender: str) -> None:
    pool = Pool(dsn)
    for _ in range(2):
        with pytest.raises(PoolClosed, match=r"not open|closed"):
            await getattr(pool, sender)("select 1")
        with pytest.raises(PoolClosed):
            await pool.executemany("select %s", [(1,)])
        async with pool:
            await getattr(pool, sender)("select 1")


async def test_a_pool_that_was_closed_and_opened_again_in_another_loop_goes_on(dsn: str) -> None:
    pool = Pool(dsn)

    async def use() -> list[Any]:
        async with pool:
            return await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(20)))

    assert await use() == list(range(20))
    assert await asyncio.to_thread(asyncio.run, use()) == list(range(20))
    assert await use() == list(range(20))


@each_sender
async def test_in_another_event_loop_it_is_refused(dsn: str, sender: str) -> None:
    async with Pool(dsn) as pool:
        refused: list[BaseException] = []

        async def use() -> None:
            try:
                await getattr(pool, sender)("select 1")
            except WrongLoop as error:
                refused.append(error)

        thread = threading.Thread(target=asyncio.run, args=[use()])
        thread.start()
        await asyncio.to_thread(thread.join)
        assert len(refused) == 1
        assert await pool.fetchval("select 1") == 1


@each_sender
@pytest.mark.parametrize("timeout", [-1, 0, float("nan"), float("inf"), True, "1"])
async def test_an_impossible_timeout_is_refused_and_nothing_is_sent(
    dsn: str, sender: str, timeout: Any, table: str
) -> None:
    async with Pool(dsn) as pool:
        with pytest.raises((ValueError, TypeError), match="timeout"):
            await getattr(pool, sender)(f"insert into {table} values (1)".encode(), timeout=timeout)
        assert await pool.fetchval(f"select count(*) from {table}".encode()) == 0


@each_sender
async def test_a_timeout_that_is_long_enough_changes_nothing(dsn: str, sender: str) -> None:
    async with Pool(dsn) as pool:
        for timeout in (100, 100.0, None):
            await getattr(pool, sender)("select %s::int", [1], timeout=timeout)


async def test_statistics_count_the_statements_that_were_answered(dsn: str) -> None:
    async with Pool(dsn) as pool:
        assert pool.stats().one_shots == 0
        for _ in range(3):
            await pool.fetch("select 1")
        assert pool.stats().one_shots == 3
        with pytest.raises(psycopg.errors.DivisionByZero):
            await pool.execute("select 1/0")
        assert pool.stats().one_shots == 4
        with pytest.raises(psycopg.ProgrammingError):
            await pool.execute("select %s", [object()])
        with pytest.raises(psycopg.ProgrammingError):
            await pool.execute("begin")
        assert pool.stats().one_shots == 4
        await asyncio.gather(*(pool.execute("select 1") for _ in range(50)))
        assert pool.stats().one_shots == 54


# --- executemany --------------------------------------------------------------------------------------------


def one_to(count: int) -> Iterator[tuple[int]]:
    for number in range(1, count + 1):
        yield (number,)


MANY: list[Callable[[], Any]] = [lambda: one_to(10), lambda: list(one_to(10)), lambda: tuple(one_to(10))]


@pytest.mark.parametrize("parameters", MANY, ids=["an iterator", "a list", "a tuple"])
@pytest.mark.parametrize("autocommit", [False, True])
async def test_executemany_returns_how_many_rows_were_affected(
    dsn: str, table: str, admin: Admin, autocommit: bool, parameters: Callable[[], Any]
) -> None:
    async with Pool(dsn, autocommit=autocommit) as pool:
        insert = f"insert into {table} select %s * 100 + generate_series(1, 3)".encode()
        assert await pool.executemany(insert, parameters()) == 30
        assert admin.value(f"select count(*) from {table}") == 30
        assert await pool.executemany(f"delete from {table} where id / 100 = %s".encode(), [(1,), (9,), (77,)]) == 6
        assert admin.value(f"select count(*) from {table}") == 24
        assert pool.stats().leased == 0


async def test_executemany_takes_names_as_well(dsn: str, table: str, admin: Admin) -> None:
    async with Pool(dsn) as pool:
        insert = f"insert into {table} values (%(id)s)".encode()
        assert await pool.executemany(insert, [{"id": 1}, {"id": 2, "more": 3}]) == 2
    assert admin.execute(f"select id from {table} order by id") == [(1,), (2,)]


async def test_executemany_of_nothing_affects_no_rows(dsn: str, table: str) -> None:
    async with Pool(dsn) as pool:
        assert await pool.executemany(f"insert into {table} values (%s)".encode(), []) == 0


@pytest.mark.parametrize("autocommit", [False, True])
async def test_executemany_does_all_or_nothing(dsn: str, table: str, admin: Admin, autocommit: bool) -> None:
    async with Pool(dsn, autocommit=autocommit) as pool:
        insert = f"insert into {table} select 1 / %s".encode()
        with pytest.raises(psycopg.errors.DivisionByZero):
            await pool.executemany(insert, [(1,)] * 100 + [(0,)] + [(1,)] * 100)
        assert admin.value(f"select count(*) from {table}") == 0
        with pytest.raises(psycopg.errors.UniqueViolation):  # at the COMMIT
            await pool.executemany(f"insert into {table} values (%s)".encode(), [(1,), (2,), (1,)])
        assert admin.value(f"select count(*) from {table}") == 0
        with pytest.raises(psycopg.ProgrammingError):
            await pool.executemany(f"insert into {table} values (%s)".encode(), [(1,), (object(),)])
        assert admin.value(f"select count(*) from {table}") == 0
        assert pool.stats().leased == 0
        assert pool.stats().closes == {}


async def test_executemany_sees_its_iterator_fail_and_does_nothing(dsn: str, table: str, admin: Admin) -> None:
    def failing() -> Iterator[tuple[int]]:
        yield (1,)
        raise LookupError("mine")

    async with Pool(dsn) as pool:
        with pytest.raises(LookupError, match="mine"):
            await pool.executemany(f"insert into {table} values (%s)".encode(), failing())
        assert await pool.fetchval("select 1") == 1
    assert admin.value(f"select count(*) from {table}") == 0
