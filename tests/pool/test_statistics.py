"""What `stats()` counts: exactly what callers have seen, however they came and went."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import CloseReason, Pool, PoolStats, PoolTimeout, SyncPool
from asyncpool.histogram import SHORTEST

if TYPE_CHECKING:
    from kit.servers import Admin

    from .leftovers import Connection


async def take(pool: Pool[Connection], timeout: float | None = 20) -> None:
    async with pool.acquire(timeout):
        pass


@on_both_loops
async def test_leases_are_counted_as_immediate_or_waited(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        for _ in range(3):
            await take(pool)
        held = await pool.acquire()
        waiting = [asyncio.create_task(take(pool)) for _ in range(2)]
        await eventually(lambda: pool.stats().waiting == 2)
        await pool.release(held)
        await asyncio.gather(*waiting)
        stats = pool.stats()
    assert (stats.acquires, stats.immediate, stats.waited) == (6, 4, 2)
    assert stats.wait.count == 6
    assert stats.wait.counts[0] >= 4
    assert (stats.timeouts, stats.cancelled, stats.returned_bad) == (0, 0, 0)


@on_both_loops
async def test_who_leaves_the_queue_has_had_no_lease(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        held = await pool.acquire()
        with pytest.raises(PoolTimeout):
            await take(pool, 0.01)
        cancelled = asyncio.create_task(take(pool))
        granted = asyncio.create_task(take(pool))
        await eventually(lambda: pool.stats().waiting == 2)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        pool.release(held)
        granted.cancel()  # after its grant, before it runs
        await asyncio.wait([granted])
        stats = pool.stats()
        assert (stats.acquires, stats.timeouts, stats.cancelled, stats.leased) == (1, 1, 2, 0)
        assert (stats.wait.count, stats.hold.count) == (1, 1)


@on_both_loops
async def test_every_lease_that_has_ended_is_in_the_histogram_of_holds(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool:
        for _ in range(5):
            await take(pool)
        async with pool.acquire() as conn:
            await conn.execute("select pg_sleep(0.2)")
        for query in (b"nonsense", b"select 1"):
            with suppress(psycopg.Error):
                async with pool.acquire() as conn:
                    await conn.execute(query)
        kept = await pool.acquire()
        stats = pool.stats()
        assert stats.hold.count == 8
        assert 0.2 <= stats.hold.max < 20
        assert stats.hold.sum >= 0.2
        assert stats.hold.quantile(1.0) == stats.hold.max
        await pool.release(kept)
        assert pool.stats().hold.count == 9


async def test_a_lease_that_was_lost_discarded_or_severed_is_among_the_holds_too(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pool = Pool(dsn, max_size=1)
    await pool.open()
    conn = await pool.acquire()
    admin.terminate(*admin.pids(application_name))
    with pytest.raises(psycopg.OperationalError):
        await conn.execute("select 1")
    await pool.release(conn)
    assert (pool.stats().hold.count, pool.stats().returned_bad) == (1, 1)
    with pytest.warns(ResourceWarning):
        await drop_one(pool)
    assert (pool.stats().hold.count, pool.stats().returned_bad) == (3, 2)
    conn = await pool.acquire()
    await asyncio.sleep(10 * SHORTEST)
    await pool.close(timeout=0)
    stats = pool.stats()
    assert stats.hold.count == stats.acquires == 4
    assert stats.hold.counts[0] <= 3  # it was held for longer than those that are not told apart


async def drop_one(pool: Pool[Connection]) -> None:
    await pool.acquire()
    await take(pool)


async def test_a_return_in_a_transaction_is_bad_by_hand_and_not_at_the_end_of_a_block(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        with suppress(ZeroDivisionError):
            async with pool.acquire() as conn:
                await conn.execute("select 1")
                raise ZeroDivisionError
        assert pool.stats().returned_bad == 0
        conn = await pool.acquire()
        await conn.execute("select 1")
        await pool.release(conn)
        assert pool.stats().returned_bad == 1


async def test_connects_are_timed(dsn: str) -> None:
    async with Pool(dsn, min_size=3) as pool:
        stats = pool.stats()
        assert stats.connects == stats.connect.count == 3
        assert 0 < stats.connect.p50 <= stats.connect.max < 20


async def test_lanes_are_no_leases(dsn: str) -> None:
    async with Pool(dsn, max_size=2, lanes=1) as pool:
        for number in range(20):
            assert await pool.fetchval("select %s::int", [number]) == number
        await eventually(lambda: pool.stats().leased == 0)
        stats = pool.stats()
        assert (stats.acquires, stats.one_shots, stats.hold.count, stats.wait.count) == (0, 20, 0, 0)
        sleeping = asyncio.create_task(pool.fetchval("select 1 from pg_sleep(0.2)"))
        await eventually(lambda: pool.stats().leased == 1)
        await take(pool)
        stats = pool.stats()
        assert (stats.acquires, stats.hold.count) == (1, 1)
        await sleeping


async def test_the_totals_begin_anew_when_the_pool_is_opened_again(dsn: str) -> None:
    pool = Pool(dsn)
    for _ in range(2):
        await pool.open()
        await take(pool)
        assert (pool.stats().acquires, pool.stats().hold.count, pool.stats().connect.count) == (1, 1, 1)
        await pool.close()
        assert (pool.stats().acquires, pool.stats().size) == (1, 0)
    assert pool.stats().closes == {CloseReason.POOL_CLOSED: 1}


async def test_a_pool_that_was_never_opened_has_nothing_to_tell(dsn: str) -> None:
    stats = Pool(dsn, max_size=7).stats()
    assert (stats.max_size, stats.size, stats.acquires, stats.hold.count, stats.wait.max) == (7, 0, 0, 0, 0.0)
    with pytest.raises(FrozenInstanceError):
        stats.size = 1  # type: ignore[misc]  # what is tested


def test_threads_count_as_tasks_do(dsn: str) -> None:
    threads, each = 8, 25
    with SyncPool(dsn, max_size=2) as pool:

        def work() -> None:
            for number in range(each):
                if number % 2:
                    with pool.acquire() as conn:
                        conn.execute("select 1")
                else:
                    pool.putconn(pool.getconn())

        working = [threading.Thread(target=work) for _ in range(threads)]
        for thread in working:
            thread.start()
        while any(thread.is_alive() for thread in working):
            assert isinstance(pool.stats(), PoolStats)
        for thread in working:
            thread.join()
        stats = pool.stats()
        assert stats.acquires == stats.hold.count == stats.wait.count == threads * each
        assert stats.immediate + stats.waited == stats.acquires
        assert stats.hold.max > SHORTEST


def test_a_thread_that_holds_a_connection_is_named(dsn: str) -> None:
    with SyncPool(dsn, max_size=2) as pool:
        taken, over = threading.Event(), threading.Event()

        def hold() -> None:
            with pool.acquire():
                taken.set()
                over.wait(20)

        thread = threading.Thread(target=hold, name="worker 7")
        thread.start()
        assert taken.wait(20)
        by_hand = pool.getconn()
        assert [holder.owner for holder in pool.holders()] == ["thread 'worker 7'", "thread 'MainThread'"]
        with pytest.raises(PoolTimeout, match="who waited holds one of them"):
            pool.getconn(timeout=0.05)
        over.set()
        thread.join()
        pool.putconn(by_hand)
