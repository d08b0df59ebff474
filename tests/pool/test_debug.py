"""Finding who holds what: acquire sites, `debug`, `long_held_after`."""

from __future__ import annotations

import asyncio
import inspect
import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually

from asyncpool import Pool, PoolError

if TYPE_CHECKING:
    from .leftovers import Connection


def line_here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "asyncpool"]


async def acquire_somewhere(pool: Pool[Connection]) -> Connection:
    return await pool.acquire()


async def test_holders_names_file_line_and_function_of_each_acquire(dsn: str) -> None:
    async with Pool(dsn, max_size=3) as pool:
        assert pool.holders() == []
        first, line = await pool.acquire(), line_here()
        async with pool.acquire() as second:
            third = await acquire_somewhere(pool)
            holders = pool.holders()
            assert [holder.backend_pid for holder in holders] == [
                conn.info.backend_pid for conn in (first, second, third)
            ]
            assert holders[0].site.startswith(f"{__file__}:{line} in ")
            assert holders[0].site.endswith("test_holders_names_file_line_and_function_of_each_acquire")
            assert holders[2].site.endswith("acquire_somewhere")
            assert all(holder.held_for >= 0 for holder in holders)
            assert all(holder.stack is None for holder in holders)
            await pool.release(third)
        assert len(pool.holders()) == 1
        await pool.release(first)


async def test_a_waiting_callers_site_is_its_own_and_not_the_last_holders(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        waiting = asyncio.create_task(acquire_somewhere(pool))
        await eventually(lambda: pool.stats().waiting == 1)
        await pool.release(conn)
        conn = await waiting
        [holder] = pool.holders()
        assert holder.site.endswith("acquire_somewhere")
        await pool.release(conn)


async def test_debug_keeps_the_whole_stack_of_the_acquire(dsn: str) -> None:
    async with Pool(dsn, debug=True) as pool:
        conn = await acquire_somewhere(pool)
        [holder] = pool.holders()
        assert holder.stack is not None
        assert "in acquire_somewhere" in holder.stack
        assert "in test_debug_keeps_the_whole_stack_of_the_acquire" in holder.stack
        await pool.release(conn)


async def test_debug_refuses_a_released_connection_also_when_it_has_a_new_owner(dsn: str) -> None:
    async with Pool(dsn, max_size=1, debug=True) as pool:
        for _ in range(3):
            stale = await pool.acquire()
            await pool.release(stale)
            async with pool.acquire() as conn:
                assert conn is not stale
                with pytest.raises(PoolError, match="released"):
                    await stale.execute("select 1")
                with pytest.raises(PoolError, match="released"):
                    pool.release(stale)
                await stale.close()
                assert await (await conn.execute("select 1")).fetchone() == (1,)
        assert pool.stats().connects == 1


async def test_debug_hears_notices_and_notifications_on_the_present_object(dsn: str) -> None:
    heard: list[str] = []
    async with Pool(dsn, max_size=1, debug=True, autocommit=True) as pool:
        for number in range(3):
            async with pool.acquire() as conn:
                conn.add_notice_handler(lambda notice: heard.append(str(notice.message_primary)))
                conn.add_notify_handler(lambda notification: heard.append(notification.payload))
                await conn.execute(f"do $$ begin raise notice 'notice {number}'; end $$".encode())
                await conn.execute("listen here")
                await conn.execute(f"notify here, 'notification {number}'".encode())
                await conn.execute("unlisten *")
        assert heard == [f"{what} {number}" for number in range(3) for what in ("notice", "notification")]


async def test_debug_keeps_prepared_statements_across_leases(dsn: str) -> None:
    async with Pool(dsn, max_size=1, debug=True, prepare_threshold=0) as pool:
        for number in range(3):
            async with pool.acquire() as conn:
                cursor = await conn.execute("select %s::int", [number])
                assert await cursor.fetchone() == (number,)
        async with pool.acquire() as conn:
            prepared = "select count(*) from pg_prepared_statements where statement = 'select $1::int'"
            cursor = await conn.execute(prepared, prepare=False)
            assert await cursor.fetchone() == (1,)


def test_debug_is_on_in_pythons_dev_mode(dsn: str) -> None:
    program = """
import asyncio, sys
from asyncpool import Pool

async def main():
    async with Pool(sys.argv[1]) as pool, pool.acquire():
        print(pool.holders()[0].stack is not None)

asyncio.run(main())
"""

    def run(*options: str) -> str:
        command = [sys.executable, *options, "-c", program, dsn]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout.strip()

    assert run("-X", "dev") == "True"
    assert run() == "False"


# --- long_held_after ----------------------------------------------------------------------------------------


async def test_a_lease_that_lasts_long_is_told_once_and_again_when_it_ends(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pool(dsn, name="orders", max_size=2, long_held_after=0.05) as pool:
        conn = await acquire_somewhere(pool)
        await eventually(lambda: len(warnings_of(caplog)) == 1)
        other = await pool.acquire()
        await eventually(lambda: len(warnings_of(caplog)) == 2)  # by then the first was due several times
        first, second = warnings_of(caplog)
        assert "orders" in first
        assert "acquire_somewhere" in first
        assert "acquire_somewhere" not in second
        await pool.release(conn)
        assert len(warnings_of(caplog)) == 3
        assert "came back" in warnings_of(caplog)[2]
        assert "acquire_somewhere" in warnings_of(caplog)[2]
        await pool.release(other)


async def test_leases_that_end_in_time_are_not_told(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Pool(dsn, max_size=1, long_held_after=30) as pool:
        for _ in range(3):
            async with pool.acquire() as conn:
                await conn.execute("select 1")
    assert warnings_of(caplog) == []


async def test_with_debug_a_long_held_lease_is_told_with_its_stack(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Pool(dsn, long_held_after=0.05, debug=True) as pool:
        conn = await acquire_somewhere(pool)
        await eventually(lambda: len(warnings_of(caplog)) == 1)
        assert "in test_with_debug_a_long_held_lease_is_told_with_its_stack" in warnings_of(caplog)[0]
        await pool.release(conn)
