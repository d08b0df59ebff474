"""What the pool relies on in psycopg beyond its documentation; each fails clearly when psycopg changes it.

These look at plain psycopg connections, not at the pool's.
"""

from __future__ import annotations

import ast
import gc
import inspect
import warnings
import weakref
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually
from psycopg import errors, generators, pq, waiting
from psycopg._preparing import PrepareManager
from psycopg.adapt import AdaptersMap
from psycopg.types import TypeInfo
from psycopg.types.string import StrDumper, TextLoader

import asyncpool

from .leftovers import stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from kit.servers import Admin

Connection = psycopg.AsyncConnection[Any]

TEXT_OID = psycopg.adapters.types["text"].oid


@pytest.fixture
async def conn(dsn: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        yield conn


# --- all of them --------------------------------------------------------------------------------------------

# Every private name of psycopg that the package mentions. A new one wants a test below; what `_io/libpq.py` does
# with `_pq_ctypes` is tested in tests/test_libpq.py.
TESTED = {
    "_WaitTimeout",
    "_adapters",
    "_autocommit",
    "_begin_statement",
    "_connection_base",
    "_deferrable",
    "_dumpers",
    "_dumpers_by_oid",
    "_isolation_level",
    "_loaders",
    "_notice_handler",
    "_notice_handlers",
    "_notifies_backlog",
    "_notify_handler",
    "_notify_handlers",
    "_num_transactions",
    "_pipeline",
    "_pool",
    "_pq_ctypes",
    "_prepared",
    "_prepared_idx",
    "_preparing",
    "_read_only",
    "_registry",
    "_tpc",
    "_try_cancel",
}


def private_names_of_psycopg() -> set[str]:
    """Those that its modules define or assign, as far as the pool could mean them."""
    names: set[str] = set()
    package = Path(psycopg.__file__).parent
    for path in package.rglob("*.py"):
        names.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def private_names_mentioned() -> set[str]:
    """Those in attributes, in strings that are nothing but dotted names, and in imports from psycopg."""
    mentioned: set[str] = set()
    for path in Path(asyncpool.__file__).parent.rglob("*.py"):
        for node in walk_past_slots(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                mentioned.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                mentioned.update(node.value.split("."))
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("psycopg"):
                mentioned.update(node.module.split("."), (alias.name for alias in node.names))
    return {name for name in mentioned if name.startswith("_") and not name.startswith("__")}


def walk_past_slots(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        slots = isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__slots__"
        if not slots:
            yield child
            yield from walk_past_slots(child)


def test_every_private_name_of_psycopg_that_the_package_mentions_is_tested_here() -> None:
    assert private_names_mentioned() & private_names_of_psycopg() <= TESTED


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


async def test_a_wait_that_takes_too_long_raises_what_notifies_expects(conn: Connection) -> None:
    assert issubclass(errors._WaitTimeout, errors.Error)
    with pytest.raises(errors._WaitTimeout):
        await conn.wait(generators.notifies(conn.pgconn), timeout=0.01)


async def test_generators_yield_what_they_wait_for_and_take_what_is_ready(conn: Connection) -> None:
    conn.pgconn.send_query(b"select 1")
    running = generators.execute(conn.pgconn)
    wants = next(running)
    assert waiting.Wait(wants) in (waiting.WAIT_RW, waiting.WAIT_R, waiting.WAIT_W)
    assert (int(waiting.Wait.R), int(waiting.Wait.W)) == (1, 2)
    assert (int(waiting.Ready.R), int(waiting.Ready.W)) == (1, 2)
    [result] = await waiting.wait_async(running_from(running, wants), conn.pgconn.socket)
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
    conn: Connection, admin: Admin
) -> None:
    """What the pool's own wait() starts from when it takes over a cancellation."""
    conn.pgconn.send_query(b"select pg_sleep(600)")
    running = generators.execute(conn.pgconn)
    wants = next(running)
    assert conn.pgconn.transaction_status == pq.TransactionStatus.ACTIVE
    assert conn.pgconn.flush() == 0
    active = "select state = 'active' from pg_stat_activity where pid = %s"
    await eventually(lambda: admin.value(active, [conn.info.backend_pid]))
    cancelling = conn.pgconn.cancel_conn()
    cancelling.start()
    await waiting.wait_conn_async(generators.cancel(cancelling), interval=1.0, timeout=10)
    [result] = await waiting.wait_async(running_from(running, wants), conn.pgconn.socket)
    assert isinstance(errors.error_from_result(result), errors.QueryCanceled)
    assert conn.pgconn.transaction_status == pq.TransactionStatus.IDLE


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


async def test_what_is_open_on_a_connection_holds_its_lock(conn: Connection) -> None:
    rows = stream(conn, "select generate_series(1, 100000)")
    await anext(rows)
    assert conn.lock.locked()
    await rows.aclose()
    assert not conn.lock.locked()
    await conn.rollback()
    async with conn.cursor().copy("copy (select 1) to stdout") as copy:
        assert conn.lock.locked()
        while await copy.read():
            pass
    assert not conn.lock.locked()


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
    conn._pool = pool  # type: ignore[assignment]  # psycopg's type is its own pool
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


# --- client state -------------------------------------------------------------------------------------------


async def test_the_settings_of_a_connection_are_these_attributes(conn: Connection) -> None:
    assert (conn._autocommit, conn._isolation_level, conn._read_only, conn._deferrable) == (False, None, None, None)
    await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await conn.set_read_only(True)
    await conn.set_deferrable(True)
    await conn.set_autocommit(True)
    assert (conn._autocommit, conn._isolation_level, conn._read_only, conn._deferrable) == (
        True,
        psycopg.IsolationLevel.SERIALIZABLE,
        True,
        True,
    )
    conn._autocommit = False
    assert conn.autocommit is False


async def test_begin_is_kept_as_built_until_it_is_emptied(conn: Connection) -> None:
    await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await conn.execute("select 1")
    assert b"SERIALIZABLE" in conn._begin_statement
    await conn.rollback()
    conn._isolation_level = None
    conn._begin_statement = b""
    cursor = await conn.execute("show transaction_isolation")
    assert await cursor.fetchone() == ("read committed",)


async def test_prepared_statements_are_kept_by_a_manager_that_counts_their_names(conn: Connection) -> None:
    assert isinstance(conn._prepared, PrepareManager)
    assert (conn._prepared.prepare_threshold, conn._prepared.prepared_max) == (5, 100)
    assert conn._prepared._prepared_idx == 0
    conn.prepare_threshold = 0
    conn.prepared_max = None
    assert conn._prepared.prepare_threshold == 0
    await conn.execute("select 1")
    assert conn._prepared._prepared_idx == 1
    anew = PrepareManager()
    anew._prepared_idx = conn._prepared._prepared_idx
    anew.prepare_threshold = 0
    conn._prepared = anew
    # prepared once more, under another name
    names = "select array_agg(name order by name) from pg_prepared_statements where statement = 'select 1'"
    await conn.execute("select 1")
    cursor = await conn.execute(names, prepare=False)
    assert await cursor.fetchone() == (["_pg3_0", "_pg3_1"],)


async def test_handlers_are_lists_and_what_nobody_handles_is_a_deque(conn: Connection) -> None:
    assert (conn._notice_handlers, conn._notify_handlers) == ([], [])
    assert conn._notifies_backlog == deque()
    heard: list[object] = []
    conn._notice_handlers = [heard.append]
    await conn.execute("do $$ begin raise notice 'heard'; end $$")
    assert len(heard) == 1
    await conn.execute("listen here")
    await conn.execute("notify here")
    await conn.commit()
    assert conn._notifies_backlog is not None
    assert len(conn._notifies_backlog) == 1
    conn._notifies_backlog = deque()
    conn._notify_handlers = [heard.append]
    await conn.execute("notify here")
    await conn.commit()
    assert len(heard) == 2


async def test_the_pgconn_hears_through_static_methods_and_a_weak_reference(conn: Connection) -> None:
    """So that another connection object can take over the PGconn, as with `debug`."""
    heard: list[object] = []

    class Other:
        def __init__(self) -> None:
            self._notice_handlers = self._notify_handlers = [heard.append]
            self.pgconn = conn.pgconn

    other: Any = Other()
    conn.pgconn.notice_handler = partial(psycopg.BaseConnection._notice_handler, weakref.ref(other))
    conn.pgconn.notify_handler = partial(psycopg.BaseConnection._notify_handler, weakref.ref(other))
    await conn.execute("do $$ begin raise notice 'heard'; end $$")
    await conn.execute("listen here")
    await conn.execute("notify here")
    await conn.commit()
    assert len(heard) == 2


def test_the_types_of_the_handlers_are_where_they_are_imported_from() -> None:
    assert {"NoticeHandler", "NotifyHandler"} <= vars(psycopg._connection_base).keys()


async def test_adapters_are_three_maps_and_a_registry_copied_on_write(conn: Connection) -> None:
    """A comparison of these by identity finds every change; a copy is not changed with its original."""
    original = conn.adapters
    assert conn._adapters is original
    copy = AdaptersMap(original)
    before = (original._dumpers, original._dumpers_by_oid, original._loaders, original.types._registry)
    assert (copy._dumpers, copy._dumpers_by_oid, copy._loaders, copy.types._registry) == before
    loader = copy.get_loader(TEXT_OID, pq.Format.TEXT)

    class Own(TextLoader):
        pass

    original.register_loader("text", Own)
    TypeInfo("own_type", 424242, 424243).register(original)
    original.register_dumper(Own, StrDumper)
    assert copy.get_loader(TEXT_OID, pq.Format.TEXT) is loader
    assert copy.types.get("own_type") is None
    assert copy._loaders != original._loaders
    assert copy._dumpers != original._dumpers
    assert copy.types._registry != original.types._registry


async def test_registering_goes_through_these_three_methods(conn: Connection) -> None:
    """Those by which the pool's own maps learn that somebody registers something."""
    parameters = {
        method: list(inspect.signature(method).parameters)
        for method in (AdaptersMap.register_dumper, AdaptersMap.register_loader, type(conn.adapters.types).add)
    }
    assert list(parameters.values()) == [["self", "cls", "dumper"], ["self", "oid", "loader"], ["self", "info"]]


# --- what a connection is in the middle of ------------------------------------------------------------------


async def test_transaction_blocks_are_counted(conn: Connection) -> None:
    assert conn._num_transactions == 0
    async with conn.transaction():
        assert conn._num_transactions == 1
        async with conn.transaction():
            assert conn._num_transactions == 2
    assert conn._num_transactions == 0


async def test_a_two_phase_transaction_is_remembered(conn: Connection) -> None:
    seen = [conn._tpc is None]
    await conn.tpc_begin("some transaction")
    seen.append(conn._tpc is None)
    await conn.tpc_rollback()
    seen.append(conn._tpc is None)
    assert seen == [True, False, True]


async def test_a_pipeline_is_remembered(conn: Connection) -> None:
    seen = [(conn._pipeline, conn.pgconn.pipeline_status)]
    async with conn.pipeline() as pipeline:
        seen.append((conn._pipeline, conn.pgconn.pipeline_status))
    seen.append((conn._pipeline, conn.pgconn.pipeline_status))
    off, on, _ = pq.PipelineStatus
    assert seen == [(None, off), (pipeline, on), (None, off)]


async def test_libpq_closes_its_socket_when_it_finds_the_session_dead(conn: Connection, admin: Admin) -> None:
    """And it is asked for by an attribute that raises then: the number may be another socket's by now."""
    admin.terminate(conn.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        await conn.execute("select 1")
    assert conn.pgconn.status == pq.ConnStatus.BAD
    with pytest.raises(psycopg.OperationalError):
        _ = conn.pgconn.socket
