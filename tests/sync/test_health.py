"""Sessions that the server ends: replaced, and never handed out; and those that end in somebody's hands."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import CloseReason, SyncPool
from asyncpool._io.session import SEVERED

from .pools import Connection, assert_unharmed, exhausted, first_value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin


on_this_machine = pytest.mark.skipif("DATABASE_URL" in os.environ, reason="looks at the server's processes")


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns as often as they can, so that what may come between two lines does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def use(conn: Connection) -> int:
    """Its server process, asked from the server."""
    pid = int(first_value(conn, "select pg_backend_pid()"))
    conn.commit()
    return pid


def test_an_idle_session_that_the_server_ended_is_replaced(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, min_size=2, max_size=2, check_interval=None) as pool:
        first = admin.pids(application_name)
        admin.terminate(*first)
        eventually_blocking(lambda: pool.stats().closes == {CloseReason.DISCONNECTED: 2})
        eventually_blocking(lambda: pool.stats().idle == 2)
        assert not set(first) & set(admin.pids(application_name))
        assert pool.stats().connects == 4


def end(admin: Admin, pids: list[int]) -> None:
    """Let the server end these sessions, and return the moment it has, without giving up the GIL in the end: the
    pool's own thread may not have had its turn.
    """
    for pid in pids:
        admin.execute("select pg_terminate_backend(%s)", [pid])
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "the server does not end them"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@on_this_machine
def test_a_session_that_the_server_ended_is_not_handed_out(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, min_size=3, max_size=3, check_interval=None) as pool:
        for _ in range(30):
            dead = admin.pids(application_name)
            end(admin, dead)
            with ExitStack() as stack:
                conns = [stack.enter_context(pool.acquire(timeout=10)) for _ in range(3)]
                assert not {use(conn) for conn in conns} & set(dead)


@on_this_machine
def test_sessions_that_the_server_ended_are_not_handed_out_to_many_threads_at_once(
    dsn: str, admin: Admin, application_name: str
) -> None:
    rounds = 40
    barrier = threading.Barrier(7)

    def take_and_use_again_and_again() -> None:
        for _ in range(rounds):
            barrier.wait(20)
            try:
                with pool.acquire(timeout=10) as conn:
                    use(conn)
            except psycopg.Error:
                barrier.abort()
                raise
            barrier.wait(20)

    with SyncPool(dsn, min_size=6, max_size=6, check_interval=None) as pool, switching_often():
        runnings = [in_thread(take_and_use_again_and_again) for _ in range(6)]
        with suppress(threading.BrokenBarrierError):  # a thread has failed: its error is shown below
            for _ in range(rounds):
                eventually_blocking(lambda: pool.stats().idle == 6)
                eventually_blocking(lambda: len(admin.pids(application_name)) == 6)
                end(admin, admin.pids(application_name))
                barrier.wait(20)
                barrier.wait(5)
        errors = [running.error() for running in runnings]
        assert [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] == [None] * 6


def test_a_session_that_ended_in_somebodys_hands_is_replaced_when_it_comes_back(dsn: str, admin: Admin) -> None:
    with SyncPool(dsn, min_size=1, max_size=1, check_interval=None) as pool:
        conn = pool.getconn()
        pid = use(conn)
        admin.terminate(pid)
        with pytest.raises(psycopg.OperationalError):
            use(conn)
        assert conn.closed
        pool.putconn(conn)
        with pool.acquire() as conn:
            assert use(conn) != pid
        assert pool.stats().closes == {CloseReason.DISCONNECTED: 1}


def test_a_session_that_ended_in_the_hands_of_somebody_who_does_not_notice_is_replaced(dsn: str, admin: Admin) -> None:
    with exhausted(dsn, check_interval=None) as (pool, conn):
        pid = conn.info.backend_pid
        waiting = in_thread(lambda: pool.getconn(timeout=10))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        admin.terminate(pid)
        pool.putconn(conn)
        conn = waiting.result()
        assert use(conn) != pid
        pool.putconn(conn)


def test_a_session_that_ends_in_the_midst_of_a_statement_is_its_users_to_see(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with SyncPool(dsn, max_size=1) as pool:

        def sleep() -> None:
            with pool.acquire() as conn:
                conn.execute("select pg_sleep(600)")

        for _ in range(5):
            running = in_thread(sleep)
            eventually_blocking(lambda: admin.states(application_name) == ["active"])
            admin.terminate(*admin.pids(application_name))
            assert isinstance(running.error(), psycopg.OperationalError)
            assert_unharmed(pool)


def test_kills_at_any_moment_lose_no_place(dsn: str, admin: Admin, application_name: str) -> None:
    uses: list[int] = []

    def work() -> None:
        while not stop:
            with suppress(psycopg.OperationalError), pool.acquire(timeout=10) as conn:
                conn.execute("select 1")
                uses.append(use(conn))

    stop = False
    with SyncPool(dsn, min_size=2, max_size=3, backoff_initial=0.001, backoff_max=0.01) as pool:
        workers = in_threads(6, work)
        for number in range(40):
            eventually_blocking(lambda: len(uses) > 10 * number)  # noqa: B023
            pids = admin.pids(application_name)
            for pid in pids[: 1 + number % 3]:
                admin.execute("select pg_terminate_backend(%s)", [pid])
        stop = True
        for running in workers:
            running.result()
        assert (pool.stats().leased, pool.stats().waiting) == (0, 0)
        assert_unharmed(pool)
        assert pool.stats().abandoned == 0


# --- what counts as an answer -------------------------------------------------------------------------------


def test_what_ends_without_asking_the_server_is_no_answer(dsn: str) -> None:
    with exhausted(dsn) as (_, conn):
        session: Any = conn._session  # type: ignore[attr-defined]
        use(conn)
        before = session.reader.answered_at, session.alive_at
        conn.commit()
        conn.rollback()
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        conn.read_only = conn.deferrable = conn.autocommit = True
        assert (session.reader.answered_at, session.alive_at) == before
        assert list(conn.notifies(timeout=0.01)) == []
        assert (session.reader.answered_at, session.alive_at) == before
        use(conn)
        assert session.reader.answered_at > before[0]
        assert session.alive_at > before[1]


def test_a_thread_that_looked_at_its_lease_just_before_it_was_severed_finishes_the_connection(dsn: str) -> None:
    with exhausted(dsn) as (_, conn):
        session: Any = conn._session  # type: ignore[attr-defined]
        use(conn)

        was_inside: list[bool] = []

        class Severed:
            """Severs in the instant in which the thread says that it has left libpq."""

            def __get__(self, instance: object, owner: object = None) -> bool:
                return bool(was_inside and was_inside[-1])

            def __set__(self, instance: Any, inside: bool) -> None:
                if not inside and was_inside and was_inside[-1]:
                    instance.lease = SEVERED
                    instance.sever()
                was_inside.append(inside)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(session), "in_thread", Severed())
            with suppress(psycopg.Error):
                conn.execute("select 1")
        assert conn.closed


def test_the_holders_are_told_while_a_connection_ends_in_another_thread(dsn: str) -> None:
    with exhausted(dsn) as (pool, conn):
        slot = conn._session.slot  # type: ignore[attr-defined]
        session, slot.resource = slot.resource, None
        assert pool.holders() == []
        slot.resource = session
        assert len(pool.holders()) == 1
