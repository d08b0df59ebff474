"""Threads that wait: in which order they are served, how long they wait, and how many may."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from kit.threads import Running, in_thread, in_threads
from kit.waiting import eventually_blocking

from asyncpool import PoolError, PoolTimeout, SyncPool, TooManyWaiting

from .pools import FOREVER, Connection, assert_unharmed, exhausted, first_value


def start_in_order(pool: SyncPool[Connection], count: int, work: Any) -> list[Running[Any]]:
    """Threads that call `work(number)`, each in the queue before the next one starts."""
    runnings: list[Running[Any]] = []
    for number in range(count):
        runnings.append(in_thread(lambda number=number: work(number)))  # type: ignore[misc]
        eventually_blocking(lambda: pool.stats().waiting == number + 1)  # noqa: B023
    return runnings


def test_threads_that_wait_are_served_in_the_order_they_came(dsn: str) -> None:
    served: list[int] = []

    def note(number: int) -> None:
        # A later deadline, or an earlier one, makes no difference.
        with pool.acquire(timeout=FOREVER - number if number % 2 else None):
            served.append(number)

    with exhausted(dsn) as (pool, connection):
        runnings = start_in_order(pool, 20, note)
        pool.putconn(connection)
        for running in runnings:
            running.result()
    assert served == list(range(20))


def test_a_thread_that_gives_back_and_asks_again_does_not_overtake_who_waits(dsn: str) -> None:
    with exhausted(dsn) as (pool, connection):
        got = threading.Event()

        def wait() -> None:
            conn = pool.getconn(timeout=FOREVER)
            got.set()
            pool.putconn(conn)

        [waiting] = start_in_order(pool, 1, lambda number: wait())
        pool.putconn(connection)
        again = pool.getconn()
        assert got.is_set()
        pool.putconn(again)
        waiting.result()


def test_many_threads_share_few_connections_and_never_one_at_once(dsn: str) -> None:
    in_use: set[int] = set()
    served: list[int] = []

    def work() -> None:
        for _ in range(50):
            with pool.acquire() as conn:
                pid = conn.info.backend_pid
                assert pid not in in_use
                in_use.add(pid)
                assert first_value(conn, "select pg_backend_pid()") == pid
                in_use.remove(pid)
                served.append(pid)

    with SyncPool(dsn, min_size=0, max_size=3) as pool:
        for running in in_threads(12, work):
            running.result()
        assert pool.stats().acquires == len(served) == 600
        assert pool.stats().waiting == 0
        eventually_blocking(lambda: pool.stats().idle == pool.stats().size == 3)


def test_many_threads_that_do_nothing_lose_no_place(dsn: str) -> None:
    def work() -> None:
        for _ in range(300):
            pool.putconn(pool.getconn())

    with SyncPool(dsn, min_size=0, max_size=2) as pool:
        for running in in_threads(8, work):
            running.result()
        assert (pool.stats().leased, pool.stats().waiting) == (0, 0)
        assert pool.stats().acquires == 2400
        assert_unharmed(pool)


# --- timeouts -----------------------------------------------------------------------------------------------


def test_who_waits_too_long_is_told_how_the_pool_is(dsn: str) -> None:
    with exhausted(dsn) as (pool, _):
        began = time.monotonic()
        with pytest.raises(
            PoolTimeout,
            match=r"no connection within 0\.[12]\d* s, number 1 of 1 in the queue; 1 in use, 0 idle.*max_size 1",
        ):
            pool.getconn(timeout=0.1)
        assert time.monotonic() - began >= 0.1
        with pytest.raises(PoolTimeout), pool.acquire(timeout=0.01):
            raise AssertionError
        with pytest.raises(PoolTimeout), pool.transaction(timeout=0.01):
            raise AssertionError
        assert pool.stats().waiting == 0
        assert pool.stats().timeouts == 3


def test_a_pool_timeout_is_a_timeout_and_a_pool_error(dsn: str) -> None:
    with exhausted(dsn) as (pool, _):
        for kind in (TimeoutError, PoolError):
            with pytest.raises(kind):
                pool.getconn(timeout=0)


def test_acquire_timeout_is_what_is_waited_if_nothing_else_is_said(dsn: str) -> None:
    with exhausted(dsn, acquire_timeout=0.05) as (pool, connection):
        with pytest.raises(PoolTimeout, match=r"0\.0\d* s"):
            pool.getconn()
        waiting = in_thread(lambda: pool.getconn(timeout=None))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        with pytest.raises(PoolTimeout):
            pool.getconn()
        pool.putconn(connection)
        pool.putconn(waiting.result())


def test_without_a_timeout_who_finds_nothing_is_refused_at_once(dsn: str) -> None:
    with exhausted(dsn) as (pool, connection):
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(PoolTimeout):
                pool.getconn(timeout=0)
        assert time.monotonic() - began < 5
        pool.putconn(connection)
        pool.putconn(pool.getconn(timeout=0))


def test_a_try_without_a_timeout_makes_the_pool_grow(dsn: str) -> None:
    with SyncPool(dsn, min_size=0, max_size=1) as pool:
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0)
        eventually_blocking(lambda: pool.stats().idle == 1)
        pool.putconn(pool.getconn(timeout=0))


def test_each_of_many_deadlines_is_kept(dsn: str) -> None:
    waited: list[tuple[float, float]] = []

    def note(number: int) -> None:
        timeout = 0.3 - number / 100
        began = time.monotonic()
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=timeout)
        waited.append((timeout, time.monotonic() - began))

    with exhausted(dsn) as (pool, _):
        for running in [in_thread(lambda number=number: note(number)) for number in range(25)]:  # type: ignore[misc]
            running.result()
        assert pool.stats().waiting == 0
    assert len(waited) == 25
    assert all(seconds >= timeout for timeout, seconds in waited)


def test_who_gave_up_is_passed_over(dsn: str) -> None:
    with exhausted(dsn) as (pool, connection):
        first = in_thread(lambda: pool.getconn(timeout=1))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        second = in_thread(lambda: pool.getconn(timeout=FOREVER))
        eventually_blocking(lambda: pool.stats().waiting == 2)
        assert isinstance(first.error(), PoolTimeout)
        assert pool.stats().waiting == 1
        pool.putconn(connection)
        assert second.result() is connection
        pool.putconn(connection)


def test_timeouts_that_race_with_returns_lose_no_place(dsn: str) -> None:
    def work() -> None:
        for number in range(100):
            try:
                conn = pool.getconn(timeout=number % 7 / 2000)
            except PoolTimeout:
                continue
            pool.putconn(conn)

    with SyncPool(dsn, max_size=1) as pool:
        for running in in_threads(8, work):
            running.result()
        assert (pool.stats().leased, pool.stats().waiting) == (0, 0)
        assert_unharmed(pool)


# --- max_waiting --------------------------------------------------------------------------------------------


def test_more_than_max_waiting_are_refused_at_once(dsn: str) -> None:
    with exhausted(dsn, max_waiting=2) as (pool, connection):
        waiting = start_in_order(pool, 2, lambda number: pool.getconn(timeout=FOREVER).close())
        with pytest.raises(TooManyWaiting, match="2 callers are waiting"):
            pool.getconn(timeout=FOREVER)
        with pytest.raises(TooManyWaiting), pool.acquire(timeout=FOREVER):
            raise AssertionError
        pool.putconn(connection)
        for running in waiting:
            running.result()
        assert_unharmed(pool)


def test_with_no_one_allowed_to_wait_a_free_connection_is_still_had(dsn: str) -> None:
    with exhausted(dsn, max_waiting=0) as (pool, connection):
        with pytest.raises(TooManyWaiting):
            pool.getconn(timeout=FOREVER)
        pool.putconn(connection)
        pool.putconn(pool.getconn(timeout=FOREVER))
