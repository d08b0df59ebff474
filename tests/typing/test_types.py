"""What type checkers make of a Pool: they run over this file, and fail where an `assert_type` is wrong.

Nothing here is executed but the last lines, by which pytest sees that the file is there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import psycopg
import pytest
from psycopg.rows import DictRow, TupleRow, class_row, dict_row, scalar_row

from asyncpool import CloseReason, CommitOutcomeUnknown, CommitStatus, Holder, Pool, PoolStats, SyncPool


@dataclass
class User:
    """A row."""

    id: int
    name: str


class Audited(psycopg.AsyncConnection[DictRow]):
    """A connection class whose rows have a type."""

    def audit(self) -> str:
        return "audited"


async def rows_are_tuples_by_default() -> None:
    pool = Pool("postgresql://localhost/app", min_size=2, max_size=10)
    assert_type(pool, Pool[psycopg.AsyncConnection[TupleRow]])
    async with pool as same:
        assert_type(same, Pool[psycopg.AsyncConnection[TupleRow]])
        async with pool.acquire() as conn:
            assert_type(conn, psycopg.AsyncConnection[TupleRow])
            cursor = await conn.execute("select 1")
            assert_type(await cursor.fetchone(), TupleRow | None)
        async with pool.transaction() as conn:
            assert_type(conn, psycopg.AsyncConnection[TupleRow])


async def a_tracked_transaction_is_of_the_same_type(error: CommitOutcomeUnknown) -> None:
    async with Pool(row_factory=dict_row) as pool:
        async with pool.transaction(track_outcome=True) as conn:
            assert_type(conn, psycopg.AsyncConnection[DictRow])
        assert_type(await pool.commit_status(error, timeout=1), CommitStatus)
    with SyncPool(row_factory=dict_row) as blocking_pool:
        with blocking_pool.transaction(track_outcome=True) as blocking_conn:
            assert_type(blocking_conn, psycopg.Connection[DictRow])
        assert_type(blocking_pool.commit_status(error), CommitStatus)
    assert_type(error.xid, int | None)


async def acquired_by_hand_it_is_the_same_type() -> None:
    async with Pool(row_factory=dict_row) as pool:
        conn = await pool.acquire(timeout=1)
        assert_type(conn, psycopg.AsyncConnection[DictRow])
        assert_type(pool.release(conn), Awaitable[None])
        await pool.release(conn)


async def row_factory_types_the_rows() -> None:
    async with Pool(row_factory=dict_row, host="localhost", autocommit=True) as pool, pool.acquire() as conn:
        cursor = await conn.execute("select 1 as one")
        assert_type(await cursor.fetchall(), list[DictRow])
    async with Pool(row_factory=class_row(User)) as users, users.acquire() as conn_of_users:
        async for user in await conn_of_users.execute("select id, name from users"):
            assert_type(user, User)
            assert_type(user.name, str)
    async with Pool(row_factory=scalar_row) as values, values.transaction() as conn_of_values:
        assert_type(conn_of_values, psycopg.AsyncConnection[Any])


async def connection_class_types_the_connections() -> None:
    async with Pool(connection_class=Audited, max_size=5) as pool:
        assert_type(pool, Pool[Audited])
        async with pool.acquire() as conn:
            assert_type(conn, Audited)
            assert_type(conn.audit(), str)
            cursor = await conn.execute("select 1 as one")
            assert_type(await cursor.fetchone(), DictRow | None)
        async with pool.transaction(timeout=None) as conn:
            assert_type(conn, Audited)


async def conninfo_may_be_a_callable_of_either_kind() -> None:
    def plain() -> str:
        return "host=localhost"

    async def asynchronous() -> str:
        return "host=localhost"

    assert_type(Pool(plain), Pool[psycopg.AsyncConnection[TupleRow]])
    assert_type(Pool(asynchronous, row_factory=dict_row), Pool[psycopg.AsyncConnection[DictRow]])


async def callables_take_the_connection(pool: Pool[Audited]) -> None:
    async def configure(conn: Audited) -> None:
        conn.audit()

    async def reset(conn: psycopg.AsyncConnection[Any]) -> object:
        return await conn.execute("discard temp")

    assert_type(
        Pool(connection_class=Audited, configure=configure, check=configure, setup=configure, reset=reset),
        Pool[Audited],
    )
    assert_type(Pool(reset="session"), Pool[psycopg.AsyncConnection[TupleRow]])


def what_can_be_observed_is_typed(pool: Pool[Audited]) -> None:
    assert_type(pool.stats(), PoolStats)
    assert_type(pool.stats().closes, Mapping[CloseReason, int])
    assert_type(pool.holders(), list[Holder])
    assert_type(pool.name, str)


def what_is_wrong_is_seen(pool: Pool[Audited], foreign: psycopg.AsyncConnection[TupleRow]) -> None:
    Pool(min_size="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Pool(reset="everything")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Pool(max_szie=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    Pool(connection_class=psycopg.Connection)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportCallIssue]
    pool.release(foreign)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", [{"min_size": "2"}, {"max_szie": 2}, {"connection_class": psycopg.Connection}])
def test_what_type_checkers_refuse_is_refused_at_run_time_too(wrong: Any) -> None:
    with pytest.raises(TypeError):
        Pool(**wrong)
