"""`with pool.acquire()` and `with pool.transaction()`: what a block commits, and what it leaves behind."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import psycopg
import pytest

from asyncpool import CloseReason, PoolError, SyncPool

from .pools import Connection, assert_unharmed, first_value, insert, warnings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.servers import Admin

IDLE = psycopg.pq.TransactionStatus.IDLE
INTRANS = psycopg.pq.TransactionStatus.INTRANS


def rows(admin: Admin, table: str) -> list[int]:
    return [number for (number,) in admin.execute(f"select id from {table} order by id")]


# --- acquire() ----------------------------------------------------------------------------------------------


def test_a_block_commits_at_its_end(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pool.acquire() as conn:
            insert(conn, table)
            assert rows(admin, table) == []
        assert rows(admin, table) == [1]
        assert pool.stats().idle == 1


def test_a_block_rolls_back_after_an_exception(
    dsn: str, admin: Admin, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(LookupError, match="mine"), pool.acquire() as conn:
            insert(conn, table)
            raise LookupError("mine")
        with pool.acquire() as conn:
            assert conn.info.transaction_status == IDLE
        assert rows(admin, table) == []
        assert pool.stats().connects == 1
    assert warnings_of(caplog) == []


def test_a_block_that_did_nothing_asks_the_server_nothing(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        asked = "select max(state_change) from pg_stat_activity where application_name = %s"
        before = admin.value(asked, [application_name])
        with pool.acquire() as conn:
            assert conn.info.transaction_status == IDLE
        assert admin.value(asked, [application_name]) == before


def test_a_block_that_commits_by_itself_goes_on(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool, pool.acquire() as conn:
        insert(conn, table, 1)
        conn.commit()
        insert(conn, table, 2)
        conn.rollback()
        insert(conn, table, 3)
    assert rows(admin, table) == [1, 3]


def test_a_block_with_autocommit_commits_each_statement(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1, autocommit=True) as pool:
        with pytest.raises(LookupError), pool.acquire() as conn:
            insert(conn, table)
            raise LookupError
        assert rows(admin, table) == [1]


def test_a_block_that_ends_in_a_failed_transaction_says_so(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(PoolError, match="failed transaction, which is rolled back"), pool.acquire() as conn:
            insert(conn, table)
            with pytest.raises(psycopg.errors.DivisionByZero):
                conn.execute("select 1/0")
        assert rows(admin, table) == []
        assert_unharmed(pool)
        assert pool.stats().connects == 1


def test_what_the_commit_raises_passes(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(psycopg.errors.UniqueViolation), pool.acquire() as conn:
            insert(conn, table)
            insert(conn, table)
        assert rows(admin, table) == []
        assert_unharmed(pool)


def leave_a_transaction_block(conn: Connection, stack: ExitStack) -> None:
    stack.enter_context(conn.transaction())


def leave_a_pipeline(conn: Connection, stack: ExitStack) -> None:
    stack.enter_context(conn.pipeline())
    conn.execute("select 1")


def leave_a_stream(conn: Connection, stack: ExitStack) -> None:
    rows = conn.cursor().stream("select generate_series(1, 100000)")
    stack.callback(rows.close)  # type: ignore[attr-defined]  # a generator, in truth
    next(rows)


def leave_a_copy(conn: Connection, stack: ExitStack) -> None:
    copy = stack.enter_context(conn.cursor().copy("copy (select generate_series(1, 100000)) to stdout"))
    copy.read()


def leave_a_two_phase_transaction(conn: Connection, stack: ExitStack) -> None:
    conn.tpc_begin("some transaction")
    conn.execute("select 1")


LEFTOVERS: list[tuple[Callable[[Connection, ExitStack], None], str]] = [
    (leave_a_transaction_block, "inside conn.transaction"),
    (leave_a_pipeline, "pipeline"),
    (leave_a_stream, "stream"),
    (leave_a_copy, "COPY"),
    (leave_a_two_phase_transaction, "two-phase"),
]


@pytest.mark.parametrize(("leave", "words"), LEFTOVERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_block_left_in_the_middle_of_something_says_so_and_its_connection_is_closed(
    dsn: str,
    leave: Callable[[Connection, ExitStack], None],
    words: str,
    admin: Admin,
    table: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stack = ExitStack()
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(PoolError, match=f"{words}.*closed, and nothing committed"), pool.acquire() as conn:
            if leave is not leave_a_two_phase_transaction:
                insert(conn, table)
            leave(conn, stack)
        assert pool.stats().closes == {CloseReason.RETURNED_BUSY: 1}
        assert_unharmed(pool)
        with suppress(psycopg.Error):  # some of them end in silence
            stack.close()
    assert rows(admin, table) == []
    assert any(words in warning for warning in warnings_of(caplog))


def test_a_connection_given_back_inside_its_block_is_left_alone_at_its_end(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pool.acquire() as conn:
            pool.putconn(conn)
            with pool.acquire() as again:
                insert(again, table)
                assert pool.stats().leased == 1
        assert rows(admin, table) == [1]
        with pool.acquire() as first:
            pool.putconn(first)
            other = pool.getconn()
        assert pool.stats().leased == 1  # the end of the block was not the other's
        pool.putconn(other)
        assert_unharmed(pool)


def test_a_block_that_lost_its_connection_in_a_transaction_says_that_nothing_is_committed(
    dsn: str, admin: Admin, table: str
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(PoolError, match=r"lost inside the block.*not committed"), pool.acquire() as conn:
            insert(conn, table)
            admin.terminate(conn.info.backend_pid)
            with pytest.raises(psycopg.OperationalError):
                conn.execute("select 1")
        assert_unharmed(pool)


def test_psycopgs_own_block_on_a_connection_leaves_it_leased(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        with conn:
            insert(conn, table)
        assert rows(admin, table) == [1]
        assert pool.stats().leased == 1
        assert first_value(conn, "select 1") == 1
        pool.putconn(conn)


def test_close_of_the_connection_gives_it_back(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        conn.close()
        conn.close()
        assert pool.stats().idle == 1
        with pool.acquire() as conn:
            assert conn.info.backend_pid == pid


def test_a_block_that_nobody_enters_takes_nothing(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        pool.acquire()
        pool.transaction()
        assert pool.stats().leased == 0
        assert pool.stats().acquires == 0


# --- transaction() ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_transaction_block_commits_at_its_end(dsn: str, admin: Admin, table: str, autocommit: bool) -> None:
    with SyncPool(dsn, max_size=1, autocommit=autocommit) as pool:
        with pool.transaction() as conn:
            insert(conn, table)
            assert conn.info.transaction_status == INTRANS
            assert rows(admin, table) == []
        assert rows(admin, table) == [1]
        assert pool.stats().idle == 1


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_transaction_block_rolls_back_after_an_exception(
    dsn: str, admin: Admin, table: str, autocommit: bool
) -> None:
    with SyncPool(dsn, max_size=1, autocommit=autocommit) as pool:
        with pytest.raises(LookupError), pool.transaction() as conn:
            insert(conn, table)
            raise LookupError
        assert rows(admin, table) == []
        assert_unharmed(pool)
        assert pool.stats().connects == 1


def test_a_transaction_block_is_undone_alone_by_psycopgs_rollback(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pool.transaction() as conn:
            insert(conn, table, 1)
            with conn.transaction(force_rollback=True):
                insert(conn, table, 2)
        assert rows(admin, table) == [1]


def test_what_the_commit_of_a_transaction_block_raises_passes(dsn: str, admin: Admin, table: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(psycopg.errors.UniqueViolation), pool.transaction() as conn:
            insert(conn, table)
            insert(conn, table)
        assert rows(admin, table) == []
        assert_unharmed(pool)


@pytest.mark.parametrize("give_back", ["close", "putconn"])
def test_a_block_whose_connection_was_given_back_with_a_transaction_open_says_that_it_is_undone(
    dsn: str, admin: Admin, table: str, give_back: str
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pytest.raises(PoolError, match="given back inside of it"), pool.acquire() as conn:
            insert(conn, table)
            conn.close() if give_back == "close" else pool.putconn(conn)
        with pool.acquire() as conn:
            insert(conn, table)
            conn.commit()
            conn.close()
        assert rows(admin, table) == [1]
