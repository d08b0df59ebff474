"""One-shot statements of threads: on the event loop's lanes, which the threads share, or on a lease in the thread."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking
from psycopg import sql
from psycopg.rows import class_row, dict_row

from asyncpool import (
    PoolClosed,
    PoolDeadlock,
    PoolTimeout,
    StatementOutcomeUnknown,
    StatementTimeout,
    SyncPool,
)

from .pools import FOREVER, assert_unharmed, exhausted
from .test_interrupts import interrupted_when

if TYPE_CHECKING:
    from kit.servers import Admin

with_and_without_lanes = pytest.mark.parametrize("lanes", [0, 1, 8])

# Longer than any test's patience.
SLEEP = "select pg_sleep(1000)"


@dataclass
class Reading:
    id: int


def into(table: str) -> bytes:
    return sql.SQL("insert into {} values (%s)").format(sql.Identifier(table)).as_bytes()


def rows(admin: Admin, table: str) -> list[int]:
    return [number for (number,) in admin.execute(f"select id from {table} order by id")]


# --- what they give back ------------------------------------------------------------------------------------


@with_and_without_lanes
def test_a_statement_is_committed_when_it_returns(dsn: str, admin: Admin, table: str, lanes: int) -> None:
    with SyncPool(dsn, lanes=lanes) as pool:
        assert pool.execute(into(table), (7,)) == "INSERT 0 1"
        assert rows(admin, table) == [7]
        assert pool.execute(into(table).replace(b"%s", b"%(id)s"), {"id": 8}) == "INSERT 0 1"
        assert rows(admin, table) == [7, 8]


@with_and_without_lanes
def test_rows_are_made_as_the_call_or_the_pool_says(dsn: str, lanes: int) -> None:
    query = "select generate_series(1, 2) as id"
    with SyncPool(dsn, lanes=lanes) as pool:
        assert pool.fetch(query) == [(1,), (2,)]
        assert pool.fetchrow(query) == (1,)
        assert pool.fetchval(query) == 1
        assert pool.fetch(query, row_factory=class_row(Reading)) == [Reading(1), Reading(2)]
        assert pool.fetchrow("select 1 where false") is None
        assert pool.fetchval("select 1 where false") is None
        assert pool.fetchval("select %s::int", (5,), binary=True) == 5
    with SyncPool(dsn, row_factory=dict_row, lanes=lanes) as other:
        assert other.fetch(query) == [{"id": 1}, {"id": 2}]


@with_and_without_lanes
def test_many_rows_come_whole(dsn: str, lanes: int) -> None:
    with SyncPool(dsn, lanes=lanes) as pool:
        found = pool.fetch("select i, i::text from generate_series(1, 50000) i")
        assert found == [(number, str(number)) for number in range(1, 50001)]


def test_many_sets_of_parameters_are_stored_all_or_not_at_all(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn) as pool:
        assert pool.executemany(into(table), [(1,), (2,), (3,)]) == 3
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            pool.executemany(into(table), [(4,), ("five",)])
        assert rows(admin, table) == [1, 2, 3]


# --- errors -------------------------------------------------------------------------------------------------


@with_and_without_lanes
def test_an_error_is_its_callers_and_harms_nobody(dsn: str, lanes: int) -> None:
    with SyncPool(dsn, lanes=lanes) as pool:
        with pytest.raises(psycopg.errors.DivisionByZero):
            pool.fetchval("select 1/0")
        with pytest.raises(psycopg.errors.SyntaxError) as told:
            pool.execute("selec")
        assert told.value.diag.statement_position == "1"
        with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
            pool.execute("select %s", (object(),))
        with pytest.raises(psycopg.ProgrammingError, match=r"BEGIN .*pool\.acquire\(\)"):
            pool.execute("begin")
        assert pool.fetchval("select 1") == 1
        assert_unharmed(pool)


def test_a_pool_that_is_not_open_says_so(dsn: str) -> None:
    pool = SyncPool(dsn)
    with pytest.raises(PoolClosed, match="is not open"):
        pool.execute("select 1")
    with pool:
        pool.execute("select 1")
    with pytest.raises(PoolClosed, match="is closed"):
        pool.execute("select 1")


@with_and_without_lanes
def test_a_statement_that_was_sent_and_takes_too_long_is_given_up(dsn: str, lanes: int) -> None:
    with SyncPool(dsn, lanes=lanes, max_size=2) as pool:
        for _ in range(3):
            with pytest.raises(StatementTimeout):
                pool.execute(SLEEP, timeout=0.1)
            assert pool.fetchval("select 1") == 1
        eventually_blocking(lambda: pool.stats().leased == 0)
        assert_unharmed(pool)


@with_and_without_lanes
def test_a_statement_that_could_not_be_sent_in_time_says_so(dsn: str, lanes: int) -> None:
    with exhausted(dsn, lanes=lanes) as (pool, _):
        with pytest.raises(PoolTimeout):
            pool.execute("select 1", timeout=0.1)
        assert pool.stats().waiting == 0


def test_the_loss_of_a_lane_is_told_to_those_whose_statements_were_sent(dsn: str) -> None:
    with SyncPool(dsn) as pool:
        with pytest.raises(StatementOutcomeUnknown) as told:
            pool.execute("select pg_terminate_backend(pg_backend_pid())")
        assert isinstance(told.value.__cause__, psycopg.errors.AdminShutdown)
        assert pool.fetchval("select 1") == 1


def test_a_statement_in_a_block_that_holds_the_last_connection_is_refused_at_once(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pool.acquire(), pytest.raises(PoolDeadlock):
            pool.execute("select 1")
        with pool.acquire():
            waiting = in_thread(lambda: pool.fetchval("select 1"))
            eventually_blocking(lambda: pool.stats().waiting == 1)
        assert waiting.result() == 1


# --- many threads -------------------------------------------------------------------------------------------


@with_and_without_lanes
def test_every_thread_gets_its_own_answers(dsn: str, lanes: int) -> None:
    def work() -> None:
        mine = os.urandom(8)
        for number in range(50):
            assert pool.fetchrow("select %s::bytea, %s::int", (mine, number)) == (mine, number)

    with SyncPool(dsn, lanes=lanes, max_size=4) as pool:
        for running in in_threads(16, work):
            running.result()
        eventually_blocking(lambda: pool.stats().leased == 0)
        assert pool.stats().one_shots == 16 * 50


def test_threads_that_lease_and_threads_that_do_not_share_one_connection(dsn: str) -> None:
    def lease() -> None:
        for _ in range(50):
            with pool.acquire() as conn:
                conn.execute("select 1")

    def one_shot() -> None:
        for _ in range(50):
            pool.execute("select 1")

    with SyncPool(dsn, max_size=1) as pool:
        for running in [*in_threads(4, lease), *in_threads(4, one_shot)]:
            running.result()


# --- Ctrl-C, close, fork ------------------------------------------------------------------------------------


@with_and_without_lanes
def test_ctrl_c_while_waiting_to_be_sent_leaves_nothing_behind(dsn: str, lanes: int) -> None:
    with exhausted(dsn, lanes=lanes, acquire_timeout=None) as (pool, conn):
        for _ in range(3):
            with interrupted_when(lambda: pool.stats().waiting == 1):
                pool.execute("select 1")
            eventually_blocking(lambda: pool.stats().waiting == 0)
        pool.putconn(conn)
        assert pool.fetchval("select 1") == 1
        assert pool.getconn(timeout=FOREVER) is conn


@with_and_without_lanes
def test_ctrl_c_while_the_server_works_leaves_nothing_behind(
    dsn: str, admin: Admin, application_name: str, lanes: int
) -> None:
    with SyncPool(dsn, lanes=lanes, max_size=2) as pool:
        for _ in range(3):
            with interrupted_when(lambda: admin.asleep(application_name) == 1):
                pool.execute(SLEEP)
            eventually_blocking(lambda: admin.asleep(application_name) == 0)
        eventually_blocking(lambda: pool.stats().leased == 0)
        assert_unharmed(pool)


@with_and_without_lanes
def test_close_ends_the_wait_for_statements(dsn: str, admin: Admin, application_name: str, lanes: int) -> None:
    pool = SyncPool(dsn, lanes=lanes, min_size=1, max_size=1)
    pool.open()
    sent = in_thread(lambda: pool.execute(SLEEP))
    eventually_blocking(lambda: admin.asleep(application_name) == 1)
    unsent = in_thread(lambda: pool.execute("select 1"))
    eventually_blocking(lambda: pool.stats().waiting == 1)
    pool.close(timeout=0)
    assert isinstance(unsent.error(), PoolClosed)
    assert isinstance(sent.error(), psycopg.OperationalError)
    assert pool.stats().size == 0


def test_threads_that_go_on_while_the_pool_is_closed_all_come_back(dsn: str) -> None:
    def work() -> None:
        with pytest.raises((PoolClosed, StatementOutcomeUnknown)):
            while True:
                pool.execute("select 1")

    for _ in range(10):
        pool = SyncPool(dsn, max_size=2)
        pool.open()
        working = in_threads(4, work)
        eventually_blocking(lambda: pool.stats().one_shots > 100)  # noqa: B023
        pool.close()
        for running in working:
            running.result()


def _in_child(pool: SyncPool[Any], answers: Any) -> None:
    answers.put(pool.fetchval("select pg_backend_pid()"))


def test_a_forked_child_sends_its_statements_on_sessions_of_its_own(dsn: str) -> None:
    with SyncPool(dsn) as pool:
        parents = pool.fetchval("select pg_backend_pid()")
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(pool, answers))
        child.start()
        assert answers.get() != parents
        child.join(20)
        assert child.exitcode == 0
        assert pool.fetchval("select pg_backend_pid()") == parents


def test_a_statement_takes_no_time_of_a_connection_when_it_is_over(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        pool.execute("select 1")
        began = time.monotonic()
        pool.putconn(pool.getconn(timeout=20))
        assert time.monotonic() - began < 10
