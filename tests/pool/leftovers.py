"""Ways to stop in the middle of something on a connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import psycopg

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine
    from contextlib import AsyncExitStack

Connection = psycopg.AsyncConnection[Any]


def stream(conn: Connection, query: str, *, size: int = 1) -> AsyncGenerator[Any]:
    """psycopg's stream(), as the generator that it is, so that it can be closed."""
    return cast("AsyncGenerator[Any]", conn.cursor().stream(query.encode(), size=size))


async def in_transaction_block(conn: Connection, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(conn.transaction())
    await conn.execute("select 1")


async def in_nested_transaction_block(conn: Connection, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(conn.transaction())
    await stack.enter_async_context(conn.transaction())


async def in_transaction_block_ended_by_sql(conn: Connection, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(conn.transaction())
    await conn.execute("rollback")


async def in_two_phase_transaction(conn: Connection, _: AsyncExitStack) -> None:
    await conn.tpc_begin("some transaction")
    await conn.execute("select 1")


async def in_pipeline(conn: Connection, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(conn.pipeline())


async def in_pipeline_with_statements(conn: Connection, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(conn.pipeline())
    await conn.execute("select 1")
    await conn.execute("select 2")


async def in_copy_out(conn: Connection, stack: AsyncExitStack) -> None:
    copy = await stack.enter_async_context(conn.cursor().copy("copy (select generate_series(1, 100000)) to stdout"))
    await copy.read()


async def after_half_a_copy_out(conn: Connection, _: AsyncExitStack) -> None:
    # psycopg reads the rest only after an exception
    async with conn.cursor().copy("copy (select generate_series(1, 100000)) to stdout") as copy:
        await copy.read()


async def in_copy_in(conn: Connection, stack: AsyncExitStack) -> None:
    await conn.execute("create temp table received (id int)")
    copy = await stack.enter_async_context(conn.cursor().copy("copy received from stdin"))
    await copy.write_row([1])


async def in_stream(conn: Connection, stack: AsyncExitStack) -> None:
    rows = stream(conn, "select generate_series(1, 100000)")
    stack.push_async_callback(rows.aclose)
    await anext(rows)


async def in_stream_by_chunks(conn: Connection, stack: AsyncExitStack) -> None:
    rows = stream(conn, "select generate_series(1, 100000)", size=100)
    stack.push_async_callback(rows.aclose)
    await anext(rows)


async def in_notifies(conn: Connection, stack: AsyncExitStack) -> None:
    await conn.set_autocommit(True)
    await conn.execute("listen here")
    await conn.execute("notify here")
    notifications = conn.notifies(timeout=10)
    stack.push_async_callback(notifications.aclose)
    await anext(notifications)


async def holding_its_lock(conn: Connection, stack: AsyncExitStack) -> None:
    await conn.execute("select 1")
    await conn.rollback()
    await stack.enter_async_context(conn.lock)


@dataclass(frozen=True)
class Leftover:
    """One of them, and what the pool's message calls it."""

    leave: Callable[[Connection, AsyncExitStack], Coroutine[Any, Any, None]]
    words: str

    def __str__(self) -> str:
        return self.leave.__name__


LEFTOVERS = [
    Leftover(in_transaction_block, "inside conn.transaction"),
    Leftover(in_nested_transaction_block, "inside conn.transaction"),
    Leftover(in_transaction_block_ended_by_sql, "inside conn.transaction"),
    Leftover(in_two_phase_transaction, "two-phase"),
    Leftover(in_pipeline, "pipeline"),
    Leftover(in_pipeline_with_statements, "pipeline"),
    Leftover(in_copy_out, "COPY"),
    Leftover(after_half_a_copy_out, "half-read"),
    Leftover(in_copy_in, "COPY"),
    Leftover(in_stream, "stream"),
    Leftover(in_stream_by_chunks, "stream"),
    Leftover(in_notifies, "in the middle"),
    Leftover(holding_its_lock, "in the middle"),
]
