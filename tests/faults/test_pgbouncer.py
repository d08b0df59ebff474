"""The pools through a real PgBouncer: in transaction mode with `prepare_threshold=None`, and in its other modes."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.pgbouncer import PgBouncer
from kit.waiting import eventually

from asyncpool import (
    CommitOutcomeUnknown,
    CommitStatus,
    Pool,
    StatementOutcomeUnknown,
    SyncPool,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.pgbouncer import PoolMode
    from kit.servers import Admin, Server

pytestmark = pytest.mark.usefixtures("no_bug_reported")

# Fewer server connections than the pools have: statements of one connection go now to this one, now to that.
SERVER_CONNECTIONS = 3
MAX_SIZE = 6


@pytest.fixture
def bouncer(server: Server) -> Iterator[PgBouncer]:
    """In transaction mode."""
    with PgBouncer(server.dsn, "transaction", settings={"default_pool_size": SERVER_CONNECTIONS}) as bouncer:
        yield bouncer


@pytest.fixture
def bounced_dsn(bouncer: PgBouncer, application_name: str) -> str:
    return bouncer.dsn(application_name=application_name)


def pool_of(dsn: str, **options: Any) -> Pool[Any]:
    given: dict[str, Any] = {"prepare_threshold": None, "min_size": 1, "max_size": MAX_SIZE} | options
    return Pool(dsn, **given)


async def process(conn: psycopg.AsyncConnection[Any]) -> int:
    cursor = await conn.execute("select pg_backend_pid()")
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


@on_both_loops
async def test_blocks_of_more_connections_than_the_pooler_has_are_transactions_each_on_one_server_connection(
    bounced_dsn: str, admin: Admin, table: str
) -> None:
    async def insert(number: int, pool: Pool[Any]) -> None:
        async with pool.acquire() as conn:
            first = await process(conn)
            await conn.execute(f"insert into {table} values (%s)".encode(), [number])
            await asyncio.sleep(0)
            assert await process(conn) == first

    async with pool_of(bounced_dsn) as pool:
        await asyncio.gather(*(insert(number, pool) for number in range(100)))
    assert admin.value(f"select array_agg(id order by id) from {table}") == list(range(100))


async def test_a_block_that_fails_is_rolled_back_and_its_connection_serves_the_next(
    bounced_dsn: str, admin: Admin, table: str
) -> None:
    async with pool_of(bounced_dsn, max_size=1) as pool:
        for number in range(5):
            with pytest.raises(ZeroDivisionError):
                async with pool.acquire() as conn:
                    await conn.execute(f"insert into {table} values (%s)".encode(), [number])
                    raise ZeroDivisionError
        conn = await pool.acquire()
        await conn.execute(f"insert into {table} values (7)".encode())
        await pool.release(conn)  # with its transaction open
        assert await pool.fetchval("select 1") == 1
        assert not any(pool.stats().closes.values())
    assert admin.value(f"select count(*) from {table}") == 0


@on_both_loops
async def test_one_shot_statements_get_each_its_own_answer(bounced_dsn: str, admin: Admin, table: str) -> None:
    async with pool_of(bounced_dsn) as pool:
        answers = await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(1000)))
        assert answers == list(range(1000))
        await asyncio.gather(
            *(pool.execute(f"insert into {table} values (%s)".encode(), [number]) for number in range(1000))
        )
        await pool.executemany(f"insert into {table} values (%s)".encode(), [(number,) for number in range(1000, 1200)])
    assert admin.value(f"select array_agg(id order by id) from {table}") == list(range(1200))


async def test_errors_of_one_shot_statements_reach_their_callers_alone(bounced_dsn: str) -> None:
    async with pool_of(bounced_dsn) as pool:
        answers = await asyncio.gather(
            *(pool.fetchval("select 10 / %s::int", [number % 5]) for number in range(300)), return_exceptions=True
        )
        for number, answer in enumerate(answers):
            if number % 5:
                assert answer == 10 // (number % 5)
            else:
                assert isinstance(answer, psycopg.errors.DivisionByZero)


async def test_blocks_and_one_shot_statements_at_the_same_time(bounced_dsn: str) -> None:
    async def in_block(number: int, pool: Pool[Any]) -> int:
        async with pool.transaction() as conn:
            cursor = await conn.execute("select %s::int", [number])
            row = await cursor.fetchone()
            return int(row[0])

    async with pool_of(bounced_dsn) as pool:
        calls = [
            in_block(number, pool) if number % 3 == 0 else pool.fetchval("select %s::int", [number])
            for number in range(300)
        ]
        assert await asyncio.gather(*calls) == list(range(300))


async def test_a_cancelled_statement_ends_on_the_server_and_keeps_its_connection(
    bounced_dsn: str, admin: Admin, application_name: str
) -> None:
    async with pool_of(bounced_dsn, max_size=1) as pool:

        async def sleep() -> None:
            async with pool.acquire() as conn:
                await conn.execute("select pg_sleep(100)")

        task = asyncio.create_task(sleep())
        await eventually(lambda: admin.asleep(application_name) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pool.fetchval("select 1") == 1
        assert admin.asleep(application_name) == 0
        assert not any(pool.stats().closes.values())


async def test_idle_connections_pass_their_check(bounced_dsn: str) -> None:
    async with pool_of(bounced_dsn, min_size=3, check_interval=0) as pool:
        for _ in range(10):
            async with pool.acquire() as conn:
                await process(conn)
        await pool.check()
        assert not any(pool.stats().closes.values())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_after_a_restart_of_the_pooler_the_first_request_is_served(
    bouncer: PgBouncer, bounced_dsn: str, how: signal.Signals
) -> None:
    async with pool_of(bounced_dsn, min_size=4) as pool:
        await eventually(lambda: pool.stats().idle == 4)
        await asyncio.to_thread(bouncer.restart, how)
        async with pool.acquire() as conn:
            assert await process(conn) > 0
        assert await pool.fetchval("select 1") == 1
        await eventually(lambda: pool.stats().idle == 4)


async def test_a_pooler_that_is_killed_under_one_shot_statements_loses_no_row_that_was_acknowledged(
    bouncer: PgBouncer, bounced_dsn: str, admin: Admin, table: str
) -> None:
    acknowledged: list[int] = []
    unknown: list[int] = []

    async def insert(number: int, pool: Pool[Any]) -> None:
        try:
            await pool.execute(f"insert into {table} values (%s)".encode(), [number])
        except StatementOutcomeUnknown:
            unknown.append(number)
        else:
            acknowledged.append(number)

    async with pool_of(bounced_dsn) as pool:
        inserts = [asyncio.create_task(insert(number, pool)) for number in range(2000)]
        await eventually(lambda: len(acknowledged) > 100)
        await asyncio.to_thread(bouncer.restart, signal.SIGKILL)
        await asyncio.gather(*inserts)
        assert len(acknowledged) + len(unknown) == 2000
        stored = set(admin.value(f"select array_agg(id) from {table}"))
    assert stored >= set(acknowledged)
    assert stored <= set(acknowledged) | set(unknown)


async def test_a_commit_under_which_the_pooler_is_killed_is_unknown_and_its_status_can_be_asked_for(
    bouncer: PgBouncer, bounced_dsn: str, admin: Admin, table: str, application_name: str
) -> None:
    admin.execute(
        f"create function {table}_slow() returns trigger language plpgsql as"
        " $$ begin perform pg_sleep(0.5); return null; end $$"
    )
    admin.execute(
        f"create constraint trigger slow after insert on {table} deferrable initially deferred"
        f" for each row execute function {table}_slow()"
    )
    try:
        async with pool_of(bounced_dsn) as pool:

            async def insert() -> None:
                async with pool.transaction(track_outcome=True) as conn:
                    await conn.execute(f"insert into {table} values (1)".encode())

            task = asyncio.create_task(insert())
            await eventually(lambda: admin.asleep(application_name) == 1)
            await asyncio.to_thread(bouncer.restart, signal.SIGKILL)
            with pytest.raises(CommitOutcomeUnknown) as unknown:
                await task

            async def outcome() -> CommitStatus | None:
                status = await pool.commit_status(unknown.value)
                return None if status is CommitStatus.IN_PROGRESS else status

            status = await eventually(outcome)
            rows = admin.value(f"select count(*) from {table}")
            assert status is (CommitStatus.COMMITTED if rows else CommitStatus.ABORTED)
    finally:
        admin.execute(f"drop trigger slow on {table}")
        admin.execute(f"drop function {table}_slow")


async def test_server_connections_that_end_behind_the_pooler_cost_idle_connections_nothing(
    bounced_dsn: str, admin: Admin, application_name: str
) -> None:
    async with pool_of(bounced_dsn, min_size=3) as pool:
        assert await pool.fetchval("select 1") == 1
        admin.terminate(*admin.pids(application_name))
        answers = await asyncio.gather(*(pool.fetchval("select %s::int", [n], retry=True) for n in range(20)))
        assert answers == list(range(20))


def test_threads_share_a_blocking_pool_through_the_pooler(bounced_dsn: str, admin: Admin, table: str) -> None:
    options: dict[str, Any] = {"prepare_threshold": None, "max_size": MAX_SIZE}
    with SyncPool(bounced_dsn, **options) as pool, ThreadPoolExecutor(16) as threads:

        def insert(number: int) -> int:
            with pool.acquire() as conn:
                conn.execute(f"insert into {table} values (%s)".encode(), [number])
            return int(pool.fetchval("select %s::int", [number]))

        assert list(threads.map(insert, range(200))) == list(range(200))
    assert admin.value(f"select array_agg(id order by id) from {table}") == list(range(200))


def test_a_blocking_pool_outlives_a_restart_of_the_pooler(bouncer: PgBouncer, bounced_dsn: str) -> None:
    options: dict[str, Any] = {"prepare_threshold": None, "min_size": 2}
    with SyncPool(bounced_dsn, **options) as pool:
        assert pool.fetchval("select 1") == 1
        bouncer.restart()
        assert pool.fetchval("select 2", retry=True) == 2
        with pool.acquire() as conn:
            assert conn.execute("select 3").fetchone() == (3,)


# --- the other modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["rollback", "session", "discard"])
async def test_in_session_mode_a_session_is_ones_own(server: Server, reset: Any) -> None:
    with PgBouncer(server.dsn, "session") as bouncer:
        async with pool_of(bouncer.dsn(), max_size=2, prepare_threshold=0, reset=reset) as pool:
            for number in range(20):
                async with pool.acquire() as conn:
                    cursor = await conn.execute("select %s::int, current_setting('geqo')", [number])
                    assert await cursor.fetchone() == (number, "on")
                    if reset != "rollback":
                        await conn.execute("set geqo = off")
            answers = await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(100)))
            assert answers == list(range(100))
            assert not any(pool.stats().closes.values())


async def test_in_statement_mode_one_shot_statements_work_and_leases_under_autocommit(
    server: Server, admin: Admin, table: str
) -> None:
    with PgBouncer(server.dsn, "statement", settings={"default_pool_size": SERVER_CONNECTIONS}) as bouncer:
        async with pool_of(bouncer.dsn(), autocommit=True) as pool:
            await asyncio.gather(
                *(pool.execute(f"insert into {table} values (%s)".encode(), [number]) for number in range(200))
            )
            async with pool.acquire() as conn:
                await conn.execute(f"insert into {table} values (200)".encode())
            assert not any(pool.stats().closes.values())
    assert admin.value(f"select array_agg(id order by id) from {table}") == list(range(201))


@pytest.mark.parametrize("pool_mode", ["session", "transaction"])
async def test_more_callers_than_server_connections_wait_in_the_pooler(server: Server, pool_mode: PoolMode) -> None:
    size = MAX_SIZE if pool_mode == "session" else 1
    with PgBouncer(server.dsn, pool_mode, settings={"default_pool_size": size}) as bouncer:
        async with pool_of(bouncer.dsn()) as pool:

            async def work() -> int:
                async with pool.acquire() as conn:
                    return await process(conn)

            assert len(set(await asyncio.gather(*(work() for _ in range(50))))) <= size
