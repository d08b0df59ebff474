"""What a user sets on a connection, and with `reset` on the session, never reaches the next one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually_blocking
from psycopg.adapt import Loader
from psycopg.rows import dict_row

from asyncpool import SyncPool

from .pools import Connection, first_value

if TYPE_CHECKING:
    from kit.servers import Admin
    from psycopg.abc import Buffer


class Shouting(Loader):
    """A loader that returns text in capitals."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode().upper()


class OwnCursor(psycopg.Cursor[Any]):
    """Somebody's own cursor class."""


notices: list[str] = []


def notices_heard(conn: Connection) -> list[str]:
    notices.clear()
    conn.execute("do $$ begin raise notice 'listen'; end $$")
    return list(notices)


def notifications_heard(conn: Connection) -> list[str]:
    notices.clear()
    conn.execute("listen here")
    conn.execute("notify here, 'something'")
    conn.commit()
    conn.execute("unlisten *")
    conn.commit()
    return list(notices)


def transaction_settings(conn: Connection) -> tuple[Any, ...]:
    names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
    return tuple(first_value(conn, f"show {name}") for name in names)


def set_(name: str, value: object) -> Callable[[Connection], None]:
    def change(conn: Connection) -> None:
        setattr(conn, name, value)

    change.__name__ = name
    return change


def set_read_only_and_use_it(conn: Connection) -> None:
    conn.read_only = True
    conn.execute("select 1")  # psycopg keeps the BEGIN that it built for it
    conn.commit()


def add_notice_handler(conn: Connection) -> None:
    conn.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))


def add_notify_handler(conn: Connection) -> None:
    conn.add_notify_handler(lambda notification: notices.append(notification.payload))


def register_loader(conn: Connection) -> None:
    conn.adapters.register_loader("text", Shouting)


SETTINGS: list[tuple[Callable[[Connection], None], Callable[[Connection], object]]] = [
    (set_("autocommit", True), lambda conn: (conn.execute("select 1"), conn.info.transaction_status)[1]),
    (set_("isolation_level", psycopg.IsolationLevel.SERIALIZABLE), transaction_settings),
    (set_("read_only", True), transaction_settings),
    (set_read_only_and_use_it, transaction_settings),
    (set_("deferrable", True), transaction_settings),
    (set_("row_factory", dict_row), lambda conn: type(conn.execute("select 1 as one").fetchone())),
    (set_("cursor_factory", OwnCursor), lambda conn: type(conn.cursor())),
    (set_("prepare_threshold", None), lambda conn: conn.prepare_threshold),
    (set_("prepared_max", 3), lambda conn: conn.prepared_max),
    (add_notice_handler, notices_heard),
    (add_notify_handler, notifications_heard),
    (register_loader, lambda conn: first_value(conn, "select 'loud'::text")),
]
each_setting = pytest.mark.parametrize(("change", "look"), SETTINGS, ids=lambda value: value.__name__.strip("<>"))


def do_nothing(_: Connection) -> None:
    pass


@each_setting
@pytest.mark.parametrize(
    "options",
    [{}, {"debug": True}, {"reset": "session"}, {"reset": "discard"}, {"reset": do_nothing}],
    ids=["rollback", "debug", "session", "discard", "callable"],
)
def test_a_setting_ends_with_the_block(
    dsn: str, change: Callable[[Connection], None], look: Callable[[Connection], object], options: dict[str, Any]
) -> None:
    with SyncPool(dsn, max_size=1, **options) as pool:
        with pool.acquire() as conn:
            before = look(conn)
        for _ in range(2):
            with pool.acquire() as conn:
                change(conn)
                assert look(conn) != before, "the change itself"
            with pool.acquire() as conn:
                assert look(conn) == before
        assert pool.stats().connects == 1


@each_setting
def test_a_setting_that_nothing_followed_ends_with_the_lease(
    dsn: str, change: Callable[[Connection], None], look: Callable[[Connection], object]
) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pool.acquire() as conn:
            before = look(conn)
        conn = pool.getconn()
        change(conn)
        pool.putconn(conn)
        with pool.acquire() as conn:
            assert look(conn) == before


def test_what_is_set_on_a_connection_after_its_release_is_no_users(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pool.putconn(conn)
        set_("row_factory", dict_row)(conn)
        conn.prepare_threshold = None
        with pool.acquire() as conn:
            assert conn.execute("select 1").fetchone() == (1,)
            assert conn.prepare_threshold == 5


def test_after_an_exception_settings_end_too(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with suppress(LookupError), pool.acquire() as conn:
            set_("row_factory", dict_row)(conn)
            conn.execute("select 1")
            raise LookupError
        with pool.acquire() as conn:
            assert conn.execute("select 1").fetchone() == (1,)


# --- the session --------------------------------------------------------------------------------------------

STATES = [
    ("set work_mem = '77MB'", "show work_mem"),
    ("set search_path = pg_catalog", "show search_path"),
    ("listen here", "select count(*) from pg_listening_channels()"),
    ("create temp table own (id int)", "select count(*) from pg_class where relname = 'own'"),
    ("prepare own as select 1", "select count(*) from pg_prepared_statements where name = 'own'"),
    ("set default_transaction_read_only = on", "show transaction_read_only"),
]


@pytest.mark.parametrize("mode", ["session", "discard"])
def test_what_was_done_to_the_session_is_undone(dsn: str, mode: Any) -> None:
    with SyncPool(dsn, max_size=1, reset=mode) as pool:
        for statement, query in STATES:
            with pool.acquire() as conn:
                before = first_value(conn, query)
            with pool.acquire() as conn:
                conn.execute(statement.encode())
                conn.commit()
                assert first_value(conn, query) != before, "the statement itself"
            with pool.acquire() as conn:
                assert first_value(conn, query) == before
        assert pool.stats().connects == 1


def test_an_advisory_lock_is_free_soon_after_the_block(dsn: str, admin: Admin) -> None:
    with SyncPool(dsn, reset="session") as pool:
        with pool.acquire() as conn:
            conn.execute("select pg_advisory_lock(4714)")
            assert admin.value("select pg_try_advisory_lock(4714)") is False
        eventually_blocking(lambda: admin.value("select pg_try_advisory_lock(4714)"))
        admin.execute("select pg_advisory_unlock(4714)")


def test_with_rollback_only_the_session_is_left_as_it_is(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        with pool.acquire() as conn:
            conn.execute("set work_mem = '77MB'")
        with pool.acquire() as conn:
            assert first_value(conn, "show work_mem") == "77MB"


@pytest.mark.parametrize("mode", ["rollback", "session", "discard"])
def test_statements_prepared_before_go_on_working(dsn: str, mode: Any) -> None:
    with SyncPool(dsn, max_size=1, reset=mode, prepare_threshold=0) as pool:
        for number in range(5):
            with pool.acquire() as conn:
                assert first_value(conn, "select %s::int", (number,)) == number
            with suppress(LookupError), pool.acquire() as conn:
                assert first_value(conn, "select %s::int + 1", (number,)) == number + 1
                raise LookupError
        assert pool.stats().connects == 1


def test_a_callable_resets_what_it_wants_to(dsn: str) -> None:
    def reset(conn: Connection) -> None:
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        conn.execute("reset work_mem")
        conn.commit()

    with SyncPool(dsn, max_size=1, reset=reset) as pool:
        with pool.acquire() as conn:
            before = first_value(conn, "show work_mem")
        with pool.acquire() as conn:
            conn.execute("set work_mem = '77MB'")
        with pool.acquire() as conn:
            assert first_value(conn, "show work_mem") == before
        assert pool.stats().connects == 1
