"""SyncPool on a dead network: a thread inside a statement waits until the pool ends it, as a blocking call does, and
everything else keeps its deadline.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.proxy import BYTE_BY_BYTE, FAIR, GARBAGE, STALLED, Arrival, Proxy, Towards, Weather
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import CloseReason, PoolError, PoolTimeout, SyncPool

from .deadlines import ACQUIRE_TIMEOUT, altered, check_overrun, ends_within, patient_deadlines, short_deadlines

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.Connection[Any]

CHECK_TIMEOUT = 0.25
SECONDS = short_deadlines(CHECK_TIMEOUT)
PATIENT = patient_deadlines(CHECK_TIMEOUT)


def assert_serves(pool: SyncPool[Connection]) -> None:
    with pool.acquire(timeout=20) as conn:
        assert conn.execute("select 'fine'").fetchall() == [("fine",)]


def in_a_statement(conn: Connection) -> None:
    conn.execute("select pg_sleep(600)")


def in_executemany(conn: Connection) -> None:
    conn.cursor().executemany("select pg_sleep(%s)", [(0,), (600,)])


def in_a_transaction_block(conn: Connection) -> None:
    with conn.transaction():
        conn.execute("select pg_sleep(600)")


def in_a_pipeline(conn: Connection) -> None:
    with conn.pipeline():
        conn.execute("select pg_sleep(600)").fetchall()


def in_a_stream(conn: Connection) -> None:
    for _ in conn.cursor().stream("select i, case when i > 10 then pg_sleep(600) end from generate_series(1, 20) i"):
        pass


def in_a_copy_out(conn: Connection) -> None:
    rows = "select i, case when i > 1000 then pg_sleep(600) end from generate_series(1, 2000) i"
    with conn.cursor().copy(f"copy ({rows}) to stdout".encode()) as copy:
        for _ in copy:
            pass


def in_a_copy_in(conn: Connection) -> None:
    conn.execute(
        """create temp table slow (id int);
        create function pg_temp.linger() returns trigger language plpgsql as
            $$ begin perform pg_sleep(600); return new; end $$;
        create trigger slow before insert on slow for each row execute function pg_temp.linger()"""
    )
    with conn.cursor().copy("copy slow from stdin") as copy:
        while True:
            copy.write(b"1\n" * 50_000)


ACTIVITIES: list[Callable[[Connection], None]] = [
    in_a_statement,
    in_executemany,
    in_a_transaction_block,
    in_a_pipeline,
    in_a_stream,
    in_a_copy_out,
    in_a_copy_in,
]
each_direction = pytest.mark.parametrize(
    "deaf", [Towards.SERVER, Towards.CLIENT, None], ids=["to server", "to client", "both ways"]
)


def asleep(admin: Admin, application_name: str) -> int:
    sleeping = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    return int(admin.value(sleeping, [application_name]))


@each_direction
@pytest.mark.parametrize("timeout", [0, 0.2])
def test_close_frees_threads_that_are_inside_on_stalled_sockets(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, timeout: float, deaf: Towards | None
) -> None:
    count = len(ACTIVITIES)
    pool = SyncPool(proxied_dsn, min_size=0, max_size=count, **PATIENT)
    pool.open()
    back: dict[str, float] = {}

    def work(activity: Callable[[Connection], None]) -> None:
        try:
            with pool.acquire(timeout=20) as conn:
                activity(conn)
        finally:
            back[activity.__name__] = time.monotonic()

    running = [in_thread(lambda activity=activity: work(activity)) for activity in ACTIVITIES]  # type: ignore[misc]
    eventually_blocking(lambda: asleep(admin, application_name) == count, timeout=20)
    proxy.apply(STALLED, deaf)
    began = time.monotonic()
    with ends_within(timeout + CHECK_TIMEOUT, f"close(timeout={timeout}) of a SyncPool"):
        pool.close(timeout=timeout)
    for thread in running:
        assert isinstance(thread.error(), psycopg.Error)
    for name, at in back.items():
        check_overrun(f"thread {name} after close({timeout})", at - began, timeout + CHECK_TIMEOUT)
    assert pool.stats().size == 0
    assert pool.stats().abandoned == count
    proxy.clear()
    pool.open()
    assert_serves(pool)
    pool.close()


@each_direction
def test_a_connection_that_another_thread_puts_back_frees_its_place_and_its_thread(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str, deaf: Towards | None
) -> None:
    with SyncPool(proxied_dsn, min_size=0, max_size=1, **PATIENT) as pool:
        conn = pool.getconn()
        running = in_thread(lambda: in_a_statement(conn))
        eventually_blocking(lambda: asleep(admin, application_name) == 1)
        proxy.links[0].apply(STALLED, deaf)
        proxy.apply_to_new(STALLED, deaf)
        began = time.monotonic()
        with ends_within(0, "putconn"):
            pool.putconn(conn)
        assert isinstance(running.error(), psycopg.Error)
        check_overrun("thread after putconn", time.monotonic() - began, CHECK_TIMEOUT)
        proxy.apply_to_new(FAIR)
        assert_serves(pool)
        assert pool.stats().closes == {CloseReason.RETURNED_BUSY: 1}
        assert pool.stats().abandoned == 1


@pytest.mark.parametrize("close", [True, False], ids=["to be closed", "as usual"])
def test_putconn_over_a_stalled_socket_returns_at_once(proxy: Proxy, proxied_dsn: str, close: bool) -> None:
    with SyncPool(proxied_dsn, min_size=0, max_size=1, **PATIENT) as pool:
        conn = pool.getconn()
        conn.execute("select 1")
        proxy.links[0].apply(STALLED)
        with ends_within(0, "putconn"):
            pool.putconn(conn, close=close)
        with ends_within(CHECK_TIMEOUT * (1 if close else 2), f"getconn after putconn, close={close}"):
            assert_serves(pool)
        assert pool.stats().closes == {CloseReason.DISCARDED if close else CloseReason.RESET_FAILED: 1}


def test_others_are_served_while_a_thread_hangs(proxy: Proxy, proxied_dsn: str) -> None:
    pool = SyncPool(proxied_dsn, min_size=0, max_size=3, **PATIENT)
    pool.open()
    conn = pool.getconn()
    conn.execute("select 1")
    proxy.links[0].apply(STALLED)
    hanging = in_thread(conn.commit)
    for running in in_threads(4, lambda: assert_serves(pool)):
        running.result()
    assert not hanging.done
    pool.close(timeout=0)
    assert isinstance(hanging.error(), psycopg.OperationalError)


CONNECT_FAULTS: dict[str, tuple[Callable[[Proxy], None], str]] = {
    "refused": (lambda proxy: proxy.receive(Arrival.REFUSE), "Connection refused"),
    "reset": (lambda proxy: proxy.receive(Arrival.RESET), "reset by peer|closed the connection"),
    "ignored": (lambda proxy: proxy.receive(Arrival.IGNORE), "timeout expired"),
    "stalled": (lambda proxy: proxy.apply(Weather(stall_after=100), Towards.CLIENT), "timeout expired"),
    "garbage": (lambda proxy: proxy.apply(GARBAGE, Towards.CLIENT), "received"),
}


@pytest.mark.parametrize("fault", CONNECT_FAULTS)
def test_getconn_ends_in_time_whatever_becomes_of_the_connects(proxy: Proxy, proxied_dsn: str, fault: str) -> None:
    begin, words = CONNECT_FAULTS[fault]
    with SyncPool(proxied_dsn, min_size=0, max_size=2, **SECONDS) as pool:
        begin(proxy)

        def get() -> None:
            with ends_within(ACQUIRE_TIMEOUT, f"getconn, {fault}"):
                pool.getconn()

        for running in in_threads(4, get):
            error = running.error()
            assert isinstance(error, PoolTimeout)
            assert isinstance(error.__cause__, psycopg.OperationalError)
            assert re.search(words, str(error))
        proxy.clear()
        assert_serves(pool)


@pytest.mark.parametrize("fault", CONNECT_FAULTS)
def test_open_ends_in_time(proxy: Proxy, proxied_dsn: str, fault: str) -> None:
    begin, words = CONNECT_FAULTS[fault]
    begin(proxy)
    pool = SyncPool(proxied_dsn, min_size=2, max_size=2, **SECONDS)
    deadline = ACQUIRE_TIMEOUT + CHECK_TIMEOUT
    with pytest.raises(PoolTimeout, match=words), ends_within(deadline, f"open of a SyncPool, {fault}"):
        pool.open()
    eventually_blocking(lambda: pool.stats().size == 0)


@pytest.mark.parametrize("max_size", [1, 2])
def test_a_stalled_idle_connection_is_replaced(proxy: Proxy, proxied_dsn: str, max_size: int) -> None:
    with SyncPool(proxied_dsn, min_size=1, max_size=max_size, **altered(PATIENT, check_interval=0)) as pool:
        proxy.links[0].apply(STALLED)
        with ends_within(CHECK_TIMEOUT * (2 if max_size == 1 else 1), f"check_timeout, SyncPool, max_size={max_size}"):
            assert_serves(pool)
        assert pool.stats().closes == {CloseReason.CHECK_FAILED: 1}


BREAKS: dict[str, Callable[[Proxy], None]] = {
    "reset": lambda proxy: proxy.links[-1].reset(),
    "half-closed": lambda proxy: proxy.links[-1].half_close(Towards.CLIENT),
    "garbage": lambda proxy: proxy.links[-1].apply(GARBAGE, Towards.CLIENT),
}


@pytest.mark.parametrize("how", BREAKS)
def test_what_breaks_while_a_thread_waits_is_told_to_it_and_replaced(proxy: Proxy, proxied_dsn: str, how: str) -> None:
    with SyncPool(proxied_dsn, min_size=0, max_size=1, **PATIENT) as pool:
        conn = pool.getconn()
        conn.execute("select 1")
        [link] = proxy.links
        link.apply(STALLED, Towards.CLIENT)  # the answer is held back until something breaks
        heard = link.received(Towards.CLIENT)
        running = in_thread(lambda: conn.execute("select repeat('x', 100)"))
        eventually_blocking(lambda: link.received(Towards.CLIENT) > heard)
        BREAKS[how](proxy)
        with ends_within(0, f"thread told of {how}"):
            assert isinstance(running.error(), psycopg.DatabaseError)
        pool.putconn(conn)
        proxy.clear()
        assert_serves(pool)


def test_a_block_on_a_connection_that_was_reset_says_that_nothing_is_committed(proxy: Proxy, proxied_dsn: str) -> None:
    with SyncPool(proxied_dsn, min_size=0, max_size=1, **PATIENT) as pool:
        with pytest.raises((psycopg.OperationalError, PoolError)), pool.acquire() as conn:
            conn.execute("create temp table t (id int)")
            proxy.links[0].reset()
        assert_serves(pool)


def test_one_byte_at_a_time_just_works(proxy: Proxy, proxied_dsn: str) -> None:
    proxy.apply(BYTE_BY_BYTE)
    with SyncPool(proxied_dsn, max_size=1, check_interval=0) as pool:
        for _ in range(2):
            with pool.acquire() as conn:
                assert conn.execute("select repeat('x', 5000)").fetchone() == ("x" * 5000,)
        assert pool.stats().connects == 1
