"""The connection is cut at every point of a COMMIT: what its user is told is what is in the table."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from typing import TYPE_CHECKING, Any, cast

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.servers import Admin
from kit.waiting import eventually, eventually_blocking
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from asyncpool import CommitOutcomeUnknown, CommitStatus, Pool, PoolError, SyncPool
from asyncpool._io.watch import peer_has_closed
from asyncpool.cli.embedded import EmbeddedServer
from asyncpool.psycopg2.pool import ThreadedConnectionPool

from .commit_cutter import COMMAND_COMPLETE, EVERYTHING, READY_FOR_QUERY, REQUEST, Cut, Cutter, error_response
from .commits import (
    BLOCKING_WAYS,
    DROP_IN_WAYS,
    WAYS,
    AnyPool,
    AnySyncPool,
    blocking_tracked,
    by_hand,
    insertion,
    learn,
    tracked,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

NOT_SEEN = [Cut(request) for request in (0, 1, 5, len(REQUEST) - 1)]
SEEN = [Cut(answer=0), Cut(answer=1), Cut(answer=len(COMMAND_COMPLETE) - 1)]
ANSWERED = [Cut(answer=len(COMMAND_COMPLETE)), Cut(answer=len(COMMAND_COMPLETE) + 3), Cut(answer=EVERYTHING)]
AT_ONCE = Cut()  # the server may notice before it has committed
POOLER_ENDS = {
    "a pooler's FATAL": error_response("FATAL", "08P01", "server conn crashed?"),
    "a pooler's shutdown": error_response("FATAL", "57P01", "terminating connection due to administrator command"),
    "a pooler's ERROR": error_response("ERROR", "08P01", "server conn crashed?"),
    "a PANIC": error_response("PANIC", "53100", "could not write to file"),
}

each_unknown_cut = pytest.mark.parametrize("cut", [*NOT_SEEN, *SEEN, AT_ONCE], ids=str)
each_answered_cut = pytest.mark.parametrize("cut", ANSWERED, ids=str)
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
each_blocking_way = pytest.mark.parametrize("way", BLOCKING_WAYS, ids=lambda way: way.__name__)
each_drop_in_way = pytest.mark.parametrize("way", DROP_IN_WAYS, ids=lambda way: way.__name__)


@pytest.fixture(scope="module")
def commit_server() -> Iterator[EmbeddedServer]:
    settings: dict[str, str | int] = {"max_prepared_transactions": 4}
    with EmbeddedServer(settings=settings, host_authentication="trust") as embedded:
        yield embedded


@pytest.fixture
def cutter(commit_server: EmbeddedServer) -> Iterator[Cutter]:
    with Cutter(commit_server.port) as cutter:
        yield cutter


@pytest.fixture
def admin(commit_server: EmbeddedServer) -> Iterator[Admin]:
    admin = Admin(commit_server.dsn())
    yield admin
    admin.close()


@pytest.fixture
def dsn(cutter: Cutter, application_name: str) -> str:
    return make_conninfo(
        host="127.0.0.1", port=cutter.port, user="postgres", dbname="postgres", application_name=application_name
    )


def is_written(admin: Admin, table: str) -> bool:
    return bool(admin.value(f"select count(*) from {table}"))


def assert_status_is_true(status: CommitStatus | None, way: object, written: bool) -> None:
    """Without tracking it is unknown; with it, what the table says."""
    if way not in (tracked, blocking_tracked):
        assert status is CommitStatus.UNKNOWN
    else:
        assert status is (CommitStatus.COMMITTED if written else CommitStatus.ABORTED)


# --- the cuts -----------------------------------------------------------------------------------------------


@on_both_loops
@each_unknown_cut
@each_way
async def test_a_commit_that_is_cut_before_its_answer_is_unknown_and_the_server_knows(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cut: Cut, way: Callable[[AnyPool, str], Awaitable[None]]
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        cutter.arm(cut)
        learned = await learn(pool, lambda: way(pool, table))
        assert cutter.cuts == 1
        assert isinstance(learned.error, CommitOutcomeUnknown)
        assert isinstance(learned.error.__cause__, psycopg.OperationalError)
        await eventually(lambda: not admin.execute("select 1 from pg_stat_activity where pid = %s", [pid]), timeout=20)
        written = is_written(admin, table)
        if cut is not AT_ONCE:
            assert written is (cut in SEEN)
        assert_status_is_true(learned.status, way, written)
        assert pool.stats().leased == 0


@each_answered_cut
@each_way
async def test_a_commit_that_was_answered_is_committed_whatever_follows(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cut: Cut, way: Callable[[AnyPool, str], Awaitable[None]]
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(cut)
        await way(pool, table)
        assert cutter.cuts == 1
        assert is_written(admin, table)
        assert pool.stats().leased == 0


@each_unknown_cut
@each_blocking_way
def test_in_threads_too_a_commit_that_is_cut_is_unknown_and_the_server_knows(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cut: Cut, way: Callable[[AnySyncPool, str], None]
) -> None:
    with SyncPool[psycopg.Connection[Any]](dsn) as pool:
        with pool.acquire() as conn:
            pid = conn.info.backend_pid
        cutter.arm(cut)
        with pytest.raises(CommitOutcomeUnknown) as caught:
            way(pool, table)
        assert cutter.cuts == 1
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        eventually_blocking(
            lambda: not admin.execute("select 1 from pg_stat_activity where pid = %s", [pid]), timeout=20
        )
        written = is_written(admin, table)
        if cut is not AT_ONCE:
            assert written is (cut in SEEN)
        assert_status_is_true(pool.commit_status(caught.value, timeout=30), way, written)
        assert pool.stats().leased == 0


@each_answered_cut
@each_blocking_way
def test_in_threads_too_a_commit_that_was_answered_is_committed(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cut: Cut, way: Callable[[AnySyncPool, str], None]
) -> None:
    with SyncPool[psycopg.Connection[Any]](dsn) as pool:
        cutter.arm(cut)
        way(pool, table)
        assert cutter.cuts == 1
        assert is_written(admin, table)
        assert pool.stats().leased == 0


@pytest.mark.parametrize("cut", [NOT_SEEN[0], SEEN[0], ANSWERED[0]], ids=str)
@each_drop_in_way
def test_the_drop_in_for_psycopg2_says_the_same(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cut: Cut, way: Callable[[ThreadedConnectionPool, str], None]
) -> None:
    pool = ThreadedConnectionPool(1, 2, dsn)
    try:
        cutter.arm(cut)
        if cut in ANSWERED:
            way(pool, table)
        else:
            with pytest.raises(CommitOutcomeUnknown):
                way(pool, table)
        assert cutter.cuts == 1
        assert is_written(admin, table) is (cut not in NOT_SEEN)
    finally:
        pool.closeall()


@pytest.mark.parametrize("end", POOLER_ENDS)
@each_way
async def test_an_error_that_no_backend_raised_does_not_tell_the_outcome(
    dsn: str, admin: Admin, cutter: Cutter, table: str, end: str, way: Callable[[AnyPool, str], Awaitable[None]]
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(Cut(answer=0, instead=POOLER_ENDS[end]))
        learned = await learn(pool, lambda: way(pool, table))
        assert learned.is_unknown
        assert isinstance(learned.error, CommitOutcomeUnknown)
        assert isinstance(learned.error.__cause__, psycopg.Error)
        assert learned.error.__cause__.sqlstate in {"08P01", "57P01", "53100"}
        assert is_written(admin, table)
        assert_status_is_true(learned.status, way, written=True)


async def test_a_commit_whose_connection_is_severed_by_the_pool_is_unknown(
    dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    """A statement on its way when the pool is closed at once: here with an answer that does not come."""
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()
    pool = Pool[psycopg.AsyncConnection[Any]](dsn, check_timeout=0.5)
    async with pool:
        cutter.keeps_client_open = True
        cutter.arm(Cut(answer=0, before_end=lambda: loop.call_soon_threadsafe(answered.set)))
        task = asyncio.create_task(by_hand(pool, table))
        await asyncio.wait_for(answered.wait(), 20)
        await pool.close(timeout=0)
        with pytest.raises(CommitOutcomeUnknown):
            await task
    assert is_written(admin, table)


# --- lost before the COMMIT ---------------------------------------------------------------------------------


@each_way
async def test_a_connection_that_was_lost_before_the_commit_is_not_unknown(
    dsn: str, admin: Admin, cutter: Cutter, table: str, way: Callable[[AnyPool, str], Awaitable[None]]
) -> None:
    class Losing(psycopg.AsyncConnection[Any]):
        """Loses its connection when it has inserted."""

        async def execute(self, *args: Any, **kwargs: Any) -> Any:
            cursor = await super().execute(*args, **kwargs)
            cutter.cut_all()
            await eventually(lambda: peer_has_closed(self.pgconn.socket))
            return cursor

    async with Pool(dsn, connection_class=Losing) as pool:
        with pytest.raises(psycopg.OperationalError) as caught:
            await way(cast("AnyPool", pool), table)
        assert not isinstance(caught.value, CommitOutcomeUnknown)
    assert not is_written(admin, table)


async def test_the_servers_reason_that_came_before_the_commit_is_what_is_raised(
    dsn: str, admin: Admin, table: str
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        with pytest.raises(errors.IdleInTransactionSessionTimeout):
            async with pool.acquire() as conn:
                await conn.execute(insertion(table))
                await conn.execute("set local idle_in_transaction_session_timeout = '10ms'")
                await eventually(lambda: peer_has_closed(conn.pgconn.socket), timeout=20)
        with pytest.raises(errors.AdminShutdown):
            async with pool.transaction(track_outcome=True) as conn:
                await conn.execute(insertion(table))
                admin.terminate(conn.info.backend_pid)
        with pytest.raises(errors.AdminShutdown):
            async with pool.acquire() as conn:
                await conn.execute(insertion(table))
                admin.terminate(conn.info.backend_pid)
                await eventually(lambda: peer_has_closed(conn.pgconn.socket), timeout=20)
    assert not is_written(admin, table)


async def test_the_servers_reason_is_believed_too_if_its_end_is_not_seen_yet(
    dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    """The FATAL of the ended session is read in answer to a COMMIT that nobody hears."""
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.keeps_client_open = True
        conn = await pool.acquire()
        await conn.execute(insertion(table))
        admin.terminate(conn.info.backend_pid)
        assert not peer_has_closed(conn.pgconn.socket)
        commit = asyncio.create_task(conn.commit())
        await eventually(lambda: conn.pgconn.transaction_status != psycopg.pq.TransactionStatus.ACTIVE or commit)
        await asyncio.sleep(0)
        cutter.cut_all()
        with pytest.raises(errors.AdminShutdown):
            await commit
        await pool.release(conn)
    assert not is_written(admin, table)


async def test_a_transaction_block_of_a_connection_that_was_lost_meanwhile_does_not_end_in_silence(
    dsn: str, admin: Admin, table: str
) -> None:
    pool = Pool[psycopg.AsyncConnection[Any]](dsn)
    async with pool:
        conn = await pool.acquire()
        with pytest.raises(PoolError, match="not committed"):
            async with conn.transaction():
                await conn.execute(insertion(table))
                await pool.close(timeout=0)
    blocking_pool = SyncPool[psycopg.Connection[Any]](dsn)
    with blocking_pool:
        blocking_conn = blocking_pool.getconn()
        with pytest.raises(PoolError, match="not committed"), blocking_conn.transaction():
            blocking_conn.execute(insertion(table))
            blocking_pool.close(timeout=0)
    assert not is_written(admin, table)


# --- no false alarm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("track_outcome", [False, True])
async def test_an_error_of_the_commit_stays_what_it_is(dsn: str, admin: Admin, table: str, track_outcome: bool) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn, max_size=2) as pool:
        with pytest.raises(errors.UniqueViolation):
            async with pool.transaction(track_outcome=track_outcome) as conn:
                await conn.execute(insertion(table))
                await conn.execute(insertion(table))  # unique, deferred
        with pytest.raises(errors.SerializationFailure):
            async with pool.transaction(track_outcome=track_outcome) as conn:
                await conn.execute("set transaction isolation level serializable")
                await conn.execute(f"select count(*) from {table}".encode())
                async with pool.transaction() as other:
                    await other.execute("set transaction isolation level serializable")
                    await other.execute(f"select count(*) from {table}".encode())
                    await other.execute(f"insert into {table} values (2)".encode())
                await conn.execute(f"insert into {table} values (3)".encode())
        assert admin.execute(f"select id from {table}") == [(2,)]
        assert pool.stats().closes == {}


SLEEPERS = "from pg_stat_activity where wait_event = 'PgSleep'"


def sleep_at_commit(admin: Admin, table: str, seconds: float = 60) -> None:
    """Have every COMMIT of a row of this table take that long."""
    admin.execute(
        f"create function {table}_sleep() returns trigger language plpgsql as"
        f" $$ begin perform pg_sleep({seconds}); return null; end $$"
    )
    admin.execute(
        f"create constraint trigger sleep after insert on {table} deferrable initially deferred"
        f" for each row execute function {table}_sleep()"
    )


@pytest.mark.parametrize("way", [by_hand, tracked], ids=lambda way: way.__name__)
async def test_a_cancellation_during_the_commit_is_that_and_nothing_else(
    dsn: str, admin: Admin, table: str, way: Callable[[AnyPool, str], Awaitable[None]]
) -> None:
    sleep_at_commit(admin, table)
    async with Pool[psycopg.AsyncConnection[Any]](dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        task = asyncio.ensure_future(way(pool, table))
        await eventually(lambda: admin.execute(f"select pid {SLEEPERS}"), timeout=20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
        assert not is_written(admin, table)


async def test_a_session_ended_during_the_commit_says_so_itself(dsn: str, admin: Admin, table: str) -> None:
    sleep_at_commit(admin, table)
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        for end, error in (
            ("pg_cancel_backend", errors.QueryCanceled),
            ("pg_terminate_backend", errors.AdminShutdown),
        ):
            task = asyncio.ensure_future(tracked(pool, table))
            await eventually(lambda: admin.execute(f"select pid {SLEEPERS}"), timeout=20)
            admin.execute(f"select {end}(pid) {SLEEPERS}")
            with pytest.raises(error):
                await task
    assert not is_written(admin, table)


async def test_a_swallowed_loss_of_the_commit_does_not_make_the_block_say_that_nothing_is_committed(
    dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(SEEN[0])
        async with pool.acquire() as conn:
            await conn.execute(insertion(table))
            with pytest.raises(CommitOutcomeUnknown):
                await conn.commit()
        cutter.arm(ANSWERED[0])
        async with pool.acquire() as conn:
            await conn.execute(f"insert into {table} values (2)".encode())
            await conn.commit()
    assert admin.execute(f"select id from {table} order by id") == [(1,), (2,)]


async def test_a_transaction_block_that_swallowed_an_error_raises_and_is_rolled_back(
    dsn: str, admin: Admin, table: str
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        for track_outcome in (False, True):
            with pytest.raises(PoolError, match="failed transaction"):
                async with pool.transaction(track_outcome=track_outcome) as conn:
                    await conn.execute(insertion(table))
                    with pytest.raises(errors.DivisionByZero):
                        await conn.execute("select 1/0")
    with (
        SyncPool[psycopg.Connection[Any]](dsn) as blocking_pool,
        pytest.raises(PoolError, match="failed transaction"),
        blocking_pool.transaction() as blocking_conn,
    ):
        blocking_conn.execute(insertion(table))
        with pytest.raises(errors.DivisionByZero):
            blocking_conn.execute("select 1/0")
    assert not is_written(admin, table)


# --- pipelines and two phases -------------------------------------------------------------------------------


async def commit_in_pipeline(pool: AnyPool, table: str) -> None:
    async with pool.acquire() as conn, conn.pipeline():
        await conn.execute(insertion(table))
        await conn.commit()


async def transaction_in_pipeline(pool: AnyPool, table: str) -> None:
    async with pool.acquire() as conn, conn.pipeline(), conn.transaction():
        await conn.execute(insertion(table))


@pytest.mark.parametrize("way", [commit_in_pipeline, transaction_in_pipeline], ids=lambda way: way.__name__)
@pytest.mark.parametrize("cut", [Cut(0), Cut(answer=0), Cut(answer=EVERYTHING)], ids=str)
async def test_in_a_pipeline_it_is_the_same(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cut: Cut, way: Callable[[AnyPool, str], Awaitable[None]]
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(cut)
        learned = await learn(pool, lambda: way(pool, table))
        assert cutter.cuts == 1
        assert is_written(admin, table) is (cut.answer is not None)
        if cut.answer == EVERYTHING:
            assert not learned.is_unknown
        else:
            assert learned.is_unknown


async def test_in_a_pipeline_an_error_stays_what_it_is(dsn: str, admin: Admin, table: str) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        with pytest.raises(errors.UniqueViolation):
            async with pool.acquire() as conn, conn.pipeline():
                await conn.execute(insertion(table))
                await conn.execute(insertion(table))
                await conn.commit()
        with pytest.raises(errors.DivisionByZero):
            async with pool.acquire() as conn, conn.pipeline():
                await conn.execute("select 1/0")
                await conn.commit()
        await commit_in_pipeline(pool, table)
    assert is_written(admin, table)


@pytest.fixture
def nothing_left_prepared(admin: Admin, table: str) -> Iterator[None]:
    """It would keep its locks on the table."""
    yield
    for (statement,) in admin.execute("select 'rollback prepared ' || quote_literal(gid) from pg_prepared_xacts"):
        admin.execute(statement)


@pytest.mark.parametrize("cut", [Cut(0), Cut(answer=0)], ids=str)
async def test_the_second_phase_of_a_two_phase_commit_is_unknown_too(
    dsn: str, admin: Admin, cutter: Cutter, table: str, nothing_left_prepared: None, cut: Cut
) -> None:
    admin.execute(f"alter table {table} drop constraint {table}_id_key")
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        xid = psycopg.Xid.from_parts(1, table, "x")
        with pytest.raises(CommitOutcomeUnknown):
            async with pool.acquire() as conn:
                await conn.tpc_begin(xid)
                await conn.execute(insertion(table))
                await conn.tpc_prepare()
                cutter.arm(cut)
                await conn.tpc_commit()
        is_prepared = bool(admin.execute("select 1 from pg_prepared_xacts"))
        assert is_prepared is not is_written(admin, table)
        if is_prepared:
            async with pool.acquire() as conn:
                await conn.tpc_commit(xid)
    assert is_written(admin, table)


# --- the error and its status -------------------------------------------------------------------------------


async def test_a_transaction_that_wrote_nothing_had_nothing_to_lose(dsn: str, cutter: Cutter) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(NOT_SEEN[0])
        with pytest.raises(CommitOutcomeUnknown, match="had written nothing") as caught:
            async with pool.transaction(track_outcome=True) as conn:
                await conn.execute("select 1")
        assert caught.value.xid is None
        assert await pool.commit_status(caught.value) is CommitStatus.NOTHING_WRITTEN


async def test_the_error_can_be_pickled_and_asked_about_elsewhere(
    dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn, password="hush-hush", name="orders") as pool:
        cutter.arm(SEEN[0])
        with pytest.raises(CommitOutcomeUnknown, match="orders: the connection was lost during COMMIT") as caught:
            await tracked(pool, table)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.xid, error.sqlstate) == (str(caught.value), caught.value.xid, "08007")
    assert "hush" not in repr(error) + repr(vars(error)) + repr(caught.value.__cause__)
    assert str(error.xid) == admin.value(f"select xmin::text from {table}")  # young, so that the epoch is 0
    with SyncPool[psycopg.Connection[Any]](dsn) as other:
        assert other.commit_status(error) is CommitStatus.COMMITTED


async def test_on_another_server_timeline_or_after_a_crash_the_answer_is_unknown(
    dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(SEEN[0])
        with pytest.raises(CommitOutcomeUnknown) as caught:
            await tracked(pool, table)
        assert await pool.commit_status(caught.value) is CommitStatus.COMMITTED
        for name, value in (("system_identifier", 1), ("timeline", 2), ("timeline", None), ("epoch", "00")):
            error = copy.copy(caught.value)
            setattr(error, name, value)
            assert await pool.commit_status(error) is CommitStatus.UNKNOWN, name
        error = copy.copy(caught.value)
        assert error.xid is not None
        error.xid += 1_000_000  # not given to anybody: impossible here, and lost in a crash
        assert await pool.commit_status(error) is CommitStatus.UNKNOWN
        error.epoch = "00"
        assert await pool.commit_status(error) is CommitStatus.ABORTED
        error.xid = 3  # frozen long ago: the server has forgotten
        error.epoch = caught.value.epoch
        assert await pool.commit_status(error) in {CommitStatus.UNKNOWN, CommitStatus.COMMITTED}
        with pytest.raises(TypeError, match="CommitOutcomeUnknown"):
            await pool.commit_status(ValueError("x"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_transaction_that_the_server_still_works_on_is_in_progress(
    dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    """The server hears of the loss when it answers; then it has committed."""
    sleep_at_commit(admin, table, 1)
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        cutter.arm(AT_ONCE)
        with pytest.raises(CommitOutcomeUnknown) as caught:
            await tracked(pool, table)
        assert await pool.commit_status(caught.value) is CommitStatus.IN_PROGRESS
        deadline = time.monotonic() + 30
        while (status := await pool.commit_status(caught.value)) is CommitStatus.IN_PROGRESS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert status is (CommitStatus.COMMITTED if is_written(admin, table) else CommitStatus.ABORTED)


# --- tracking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cursor_factory", [psycopg.AsyncCursor, psycopg.AsyncClientCursor])
async def test_tracking_minds_neither_cursors_nor_autocommit_nor_nesting_nor_settings_of_the_session(
    dsn: str, admin: Admin, cutter: Cutter, table: str, cursor_factory: type[psycopg.AsyncCursor[Any]]
) -> None:
    options: dict[str, Any] = {
        "row_factory": dict_row,
        "cursor_factory": cursor_factory,
        "autocommit": True,
        "prepare_threshold": 0,
        "options": "-c search_path=nowhere -c bytea_output=escape -c datestyle=German",
    }
    async with Pool[psycopg.AsyncConnection[Any]](dsn, **options) as pool:
        async with pool.transaction(track_outcome=True) as conn:
            async with conn.transaction():
                await conn.execute(f"insert into public.{table} values (1)".encode())
            async with pool.transaction(track_outcome=True) as other:
                await other.execute("select 1")
        cutter.arm(SEEN[0])
        with pytest.raises(CommitOutcomeUnknown) as caught:
            async with pool.transaction(track_outcome=True) as conn, conn.transaction():
                await conn.execute(f"insert into public.{table} values (2)".encode())
        assert await pool.commit_status(caught.value) is CommitStatus.COMMITTED
        async with pool.acquire() as conn:
            # a pattern that does not find itself
            tracking = "select 1 from pg_prepared_statements where statement like '%pg_control' || '_system%'"
            assert await (await conn.execute(tracking)).fetchall() == []
    assert admin.execute(f"select id from {table} order by id") == [(1,), (2,)]


async def test_a_mark_does_not_outlive_its_block(dsn: str, cutter: Cutter, table: str) -> None:
    async with Pool[psycopg.AsyncConnection[Any]](dsn, max_size=1) as pool:
        await tracked(pool, table)
        cutter.arm(SEEN[0])
        with pytest.raises(CommitOutcomeUnknown) as caught:
            async with pool.acquire() as conn:
                await conn.execute(f"insert into {table} values (2)".encode())
        assert (caught.value.xid, caught.value.system_identifier) == (None, None)


async def test_a_role_without_any_rights_can_track_and_ask(
    commit_server: EmbeddedServer, dsn: str, admin: Admin, cutter: Cutter, table: str
) -> None:
    role = f"{table}_role"
    admin.execute(f"create role {role} login")
    admin.execute(f"grant insert on {table} to {role}")
    async with Pool[psycopg.AsyncConnection[Any]](dsn, user=role) as pool:
        cutter.arm(SEEN[0])
        with pytest.raises(CommitOutcomeUnknown) as caught:
            await tracked(pool, table)
        assert await pool.commit_status(caught.value) is CommitStatus.COMMITTED
    admin.execute(f"revoke all on {table} from {role}")
    admin.execute(f"drop role {role}")


async def test_a_transaction_that_ends_otherwise_asks_nothing(dsn: str, admin: Admin, table: str) -> None:
    """After an exception, and after psycopg's Rollback, there is no COMMIT to track."""
    async with Pool[psycopg.AsyncConnection[Any]](dsn) as pool:
        async with pool.transaction(track_outcome=True) as conn:
            await conn.execute(insertion(table))
            raise psycopg.Rollback
        with pytest.raises(ZeroDivisionError):  # type: ignore[unreachable]  # the Rollback ends its block alone
            async with pool.transaction(track_outcome=True) as conn:
                await conn.execute(insertion(table))
                raise ZeroDivisionError
        async with pool.transaction(track_outcome=True) as conn:
            await conn.execute("commit")  # by hand: nothing is left to track
    assert not is_written(admin, table)


def test_it_is_an_operational_error_and_no_pool_error() -> None:
    assert issubclass(CommitOutcomeUnknown, psycopg.OperationalError)
    assert not issubclass(CommitOutcomeUnknown, PoolError)
    assert READY_FOR_QUERY[-1:] == b"I"
