"""Many threads on few connections, with everything that can go wrong: for three seconds, or for as many as
ASYNCPOOL_STRESS_SECONDS says; with the random numbers of ASYNCPOOL_STRESS_SEED.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
from kit.sampler import Sampler
from kit.threads import in_threads
from kit.waiting import eventually_blocking
from psycopg import sql

from asyncpool import SyncPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.servers import Admin, Server

SECONDS = float(os.environ.get("ASYNCPOOL_STRESS_SECONDS", "3"))
THREADS = 64
MAX_SIZE = 8
KILL_INTERVAL = 0.05

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]


class Mishap(Exception):
    """What a user's own code may raise."""


class Worker:
    """A thread that takes connections, and does with each something that is drawn at random."""

    def __init__(self, pool: SyncPool[Connection], table: str, number: int, seed: str) -> None:
        self._pool = pool
        self._insert = sql.SQL("insert into {} values (%s)").format(sql.Identifier(table))
        self._random = random.Random(f"{seed} {number}")
        self._ids = iter(range(number, 2**31, THREADS))
        self.served = 0
        self.longest_wait = 0.0
        self.acknowledged: set[int] = set()
        self.refused: set[int] = set()  # rows that were rolled back, or never sent
        self.losses = 0
        self.done: Counter[str] = Counter()

    def work_until(self, end: float) -> None:
        """Go on until that time. What the server ends is an error of psycopg's, and is expected."""
        ways: list[Callable[[int], None]] = [
            *[self.insert_in_a_block] * 6,
            *[self.insert_by_hand] * 4,
            self.query_after_an_idle_lease,
            self.fail_in_a_block,
            self.fail_on_the_server,
            self.put_back_to_be_closed,
            self.close_the_connection,
            self.put_back_in_a_transaction,
            self.kill_its_own_session,
        ]
        while time.monotonic() < end:
            way = self._random.choice(ways)
            self.done[way.__name__] += 1
            try:
                way(next(self._ids))
            except psycopg.OperationalError:
                self.losses += 1
            if self._random.random() < 0.3:
                time.sleep(self._random.random() * 0.003)

    def get(self) -> Connection:
        """A connection by hand."""
        began = time.monotonic()
        conn = self._pool.getconn()
        self.note_service(began)
        return conn

    def note_service(self, began: float) -> None:
        self.served += 1
        self.longest_wait = max(self.longest_wait, time.monotonic() - began)

    def insert(self, conn: Connection, row: int) -> None:
        conn.execute(self._insert, [row])
        if self._random.random() < 0.3:
            time.sleep(self._random.random() * 0.002)

    def insert_in_a_block(self, row: int) -> None:
        began = time.monotonic()
        with self._pool.acquire() as conn:
            self.note_service(began)
            self.insert(conn, row)
        self.acknowledged.add(row)

    def insert_by_hand(self, row: int) -> None:
        conn = self.get()
        try:
            self.insert(conn, row)
            conn.commit()
            self.acknowledged.add(row)
        finally:
            self._pool.putconn(conn)

    def query_after_an_idle_lease(self, row: int) -> None:
        conn = self.get()
        try:
            time.sleep(self._random.random() * 0.005)
            conn.execute("select 1")
            conn.commit()
        finally:
            self._pool.putconn(conn)

    def fail_in_a_block(self, row: int) -> None:
        began = time.monotonic()
        self.refused.add(row)
        with suppress(Mishap), self._pool.acquire() as conn:
            self.note_service(began)
            self.insert(conn, row)
            raise Mishap

    def fail_on_the_server(self, row: int) -> None:
        began = time.monotonic()
        self.refused.add(row)
        with suppress(psycopg.errors.DivisionByZero), self._pool.acquire() as conn:
            self.note_service(began)
            self.insert(conn, row)
            conn.execute("select 1 / 0")

    def put_back_to_be_closed(self, row: int) -> None:
        conn = self.get()
        try:
            self.insert(conn, row)
            conn.commit()
            self.acknowledged.add(row)
        finally:
            self._pool.putconn(conn, close=True)

    def close_the_connection(self, row: int) -> None:
        self.refused.add(row)
        conn = self.get()
        try:
            self.insert(conn, row)
        finally:
            conn.close()

    def put_back_in_a_transaction(self, row: int) -> None:
        self.refused.add(row)
        conn = self.get()
        try:
            self.insert(conn, row)
        finally:
            self._pool.putconn(conn)

    def kill_its_own_session(self, row: int) -> None:
        self.refused.add(row)
        conn = self.get()
        try:
            self.insert(conn, row)
            conn.execute("select pg_terminate_backend(pg_backend_pid())")
        finally:
            self._pool.putconn(conn)


def kill_now_and_then(admin: Admin, application_name: str, seed: str, end: float) -> int:
    """Let the server end one of these sessions, whatever it does, again and again. Returns how many."""
    chosen = random.Random(f"{seed} killer")
    killed = 0
    rest = threading.Event()
    while time.monotonic() < end:
        if pids := admin.pids(application_name):
            admin.execute("select pg_terminate_backend(%s)", [chosen.choice(pids)])
            killed += 1
        rest.wait(KILL_INTERVAL)
    return killed


def assert_all_work(pool: SyncPool[Connection]) -> None:
    conns = [pool.getconn(timeout=10) for _ in range(MAX_SIZE)]
    assert len({conn.execute("select pg_backend_pid()").fetchone() for conn in conns}) == MAX_SIZE
    for conn in conns:
        conn.commit()
        pool.putconn(conn)
    stats = pool.stats()
    assert stats.leased == 0
    assert stats.size <= MAX_SIZE  # one may just have had its last use


def test_many_threads_share_few_connections_fairly_and_lose_no_row(
    server: Server, dsn: str, admin: Admin, application_name: str, table: str
) -> None:
    seed = os.environ.get("ASYNCPOOL_STRESS_SEED") or str(random.randrange(10**6))
    try:
        stress(server, dsn, admin, application_name, table, seed)
    except BaseException as error:
        error.add_note(f"ASYNCPOOL_STRESS_SEED={seed}")
        raise


def stress(server: Server, dsn: str, admin: Admin, application_name: str, table: str, seed: str) -> None:
    sampler = Sampler(server.dsn, application_name, nameless_too=server.embedded is not None)
    with sampler, SyncPool[Connection](dsn, min_size=2, max_size=MAX_SIZE, max_uses=20) as pool:
        workers = [Worker(pool, table, number, seed) for number in range(THREADS)]
        waiting_work = iter(workers)
        end = time.monotonic() + SECONDS
        threads = in_threads(THREADS, lambda: next(waiting_work).work_until(end))
        killed = kill_now_and_then(admin, application_name, seed, end)
        errors = [error for thread in threads if (error := thread.error())]
        assert errors == []

        eventually_blocking(lambda: pool.stats().recycling == 0)
        stats = pool.stats()
        assert (stats.leased, stats.waiting) == (0, 0)
        assert pool.holders() == []
        assert_all_work(pool)
        stats = pool.stats()
    acknowledged = set[int]().union(*(worker.acknowledged for worker in workers))
    refused = set[int]().union(*(worker.refused for worker in workers))
    found = {row for (row,) in admin.execute(f"select id from {table}")}
    served = [worker.served for worker in workers]
    logger.info(
        "seed %s, %g s: %d leases, %d to %d for each thread (%.2f), longest wait %.3f s; %d rows acknowledged, %d more;"
        " %d killed from outside, %d losses seen; %d connects, closes %s, abandoned %d; at most %d sessions,"
        " looked at %d times",
        seed,
        SECONDS,
        sum(served),
        min(served),
        max(served),
        max(served) / max(1, min(served)),
        max(worker.longest_wait for worker in workers),
        len(acknowledged),
        len(found - acknowledged),
        killed,
        sum(worker.losses for worker in workers),
        stats.connects,
        {reason.name: count for reason, count in stats.closes.items() if count},
        stats.abandoned,
        sampler.most,
        sampler.samples,
    )
    assert acknowledged <= found, f"lost: {sorted(acknowledged - found)}"
    assert not refused & found, f"not rolled back: {sorted(refused & found)}"
    assert 0 < sampler.most <= MAX_SIZE
    assert stats.abandoned == 0
    # In a short time on a slow machine they are few, of which the last rounds are a large share.
    assert max(served) <= 1.5 * min(served) + 4
    assert stats.timeouts == 0
    assert admin.sessions(application_name) == 0
    # It was a stress: everything was done that should be survived.
    done = sum((worker.done for worker in workers), Counter[str]())
    assert len(done) == 9
    assert killed > 0.2 * SECONDS / KILL_INTERVAL
    assert stats.acquires >= sum(served)
