"""`configure`, `check`, `setup` and `reset` that go wrong: that connection is closed, and the pool goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import psycopg
import pytest
from kit.waiting import eventually
from psycopg.rows import dict_row

from asyncpool import CloseReason, Pool, PoolError, PoolTimeout

from .client_state import Connection, first_value

if TYPE_CHECKING:
    from kit.servers import Admin

Callback: TypeAlias = Callable[[Connection], Awaitable[object]]

# What a callable may take here, in seconds, where it is meant to fail by taking too long.
# Seconds. A callable that does nothing wrong takes less, on a busy machine too.
SHORT = 0.5


class Misdeed:
    """A callable that does its harm the first time, and is well-behaved from then on."""

    def __init__(self, harm: Callback) -> None:
        self.harm: Callback | None = harm
        self.calls = 0

    async def __call__(self, conn: Connection) -> None:
        self.calls += 1
        harm, self.harm = self.harm, None
        if harm is not None:
            await harm(conn)


async def raise_(conn: Connection) -> None:
    raise LookupError("mine")


async def raise_the_servers_error(conn: Connection) -> None:
    await conn.execute("select 1/0")


async def hang(conn: Connection) -> None:
    await asyncio.Event().wait()


async def hang_in_a_statement(conn: Connection) -> None:
    await conn.execute("select pg_sleep(600)")


async def hang_in_spite_of_cancellation(conn: Connection) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await asyncio.Event().wait()


async def leave_a_transaction(conn: Connection) -> None:
    await conn.execute("select 1")


async def leave_a_failed_transaction(conn: Connection) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1/0")


async def leave_a_pipeline(conn: Connection) -> None:
    await conn.pipeline().__aenter__()


async def lose_the_connection(conn: Connection) -> None:
    await conn.execute("select pg_terminate_backend(pg_backend_pid())")


async def be_cancelled(conn: Connection) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


HARMS = [
    raise_,
    raise_the_servers_error,
    hang,
    hang_in_a_statement,
    hang_in_spite_of_cancellation,
    leave_a_transaction,
    leave_a_failed_transaction,
    leave_a_pipeline,
    lose_the_connection,
    be_cancelled,
]
each_harm = pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)


async def assert_works(pool: Pool[Connection]) -> int:
    """Any lease is clean and works; its server process."""
    async with pool.acquire(timeout=30) as conn:
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert await first_value(conn, "select 1") == 1
        return conn.info.backend_pid


# --- configure ----------------------------------------------------------------------------------------------


@each_harm
async def test_a_connection_that_configure_spoiled_is_not_used(
    dsn: str, admin: Admin, application_name: str, harm: Callback
) -> None:
    configure = Misdeed(harm)
    async with Pool(dsn, min_size=0, max_size=1, check_timeout=SHORT, configure=configure) as pool:
        if harm not in (lose_the_connection, be_cancelled, hang, hang_in_a_statement, hang_in_spite_of_cancellation):
            # As final as a wrong password: nobody is left to wait for what will not get better.
            with pytest.raises(PoolError, match="cannot connect"):
                await pool.acquire()
        await assert_works(pool)
        assert configure.calls == 2
        assert pool.stats().connects == 1
        assert pool.stats().connect_errors == 1
        assert admin.sessions(application_name) == 1
        if harm is raise_:
            assert pool.stats().closes == {CloseReason.CONFIGURE_FAILED: 1}


async def test_a_configure_that_raises_while_there_are_connections_disturbs_nobody(dsn: str) -> None:
    configure = Misdeed(raise_)
    configure.harm = None
    async with Pool(dsn, min_size=1, max_size=2, configure=configure) as pool, pool.acquire() as conn:
        configure.harm = raise_
        await assert_works(pool)
        assert await first_value(conn, "select 1") == 1
        assert configure.calls == 3


async def test_open_raises_what_configure_raised(dsn: str, admin: Admin, application_name: str) -> None:
    pool = Pool(dsn, configure=raise_)
    with pytest.raises(LookupError, match="mine"):
        await pool.open()
    assert pool.stats().size == 0
    assert admin.sessions(application_name) == 0


async def test_open_tells_of_a_configure_that_leaves_a_transaction(dsn: str) -> None:
    pool = Pool(dsn, configure=leave_a_transaction)
    with pytest.raises(psycopg.ProgrammingError, match=r"leave_a_transaction left the connection.*INTRANS"):
        await pool.open()


async def test_open_tells_of_a_configure_that_does_not_end(dsn: str) -> None:
    pool = Pool(dsn, configure=hang, check_timeout=SHORT, acquire_timeout=2)
    with pytest.raises(PoolTimeout, match="configure did not end"):
        await pool.open()


# --- check --------------------------------------------------------------------------------------------------


@each_harm
async def test_a_connection_that_did_not_pass_its_check_is_replaced(dsn: str, harm: Callback) -> None:
    check = Misdeed(harm)
    async with Pool(dsn, max_size=1, check_interval=0, check_timeout=SHORT, check=check) as pool:
        await assert_works(pool)
        reason = CloseReason.DISCONNECTED if harm is lose_the_connection else CloseReason.CHECK_FAILED
        assert pool.stats().closes == {reason: 1}
        assert pool.stats().connects == 2


# --- reset --------------------------------------------------------------------------------------------------


@each_harm
async def test_a_connection_that_could_not_be_reset_is_replaced(dsn: str, harm: Callback) -> None:
    reset = Misdeed(harm)
    async with Pool(dsn, max_size=1, check_timeout=SHORT, reset=reset) as pool:
        pid = await assert_works(pool)
        assert await assert_works(pool) != pid
        reason = CloseReason.DISCONNECTED if harm is lose_the_connection else CloseReason.RESET_FAILED
        assert pool.stats().closes == {reason: 1}


@pytest.mark.parametrize("mode", ["session", "discard"])
@each_harm
async def test_a_connection_that_configure_spoiled_after_a_reset_is_replaced(
    dsn: str, mode: Any, harm: Callback
) -> None:
    configure = Misdeed(harm)
    configure.harm = None
    async with Pool(dsn, max_size=1, check_timeout=SHORT, reset=mode, configure=configure) as pool:
        configure.harm = harm
        pid = await assert_works(pool)
        assert await assert_works(pool) != pid
        reason = CloseReason.DISCONNECTED if harm is lose_the_connection else CloseReason.RESET_FAILED
        assert pool.stats().closes == {reason: 1}


async def test_who_waits_for_a_connection_in_reset_gets_another_when_that_fails(dsn: str) -> None:
    in_reset = asyncio.Event()
    go_on = asyncio.Event()

    async def fail_later(conn: Connection) -> None:
        in_reset.set()
        await go_on.wait()
        raise LookupError

    async with Pool(dsn, max_size=1, reset=Misdeed(fail_later)) as pool:
        pid = await assert_works(pool)
        await in_reset.wait()
        waiting = asyncio.create_task(assert_works(pool))
        await eventually(lambda: pool.stats().waiting == 1)
        go_on.set()
        assert await waiting != pid


# --- setup --------------------------------------------------------------------------------------------------


async def test_setup_runs_on_every_acquire_in_the_callers_task(dsn: str) -> None:
    tasks: list[object] = []

    async def setup(conn: Connection) -> None:
        tasks.append(asyncio.current_task())
        await conn.set_autocommit(True)
        await conn.execute("set application_name = 'set up'")

    async with Pool(dsn, max_size=1, setup=setup) as pool:
        for _ in range(3):
            async with pool.acquire() as conn:
                assert conn.autocommit
                assert await first_value(conn, "show application_name") == "set up"
        conn = await pool.acquire()
        await pool.release(conn)
        assert tasks == [asyncio.current_task()] * 4


@each_harm
async def test_what_went_wrong_in_setup_is_the_callers_to_see_and_the_connection_is_replaced(
    dsn: str, harm: Callback
) -> None:
    async with Pool(dsn, max_size=1, check_timeout=SHORT, setup=Misdeed(harm)) as pool:
        kinds: dict[Callback, type[BaseException]] = {
            raise_: LookupError,
            raise_the_servers_error: psycopg.errors.DivisionByZero,
            be_cancelled: asyncio.CancelledError,
            leave_a_transaction: psycopg.ProgrammingError,
            leave_a_failed_transaction: psycopg.ProgrammingError,
            leave_a_pipeline: psycopg.ProgrammingError,
        }
        with pytest.raises(kinds.get(harm, psycopg.OperationalError)):
            await assert_works(pool)
        assert pool.stats().leased == 0
        await assert_works(pool)
        if harm is be_cancelled:
            assert pool.stats().closes == {}
        else:
            assert sum(pool.stats().closes.values()) == 1
            assert set(pool.stats().closes) <= {CloseReason.SETUP_FAILED, CloseReason.DISCONNECTED}


# --- all of them --------------------------------------------------------------------------------------------

ROLES: dict[str, dict[str, Any]] = {
    "configure": {},
    "check": {"check_interval": 0},
    "reset": {},
    "setup": {},
}
each_role = pytest.mark.parametrize("role", ROLES)


@each_role
async def test_a_callable_that_keeps_its_connection_cannot_use_it_later(dsn: str, role: str) -> None:
    kept: list[Connection] = []

    async def keep(conn: Connection) -> None:
        kept.append(conn)

    options: dict[str, Any] = {role: keep, **ROLES[role]}
    async with Pool(dsn, max_size=1, **options) as pool:
        await assert_works(pool)
        await eventually(lambda: pool.stats().idle == 1)
        with pytest.raises(PoolError, match="released"):
            await kept[0].execute("select 1")


@pytest.mark.parametrize("role", ["check", "reset"])
async def test_what_check_and_reset_set_on_the_connection_is_no_users(dsn: str, role: str) -> None:
    async def change(conn: Connection) -> None:
        await conn.set_autocommit(True)
        conn.row_factory = dict_row
        conn.prepare_threshold = None

    options: dict[str, Any] = {role: change, **ROLES[role]}
    async with Pool(dsn, max_size=1, **options) as pool:
        for _ in range(3):
            async with pool.acquire() as conn:
                assert await (await conn.execute("select 1")).fetchone() == (1,)
                assert (conn.autocommit, conn.prepare_threshold) == (False, 5)


@each_role
async def test_a_callable_may_use_whatever_psycopg_has(dsn: str, role: str) -> None:
    async def do_much(conn: Connection) -> None:
        async with conn.transaction():
            await conn.execute("create temp table if not exists much (id int)")
            async with conn.cursor().copy("copy much from stdin") as copy:
                await copy.write_row([1])
            async with conn.pipeline():
                await conn.execute("delete from much")

    options: dict[str, Any] = {role: do_much, **ROLES[role]}
    async with Pool(dsn, max_size=1, **options) as pool:
        for _ in range(3):
            await assert_works(pool)
        assert pool.stats().closes == {}


async def test_a_setup_that_is_no_coroutine_function_is_the_callers_error(dsn: str) -> None:
    def not_async(conn: Connection) -> None:
        conn.row_factory = dict_row

    setup: Any = not_async
    async with Pool(dsn, max_size=1, setup=setup) as pool:
        for _ in range(2):
            with pytest.raises(TypeError):
                await pool.acquire()
        assert pool.stats().leased == 0


@each_role
async def test_a_callable_that_hangs_in_anyios_way_is_ended_too(dsn: str, role: str) -> None:
    async def sleep(conn: Connection) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            await anyio.sleep_forever()

    options: dict[str, Any] = {role: Misdeed(sleep), **ROLES[role]}
    async with Pool(dsn, min_size=0, max_size=1, check_timeout=SHORT, **options) as pool:
        if role == "setup":
            with pytest.raises(psycopg.OperationalError):
                await pool.acquire()
        await assert_works(pool)
        await assert_works(pool)
