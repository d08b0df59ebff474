"""What is said to those who are refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asyncpool import Pool, TooManyWaiting

if TYPE_CHECKING:
    pass


async def test_who_is_refused_hears_how_many_wait(dsn: str) -> None:
    async with Pool(dsn, max_size=1, lanes=1, max_waiting=1) as pool:
        results = await asyncio.gather(*(pool.fetchval("select 7") for _ in range(3)), return_exceptions=True)
    assert results[:2] == [7, 7]
    assert isinstance(results[2], TooManyWaiting)
    assert " 1 callers are waiting" in str(results[2])
