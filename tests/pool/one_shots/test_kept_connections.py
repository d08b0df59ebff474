"""Connection objects that were kept after their release, when a lane has the connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from asyncpool import Pool, PoolError

if TYPE_CHECKING:
    from psycopg import AsyncConnection


async def test_a_connection_kept_after_its_release_is_of_no_use_while_it_is_a_lane(dsn: str) -> None:
    async def configure(conn: AsyncConnection[Any]) -> None:
        await conn.set_autocommit(True)

    async with Pool(dsn, max_size=1, lanes=1, configure=configure) as pool:
        conn = await pool.acquire()
        await pool.release(conn)
        running = asyncio.ensure_future(pool.fetchval("select 1 from pg_sleep(0.01)"))
        await asyncio.sleep(0)
        assert pool.stats().leased == 1
        with pytest.raises(PoolError, match="released"):
            await conn.execute("begin", (), binary=True)  # which libpq would send among the others
        assert await running == 1
