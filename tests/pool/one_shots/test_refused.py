"""What wants a session is refused before anything is sent, and the message says what to use in its place."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.proxy import Towards
from psycopg import sql
from psycopg.adapt import Dumper

from asyncpool import Pool

if TYPE_CHECKING:
    from kit.proxy import Proxy

# By the command that the message names.
REFUSED: dict[str, list[str]] = {
    "BEGIN": ["begin", "BEGIN", "begin transaction read only", "begin work", "begin;"],
    "START": ["start transaction", "start transaction isolation level serializable"],
    "COMMIT": ["commit", "commit work", "commit and chain"],
    "END": ["end", "end transaction"],
    "ROLLBACK": ["rollback", "rollback to savepoint s", "rollback to s"],
    "ABORT": ["abort", "abort work"],
    "SAVEPOINT": ["savepoint s"],
    "RELEASE": ["release s", "release savepoint s"],
    "SET": [
        "set search_path = pg_catalog",
        "set local search_path = pg_catalog",
        "set session search_path to pg_catalog",
        "set time zone 'UTC'",
        "set role postgres",
        "set session authorization default",
        "set transaction read only",
        "set constraints all deferred",
    ],
    "RESET": ["reset search_path", "reset all", "reset role"],
    "LISTEN": ["listen here"],
    "UNLISTEN": ["unlisten here", "unlisten *"],
    "COPY": [
        "copy (select 1) to stdout",
        "copy no_such_table from stdin",
        "copy (select 1) to '/nowhere'",
        "copy no_such_table from program 'true'",
    ],
    "DECLARE": ["declare c cursor for select 1", "declare c cursor with hold for select 1"],
    "FETCH": ["fetch c", "fetch all from c"],
    "MOVE": ["move c"],
    "CLOSE": ["close c", "close all"],
    "PREPARE": ["prepare p as select 1", "prepare transaction 'it'"],
    "EXECUTE": ["execute p", "execute p (1)"],
    "DEALLOCATE": ["deallocate p", "deallocate all", "deallocate prepare p"],
    "LOCK": ["lock no_such_table", "lock table no_such_table in share mode"],
    "DISCARD": ["discard all", "discard plans", "discard temp"],
    "LOAD": ["load 'auto_explain'"],
    "TEMP": [
        "create temp table t (id int)",
        "create temporary table t (id int)",
        "create local temporary table t (id int)",
        "create global temp table t (id int)",
        "create temp table if not exists t (id int)",
        "create temp table t as select 1",
        "create temp view v as select 1",
        "create or replace temp view v as select 1",
        "create or replace temporary recursive view v (n) as select 1",
        "create temp sequence s",
        "create temporary sequence s",
        "select 1 as a into temp t",
        "select 1 as a into temporary table t",
        "select 1 as a into local temp t",
        "with w as (select 1 as a) select a into temp t from w",
    ],
}
EACH = [(name, statement) for name, statements in REFUSED.items() for statement in statements]

# What is before a command, and what it is written like.
DISGUISES: dict[str, Any] = {
    "upper case": lambda statement: statement.upper(),
    "blanks": lambda statement: f" \n\t\f\r{statement}",
    "a comment": lambda statement: f"/* select 1 */ {statement}",
    "a comment inside a comment": lambda statement: f"/* /* */ select 1 */{statement}",
    "a comment of a line": lambda statement: f"-- select 1\n{statement}",
    "comments": lambda statement: f"--\n/**/ --x\n  {statement}",
    "empty statements": lambda statement: f";; {statement}",
    "a semicolon": lambda statement: f"{statement} ; ",
    "comments between words": lambda statement: statement.replace(" ", " /* x */ "),
    "bytes": lambda statement: statement.encode(),
    "sql": sql.SQL,
    "composed": lambda statement: sql.SQL("{}{}").format(sql.SQL("/**/"), sql.SQL(statement)),
}

# They have such words in them, and want no session.
ALLOWED = [
    "select 'begin'",
    "select 1 as begin, 2 as commit, 3 as set",
    'select 1 as "set local", $$begin; commit$$',
    "with copy as (select 1 as lock) select lock from copy",
    "values ('create temp table t (id int)')",
    "select 1 /* into temp t */",
    "select 1 -- into temp t",
    "select temp from (values (1)) as temporary (temp)",
    "show search_path",
    "explain select 1",
    "do $$ begin perform 1; end $$",
    "notify here",
    "table pg_catalog.pg_class limit 1",
    "(select 1)",
    "checkpoint",
]


async def refused(pool: Pool[Any], query: Any, name: str) -> None:
    words = "CREATE TEMP|SELECT INTO TEMP|TEMP" if name == "TEMP" else name
    for call in (
        pool.execute(query),
        pool.fetch(query),
        pool.fetchrow(query),
        pool.fetchval(query),
        pool.executemany(query, [()]),
    ):
        with pytest.raises(psycopg.ProgrammingError, match=rf"(?i)\b({words})") as error:
            await call
        assert re.search(r"pool\.acquire\(\)", str(error.value))
        assert error.value.sqlstate is None, "the server was not asked"


@pytest.mark.parametrize("name", REFUSED)
async def test_what_wants_a_session_is_refused_and_the_message_names_it(dsn: str, name: str) -> None:
    async with Pool(dsn, min_size=0) as pool:
        for statement in REFUSED[name]:
            await refused(pool, statement, name)
        assert (pool.stats().connects, pool.stats().acquires, pool.stats().one_shots) == (0, 0, 0)


@pytest.mark.parametrize("disguise", DISGUISES)
async def test_it_is_refused_however_it_is_written(dsn: str, disguise: str) -> None:
    async with Pool(dsn, min_size=0) as pool:
        for name, statement in EACH:
            await refused(pool, DISGUISES[disguise](statement), name)
        assert pool.stats().connects == 0


async def test_it_is_refused_whichever_way_it_would_have_gone(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, min_size=0, **way) as pool:
        for name, statement in EACH:
            await refused(pool, statement, name)
        assert pool.stats().connects == 0


async def test_with_parameters_it_is_refused_as_well(dsn: str) -> None:
    async with Pool(dsn, min_size=0) as pool:
        for query in ("set application_name = %s", "/* %s */ copy t from stdin", "listen %s"):
            with pytest.raises(psycopg.ProgrammingError, match=r"pool\.acquire\(\)"):
                await pool.execute(query, ["x"])
        assert pool.stats().connects == 0


class Setting:
    """A value that only connections can write down that know its dumper."""


class SettingDumper(Dumper):
    def dump(self, obj: Setting) -> bytes:
        return b"mine"


async def register(conn: psycopg.AsyncConnection[Any]) -> None:
    conn.adapters.register_dumper(Setting, SettingDumper)


async def test_what_is_composed_of_values_that_only_the_connection_can_write_is_refused_by_then(
    dsn: str, way: dict[str, Any]
) -> None:
    """It could not be read any sooner; sent it is not all the same, and whoever is beside it does not notice."""
    allowed = sql.SQL("select {}").format(sql.Literal(Setting()))
    wanting_a_session = sql.SQL("/* {} */ set application_name = {}").format(sql.Literal(1), sql.Literal(Setting()))
    async with Pool(dsn, max_size=1, configure=register, **way) as pool:
        own = await pool.fetchval("show application_name")
        for _ in range(3):
            assert await pool.fetchval(allowed) == "mine"
            calls = [pool.fetchval("select %s::int", [1]), pool.fetchval(wanting_a_session), pool.fetchval(allowed)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert outcomes[::2] == [1, "mine"]
            assert isinstance(outcomes[1], psycopg.ProgrammingError)
            assert re.search(r"SET .*pool\.acquire\(\)", str(outcomes[1]))
            assert await pool.fetchval("show application_name") == own
        assert pool.stats().connects == 1


@on_both_loops
async def test_nothing_of_it_reaches_the_server(proxied_dsn: str, proxy: Proxy) -> None:
    """Not even beside others that are sent in the same turn of the event loop: these are the only bytes."""
    async with Pool(proxied_dsn, max_size=1, check_interval=None) as pool:
        for _ in range(10):  # prepared
            await pool.fetchval("select %s::int", [1])

        def received() -> int:
            return sum(link.received(Towards.SERVER) for link in proxy.links)

        async def bytes_of(*calls: Any) -> int:
            before = received()
            await asyncio.gather(*calls, return_exceptions=True)
            await pool.fetchval("select %s::int", [1])  # what was sent before has arrived before it
            return received() - before

        none = await bytes_of()
        assert await bytes_of(*(pool.execute(statement.encode()) for _, statement in EACH)) == none
        assert await bytes_of(pool.executemany("begin", [()]), pool.executemany("copy t from stdin", [()])) == none
        assert pool.stats().acquires <= pool.stats().one_shots


@pytest.mark.parametrize("statement", ALLOWED)
async def test_what_only_looks_like_it_is_executed(dsn: str, statement: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(2):
            await pool.execute(statement.encode())
            await pool.fetch(statement.encode())


async def test_objects_whose_names_are_such_words_can_be_used(dsn: str, table: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        assert await pool.execute(f"create table {table}_temp (temp int)".encode()) == "CREATE TABLE"
        assert await pool.execute(f"insert into {table}_temp (temp) values (1)".encode()) == "INSERT 0 1"
        assert await pool.execute(f"create view {table}_view as select temp from {table}_temp".encode())
        assert await pool.fetchval(f"select temp from {table}_view".encode()) == 1
        assert await pool.execute(f"update {table}_temp set temp = 2".encode()) == "UPDATE 1"
        assert await pool.execute(f"drop table {table}_temp cascade".encode()) == "DROP TABLE"


async def test_a_refusal_harms_nobody_beside_it(dsn: str, way: dict[str, Any]) -> None:
    async with Pool(dsn, **way) as pool:
        for _ in range(5):
            calls = [pool.fetchval("select %s::int", [1]), pool.fetchval("begin"), pool.fetchval("select %s::int", [2])]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert outcomes[::2] == [1, 2]
            assert isinstance(outcomes[1], psycopg.ProgrammingError)
            assert await pool.fetchval("select pg_current_xact_id_if_assigned()") is None
