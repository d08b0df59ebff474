"""What nobody should give to a pool: refused at once, in words that name it, and the pool as before."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.nasty import NASTY, check_clear, fuzzing, is_bool, is_none, is_size, is_time, refusal
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolClosed, PoolError, SyncPool
from asyncpool.config import OPTION_NAMES
from asyncpool.conninfo import CONNECT_OPTIONS
from asyncpool.psycopg2.pool import PersistentConnectionPool, ThreadedConnectionPool
from asyncpool.psycopg2.pool import PoolError as DropInPoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")

OPTIONS = sorted(OPTION_NAMES | CONNECT_OPTIONS | {"connection_class", "conninfo"})

# libpq's own words for them.
IN_OTHER_WORDS = {
    "conninfo": ("connection info string", "connection parameters"),
    "scram_client_key": ("SCRAM client key",),
    "scram_server_key": ("SCRAM server key",),
}

each_value = pytest.mark.parametrize("value", NASTY)
each_class = pytest.mark.parametrize("pool_class", [Pool, SyncPool])

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.dates(), st.lists(st.integers())
)


def make(pool_class: Any, option: str, value: object) -> Any:
    options = {"conninfo": "host=/nowhere", option: value}
    return pool_class(options.pop("conninfo"), **options)


def refused(pool_class: Any, option: str, value: object) -> Exception | None:
    return refusal(lambda: make(pool_class, option, value), option, *IN_OTHER_WORDS.get(option, ()))


# --- options ------------------------------------------------------------------------------------------------


@each_class
@each_value
def test_an_option_is_taken_or_refused_by_name_when_the_pool_is_made(pool_class: Any, value: str) -> None:
    for option in OPTIONS:
        refused(pool_class, option, NASTY[value])


@each_class
@fuzzing(200)
@given(option=st.sampled_from(OPTIONS), value=ANYTHING)
def test_so_is_any_value(pool_class: Any, option: str, value: object) -> None:
    refused(pool_class, option, value)


# More than the server can give; and none, by which the second lease below is refused.
UNAFFORDABLE = {"min_size", "max_waiting"}


@pytest.mark.parametrize("option", sorted(OPTION_NAMES - {"configure", "check", "setup", "reset", "name", "monitor"}))
async def test_a_pool_with_an_option_that_was_taken_works(dsn: str, option: str) -> None:
    taken = [value for value in NASTY.values() if option not in UNAFFORDABLE and not refused(Pool, option, value)]
    assert all(value is None or isinstance(value, (bool, int, float)) for value in taken)
    for value in taken:
        impatient = {"connect_timeout", "check_timeout"} & {option} and value < 1
        options: Any = {"min_size": 0, "max_size": 2, option: value}
        async with Pool(dsn, **options) as pool:
            if not impatient:
                async with pool.acquire(timeout=None) as conn, pool.acquire(timeout=None):
                    await conn.execute("select 1")
        with SyncPool(dsn, **options) as other:
            if not impatient:
                with other.acquire(timeout=None) as blocking, other.acquire(timeout=None):
                    blocking.execute("select 1")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("acquire_timeout", 10**400),  # an OverflowError
        ("autocommit", "false"),  # counted as true
        ("cursor_factory", psycopg.ServerCursor),  # an error at the first statement
        ("prepare_threshold", "5"),  # so was this
        ("row_factory", "dict_row"),  # and this
        ("context", {}),  # an AttributeError
        ("debug", "no"),  # counted as true
        ("host", b"localhost"),  # the host named b'localhost'
        ("password", True),
        ("keepalives_idle", "soon"),  # an error while connecting
        ("name", "orders\nERROR forged"),  # two lines in the log
    ],
)
def test_what_seemed_to_be_taken_is_refused(option: str, value: object) -> None:
    assert refused(Pool, option, value) is not None


@each_class
def test_a_connection_string_in_the_wrong_place_is_not_shown(pool_class: Any) -> None:
    for option in OPTIONS:
        if option in ("conninfo", "dbname", "name"):
            continue
        for conninfo in ("postgresql://app:Zq7xW9kP@db/orders", "host=db password=Zq7xW9kP"):
            with suppress(TypeError, ValueError, psycopg.ProgrammingError):
                make(pool_class, option, conninfo)
                continue
            error = refused(pool_class, option, conninfo)
            assert "Zq7xW9kP" not in f"{error!s} {error!r} {error.__cause__!r} {error.__context__!r}"  # type: ignore[union-attr]


def test_a_value_that_may_be_a_secret_is_told_by_its_type() -> None:
    for option in ("password", "sslpassword", "user", "host"):
        error = refused(Pool, option, b"Zq7xW9kP")
        assert str(error) == f"{option} must be a str or an int, not bytes"


# --- arguments: Pool ----------------------------------------------------------------------------------------


async def assert_unharmed(pool: Pool, admin: Admin, application_name: str) -> None:
    """All its places can be taken; the server counts what the pool counts."""
    conns = [await pool.acquire(timeout=10) for _ in range(pool.stats().max_size)]
    for conn in conns:
        await conn.execute("select 1")
        await conn.rollback()
    assert admin.sessions(application_name) == pool.stats().size == len(conns)
    for conn in conns:
        pool.release(conn)
    assert (pool.stats().leased, pool.stats().waiting, pool.stats().idle) == (0, 0, len(conns))


async def refuses(call: Callable[[], Any], name: str) -> bool:
    """Whether a call, and what is to be awaited of it, refuses clearly."""
    try:
        answer = call()
        if asyncio.iscoroutine(answer):
            await asyncio.wait_for(answer, 20)
    except (TypeError, ValueError) as error:
        check_clear(error, name)
        return True
    return False


@each_value
async def test_a_wrong_argument_of_a_method_is_refused_and_the_pool_unharmed(
    dsn: str, admin: Admin, application_name: str, value: str
) -> None:
    nasty = NASTY[value]
    async with Pool(dsn, min_size=0, max_size=2) as pool:
        taken = not await refuses(lambda: pool.acquire(nasty), "timeout")
        assert taken == is_time(nasty)
        if taken:
            with suppress(PoolError):  # 0 is no time
                pool.release(await pool.acquire(nasty))
        for method in (pool.transaction, pool.close):
            if not taken:
                assert await refuses(lambda: method(nasty), "timeout")  # noqa: B023
        assert await refuses(lambda: pool.open(timeout=nasty), "timeout") != taken
        assert await refuses(lambda: pool.open(wait=nasty), "wait") != is_bool(nasty)
        assert await refuses(lambda: pool.resize(nasty, 2), "min_size") != is_size(nasty, 0, 2)
        assert await refuses(lambda: pool.resize(0, nasty), "max_size") != is_size(nasty, 1)
        pool.resize(0, 2)
        with pytest.raises(PoolError, match="not of this pool"):
            pool.release(nasty)
        await assert_unharmed(pool, admin, application_name)


async def test_a_connection_that_is_not_leased_from_the_pool_is_refused(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, max_size=2) as pool, Pool(dsn, application_name="other") as other:
        released = await pool.acquire()
        pool.release(released)
        former = Pool(dsn, application_name="former")
        await former.open()
        of_former = await former.acquire()
        await former.close(timeout=0)
        with SyncPool(dsn, application_name="blocking") as blocking, psycopg.connect(dsn, application_name="o") as own:
            strangers: list[Any] = [
                released,
                await other.acquire(),
                of_former,
                blocking.getconn(),
                own,
                await psycopg.AsyncConnection.connect(dsn, application_name="o"),
                type(released),
                psycopg.AsyncConnection,
                pool,
                released.cursor,
            ]
            for stranger in strangers:
                with pytest.raises(PoolError, match=r"not of this pool|released already"):
                    pool.release(stranger)
            for stranger in [*strangers[:1], *strangers[2:]]:
                with pytest.raises(PoolError):
                    other.release(stranger)
            for stranger in [*strangers[:3], *strangers[4:]]:
                with pytest.raises(PoolError):
                    blocking.putconn(stranger)
            blocking.putconn(strangers[3])
            assert blocking.stats().leased == 0
            other.release(strangers[1])
            await strangers[5].close()
        await assert_unharmed(pool, admin, application_name)
        assert other.stats().leased == 0
        pool.resize(0, 1)
        await eventually(lambda: pool.stats().size == 1)


# --- arguments: SyncPool ------------------------------------------------------------------------------------


@pytest.fixture
def sync_pool(dsn: str) -> Iterator[SyncPool]:
    with SyncPool(dsn, min_size=0, max_size=2) as pool:
        yield pool


def assert_sync_unharmed(pool: SyncPool, admin: Admin, application_name: str) -> None:
    conns = [pool.getconn(timeout=10) for _ in range(pool.stats().max_size)]
    for conn in conns:
        conn.execute("select 1")
        conn.rollback()
    assert admin.sessions(application_name) == pool.stats().size == len(conns)
    for conn in conns:
        pool.putconn(conn)
    assert (pool.stats().leased, pool.stats().waiting, pool._keyed) == (0, 0, {})
    eventually_blocking(lambda: pool.stats().idle == len(conns))


@each_value
def test_a_wrong_argument_of_a_blocking_method_is_refused_and_the_pool_unharmed(
    sync_pool: SyncPool, admin: Admin, application_name: str, value: str
) -> None:
    pool, nasty = sync_pool, NASTY[value]
    taken = refusal(lambda: pool.acquire(nasty), "timeout") is None
    assert taken == is_time(nasty)
    for method in (lambda: pool.transaction(nasty), lambda: pool.open(timeout=nasty)):
        assert (refusal(method, "timeout") is None) == taken
    for key in (None, "some key"):
        with suppress(PoolError, TypeError, ValueError):  # 0 is no time
            assert refusal(lambda: pool.putconn(pool.getconn(key, timeout=nasty)), "timeout") is None or not taken  # noqa: B023
    if not taken:
        assert refusal(lambda: pool.close(nasty), "timeout") is not None
    assert (refusal(lambda: pool.open(wait=nasty), "wait") is None) == is_bool(nasty)
    assert (refusal(lambda: pool.resize(nasty, 2), "min_size") is None) == is_size(nasty, 0, 2)
    assert (refusal(lambda: pool.resize(0, nasty), "max_size") is None) == is_size(nasty, 1)
    pool.resize(0, 2)
    with pytest.raises(PoolError, match="not of this pool"):
        pool.putconn(nasty)
    assert_sync_unharmed(pool, admin, application_name)


@each_value
def test_a_wrong_key_is_refused_and_any_other_gets_its_connection(
    sync_pool: SyncPool, admin: Admin, application_name: str, value: str
) -> None:
    pool, nasty = sync_pool, NASTY[value]
    if not refusal(lambda: pool.putconn(pool.getconn(nasty), nasty), "key"):
        conn = pool.getconn(nasty)
        other: Any = None
        if not is_none(nasty):
            assert pool.getconn(nasty) is conn
            with suppress(TypeError):
                other = pool.getconn("1")
                assert other is not conn
        pool.putconn(conn, nasty)
        if other is not None:
            pool.putconn(other, nasty)  # psycopg2's users do not care for the key either
    assert_sync_unharmed(pool, admin, application_name)


@each_value
def test_close_of_putconn_is_taken_as_true_or_false_or_refused(
    sync_pool: SyncPool, admin: Admin, application_name: str, value: str
) -> None:
    conn = sync_pool.getconn()
    if refusal(lambda: sync_pool.putconn(conn, close=NASTY[value]), "close"):
        assert sync_pool.stats().leased == 1
        sync_pool.putconn(conn)
    assert sync_pool.stats().leased == 0
    assert_sync_unharmed(sync_pool, admin, application_name)


# --- the drop-ins -------------------------------------------------------------------------------------------


@each_value
def test_a_wrong_argument_of_a_drop_in_is_refused_by_name(dsn: str, value: str) -> None:
    nasty = NASTY[value]
    for position, name in enumerate(["minconn", "maxconn", "dsn", "connection_factory", "cursor_factory"]):
        arguments: list[Any] = [0, 1, dsn, None, None]
        arguments[position] = nasty
        pool = None
        names = (name, "connection info string", "connection parameters") if name == "dsn" else (name,)
        with suppress(psycopg.OperationalError):  # psycopg2's dsn may be left out
            assert refusal(lambda: arguments.append(ThreadedConnectionPool(*arguments)), *names) or len(arguments) == 6  # noqa: B023
        pool = arguments[5] if len(arguments) == 6 else None
        if pool is not None:
            pool.closeall()
    for name in ("timeout", "connect_timeout", "async_", "database", "port", "context", "max_idle"):
        try:
            ThreadedConnectionPool(0, 1, **{"dsn": dsn, name: nasty}).closeall()
        except (TypeError, ValueError, psycopg.ProgrammingError) as error:
            check_clear(error, {"database": "dbname", "async_": "async"}.get(name, name))


@each_value
def test_a_drop_in_refuses_a_wrong_argument_of_a_method_and_works_on(dsn: str, value: str) -> None:
    nasty = NASTY[value]
    pool = ThreadedConnectionPool(0, 2, dsn)
    try:
        for name in ("minconn", "maxconn", "closed"):
            before = getattr(pool, name)
            refusal(lambda: setattr(pool, name, nasty), name)  # noqa: B023
            setattr(pool, name, before)
        with pytest.raises(DropInPoolError, match="trying to put unkeyed connection"):
            pool.putconn(nasty)
        refusal(lambda: pool.putconn(pool.getconn(nasty)), "key")
        conn = pool.getconn()
        refusal(lambda: pool.putconn(conn, close=nasty), "close")
        with suppress(DropInPoolError):  # it was given back
            pool.putconn(conn)
        for conn in [pool.getconn(), pool.getconn()]:
            conn.cursor().execute("select 1")
            pool.putconn(conn)
        held = [pool.getconn() for _ in range(2)]
        with pytest.raises(DropInPoolError, match="exhausted"):
            pool.getconn()
        for conn in held:
            pool.putconn(conn)
    finally:
        pool.closeall()


@each_value
def test_so_does_the_one_with_a_connection_for_each_thread(dsn: str, value: str) -> None:
    pool = PersistentConnectionPool(0, 1, dsn)
    try:
        nasty = NASTY[value]
        conn = pool.getconn()
        if not is_none(nasty):
            with pytest.raises(DropInPoolError, match="trying to put unkeyed connection"):
                pool.putconn(nasty)
        refusal(lambda: pool.putconn(close=nasty), "close")
        pool.putconn(pool.getconn())
        assert pool._sync_pool.stats().leased == 0
        del conn
    finally:
        pool.closeall()


def test_a_wait_for_a_key_that_is_longer_than_a_lock_can_wait(dsn: str) -> None:
    with SyncPool(dsn, acquire_timeout=1e12) as pool:
        pool.putconn(pool.getconn("key", timeout=1e15))
        pool.putconn(pool.getconn("key"))


async def test_a_closed_pool_refuses_wrong_arguments_as_well_and_stays_closed() -> None:
    pool = Pool("host=/nowhere")
    began = time.monotonic()
    for nasty in NASTY.values():
        with pytest.raises((PoolClosed, TypeError, ValueError)):
            pool.acquire(nasty)
        with pytest.raises(PoolError):
            pool.release(nasty)
        with suppress(TypeError, ValueError):
            await pool.close(nasty)
        if not is_time(nasty):
            with pytest.raises((TypeError, ValueError)):
                await pool.open(timeout=nasty)
        if not is_bool(nasty):
            with pytest.raises(TypeError):
                await pool.open(wait=nasty)
        assert pool._runner is None
    assert time.monotonic() - began < 10
