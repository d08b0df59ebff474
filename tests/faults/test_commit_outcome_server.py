"""The server process dies around a COMMIT: what the pool says of it afterwards is never wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually, eventually_blocking
from psycopg import errors
from psycopg.conninfo import make_conninfo

from asyncpool import CommitOutcomeUnknown, CommitStatus, Pool, SyncPool
from asyncpool._io.watch import peer_has_closed

from .commit_cutter import EVERYTHING, Cut, Cutter
from .commits import blocking_tracked, insertion, learn, tracked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kit.servers import Admin

    from asyncpool.cli.embedded import EmbeddedServer

    Death = Callable[[EmbeddedServer, int], object]


def kill_backend(server: EmbeddedServer, pid: int) -> None:
    """SIGKILL: the server ends all its sessions, and recovers from its log."""
    with psycopg.connect(server.dsn()) as other:
        os.kill(pid, signal.SIGKILL)
        eventually_blocking(lambda: peer_has_closed(other.pgconn.socket), timeout=30)


def restart_immediately(server: EmbeddedServer, pid: int) -> None:
    server.stop("immediate")
    server.start()


def kill_server(server: EmbeddedServer, pid: int) -> None:
    server.stop("kill")
    server.start()


def restart_fast(server: EmbeddedServer, pid: int) -> None:
    """Ends the sessions with a FATAL, and writes everything down."""
    server.stop("fast")
    server.start()


SLEEP = "$$ begin perform pg_sleep(60); return null; end $$"
CRASHES = [kill_backend, restart_immediately, kill_server]
each_crash = pytest.mark.parametrize("die", CRASHES, ids=lambda die: die.__name__)


@pytest.fixture
def crash_admin(private_admin: Admin) -> Admin:
    return private_admin


@pytest.fixture
def crash_table(crash_admin: Admin, application_name: str) -> Iterator[str]:
    """A table whose COMMITs take 60 s while its trigger is enabled; on the disk before the test begins."""
    name = application_name.replace("-", "_")
    for statement in (
        f"drop table if exists {name}",
        f"create table {name} (id integer)",
        f"create or replace function sleep() returns trigger language plpgsql as {SLEEP}",
        f"create constraint trigger s after insert on {name} initially deferred for each row execute function sleep()",
        "checkpoint",
    ):
        crash_admin.execute(statement)
    yield name
    patiently(crash_admin, f"drop table {name}")


def patiently(admin: Admin, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement when the server is up again."""

    def attempt() -> list[list[tuple[Any, ...]]]:
        try:
            return [admin.execute(statement)]
        except psycopg.OperationalError:
            return []

    [rows] = eventually_blocking(attempt, timeout=30)
    return rows


def sleepers(admin: Admin) -> list[int]:
    """The backends that are in the midst of a COMMIT."""
    found = admin.execute("select pid from pg_stat_activity where wait_event = 'PgSleep' and query = 'COMMIT'")
    return [pid for (pid,) in found]


@each_crash
async def test_a_crash_in_the_midst_of_a_commit_leaves_it_unknown_and_it_is_aborted(
    private_server: EmbeddedServer, private_dsn: str, crash_admin: Admin, crash_table: str, die: Death
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](private_dsn, backoff_max=0.2) as pool:
        task = asyncio.create_task(learn(pool, lambda: tracked(pool, crash_table)))
        pids = await eventually(lambda: sleepers(crash_admin), timeout=20)
        await asyncio.to_thread(die, private_server, pids[0])
        learned = await task
        assert learned.is_unknown, learned.error
        assert learned.status is CommitStatus.ABORTED
    assert patiently(crash_admin, f"select count(*) from {crash_table}") == [(0,)]


@each_crash
async def test_an_id_that_a_crash_has_lost_and_another_transaction_got_is_not_called_committed(
    private_server: EmbeddedServer, private_dsn: str, crash_admin: Admin, crash_table: str, die: Death
) -> None:
    """Nothing of the transaction has reached the disk: the server gives its id to the next one, which commits."""
    async with Pool[psycopg.AsyncConnection[Any]](private_dsn, backoff_max=0.2) as pool:
        task = asyncio.create_task(tracked(pool, crash_table))
        pids = await eventually(lambda: sleepers(crash_admin), timeout=20)
        await asyncio.to_thread(die, private_server, pids[0])
        with pytest.raises(CommitOutcomeUnknown) as caught:
            await task
        patiently(crash_admin, f"alter table {crash_table} disable trigger s")
        xid = caught.value.xid
        for _ in range(3):
            patiently(crash_admin, f"insert into {crash_table} values (2)")
        # What the server says of the id alone is of another transaction: that it does so makes this test worth while.
        assert crash_admin.value(f"select pg_xact_status('{xid}'::xid8)") in {"committed", "aborted"}
        status = await pool.commit_status(caught.value, timeout=30)
        assert status in {CommitStatus.UNKNOWN, CommitStatus.ABORTED}
    assert patiently(crash_admin, f"select 1 from {crash_table} where id = 1") == []


@each_crash
async def test_a_crash_after_the_commit_and_before_its_answer_is_heard_leaves_it_unknown(
    private_server: EmbeddedServer, application_name: str, crash_admin: Admin, crash_table: str, die: Death
) -> None:
    crash_admin.execute(f"alter table {crash_table} disable trigger s")
    with Cutter(private_server.port) as cutter:
        dsn = make_conninfo(host="127.0.0.1", port=cutter.port, user="postgres", dbname="postgres")
        async with Pool[psycopg.AsyncConnection[Any]](dsn, name=application_name, backoff_max=0.2) as pool:
            async with pool.acquire() as conn:
                pid = conn.info.backend_pid
            cutter.arm(Cut(answer=0, before_end=lambda: die(private_server, pid)))
            learned = await learn(pool, lambda: tracked(pool, crash_table))
            assert learned.is_unknown
            assert learned.status is CommitStatus.UNKNOWN  # it cannot be told from a later transaction's
    assert patiently(crash_admin, f"select count(*) from {crash_table}") == [(1,)]


async def test_a_clean_restart_before_the_answer_is_heard_does_not_hide_that_it_is_committed(
    private_server: EmbeddedServer, application_name: str, crash_admin: Admin, crash_table: str
) -> None:
    crash_admin.execute(f"alter table {crash_table} disable trigger s")
    with Cutter(private_server.port) as cutter:
        dsn = make_conninfo(host="127.0.0.1", port=cutter.port, user="postgres", dbname="postgres")
        async with Pool[psycopg.AsyncConnection[Any]](dsn, name=application_name, backoff_max=0.2) as pool:
            cutter.arm(Cut(answer=0, before_end=lambda: restart_fast(private_server, 0)))
            learned = await learn(pool, lambda: tracked(pool, crash_table))
            assert learned.status is CommitStatus.COMMITTED
            cutter.arm(Cut(answer=EVERYTHING, before_end=lambda: restart_fast(private_server, 0)))
            assert (await learn(pool, lambda: tracked(pool, crash_table))).error is None
    assert patiently(crash_admin, f"select count(*) from {crash_table}") == [(2,)]


async def test_a_server_that_is_stopped_in_the_midst_of_a_commit_says_that_it_is_not_committed(
    private_server: EmbeddedServer, private_dsn: str, crash_admin: Admin, crash_table: str
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](private_dsn, backoff_max=0.2) as pool:
        task = asyncio.create_task(tracked(pool, crash_table))
        await eventually(lambda: sleepers(crash_admin), timeout=20)
        await asyncio.to_thread(restart_fast, private_server, 0)
        with pytest.raises(errors.AdminShutdown):
            await task
    assert patiently(crash_admin, f"select count(*) from {crash_table}") == [(0,)]


@each_crash
async def test_a_crash_before_the_commit_is_no_unknown_outcome(
    private_server: EmbeddedServer, private_dsn: str, crash_admin: Admin, crash_table: str, die: Death
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](private_dsn, backoff_max=0.2) as pool:
        with pytest.raises(psycopg.OperationalError) as caught:
            async with pool.acquire() as conn:
                await conn.execute(insertion(crash_table))
                pid = conn.info.backend_pid
                await asyncio.to_thread(die, private_server, pid)
                await eventually(lambda: not is_alive(pid), timeout=20)
        assert not isinstance(caught.value, CommitOutcomeUnknown)
    assert patiently(crash_admin, f"select count(*) from {crash_table}") == [(0,)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@each_crash
def test_in_threads_too_a_crash_in_the_midst_of_a_commit_is_unknown_and_aborted(
    private_server: EmbeddedServer, private_dsn: str, crash_admin: Admin, crash_table: str, die: Death
) -> None:
    with SyncPool[psycopg.Connection[Any]](private_dsn, backoff_max=0.2) as pool:
        caught: list[psycopg.Error] = []

        def work() -> None:
            try:
                blocking_tracked(pool, crash_table)
            except psycopg.Error as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        [pid] = eventually_blocking(lambda: sleepers(crash_admin), timeout=20)
        die(private_server, pid)
        thread.join(30)
        [error] = caught
        assert isinstance(error, CommitOutcomeUnknown), error

        def status() -> CommitStatus | None:
            assert isinstance(error, CommitOutcomeUnknown)
            answer = pool.commit_status(error, timeout=30)
            return None if answer is CommitStatus.IN_PROGRESS else answer

        assert eventually_blocking(status, timeout=30) is CommitStatus.ABORTED
    assert patiently(crash_admin, f"select count(*) from {crash_table}") == [(0,)]
