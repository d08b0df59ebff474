"""`reset="session"` and `"discard"`: nothing that a user did to the session reaches the next one."""

from __future__ import annotations

from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually

from asyncpool import Pool

from .client_state import Connection, first_value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin

each_mode = pytest.mark.parametrize("mode", ["session", "discard"])

# A role that may log in nowhere and do next to nothing: the reset must not depend on the rights of a user's role.
ROLE = "asyncpool_test_powerless"


@pytest.fixture(autouse=True)
def powerless_role(admin: Admin) -> Iterator[None]:
    if admin.value("select not rolsuper from pg_roles where rolname = current_user"):
        pytest.skip("needs a superuser, to create roles and to become them")
    admin.execute(f"drop role if exists {ROLE}")
    admin.execute(f"create role {ROLE}")
    yield
    admin.execute(f"drop role {ROLE}")


@dataclass(frozen=True)
class SessionState:
    """What a statement does to a session, and a query that sees it."""

    name: str
    statement: str
    query: str

    def __str__(self) -> str:
        return self.name


STATES = [
    SessionState("role", f"set role {ROLE}", "select current_user::text"),
    SessionState("session authorization", f"set session authorization {ROLE}", "select session_user::text"),
    SessionState("parameter", "set work_mem = '77MB'", "show work_mem"),
    SessionState("own parameter", "set mine.own = 'x'", "select coalesce(current_setting('mine.own', true), '')"),
    SessionState("search_path", "set search_path = pg_catalog", "show search_path"),
    SessionState("time zone", "set timezone = 'Asia/Kathmandu'", "show timezone"),
    SessionState("client encoding", "set client_encoding = 'LATIN1'", "show client_encoding"),
    SessionState("statement_timeout", "set statement_timeout = '77s'", "show statement_timeout"),
    SessionState("read only", "set default_transaction_read_only = on", "show transaction_read_only"),
    SessionState("isolation", "set default_transaction_isolation = 'serializable'", "show transaction_isolation"),
    SessionState("listen", "listen here", "select count(*) from pg_listening_channels()"),
    SessionState(
        "advisory lock",
        "select pg_advisory_lock(4711), pg_advisory_lock(4711), pg_advisory_lock_shared(4712)",
        "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
    ),
    SessionState("temp table", "create temp table own (id int)", "select count(*) from pg_class where relname = 'own'"),
    SessionState(
        "cursor with hold",
        "declare own cursor with hold for select generate_series(1, 1000)",
        "select count(*) from pg_cursors where name = 'own'",
    ),
    SessionState(
        "prepared statement",
        "prepare own as select 1",
        "select count(*) from pg_prepared_statements where name = 'own'",
    ),
]


async def look(pool: Pool[Connection], state: SessionState) -> Any:
    async with pool.acquire() as conn:
        return await first_value(conn, state.query)


@each_mode
@pytest.mark.parametrize("state", STATES, ids=str)
async def test_what_was_done_to_the_session_is_undone(dsn: str, mode: Any, state: SessionState) -> None:
    async with Pool(dsn, max_size=1, reset=mode) as pool:
        before = await look(pool, state)
        async with pool.acquire() as conn:
            await conn.execute(state.statement.encode())
            await conn.commit()
            assert await first_value(conn, state.query) != before, "the statement itself"
        assert await look(pool, state) == before
        assert pool.stats().connects == 1


@each_mode
async def test_everything_at_once_is_undone_after_a_block_that_failed(dsn: str, mode: Any) -> None:
    authorization = next(state for state in STATES if state.name == "session authorization")
    async with Pool(dsn, max_size=1, reset=mode) as pool:
        before = [await look(pool, state) for state in STATES]
        with suppress(LookupError):
            async with pool.acquire() as conn:
                for state in STATES:
                    if state.name not in ("read only", "role", "session authorization"):
                        await conn.execute(state.statement.encode())
                await conn.execute(authorization.statement.encode())
                await conn.commit()
                with suppress(psycopg.errors.DivisionByZero):
                    await conn.execute("select 1/0")
                raise LookupError
        assert [await look(pool, state) for state in STATES] == before
        assert pool.stats().connects == 1


@each_mode
async def test_parameters_of_the_conninfo_outlast_the_reset(dsn: str, mode: Any) -> None:
    async with Pool(dsn, max_size=1, reset=mode, options="-c work_mem=33MB") as pool:
        async with pool.acquire() as conn:
            assert await first_value(conn, "show work_mem") == "33MB"
            await conn.execute("set work_mem = '77MB'")
        async with pool.acquire() as conn:
            assert await first_value(conn, "show work_mem") == "33MB"


@each_mode
async def test_what_configure_did_is_done_again(dsn: str, mode: Any) -> None:
    async def configure(conn: Connection) -> None:
        await conn.execute("set work_mem = '55MB'")
        await conn.execute("create temp table configured (id int)")
        await conn.execute("listen configured")
        await conn.commit()

    async with Pool(dsn, max_size=1, reset=mode, configure=configure) as pool:
        for _ in range(3):
            async with pool.acquire() as conn:
                assert await first_value(conn, "show work_mem") == "55MB"
                assert await first_value(conn, "select count(*) from configured") == 0
                assert await first_value(conn, "select pg_listening_channels()") == "configured"
                await conn.execute("set work_mem = '77MB'")
                await conn.execute("insert into configured values (1)")
        assert pool.stats().connects == 1


@each_mode
async def test_notifications_of_the_last_users_channels_are_gone(dsn: str, admin: Admin, mode: Any) -> None:
    async with Pool(dsn, max_size=1, reset=mode, autocommit=True) as pool:
        async with pool.acquire() as conn:
            await conn.execute("listen here")
            admin.execute("notify here")
        async with pool.acquire() as conn:
            admin.execute("notify here")
            async with aclosing(conn.notifies(timeout=0)) as received:
                assert [notification async for notification in received] == []


@each_mode
async def test_an_advisory_lock_is_free_soon_after_the_block(dsn: str, admin: Admin, mode: Any) -> None:
    async with Pool(dsn, reset=mode) as pool:
        async with pool.acquire() as conn:
            await conn.execute("select pg_advisory_lock(4713)")
            assert admin.value("select pg_try_advisory_lock(4713)") is False
        await eventually(lambda: admin.value("select pg_try_advisory_lock(4713)"))
        admin.execute("select pg_advisory_unlock(4713)")


async def test_with_rollback_only_the_session_is_left_as_it_is(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("set work_mem = '77MB'")
        async with pool.acquire() as conn:
            assert await first_value(conn, "show work_mem") == "77MB"


# --- prepared statements ------------------------------------------------------------------------------------


async def run_some(conn: Connection, number: int) -> None:
    for divisor in (1, 2):
        assert await first_value(conn, "select %s::int / %s::int", (number * divisor, divisor)) == number
    assert await first_value(conn, "select %s::text", (str(number),)) == str(number)


@pytest.mark.parametrize("mode", ["rollback", "session", "discard"])
async def test_statements_prepared_before_go_on_working(dsn: str, mode: Any) -> None:
    async with Pool(dsn, max_size=1, reset=mode, prepare_threshold=0) as pool:
        for number in range(5):
            async with pool.acquire() as conn:
                await run_some(conn, number)
                await run_some(conn, number)
            with suppress(LookupError):
                async with pool.acquire() as conn:
                    await run_some(conn, number)
                    raise LookupError
        assert pool.stats().connects == 1


@pytest.mark.parametrize("mode", ["rollback", "session", "discard"])
async def test_a_statement_means_the_same_tables_whatever_the_last_users_search_path(
    dsn: str, table: str, admin: Admin, mode: Any
) -> None:
    """The server would answer 0A000, "cached plan must not change result type"."""
    schema = f"{table}_schema"
    admin.execute(f"create schema {schema} create table {table} (name text, size numeric)")
    try:
        async with Pool(dsn, max_size=1, reset=mode, prepare_threshold=0) as pool:
            for _ in range(3):
                async with pool.acquire() as conn:
                    await conn.execute(f"set local search_path = {schema}".encode())
                    cursor = await conn.execute(f"select * from {table}".encode())
                    assert [column.name for column in cursor.description or ()] == ["name", "size"]
                if mode != "rollback":
                    async with pool.acquire() as conn:
                        cursor = await conn.execute(f"select * from {table}".encode())
                        assert [column.name for column in cursor.description or ()] == ["id"]
            assert pool.stats().connects == 1
    finally:
        admin.execute(f"drop schema {schema} cascade")


async def prepared_statements(conn: Connection) -> list[str]:
    names = "select coalesce(array_agg(name order by name), '{}') from pg_prepared_statements"
    cursor = await conn.execute(names, prepare=False)
    [(found,)] = await cursor.fetchall()
    return list(found)


async def test_statements_prepared_earlier_outlast_a_rollback_by_the_pool(dsn: str) -> None:
    """psycopg's own rollback() deallocates them all."""
    async with Pool(dsn, max_size=1, prepare_threshold=0) as pool:
        async with pool.acquire() as conn:
            await run_some(conn, 1)
            prepared = await prepared_statements(conn)
        assert len(prepared) >= 2
        with suppress(LookupError):
            async with pool.acquire() as conn:
                await run_some(conn, 2)
                raise LookupError
        async with pool.acquire() as conn:
            assert await prepared_statements(conn) == prepared


async def test_a_statement_prepared_in_a_transaction_that_changed_its_table_works_after_the_rollback(
    dsn: str, table: str
) -> None:
    async with Pool(dsn, max_size=1, prepare_threshold=0) as pool:
        with suppress(LookupError):
            async with pool.acquire() as conn:
                await conn.execute(f"alter table {table} add column more text".encode())
                await conn.execute(f"select * from {table}".encode())
                raise LookupError
        async with pool.acquire() as conn:
            cursor = await conn.execute(f"select * from {table}".encode())
            assert [column.name for column in cursor.description or ()] == ["id"]


@pytest.mark.parametrize("mode", ["session", "discard"])
async def test_a_reset_leaves_no_prepared_statements_to_pile_up(dsn: str, mode: Any) -> None:
    async with Pool(dsn, max_size=1, reset=mode, prepare_threshold=0) as pool:
        for number in range(5):
            async with pool.acquire() as conn:
                await run_some(conn, number)
        async with pool.acquire() as conn:
            assert await prepared_statements(conn) == []


# --- a callable ---------------------------------------------------------------------------------------------


async def test_a_callable_resets_what_it_wants_to(dsn: str) -> None:
    async def reset(conn: Connection) -> None:
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        await conn.execute("reset work_mem")
        await conn.commit()

    async with Pool(dsn, max_size=1, reset=reset) as pool:
        before = await look(pool, SessionState("", "", "show work_mem"))
        conn = await pool.acquire()
        await conn.execute("set work_mem = '77MB'")
        await conn.commit()
        await conn.execute("select 1")
        await pool.release(conn)
        assert await look(pool, SessionState("", "", "show work_mem")) == before
        assert pool.stats().connects == 1
