"""Ctrl-C in the main thread, wherever it strikes: nothing is left behind, and the pool goes on."""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from kit.threads import in_thread
from kit.waiting import eventually_blocking

from asyncpool import SyncPool

from .pools import FOREVER, Connection, assert_unharmed, exhausted, first_value, loop_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kit.servers import Admin


@contextmanager
def interrupted_when(condition: Callable[[], bool]) -> Iterator[None]:
    """Ctrl-C strikes in the block, in the main thread, as soon as the condition holds; the block ends by it."""

    def strike() -> None:
        eventually_blocking(condition)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    striking = in_thread(strike)
    with pytest.raises(KeyboardInterrupt):
        try:
            yield
        finally:
            striking.error()  # a block that is over before does not let it strike elsewhere
    striking.result()


# --- while waiting ------------------------------------------------------------------------------------------


def test_ctrl_c_while_waiting_leaves_nothing_behind(dsn: str) -> None:
    with exhausted(dsn) as (pool, conn):
        for _ in range(3):
            with interrupted_when(lambda: pool.stats().waiting == 1):
                pool.getconn(timeout=FOREVER)
            assert pool.stats().waiting == 0
            with interrupted_when(lambda: pool.stats().waiting == 1):
                pool.acquire(timeout=None).__enter__()
            assert pool.stats().waiting == 0
        pool.putconn(conn)
        assert pool.getconn(timeout=0) is conn
        pool.putconn(conn)
        assert pool.stats().timeouts == 0


def test_ctrl_c_while_waiting_for_a_key_leaves_nothing_behind(dsn: str) -> None:
    with exhausted(dsn) as (pool, conn):
        with interrupted_when(lambda: pool.stats().waiting == 1):
            pool.getconn("key", timeout=FOREVER)
        assert pool.stats().waiting == 0
        pool.putconn(conn)
        conn = pool.getconn("key", timeout=1)
        pool.putconn(conn, "key")


def test_who_waits_behind_one_that_ctrl_c_ended_gets_the_connection(dsn: str) -> None:
    with exhausted(dsn) as (pool, conn):
        behind = []

        def another_waits_too() -> bool:
            if pool.stats().waiting == 1:
                behind.append(in_thread(lambda: pool.getconn(timeout=FOREVER)))
                eventually_blocking(lambda: pool.stats().waiting == 2)
            return bool(behind)

        with interrupted_when(another_waits_too):
            pool.getconn(timeout=FOREVER)
        assert pool.stats().waiting == 1
        pool.putconn(conn)
        assert behind[0].result() is conn
        pool.putconn(conn)


def test_ctrl_c_while_a_connection_is_being_made_leaves_it_to_the_next(dsn: str) -> None:
    go_on = threading.Event()

    def configure(_: Connection) -> None:
        go_on.wait(10)

    with SyncPool(dsn, min_size=0, max_size=1, configure=configure, check_timeout=20) as pool:
        with interrupted_when(lambda: pool.stats().connecting == 1):
            pool.getconn(timeout=FOREVER)
        assert pool.stats().waiting == 0
        go_on.set()
        with pool.acquire(timeout=10) as conn:
            assert first_value(conn, "select 1") == 1
        assert pool.stats().connects == 1


def test_ctrl_c_that_races_with_the_grant_loses_no_place(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        for _ in range(50):
            conn = pool.getconn()

            def give_back(conn: Connection = conn) -> bool:
                if pool.stats().waiting == 1:
                    conn.close()  # the grant and Ctrl-C arrive together
                    return True
                return False

            kept: list[Connection] = []
            with interrupted_when(give_back):
                # What the grant's thread gets here, it gives back; what Ctrl-C ends before, the pool does.
                kept.append(pool.getconn(timeout=FOREVER))
                threading.Event().wait(10)
            for granted in kept:
                granted.close()
            del conn, give_back
            eventually_blocking(lambda: pool.stats().leased == 0)
            assert pool.stats().waiting == 0
        assert_unharmed(pool)


@pytest.mark.parametrize("holds", [True, False])
def test_ctrl_c_when_the_granted_connection_is_just_in_hand_loses_no_place(dsn: str, holds: bool) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        runner: Any = pool._pool._runner
        lend_granted = runner.machine.lend_granted

        def struck(slot: Any) -> None:
            connection = lend_granted(slot)
            if not holds:
                del connection
            raise KeyboardInterrupt

        conn = pool.getconn()
        runner.machine.lend_granted = struck
        give_back = threading.Timer(0.05, pool.putconn, [conn])
        give_back.start()
        del conn
        with pytest.raises(KeyboardInterrupt):
            pool.getconn(timeout=FOREVER)
        give_back.join()
        runner.machine.lend_granted = lend_granted
        del give_back
        assert_unharmed(pool)


# --- elsewhere ----------------------------------------------------------------------------------------------


def test_ctrl_c_during_a_statement_ends_it_and_keeps_the_connection(
    dsn: str, admin: Admin, application_name: str
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        with interrupted_when(lambda: admin.asleep(application_name) == 1):
            conn.execute("select pg_sleep(600)")
        conn.rollback()
        assert first_value(conn, "select pg_backend_pid()") == pid
        conn.rollback()
        pool.putconn(conn)
        assert pool.stats().closes == {}


def test_ctrl_c_in_a_block_rolls_back_and_the_connection_goes_on(
    dsn: str, admin: Admin, application_name: str, table: str
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        pid = admin.pids(application_name)
        for enter in (pool.acquire, pool.transaction):
            with interrupted_when(lambda: admin.asleep(application_name) == 1), enter() as conn:
                conn.execute(f"insert into {table} values (1)".encode())
                conn.execute("select pg_sleep(600)")
            assert_unharmed(pool)
        assert admin.value(f"select count(*) from {table}") == 0
        assert admin.pids(application_name) == pid
        assert pool.stats().closes == {}


def test_ctrl_c_during_setup_leaves_nothing_behind(dsn: str) -> None:
    entered = threading.Event()

    def setup(conn: Connection) -> None:
        if not entered.is_set():
            entered.set()
            conn.execute("select pg_sleep(600)")

    with SyncPool(dsn, max_size=1, setup=setup) as pool:
        with interrupted_when(entered.is_set):
            pool.getconn(timeout=FOREVER)
        assert pool.stats().leased == 0
        assert_unharmed(pool)


def test_ctrl_c_while_opening_closes_the_pool() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        pool = SyncPool(host="127.0.0.1", port=holder.getsockname()[1], backoff_initial=0.01)
        with interrupted_when(lambda: pool.stats().connect_errors > 1):
            pool.open(timeout=None)
        eventually_blocking(lambda: "closed" in repr(pool))
        eventually_blocking(lambda: loop_threads() == [])


def test_ctrl_c_while_closing_lets_it_go_on_by_itself(dsn: str, admin: Admin, application_name: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    conn = pool.getconn()
    with interrupted_when(lambda: "closing" in repr(pool)):
        pool.close(timeout=None)
    assert first_value(conn, "select 1") == 1
    conn.rollback()
    pool.putconn(conn)
    eventually_blocking(lambda: "closed" in repr(pool))
    assert admin.sessions(application_name) == 0
    eventually_blocking(lambda: loop_threads() == [])
