"""A server that is down for hours, silent, or full, in virtual time: who waits, how often it is tried, and the healing.

The pool is the real one, down to libpq; the server is scripted.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Unpack

import psycopg
import pytest
from kit.scripted_server import ERROR, NEVER, OK, SLOW, Gate, Outcome, ScriptedServer
from kit.virtual_time import VirtualLoop, run_virtually

from asyncpool import Pool, PoolTimeout
from asyncpool._core.policy import PROBE_SHARE
from asyncpool._io.log import REPEATED_WITHIN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncpool.options import Options

BACKOFF_INITIAL, BACKOFF_MAX = 0.1, 10.0  # the defaults
HOUR = 3600.0
# What virtual time allows for turns of the loop.
PROMPTLY = 0.01


def make_pool(server: ScriptedServer, **options: Unpack[Options]) -> Pool[Any]:
    options.setdefault("prepare_threshold", None)
    return Pool(server.dsn, **options)


def note_attempts(pool: Pool[Any], loop: VirtualLoop) -> list[float]:
    """When the pool begins to connect, from now on."""
    attempts: list[float] = []
    connect: Callable[[], Awaitable[Any]] = pool._driver.connect

    async def noted() -> Any:
        attempts.append(loop.time())
        return await connect()

    pool._driver.connect = noted  # type: ignore[method-assign]
    return attempts


def without_chance(pool: Pool[Any], draw: float = 0.5) -> None:
    """Every draw of the open pool is the same from now on."""
    assert pool._runner is not None
    pool._runner.machine._draw = lambda: draw


async def expect_timeout(
    pool: Pool[Any], loop: VirtualLoop, timeout: float, cause: type[Exception], words: str
) -> None:
    began = loop.time()
    with pytest.raises(PoolTimeout) as caught:
        await pool.acquire(timeout)
    assert timeout <= loop.time() - began <= timeout + PROMPTLY
    assert isinstance(caught.value.__cause__, cause)
    assert words in str(caught.value.__cause__)
    assert words in str(caught.value)


async def use(pool: Pool[Any], seconds: float = 0.0, timeout: float = 30.0) -> None:
    async with pool.acquire(timeout) as conn:
        await conn.execute("query")
        await asyncio.sleep(seconds)


@pytest.mark.parametrize("min_size", [1, 3])
def test_a_server_that_is_down_for_hours(caplog: pytest.LogCaptureFixture, min_size: int) -> None:
    async def main(loop: VirtualLoop) -> None:
        async with ScriptedServer() as server, make_pool(server, min_size=min_size, max_size=5) as pool:
            attempts = note_attempts(pool, loop)
            caplog.clear()
            down_at = loop.time()
            await server.stop()
            for timeout in (0.5, 2.0, 30.0) * 20:
                await expect_timeout(pool, loop, timeout, psycopg.OperationalError, "No such file or directory")
                await asyncio.sleep(3 * HOUR / 60 - timeout)
            assert pool.stats().size == 0
            assert pool.stats().waiting == 0

            # Those that were lost together may be tried anew together; from then on it is one at a time.
            at_once = [at for at in attempts if at <= down_at + PROMPTLY]
            assert 1 <= len(at_once) <= min_size
            probes = attempts[len(at_once) - 1 :]
            for probe, following in pairwise(probes):
                pause = min(BACKOFF_MAX, max(BACKOFF_INITIAL, PROBE_SHARE * (probe - probes[0])))
                assert following - probe == pytest.approx(pause, abs=0.001)
            assert probes[-1] >= loop.time() - BACKOFF_MAX
            told = [record for record in caplog.records if record.levelno > logging.INFO]
            assert {record.levelname for record in told} == {"WARNING"}
            assert all("connecting failed" in record.getMessage() for record in told)
            assert 1 <= len(told) <= 1 + (loop.time() - down_at) / REPEATED_WITHIN

            # It heals without a request.
            await server.start()
            await asyncio.sleep(BACKOFF_MAX + PROMPTLY)
            stats = pool.stats()
            assert (stats.idle, stats.size) == (min_size, min_size)
            await use(pool)

    run_virtually(main)


def test_waiters_with_all_the_time_of_the_world_are_served_in_their_order_when_it_is_back() -> None:
    async def main(loop: VirtualLoop) -> None:
        async with ScriptedServer() as server, make_pool(server, min_size=1, max_size=2) as pool:
            await server.stop()
            served: list[int] = []

            async def wait(number: int) -> None:
                async with pool.acquire(None):
                    served.append(number)

            tasks = [asyncio.create_task(wait(number)) for number in range(10)]
            await asyncio.sleep(5 * HOUR)
            assert not any(task.done() for task in tasks)
            await server.start()
            await asyncio.wait_for(asyncio.gather(*tasks), BACKOFF_MAX + PROMPTLY)
            assert served == list(range(10))

    run_virtually(main)


def test_a_pool_that_is_opened_while_the_server_is_down_for_hours_is_open_when_it_is_back() -> None:
    async def main(loop: VirtualLoop) -> None:
        async with ScriptedServer() as server:
            await server.stop()
            pool = make_pool(server, min_size=2)
            opening = asyncio.create_task(pool.open(timeout=None))
            await asyncio.sleep(3 * HOUR)
            assert not opening.done()
            await server.start()
            await asyncio.wait_for(opening, BACKOFF_MAX + PROMPTLY)
            assert pool.stats().idle == 2
            await pool.close()

    run_virtually(main)


@pytest.mark.parametrize("draw", [0.25, 0.875])
def test_while_it_fails_otherwise_the_pauses_are_drawn_from_a_doubling_bound(draw: float) -> None:
    async def main(loop: VirtualLoop) -> None:
        failing = False

        def script(gate: Gate, sql: str) -> Outcome:
            return ERROR if failing and gate is Gate.CONNECT else OK

        server = ScriptedServer(script, connect_error=("XX000", "out of order"))
        async with server, make_pool(server, min_size=1, check_interval=None) as pool:
            without_chance(pool, draw)
            failing = True
            attempts = note_attempts(pool, loop)
            pool.drain()
            for _ in range(40):
                await expect_timeout(pool, loop, 10.0, psycopg.OperationalError, "out of order")
                await asyncio.sleep(HOUR / 50)
            for number, (attempt, following) in enumerate(pairwise(attempts)):
                bound = min(BACKOFF_MAX, BACKOFF_INITIAL * 2.0 ** min(number, 60))
                assert following - attempt == pytest.approx(draw * bound, abs=0.001)
            failing = False
            await asyncio.sleep(BACKOFF_MAX)
            assert pool.stats().idle == 1

    run_virtually(main)


def test_a_server_that_takes_connections_and_never_answers() -> None:
    async def main(loop: VirtualLoop) -> None:
        silent = False

        def script(gate: Gate, sql: str) -> Outcome:
            return NEVER if silent and gate in (Gate.CONNECT, Gate.CLOSE) else OK

        server = ScriptedServer(script)
        async with server, make_pool(server, min_size=2, max_size=4, connect_timeout=3.0) as pool:
            without_chance(pool)
            silent = True
            attempts = note_attempts(pool, loop)
            pool.drain()
            began = loop.time()
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire(1.0)
            assert caught.value.__cause__ is None, "no connect has ended yet"
            assert 1.0 <= loop.time() - began <= 1.0 + PROMPTLY
            await asyncio.sleep(30)
            for _ in range(60):
                await expect_timeout(pool, loop, 2.0, psycopg.errors.ConnectionTimeout, "timeout expired after 3 s")
                await asyncio.sleep(HOUR / 20)
            # Each holds its place for connect_timeout, and a moment more for an end that is not to be expected of a
            # server that is silent; then comes the pause, that of one which refuses.
            last = [following - attempt for attempt, following in pairwise(attempts)][-20:]
            assert last == pytest.approx([3.0 + 0.1 + BACKOFF_MAX] * 20, abs=0.001)
            silent = False
            await asyncio.sleep(3.0 + 5.0 + BACKOFF_MAX)
            assert (pool.stats().idle, pool.stats().size) == (2, 2)

    run_virtually(main)


# --- 53300: too many connections ----------------------------------------------------------------------------


def test_a_full_server_fails_nobody_whom_a_release_can_serve() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = ScriptedServer(max_connections=2)
        async with server, make_pool(server, min_size=1, max_size=6) as pool:
            without_chance(pool)
            attempts = note_attempts(pool, loop)
            began = loop.time()
            ends: list[float] = []

            async def hold() -> None:
                await use(pool, seconds=1.0, timeout=25.0)
                ends.append(loop.time() - began)

            await asyncio.gather(*(hold() for _ in range(40)))
            # Two at a time, one second each, as if the pool had two places; and nobody was told of it.
            assert ends == pytest.approx([1.0 + index // 2 for index in range(40)], abs=0.01)
            assert pool.stats().timeouts == 0
            assert server.most_sessions == 2
            # After the two or more that were begun side by side, one at a time tries, at the pace of the backoff.
            refused = [at for at in attempts if at > began + PROMPTLY]
            pauses = [following - at for at, following in pairwise(refused)]
            assert pauses == sorted(pauses)
            assert pauses[-1] == pytest.approx(BACKOFF_MAX / 2, abs=0.001)

    run_virtually(main)


def test_on_a_full_server_whom_nobody_can_serve_is_told_why_and_in_time() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = ScriptedServer(max_connections=2)
        async with server, make_pool(server, min_size=2, max_size=4) as pool:
            first, second = await pool.acquire(), await pool.acquire()
            await expect_timeout(pool, loop, 7.0, psycopg.errors.TooManyConnections, "too many clients already")
            waiting = asyncio.create_task(use(pool))
            await asyncio.sleep(1)
            await pool.release(first)
            await asyncio.wait_for(waiting, PROMPTLY)
            await pool.release(second)
            assert pool.stats().idle == 2

    run_virtually(main)


def test_when_the_server_has_room_again_those_who_wait_get_it() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = ScriptedServer(max_connections=1)
        async with server, make_pool(server, min_size=1, max_size=3) as pool:
            held = await pool.acquire()
            waiting = [asyncio.create_task(use(pool, timeout=1000.0)) for _ in range(2)]
            await asyncio.sleep(600)
            assert not any(task.done() for task in waiting)
            server.max_connections = 100
            await asyncio.wait_for(asyncio.gather(*waiting), BACKOFF_MAX + PROMPTLY)
            await pool.release(held)

    run_virtually(main)


def test_a_pool_whose_min_size_the_server_cannot_hold_serves_with_what_it_has() -> None:
    async def main(loop: VirtualLoop) -> None:
        server = ScriptedServer(max_connections=2)
        async with server:
            pool = make_pool(server, min_size=4, max_size=4)
            began = loop.time()
            with pytest.raises(PoolTimeout) as caught:
                await pool.open(timeout=5.0)
            assert isinstance(caught.value.__cause__, psycopg.errors.TooManyConnections)
            assert loop.time() - began <= 5.0 + PROMPTLY
            assert not server.transports

            await pool.open(wait=False)
            await asyncio.gather(*(use(pool, seconds=0.5) for _ in range(20)))
            assert loop.time() - began <= 10.0 + 2 * PROMPTLY
            server.max_connections = 100
            await asyncio.sleep(2 * BACKOFF_MAX)
            assert pool.stats().idle == 4
            await pool.close()

    run_virtually(main)


def test_a_server_that_is_slow_to_refuse_holds_nobody_up() -> None:
    """The connect that will be refused is under way while a connection comes back: that one serves."""

    async def main(loop: VirtualLoop) -> None:
        crowded = False

        def script(gate: Gate, sql: str) -> Outcome:
            return SLOW if crowded and gate is Gate.CONNECT else OK

        server = ScriptedServer(script)
        async with server, make_pool(server, min_size=1, max_size=3) as pool:
            crowded = True
            held = await pool.acquire()
            waiting = asyncio.create_task(use(pool))
            await asyncio.sleep(0.01)
            assert pool.stats().connecting == 1
            await pool.release(held)
            await asyncio.wait_for(waiting, PROMPTLY)

    run_virtually(main)
