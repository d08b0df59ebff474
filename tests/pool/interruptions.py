"""Statements that last until they are cancelled, and ways to cancel them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeAlias

import anyio
import psycopg
from kit.waiting import eventually

from .leftovers import stream

Connection = psycopg.AsyncConnection[Any]
Operation: TypeAlias = Callable[[Connection], Coroutine[Any, Any, None]]
Pause: TypeAlias = Callable[[Connection, asyncio.Event], Coroutine[Any, Any, None]]
Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Way: TypeAlias = Callable[[Work, Callable[[], bool]], Coroutine[Any, Any, None]]

# Seconds: longer than any test may last, so that only a cancellation ends it.
FOREVER = 600

# A table whose rows, and transactions, never come to an end; `pg_temp`, so that it is the session's own.
SLOW_TABLE = f"""
    create temp table slow (id int);
    create function pg_temp.linger() returns trigger language plpgsql as
        $$ begin perform pg_sleep({FOREVER}); return new; end $$;
"""
SLOW_INSERT = "create trigger slow before insert on slow for each row execute function pg_temp.linger()"
SLOW_COMMIT = (
    "create constraint trigger slow after insert on slow deferrable initially deferred"
    " for each row execute function pg_temp.linger()"
)


async def create_slow_table(conn: Connection, trigger: str) -> None:
    await conn.execute(SLOW_TABLE.encode())
    await conn.execute(trigger.encode())
    await conn.commit()


async def execute(conn: Connection) -> None:
    await conn.execute("select pg_sleep(%s)", [FOREVER])


async def execute_under_autocommit(conn: Connection) -> None:
    await conn.set_autocommit(True)
    await conn.execute("select pg_sleep(%s)", [FOREVER])


async def execute_several(conn: Connection) -> None:
    await conn.execute(f"select 1; select pg_sleep({FOREVER}); select 2".encode())


async def executemany(conn: Connection) -> None:
    await conn.cursor().executemany("select pg_sleep(%s)", [(0,), (FOREVER,), (FOREVER,)])


async def executemany_returning(conn: Connection) -> None:
    await conn.cursor().executemany("select pg_sleep(%s)", [(0,), (FOREVER,)], returning=True)


async def commit(conn: Connection) -> None:
    await create_slow_table(conn, SLOW_COMMIT)
    await conn.execute("insert into slow values (1)")
    await conn.commit()


async def end_of_transaction_block(conn: Connection) -> None:
    await create_slow_table(conn, SLOW_COMMIT)
    async with conn.transaction():
        await conn.execute("insert into slow values (1)")


async def inside_transaction_blocks(conn: Connection) -> None:
    async with conn.transaction(), conn.transaction():
        await execute(conn)


async def pipeline(conn: Connection) -> None:
    async with conn.pipeline():
        await conn.execute("select 1")
        cursor = await conn.execute("select pg_sleep(%s)", [FOREVER])
        await conn.execute("select 2")
        await cursor.fetchall()


async def end_of_pipeline(conn: Connection) -> None:
    async with conn.pipeline():
        await conn.execute("select pg_sleep(%s)", [FOREVER])


async def pipeline_in_transaction_block(conn: Connection) -> None:
    async with conn.transaction(), conn.pipeline() as pipe:
        await conn.execute("select pg_sleep(%s)", [FOREVER])
        await pipe.sync()


async def copy_out(conn: Connection) -> None:
    rows = f"select i, case when i > 1000 then pg_sleep({FOREVER}) end from generate_series(1, 2000) i"
    async with conn.cursor().copy(f"copy ({rows}) to stdout".encode()) as copy:
        async for _ in copy:
            pass


async def start_of_copy_out(conn: Connection) -> None:
    async with conn.cursor().copy(f"copy (select pg_sleep({FOREVER})) to stdout".encode()) as copy:
        await copy.read()


async def copy_in(conn: Connection) -> None:
    await create_slow_table(conn, SLOW_INSERT)
    async with conn.cursor().copy("copy slow from stdin") as copy:
        # More than socket buffers hold: it is in the middle of a write that it ends up waiting.
        while True:
            await copy.write(b"1\n" * 50_000)


async def end_of_copy_in(conn: Connection) -> None:
    await create_slow_table(conn, SLOW_INSERT)
    async with conn.cursor().copy("copy slow from stdin") as copy:
        await copy.write_row([1])


async def read_stream(conn: Connection) -> None:
    rows = f"select i, case when i > 10 then pg_sleep({FOREVER}) end from generate_series(1, 20) i"
    async for _ in stream(conn, rows):
        pass


async def read_stream_by_chunks(conn: Connection) -> None:
    rows = f"select i, case when i > 10 then pg_sleep({FOREVER}) end from generate_series(1, 20) i"
    async for _ in stream(conn, rows, size=3):
        pass


async def read_server_cursor(conn: Connection) -> None:
    async with conn.cursor("slow_cursor") as cursor:
        await cursor.execute(f"select pg_sleep({FOREVER})".encode())
        await cursor.fetchone()


# These are to be cancelled in their user's own code, between two pieces of what the server sends or takes: they set
# the event when they are there.


async def pause_in_stream(conn: Connection, half_way: asyncio.Event) -> None:
    async with aclosing(stream(conn, "select repeat('x', 1000) from generate_series(1, 1000000)")) as rows:
        async for _ in rows:
            half_way.set()
            await asyncio.Event().wait()


async def pause_in_stream_by_chunks(conn: Connection, half_way: asyncio.Event) -> None:
    async with aclosing(stream(conn, "select repeat('x', 1000) from generate_series(1, 1000000)", size=100)) as rows:
        async for _ in rows:
            half_way.set()
            await asyncio.Event().wait()


async def pause_in_copy_out(conn: Connection, half_way: asyncio.Event) -> None:
    rows = "copy (select repeat('x', 1000) from generate_series(1, 1000000)) to stdout"
    async with conn.cursor().copy(rows) as copy:
        await copy.read()
        half_way.set()
        await asyncio.Event().wait()


async def pause_in_copy_in(conn: Connection, half_way: asyncio.Event) -> None:
    await conn.execute("create temp table received (id int)")
    async with conn.cursor().copy("copy received from stdin") as copy:
        await copy.write_row([1])
        half_way.set()
        await asyncio.Event().wait()


async def pause_in_transaction_block(conn: Connection, half_way: asyncio.Event) -> None:
    async with conn.transaction():
        half_way.set()
        await asyncio.Event().wait()


async def pause_in_nested_transaction_block(conn: Connection, half_way: asyncio.Event) -> None:
    async with conn.transaction(), conn.transaction():
        half_way.set()
        await asyncio.Event().wait()


async def pause_in_pipeline(conn: Connection, half_way: asyncio.Event) -> None:
    async with conn.pipeline():
        await conn.execute("select 1")
        half_way.set()
        await asyncio.Event().wait()


async def pause_in_synced_pipeline(conn: Connection, half_way: asyncio.Event) -> None:
    async with conn.pipeline() as pipe:
        await conn.execute("select 1")
        await pipe.sync()
        half_way.set()
        await asyncio.Event().wait()


PAUSES: list[Pause] = [
    pause_in_stream,
    pause_in_stream_by_chunks,
    pause_in_copy_out,
    pause_in_copy_in,
    pause_in_transaction_block,
    pause_in_nested_transaction_block,
    pause_in_pipeline,
    pause_in_synced_pipeline,
]


OPERATIONS: list[Operation] = [
    execute,
    execute_under_autocommit,
    execute_several,
    executemany,
    executemany_returning,
    commit,
    end_of_transaction_block,
    inside_transaction_blocks,
    pipeline,
    end_of_pipeline,
    pipeline_in_transaction_block,
    copy_out,
    start_of_copy_out,
    copy_in,
    end_of_copy_in,
    read_stream,
    read_stream_by_chunks,
    read_server_cursor,
]


# Each runs `work` until `busy()`, then cancels it in its own way, and fails unless it ends cancelled.


async def task_cancel(work: Work, busy: Callable[[], bool]) -> None:
    task = asyncio.create_task(work())
    await eventually(lambda: busy() or task.done(), timeout=30)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()


async def task_cancel_again_and_again(work: Work, busy: Callable[[], bool]) -> None:
    task = asyncio.create_task(work())
    await eventually(lambda: busy() or task.done(), timeout=30)
    task.cancel()
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()


async def asyncio_timeout(work: Work, busy: Callable[[], bool]) -> None:
    timeouts: list[asyncio.Timeout] = []

    async def run() -> None:
        async with asyncio.timeout(None) as timeout:
            timeouts.append(timeout)
            await work()

    task = asyncio.create_task(run())
    await eventually(lambda: busy() or task.done(), timeout=30)
    timeouts[0].reschedule(asyncio.get_running_loop().time())
    await asyncio.wait([task])
    assert isinstance(task.exception(), TimeoutError), task.exception()
    assert task.cancelling() == 0


async def anyio_scope(work: Work, busy: Callable[[], bool]) -> None:
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await work()

    task = asyncio.create_task(run())
    await eventually(lambda: busy() or task.done(), timeout=30)
    scope.cancel()
    await task
    assert scope.cancelled_caught


async def anyio_deadline_in_task_group(work: Work, busy: Callable[[], bool]) -> None:
    caught: list[bool] = []
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await work()
        caught.append(scope.cancelled_caught)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await eventually(lambda: busy() or bool(caught), timeout=30)
        scope.deadline = anyio.current_time()
    assert caught == [True]


WAYS: list[Way] = [
    task_cancel,
    task_cancel_again_and_again,
    asyncio_timeout,
    anyio_scope,
    anyio_deadline_in_task_group,
]
