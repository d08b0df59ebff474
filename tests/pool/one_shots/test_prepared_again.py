"""Statements that are prepared again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from asyncpool import Pool
from asyncpool._io.pipe import Pipe

if TYPE_CHECKING:
    from psycopg import AsyncConnection


ECHO = "select %s::text"


async def make_known(pool: Pool[Any], query: str, parameter: object) -> None:
    """Have the pool know that this is quick, so that one is sent behind the other."""
    for _ in range(30):
        await asyncio.gather(*(pool.fetchval(query.encode(), (parameter,)) for _ in range(20)))


async def test_a_connection_lost_when_statements_are_prepared_again_leaves_nobody_waiting(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def configure(conn: AsyncConnection[Any]) -> None:
        conn.prepare_threshold = 0

    put = Pipe.put

    def fail_the_second_time(self: Pipe, statement: Any, now: float) -> bool:
        if statement.was_prepared_again:
            raise psycopg.OperationalError("there is no connection to the server")
        return put(self, statement, now)

    async with Pool(dsn, max_size=1, lanes=1, configure=configure) as pool:
        await make_known(pool, ECHO, "")
        await pool.execute("do $$ begin execute 'deallocate all'; end $$")
        monkeypatch.setattr(Pipe, "put", fail_the_second_time)
        async with asyncio.timeout(10):
            results = await asyncio.gather(*(pool.fetchval(ECHO, ("",)) for _ in range(5)), return_exceptions=True)
        assert isinstance(results[0], psycopg.OperationalError)
