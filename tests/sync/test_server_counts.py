"""Never more sessions than `max_size`, as the server counts them, whatever threads do."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING

import psycopg
import pytest
from kit.sampler import Sampler
from kit.threads import in_threads

from asyncpool import SyncPool
from asyncpool.events import CloseReason

from .pools import Connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.servers import Admin, Server

MAX_SIZE = 3
THREADS = 8


@pytest.fixture
def sampler(server: Server, application_name: str, admin: Admin) -> Sampler:
    admin.value("select 1")  # its session, too, is nameless at first: have it there before anything is counted
    return Sampler(server.dsn, application_name, nameless_too=server.embedded is not None)


def closed(pool: SyncPool[Connection], reason: CloseReason) -> int:
    return pool.stats().closes.get(reason, 0)


def use(pool: SyncPool[Connection]) -> None:
    with pool.acquire() as conn:
        conn.execute("select 1")


def work_until(
    pool: SyncPool[Connection],
    done: Callable[[], bool],
    use: Callable[[SyncPool[Connection]], None] = use,
) -> None:
    """Keep `THREADS` threads at the pool until `done()`."""

    def go_on() -> None:
        while not done():
            use(pool)

    for running in in_threads(THREADS, go_on):
        running.result()


def test_growth_stops_at_max_size(dsn: str, sampler: Sampler) -> None:
    with sampler, SyncPool(dsn, min_size=0, max_size=MAX_SIZE, max_connecting=100) as pool:
        work_until(pool, lambda: pool.stats().acquires >= 400)
    assert 0 < sampler.most <= MAX_SIZE


def test_a_new_connection_waits_until_the_server_has_ended_the_used_up_one(dsn: str, sampler: Sampler) -> None:
    with sampler, SyncPool(dsn, min_size=0, max_size=MAX_SIZE, max_uses=1) as pool:
        work_until(pool, lambda: closed(pool, CloseReason.MAX_USES) >= 60)
    assert 0 < sampler.most <= MAX_SIZE


def test_a_connection_put_back_to_be_closed_keeps_its_place_until_the_server_has_ended_it(
    dsn: str, sampler: Sampler
) -> None:
    def discard(pool: SyncPool[Connection]) -> None:
        pool.putconn(pool.getconn(), close=True)

    with sampler, SyncPool(dsn, min_size=0, max_size=MAX_SIZE) as pool:
        work_until(pool, lambda: closed(pool, CloseReason.DISCARDED) >= 60, discard)
    assert 0 < sampler.most <= MAX_SIZE


def test_what_the_server_terminates_is_replaced_within_the_size(
    dsn: str, admin: Admin, application_name: str, sampler: Sampler
) -> None:
    def use_or_lose(pool: SyncPool[Connection]) -> None:
        with suppress(psycopg.OperationalError), pool.acquire() as conn:
            if random.random() < 0.2:
                conn.execute("select pg_terminate_backend(pg_backend_pid())")
            conn.execute("select 1")

    with (
        sampler,
        SyncPool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE, backoff_initial=0.001, backoff_max=0.01) as pool,
    ):
        work_until(pool, lambda: closed(pool, CloseReason.DISCONNECTED) >= 40, use_or_lose)
    assert 0 < sampler.most <= MAX_SIZE


def test_a_drain_and_a_resize_stay_within_the_size(dsn: str, sampler: Sampler) -> None:
    def change_now_and_then(pool: SyncPool[Connection]) -> None:
        use(pool)
        if random.random() < 0.1:
            pool.drain()
        elif random.random() < 0.1:
            pool.resize(0, random.randint(1, MAX_SIZE))

    with sampler, SyncPool(dsn, min_size=0, max_size=MAX_SIZE) as pool:
        work_until(pool, lambda: sum(pool.stats().closes.values()) >= 50, change_now_and_then)
    assert 0 < sampler.most <= MAX_SIZE


def test_a_pool_opened_again_right_after_it_shut_down_its_leases_stays_within_the_size(
    dsn: str, sampler: Sampler, admin: Admin, application_name: str
) -> None:
    pool = SyncPool(dsn, min_size=MAX_SIZE, max_size=MAX_SIZE)

    def hold() -> None:
        with pool.acquire() as conn:
            conn.execute("select pg_sleep(600)")

    with sampler:
        for _ in range(8):
            pool.open()
            holders = in_threads(MAX_SIZE, hold)
            while admin.states(application_name) != ["active"] * MAX_SIZE:
                pass
            pool.close(timeout=0)
            for running in holders:
                assert isinstance(running.error(), psycopg.OperationalError)
    assert 0 < sampler.most <= MAX_SIZE
    assert pool.stats().abandoned == 0
