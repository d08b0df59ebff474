"""What the pool relies on in psycopg beyond its documentation; each fails clearly when psycopg changes it.

These look at plain psycopg connections, not at the pool's.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import psycopg
import pytest
from kit.waiting import eventually
from psycopg import errors, generators, pq, sql, waiting
from psycopg._pipeline_base import BasePipeline
from psycopg.transaction import BaseTransaction

from .leftovers import stream

if TYPE_CHECKING:
    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]


# --- how a connection waits ---------------------------------------------------------------------------------


def test_wait_takes_generator_interval_and_timeout() -> None:
    parameters = inspect.signature(psycopg.AsyncConnection.wait).parameters
    assert list(parameters) == ["self", "gen", "interval", "timeout"]
    assert parameters["interval"].default == pytest.approx(0.1)
    assert parameters["timeout"].default is None


async def test_all_io_goes_through_wait(dsn: str) -> None:
    """Statements, transactions, COPY, streams, pipelines, server cursors, notifications."""
    waits = 0

    class Watching(psycopg.AsyncConnection[Any]):
        async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            nonlocal waits
            waits += 1
            return await super().wait(gen, interval, timeout)

    def waited() -> bool:
        nonlocal waits
        waits, before = 0, waits
        return before > 0

    async with await Watching.connect(dsn) as conn:
        waited()
        await conn.execute("create temp table t (id int)")
        assert waited()
        await conn.cursor().executemany("insert into t values (%s)", [(1,), (2,)])
        assert waited()
        async with conn.transaction():
            assert waited()
        assert waited()
        await conn.commit()
        assert waited()
        await conn.rollback()
        assert waited()
        async with conn.cursor().copy("copy t to stdout") as copy:
            assert waited()
            while await copy.read():
                assert waited()
        async with conn.cursor().copy("copy t from stdin") as copy:
            waited()
            await copy.write(b"3\n")
            assert waited()
        assert waited()
        async for _ in stream(conn, "select * from t"):
            assert waited()
        async with conn.pipeline() as pipeline:
            assert waited()
            await pipeline.sync()
            assert waited()
        waited()
        async with conn.cursor("named") as cursor:
            await cursor.execute("select * from t")
            assert waited()
            await cursor.fetchone()
            assert waited()
        waited()
        async for _ in conn.notifies(timeout=0.01):
            pass
        assert waited()


async def test_blocks_end_with_a_wait_for_generators_that_can_be_told_by_their_code(dsn: str) -> None:
    codes = []

    class Watching(psycopg.AsyncConnection[Any]):
        async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            codes.append(getattr(gen, "gi_code", None))
            return await super().wait(gen, interval, timeout)

    async with await Watching.connect(dsn) as conn:
        async with conn.transaction():
            codes.clear()
        assert codes == [cast("Any", BaseTransaction._exit_gen).__code__]
        async with conn.pipeline():
            codes.clear()
        assert codes[-1] is cast("Any", BasePipeline._exit_gen).__code__
        await conn.execute("create temp table t (id int)")
        async with conn.cursor().copy("copy t from stdin"):
            codes.clear()
        assert codes == [cast("Any", generators.copy_end).__code__]


async def test_every_commit_is_a_command_that_the_connection_runs(dsn: str) -> None:
    """That is where the pool puts its own in place of it: a method that makes a generator of the result."""
    commands: list[object] = []

    class Watching(psycopg.AsyncConnection[Any]):
        def _exec_command(self, command: Any, result_format: pq.Format = pq.Format.TEXT) -> Any:
            commands.append(command)
            return super()._exec_command(command, result_format)

    async with await Watching.connect(dsn) as conn:
        await conn.execute("select 1")
        await conn.commit()
        async with conn.transaction(), conn.transaction():
            pass
        async with conn:
            await conn.execute("select 1")
    assert commands == [b"BEGIN", b"COMMIT", b"BEGIN", mock.ANY, mock.ANY, b"COMMIT", b"BEGIN", b"COMMIT"]
    commands.clear()
    async with await Watching.connect(dsn) as conn:
        with pytest.raises(psycopg.Error):
            await conn.tpc_commit(conn.xid(1, "a", "b"))
        [command] = commands
        assert isinstance(command, sql.Composed)
        assert command.as_bytes(conn).startswith(b"COMMIT PREPARED ")
        assert conn.pgconn._encoding == "utf-8"


async def test_what_stands_in_a_pipelines_queue_is_told_its_results(plain: Connection) -> None:
    """In place of a cursor anything with two methods will do."""
    told: list[object] = []

    class Listener:
        def _check_results(self, results: list[Any]) -> None:
            told.append([result.command_status for result in results])

        def _set_results(self, results: list[Any]) -> None:
            told.append(len(results))

    async with plain.pipeline() as pipeline:
        pipeline.command_queue.append(lambda: plain.pgconn.send_query_params(b"select 1", None))
        pipeline.result_queue.append((cast("Any", Listener()), None))
        await pipeline.sync()
        assert told == [[b"SELECT 1"], 1]


async def test_a_wait_that_takes_too_long_raises_what_notifies_expects(plain: Connection) -> None:
    assert issubclass(errors._WaitTimeout, errors.Error)
    with pytest.raises(errors._WaitTimeout):
        await plain.wait(generators.notifies(plain.pgconn), timeout=0.01)


async def test_generators_yield_what_they_wait_for_and_take_what_is_ready(plain: Connection) -> None:
    plain.pgconn.send_query(b"select 1")
    running = generators.execute(plain.pgconn)
    wants = next(running)
    assert waiting.Wait(wants) in (waiting.WAIT_RW, waiting.WAIT_R, waiting.WAIT_W)
    assert (int(waiting.Wait.R), int(waiting.Wait.W)) == (1, 2)
    assert (int(waiting.Ready.R), int(waiting.Ready.W)) == (1, 2)
    [result] = await waiting.wait_async(running_from(running, wants), plain.pgconn.socket)
    assert result.get_value(0, 0) == b"1"


def running_from(generator: Any, first: Any) -> Any:
    """A generator half-way, from its last yield on."""
    ready = yield first
    try:
        while True:
            ready = yield generator.send(ready)
    except StopIteration as done:
        return done.value


async def test_a_cancelled_statement_leaves_the_connection_active_until_its_end_is_read(
    plain: Connection, admin: Admin
) -> None:
    """What the pool's own wait() starts from when it takes over a cancellation."""
    plain.pgconn.send_query(b"select pg_sleep(600)")
    running = generators.execute(plain.pgconn)
    wants = next(running)
    assert plain.pgconn.transaction_status == pq.TransactionStatus.ACTIVE
    assert plain.pgconn.flush() == 0
    active = "select state = 'active' from pg_stat_activity where pid = %s"
    await eventually(lambda: admin.value(active, [plain.info.backend_pid]))
    cancelling = plain.pgconn.cancel_conn()
    cancelling.start()
    await waiting.wait_conn_async(generators.cancel(cancelling), interval=1.0, timeout=10)
    [result] = await waiting.wait_async(running_from(running, wants), plain.pgconn.socket)
    assert isinstance(errors.error_from_result(result), errors.QueryCanceled)
    assert plain.pgconn.transaction_status == pq.TransactionStatus.IDLE


@pytest.mark.parametrize("what", ["copy", "stream"])
async def test_copy_and_stream_left_half_way_call_try_cancel(dsn: str, what: str) -> None:
    calls: list[dict[str, Any]] = []

    class Watching(psycopg.AsyncConnection[Any]):
        async def _try_cancel(self, **kwargs: Any) -> None:
            calls.append(kwargs)
            await super()._try_cancel(**kwargs)

    async with await Watching.connect(dsn) as conn:
        with pytest.raises(LookupError):
            if what == "copy":
                async with conn.cursor().copy("copy (select generate_series(1, 100000)) to stdout") as copy:
                    await copy.read()
                    raise LookupError
            rows = stream(conn, "select generate_series(1, 100000)")
            await anext(rows)
            await rows.athrow(LookupError)
    assert calls == [{}]
    assert inspect.signature(psycopg.AsyncConnection._try_cancel).parameters.keys() == {"self", "timeout"}


async def test_what_is_open_on_a_connection_holds_its_lock(plain: Connection) -> None:
    rows = stream(plain, "select generate_series(1, 100000)")
    await anext(rows)
    assert plain.lock.locked()
    await rows.aclose()
    assert not plain.lock.locked()
    await plain.rollback()
    async with plain.cursor().copy("copy (select 1) to stdout") as copy:
        assert plain.lock.locked()
        while await copy.read():
            pass
    assert not plain.lock.locked()


# --- the hook for pools -------------------------------------------------------------------------------------


class FakePool:
    """What psycopg wants of a pool."""

    close_returns = True

    def __init__(self) -> None:
        self.returned: list[Connection] = []

    async def putconn(self, conn: Connection) -> None:
        self.returned.append(conn)


async def test_a_connection_with_a_pool_is_returned_by_close_and_not_closed_by_its_block(dsn: str) -> None:
    pool = FakePool()
    conn = await psycopg.AsyncConnection.connect(dsn)
    vars(conn)["_pool"] = pool  # its type is that of psycopg_pool, where that is installed
    async with conn:
        pass
    assert pool.returned == []
    assert not conn.closed
    await conn.close()
    assert pool.returned == [conn]
    assert not conn.closed
    conn.pgconn.finish()


async def test_a_connection_with_a_pool_may_be_collected_without_a_warning(dsn: str) -> None:
    conn = await psycopg.AsyncConnection.connect(dsn)
    conn._pool = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgconn = conn.pgconn
        del conn
        gc.collect()
    pgconn.finish()


# --- what a connection is in the middle of ------------------------------------------------------------------


async def test_transaction_blocks_are_counted(plain: Connection) -> None:
    assert plain._num_transactions == 0
    async with plain.transaction():
        assert plain._num_transactions == 1
        async with plain.transaction():
            assert plain._num_transactions == 2
    assert plain._num_transactions == 0


async def test_a_two_phase_transaction_is_remembered(plain: Connection) -> None:
    seen = [plain._tpc is None]
    await plain.tpc_begin("some transaction")
    seen.append(plain._tpc is None)
    await plain.tpc_rollback()
    seen.append(plain._tpc is None)
    assert seen == [True, False, True]


async def test_a_pipeline_is_remembered(plain: Connection) -> None:
    seen = [(plain._pipeline, plain.pgconn.pipeline_status)]
    async with plain.pipeline() as pipeline:
        seen.append((plain._pipeline, plain.pgconn.pipeline_status))
    seen.append((plain._pipeline, plain.pgconn.pipeline_status))
    off, on, _ = pq.PipelineStatus
    assert seen == [(None, off), (pipeline, on), (None, off)]


async def test_libpq_closes_its_socket_when_it_finds_the_session_dead(plain: Connection, admin: Admin) -> None:
    """And it is asked for by an attribute that raises then: the number may be another socket's by now."""
    admin.terminate(plain.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        await plain.execute("select 1")
    assert plain.pgconn.status == pq.ConnStatus.BAD
    with pytest.raises(psycopg.OperationalError):
        _ = plain.pgconn.socket
