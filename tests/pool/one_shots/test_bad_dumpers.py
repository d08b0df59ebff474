"""Values that cannot be sent, which psycopg finds late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from psycopg.adapt import Dumper

from asyncpool import Pool

if TYPE_CHECKING:
    from psycopg import AsyncConnection


ECHO = "select %s::text"


class Odd:
    """A value whose dumper is not as it should be."""


class DumperToStr(Dumper):
    """Returns no bytes."""

    def dump(self, obj: Any) -> Any:
        return "a str"


def with_dumper(dumper: type[Dumper]) -> Any:
    async def configure(conn: AsyncConnection[Any]) -> None:
        conn.adapters.register_dumper(Odd, dumper)

    return configure


async def make_known(pool: Pool[Any], query: str, parameter: object) -> None:
    """Have the pool know that this is quick, so that one is sent behind the other."""
    for _ in range(30):
        await asyncio.gather(*(pool.fetchval(query.encode(), (parameter,)) for _ in range(20)))


async def test_a_dumper_that_returns_no_bytes_harms_its_caller_only(dsn: str) -> None:
    async with Pool(dsn, max_size=1, lanes=1, configure=with_dumper(DumperToStr)) as pool:
        await make_known(pool, ECHO, "x")
        async with asyncio.timeout(10):
            results = await asyncio.gather(
                *(pool.fetchval(ECHO, (Odd() if number == 5 else str(number),)) for number in range(10)),
                return_exceptions=True,
            )
            assert isinstance(results.pop(5), TypeError)
            assert results == [str(number) for number in range(10) if number != 5]
            with pytest.raises(TypeError):
                await pool.fetchval("select %s::text, 'not seen before'", (Odd(),))
            assert await pool.fetchval(ECHO, ("y",)) == "y"
        assert pool.stats().connects == 1
