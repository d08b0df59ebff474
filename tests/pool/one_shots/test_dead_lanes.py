"""Lanes whose connection is lost where nobody reads from it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import psycopg
from kit.loops import on_both_loops

from asyncpool import Pool, StatementOutcomeUnknown

if TYPE_CHECKING:
    pass


BIG = "x" * 100_000

ECHO = "select %s::text"


async def make_known(pool: Pool[Any], query: str, parameter: object) -> None:
    """Have the pool know that this is quick, so that one is sent behind the other."""
    for _ in range(30):
        await asyncio.gather(*(pool.fetchval(query.encode(), (parameter,)) for _ in range(20)))


@on_both_loops
async def test_a_lane_that_is_found_dead_while_sending_leaves_nobody_waiting(dsn: str, application_name: str) -> None:
    async with Pool(dsn, max_size=1, lanes=1) as pool:
        await make_known(pool, ECHO, "")

        async def end_the_session() -> None:
            # The event loop stands still: what it finds first is that nothing can be sent.
            with psycopg.connect(dsn, application_name="killer", autocommit=True) as killer:
                killer.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s",
                    (application_name,),
                )
            time.sleep(0.1)  # noqa: ASYNC251

        async with asyncio.timeout(10):
            sent = asyncio.ensure_future(pool.fetchval(ECHO, ("",)))
            breaking = asyncio.ensure_future(end_the_session())
            behind = [asyncio.ensure_future(pool.fetchval(ECHO, (BIG,))) for _ in range(40)]
            results = await asyncio.gather(sent, *behind, return_exceptions=True)
            await breaking
            for result in results:
                assert isinstance(result, (str, StatementOutcomeUnknown))
            assert await pool.fetchval(ECHO, ("again",)) == "again"
            async with pool.acquire():  # the only place is free again
                pass
