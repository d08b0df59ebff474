"""Ctrl-C while the event loop serves a lane."""

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


class DumperInterruptedOnce(Dumper):
    """Ctrl-C strikes in it, once."""

    was_interrupted = False

    def dump(self, obj: Any) -> bytes:
        if not DumperInterruptedOnce.was_interrupted:
            DumperInterruptedOnce.was_interrupted = True
            raise KeyboardInterrupt
        return b"dumped"


def with_dumper(dumper: type[Dumper]) -> Any:
    async def configure(conn: AsyncConnection[Any]) -> None:
        conn.adapters.register_dumper(Odd, dumper)

    return configure


def test_ctrl_c_in_the_serving_of_a_lane_is_raised_and_loses_no_statement(dsn: str) -> None:
    answers: list[Any] = []

    async def work() -> None:
        async with Pool(dsn, max_size=1, lanes=1, configure=with_dumper(DumperInterruptedOnce)) as pool:
            first = asyncio.ensure_future(pool.fetchval("select 1"))  # whose time is unknown: the next waits for it
            second = asyncio.ensure_future(pool.fetchval(ECHO, (Odd(),)))
            answers.extend(await asyncio.wait_for(asyncio.gather(first, second), 10))

    loop = asyncio.new_event_loop()
    task = loop.create_task(work())
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        loop.run_until_complete(task)
    finally:
        loop.close()
    assert answers == [1, "dumped"]
