"""`pool.release()`: what it does with what comes back, and the mistakes it tells from each other."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually
from psycopg import sql

from asyncpool import Pool, PoolError, WrongLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]


async def insert(conn: Connection, table: str) -> None:
    await conn.execute(sql.SQL("insert into {} values (1)").format(sql.Identifier(table)))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "asyncpool"]


async def assert_unharmed(pool: Pool[Connection]) -> None:
    """All its places can be taken, used and given back."""
    conns = [await pool.acquire(timeout=10) for _ in range(pool.stats().max_size)]
    for conn in conns:
        await conn.execute("select 1")
        await conn.rollback()
    for conn in conns:
        await pool.release(conn)
    assert pool.stats().leased == 0


def in_another_loop(work: Callable[[], Awaitable[object]]) -> BaseException | None:
    """What `work` raises in a thread with an event loop of its own."""

    async def run() -> None:
        await work()

    with ThreadPoolExecutor(max_workers=1) as threads:
        return threads.submit(asyncio.run, run()).exception()


# --- in a transaction ---------------------------------------------------------------------------------------


async def test_a_connection_released_in_a_transaction_is_rolled_back(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        await insert(conn, table)
        await pool.release(conn)
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert admin.value(f"select count(*) from {table}") == 0


async def test_the_rollback_needs_no_further_call_of_the_user(dsn: str, admin: Admin, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        await insert(conn, table)
        await pool.release(conn)
        await eventually(lambda: pool.stats().idle == 1)
        locks = "select count(*) from pg_locks where relation = %s::regclass"
        assert admin.value(locks, [table]) == 0


async def test_a_release_in_a_transaction_warns_once_and_names_the_acquire_site(
    dsn: str, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        for _ in range(3):
            conn = await pool.acquire()
            await insert(conn, table)
            await pool.release(conn)
    [warning] = warnings_of(caplog)
    assert "transaction" in warning
    assert "test_release.py" in warning
    assert "test_a_release_in_a_transaction_warns_once" in warning


async def test_a_block_that_fails_in_its_transaction_is_no_reason_to_warn(
    dsn: str, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        with pytest.raises(LookupError):
            async with pool.acquire() as conn:
                await insert(conn, table)
                raise LookupError
    assert warnings_of(caplog) == []


async def test_a_connection_released_in_a_failed_transaction_is_used_again(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("select 1/0")
        await pool.release(conn)
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            await conn.execute("select 1")


async def test_a_release_outside_a_transaction_is_silent_and_immediate(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        await conn.execute("select 1")
        await conn.commit()
        await pool.release(conn)
        assert pool.stats().idle == 1
    assert warnings_of(caplog) == []


async def test_a_release_acts_without_being_awaited(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        for _ in range(3):
            conn = await pool.acquire(timeout=0)
            finished = pool.release(conn)
            assert pool.stats().idle == 1
            await finished
            await finished


async def test_a_cancellation_cannot_lose_a_release(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:

        async def hold() -> None:
            conn = await pool.acquire()
            try:
                await asyncio.Event().wait()
            finally:
                await pool.release(conn)

        task = asyncio.create_task(hold())
        await eventually(lambda: pool.stats().leased == 1)
        task.cancel()
        await asyncio.wait([task])
        await eventually(lambda: pool.stats().idle == 1)


async def test_a_released_connection_goes_straight_to_who_waits_longest(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        served: list[int] = []

        async def wait_in_line(number: int) -> None:
            async with pool.acquire() as conn:
                await conn.execute("select 1")
                served.append(number)

        tasks: list[asyncio.Task[None]] = []
        for number in range(4):
            tasks.append(asyncio.create_task(wait_in_line(number)))
            await eventually(lambda: pool.stats().waiting == len(tasks))
        await pool.release(conn)
        await asyncio.gather(*tasks)
        assert served == [0, 1, 2, 3]


# --- mistakes -----------------------------------------------------------------------------------------------


async def test_a_second_release_raises_and_changes_nothing(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        conn = await pool.acquire()
        await pool.release(conn)
        with pytest.raises(PoolError, match="released already"):
            pool.release(conn)
        await assert_unharmed(pool)


async def test_a_connection_of_another_pool_is_refused_by_both_ways_of_returning_it(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as mine, Pool(dsn, max_size=1) as other:
        conn = await other.acquire()
        with pytest.raises(PoolError, match="not of this pool"):
            mine.release(conn)
        await assert_unharmed(mine)
        await conn.execute("select 1")
        await conn.rollback()
        await other.release(conn)
        await assert_unharmed(other)


async def test_a_connection_of_no_pool_is_refused(dsn: str) -> None:
    async with (
        Pool(dsn, max_size=1) as pool,
        await psycopg.AsyncConnection.connect(dsn) as conn,
    ):
        with pytest.raises(PoolError, match="not of this pool"):
            pool.release(conn)
        assert not conn.closed
        await assert_unharmed(pool)


async def test_what_is_no_connection_is_refused(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        for nonsense in (None, "a connection", pool):
            with pytest.raises(PoolError, match="not of this pool"):
                pool.release(nonsense)  # type: ignore[arg-type]  # the mistake in question
        await assert_unharmed(pool)


USES: dict[str, Callable[[Connection], Awaitable[object]]] = {
    "execute": lambda conn: conn.execute("select 1"),
    "executemany": lambda conn: conn.cursor().executemany("select %s", [(1,), (2,)]),
    "commit": lambda conn: conn.commit(),
    "rollback": lambda conn: conn.rollback(),
    "transaction": lambda conn: conn.transaction().__aenter__(),
    "pipeline": lambda conn: conn.pipeline().__aenter__(),
    "copy": lambda conn: conn.cursor().copy("copy (select 1) to stdout").__aenter__(),
    "stream": lambda conn: anext(aiter(conn.cursor().stream("select 1"))),
    "notifies": lambda conn: anext(aiter(conn.notifies(timeout=0.1))),
    "set_autocommit": lambda conn: conn.set_autocommit(True),
    "tpc_begin": lambda conn: conn.tpc_begin("some transaction"),
}


@pytest.mark.parametrize("use", USES)
async def test_use_after_release_raises_and_leaves_the_connection_as_it_was(dsn: str, use: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        await pool.release(conn)
        with pytest.raises(PoolError, match="released to its pool"):
            await USES[use](conn)
        async with pool.acquire() as again:
            assert again.info.backend_pid == pid
            assert again.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert not again.autocommit
            await again.execute("select 1")


async def test_a_cursor_kept_beyond_the_release_raises_too(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            cursor = conn.cursor()
            await cursor.execute("select 1")
        with pytest.raises(PoolError, match="released to its pool"):
            await cursor.execute("select 2")
        assert await cursor.fetchall() == [(1,)]
        await assert_unharmed(pool)


async def test_a_connection_released_while_a_statement_runs_on_it_is_closed(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        pid = conn.info.backend_pid
        task = asyncio.create_task(conn.execute("select pg_sleep(600)"))
        active = psycopg.pq.TransactionStatus.ACTIVE
        await eventually(lambda: conn.info.transaction_status == active)
        await pool.release(conn)
        with pytest.raises(psycopg.OperationalError):
            await asyncio.wait_for(task, 30)
        async with pool.acquire() as conn:
            assert conn.info.backend_pid != pid


# --- another event loop -------------------------------------------------------------------------------------


async def test_another_loop_cannot_acquire(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:

        async def acquire() -> None:
            await pool.acquire()

        assert isinstance(in_another_loop(acquire), WrongLoop)
        await assert_unharmed(pool)


async def test_another_loop_cannot_use_or_release_a_connection(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        assert isinstance(in_another_loop(lambda: conn.execute("select 1")), WrongLoop)

        async def release() -> None:
            await pool.release(conn)

        assert isinstance(in_another_loop(release), WrongLoop)
        assert pool.stats().leased == 1
        await conn.execute("select 1")
        await conn.rollback()
        await pool.release(conn)
        await assert_unharmed(pool)


async def test_a_thread_without_a_loop_cannot_release(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        with pytest.raises(WrongLoop):
            await asyncio.to_thread(pool.release, conn)
        await pool.release(conn)
        await assert_unharmed(pool)


async def test_another_loop_cannot_change_or_close_the_pool(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:

        async def resize() -> None:
            pool.resize(0, 5)

        async def drain() -> None:
            pool.drain()

        for work in (resize, drain, pool.check, pool.close, pool.open):
            assert isinstance(in_another_loop(work), WrongLoop), work
        assert pool.stats().max_size == 1
        await assert_unharmed(pool)
