"""close() and closeall() while threads are in the middle of something: in time, without a crash, nothing left."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.threads import Running, in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import CloseReason, PoolClosed, PoolError, SyncPool
from asyncpool._io.session import Session

from .pools import Connection, assert_unharmed, insert, warnings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.servers import Admin


def in_a_statement(conn: Connection) -> None:
    conn.execute("select pg_sleep(600)")


def in_a_transaction_block(conn: Connection) -> None:
    with conn.transaction():
        conn.execute("select pg_sleep(600)")


def in_a_pipeline(conn: Connection) -> None:
    with conn.pipeline():
        conn.execute("select 1")
        conn.execute("select pg_sleep(600)")
        conn.execute("select 2").fetchone()


def in_a_stream(conn: Connection) -> None:
    for _ in conn.cursor().stream("select generate_series(1, 1000000), pg_sleep(0.0001)"):
        pass


def in_a_copy_out(conn: Connection) -> None:
    with conn.cursor().copy("copy (select generate_series(1, 1000000), pg_sleep(0.0001)) to stdout") as copy:
        for _ in copy:
            pass


def in_a_copy_in(conn: Connection) -> None:
    conn.execute("create temp table received (line text)")
    with conn.cursor().copy("copy received from stdin") as copy:
        while True:
            copy.write("x" * 1000 + "\n")


def waiting_for_notifications(conn: Connection) -> None:
    conn.autocommit = True
    conn.execute("listen here")
    for _ in conn.notifies():
        pass
    conn.execute("select 1")  # after its end


def in_many_short_statements(conn: Connection) -> None:
    while True:
        conn.execute("select 1")


def in_many_short_transactions(conn: Connection) -> None:
    while True:
        with conn.transaction():
            conn.execute("select 1")


ACTIVITIES: list[Callable[[Connection], None]] = [
    in_a_statement,
    in_a_transaction_block,
    in_a_pipeline,
    in_a_stream,
    in_a_copy_out,
    in_a_copy_in,
    waiting_for_notifications,
    in_many_short_statements,
    in_many_short_transactions,
]
each_activity = pytest.mark.parametrize("activity", ACTIVITIES, ids=lambda activity: activity.__name__)


@each_activity
def test_close_shuts_down_a_connection_that_a_thread_is_using(
    dsn: str, admin: Admin, application_name: str, activity: Callable[[Connection], None]
) -> None:
    pool = SyncPool(dsn, min_size=2, max_size=2)

    def work() -> None:
        with pool.acquire() as conn:
            started.append(conn)
            activity(conn)

    for _ in range(5):
        started: list[Connection] = []
        pool.open()
        runnings = in_threads(2, work)
        eventually_blocking(lambda: len(started) == 2)  # noqa: B023
        eventually_blocking(lambda: all(conn._session.touched for conn in started))  # type: ignore[attr-defined]  # noqa: B023
        began = time.monotonic()
        pool.close(timeout=0.02)
        assert time.monotonic() - began < 4
        for running in runnings:
            assert isinstance(running.error(), psycopg.Error), running.error()
        assert admin.sessions(application_name) == 0
        assert pool.stats().abandoned == 0
        assert pool.stats().closes == {CloseReason.POOL_CLOSED: 2}


def test_close_waits_as_long_as_it_was_told_and_names_who_holds_on(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = SyncPool(dsn, max_size=1, name="orders")
    pool.open()

    def sleep_in_a_function_of_mine() -> None:
        with pool.acquire() as conn:
            in_a_statement(conn)

    running = in_thread(sleep_in_a_function_of_mine)
    eventually_blocking(lambda: admin.states(application_name) == ["active"])
    began = time.monotonic()
    pool.close(timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 4
    assert isinstance(running.error(), psycopg.OperationalError)
    [warning] = warnings_of(caplog)
    assert "orders: closing with connections in use (1)" in warning
    assert warning.endswith("sleep_in_a_function_of_mine")


def test_a_statement_that_begins_in_the_instant_of_close_is_ended_too(
    dsn: str, admin: Admin, application_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = SyncPool(dsn, max_size=1, check_timeout=2, autocommit=True)
    pool.open()
    conn = pool.getconn()
    closing: list[Running[None]] = []
    severed = threading.Event()
    wait = psycopg.Connection.wait
    sever = Session.sever

    def close_and_wait(self: Any, *args: Any, **options: Any) -> Any:
        """psycopg's, by which the statement is sent: just after the pool has shut the connection down."""
        if not closing:
            closing.append(in_thread(lambda: pool.close(timeout=0)))
            assert severed.wait(10)
        return wait(self, *args, **options)

    def sever_and_let_the_statement_begin(self: Session) -> None:
        sever(self)
        if not severed.is_set():
            severed.set()
            eventually_blocking(lambda: self.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE)

    monkeypatch.setattr(Session, "sever", sever_and_let_the_statement_begin)
    monkeypatch.setattr(psycopg.Connection, "wait", close_and_wait)
    with pytest.raises(psycopg.OperationalError):
        conn.execute("select pg_sleep(30)")
    closing[0].result()
    assert pool.stats().abandoned == 0
    assert admin.sessions(application_name) == 0


def test_a_statement_that_ends_before_the_timeout_is_let_end(dsn: str, admin: Admin, application_name: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()

    def sleep() -> Any:
        with pool.acquire() as conn:
            return conn.execute("select pg_sleep(0.2)::text, 42").fetchone()

    running = in_thread(sleep)
    eventually_blocking(lambda: admin.states(application_name) == ["active"] or running.done)
    pool.close(timeout=10)
    assert running.result() == ("", 42)


def test_a_block_that_close_overtook_says_that_nothing_is_committed(dsn: str, admin: Admin, table: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    with pytest.raises(PoolError, match=r"lost inside the block.*not committed"), pool.acquire() as conn:
        insert(conn, table)
        pool.close(timeout=0)
    assert admin.value(f"select count(*) from {table}") == 0


def test_a_block_that_had_nothing_to_commit_ends_in_peace(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    with pool.acquire() as conn:
        conn.execute("select 1")
        conn.commit()
        pool.closeall()
    with pool:
        assert_unharmed(pool)


def test_closeall_closes_at_once_what_is_in_use(dsn: str, admin: Admin, application_name: str) -> None:
    pool = SyncPool(dsn, min_size=3, max_size=3)
    pool.open()
    held = [pool.getconn() for _ in range(2)]
    held[0].execute("select 1")
    began = time.monotonic()
    pool.closeall()
    assert time.monotonic() - began < 4
    assert admin.sessions(application_name) == 0
    for conn in held:
        assert conn.closed
        with pytest.raises(psycopg.OperationalError):
            conn.execute("select 1")
        conn.close()
    with pytest.raises(PoolClosed):
        pool.getconn()


def test_closing_in_the_midst_of_everything_again_and_again(dsn: str, admin: Admin, application_name: str) -> None:
    pool = SyncPool(dsn, min_size=0, max_size=4)
    stop = False
    odd: list[BaseException] = []
    opened = threading.Event()

    def work(number: int) -> None:
        while not stop:
            try:
                with pool.acquire(timeout=5) as conn:
                    if number % 3:
                        conn.execute("select 1")
                    else:
                        conn.execute("select pg_sleep(0.01)")
            except PoolClosed:
                opened.wait(1)
            except psycopg.OperationalError:
                continue
            except BaseException as error:  # noqa: BLE001 — anything else is a bug, to be shown at the end
                odd.append(error)

    workers = [in_thread(lambda number=number: work(number)) for number in range(8)]  # type: ignore[misc]
    try:
        for number in range(60):
            pool.open()
            opened.set()
            eventually_blocking(lambda: pool.stats().acquires > number % 7)  # noqa: B023
            opened.clear()
            began = time.monotonic()
            pool.close(timeout=0)
            assert time.monotonic() - began < 4
            assert admin.sessions(application_name) == 0
    finally:
        stop = True
        opened.set()
    for running in workers:
        running.result()
    assert odd == []
    with pool:
        assert_unharmed(pool)


def test_a_statement_that_is_deaf_to_cancelling_does_not_hold_up_close_for_ever(
    dsn: str, admin: Admin, application_name: str
) -> None:
    deaf = """do $$
        declare begun timestamptz := clock_timestamp();
        begin
            while clock_timestamp() < begun + interval '2 s' loop
                begin
                    perform pg_sleep(60);
                exception when query_canceled then
                    null;
                end;
            end loop;
        end $$"""
    pool = SyncPool(dsn, max_size=1, check_timeout=0.3)
    pool.open()
    conn = pool.getconn()
    running = in_thread(lambda: conn.execute(deaf))
    asleep = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    eventually_blocking(lambda: admin.value(asleep, [application_name]) == 1)
    began = time.monotonic()
    pool.close(timeout=0)
    assert time.monotonic() - began < 1.5
    assert isinstance(running.error(timeout=1), psycopg.OperationalError)
    assert pool.stats().abandoned == 1


PROGRAM = """
import logging, random, sys, threading, time
import psycopg
from asyncpool import SyncPool

logging.basicConfig(level=logging.ERROR)
logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of blocks whose connection is gone
sys.setswitchinterval(1e-5)
odd = []

def statement(conn):
    conn.execute("select pg_sleep(600)")

def short(conn):
    while True:
        conn.execute("select 1", prepare=True)

def copy(conn):
    with conn.cursor().copy("copy (select generate_series(1, 1000000)) to stdout") as copy:
        for _ in copy:
            pass
    conn.execute("select pg_sleep(600)")

def stream(conn):
    for _ in conn.cursor().stream("select generate_series(1, 1000000)"):
        pass
    conn.execute("select pg_sleep(600)")

def pipeline(conn):
    while True:
        with conn.pipeline():
            for _ in range(10):
                conn.execute("select 1")

def transaction(conn):
    while True:
        with conn.transaction():
            conn.execute("select 1")

activities = [statement, short, copy, stream, pipeline, transaction]

def work(pool, number):
    try:
        with pool.acquire() as conn:
            activities[number](conn)
    except psycopg.Error:
        pass
    except BaseException as error:
        odd.append(error)

for turn in range(25):
    pool = SyncPool(sys.argv[1], min_size=6, max_size=6)
    pool.open()
    threads = [threading.Thread(target=work, args=(pool, number)) for number in range(6)]
    for thread in threads:
        thread.start()
    while pool.stats().leased < 6:
        time.sleep(0.001)
    time.sleep(random.random() / 50)
    began = time.monotonic()
    pool.close(timeout=0)
    assert time.monotonic() - began < 4, time.monotonic() - began
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not odd, odd
print("done")
"""


@pytest.mark.parametrize("options", [["-X", "dev"], []], ids=["dev mode", "as usual"])
def test_no_close_ever_crashes_the_process(dsn: str, options: list[str]) -> None:
    command = [sys.executable, "-X", "faulthandler", *options, "-c", PROGRAM, dsn]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
