"""The same over TLS, where what has arrived may lie decrypted in libpq while the socket has nothing to be read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.proxy import BYTE_BY_BYTE, FAIR, GARBAGE, STALLED, Proxy, Towards, Weather
from kit.sampler import Sampler
from kit.threads import in_thread
from kit.waiting import eventually, eventually_blocking
from pool.interruptions import PAUSES, WAYS, Operation, Pause, Way, anyio_scope, task_cancel

from asyncpool import CloseReason, Pool, PoolTimeout, SyncPool

from .deadlines import check_overrun, ends_within, figures
from .test_network_cancellation import OPERATIONS

if TYPE_CHECKING:
    from kit.servers import Admin

    from asyncpool.cli.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

CHECK_TIMEOUT = 0.25
PATIENCE = 25.0
SECONDS: dict[str, Any] = {
    "acquire_timeout": 20.0,
    "connect_timeout": 5.0,
    "check_timeout": CHECK_TIMEOUT,
    "cancel_timeout": CHECK_TIMEOUT,
    "backoff_initial": 0.02,
    "backoff_max": 0.05,
}


def asleep(admin: Admin, application_name: str) -> int:
    sleeping = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    return int(admin.value(sleeping, [application_name]))


async def assert_serves(pool: Pool[Connection]) -> None:
    async with pool.acquire(timeout=20) as conn:
        cursor = await conn.execute("select 'fine'")
        assert await cursor.fetchall() == [("fine",)]


@on_both_loops
async def test_the_sessions_are_encrypted(tls_dsn: str, tls_admin: Admin, application_name: str) -> None:
    async with Pool(tls_dsn, min_size=2) as pool:
        await assert_serves(pool)
        encrypted = "select ssl from pg_stat_ssl join pg_stat_activity using (pid) where application_name = %s"
        assert tls_admin.execute(encrypted, [application_name]) == [(True,), (True,)]


# --- what lies decrypted in a buffer ------------------------------------------------------------------------

WEATHERS = {
    "fair": FAIR,
    "one byte at a time": BYTE_BY_BYTE,
    "odd pieces": Weather(piece=4099),
    "pieces of a TLS record": Weather(piece=16 * 1024 + 22),
}
each_weather = pytest.mark.parametrize("weather", WEATHERS)


@each_weather
@on_both_loops
async def test_results_of_any_size_arrive_whole(tls_proxy: Proxy, tls_dsn: str, weather: str) -> None:
    """Around the sizes of a TLS record and of libpq's buffer, each in a statement of its own."""
    sizes = [1, 100, 8_000, 16_500]
    if weather != "one byte at a time":
        sizes += [16_300, 16_384, 33_000, 65_536, 300_000, 5_000_000]
    async with Pool(tls_dsn, max_size=1, autocommit=True) as pool, pool.acquire() as conn:
        tls_proxy.apply(WEATHERS[weather])
        for size in sizes:
            async with asyncio.timeout(20):
                cursor = await conn.execute("select repeat('x', %s)", [size])
                assert await cursor.fetchone() == ("x" * size,)
                cursor = await conn.execute("select length(%s)", ["x" * size])
                assert await cursor.fetchone() == (size,)


@each_weather
@on_both_loops
async def test_streams_and_copies_arrive_whole(tls_proxy: Proxy, tls_dsn: str, weather: str) -> None:
    """Piece by piece, which is when a buffer is left half-full."""
    count = 20 if weather == "one byte at a time" else 3000
    rows = f"select i, repeat('x', 300) from generate_series(1, {count}) i"
    async with Pool(tls_dsn, max_size=1, autocommit=True) as pool, pool.acquire() as conn:
        await conn.execute("create temp table received (id int, text text)")
        tls_proxy.apply(WEATHERS[weather])
        async with asyncio.timeout(20):
            for size in (1, 7):
                got = [row async for row in conn.cursor().stream(rows.encode(), size=size)]
                assert [row[0] for row in got] == list(range(1, count + 1))
            async with conn.cursor().copy(f"copy ({rows}) to stdout".encode()) as copy:
                assert len([row async for row in copy.rows()]) == count
            async with conn.cursor().copy("copy received from stdin") as copy:
                for number in range(count):
                    await copy.write_row([number, "y" * 300])
            cursor = await conn.execute("select count(*), sum(length(text)) from received")
            assert await cursor.fetchone() == (count, 300 * count)
            async with conn.pipeline():
                cursors = [await conn.execute(f"select {number}, repeat('x', 300)".encode()) for number in range(count)]
            assert [(await cursor.fetchall())[0][0] for cursor in cursors] == list(range(count))


@each_weather
async def test_notifications_arrive_whole(
    tls_proxy: Proxy, tls_dsn: str, tls_admin: Admin, application_name: str, weather: str
) -> None:
    """Many in one record: all that are decrypted must be given out though nothing more arrives."""
    count = 300
    channel = application_name.replace("-", "_")
    async with Pool(tls_dsn, max_size=1, autocommit=True) as pool, pool.acquire() as conn:
        await conn.execute(f"listen {channel}".encode())
        tls_proxy.apply(WEATHERS[weather])
        tls_admin.execute(f"select pg_notify('{channel}', i::text) from generate_series(1, {count}) i")
        payloads: list[str] = []
        async with asyncio.timeout(20), aclosing(conn.notifies(stop_after=count)) as notifications:
            payloads += [notification.payload async for notification in notifications]
        assert payloads == [str(number) for number in range(1, count + 1)]
        # In one flight with the answer to a statement that somebody waits for.
        cursor = await conn.execute(
            f"select pg_notify('{channel}', i::text), repeat('x', 100) from generate_series(1, {count}) i".encode()
        )
        assert len(await cursor.fetchall()) == count
        async with asyncio.timeout(20), aclosing(conn.notifies(stop_after=count)) as notifications:
            assert len([notification async for notification in notifications]) == count


async def test_a_result_and_the_end_of_the_session_in_one_flight(
    tls_proxy: Proxy, tls_dsn: str, tls_admin: Admin
) -> None:
    """Over TLS libpq may read on to the end before psycopg has looked at the result: then that is what is told."""
    async with Pool(tls_dsn, max_size=1, autocommit=True, check_interval=None) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            tls_proxy.apply(STALLED, Towards.CLIENT)
            task = asyncio.ensure_future(conn.execute("select repeat('x', 50000)"))
            await eventually(lambda: tls_proxy.links[0].received(Towards.CLIENT) > 50_000)
            tls_admin.terminate(pid)
            tls_proxy.clear()
            [outcome] = await asyncio.gather(asyncio.wait_for(task, 20), return_exceptions=True)
            if isinstance(outcome, psycopg.AsyncCursor):
                assert await outcome.fetchone() == ("x" * 50_000,)
            else:
                assert isinstance(outcome, psycopg.OperationalError)
                assert conn.closed
        await assert_serves(pool)
        assert pool.stats().connects == 2


# --- faults -------------------------------------------------------------------------------------------------

# The answer to the request for TLS is one byte; the server's part of the handshake follows, then the login.
HANDSHAKE_FAULTS: dict[str, tuple[Weather, Towards]] = {
    "no answer to the request for TLS": (STALLED, Towards.CLIENT),
    "stalled after the answer": (Weather(stall_after=1), Towards.CLIENT),
    "stalled in the handshake": (Weather(stall_after=500), Towards.CLIENT),
    "stalled in the client's part": (Weather(stall_after=100), Towards.SERVER),
    "reset after the answer": (Weather(reset_after=1), Towards.CLIENT),
    "reset in the handshake": (Weather(reset_after=500), Towards.CLIENT),
    "half-closed in the handshake": (Weather(close_after=500), Towards.CLIENT),
    "half-closed in the client's part": (Weather(close_after=100), Towards.SERVER),
    "garbage for the answer": (GARBAGE, Towards.CLIENT),
    "garbage in the handshake": (Weather(garble_after=300), Towards.CLIENT),
    "garbage in the client's part": (Weather(garble_after=50), Towards.SERVER),
}
# Of the bytes that the client gets, the last ones.
LOGIN_FAULTS: dict[str, Callable[[int], Weather]] = {
    "stalled in the login": lambda size: Weather(stall_after=size - 20),
    "garbage in the login": lambda size: Weather(garble_after=size - 20),
    "reset in the login": lambda size: Weather(reset_after=size - 20),
}


@pytest.mark.parametrize("fault", [*HANDSHAKE_FAULTS, *LOGIN_FAULTS])
async def test_a_fault_in_the_handshake_keeps_the_deadlines(
    tls_proxy: Proxy, tls_dsn: str, fault: str, tls_admin: Admin, application_name: str
) -> None:
    # At least one attempt is to fail within the time of an acquire, on a busy machine too.
    options: dict[str, Any] = {**SECONDS, "acquire_timeout": 1.5, "connect_timeout": 0.4}
    async with Pool(tls_dsn, min_size=0, max_size=1, **options) as pool:
        conn = await pool.acquire(timeout=20)
        size_of_login = tls_proxy.links[-1].delivered(Towards.CLIENT)
        await pool.release(conn)
        pool.drain()
        await eventually(lambda: pool.stats().size == 0)
        if fault in LOGIN_FAULTS:
            tls_proxy.apply(LOGIN_FAULTS[fault](size_of_login), Towards.CLIENT)
        else:
            tls_proxy.apply(*HANDSHAKE_FAULTS[fault])
        with pytest.raises(PoolTimeout) as raised, ends_within(1.5, f"acquire over TLS, {fault}"):
            await pool.acquire()
        error = raised.value.__cause__
        assert isinstance(error, psycopg.OperationalError)
        assert ("connection timeout expired after 0.4 s" in str(error)) == ("stalled" in fault or "no answer" in fault)
        tls_proxy.clear()
        async with pool.acquire(timeout=20) as conn:
            await conn.execute("select 1")
        assert pool.stats().connects == 2
    await eventually(lambda: tls_admin.sessions(application_name) == 0)


def reset(proxy: Proxy) -> None:
    proxy.links[-1].reset()


def half_close(proxy: Proxy) -> None:
    proxy.links[-1].half_close(Towards.CLIENT)


def half_close_to_server(proxy: Proxy) -> None:
    proxy.links[-1].half_close(Towards.SERVER)


def garble(proxy: Proxy) -> None:
    proxy.links[-1].apply(GARBAGE, Towards.CLIENT)


def half_close_in_the_answer(proxy: Proxy) -> None:
    proxy.links[-1].apply(Weather(close_after=500), Towards.CLIENT)


def garble_the_question(proxy: Proxy) -> None:
    proxy.links[-1].apply(GARBAGE, Towards.SERVER)


BREAKS = [reset, half_close, half_close_to_server, garble, half_close_in_the_answer, garble_the_question]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
@on_both_loops
async def test_what_breaks_in_the_midst_of_a_statement_is_told_and_replaced(
    tls_proxy: Proxy, tls_dsn: str, break_it: Callable[[Proxy], None]
) -> None:
    async with Pool(tls_dsn, min_size=0, max_size=1, autocommit=True, **SECONDS) as pool:
        with pytest.raises(psycopg.DatabaseError), ends_within(0.05, f"error over TLS, {break_it.__name__}"):
            async with pool.acquire() as conn:
                break_it(tls_proxy)
                async with asyncio.timeout(10):
                    await conn.execute("select repeat('x', 1000), pg_sleep(0.05)")
        tls_proxy.clear()
        await assert_serves(pool)
        assert pool.stats().connects == 2


@on_both_loops
async def test_an_idle_session_that_the_server_ends_is_noticed_by_itself(
    tls_dsn: str, tls_admin: Admin, application_name: str
) -> None:
    async with Pool(tls_dsn, min_size=2, max_size=2, check_interval=None, **SECONDS) as pool:
        tls_admin.terminate(*tls_admin.pids(application_name))
        await eventually(lambda: pool.stats().closes.get(CloseReason.DISCONNECTED) == 2)
        await eventually(lambda: pool.stats().idle == 2)
        await assert_serves(pool)


async def test_an_idle_session_that_the_server_has_just_ended_is_not_handed_out(
    tls_dsn: str, tls_admin: Admin, application_name: str
) -> None:
    """The loop has had no time to hear of it."""
    async with Pool(tls_dsn, min_size=1, max_size=1, check_interval=None, **SECONDS) as pool:
        for _ in range(3):
            tls_admin.terminate(*tls_admin.pids(application_name))
            await assert_serves(pool)


@on_both_loops
async def test_a_stalled_idle_connection_is_replaced(tls_proxy: Proxy, tls_dsn: str) -> None:
    async with Pool(tls_dsn, min_size=1, max_size=1, check_interval=0, **SECONDS) as pool:
        tls_proxy.links[0].apply(STALLED)
        with ends_within(2 * CHECK_TIMEOUT, "check_timeout, over TLS, max_size=1"):
            await assert_serves(pool)


async def test_close_ends_in_time_with_every_socket_stalled(tls_proxy: Proxy, tls_dsn: str) -> None:
    async with Pool(tls_dsn, min_size=3, max_size=3, **SECONDS) as pool:
        conn = await pool.acquire()
        statement = asyncio.ensure_future(conn.execute("select pg_sleep(600)"))
        await asyncio.sleep(0)
        tls_proxy.apply(STALLED)
        with ends_within(0.1 + CHECK_TIMEOUT, "close(timeout=0.1) over TLS"):
            await pool.close(timeout=0.1)
        with pytest.raises(psycopg.OperationalError):
            await statement


@on_both_loops
async def test_the_server_never_counts_more_than_max_size(
    tls_server: EmbeddedServer, tls_admin: Admin, application_name: str
) -> None:
    """A session's last word over TLS takes another flight, and the server counts it until then."""
    dsn = tls_server.host_dsn(sslmode="require", application_name=application_name)
    tls_admin.value("select 1")
    with Sampler(tls_server.dsn(), application_name, nameless_too=True) as sampler:
        async with Pool(dsn, min_size=0, max_size=2, max_uses=2) as pool:

            async def work() -> None:
                for _ in range(8):
                    async with pool.acquire() as conn:
                        await conn.execute("select 1")

            await asyncio.gather(*(work() for _ in range(6)))
        assert tls_admin.sessions(application_name) == 0
    assert pool.stats().abandoned == 0
    assert 0 < sampler.most <= 2


# --- cancellation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [task_cancel, anyio_scope], ids=lambda way: way.__name__)
@on_both_loops
async def test_a_cancelled_statement_ends_and_its_connection_goes_on(
    tls_dsn: str, tls_admin: Admin, application_name: str, way: Way
) -> None:
    async def cancel_one(operation: Operation) -> None:
        async with Pool(tls_dsn, min_size=0, max_size=1, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
            async with pool.acquire() as conn:
                pid = conn.info.backend_pid

            async def work() -> None:
                async with pool.acquire() as conn:
                    await operation(conn)

            await way(work, all_busy.is_set)
            async with pool.acquire() as conn:
                assert conn.info.backend_pid == pid
                await conn.execute("select 1")
            assert pool.stats().closes == {}

    async def watch() -> None:
        await eventually(lambda: asleep(tls_admin, application_name) == len(OPERATIONS), timeout=30)
        all_busy.set()

    all_busy = asyncio.Event()
    await asyncio.gather(watch(), *(cancel_one(operation) for operation in OPERATIONS))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_what_is_cancelled_between_two_pieces_ends_and_its_connection_goes_on(tls_dsn: str, way: Way) -> None:
    async def cancel_one(pause: Pause) -> None:
        half_way = asyncio.Event()
        async with Pool(tls_dsn, min_size=0, max_size=1, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
            async with pool.acquire() as conn:
                pid = conn.info.backend_pid

            async def work() -> None:
                async with pool.acquire() as conn:
                    await pause(conn, half_way)

            await way(work, half_way.is_set)
            async with pool.acquire() as conn:
                assert conn.info.backend_pid == pid
                await conn.execute("select 1")
            assert pool.stats().closes == {}

    await asyncio.gather(*(cancel_one(pause) for pause in PAUSES))


@pytest.mark.parametrize("way", [task_cancel, anyio_scope], ids=lambda way: way.__name__)
@on_both_loops
async def test_a_cancelled_task_is_back_within_cancel_timeout_when_the_network_is_dead(
    tls_proxy: Proxy, tls_dsn: str, tls_admin: Admin, application_name: str, way: Way
) -> None:
    dead_since: list[float] = []
    back_at: dict[str, float] = {}

    def all_asleep_and_dead() -> bool:
        if not dead_since and asleep(tls_admin, application_name) == len(OPERATIONS):
            tls_proxy.apply(STALLED)
            dead_since.append(time.monotonic())
        return bool(dead_since)

    async def cancel_one(operation: Operation) -> None:
        async with Pool(tls_dsn, min_size=0, max_size=1, **SECONDS) as pool:

            async def work() -> None:
                try:
                    async with pool.acquire() as conn:
                        await operation(conn)
                finally:
                    back_at[operation.__name__] = time.monotonic()

            await way(work, all_asleep_and_dead)

    await asyncio.gather(*(cancel_one(operation) for operation in OPERATIONS))
    for name, at in back_at.items():
        check_overrun(f"cancel_timeout over TLS, {name}, {way.__name__}", at - dead_since[0], CHECK_TIMEOUT)


async def test_how_many_round_trips_a_cancellation_takes(
    tls_proxy: Proxy, tls_dsn: str, tls_admin: Admin, application_name: str
) -> None:
    """The request is encrypted as well: TCP's, libpq's question for TLS, and the handshake's, one or two as server and
    client agree about the curve, come before its own.
    """
    async with Pool(tls_dsn, max_size=1, autocommit=True, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:
            task = asyncio.ensure_future(conn.execute("select pg_sleep(600)"))
            await eventually(lambda: asleep(tls_admin, application_name) == 1)
            tls_proxy.apply(Weather(latency=0.1))
            tls_proxy.count_round_trips()
            began = time.monotonic()
            task.cancel()
            await asyncio.wait([task])
            took = time.monotonic() - began
            figures.info("execute over TLS: %d round trips, %.0f ms of 1000", tls_proxy.round_trips, 1000 * took)
            assert tls_proxy.round_trips in (4, 5)
            tls_proxy.clear()
        assert pool.stats().closes == {}


# --- threads ------------------------------------------------------------------------------------------------


def test_a_blocking_pool_keeps_its_deadlines_and_frees_its_threads(
    tls_proxy: Proxy, tls_dsn: str, tls_admin: Admin, application_name: str
) -> None:
    pool = SyncPool(tls_dsn, min_size=0, max_size=2, **SECONDS)
    pool.open()
    with pool.acquire() as conn:
        assert conn.execute("select repeat('x', 1000000)").fetchone() == ("x" * 1_000_000,)
    conns = [pool.getconn() for _ in range(2)]
    conns[1].execute("select 1")
    running = in_thread(lambda: conns[0].execute("select pg_sleep(600)"))
    eventually_blocking(lambda: asleep(tls_admin, application_name) == 1)
    tls_proxy.apply(STALLED)
    with ends_within(0, "putconn over TLS"):
        pool.putconn(conns[1])
    began = time.monotonic()
    with ends_within(0.1 + CHECK_TIMEOUT, "close(timeout=0.1) of a SyncPool over TLS"):
        pool.close(timeout=0.1)
    assert isinstance(running.error(), psycopg.OperationalError)
    check_overrun("thread over TLS after close(0.1)", time.monotonic() - began, 0.1 + CHECK_TIMEOUT)
