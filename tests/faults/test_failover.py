"""A primary and a standby that takes over: who asked for a server that takes writes gets such a one, and soon."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.servers import Admin
from kit.waiting import eventually, eventually_blocking

from asyncpool import CloseReason, Pool, PoolTimeout, SyncPool
from asyncpool._core.policy import ConnectFailure
from asyncpool._io.connect_errors import ConnectFailed
from asyncpool._io.driver import Driver
from asyncpool.cli.embedded import EmbeddedServer
from asyncpool.config import PoolConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import AsyncConnection

    AnyPool = Pool[AsyncConnection[Any]]

# A tenfold margin over the second in which it should be done.
SOON = 10.0


@pytest.fixture(autouse=True)
def in_every_test(no_bug_reported: None) -> None:
    """Errors in the log fail the test."""


@contextmanager
def primary_and_standby() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    with (
        EmbeddedServer(host_authentication="trust") as primary,
        EmbeddedServer(host_authentication="trust", standby_of=primary.dsn()) as standby,
    ):
        yield primary, standby


@pytest.fixture
def pair() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """Made anew for each test, as it is another pair afterwards."""
    with primary_and_standby() as pair:
        yield pair


@pytest.fixture(scope="module")
def lasting_pair() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """For tests that leave it as it is."""
    with primary_and_standby() as pair:
        yield pair


def both(*servers: EmbeddedServer, attrs: str = "read-write") -> str:
    ports = ",".join(str(server.port) for server in servers)
    hosts = ",".join("127.0.0.1" for _ in servers)
    return (
        f"host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs={attrs}"
        " application_name=asyncpool-failover"
    )


def promote(standby: EmbeddedServer) -> None:
    with psycopg.connect(standby.dsn(), autocommit=True) as conn:
        conn.execute("select pg_promote()")


def set_read_only(server: EmbeddedServer, value: str) -> None:
    """For all sessions, from their next round trip on."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(f"alter system set default_transaction_read_only = {value}".encode())
        conn.execute("select pg_reload_conf()")
    # The postmaster lets nobody in before it has signalled all sessions: who is in with the new value came after that.
    eventually_blocking(lambda: default_of_a_new_session(server) == value)


def default_of_a_new_session(server: EmbeddedServer) -> str:
    with psycopg.connect(server.dsn()) as conn:
        row: Any = conn.execute("show default_transaction_read_only").fetchone()
        return str(row[0])


async def write(pool: AnyPool) -> int:
    """A write, and the port of the server that took it."""
    async with pool.acquire() as conn:
        await conn.execute("create temp table written (n int) on commit drop")
        return conn.info.port


# --- the standby takes over ---------------------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("order", ["primary first", "standby first"])
async def test_writes_go_on_soon_after_the_promotion(pair: tuple[EmbeddedServer, EmbeddedServer], order: str) -> None:
    primary, standby = pair
    servers = pair if order == "primary first" else (standby, primary)
    async with Pool(both(*servers), min_size=3, max_size=5, acquire_timeout=SOON) as pool:
        assert {await write(pool) for _ in range(5)} == {primary.port}
        await asyncio.to_thread(primary.stop, "fast")
        await eventually(lambda: pool.stats().connect_errors > 0)
        with pytest.raises(PoolTimeout, match=r"Connection refused|is read-only|starting up"):
            await pool.acquire(timeout=0.5)
        await asyncio.to_thread(promote, standby)
        began = time.monotonic()
        assert await write(pool) == standby.port
        assert time.monotonic() - began < SOON
        await eventually(lambda: pool.stats().idle >= 3)
        assert {await write(pool) for _ in range(5)} == {standby.port}


def test_threads_write_again_soon_after_the_promotion(pair: tuple[EmbeddedServer, EmbeddedServer]) -> None:
    primary, standby = pair
    with SyncPool(both(*pair), min_size=2, max_size=3, acquire_timeout=SOON) as pool:
        with pool.acquire() as conn:
            assert conn.info.port == primary.port
        primary.stop("immediate")
        promote(standby)
        with pool.acquire() as conn:
            conn.execute("create temp table written (n int) on commit drop")
            assert conn.info.port == standby.port


@pytest.mark.parametrize("attrs", ["read-write", "primary"])
async def test_a_standby_may_be_promoted_at_any_moment_and_so_is_tried_like_a_server_that_starts(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer], attrs: str
) -> None:
    _, standby = lasting_pair
    with pytest.raises(ConnectFailed) as failed:
        await Driver(PoolConfig(), both(standby, attrs=attrs), {}).connect()
    assert failed.value.failure is ConnectFailure.REFUSED


# --- the server under the pool becomes read-only ------------------------------------------------------------


async def lease_some(pool: AnyPool, count: int) -> None:
    """So many connections at once, used and given back."""
    conns = [await pool.acquire() for _ in range(count)]
    for conn in conns:
        await conn.execute("select 1")
        await conn.rollback()
        await pool.release(conn)


async def assert_nobody_is_let_write(pool: AnyPool) -> None:
    """The pool connects in vain, and has no connection left that it gives to anybody."""
    await eventually(lambda: pool.stats().connect_errors > 0)
    with pytest.raises(PoolTimeout, match="session is read-only"):
        await pool.acquire(timeout=0.5)


@pytest.mark.parametrize("attrs", ["read-write", "any"])
async def test_a_server_that_becomes_read_only_serves_only_pools_that_did_not_ask_for_writes(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer], attrs: str
) -> None:
    primary, _ = lasting_pair
    async with Pool(both(primary, attrs=attrs), min_size=3, max_size=3, name="asked") as pool:
        await lease_some(pool, 3)
        set_read_only(primary, "on")
        try:
            async with pool.acquire() as conn:  # the last one that anybody gets: it is the first to hear of it
                await conn.execute("select 1")
            if attrs == "any":
                await lease_some(pool, 3)
                assert not pool.stats().closes
                return
            await assert_nobody_is_let_write(pool)
            await eventually(lambda: pool.stats().closes[CloseReason.READ_ONLY] == 3)
            assert pool.stats().size <= 1
        finally:
            set_read_only(primary, "off")
        assert await write(pool) == primary.port


async def test_a_lease_that_is_rolled_back_on_a_server_that_became_read_only_is_its_connections_last(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    primary, _ = lasting_pair
    async with Pool(both(primary), min_size=1, max_size=1) as pool:
        conn = await pool.acquire()
        await conn.execute("select 1")
        set_read_only(primary, "on")
        try:
            await pool.release(conn)
            await eventually(lambda: CloseReason.READ_ONLY in pool.stats().closes)
        finally:
            set_read_only(primary, "off")
        assert await write(pool) == primary.port


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_refused_write_has_the_others_asked_and_its_own_connection_too(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer], monkeypatch: pytest.MonkeyPatch, autocommit: bool
) -> None:
    """Through a pooler, or from a server before version 14, the error is all that is heard."""
    primary, _ = lasting_pair
    monkeypatch.setattr("asyncpool._io.role.Role.is_lost", lambda self, pgconn: False)
    async with Pool(both(primary), min_size=3, max_size=3, autocommit=autocommit) as pool:
        await lease_some(pool, 3)
        set_read_only(primary, "on")
        try:
            conn = await pool.acquire()
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await conn.execute("create table never (n int)")
            await pool.release(conn)
            await eventually(lambda: CloseReason.READ_ONLY in pool.stats().closes)  # a round trip later
            await assert_nobody_is_let_write(pool)
            await eventually(lambda: pool.stats().closes[CloseReason.READ_ONLY] == 3)
        finally:
            set_read_only(primary, "off")


def test_a_thread_whose_write_is_refused_is_the_last_one(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    primary, _ = lasting_pair
    with SyncPool(both(primary), min_size=2, max_size=2) as pool:
        first, second = pool.getconn(), pool.getconn()
        pool.putconn(first)
        pool.putconn(second)
        set_read_only(primary, "on")
        try:
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), pool.acquire() as conn:
                conn.execute("create temp table written (n int)")
            eventually_blocking(lambda: CloseReason.READ_ONLY in pool.stats().closes)  # a round trip later
            eventually_blocking(lambda: pool.stats().connect_errors > 0)
            with pytest.raises(PoolTimeout, match="session is read-only"):
                pool.getconn(timeout=0.5)
            eventually_blocking(lambda: pool.stats().closes[CloseReason.READ_ONLY] == 2)
        finally:
            set_read_only(primary, "off")


@pytest.mark.parametrize("reset", ["rollback", "session"])
async def test_a_users_own_read_only_transaction_costs_no_connection(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer], reset: Literal["rollback", "session"]
) -> None:
    primary, _ = lasting_pair
    async with Pool(both(primary), min_size=2, max_size=2, reset=reset) as pool:
        for _ in range(3):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                async with pool.acquire() as conn:
                    await conn.execute("set transaction read only")
                    await conn.execute("create table never (n int)")
        assert await write(pool) == primary.port
        assert not pool.stats().closes


@pytest.mark.parametrize(("reset", "closed"), [("rollback", 1), ("session", 0)])
async def test_a_users_own_setting_costs_its_connection_if_nothing_resets_it(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer], reset: Literal["rollback", "session"], closed: int
) -> None:
    primary, _ = lasting_pair
    async with Pool(both(primary), min_size=2, max_size=2, reset=reset) as pool:
        await lease_some(pool, 2)
        async with pool.acquire() as conn:
            await conn.execute("set default_transaction_read_only = on")
        for _ in range(4):
            assert await write(pool) == primary.port
        assert pool.stats().closes.get(CloseReason.READ_ONLY, 0) == closed
        assert sum(pool.stats().closes.values()) == closed


async def test_a_ping_finds_the_server_read_only(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncpool")
    primary, _ = lasting_pair
    async with Pool(both(primary), min_size=2, max_size=2) as pool:
        set_read_only(primary, "on")
        try:
            await pool.check()
            assert pool.stats().closes[CloseReason.READ_ONLY] == 2
            assert "has become read-only" in caplog.text
        finally:
            set_read_only(primary, "off")
        assert await write(pool) == primary.port


async def test_a_check_of_the_users_own_does_not_hide_it(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    async def check(conn: AsyncConnection[Any]) -> None:
        await conn.execute("select 1")
        await conn.rollback()

    primary, _ = lasting_pair
    async with Pool(both(primary), min_size=1, max_size=1, check=check) as pool:
        set_read_only(primary, "on")
        try:
            await pool.check()
            assert pool.stats().closes[CloseReason.READ_ONLY] == 1
        finally:
            set_read_only(primary, "off")


async def test_a_pool_that_asked_for_the_primary_takes_one_that_is_set_read_only(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    """As libpq does."""
    primary, standby = lasting_pair
    async with Pool(both(standby, primary, attrs="primary"), min_size=1, max_size=1) as pool:
        set_read_only(primary, "on")
        try:
            await pool.check()
            async with pool.acquire() as conn:
                assert conn.info.port == primary.port
                await conn.execute("select 1")
            assert not pool.stats().closes
        finally:
            set_read_only(primary, "off")


# --- which host is tried ------------------------------------------------------------------------------------


@contextmanager
def dead_host() -> Iterator[int]:
    """The port of a host that never answers: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = []
        try:
            for _ in range(8):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
                fillers.append(filler)
            yield port
        finally:
            for filler in fillers:
                filler.close()


async def test_a_dead_host_costs_its_own_connect_timeout_and_only_once(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    primary, _ = lasting_pair
    with dead_host() as port:
        conninfo = f"host=127.0.0.1,127.0.0.1 port={port},{primary.port} user=postgres dbname=postgres"
        began = time.monotonic()
        async with Pool(conninfo, min_size=1, max_size=8, connect_timeout=1.0) as pool:
            first = time.monotonic() - began
            assert 1.0 <= first < 1.0 + SOON
            conns = [await pool.acquire(timeout=0.9) for _ in range(8)]  # the last good host is tried first
            for conn in conns:
                await pool.release(conn)


async def test_when_the_last_good_host_is_gone_the_others_are_tried_in_their_order(
    pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    primary, standby = pair
    async with Pool(both(primary, standby, attrs="any"), min_size=1, max_size=1) as pool:
        async with pool.acquire() as conn:
            assert conn.info.port == primary.port
        await asyncio.to_thread(primary.stop)
        async with pool.acquire() as conn:
            assert conn.info.port == standby.port
        await asyncio.to_thread(primary.start)
        pool.drain()
        async with pool.acquire() as conn:
            assert conn.info.port == standby.port


async def test_load_balancing_goes_on_after_a_success(
    lasting_pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    primary, standby = lasting_pair
    async with Pool(both(primary, standby, attrs="any"), load_balance_hosts="random", min_size=0, max_size=30) as pool:
        conns = [await pool.acquire() for _ in range(30)]
        assert {conn.info.port for conn in conns} == {primary.port, standby.port}  # else once in 500 million runs
        for conn in conns:
            await pool.release(conn)


async def test_prefer_standby_still_prefers_it_after_the_primary_has_served(
    pair: tuple[EmbeddedServer, EmbeddedServer],
) -> None:
    primary, standby = pair
    await asyncio.to_thread(standby.stop)
    async with Pool(both(primary, standby, attrs="prefer-standby"), min_size=1, max_size=1) as pool:
        async with pool.acquire() as conn:
            assert conn.info.port == primary.port
        await asyncio.to_thread(standby.start)
        pool.drain()
        async with pool.acquire() as conn:
            assert conn.info.port == standby.port
    with closing(Admin(primary.dsn())) as admin:
        await eventually(lambda: admin.sessions("asyncpool-failover") == 0)
