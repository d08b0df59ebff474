"""A connection that comes back in the middle of something is closed: its leftovers would be the next user's."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import CloseReason, Pool, PoolError

from .leftovers import (
    LEFTOVERS,
    Connection,
    Leftover,
    after_half_a_copy_out,
    in_transaction_block_ended_by_sql,
    in_two_phase_transaction,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kit.servers import Admin

    from asyncpool.cli.embedded import EmbeddedServer

pytestmark = on_both_loops

each_leftover = pytest.mark.parametrize("leftover", LEFTOVERS, ids=str)


@pytest.fixture
async def unfinished() -> AsyncIterator[AsyncExitStack]:
    """Ends what a test has left open, after the pool has taken the connection away from under it."""
    stack = AsyncExitStack()
    yield stack
    with suppress(psycopg.Error):
        await stack.aclose()


async def server_process(pool: Pool[Connection]) -> int:
    async with pool.acquire() as conn:
        return conn.info.backend_pid


async def assert_replaced(pool: Pool[Connection], pid: int) -> None:
    """The connection is closed for that reason, its place is free, and what takes it works."""
    async with pool.acquire(timeout=10) as conn:
        assert conn.info.backend_pid != pid
        cursor = await conn.execute("select 1")
        assert await cursor.fetchall() == [(1,)]
    assert pool.stats().closes == {CloseReason.RETURNED_BUSY: 1}


@each_leftover
async def test_a_block_left_in_the_middle_raises_and_its_connection_is_closed(
    dsn: str, admin: Admin, application_name: str, unfinished: AsyncExitStack, leftover: Leftover
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(PoolError, match=leftover.words):
            async with pool.acquire() as conn:
                await leftover.leave(conn, unfinished)
        await assert_replaced(pool, pid)
        assert pid not in admin.pids(application_name)


@each_leftover
async def test_a_connection_released_in_the_middle_is_closed_with_a_warning(
    dsn: str, unfinished: AsyncExitStack, leftover: Leftover, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        await leftover.leave(conn, unfinished)
        await pool.release(conn)
        await assert_replaced(pool, pid)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert leftover.words in warning
    assert "test_left_in_the_middle.py" in warning


@each_leftover
async def test_an_exception_that_leaves_a_connection_in_the_middle_passes_and_closes_it(
    dsn: str, unfinished: AsyncExitStack, leftover: Leftover
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(LookupError, match="mine"):
            async with pool.acquire() as conn:
                await leftover.leave(conn, unfinished)
                raise LookupError("mine")
        await assert_replaced(pool, pid)


@each_leftover
async def test_closing_a_connection_in_the_middle_of_something_closes_it_for_good(
    dsn: str, unfinished: AsyncExitStack, leftover: Leftover
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with suppress(PoolError):  # where there was a transaction, the block says that it is undone
            async with pool.acquire() as conn:
                await leftover.leave(conn, unfinished)
                await conn.close()
        await assert_replaced(pool, pid)


# What psycopg's own contexts do not end by themselves.
ENDLESS = (in_two_phase_transaction, in_transaction_block_ended_by_sql, after_half_a_copy_out)


@pytest.mark.parametrize("leftover", [one for one in LEFTOVERS if one.leave not in ENDLESS], ids=str)
async def test_a_block_that_fails_inside_its_contexts_keeps_its_connection(dsn: str, leftover: Leftover) -> None:
    """psycopg's own contexts, properly nested, leave nothing half done, whatever the exception."""
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(LookupError, match="mine"):
            async with pool.acquire() as conn, AsyncExitStack() as stack:
                await leftover.leave(conn, stack)
                raise LookupError("mine")
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_a_stream_that_was_broken_off_without_closing_it_raises_at_the_blocks_end(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(PoolError, match="stream"):
            async with pool.acquire() as conn:
                async for _ in stream(conn, "select generate_series(1, 100000)"):
                    break
        await assert_replaced(pool, pid)


async def test_a_prepared_two_phase_transaction_stays_on_the_server(
    private_server: EmbeddedServer, private_dsn: str, private_admin: Admin
) -> None:
    private_admin.execute("alter system set max_prepared_transactions = 2")
    private_server.restart()
    async with Pool(private_dsn, max_size=1) as pool:
        pid = await server_process(pool)
        with pytest.raises(PoolError, match="two-phase"):
            async with pool.acquire() as conn:
                await conn.tpc_begin("left prepared")
                await conn.tpc_prepare()
        await assert_replaced(pool, pid)
        async with pool.acquire() as conn:
            assert [xid.gtrid for xid in await conn.tpc_recover()] == ["left prepared"]
            await conn.tpc_rollback("left prepared")


async def test_the_pool_goes_on_after_many_of_them_at_once(
    dsn: str, admin: Admin, application_name: str, unfinished: AsyncExitStack
) -> None:
    async with Pool(dsn, max_size=4) as pool:
        leases: list[psycopg.AsyncConnection[Any]] = [await pool.acquire() for _ in range(4)]
        for conn, leftover in zip(leases, LEFTOVERS[-4:], strict=True):
            await leftover.leave(conn, unfinished)
        for conn in leases:
            await pool.release(conn)
        again = [await pool.acquire() for _ in range(4)]
        assert admin.sessions(application_name) == 4
        for conn in again:
            await pool.release(conn)
        await eventually(lambda: pool.stats().idle == 4)
