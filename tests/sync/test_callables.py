"""`configure`, `check`, `setup` and `reset` block, each in a thread of its own; what goes wrong there harms nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import psycopg
import pytest
from kit.threads import in_thread
from kit.waiting import eventually_blocking
from psycopg.rows import dict_row, tuple_row

from asyncpool import CloseReason, PoolError, PoolTimeout, SyncPool

from .pools import Connection, assert_unharmed, first_value

Callback: TypeAlias = Callable[[Connection], object]

# What a callable may take here, in seconds, where it is meant to fail by taking too long.
# Seconds. A callable that does nothing wrong takes less, on a busy machine too.
SHORT = 0.5

IDLE = psycopg.pq.TransactionStatus.IDLE


class Misdeed:
    """A callable that does its harm the first time, and is well-behaved from then on."""

    def __init__(self, harm: Callback) -> None:
        self.harm: Callback | None = harm
        self.calls = 0

    def __call__(self, conn: Connection) -> None:
        self.calls += 1
        harm, self.harm = self.harm, None
        if harm is not None:
            harm(conn)


def raise_(conn: Connection) -> None:
    raise LookupError("mine")


def raise_the_servers_error(conn: Connection) -> None:
    conn.execute("select 1/0")


def hang(conn: Connection) -> None:
    time.sleep(3 * SHORT)


def hang_in_a_statement(conn: Connection) -> None:
    conn.execute("select pg_sleep(600)")


def hang_and_go_on(conn: Connection) -> None:
    time.sleep(3 * SHORT)
    conn.execute("select pg_sleep(600)")


def leave_a_transaction(conn: Connection) -> None:
    conn.execute("select 1")


def leave_a_failed_transaction(conn: Connection) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("select 1/0")


blocks: list[object] = []  # kept, as one that is collected ends


@pytest.fixture(autouse=True)
def forget_blocks() -> Iterator[None]:
    yield
    blocks.clear()


def leave_a_pipeline(conn: Connection) -> None:
    block = conn.pipeline()
    blocks.append(block)
    block.__enter__()


def lose_the_connection(conn: Connection) -> None:
    conn.execute("select pg_terminate_backend(pg_backend_pid())")


HARMS = [
    raise_,
    raise_the_servers_error,
    hang,
    hang_in_a_statement,
    hang_and_go_on,
    leave_a_transaction,
    leave_a_failed_transaction,
    leave_a_pipeline,
    lose_the_connection,
]
each_harm = pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)

ROLES: dict[str, dict[str, Any]] = {
    "configure": {},
    "check": {"check_interval": 0},
    "reset": {},
    "setup": {},
}
each_role = pytest.mark.parametrize("role", ROLES)


def assert_works(pool: SyncPool[Connection]) -> int:
    """Any lease is clean and works; its server process."""
    with pool.acquire(timeout=10) as conn:
        assert conn.info.transaction_status == IDLE
        assert first_value(conn, "select 1") == 1
        return conn.info.backend_pid


# --- where they run -----------------------------------------------------------------------------------------


@each_role
def test_a_callable_gets_a_connection_in_a_thread_of_its_own(dsn: str, role: str) -> None:
    seen: list[tuple[object, str, bool]] = []

    def look(conn: Connection) -> None:
        thread = threading.current_thread()
        seen.append((type(conn).__mro__[2], thread.name, thread.daemon))
        assert thread is not threading.main_thread()
        assert isinstance(conn, psycopg.Connection)
        assert first_value(conn, "select 1") == 1
        conn.commit()

    options: dict[str, Any] = {role: look, **ROLES[role]}
    with SyncPool(dsn, name="orders", max_size=1, **options) as pool:
        assert_works(pool)
        eventually_blocking(lambda: bool(seen))
        _, name, daemon = seen[0]
        assert name.startswith("asyncpool orders: ")
        assert "look" in name
        assert daemon
        assert_works(pool)
        assert pool.stats().closes == {}


@each_role
def test_a_callable_may_use_whatever_psycopg_has(dsn: str, role: str) -> None:
    def do_much(conn: Connection) -> None:
        with conn.transaction():
            conn.execute("create temp table if not exists much (id int)")
            with conn.cursor().copy("copy much from stdin") as copy:
                copy.write_row([1])
            with conn.pipeline():
                conn.execute("delete from much")

    options: dict[str, Any] = {role: do_much, **ROLES[role]}
    with SyncPool(dsn, max_size=1, **options) as pool:
        for _ in range(3):
            assert_works(pool)
        assert pool.stats().closes == {}


@pytest.mark.parametrize("harm", [hang, hang_in_a_statement])
@each_role
def test_a_callable_that_hangs_stalls_nobody_else(dsn: str, role: str, harm: Callback) -> None:
    options: dict[str, Any] = {role: Misdeed(harm), **ROLES[role]}
    with SyncPool(dsn, min_size=0, max_size=1) as other:
        pool = SyncPool(dsn, min_size=0, max_size=1, check_timeout=3 * SHORT, **options)
        pool.open()
        running = in_thread(lambda: assert_works(pool))
        try:
            eventually_blocking(lambda: pool.stats().size == 1)
            for _ in range(5):
                began = time.monotonic()
                assert_unharmed(other)
                other.drain()
                other.check()
                assert time.monotonic() - began < 2 * SHORT
        finally:
            running.error()
            pool.close()


# --- each in its role ---------------------------------------------------------------------------------------


@each_harm
def test_a_connection_that_configure_spoiled_is_not_used(dsn: str, harm: Callback) -> None:
    configure = Misdeed(harm)
    with SyncPool(dsn, min_size=0, max_size=1, check_timeout=SHORT, configure=configure) as pool:
        if harm not in (lose_the_connection, hang, hang_in_a_statement, hang_and_go_on):
            # As final as a wrong password: nobody is left to wait for what will not get better.
            with pytest.raises(PoolError, match="cannot connect"):
                pool.getconn(timeout=10)
        assert_works(pool)
        assert configure.calls == 2
        assert pool.stats().connects == 1
        assert pool.stats().connect_errors == 1


def test_what_configure_sets_is_the_baseline(dsn: str) -> None:
    def configure(conn: Connection) -> None:
        conn.autocommit = True
        conn.row_factory = dict_row
        conn.execute("set work_mem = '55MB'")

    with SyncPool(dsn, max_size=1, configure=configure) as pool:
        for _ in range(3):
            with pool.acquire() as conn:
                assert conn.autocommit
                row: Any = conn.execute("show work_mem").fetchone()
                assert row == {"work_mem": "55MB"}
                conn.autocommit = False
                conn.row_factory = tuple_row
        assert pool.stats().connects == 1


def test_open_raises_what_configure_raised(dsn: str) -> None:
    with pytest.raises(LookupError, match="mine"):
        SyncPool(dsn, configure=raise_).open()
    with pytest.raises(psycopg.ProgrammingError, match=r"leave_a_transaction left the connection.*INTRANS"):
        SyncPool(dsn, configure=leave_a_transaction).open()


@pytest.mark.parametrize("harm", [hang, hang_in_a_statement])
def test_open_tells_of_a_configure_that_does_not_end(dsn: str, harm: Callback) -> None:
    with pytest.raises(PoolTimeout, match="configure did not end"):
        SyncPool(dsn, configure=harm, check_timeout=SHORT, acquire_timeout=2).open()


@each_harm
def test_a_connection_that_did_not_pass_its_check_is_replaced(dsn: str, harm: Callback) -> None:
    check = Misdeed(harm)
    with SyncPool(dsn, max_size=1, check_interval=0, check_timeout=SHORT, check=check) as pool:
        assert_works(pool)
        reason = CloseReason.DISCONNECTED if harm is lose_the_connection else CloseReason.CHECK_FAILED
        assert pool.stats().closes == {reason: 1}
        assert pool.stats().connects == 2


@each_harm
def test_a_connection_that_could_not_be_reset_is_replaced(dsn: str, harm: Callback) -> None:
    with SyncPool(dsn, max_size=1, check_timeout=SHORT, reset=Misdeed(harm)) as pool:
        pid = assert_works(pool)
        assert assert_works(pool) != pid
        reason = CloseReason.DISCONNECTED if harm is lose_the_connection else CloseReason.RESET_FAILED
        assert pool.stats().closes == {reason: 1}


@each_harm
def test_what_went_wrong_in_setup_is_the_callers_to_see_and_the_connection_is_replaced(
    dsn: str, harm: Callback
) -> None:
    kinds: dict[Callback, type[BaseException]] = {
        raise_: LookupError,
        raise_the_servers_error: psycopg.errors.DivisionByZero,
        leave_a_transaction: psycopg.ProgrammingError,
        leave_a_failed_transaction: psycopg.ProgrammingError,
        leave_a_pipeline: psycopg.ProgrammingError,
    }
    with SyncPool(dsn, max_size=1, check_timeout=SHORT, setup=Misdeed(harm)) as pool:
        with pytest.raises(kinds.get(harm, psycopg.OperationalError)):
            pool.getconn(timeout=10)
        assert pool.stats().leased == 0
        assert_works(pool)
        assert sum(pool.stats().closes.values()) == 1
        assert set(pool.stats().closes) <= {CloseReason.SETUP_FAILED, CloseReason.DISCONNECTED}


def test_setup_runs_before_every_lease(dsn: str) -> None:
    calls: list[int] = []

    def setup(conn: Connection) -> None:
        calls.append(conn.info.backend_pid)
        conn.autocommit = True
        conn.execute("set application_name = 'set up'")

    with SyncPool(dsn, max_size=1, setup=setup) as pool:
        for number in range(1, 4):
            with pool.acquire() as conn:
                assert conn.autocommit
                assert first_value(conn, "show application_name") == "set up"
            assert len(calls) == number


def test_a_setup_that_gives_its_connection_back_is_told_so(dsn: str) -> None:
    with SyncPool(dsn, max_size=1, setup=Misdeed(lambda conn: conn.close())) as pool:
        with pytest.raises(PoolError, match="setup has given its connection back"):
            pool.getconn()
        assert pool.stats().leased == 0
        assert_works(pool)


# --- all of them --------------------------------------------------------------------------------------------


@each_role
def test_a_callable_that_keeps_its_connection_cannot_use_it_later(dsn: str, role: str) -> None:
    kept: list[Connection] = []
    options: dict[str, Any] = {role: kept.append, **ROLES[role]}
    with SyncPool(dsn, max_size=1, **options) as pool:
        assert_works(pool)
        eventually_blocking(lambda: bool(kept) and pool.stats().idle == 1)
        with pytest.raises(PoolError, match="released"):
            kept[0].execute("select 1")


@each_role
def test_a_callable_that_wakes_up_after_it_was_given_up_can_do_nothing_more(dsn: str, role: str) -> None:
    outcomes: list[BaseException] = []
    go_on = threading.Event()

    def oversleep(conn: Connection) -> None:
        assert go_on.wait(10)
        try:
            conn.execute("select 1")
        except psycopg.OperationalError as error:
            outcomes.append(error)

    options: dict[str, Any] = {role: Misdeed(oversleep), **ROLES[role]}
    with SyncPool(dsn, min_size=0, max_size=1, check_timeout=SHORT, **options) as pool:
        for _ in range(3):
            try:
                assert_works(pool)
            except psycopg.OperationalError:
                assert role in ("configure", "setup")
        go_on.set()
        eventually_blocking(lambda: bool(outcomes))
        assert_unharmed(pool)


async def not_blocking(conn: Connection) -> None:
    raise AssertionError


@pytest.mark.parametrize("role", ["configure", "setup"])
def test_an_async_function_in_place_of_a_blocking_one_is_the_callers_error(dsn: str, role: str) -> None:
    options: dict[str, Any] = {role: not_blocking}
    pool = SyncPool(dsn, max_size=1, **options)
    try:
        with pytest.raises(TypeError, match="not_blocking must not be async: a SyncPool calls it in a thread"):
            pool.open()
            pool.getconn()
        assert pool.stats().leased == 0
    finally:
        pool.close()


@pytest.mark.parametrize("role", ["check", "reset"])
def test_an_async_function_in_place_of_a_blocking_one_is_told_in_the_log(
    dsn: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncpool")
    options: dict[str, Any] = {role: not_blocking, **ROLES[role]}
    with SyncPool(dsn, max_size=1, **options) as pool:
        conn = pool.getconn(timeout=10)  # checked in vain, and replaced
        conn.execute("select 1")
        pool.putconn(conn)  # reset in vain
        eventually_blocking(lambda: "not_blocking must not be async" in caplog.text)


def test_closing_the_pool_does_not_wait_for_a_callable_that_hangs(dsn: str) -> None:
    entered = threading.Event()

    def oversleep(conn: Connection) -> None:
        entered.set()
        time.sleep(2)

    pool = SyncPool(dsn, configure=oversleep)
    pool.open(wait=False)
    assert entered.wait(10)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("error", [SystemExit("bad"), KeyboardInterrupt(), StopIteration(1)], ids=repr)
def test_a_callable_that_raises_what_would_end_the_event_loop_does_not(dsn: str, error: BaseException) -> None:
    def configure(_: Connection) -> None:
        raise error

    with SyncPool(dsn, max_size=1) as other:
        with pytest.raises(RuntimeError, match=type(error).__name__):
            SyncPool(dsn, configure=configure).open(timeout=10)
        other.check()
        assert_unharmed(other)
