"""`(minconn, maxconn, *args, **kwargs)`: how psycopg2's users say where to connect, and what they get wrong."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

import asyncpool
import asyncpool.psycopg2 as psycopg2
from asyncpool.psycopg2 import pool as drop_in
from asyncpool.psycopg2.pool import (
    AbstractConnectionPool,
    PersistentConnectionPool,
    SimpleConnectionPool,
    ThreadedConnectionPool,
)

from .pools import closing, stats_of, value

if TYPE_CHECKING:
    from kit.servers import Admin, Server

CLASSES = [AbstractConnectionPool, SimpleConnectionPool, ThreadedConnectionPool, PersistentConnectionPool]


@pytest.mark.parametrize("pool_class", CLASSES)
def test_every_class_opens_minconn_connections_before_its_constructor_returns(
    dsn: str, admin: Admin, application_name: str, pool_class: type[AbstractConnectionPool]
) -> None:
    with closing(pool_class(3, 5, dsn)) as pool:
        assert admin.sessions(application_name) == 3
        assert (pool.minconn, pool.maxconn, pool.closed) == (3, 5, False)


def test_with_minconn_0_nothing_is_opened_until_it_is_needed(dsn: str, admin: Admin, application_name: str) -> None:
    with closing(ThreadedConnectionPool(0, 2, dsn)) as pool:
        assert admin.sessions(application_name) == 0
        conn = pool.getconn()
        assert admin.sessions(application_name) == 1
        pool.putconn(conn)


def test_the_methods_are_called_as_those_of_psycopg2() -> None:
    for pool_class in (SimpleConnectionPool, ThreadedConnectionPool):
        assert list(inspect.signature(pool_class.getconn).parameters) == ["self", "key"]
        assert list(inspect.signature(pool_class.putconn).parameters) == ["self", "conn", "key", "close"]
        assert list(inspect.signature(pool_class.closeall).parameters) == ["self"]
    assert list(inspect.signature(PersistentConnectionPool.getconn).parameters) == ["self"]
    assert list(inspect.signature(PersistentConnectionPool.putconn).parameters) == ["self", "conn", "close"]


def test_the_pool_module_is_an_attribute_and_its_error_one_of_psycopg_and_of_asyncpool() -> None:
    assert psycopg2.pool is drop_in
    assert issubclass(psycopg2.pool.PoolError, psycopg2.Error)
    assert issubclass(psycopg2.pool.PoolError, asyncpool.PoolError)


# --- where to connect ---------------------------------------------------------------------------------------


def parameters_of(dsn: str) -> dict[str, Any]:
    """A conninfo as psycopg2's keyword arguments: `database`, and a port that is a str."""
    parameters: dict[str, Any] = dict(conninfo_to_dict(dsn))
    parameters["database"] = parameters.pop("dbname")
    parameters["port"] = str(parameters.get("port", "5432"))
    return parameters


def assert_connects(name: str, /, *args: Any, **kwargs: Any) -> None:
    with closing(ThreadedConnectionPool(1, 2, *args, **kwargs)) as pool:
        conn = pool.getconn()
        assert value(conn, "show application_name") == name
        pool.putconn(conn)


def test_the_server_may_be_named_by_a_dsn_a_url_or_keywords(server: Server, dsn: str, application_name: str) -> None:
    assert_connects(application_name, dsn)
    assert_connects(application_name, dsn=dsn)
    separator = "&" if "?" in server.dsn else "?"
    assert_connects(application_name, f"{server.dsn}{separator}application_name={application_name}")
    parameters = parameters_of(dsn)
    assert_connects(application_name, **parameters)
    parameters["dbname"] = parameters.pop("database")
    parameters["port"] = int(parameters["port"])
    assert_connects(application_name, **parameters)


def test_a_keyword_overrides_what_the_dsn_says(server: Server, dsn: str, application_name: str) -> None:
    assert_connects(application_name, make_conninfo(dsn, application_name="other"), application_name=application_name)


def test_keywords_that_are_none_count_as_not_given(dsn: str, application_name: str) -> None:
    absent = {"password": None, "sslmode": None, "connection_factory": None, "cursor_factory": None, "timeout": None}
    assert_connects(application_name, **{**parameters_of(dsn), "dsn": None, **absent})


def test_the_sizes_may_be_text(dsn: str) -> None:
    with closing(ThreadedConnectionPool("1", "2", dsn)) as pool:
        assert (pool.minconn, pool.maxconn) == (1, 2)
        assert stats_of(pool).max_size == 2


def test_the_connect_timeout_may_be_text(dsn: str, application_name: str) -> None:
    assert_connects(application_name, dsn, connect_timeout="3")
    assert_connects(application_name, dsn, connect_timeout=3)


def test_a_connection_class_of_ones_own_is_what_getconn_gives(dsn: str) -> None:
    class Own(psycopg2.connection.LegacyConnection):
        def now(self) -> Any:
            return value(self, "select now()")

    with closing(ThreadedConnectionPool(1, 1, dsn, connection_factory=Own)) as pool:
        conn: Any = pool.getconn()
        assert isinstance(conn, Own)
        assert conn.now() is not None
        pool.putconn(conn)


def test_a_cursor_factory_makes_all_cursors_that_do_not_ask_for_another(dsn: str) -> None:
    class Shouting(psycopg.ClientCursor[Any]):
        def fetchone(self) -> Any:
            (text,) = super().fetchone() or ("",)
            return (text.upper(),)

    with closing(ThreadedConnectionPool(1, 1, dsn, cursor_factory=Shouting)) as pool:
        conn = pool.getconn()
        assert value(conn, "select 'x'") == "X"
        with conn.cursor(cursor_factory=psycopg.ClientCursor) as quiet:
            quiet.execute("select 'x'")
            assert quiet.fetchone() == ("x",)
        pool.putconn(conn)


def test_options_of_the_pool_that_psycopg2_has_not_are_taken_too(dsn: str) -> None:
    with closing(ThreadedConnectionPool(1, 1, dsn, name="orders", row_factory=dict_row, autocommit=True)) as pool:
        assert stats_of(pool).name == "orders"
        conn = pool.getconn()
        assert conn.autocommit
        with conn.cursor() as cursor:
            cursor.execute("select 1 as one")
            assert cursor.fetchone() == {"one": 1}
        pool.putconn(conn)


# --- what is wrong ------------------------------------------------------------------------------------------

UNREACHABLE = "host=127.0.0.1 port=1 user=nobody"


@pytest.mark.parametrize("pool_class", CLASSES)
def test_a_server_that_is_not_there_is_an_operational_error_at_once(pool_class: type[AbstractConnectionPool]) -> None:
    began = time.monotonic()
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        pool_class(1, 2, UNREACHABLE)
    assert time.monotonic() - began < 2


def test_a_server_that_refuses_is_an_operational_error_with_its_words(dsn: str) -> None:
    with pytest.raises(psycopg2.OperationalError, match='database "nowhere" does not exist'):
        ThreadedConnectionPool(1, 2, dsn, database="nowhere")


@pytest.mark.parametrize("options", [[], ["-X", "dev"]], ids=["plainly", "in development mode"])
def test_a_server_that_is_not_there_is_told_by_the_error_alone(options: list[str]) -> None:
    script = f"""
import asyncpool.psycopg2 as psycopg2
from asyncpool.psycopg2 import pool
try:
    pool.SimpleConnectionPool(2, 5, {UNREACHABLE!r})
except (Exception, psycopg2.DatabaseError) as error:
    print("failed:", type(error).__name__)
"""
    command = [sys.executable, *options, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "failed: OperationalError\n", "")


@pytest.mark.parametrize(
    ("sizes", "options", "error", "words"),
    [
        ((2, 1), {}, ValueError, "minconn=2 is greater than maxconn=1"),
        ((-1, 1), {}, ValueError, "minconn must be 0 or more, not -1"),
        ((0, 0), {}, ValueError, "maxconn must be 1 or more, not 0"),
        ((0, -1), {}, ValueError, "maxconn"),
        ((1, 2), {"nonsense": 1}, TypeError, "nonsense"),
        ((1, 2), {"async": 1}, TypeError, "async"),
        ((1, 2), {"async_": True}, TypeError, "async"),
        ((1, 2), {"min_size": 1}, TypeError, "min_size is called minconn"),
        ((1, 2), {"max_size": 1}, TypeError, "max_size is called maxconn"),
        ((1, 2), {"database": "a", "dbname": "a"}, TypeError, "both database= and dbname="),
        ((1, 2), {"timeout": -1}, ValueError, "timeout"),
        ((1, 2), {"timeout": "1"}, TypeError, "timeout"),
        ((1, 2), {"cursor_factory": object}, TypeError, "cursor_factory"),
        ((1, 2), {"connection_factory": object}, TypeError, "connection"),
        ((1, 2), {"dsn": 5}, TypeError, "dsn"),
        ((1, 2), {"dsn": "nonsense"}, psycopg.ProgrammingError, "connection info string"),
        ((1, 2), {"connect_timeout": "soon"}, ValueError, "connect_timeout"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    dsn: str, sizes: tuple[int, int], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ThreadedConnectionPool(*sizes, **{"dsn": dsn, **options})


def test_an_unknown_parameter_names_the_class_that_was_called(dsn: str) -> None:
    with pytest.raises(TypeError, match=r"^ThreadedConnectionPool\(\) got an unknown option 'conect_timeout'"):
        ThreadedConnectionPool(1, 1, dsn, conect_timeout=1)
