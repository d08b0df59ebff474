"""The connection ends while something runs on it: an error for who waits, a new connection for the next."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import CloseReason, Pool

from .interruptions import OPERATIONS, Operation

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = on_both_loops

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


def is_asleep(admin: Admin, pid: int) -> bool:
    return bool(admin.execute("select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'", [pid]))


@each_operation
async def test_a_statement_whose_session_the_server_ends_fails_and_the_connection_is_replaced(
    dsn: str, admin: Admin, operation: Operation
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def work() -> None:
            async with pool.acquire() as conn:
                await operation(conn)

        task = asyncio.create_task(work())
        await eventually(lambda: is_asleep(admin, pid), timeout=30)
        admin.terminate(pid)
        await asyncio.wait([task], timeout=30)
        assert isinstance(task.exception(), psycopg.OperationalError), task.exception()
        async with pool.acquire(timeout=30) as conn:
            assert conn.info.backend_pid != pid
            await conn.execute("select 1")
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


@each_operation
async def test_a_statement_that_is_running_when_the_pool_is_closed_fails_and_ends_on_the_server(
    dsn: str, admin: Admin, application_name: str, operation: Operation
) -> None:
    pool = Pool(dsn, max_size=1, check_timeout=25)
    async with pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def work() -> None:
            async with pool.acquire() as conn:
                await operation(conn)

        task = asyncio.create_task(work())
        await eventually(lambda: is_asleep(admin, pid), timeout=30)
        await pool.close(timeout=0)
        await asyncio.wait([task], timeout=30)
        assert isinstance(task.exception(), psycopg.OperationalError), task.exception()
        assert admin.sessions(application_name) == 0
    assert pool.stats().abandoned == 0
