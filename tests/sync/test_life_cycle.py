"""open, close, reopen: what a SyncPool is in between, and what a user sees when it cannot connect."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.threads import in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import PoolClosed, PoolError, PoolTimeout, SyncPool

from .pools import FOREVER, Connection, assert_unharmed, first_value, loop_threads, warnings_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kit.servers import Admin, PasswordServer

    from asyncpool.cli.embedded import EmbeddedServer

PATIENCE = 15.0  # what was given FOREVER and is over before then was over "at once"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses: bound, so that nobody else gets it, but nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def fails_to_open(pool: SyncPool[Connection], error: type[BaseException], words: str, **options: Any) -> BaseException:
    """What `open()` raises; after it the pool is closed."""
    began = time.monotonic()
    with pytest.raises(error, match=words) as caught:
        pool.open(**options)
    assert time.monotonic() - began < PATIENCE
    assert "closed" in repr(pool)
    with pytest.raises(PoolClosed):
        pool.getconn()
    return caught.value


# --- opening and closing ------------------------------------------------------------------------------------


def test_with_opens_and_closes(dsn: str, admin: Admin, application_name: str) -> None:
    pool = SyncPool(dsn, min_size=2)
    with pool as entered:
        assert entered is pool
        assert pool.stats().idle == 2
        assert admin.sessions(application_name) == 2
        assert "open" in repr(pool)
    assert admin.sessions(application_name) == 0
    assert "closed" in repr(pool)
    assert pool.stats().size == 0


def test_with_closes_after_an_exception(dsn: str, admin: Admin, application_name: str) -> None:
    with pytest.raises(LookupError), SyncPool(dsn):
        raise LookupError
    assert admin.sessions(application_name) == 0


def test_making_a_pool_does_nothing_else() -> None:
    threads = threading.enumerate()
    pool = SyncPool("host=/nowhere", min_size=5)
    assert threading.enumerate() == threads
    assert pool.stats().size == 0
    assert repr(pool).startswith("<SyncPool 'pool-")
    assert "closed" in repr(pool)


def test_a_pool_that_was_never_opened_says_how_to_open_it() -> None:
    pool = SyncPool("host=/nowhere", name="orders")
    uses: list[Callable[[], object]] = [
        pool.getconn,
        lambda: pool.getconn("key"),
        pool.acquire().__enter__,
        pool.transaction().__enter__,
        pool.drain,
        pool.check,
    ]
    for use in uses:
        with pytest.raises(PoolClosed, match=r"orders is not open: use `with SyncPool\(.*`pool\.open\(\)`"):
            use()
    pool.close()
    pool.closeall()
    assert pool.holders() == []
    eventually_blocking(lambda: loop_threads() == [])


def test_a_closed_pool_refuses_and_can_be_opened_again(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=2)
    for _ in range(3):
        with pool:
            assert_unharmed(pool)
        with pytest.raises(PoolClosed, match="closed"):
            pool.getconn()
        with pytest.raises(PoolClosed, match="closed"), pool.acquire():
            pass
        with pytest.raises(PoolClosed):
            pool.drain()
        assert pool.stats().size == 0
        pool.close()
        with pytest.raises(PoolClosed):
            pool.getconn()


def test_an_open_pool_is_left_as_it_is_by_open(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        conn = pool.getconn()
        pool.open()
        assert pool.stats().leased == 1
        assert first_value(conn, "select 1") == 1
        conn.rollback()
        pool.putconn(conn)
        assert pool.stats().connects == 1


def test_totals_are_those_since_the_last_open_also_when_closed_twice(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    with pool:
        for _ in range(3):
            with pool.acquire():
                pass
    assert pool.stats().acquires == 3
    pool.close()
    assert pool.stats().acquires == 3
    with pool:
        assert pool.stats().acquires == 0


def test_open_without_waiting_connects_in_the_background(dsn: str) -> None:
    pool = SyncPool(dsn, min_size=3)
    pool.open(wait=False)
    eventually_blocking(lambda: pool.stats().idle == 3)
    pool.close()


def test_many_threads_may_open_one_pool(dsn: str) -> None:
    pool = SyncPool(dsn, min_size=2, max_size=2)
    for running in in_threads(8, pool.open):
        running.result()
    assert pool.stats().connects == 2
    for running in in_threads(8, pool.close):
        running.result()
    assert "closed" in repr(pool)


def test_close_waits_for_the_connections_in_use(dsn: str, admin: Admin, application_name: str) -> None:
    pool = SyncPool(dsn, max_size=2)
    pool.open()
    conn = pool.getconn()
    closing = in_thread(pool.close)
    eventually_blocking(lambda: "closing" in repr(pool))
    with pytest.raises(PoolClosed):
        pool.getconn()
    with pytest.raises(PoolClosed, match="being closed"):
        pool.open()
    assert first_value(conn, "select 1") == 1
    assert not closing.done
    conn.rollback()
    pool.putconn(conn)
    closing.result()
    assert admin.sessions(application_name) == 0


@pytest.mark.parametrize("timeout", [-1, "1", True, float("nan"), float("inf")])
def test_a_timeout_is_checked_before_anything_is_done(timeout: Any) -> None:
    pool = SyncPool("host=/nowhere")
    for use in (pool.close, pool.open, lambda timeout: pool.getconn(timeout=timeout), pool.acquire, pool.transaction):
        with pytest.raises((TypeError, ValueError), match="timeout must be"):
            use(timeout=timeout)


def test_close_refuses_who_waits(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    conn = pool.getconn()
    waiting = [in_thread(lambda: pool.getconn(timeout=FOREVER)) for _ in range(5)]
    eventually_blocking(lambda: pool.stats().waiting == 5)
    closing = in_thread(pool.close)
    for running in waiting:
        assert isinstance(running.error(), PoolClosed)
    pool.putconn(conn)
    closing.result()


def test_a_pool_that_is_dropped_open_warns_and_ends_its_sessions(dsn: str, admin: Admin, application_name: str) -> None:
    pools = [SyncPool(dsn, min_size=2, name="orders")]
    pools[0].open()
    assert admin.sessions(application_name) == 2
    with pytest.warns(ResourceWarning, match=r"orders was dropped.*: use `with`, or `pool\.close\(\)`"):
        del pools[:]
    eventually_blocking(lambda: admin.sessions(application_name) == 0)
    eventually_blocking(lambda: loop_threads() == [])


# --- final errors -------------------------------------------------------------------------------------------


def test_a_wrong_password_is_told_at_once(password_server: PasswordServer) -> None:
    parameters: dict[str, Any] = {**password_server.parameters("with_space"), "password": "wrong"}
    pool = SyncPool(**parameters, min_size=3, acquire_timeout=FOREVER)
    fails_to_open(pool, psycopg.errors.InvalidPassword, 'password authentication failed for user "with_space"')


def test_an_unknown_database_is_told_at_once(dsn: str) -> None:
    pool = SyncPool(dsn, dbname="nowhere", acquire_timeout=FOREVER)
    fails_to_open(pool, psycopg.OperationalError, 'database "nowhere" does not exist')
    eventually_blocking(lambda: loop_threads() == [])


def test_with_raises_the_servers_error_too(dsn: str) -> None:
    with (
        pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'),
        SyncPool(dsn, dbname="nowhere", acquire_timeout=FOREVER),
    ):
        raise AssertionError


def test_without_waiting_a_final_error_is_told_to_who_asks_for_a_connection(dsn: str) -> None:
    pool = SyncPool(dsn, dbname="nowhere", acquire_timeout=FOREVER)
    pool.open(wait=False)
    with pytest.raises(PoolError, match='database "nowhere" does not exist') as error:
        pool.getconn()
    assert not isinstance(error.value, TimeoutError)
    assert isinstance(error.value.__cause__, psycopg.OperationalError)
    pool.close()


# --- errors that may pass -----------------------------------------------------------------------------------


def test_a_refused_port_is_tried_again_until_the_timeout(closed_port: int) -> None:
    pool = SyncPool(host="127.0.0.1", port=closed_port, backoff_initial=0.01)
    error = fails_to_open(pool, PoolTimeout, "1 s.*refused", timeout=1)
    assert isinstance(error.__cause__, psycopg.OperationalError)
    assert pool.stats().connect_errors > 1


def test_a_refused_port_without_waiting_is_its_own_error_after_one_try(closed_port: int) -> None:
    pool = SyncPool(host="127.0.0.1", port=closed_port)
    error = fails_to_open(pool, psycopg.OperationalError, "refused", timeout=0)
    assert not isinstance(error, PoolError)
    assert pool.stats().connect_errors == 1


def test_a_server_that_is_down_for_a_while_is_waited_for(private_server: EmbeddedServer, private_dsn: str) -> None:
    with SyncPool(private_dsn, max_size=1, backoff_initial=0.01, backoff_max=0.05) as pool:
        private_server.stop()
        eventually_blocking(lambda: pool.stats().connect_errors > 0)
        with pytest.raises(PoolTimeout, match="last connect error"):
            pool.getconn(timeout=0.2)
        waiting = in_thread(lambda: pool.getconn(timeout=FOREVER))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        private_server.start()
        pool.putconn(waiting.result())
        assert_unharmed(pool)


def test_a_pool_that_could_not_open_opens_when_the_reason_is_gone(dsn: str) -> None:
    answers = [f"{dsn} dbname=nowhere", dsn]
    pool = SyncPool(lambda: answers.pop(0), max_size=1)
    fails_to_open(pool, psycopg.OperationalError, "nowhere")
    with pool:
        assert_unharmed(pool)


def test_an_open_that_fails_leaves_no_session(dsn: str, admin: Admin, application_name: str) -> None:
    configured: list[Connection] = []

    def configure(connection: Connection) -> None:
        configured.append(connection)
        if len(configured) == 3:
            raise ValueError("enough")

    fails_to_open(SyncPool(dsn, min_size=5, configure=configure), ValueError, "enough")
    assert admin.sessions(application_name) == 0


def test_the_log_has_no_words_of_a_good_life(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with SyncPool(dsn) as pool, pool.acquire() as conn:
        conn.execute("select 1")
    assert warnings_of(caplog) == []


def test_an_error_that_open_raises_is_not_logged_as_well(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    pool = SyncPool(dsn, dbname="nobody_made_this")
    with pytest.raises(psycopg.OperationalError, match="nobody_made_this"):
        pool.open()
    assert warnings_of(caplog) == []
    pool.open(wait=False)
    eventually_blocking(lambda: len(warnings_of(caplog)) == 1)
    pool.close()


@pytest.mark.parametrize(("name", "remedy"), [("connection", "with pool.acquire"), ("release", "pool.putconn")])
def test_a_method_of_another_pool_is_told_by_what_to_replace_it(name: str, remedy: str) -> None:
    pool = SyncPool("")
    with pytest.raises(AttributeError, match=f"SyncPool has no '{name}': use `?{remedy}"):
        getattr(pool, name)


def test_what_acquire_returns_is_no_connection(dsn: str) -> None:
    async def enter() -> None:
        async with acquired:
            pass

    with SyncPool(dsn) as pool:
        acquired: Any = pool.acquire()
        with pytest.raises(AttributeError, match="use `with` on what acquire"):
            acquired.execute("select 1")
        with pytest.raises(TypeError, match="wants `with`"):
            asyncio.run(enter())
        assert pool.stats().acquires == 0
