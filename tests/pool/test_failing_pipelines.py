"""A pipeline under autocommit whose COMMIT, at its Sync, fails or is cancelled: that is told, the connection stays."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import psycopg
import pytest
from kit.waiting import eventually

from asyncpool import Pool, SyncPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin


def is_asleep(admin: Admin, application_name: str) -> bool:
    asleep = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    return bool(admin.value(asleep, [application_name]))


@pytest.fixture
def deferred(admin: Admin, application_name: str) -> Iterator[str]:
    """A table of which no number may be there twice, which is looked at only in the COMMIT: that sleeps before it."""
    table, function = (f"{name}_{os.getpid()}_{application_name}".replace("-", "_") for name in ("numbers", "sleep"))
    admin.execute(f"create table {table} (n int unique deferrable initially deferred)")
    admin.execute(
        f"create function {function}() returns trigger language plpgsql as"
        " $$ begin perform pg_sleep(new.n); return null; end $$"
    )
    admin.execute(
        f"create constraint trigger sleeps after insert on {table} deferrable initially deferred"
        f" for each row execute function {function}()"
    )
    yield f"insert into {table} values (%s)"
    admin.execute(f"drop table {table}; drop function {function}")


async def test_an_error_in_the_commit_of_an_executemany_is_raised_and_keeps_the_connection(
    dsn: str, deferred: str
) -> None:
    async with Pool(dsn, min_size=1, max_size=1, autocommit=True) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            with pytest.raises(psycopg.errors.UniqueViolation):
                await conn.cursor().executemany(deferred.encode(), [(0,), (0,)])
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid


async def test_a_cancellation_in_the_commit_of_an_executemany_keeps_the_connection(
    dsn: str, admin: Admin, application_name: str, deferred: str
) -> None:
    async def insert() -> None:
        async with pool.acquire() as conn:
            await conn.cursor().executemany(deferred.encode(), [(0,), (600,)])

    async with Pool(dsn, min_size=1, max_size=1, autocommit=True) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        task = asyncio.create_task(insert())
        await eventually(lambda: is_asleep(admin, application_name))
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid


def test_an_error_in_the_commit_of_a_threads_executemany_is_raised_and_keeps_the_connection(
    dsn: str, deferred: str
) -> None:
    with SyncPool(dsn, min_size=1, max_size=1, autocommit=True) as pool:
        with pool.acquire() as conn:
            pid = conn.info.backend_pid
            with pytest.raises(psycopg.errors.UniqueViolation):
                conn.cursor().executemany(deferred.encode(), [(0,), (0,)])
        with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
