"""What `stats()` counts: exactly what callers have seen, however they came and went."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.threads import in_thread
from kit.waiting import eventually, eventually_blocking

from asyncpool import CloseReason, Pool, PoolError, PoolStats, PoolTimeout, SyncPool
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
        assert (pool.stats().acquires, pool.stats().immediate) == (1, 1)  # totals never go down
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


async def test_who_leaves_while_a_statement_waits_to_be_sent_is_counted_as_cancelled(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        held = await pool.acquire()
        waiting = asyncio.create_task(pool.fetchval("select 1"))
        await eventually(lambda: pool.stats().waiting == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (pool.stats().cancelled, pool.stats().waiting) == (1, 0)
        await pool.release(held)


async def test_who_is_cancelled_when_it_was_refused_is_counted_once(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        held = await pool.acquire()
        waiting = asyncio.create_task(take(pool, 0))
        await asyncio.sleep(0)  # it is told in its next turn
        assert pool.stats().timeouts == 1
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert (pool.stats().timeouts, pool.stats().cancelled) == (1, 0)
        await pool.release(held)


async def test_who_is_refused_when_he_was_cancelled_is_counted_once(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        held = await pool.acquire()
        waiting = asyncio.create_task(take(pool, 0.02))
        await asyncio.sleep(0)
        assert pool.stats().waiting == 1
        waiting.cancel()
        time.sleep(0.03)  # noqa: ASYNC251  # its time is over before it runs
        pool.resize(0, 1)  # the pool looks at the time
        assert pool.stats().timeouts == 1
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert (pool.stats().timeouts, pool.stats().cancelled) == (1, 0)
        await pool.release(held)


def test_a_thread_that_takes_what_another_has_just_given_back_is_named(dsn: str) -> None:
    with SyncPool(dsn, max_size=1) as pool:
        thread = threading.Thread(target=lambda: pool.putconn(pool.getconn()), name="worker 7")
        thread.start()
        thread.join()
        runner: Any = pool._pool._runner
        (slot,) = runner.machine.slots()
        slot.resource.alive_at = time.monotonic() + 60  # it is not looked at once more
        conn = pool.getconn()
        assert [holder.owner for holder in pool.holders()] == ["thread 'MainThread'"]
        pool.putconn(conn)


def test_a_thread_s_lease_that_close_has_ended_is_among_the_holds(dsn: str) -> None:
    pool = SyncPool(dsn, max_size=1)
    pool.open()
    conn = pool.getconn()
    eventually_blocking(lambda: pool.holders()[0].held_for > 10 * SHORTEST)
    pool.close(timeout=0)
    with suppress(PoolError):
        pool.putconn(conn)
    assert pool.stats().hold.count == 1
    assert pool.stats().hold.max > 10 * SHORTEST


def test_a_connection_that_had_ended_when_a_thread_was_to_get_it_was_no_lease(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([True])

    def has_closed(fd: int) -> bool:
        time.sleep(10 * SHORTEST)  # the time until then is no hold
        return next(ends, False)

    with SyncPool(dsn, max_size=1) as pool:
        held = pool.getconn()
        waiting = in_thread(lambda: pool.putconn(pool.getconn()))
        eventually_blocking(lambda: pool.stats().waiting == 1)
        monkeypatch.setattr("asyncpool._io.blocking.peer_has_closed", has_closed)
        pool.putconn(held)
        waiting.result()
        stats = pool.stats()
        assert stats.closes == {CloseReason.DISCONNECTED: 1}
        assert stats.acquires == stats.hold.count == 2


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
