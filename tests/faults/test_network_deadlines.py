"""Nothing waits longer than its own deadline, whatever the network does; and the place is free again afterwards."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops, on_uvloop
from kit.proxy import BYTE_BY_BYTE, FAIR, GARBAGE, STALLED, Arrival, Proxy, Towards, Weather
from kit.waiting import eventually
from psycopg.conninfo import make_conninfo

from asyncpool import CloseReason, Pool, PoolClosed, PoolTimeout

from .deadlines import ACQUIRE_TIMEOUT, CONNECT_TIMEOUT, altered, ends_within, patient_deadlines, short_deadlines

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")

Connection = psycopg.AsyncConnection[Any]

CHECK_TIMEOUT = 0.2
SECONDS = short_deadlines(CHECK_TIMEOUT)
PATIENT = patient_deadlines(CHECK_TIMEOUT)


@dataclass(frozen=True)
class Fault:
    """What the network does to those who connect, and what they are told of it."""

    name: str
    words: str
    arrival: Arrival = Arrival.PASS
    weather: Weather = FAIR
    towards: Towards | None = None

    def begin(self, proxy: Proxy) -> None:
        proxy.apply(self.weather, self.towards)
        proxy.receive(self.arrival)

    def __str__(self) -> str:
        return self.name


EXPIRED = rf"connection timeout expired after {CONNECT_TIMEOUT:g} s"
CLOSED = r"server closed the connection unexpectedly"
RESET = rf"Connection reset by peer|{CLOSED}"
# What the server says while somebody connects is about 400 bytes long; what it is told, 80.
FAULTS = [
    Fault("refused", r"Connection refused", Arrival.REFUSE),
    Fault("reset", RESET, Arrival.RESET),
    Fault("closed", CLOSED, Arrival.CLOSE),
    Fault("ignored", EXPIRED, Arrival.IGNORE),
    Fault("stalled", EXPIRED, weather=STALLED),
    Fault("stalled to the server", EXPIRED, weather=STALLED, towards=Towards.SERVER),
    Fault("stalled to the client", EXPIRED, weather=STALLED, towards=Towards.CLIENT),
    Fault("stalled after a byte of the answer", EXPIRED, weather=Weather(stall_after=1), towards=Towards.CLIENT),
    Fault("stalled after half the answer", EXPIRED, weather=Weather(stall_after=100), towards=Towards.CLIENT),
    Fault("stalled in the middle of the question", EXPIRED, weather=Weather(stall_after=6), towards=Towards.SERVER),
    Fault("reset in the answer", RESET, weather=Weather(reset_after=100), towards=Towards.CLIENT),
    Fault("half-closed in the answer", CLOSED, weather=Weather(close_after=100), towards=Towards.CLIENT),
    Fault("half-closed in the question", CLOSED, weather=Weather(close_after=6), towards=Towards.SERVER),
    Fault(
        "garbage for an answer", r"expected authentication request|received", weather=GARBAGE, towards=Towards.CLIENT
    ),
    Fault("garbage in the answer", r"[a-z]", weather=Weather(garble_after=100), towards=Towards.CLIENT),
    Fault("garbage for a question", rf"{CLOSED}|invalid length", weather=GARBAGE, towards=Towards.SERVER),
    Fault("one byte in 50 ms", EXPIRED, weather=Weather(piece=1, latency=0.05, stall_after=20), towards=Towards.CLIENT),
]
if sys.platform == "linux":
    FAULTS.append(Fault("no answer to a SYN", EXPIRED, Arrival.SILENCE))

each_fault = pytest.mark.parametrize("fault", FAULTS, ids=str)
# Those that differ in how the event loop hears of them.
FAULTS_BY_EVENT = {"refused", "reset", "stalled", "half-closed in the answer", "no answer to a SYN"}


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def pools_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("asyncpool")]


async def acquire(pool: Pool[Connection]) -> None:
    await pool.acquire(timeout=20)


async def assert_serves(pool: Pool[Connection]) -> None:
    async with pool.acquire(timeout=20) as conn:
        cursor = await conn.execute("select 'fine'")
        assert await cursor.fetchall() == [("fine",)]


# --- connecting ---------------------------------------------------------------------------------------------


@each_fault
async def test_acquire_ends_in_time_whatever_becomes_of_the_connects(
    proxy: Proxy, proxied_dsn: str, fault: Fault
) -> None:
    async with Pool(proxied_dsn, min_size=0, max_size=1, **SECONDS) as pool:
        fault.begin(proxy)
        with pytest.raises(PoolTimeout, match=fault.words) as raised, ends_within(ACQUIRE_TIMEOUT, f"acquire, {fault}"):
            await pool.acquire()
        assert isinstance(raised.value.__cause__, psycopg.OperationalError)
        proxy.clear()
        await assert_serves(pool)
        assert pool.stats().connects == 1


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in FAULTS_BY_EVENT], ids=str)
@on_uvloop
async def test_acquire_ends_in_time_on_uvloop(proxy: Proxy, proxied_dsn: str, fault: Fault) -> None:
    await test_acquire_ends_in_time_whatever_becomes_of_the_connects(proxy, proxied_dsn, fault)


@each_fault
async def test_open_ends_in_time_and_leaves_nothing(proxy: Proxy, proxied_dsn: str, fault: Fault) -> None:
    """After its timeout it closes what is half-open, for which the server has `check_timeout`."""
    fault.begin(proxy)
    pool = Pool(proxied_dsn, min_size=2, max_size=3, **SECONDS)
    before = descriptors()
    deadline = ACQUIRE_TIMEOUT + CHECK_TIMEOUT
    with pytest.raises(PoolTimeout, match=fault.words) as raised, ends_within(deadline, f"open, {fault}"):
        await pool.open()
    assert isinstance(raised.value.__cause__, psycopg.OperationalError)
    await eventually(lambda: (pool.stats().size, pools_tasks()) == (0, []))  # it waits for that, but not for ever
    # The proxy's own sockets are in this process too, and it closes those that both sides have left.
    await eventually(lambda: descriptors() - 2 * len(proxy.open_links) - len(proxy._ignored) <= before)
    proxy.clear()
    async with pool:
        await assert_serves(pool)


@each_fault
async def test_open_with_a_single_round_gives_the_error_itself(proxy: Proxy, proxied_dsn: str, fault: Fault) -> None:
    fault.begin(proxy)
    pool = Pool(proxied_dsn, min_size=2, max_size=3, **SECONDS)
    deadline = CONNECT_TIMEOUT + 2 * CHECK_TIMEOUT
    with pytest.raises(psycopg.OperationalError, match=fault.words), ends_within(deadline, f"open at once, {fault}"):
        await pool.open(timeout=0)
    await eventually(lambda: (pool.stats().size, pools_tasks()) == (0, []))


async def test_each_attempt_has_the_whole_connect_timeout(proxy: Proxy, proxied_dsn: str) -> None:
    proxy.receive(Arrival.IGNORE)
    options: dict[str, Any] = {**SECONDS, "connect_timeout": 0.3, "check_timeout": 0.1}
    async with Pool(proxied_dsn, min_size=0, max_size=1, **options) as pool:
        began = time.monotonic()
        waiting = asyncio.ensure_future(pool.acquire(timeout=20))
        await eventually(lambda: proxy.arrivals >= 3)
        assert time.monotonic() - began > 0.59
        proxy.clear()
        with ends_within(0.3 + 0.1, "connect_timeout, the third attempt"):
            conn = await waiting
        await pool.release(conn)


async def test_a_host_that_says_nothing_costs_its_own_connect_timeout(
    proxy: Proxy, proxied_dsn: str, application_name: str
) -> None:
    with Proxy(proxy.dsn) as dead:
        dead.receive(Arrival.IGNORE)
        dsn = make_conninfo(proxied_dsn, host="127.0.0.1,127.0.0.1", port=f"{dead.port},{proxy.port}")
        async with Pool(dsn, min_size=0, max_size=1, **altered(SECONDS, acquire_timeout=20)) as pool:
            with ends_within(CONNECT_TIMEOUT + 0.1, "acquire, the first of two hosts dead"):
                conn = await pool.acquire()
            await pool.release(conn)


@pytest.mark.parametrize("weather", [BYTE_BY_BYTE, Weather(latency=0.02), Weather(piece=7, latency=0.01)], ids=str)
@on_both_loops
async def test_a_bad_network_that_goes_on_is_no_fault(proxy: Proxy, proxied_dsn: str, weather: Weather) -> None:
    proxy.apply(weather)
    async with Pool(proxied_dsn, max_size=1, check_interval=0) as pool:
        for _ in range(2):
            async with pool.acquire() as conn, conn.pipeline():
                cursor = await conn.execute("select repeat('x', 1000) from generate_series(1, 5)")
                assert await cursor.fetchall() == [("x" * 1000,)] * 5
            async with (
                pool.acquire() as conn,
                conn.cursor().copy("copy (select generate_series(1, 9)) to stdout") as copy,
            ):
                assert [row async for row in copy.rows()] == [(str(i),) for i in range(1, 10)]
        assert (pool.stats().connects, pool.stats().closes) == (1, {})


# --- what lies idle, and comes back -------------------------------------------------------------------------


@pytest.mark.parametrize("max_size", [1, 2])
@pytest.mark.parametrize("deaf", [Towards.SERVER, Towards.CLIENT, None], ids=["to server", "to client", "both ways"])
@on_both_loops
async def test_a_stalled_idle_connection_is_replaced_when_it_does_not_answer(
    proxy: Proxy, proxied_dsn: str, max_size: int, deaf: Towards | None
) -> None:
    """After `check_timeout` for the ping; with one place, after another for the server to end the session."""
    async with Pool(proxied_dsn, min_size=1, max_size=max_size, **altered(PATIENT, check_interval=0)) as pool:
        proxy.links[0].apply(STALLED, deaf)
        with ends_within(CHECK_TIMEOUT * (2 if max_size == 1 else 1), f"check_timeout, max_size={max_size}"):
            await assert_serves(pool)
        assert pool.stats().closes == {CloseReason.CHECK_FAILED: 1}


async def test_check_ends_in_time_with_all_stalled(proxy: Proxy, proxied_dsn: str) -> None:
    async with Pool(proxied_dsn, min_size=4, max_size=4, **PATIENT) as pool:
        proxy.apply(STALLED)
        with ends_within(CHECK_TIMEOUT, "check_timeout, check() of four"):
            await pool.check()
        assert pool.stats().idle == 0
        proxy.clear()
        await eventually(lambda: pool.stats().idle == 4)


@pytest.mark.parametrize("reset", ["rollback", "session", "discard"])
async def test_a_connection_that_comes_back_over_a_stalled_socket_frees_its_place(
    proxy: Proxy, proxied_dsn: str, reset: Any
) -> None:
    """`check_timeout` for the clean-up, and another for the server to end the session."""
    async with Pool(proxied_dsn, min_size=0, max_size=1, reset=reset, **PATIENT) as pool:
        conn = await pool.acquire()
        await conn.execute("select 1")
        proxy.links[0].apply(STALLED)
        with ends_within(0, "release()"):
            await pool.release(conn)
        with ends_within(2 * CHECK_TIMEOUT, f"check_timeout, reset={reset}"):
            await assert_serves(pool)
        assert pool.stats().closes == {CloseReason.RESET_FAILED: 1}
        assert pool.stats().abandoned == 1


async def ask(conn: Connection) -> None:
    await conn.set_autocommit(True)
    await conn.execute("select 1")
    await conn.set_autocommit(False)


CALLABLES: dict[str, dict[str, Any]] = {
    "check": {"check": ask, "check_interval": 0},
    "reset": {"reset": ask},
}


@pytest.mark.parametrize("option", CALLABLES)
@pytest.mark.parametrize("max_size", [1, 2])
async def test_a_callable_that_hangs_on_a_stalled_socket_has_no_more_than_check_timeout(
    proxy: Proxy, proxied_dsn: str, option: str, max_size: int
) -> None:
    """With one place, its session has another for its end on the server."""
    options = altered(PATIENT, cancel_timeout=1.5, **CALLABLES[option])
    async with Pool(proxied_dsn, min_size=1, max_size=max_size, **options) as pool:
        if option == "reset":
            conn = await pool.acquire()
            await conn.execute("select 1")
            await conn.rollback()
            proxy.links[0].apply(STALLED)
            await pool.release(conn)
        else:
            proxy.links[0].apply(STALLED)
        with ends_within(CHECK_TIMEOUT * (2 if max_size == 1 else 1), f"check_timeout, {option}=, {max_size}"):
            await assert_serves(pool)
        await eventually(lambda: sum(pool.stats().closes.values()) == 1)


async def test_configure_on_a_stalled_socket_has_no_more_than_check_timeout(proxy: Proxy, proxied_dsn: str) -> None:
    async def configure(conn: Connection) -> None:
        proxy.links[0].apply(STALLED)
        await ask(conn)

    options = altered(PATIENT, cancel_timeout=1.5)
    async with Pool(proxied_dsn, min_size=0, max_size=1, configure=configure, **options) as pool:
        with ends_within(2 * CHECK_TIMEOUT, "check_timeout, configure="):  # and as long to be let go by the server
            await assert_serves(pool)
        assert pool.stats().connect_errors == 1


async def test_setup_on_a_stalled_socket_has_no_more_than_check_timeout(proxy: Proxy, proxied_dsn: str) -> None:
    async def setup(conn: Connection) -> None:
        proxy.links[0].apply(STALLED)
        await ask(conn)

    options = altered(PATIENT, cancel_timeout=1.5)
    async with Pool(proxied_dsn, min_size=1, max_size=1, setup=setup, **options) as pool:
        late = pytest.raises(psycopg.OperationalError, match="setup did not end in time")
        with late, ends_within(CHECK_TIMEOUT, "check_timeout, setup="):
            await pool.acquire()
        assert pool.stats().leased == 0


async def test_close_waits_for_no_callable_that_hangs_on_a_stalled_socket(proxy: Proxy, proxied_dsn: str) -> None:
    options = altered(PATIENT, check_timeout=1, cancel_timeout=10)
    async with Pool(proxied_dsn, min_size=2, max_size=2, check=ask, **options) as pool:
        proxy.apply(STALLED)
        before = sum(link.received(Towards.SERVER) for link in proxy.links)
        checking = asyncio.ensure_future(pool.check())
        await eventually(lambda: sum(link.received(Towards.SERVER) for link in proxy.links) > before)
        assert pool.stats().checking == 2
        with ends_within(1, "check_timeout, close() in the midst of check="):
            await pool.close()
        await checking


FORGOTTEN: dict[str, Callable[[Connection], Any]] = {
    "commit": lambda conn: conn.commit(),
    "statement": lambda conn: conn.execute("select 1"),
}


@pytest.mark.parametrize("what", FORGOTTEN)
async def test_others_are_served_while_one_hangs_on_a_stalled_socket(proxy: Proxy, proxied_dsn: str, what: str) -> None:
    """Nothing limits a statement but a cancellation; but nobody else waits for it."""
    async with Pool(proxied_dsn, min_size=0, max_size=2, **PATIENT) as pool:
        conn = await pool.acquire()
        await conn.execute("select 1")
        proxy.links[0].apply(STALLED)
        hanging = asyncio.ensure_future(FORGOTTEN[what](conn))
        for _ in range(5):
            await assert_serves(pool)
        assert not hanging.done()
        hanging.cancel()
        with ends_within(CHECK_TIMEOUT, f"cancel_timeout, {what}"):
            await asyncio.wait([hanging])
        await pool.release(conn)


# --- close --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrival", [Arrival.PASS, Arrival.IGNORE], ids=lambda arrival: arrival.name)
@pytest.mark.parametrize("timeout", [0, 0.2])
@on_both_loops
async def test_close_ends_in_time_with_every_socket_stalled(
    proxy: Proxy, proxied_dsn: str, timeout: float, arrival: Arrival
) -> None:
    """Some leased and not used, one in a transaction, one in a statement, one being reset, one connecting."""
    check_timeout = 1.0  # long enough for the reset to go on when the rest has begun
    options = altered(PATIENT, connect_timeout=10, check_timeout=check_timeout)
    async with Pool(proxied_dsn, min_size=0, max_size=6, **options) as pool:
        conns = [await pool.acquire() for _ in range(5)]
        await conns[0].execute("select 1")
        await conns[1].execute("select 1")
        proxy.apply(STALLED)
        proxy.receive(arrival)
        statement = asyncio.ensure_future(conns[2].execute("select 1"))
        await pool.release(conns[3])
        await pool.release(conns[1])
        callers = [asyncio.ensure_future(acquire(pool)) for _ in range(3)]
        await eventually(lambda: pool.stats().connecting == 1)
        assert (pool.stats().leased, pool.stats().recycling) == (4, 1)
        with ends_within(timeout + check_timeout, f"close(timeout={timeout}), {arrival.name}"):
            await pool.close(timeout=timeout)
        assert (pool.stats().size, pools_tasks()) == (0, [])
        with pytest.raises(psycopg.OperationalError):
            await statement
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [PoolClosed, PoolClosed]


async def test_the_server_ends_what_close_left_when_the_network_is_back(
    proxy: Proxy, proxied_dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(proxied_dsn, min_size=3, max_size=3, **PATIENT) as pool:
        proxy.apply(STALLED)
        with ends_within(CHECK_TIMEOUT, "close, three idle and stalled"):
            await pool.close()
        assert pool.stats().abandoned == 3
        assert admin.sessions(application_name) == 3
    proxy.clear()
    await eventually(lambda: admin.sessions(application_name) == 0)


# --- in the midst of a statement ------------------------------------------------------------------------------


BREAKS: dict[str, tuple[Callable[[Proxy], None], str]] = {
    "reset": (lambda proxy: proxy.links[-1].reset(), RESET),
    "half-closed": (lambda proxy: proxy.links[-1].half_close(Towards.CLIENT), CLOSED),
    "half-closed to the server": (lambda proxy: proxy.links[-1].half_close(Towards.SERVER), CLOSED),
    "garbage": (
        lambda proxy: proxy.links[-1].apply(GARBAGE, Towards.CLIENT),
        r"lost synchronization|unexpected|invalid",
    ),
    "garbage after 40 bytes": (
        lambda proxy: proxy.links[-1].apply(Weather(garble_after=40), Towards.CLIENT),
        r"lost synchronization|unexpected|invalid|insufficient",
    ),
    "reset after 40 bytes": (lambda proxy: proxy.links[-1].apply(Weather(reset_after=40), Towards.CLIENT), RESET),
    "half-closed after 40 bytes": (
        lambda proxy: proxy.links[-1].apply(Weather(close_after=40), Towards.CLIENT),
        CLOSED,
    ),
    "garbage slipped in": (
        lambda proxy: proxy.links[-1].send(b"HTTP/1.1 400 Bad Request\r\n\r\n", Towards.CLIENT),
        r"lost synchronization|unexpected|invalid|message",
    ),
}


async def execute(conn: Connection) -> None:
    await conn.execute("select repeat('x', 1000), pg_sleep(0.02)")


async def read_stream(conn: Connection) -> None:
    async for _ in conn.cursor().stream("select repeat('x', 1000) from generate_series(1, 5)"):
        pass


async def copy_out(conn: Connection) -> None:
    async with conn.cursor().copy("copy (select repeat('x', 1000) from generate_series(1, 5)) to stdout") as copy:
        async for _ in copy:
            pass


async def pipeline(conn: Connection) -> None:
    async with conn.pipeline():
        cursor = await conn.execute("select repeat('x', 1000)")
        await cursor.fetchall()


EXCHANGES: list[Callable[[Connection], Any]] = [execute, read_stream, copy_out, pipeline]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("how", BREAKS)
async def test_what_breaks_in_the_midst_of_a_statement_is_told_clearly_and_replaced(
    proxy: Proxy, proxied_dsn: str, how: str, exchange: Callable[[Connection], Any]
) -> None:
    break_it, words = BREAKS[how]
    async with Pool(proxied_dsn, min_size=0, max_size=1, autocommit=True, **PATIENT) as pool:
        with pytest.raises(psycopg.Error) as raised, ends_within(0, f"error of what is {how}"):
            async with pool.acquire() as conn:
                break_it(proxy)
                async with asyncio.timeout(20):
                    await exchange(conn)
        if exchange is copy_out and "garbage" in how:
            words += (
                "|COPY cannot be mixed"  # psycopg's, of the several errors in which libpq ends a COPY that was none
            )
        assert re.search(words, str(raised.value)), raised.value
        proxy.clear()
        await assert_serves(pool)
        assert pool.stats().connects == 2


@pytest.mark.parametrize("how", BREAKS)
@on_uvloop
async def test_what_breaks_is_told_and_replaced_on_uvloop(proxy: Proxy, proxied_dsn: str, how: str) -> None:
    await test_what_breaks_in_the_midst_of_a_statement_is_told_clearly_and_replaced(proxy, proxied_dsn, how, execute)


@pytest.mark.parametrize("way", ["open(timeout=)", "a cancelled open()", "close()"])
async def test_nobody_waits_for_the_end_of_a_connect_that_the_server_has_never_answered(way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ends_within(1.0, f"silent, {way}"):
        port = silent.getsockname()[1]
        pool = Pool(f"host=127.0.0.1 port={port}", connect_timeout=30, check_timeout=30)
        if way == "open(timeout=)":
            with pytest.raises(PoolTimeout):
                await pool.open(timeout=0.5)
        elif way == "a cancelled open()":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await pool.open()
        else:
            await pool.open(wait=False)
            await asyncio.sleep(0)
            await pool.close()
