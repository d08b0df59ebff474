"""Opening, closing, and what becomes of who holds a connection or waits for one meanwhile."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool, PoolClosed, PoolError, WrongLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kit.servers import Admin
    from psycopg import AsyncConnection


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def sleep_on_server(pool: Pool[Any]) -> None:
    async with pool.acquire() as connection:
        await connection.execute("select pg_sleep(60)")


# --- opening ------------------------------------------------------------------------------------------------


async def test_before_it_is_opened_a_pool_gives_nothing_and_says_what_to_do(dsn: str) -> None:
    pool = Pool(dsn)
    with pytest.raises(PoolClosed, match=r"is not open: use `async with Pool.*`, or `await pool.open\(\)`"):
        await pool.acquire()
    with pytest.raises(PoolClosed):
        async with pool.acquire():
            pass
    with pytest.raises(PoolClosed):
        async with pool.transaction():
            pass
    with pytest.raises(PoolClosed):
        pool.drain()
    with pytest.raises(PoolClosed):
        await pool.check()
    await pool.close()  # which a closed pool is used to


async def test_opening_an_open_pool_changes_nothing(dsn: str, admin: Admin, application_name: str) -> None:
    async with Pool(dsn, min_size=2) as pool:
        pids = admin.pids(application_name)
        await pool.open()
        async with pool.acquire():
            await pool.open()
        assert admin.pids(application_name) == pids


@on_both_loops
async def test_who_opens_it_at_the_same_time_waits_for_the_same_opening(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn, min_size=3)

    async def open_and_count() -> int:
        await pool.open()
        return admin.sessions(application_name)

    assert await asyncio.gather(*(open_and_count() for _ in range(5))) == [3] * 5
    await pool.close()


async def test_a_connection_can_be_asked_for_while_the_pool_is_being_opened(dsn: str) -> None:
    pool = Pool(dsn, min_size=3)
    await pool.open(wait=False)
    async with pool.acquire() as connection:
        assert (await connection.execute("select 1")).rownumber == 0
    await pool.open()
    assert pool.stats().size == 3
    await pool.close()


@on_both_loops
async def test_an_error_in_the_block_passes_through_and_the_pool_is_closed(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with pytest.raises(LookupError, match="of the user"):
        async with Pool(dsn, min_size=2) as pool, pool.acquire() as connection:
            await connection.execute("select 1")
            raise LookupError("of the user")
    assert admin.sessions(application_name) == 0


async def test_the_repr_says_where_in_its_life_the_pool_is(dsn: str) -> None:
    pool = Pool(dsn, name="orders")
    assert repr(pool) == "<Pool 'orders' closed>"
    await pool.open(wait=False)
    assert "opening" in repr(pool)
    await pool.open()
    assert "'orders' open" in repr(pool)
    connection = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    assert "closing, 1 in use" in repr(pool)
    await pool.release(connection)
    await closing
    assert "closed" in repr(pool)


# --- closing ------------------------------------------------------------------------------------------------


@on_both_loops
async def test_when_close_returns_the_server_has_no_session_left(dsn: str, admin: Admin, application_name: str) -> None:
    pool = Pool(dsn, min_size=5)
    await pool.open()
    await pool.close()
    assert admin.sessions(application_name) == 0


@on_both_loops
async def test_close_waits_for_connections_in_use(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(dsn, min_size=3)
    await pool.open()
    async with pool.acquire() as connection:
        closing = asyncio.create_task(pool.close(timeout=60))
        await eventually(lambda: admin.sessions(application_name) == 1)  # the idle ones are gone at once
        assert (await connection.execute("select 1")).rownumber == 0
        assert not closing.done()
    await closing
    assert admin.sessions(application_name) == 0
    assert warnings_of(caplog) == []


@on_both_loops
async def test_close_shuts_down_what_is_not_returned_in_time_and_names_who_holds_it(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(dsn)
    await pool.open()
    holder = asyncio.create_task(sleep_on_server(pool))
    forgotten = await pool.acquire()
    await eventually(lambda: "active" in admin.states(application_name))
    await pool.close(timeout=0.1)
    assert admin.sessions(application_name) == 0
    with pytest.raises(psycopg.OperationalError):
        await holder
    (warning,) = warnings_of(caplog)
    assert "connections in use (2)" in warning
    for function in (sleep_on_server, test_close_shuts_down_what_is_not_returned_in_time_and_names_who_holds_it):
        assert f"in {function.__qualname__}" in warning
    first_line = sleep_on_server.__code__.co_firstlineno
    assert f"{__file__}:{first_line + 1} in sleep_on_server" in warning
    with pytest.raises(psycopg.OperationalError):
        await forgotten.execute("select 1")
    with suppress(PoolError):
        await pool.release(forgotten)


@on_both_loops
async def test_close_without_a_timeout_to_wait_shuts_down_at_once(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn)
    await pool.open()
    holder = asyncio.create_task(sleep_on_server(pool))
    await eventually(lambda: "active" in admin.states(application_name))
    await pool.close(timeout=0)
    assert admin.sessions(application_name) == 0
    with pytest.raises(psycopg.OperationalError):
        await holder


@on_both_loops
async def test_who_waits_is_told_at_once_that_the_pool_is_closed(dsn: str) -> None:
    pool = Pool(dsn, max_size=1)
    await pool.open()
    connection = await pool.acquire()
    waiting = [asyncio.ensure_future(pool.acquire(timeout=None)) for _ in range(3)]
    await eventually(lambda: pool.stats().waiting == 3)
    closing = asyncio.create_task(pool.close())
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, PoolClosed)
    with pytest.raises(PoolClosed):
        await pool.acquire()
    assert not closing.done()  # the connection is still out
    await pool.release(connection)
    await closing


async def test_who_opens_is_told_that_it_was_closed_meanwhile(dsn: str) -> None:
    never = asyncio.Event()

    async def conninfo() -> str:
        await never.wait()
        raise AssertionError

    pool = Pool(conninfo)
    opening = asyncio.create_task(pool.open())
    await eventually(lambda: pool.stats().connecting == 1)
    await pool.close()
    with pytest.raises(PoolClosed, match="closed while it was being opened"):
        await opening


async def test_a_pool_that_is_closing_does_not_open(dsn: str) -> None:
    pool = Pool(dsn)
    await pool.open()
    connection = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    with pytest.raises(PoolClosed, match=r"await close\(\) before"):
        await pool.open()
    await pool.release(connection)
    await closing


@on_both_loops
async def test_closing_again_or_at_the_same_time_is_the_same_closing(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn, min_size=2)
    await pool.open()
    connection = await pool.acquire()
    closings = [asyncio.create_task(pool.close(timeout=60)) for _ in range(3)]
    await asyncio.sleep(0)
    await pool.release(connection)
    await asyncio.gather(*closings)
    await pool.close()
    assert admin.sessions(application_name) == 0


async def test_the_shorter_of_two_timeouts_shuts_down(dsn: str) -> None:
    pool = Pool(dsn)
    await pool.open()
    connection = await pool.acquire()
    patient = asyncio.create_task(pool.close(timeout=None))
    await asyncio.sleep(0)
    await pool.close(timeout=0)
    await patient
    assert connection.closed


@on_both_loops
async def test_a_close_that_is_cancelled_goes_on_by_itself_and_shuts_nothing_down(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(dsn, min_size=3)
    await pool.open()
    async with pool.acquire() as connection:
        closing = asyncio.create_task(pool.close(timeout=0.05))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await eventually(lambda: admin.sessions(application_name) == 1)
        with pytest.raises(PoolClosed):
            await pool.acquire()
        assert (await connection.execute("select 1")).rownumber == 0
    await eventually(lambda: admin.sessions(application_name) == 0)
    await eventually(lambda: "closed" in repr(pool))
    assert warnings_of(caplog) == []


async def test_a_connection_that_is_returned_after_the_pool_shut_it_down_harms_nobody(dsn: str) -> None:
    pool = Pool(dsn, max_size=1)
    await pool.open()
    connection = await pool.acquire()
    await pool.close(timeout=0)
    async with pool:
        with suppress(PoolError):
            await pool.release(connection)
        async with pool.acquire() as other:
            assert other is not connection
            assert (await other.execute("select 1")).rownumber == 0
        assert pool.stats().idle == 1


# --- another thread's event loop ----------------------------------------------------------------------------


async def acquire(pool: Pool[Any], _: AsyncConnection[Any]) -> None:
    await pool.acquire()


async def enter_transaction(pool: Pool[Any], _: AsyncConnection[Any]) -> None:
    await pool.transaction().__aenter__()


async def release(pool: Pool[Any], connection: AsyncConnection[Any]) -> None:
    await pool.release(connection)


async def execute(_: Pool[Any], connection: AsyncConnection[Any]) -> None:
    await connection.execute("select 1")


async def open_again(pool: Pool[Any], _: AsyncConnection[Any]) -> None:
    await pool.open()


async def close(pool: Pool[Any], _: AsyncConnection[Any]) -> None:
    await pool.close()


async def drain(pool: Pool[Any], _: AsyncConnection[Any]) -> None:
    pool.drain()


@pytest.mark.parametrize("use", [acquire, enter_transaction, release, execute, open_again, close, drain])
async def test_another_threads_event_loop_is_refused_and_the_pool_unharmed(
    dsn: str, use: Callable[[Pool[Any], AsyncConnection[Any]], Awaitable[None]]
) -> None:
    async with Pool(dsn, min_size=1, max_size=2) as pool:
        connection = await pool.acquire()

        async def elsewhere() -> None:
            with pytest.raises(WrongLoop):
                await use(pool, connection)

        await asyncio.to_thread(asyncio.run, elsewhere())
        await pool.release(connection)
        async with pool.acquire() as first, pool.acquire() as second:
            for each in (first, second):
                assert (await each.execute("select 1")).rownumber == 0
        await eventually(lambda: pool.stats().idle == 2)
