"""The same troubles of the server, for a pool that threads use."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.load import under_blocking_load
from kit.mortal_server import APPLICATION_USER
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking
from psycopg import errors as e

from asyncpool import CloseReason, PoolTimeout, SyncPool

from .recovery import assert_no_more_failed_than_were_in_use, assert_whole_blocking, blocking_backend_pid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.mortal_server import MortalServer

    from asyncpool.cli.embedded import StopMode

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.Connection[Any]

SIZE = 5
THREADS = 8
OUTAGE = 1.0
# Ten times what the pool is to keep to, for machines that are busy.
FIRST_SUCCESS = 2.0
BACK_AT_MIN_SIZE = 10.0
MARGIN = 1.0

SLEEPS = "select wait_event = 'PgSleep' from pg_stat_activity where pid = %s"


def pool_of(dsn: str, size: int = SIZE, **options: Any) -> SyncPool[Connection]:
    return SyncPool(dsn, min_size=size, max_size=size, **options)


def request(pool: SyncPool[Connection]) -> int:
    """The server process that served it."""
    with pool.acquire() as conn:
        return blocking_backend_pid(conn)


@contextmanager
def lasts(least: float, most: float) -> Iterator[None]:
    """What is done in it takes so many seconds, and what a busy machine adds."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert least - 0.01 <= took < most + MARGIN, f"{took:.3f} s"


# --- restarts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
def test_a_restart_under_load_fails_what_was_in_use_and_nothing_else(
    mortal: MortalServer, application_name: str, mode: StopMode
) -> None:
    with pool_of(mortal.dsn(application_name)) as pool:
        with under_blocking_load(pool, THREADS) as load:
            eventually_blocking(lambda: len(load.requests) > 10 * THREADS)
            opened = mortal.restart(mode)
            eventually_blocking(lambda: len(load.successes_since(opened)) > 10 * THREADS)
        assert_no_more_failed_than_were_in_use(load, SIZE, opened)
        assert_whole_blocking(pool, mortal, application_name)


def test_a_killed_backend_takes_all_sessions_with_it_and_all_come_back(
    mortal: MortalServer, application_name: str
) -> None:
    with pool_of(mortal.dsn(application_name)) as pool:
        with under_blocking_load(pool, THREADS) as load:
            eventually_blocking(lambda: len(load.requests) > 10 * THREADS)
            mortal.kill_backend(mortal.admin.pids(application_name)[0])
            eventually_blocking(lambda: sum(pool.stats().closes.values()) >= SIZE)
            opened = mortal.start()  # when it lets somebody in
            eventually_blocking(lambda: len(load.successes_since(opened)) > 10 * THREADS)
        assert_no_more_failed_than_were_in_use(load, SIZE, opened)
        assert_whole_blocking(pool, mortal, application_name)


def test_however_many_went_stale_the_pool_is_soon_back_at_min_size(mortal: MortalServer, application_name: str) -> None:
    with pool_of(mortal.dsn(application_name), 50) as pool:
        before = set(mortal.admin.pids(application_name))
        assert len(before) == 50
        opened = mortal.outage(OUTAGE)
        assert request(pool) not in before
        assert time.monotonic() - opened < FIRST_SUCCESS
        eventually_blocking(lambda: pool.stats().idle == 50, timeout=20)
        assert time.monotonic() - opened < BACK_AT_MIN_SIZE
        assert_whole_blocking(pool, mortal, application_name)


def test_a_server_that_is_starting_up_is_waited_for(mortal: MortalServer, application_name: str) -> None:
    with pool_of(mortal.dsn(application_name)) as pool:
        mortal.stop("immediate")
        mortal.start_in_recovery()
        waiting = in_thread(lambda: request(pool))
        eventually_blocking(lambda: "the database system is starting up" in repr(pool))
        with pytest.raises(PoolTimeout, match="the database system is starting up") as caught:
            pool.getconn(timeout=0.5)
        assert isinstance(caught.value.__cause__, e.CannotConnectNow)
        opened = mortal.end_recovery()
        waiting.result()
        assert time.monotonic() - opened < FIRST_SUCCESS
        assert_whole_blocking(pool, mortal, application_name)


# --- sessions that the server ends --------------------------------------------------------------------------


def test_after_all_idle_sessions_were_terminated_no_acquire_fails(mortal: MortalServer, application_name: str) -> None:
    with pool_of(mortal.dsn(application_name), 20) as pool:
        for _ in range(5):
            terminated = mortal.admin.pids(application_name)
            assert len(terminated) == 20
            mortal.terminate(*terminated)
            served = [running.result() for running in in_threads(20, lambda: request(pool))]
            assert not set(served) & set(terminated)
            assert_whole_blocking(pool, mortal, application_name)


def test_the_user_of_a_terminated_session_is_told_and_nobody_else_notices(
    mortal: MortalServer, application_name: str
) -> None:
    pids: list[int] = []

    def sleep() -> None:
        with pool.acquire() as conn:
            pids.append(conn.info.backend_pid)
            conn.execute("select pg_sleep(600)")

    with pool_of(mortal.dsn(application_name)) as pool:
        with under_blocking_load(pool, THREADS) as load:
            for number in range(1, 4):
                sleeping = in_thread(sleep)
                eventually_blocking(lambda: len(pids) == number)  # noqa: B023
                eventually_blocking(lambda: mortal.admin.value(SLEEPS, [pids[-1]]))
                mortal.terminate(pids[-1])
                assert isinstance(sleeping.error(), e.AdminShutdown)
            served = len(load.requests)
            eventually_blocking(lambda: len(load.requests) > served + 100)
        assert load.errors == []
        assert_whole_blocking(pool, mortal, application_name)


def test_a_transaction_that_was_idle_too_long_is_its_holders_error_alone(
    mortal: MortalServer, application_name: str
) -> None:
    with (
        mortal.settings(idle_in_transaction_session_timeout="500ms"),
        # The load is in no transaction: what is cut off is the one that is looked at.
        pool_of(mortal.dsn(application_name), autocommit=True) as pool,
    ):
        with under_blocking_load(pool, THREADS) as load:
            with pytest.raises(e.IdleInTransactionSessionTimeout), pool.acquire() as conn, conn.transaction():
                pid = conn.info.backend_pid
                conn.execute("select 1")
                eventually_blocking(lambda: pid not in mortal.admin.pids(application_name))
                conn.execute("select 1")
            served = len(load.requests)
            eventually_blocking(lambda: len(load.requests) > served + 100)
        assert load.errors == []
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


# --- no place for another session ---------------------------------------------------------------------------


def test_on_a_full_server_who_waits_is_served_by_the_next_release(mortal: MortalServer, application_name: str) -> None:
    dsn = mortal.dsn(application_name, user=APPLICATION_USER)
    # One beside them is for the session that looks at the server.
    with mortal.settings(restart=True, max_connections=SIZE + 3 + 1, superuser_reserved_connections=3):
        mortal.admin.value("select 1")
        with SyncPool(dsn, max_size=2 * SIZE) as pool:
            with ExitStack() as leases:
                pids = {leases.enter_context(pool.acquire()).info.backend_pid for _ in range(SIZE)}
                waiting = in_threads(6, lambda: request(pool))
                eventually_blocking(lambda: pool.stats().connect_errors > 3)
                assert not any(running.done for running in waiting)
                assert "remaining connection slots are reserved" in repr(pool)
            assert {running.result() for running in waiting} <= pids
            assert_whole_blocking(pool, mortal, application_name)


# --- a server that stands still -----------------------------------------------------------------------------


def test_nobody_waits_past_his_deadline_and_all_is_well_when_the_server_goes_on(
    mortal: MortalServer, application_name: str
) -> None:
    options: dict[str, Any] = {"connect_timeout": 0.3, "check_timeout": 0.4, "check_interval": 0, "backoff_max": 0.5}
    with pool_of(mortal.dsn(application_name), **options) as pool:
        with mortal.frozen():
            for timeout in (0.2, 0.6):
                with lasts(timeout, timeout):
                    errors = [r.error() for r in in_threads(10, lambda: pool.getconn(timeout=timeout))]  # noqa: B023
                assert {type(error) for error in errors} == {PoolTimeout}
            waiting = in_thread(lambda: request(pool))
            eventually_blocking(lambda: pool.stats().waiting == 1)
        waiting.result()
        assert_whole_blocking(pool, mortal, application_name)


def test_a_pool_closes_in_time_under_a_thread_that_waits_for_a_silent_server(
    mortal: MortalServer, application_name: str
) -> None:
    waits = threading.Event()

    def use() -> None:
        with pool.acquire() as conn:
            waits.set()
            conn.execute("select 1")

    pool = pool_of(mortal.dsn(application_name), check_timeout=0.4, cancel_timeout=0.2)
    pool.open()
    with mortal.frozen():
        using = in_thread(use)
        assert waits.wait(10)
        with lasts(0.3, 0.3 + 2 * 0.4):
            pool.close(timeout=0.3)
        assert isinstance(using.error(), psycopg.OperationalError)
        assert pool.stats().size == 0
        assert pool.stats().abandoned == SIZE
    eventually_blocking(lambda: mortal.strangers() == 0, timeout=20)
