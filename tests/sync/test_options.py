"""The options of a SyncPool: checked when it is made; conninfo, row factory, connection class; sizes that change."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, get_type_hints

import psycopg
import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking
from psycopg.rows import dict_row, namedtuple_row

from asyncpool import CloseReason, PoolTimeout, SyncPool
from asyncpool.config import OPTION_NAMES
from asyncpool.conninfo import CONNECT_OPTIONS
from asyncpool.options import BlockingOptions

from .pools import Connection, assert_unharmed, exhausted, first_value

if TYPE_CHECKING:
    from kit.servers import Admin


def make(**options: Any) -> SyncPool[Any]:
    return SyncPool("host=/nowhere", **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_size": 11}, ValueError, "min_size=11 is greater than max_size=10"),
        ({"max_size": "1"}, TypeError, "max_size must be an int"),
        ({"acquire_timeout": -1}, ValueError, "acquire_timeout must be a finite number of seconds"),
        ({"maxsize": 3}, TypeError, "'maxsize': did you mean 'max_size'"),
        ({"configure": "select 1"}, TypeError, "configure must be a callable"),
        ({"reset": "all"}, ValueError, "reset must be 'rollback', 'session', 'discard' or a callable"),
        ({"name": ""}, TypeError, "name must be a non-empty str"),
        ({"connection_class": psycopg.AsyncConnection}, TypeError, r"must be psycopg\.Connection or a subclass"),
        ({"connection_class": object}, TypeError, r"must be psycopg\.Connection or a subclass"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_when_the_pool_is_made(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_a_malformed_conninfo_is_refused_when_the_pool_is_made() -> None:
    with pytest.raises(psycopg.ProgrammingError, match='missing "="'):
        SyncPool("host")
    nothing: Any = None
    with pytest.raises(TypeError, match="conninfo must be a str or a callable"):
        SyncPool(nothing)


def test_type_checkers_know_every_option_of_the_pool_and_none_that_it_refuses() -> None:
    typed = set(get_type_hints(BlockingOptions))
    assert typed >= OPTION_NAMES
    assert typed <= OPTION_NAMES | CONNECT_OPTIONS


def test_every_pool_has_a_name_of_its_own() -> None:
    assert make().name != make().name
    assert make(name="orders").name == "orders"


# --- connections --------------------------------------------------------------------------------------------


def test_connection_parameters_reach_the_server(dsn: str, admin: Admin) -> None:
    with SyncPool(dsn, application_name="mine", options="-c work_mem=33MB", max_size=1) as pool:
        with pool.acquire() as conn:
            assert first_value(conn, "show work_mem") == "33MB"
        assert admin.sessions("mine") == 1


def test_a_row_factory_makes_the_rows(dsn: str) -> None:
    with SyncPool(dsn, row_factory=dict_row) as pool, pool.acquire() as conn:
        assert conn.execute("select 1 as one").fetchone() == {"one": 1}
    with SyncPool(dsn, row_factory=namedtuple_row) as named, named.acquire() as other:
        row: Any = other.execute("select 1 as one").fetchone()
        assert row.one == 1


class OwnConnection(psycopg.Connection[Any]):
    """Somebody's own connection class."""

    executed: int = 0

    def execute(self, *args: Any, **options: Any) -> Any:
        self.executed += 1
        return super().execute(*args, **options)

    def answer(self) -> int:
        return int(first_value(self, "select 42"))


def test_a_connection_class_is_what_is_leased(dsn: str) -> None:
    with SyncPool(dsn, connection_class=OwnConnection, max_size=1) as pool:
        for number in range(1, 4):
            with pool.acquire() as conn:
                assert isinstance(conn, OwnConnection)
                assert conn.answer() == 42
                assert conn.executed == number
        assert pool.stats().connects == 1


def test_psycopgs_settings_are_options(dsn: str) -> None:
    with SyncPool(dsn, autocommit=True, prepare_threshold=None, cursor_factory=psycopg.ClientCursor) as pool:
        for _ in range(2):
            with pool.acquire() as conn:
                assert conn.autocommit
                assert conn.prepare_threshold is None
                assert type(conn.execute("select 1")) is psycopg.ClientCursor


# --- conninfo from a callable -------------------------------------------------------------------------------


def test_a_conninfo_callable_is_asked_at_every_connect(dsn: str) -> None:
    asked: list[int] = []

    def conninfo() -> str:
        asked.append(1)
        return dsn

    with SyncPool(conninfo, min_size=2, max_size=2) as pool:
        assert len(asked) == 2
        pool.drain()
        eventually_blocking(lambda: pool.stats().idle == 2)
        assert len(asked) == 4


def test_a_conninfo_callable_that_blocks_stalls_nobody_else(dsn: str) -> None:
    def conninfo() -> str:
        if answers:
            return answers.pop()
        assert go_on.wait(20)
        return dsn

    answers = [dsn]
    go_on = threading.Event()
    with SyncPool(conninfo, min_size=1, max_size=2) as pool, SyncPool(dsn, min_size=0, max_size=1) as other:
        held = pool.getconn()
        waiting = in_thread(pool.getconn)
        eventually_blocking(lambda: pool.stats().connecting == 1)
        assert_unharmed(other)  # it connects, in the same event loop
        assert not waiting.done
        pool.putconn(held)
        pool.putconn(waiting.result())
        go_on.set()


def test_a_conninfo_callable_that_hangs_is_given_up_after_connect_timeout() -> None:
    def conninfo() -> str:
        time.sleep(1)
        raise AssertionError

    pool = SyncPool(conninfo, connect_timeout=0.1)
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="conninfo"):
        pool.open(timeout=0)
    assert time.monotonic() - began < 0.9


def test_the_words_of_a_conninfo_callable_that_raises_are_not_repeated() -> None:
    def conninfo() -> str:
        raise ConnectionError("the password is x")

    with pytest.raises(psycopg.OperationalError, match=r"callable raised ConnectionError$"):
        SyncPool(conninfo).open(timeout=0)


@pytest.mark.parametrize("answer", [None, b"host=localhost", 1])
def test_a_conninfo_callable_that_returns_something_else_is_told_so_at_once(answer: Any) -> None:
    with pytest.raises(TypeError, match=f"conninfo.*str.*{type(answer).__name__}"):
        SyncPool(lambda: answer).open()


# --- resize, drain, check -----------------------------------------------------------------------------------


def test_a_pool_grows_when_it_is_resized(dsn: str) -> None:
    with exhausted(dsn) as (pool, _):
        waiting = in_thread(pool.getconn)
        eventually_blocking(lambda: pool.stats().waiting == 1)
        pool.resize(1, 2)
        pool.putconn(waiting.result())
        assert (pool.stats().min_size, pool.stats().max_size) == (1, 2)


def test_a_pool_shrinks_when_it_is_resized(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, min_size=4, max_size=4) as pool:
        held = [pool.getconn() for _ in range(2)]
        pool.resize(0, 1)
        eventually_blocking(lambda: pool.stats().size == 2)
        for conn in held:
            pool.putconn(conn)
        eventually_blocking(lambda: pool.stats().size == 1)
        eventually_blocking(lambda: admin.sessions(application_name) == 1)
        with pytest.raises(ValueError, match="min_size=3 is greater than max_size=2"):
            pool.resize(3, 2)
        assert (pool.stats().min_size, pool.stats().max_size) == (0, 1)


def test_a_closed_pool_may_be_resized(dsn: str) -> None:
    pool = make(min_size=1, max_size=4)
    pool.resize(2, 3)
    assert (pool.stats().min_size, pool.stats().max_size) == (2, 3)
    pool = SyncPool(dsn, min_size=0)
    pool.resize(2, 2)
    with pool:
        assert pool.stats().idle == 2


def test_a_drain_replaces_every_connection(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, min_size=3, max_size=3) as pool:
        conn = pool.getconn()
        before = admin.pids(application_name)
        pool.drain()
        assert first_value(conn, "select 1") == 1
        eventually_blocking(lambda: len(set(admin.pids(application_name)) - set(before)) == 2)
        conn.rollback()
        pool.putconn(conn)
        eventually_blocking(lambda: len(set(admin.pids(application_name)) - set(before)) == 3)
        eventually_blocking(lambda: pool.stats().idle == 3)
        assert pool.stats().closes == {CloseReason.DRAINED: 3}


def test_max_uses_replaces_a_connection_that_comes_back(dsn: str) -> None:
    with SyncPool(dsn, min_size=1, max_size=1, max_uses=1) as pool:
        pids = set()
        for _ in range(5):
            with pool.acquire(timeout=5) as conn:
                pids.add(conn.info.backend_pid)
        assert len(pids) == 5
        eventually_blocking(lambda: pool.stats().idle == 1)


def test_check_finds_and_closes_what_does_not_answer(dsn: str) -> None:
    asked: list[int] = []

    def check(conn: Connection) -> None:
        asked.append(conn.info.backend_pid)
        if conn.info.backend_pid == bad:
            raise LookupError

    bad = 0
    with SyncPool(dsn, min_size=2, max_size=2, check=check) as pool:
        pool.check()
        assert len(set(asked)) == 2
        with pool.acquire() as conn:
            bad = conn.info.backend_pid
        pool.check()
        eventually_blocking(lambda: pool.stats().idle == 2)
        assert pool.stats().closes == {CloseReason.CHECK_FAILED: 1}


def test_check_without_a_callable_asks_the_server(dsn: str, admin: Admin, application_name: str) -> None:
    with SyncPool(dsn, min_size=2, max_size=2) as pool:
        asked = "select min(state_change) from pg_stat_activity where application_name = %s"
        before = admin.value("select clock_timestamp()")
        pool.check()
        assert admin.value(asked, [application_name]) > before
        assert pool.stats().idle == 2


def test_stats_count_what_happens(dsn: str) -> None:
    with SyncPool(dsn, name="orders", min_size=1, max_size=1) as pool:
        conn = pool.getconn()
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0)
        stats = pool.stats()
        assert (stats.name, stats.size, stats.leased, stats.idle, stats.waiting) == ("orders", 1, 1, 0, 0)
        assert (stats.acquires, stats.timeouts, stats.connects, stats.connect_errors) == (1, 1, 1, 0)
        pool.putconn(conn, close=True)
        eventually_blocking(lambda: pool.stats().idle == 1)
        assert pool.stats().closes == {CloseReason.DISCARDED: 1}
        assert pool.stats().connects == 2


def test_the_pool_may_be_looked_at_while_threads_work_on_it(dsn: str) -> None:
    stop = False

    def work() -> None:
        while not stop:
            conn = pool.getconn()
            pool.putconn(conn, close=True)

    def look() -> None:
        for number in range(300):
            stats = pool.stats()
            assert stats.size <= 6
            assert all(holder.backend_pid for holder in pool.holders())
            assert "max_size" in repr(pool)
            if number % 50 == 0:
                pool.drain()
                pool.resize(0, 4 + number // 50 % 3)
                pool.check()

    with SyncPool(dsn, min_size=0, max_size=4) as pool:
        workers = in_threads(4, work)
        try:
            for running in in_threads(2, look):
                running.result()
        finally:
            stop = True
        for running in workers:
            running.result()
        assert_unharmed(pool)


def test_max_lifetime_holds_on_a_timer_also_without_pings(dsn: str) -> None:
    with SyncPool(dsn, max_size=1, max_lifetime=0.5, check_interval=None, max_idle=None) as pool:
        conn = pool.getconn()
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0.05)  # its wake-up is the next one, and passes
        pool.putconn(conn)
        eventually_blocking(lambda: pool.stats().closes.get(CloseReason.MAX_LIFETIME, 0) >= 1, timeout=10)
