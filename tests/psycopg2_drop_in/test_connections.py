"""Connections of the pool behave as a script for psycopg2 expects."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg.sql
import pytest
from kit.waiting import eventually_blocking
from psycopg.rows import dict_row

import asyncpool.psycopg2 as psycopg2
from asyncpool.psycopg2.pool import ThreadedConnectionPool

from .pools import closing, value, wait_until_idle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin


@pytest.fixture
def conn(dsn: str) -> Iterator[Any]:
    """A connection of a pool."""
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        connection = pool.getconn()
        yield connection
        pool.putconn(connection)


def test_a_block_commits_and_does_not_close(conn: Any, admin: Admin, table: str) -> None:
    with conn as entered, conn.cursor() as cursor:
        assert entered is conn
        cursor.execute(f"insert into {table} values (1)")
    assert admin.value(f"select count(*) from {table}") == 1
    assert conn.closed == 0
    assert value(conn, "select 1") == 1


def test_a_block_that_an_exception_leaves_rolls_back_and_does_not_close(conn: Any, admin: Admin, table: str) -> None:
    with pytest.raises(LookupError), conn:
        conn.cursor().execute(f"insert into {table} values (1)")
        raise LookupError
    assert admin.value(f"select count(*) from {table}") == 0
    assert conn.closed == 0
    assert conn.info.transaction_status == 0


def test_a_block_is_a_transaction_with_autocommit_too(conn: Any, admin: Admin, table: str) -> None:
    conn.autocommit = True
    with pytest.raises(LookupError), conn:
        conn.cursor().execute(f"insert into {table} values (1)")
        raise LookupError
    assert admin.value(f"select count(*) from {table}") == 0
    with conn:
        conn.cursor().execute(f"insert into {table} values (2)")
    assert conn.autocommit
    assert admin.value(f"select id from {table}") == 2
    conn.cursor().execute(f"insert into {table} values (3)")
    assert admin.value(f"select count(*) from {table}") == 2


def test_a_commit_that_fails_at_the_end_of_a_block_is_told_and_leaves_the_connection_usable(
    conn: Any, table: str
) -> None:
    conn.autocommit = True
    with pytest.raises(psycopg2.IntegrityError), conn:
        conn.cursor().execute(f"insert into {table} values (1), (1)")
    assert conn.autocommit
    assert value(conn, f"select count(*) from {table}") == 0


def test_the_error_that_ends_a_block_is_not_hidden_by_that_of_a_lost_connection(conn: Any, admin: Admin) -> None:
    with pytest.raises(LookupError), conn:
        assert value(conn, "select 1") == 1
        admin.terminate(conn.info.backend_pid)
        raise LookupError


def test_values_are_bound_on_the_client(conn: Any) -> None:
    with conn.cursor() as cursor:
        # A server takes no parameters in any of these.
        cursor.execute("set local statement_timeout = %s", ("1min",))
        cursor.execute("create temp view v as select %s as x, %s as y", ("it's", 1))
        cursor.execute("select * from v; select x from v where y in %s and x = any(%s)", ((1, 2), ["it's", "b"]))
        assert cursor.fetchall() == [("it's",)]
    for _ in range(10):
        assert value(conn, "select count(*) from pg_prepared_statements where %s", (True,)) == 0


def test_a_named_cursor_stays_on_the_server(conn: Any) -> None:
    with conn.cursor("numbers") as cursor:
        cursor.itersize = 2
        cursor.execute("select * from generate_series(1, 5) i where i in %s", ((1, 2, 3, 4),))
        assert value(conn, "select name from pg_cursors") == "numbers"
        assert cursor.fetchone() == (1,)
        assert [number for (number,) in cursor] == [2, 3, 4]


def test_a_cursor_may_be_asked_for_by_its_class(conn: Any) -> None:
    class Own(psycopg.ClientCursor[Any]):
        pass

    assert isinstance(conn.cursor(cursor_factory=Own), Own)
    with conn.cursor(row_factory=dict_row) as cursor:
        cursor.execute("select 1 as one")
        assert cursor.fetchone() == {"one": 1}
    with pytest.raises(TypeError, match=r"cursor_factory must be .*row_factory=psycopg\.rows\.dict_row"):
        conn.cursor(cursor_factory=dict)


@pytest.mark.parametrize(
    ("level", "name"),
    [
        (1, "read committed"),
        (2, "repeatable read"),
        (3, "serializable"),
        (4, "read uncommitted"),
        ("SERIALIZABLE", "serializable"),
        ("repeatable read", "repeatable read"),
        (psycopg.IsolationLevel.SERIALIZABLE, "serializable"),
        (None, "read committed"),
        ("default", "read committed"),
    ],
)
def test_isolation_levels_have_psycopg2s_numbers_and_names(conn: Any, level: object, name: str) -> None:
    conn.set_isolation_level(level)
    assert value(conn, "show transaction_isolation") == name
    conn.rollback()
    conn.set_isolation_level(0)
    conn.isolation_level = level
    assert not conn.autocommit
    assert value(conn, "show transaction_isolation") == name


@pytest.mark.parametrize("level", [5, -1, "chaos"])
def test_an_isolation_level_that_there_is_not_is_refused(conn: Any, level: object) -> None:
    with pytest.raises(ValueError, match="isolation_level"):
        conn.set_isolation_level(level)


def test_a_connection_of_no_pool_is_closed_once_and_for_all(dsn: str, admin: Admin, application_name: str) -> None:
    conn = psycopg2.connect(dsn)
    assert conn.closed == 0
    with conn:
        assert value(conn, "select 1") == 1
    assert conn.closed == 0
    conn.close()
    assert conn.closed
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_one_handler_for_all_errors_of_the_database_works_under_the_modules_old_name(dsn: str) -> None:
    caught: list[BaseException] = []
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        try:
            conn.cursor().execute("select * from nowhere")
        except (Exception, psycopg2.DatabaseError) as error:  # noqa: BLE001  # as scripts have it
            caught.append(error)
        pool.putconn(conn)
        wait_until_idle(pool, 1)
    assert [isinstance(error, psycopg2.ProgrammingError) for error in caught] == [True]


def test_every_public_name_of_pep_249_is_there() -> None:
    exceptions = "Warning Error InterfaceError DatabaseError DataError OperationalError IntegrityError InternalError"
    types = (
        "Date Time Timestamp DateFromTicks TimeFromTicks TimestampFromTicks Binary STRING BINARY NUMBER DATETIME ROWID"
    )
    others = "ProgrammingError NotSupportedError connect apilevel threadsafety paramstyle"
    for name in f"{exceptions} {types} {others}".split():
        assert hasattr(psycopg2, name), name
        assert name in psycopg2.__all__


@pytest.mark.parametrize(
    "line", ["import asyncpool.psycopg2 as psycopg2", "from asyncpool import psycopg2"], ids=["as", "from"]
)
def test_the_pool_is_an_attribute_after_either_import(line: str) -> None:
    script = f"{line}\nprint(psycopg2.pool.ThreadedConnectionPool.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("ThreadedConnectionPool\n", "")


def test_with_conn_cannot_be_entered_twice(dsn: str) -> None:
    pool = ThreadedConnectionPool(1, 1, dsn)
    conn = pool.getconn()
    conn.autocommit = True
    with conn, pytest.raises(psycopg.ProgrammingError, match="recursively"), conn:
        pass
    assert conn.autocommit
    pool.closeall()


def test_a_closed_connection_is_refused_as_by_psycopg2_and_by_psycopg(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        conn.close()
        for use in (conn.cursor, conn.commit, conn.rollback):
            for expected in (psycopg2.InterfaceError, psycopg2.OperationalError):
                with pytest.raises(expected, match=r"^connection already closed$"):
                    use()
        pool.putconn(conn)


def test_a_cursor_of_a_closed_connection_is_refused_with_an_error_of_pep_249(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn)) as pool:
        conn = pool.getconn()
        cursor = conn.cursor()
        conn.close()
        with pytest.raises(psycopg2.Error):
            cursor.execute("select 1")
        pool.putconn(conn)


def test_the_usual_imports_of_its_modules_work() -> None:
    errors = importlib.import_module("asyncpool.psycopg2.errors")
    sql = importlib.import_module("asyncpool.psycopg2.sql")
    assert errors.UniqueViolation is psycopg.errors.UniqueViolation
    assert errors.lookup("23505") is psycopg.errors.UniqueViolation
    assert sql.SQL is psycopg.sql.SQL
    assert sql.Identifier is psycopg.sql.Identifier
    assert psycopg2.errors is errors
    assert psycopg2.sql is sql
