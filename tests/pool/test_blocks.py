"""How `async with pool.acquire() as conn` ends: what is committed, what is rolled back, what raises."""

from __future__ import annotations

import asyncio
import gc
import warnings
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually
from psycopg import sql

from asyncpool import CloseReason, Pool, PoolError

from .leftovers import Connection, stream

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = on_both_loops


async def insert(conn: Connection, table: str, *ids: int) -> None:
    for number in ids:
        statement = sql.SQL("insert into {} values (%s)").format(sql.Identifier(table))
        await conn.execute(statement, [number])


def stored(admin: Admin, table: str) -> list[int]:
    return [number for (number,) in admin.execute(f"select id from {table} order by id")]


async def server_process(pool: Pool[Connection]) -> int:
    """That of the next lease, which works."""
    async with pool.acquire() as conn:
        cursor = await conn.execute("select pg_backend_pid()")
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


# --- success and failure ------------------------------------------------------------------------------------


async def test_what_a_block_did_is_there_after_it(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn) as pool:
        async with pool.acquire() as conn:
            await insert(conn, table, 1)
        assert stored(admin, table) == [1]


async def test_a_block_that_is_left_by_return_is_committed(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn) as pool:

        async def store_and_return() -> str:
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                return "done"

        assert await store_and_return() == "done"
        assert stored(admin, table) == [1]


async def test_what_a_block_did_is_gone_after_an_exception(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(LookupError, match="mine"):
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                raise LookupError("mine")
        assert await server_process(pool) == pid
        assert stored(admin, table) == []


async def test_the_error_of_a_statement_passes_through_the_block(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                await conn.execute("select 1/0")
        assert await server_process(pool) == pid
        assert stored(admin, table) == []


async def test_locks_are_free_soon_after_a_block_that_failed(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn) as pool:
        with suppress(LookupError):
            async with pool.acquire() as conn:
                await conn.execute(sql.SQL("lock table {}").format(sql.Identifier(table)))
                raise LookupError
        locks = "select count(*) from pg_locks where relation = %s::regclass"
        await eventually(lambda: admin.value(locks, [table]) == 0)


async def test_a_cancelled_block_is_rolled_back(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        inserted = asyncio.Event()

        async def insert_and_linger() -> None:
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                inserted.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(insert_and_linger())
        await inserted.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server_process(pool)
        assert stored(admin, table) == []


async def test_under_autocommit_a_transaction_begun_by_hand_is_committed(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, autocommit=True) as pool:
        async with pool.acquire() as conn:
            await conn.execute("begin")
            await insert(conn, table, 1)
        assert stored(admin, table) == [1]


async def test_under_autocommit_a_transaction_begun_by_hand_is_rolled_back_after_an_exception(
    dsn: str, admin: Admin, table: str
) -> None:
    async with Pool(dsn, autocommit=True, max_size=1) as pool:
        with suppress(LookupError):
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                await conn.execute("begin")
                await insert(conn, table, 2)
                raise LookupError
        await server_process(pool)
        assert stored(admin, table) == [1]


async def test_a_transaction_begun_below_psycopg_is_committed_too(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            conn.pgconn.exec_(f"begin; insert into {table} values (1)".encode())
        assert stored(admin, table) == [1]
        async with pool.acquire() as conn:
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_a_transaction_block_commits_or_rolls_back_with_autocommit_too(
    dsn: str, admin: Admin, table: str
) -> None:
    async with Pool(dsn, autocommit=True, max_size=1) as pool:
        async with pool.transaction() as conn:
            await insert(conn, table, 1)
        with suppress(LookupError):
            async with pool.transaction() as conn:
                await insert(conn, table, 2)
                raise LookupError
        assert stored(admin, table) == [1]


# --- errors that the block swallowed ------------------------------------------------------------------------


async def test_a_block_that_swallowed_an_error_raises_and_is_rolled_back(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(PoolError, match="failed transaction"):
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                with suppress(psycopg.errors.DivisionByZero):
                    await conn.execute("select 1/0")
        assert await server_process(pool) == pid
        assert stored(admin, table) == []


async def test_an_error_inside_a_nested_transaction_costs_only_that_one(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn) as pool:
        async with pool.acquire() as conn:
            await insert(conn, table, 1)
            with suppress(psycopg.errors.DivisionByZero):
                async with conn.transaction():
                    await insert(conn, table, 2)
                    await conn.execute("select 1/0")
            async with conn.transaction(), conn.transaction():
                await insert(conn, table, 3)
        assert stored(admin, table) == [1, 3]


async def test_an_error_swallowed_under_autocommit_undoes_nothing(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, autocommit=True) as pool:
        async with pool.acquire() as conn:
            await insert(conn, table, 1)
            with suppress(psycopg.errors.DivisionByZero):
                await conn.execute("select 1/0")
        assert stored(admin, table) == [1]


async def test_a_commit_that_fails_raises_to_the_caller_and_ends_the_lease(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with pool.acquire() as conn:
                await insert(conn, table, 1, 1)
        assert pool.stats().leased == 0
        assert await server_process(pool) == pid
        assert stored(admin, table) == []


# --- the lease ended before the block -----------------------------------------------------------------------


async def test_entering_the_connection_itself_commits_and_the_lease_goes_on(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            async with conn:
                await insert(conn, table, 1)
            assert stored(admin, table) == [1]
            assert not conn.closed
            await insert(conn, table, 2)
        assert stored(admin, table) == [1, 2]
        assert pool.stats().connects == 1


async def test_closing_the_connection_inside_the_block_returns_it_for_good(dsn: str) -> None:
    async with Pool(dsn, max_size=1, autocommit=True) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            await conn.execute("select 1")
            await conn.close()
            await conn.close()
            assert pool.stats().leased == 0
            with pytest.raises(PoolError, match="released"):
                await conn.execute("select 1")
        assert await server_process(pool) == pid


async def test_a_connection_released_inside_its_block_is_left_to_its_next_user(
    dsn: str, admin: Admin, table: str
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await pool.release(conn)
            other = await pool.acquire()
            await insert(other, table, 1)
        assert pool.stats().leased == 1
        assert other.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        await other.commit()
        await pool.release(other)
        assert stored(admin, table) == [1]


# --- the connection was lost --------------------------------------------------------------------------------


async def test_a_connection_lost_in_a_transaction_fails_the_commit(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(psycopg.OperationalError):
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                admin.terminate(pid)
        assert await server_process(pool) != pid
        assert stored(admin, table) == []


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_loss_that_the_block_swallowed_raises_if_a_transaction_was_lost(
    dsn: str, admin: Admin, table: str, autocommit: bool
) -> None:
    async with Pool(dsn, max_size=1, autocommit=autocommit) as pool:
        pid = await server_process(pool)
        with pytest.raises(PoolError, match="lost inside the block"):
            async with pool.acquire() as conn:
                with suppress(psycopg.OperationalError):
                    async with conn.transaction():
                        await insert(conn, table, 1)
                        admin.terminate(pid)
                        await conn.execute("select 1")
        assert await server_process(pool) != pid
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


async def test_a_connection_lost_after_all_was_committed_raises_nothing(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            await insert(conn, table, 1)
            await conn.commit()
            admin.terminate(pid)
        assert await server_process(pool) != pid
        assert stored(admin, table) == [1]


async def test_a_loss_outside_a_transaction_is_the_statements_error_alone(dsn: str, admin: Admin) -> None:
    async with Pool(dsn, max_size=1, autocommit=True) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            await conn.execute("select 1")
            admin.terminate(pid)
            with pytest.raises(psycopg.OperationalError):
                await conn.execute("select 1")
            assert conn.closed
        assert await server_process(pool) != pid


# --- server cursors and streams inside the block ------------------------------------------------------------


async def test_a_named_cursor_left_half_way_does_not_hinder_the_commit(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            await insert(conn, table, 1)
            cursor = conn.cursor("half_way")
            await cursor.execute("select generate_series(1, 1000)")
            assert await cursor.fetchmany(2) == [(1,), (2,)]
        assert stored(admin, table) == [1]
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            left_behind = await (await conn.execute("select name from pg_cursors")).fetchall()
            assert left_behind == []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # psycopg's, for a cursor that nobody closed
            del cursor
            gc.collect()


async def test_a_cursor_with_hold_can_be_read_in_the_block_after_a_commit(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn, conn.cursor("held", withhold=True) as cursor:
            await cursor.execute("select generate_series(1, 1000)")
            assert await cursor.fetchone() == (1,)
            await conn.commit()
            assert await cursor.fetchone() == (2,)
        assert pool.stats().connects == 1
        await server_process(pool)


async def test_a_stream_that_was_closed_half_way_keeps_connection_and_transaction(
    dsn: str, admin: Admin, table: str
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            await insert(conn, table, 1)
            await conn.commit()
            async with aclosing(stream(conn, "select generate_series(1, 100)")) as rows:
                assert await anext(rows) == (1,)
            await conn.rollback()
            await insert(conn, table, 2)
        assert await server_process(pool) == pid
        assert stored(admin, table) == [1, 2]


@pytest.mark.parametrize("give_back", ["close", "release"])
async def test_a_block_whose_connection_was_given_back_with_a_transaction_open_says_that_it_is_undone(
    dsn: str, admin: Admin, table: str, give_back: str
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        with pytest.raises(PoolError, match="given back inside of it"):
            async with pool.acquire() as conn:
                await insert(conn, table, 1)
                await (conn.close() if give_back == "close" else pool.release(conn))
        async with pool.acquire() as conn:
            await insert(conn, table, 2)
            await conn.commit()
            await conn.close()
        assert stored(admin, table) == [2]
