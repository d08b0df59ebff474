"""SyncPool: the same pool for threads, with its event loop in the background."""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import TIMEOUT_MAX, Lock, RLock
from time import monotonic
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, cast, overload

import psycopg
from psycopg import Connection, Cursor, RawCursor
from psycopg.abc import Params, Query
from psycopg.rows import RowFactory, TupleRow

from ._core.lanes import Paces
from ._core.states import PoolPhase
from ._io.acquisition import DEFAULT, Default, Elsewhere, check_not_failed
from ._io.blocking import BlockingRunner, DropInRunner, Timeout
from ._io.blocking_acquisition import BlockingAcquisition
from ._io.blocking_driver import BlockingDriver
from ._io.blocking_one_shot import ThreadOneShot
from ._io.commit import ask_status, known_status, track
from ._io.connection import RELEASED, UNUSABLE, PooledBlockingConnection
from ._io.leases import Leases
from ._io.locked_machine import ensure_stack
from ._io.log import logger
from ._io.loop_thread import LoopThread, check_not_finalizing
from ._io.observation import Observation
from ._io.pipe import has_raw_cursors
from ._io.session import IDLE, NOT_LEASED, SEVERED
from ._io.statement import OneShot, pace_of
from ._io.watch import WATCH_STALENESS
from .config import check_bool, check_one_shot, check_timeout, is_true, shown
from .errors import CommitOutcomeUnknown, PoolError, PoolTimeout
from .events import CloseReason, CommitStatus, Holder, Observer, PoolStats
from .options import BlockingOptions
from .pool import CLOSE_TIMEOUT, Pool

_getframe = sys._getframe
_get_running_loop = asyncio._get_running_loop

if TYPE_CHECKING:
    # The default, which `typing` has from 3.13 on, is for annotations that say `SyncPool` alone.
    from typing_extensions import TypeVar as TypeVarWithDefault

    C = TypeVarWithDefault("C", bound=Connection[Any], default=Connection[TupleRow])
else:
    C = TypeVar("C", bound=Connection[Any])
Row = TypeVar("Row")
T = TypeVar("T")

BlockingConninfo = str | Callable[[], str]


class _LoopPool(Pool[Any]):
    """The pool in the background loop."""

    # Narrower than the base's; nothing else is ever put there.
    _runner: BlockingRunner | None  # pyright: ignore[reportIncompatibleVariableOverride]  # see above
    _runner_class: type[BlockingRunner] = BlockingRunner  # pyright: ignore[reportIncompatibleVariableOverride]  # too
    _driver_class = BlockingDriver
    _class_name = "SyncPool"
    _warns_at_exit = False  # a script may end without closing
    _how_to_open = "use `with SyncPool(...) as pool`, or `pool.open()`"
    _how_to_close = "use `with`, or `pool.close()`"


class DropInLoopPool(_LoopPool):
    """That of a pool that stands in for psycopg2's."""

    _runner_class = DropInRunner


class _KeyedLease:
    """The connection of a key. The lock is held by whoever gets it from the pool."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.connection: Any = None
        self.lease = 0

    @property
    def is_leased(self) -> bool:
        return self.connection is not None and self.connection._session.lease == self.lease


class SyncPool(Generic[C]):
    """Connections to one database, shared by the threads of one process.

    The options are those of `Pool`; `conninfo`, if it is a callable, and `configure`, `check`, `setup` and `reset`
    are blocking. The constructor does no I/O: use `with`, or `pool.open()`. A forked child starts with an empty
    pool, which it opens when it first takes a connection.

    Raises TypeError for an unknown or mistyped option, ValueError for one out of range, and
    psycopg.ProgrammingError for a malformed conninfo.
    """

    _loop_pool_class: type[_LoopPool] = _LoopPool

    @overload
    def __init__(
        self: SyncPool[Connection[TupleRow]], conninfo: BlockingConninfo = "", **options: Unpack[BlockingOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: SyncPool[Connection[Row]],
        conninfo: BlockingConninfo = "",
        *,
        row_factory: RowFactory[Row],
        **options: Unpack[BlockingOptions],
    ) -> None: ...
    @overload
    def __init__(
        self,
        conninfo: BlockingConninfo = "",
        *,
        connection_class: type[C],
        row_factory: RowFactory[Any] | None = None,
        **options: Unpack[BlockingOptions],
    ) -> None: ...
    def __init__(self, conninfo: BlockingConninfo = "", **options: Any) -> None:
        self._pool = self._loop_pool_class(conninfo, **options)
        self._keyed: dict[Hashable, _KeyedLease] = {}
        self._keys_lock = RLock()  # a finalizer may want it in the midst of what its thread does here
        self._fork_lock = RLock()
        self._forked = False  # from a pool that was open, and not used in this process yet
        self._warned_of_loop = False
        _all_pools.add(self)

    def __repr__(self) -> str:
        return repr(self._pool)

    @property
    def name(self) -> str:
        """The pool's name in logs and errors."""
        return self._pool.name

    # --- life cycle -----------------------------------------------------------------------------------------

    def open(self, *, wait: bool = True, timeout: float | Default | None = DEFAULT) -> None:
        """Connect `min_size` connections, as `Pool.open` does. Raises as it does."""
        self._in_loop(lambda: self._pool.open(wait=wait, timeout=timeout))

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Refuse new and waiting callers, and close every connection. A closed pool can be opened again.

        Waits up to `timeout` seconds (None: for ever) for the connections in use; then shuts those down, with a
        warning that names where they were acquired. After Ctrl-C the pool goes on closing by itself, but shuts no
        connection down that is in use.
        """
        check_timeout("timeout", timeout)
        self._forked = False
        runner = self._pool._runner
        if runner is None or runner.machine.phase is PoolPhase.CLOSED or sys.is_finalizing():
            pass  # at the interpreter's end the process closes what is open
        elif runner.must_not_wait():
            runner.let_go()  # in a finalizer or a log handler: it goes on by itself
        else:
            self._in_loop(lambda: self._pool.close(timeout))
        self._keyed.clear()

    def closeall(self) -> None:
        """Close at once, connections in use included."""
        self.close(timeout=0)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:  # for who mistakes it for a Pool, or another pool
        connection = Elsewhere("use `with pool.acquire() as conn`")
        release = Elsewhere("use pool.putconn(conn)")

        async def __aenter__(self):
            raise TypeError("SyncPool wants `with`; Pool is the one for `async with`")

        async def __aexit__(self, *_):
            """Python looks for it before it calls __aenter__."""

    def _in_loop(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Have the background loop do something, and wait for it."""
        check_not_finalizing(self.name)
        hold = LoopThread.hold()  # Ctrl-C may strike before the `try`: then it is dropped
        try:
            return hold.thread.call(work())
        finally:
            hold.release()

    def _open_runner(self) -> BlockingRunner:
        """The runner, in a forked child a new one."""
        with self._fork_lock:
            if self._forked:
                self.open(wait=False)
                self._forked = False
        runner = self._pool._runner
        if runner is None:
            raise self._pool._not_open()
        return runner

    # --- connections ----------------------------------------------------------------------------------------

    def acquire(self, timeout: float | Default | None = DEFAULT) -> AbstractContextManager[C]:
        """A connection for a block: `with pool.acquire() as conn`. It commits at its end, rolls back after an
        exception, and gives the connection back.

        `timeout` is seconds, by default `acquire_timeout`; None waits for ever, 0 does not wait. Entering raises as
        `getconn` does.
        """
        frame = _getframe(1)
        return self._acquisition(timeout, frame.f_code, frame.f_lasti)

    def transaction(
        self, timeout: float | Default | None = DEFAULT, *, track_outcome: bool = False
    ) -> AbstractContextManager[C]:
        """A connection inside a transaction, also with autocommit: `with pool.transaction() as conn`.

        `track_outcome` takes one more round trip before the COMMIT, to learn the transaction's id, by which
        `commit_status()` can find out what became of it if the connection is lost in the midst of the COMMIT.

        Raises as `acquire()` does, what the COMMIT raises, CommitOutcomeUnknown if it was lost, and PoolError if
        the block ends in a failed transaction, which is rolled back.
        """
        check_bool("track_outcome", track_outcome)
        frame = _getframe(1)
        acquisition = self._acquisition(timeout, frame.f_code, frame.f_lasti)
        return _in_transaction(self.name, acquisition, track_outcome=track_outcome)

    def commit_status(self, error: CommitOutcomeUnknown, timeout: float | Default | None = DEFAULT) -> CommitStatus:
        """What became of a transaction whose COMMIT was lost, as `Pool.commit_status` says it. Raises as that does."""
        if (known := known_status(error)) is not None:
            return known
        frame = _getframe(1)
        with self._acquisition(timeout, frame.f_code, frame.f_lasti) as connection, connection.lock:
            return connection.wait(ask_status(cast(PooledBlockingConnection, connection), error))

    def _acquisition(self, timeout: float | Default | None, code: CodeType, offset: int) -> BlockingAcquisition[C]:
        if timeout is not DEFAULT:
            check_timeout("timeout", timeout)
        return BlockingAcquisition(lambda: self._lease(timeout, code, offset), self._finish_interrupted)

    def getconn(self, key: Hashable = None, *, timeout: float | Default | None = DEFAULT) -> C:
        """A connection, for `putconn` to give back. The same `key` gets the same connection until then.

        `timeout` is seconds, by default `acquire_timeout`; None waits for ever, 0 does not wait.

        Raises PoolTimeout, PoolClosed, TooManyWaiting; PoolError if the server's refusal is final and there is no
        connection. Ctrl-C while waiting leaves nothing behind.
        """
        frame = _getframe(1)
        if key is None and timeout is DEFAULT:
            # `_lend` in line: a call less, of the ten that there are to getconn and putconn.
            runner = self._pool._runner
            if runner is not None and runner.is_plain and _get_running_loop() is None:
                now = monotonic()
                connection = runner.machine.lend(now, now - WATCH_STALENESS, frame.f_code, frame.f_lasti)
                if connection is not None:
                    return connection  # type: ignore[no-any-return]  # a C
        if timeout is not DEFAULT:
            check_timeout("timeout", timeout)
        return self._lease_for(key, timeout, frame.f_code, frame.f_lasti)

    def _lend(self, frame: FrameType) -> C | None:
        """A connection, if one was seen alive so lately that it can be had without looking at it."""
        runner = self._pool._runner
        if runner is None or not runner.is_plain or _get_running_loop() is not None:
            return None
        now = monotonic()
        return runner.machine.lend(now, now - WATCH_STALENESS, frame.f_code, frame.f_lasti)  # type: ignore[no-any-return]  # a C

    def _lease_for(self, key: Hashable, timeout: Timeout, code: CodeType, offset: int) -> C:
        if key is None:
            return self._lease(timeout, code, offset)  # type: ignore[no-any-return]  # a C
        try:
            hash(key)
        except Exception as error:
            raise TypeError(f"key is unhashable: {shown(key)}") from error
        seconds = self._pool._config.acquire_timeout if isinstance(timeout, Default) else timeout
        deadline = monotonic() + seconds if isinstance(seconds, (int, float)) else None
        while True:
            with self._keys_lock:
                keyed = self._keyed.setdefault(key, _KeyedLease())
            if not keyed.lock.acquire(timeout=-1 if deadline is None else _until(deadline)):
                words = f"another thread is still waiting for the connection of key {shown(key)}"
                raise PoolTimeout(f"{self.name}: {words}", pool=self.name)
            try:
                if self._keyed.get(key) is not keyed:
                    continue  # its connection was put back meanwhile
                if not keyed.is_leased:
                    if deadline is not None:
                        timeout = max(0.0, deadline - monotonic())
                    keyed.connection = self._lease(timeout, code, offset)
                    keyed.lease = keyed.connection._session.lease
                return keyed.connection  # type: ignore[no-any-return]  # a C
            finally:
                if not keyed.is_leased:
                    self._keyed.pop(key, None)
                keyed.lock.release()

    def _lease(self, timeout: Timeout, code: CodeType, offset: int) -> Any:
        if _get_running_loop() is not None:
            self._warn_of_loop()
        runner = self._pool._runner
        if runner is None:
            runner = self._open_runner()
        return runner.lease(timeout, code, offset)

    def putconn(self, connection: C, key: Hashable = None, close: bool = False) -> None:
        """Give a connection back, in any condition; with `close`, to be closed. A transaction left open is rolled back
        in the background.

        Raises PoolError for a connection that was given back already or is not the pool's; neither changes anything.
        """
        pooled: Any = connection
        runner = self._pool._runner
        try:
            session, leases = pooled._session, pooled._pool
        except Exception:  # noqa: BLE001  # of whatever kind: it is no connection of a pool
            raise PoolError(f"{self.name}: this connection is not of this pool: {shown(connection)}") from None
        if close is not False:
            close = is_true("close", close)
        lease = session.lease
        if runner is None or leases is not runner.leases or lease <= NOT_LEASED:
            self._check_severed(pooled, leases)
        try:
            if (
                not (session.touched or close or self._keyed)
                and session.pgconn.transaction_status == IDLE
                and runner is not None
                and runner.machine.take_back(pooled, session, lease, monotonic())
            ):
                return
            if session.lease not in (lease, SEVERED):
                raise PoolError(f"{self.name}: {RELEASED}")
            ensure_stack()
            if self._keyed:
                self._forget_key(connection)
            if close:
                leases.discard_lease(pooled, CloseReason.DISCARDED)
            elif not leases.give_back_clean(pooled):
                leases.end_lease(pooled)
        except psycopg.Error:
            raise
        except BaseException:  # no error of the connection's or the pool's
            self._finish_interrupted(connection, lease)
            raise

    def _finish_interrupted(self, connection: C, lease: int) -> None:
        """Ctrl-C, or a lack of memory, has struck while a connection was given back: that is done all the same."""
        runner = self._pool._runner
        pooled: Any = connection
        if runner is not None and pooled._pool is runner.leases:
            runner.finish_interrupted(pooled, lease)

    def _check_severed(self, connection: Any, leases: object) -> None:
        """Raise PoolError unless this connection is one that was leased when the pool was closed."""
        lease = connection._session.lease
        if not isinstance(leases, Leases):
            raise PoolError(f"{self.name}: this connection is not of this pool")
        leases.check_pool(self._pool._config)
        if lease != SEVERED:
            raise PoolError(f"{self.name}: {UNUSABLE.get(lease, 'this connection is not leased')}")

    def _forget_key(self, connection: C) -> None:
        with self._keys_lock:
            for key, keyed in list(self._keyed.items()):  # a finalizer may be here as well
                if keyed.connection is connection:
                    self._keyed.pop(key, None)
                    return

    def _warn_of_loop(self) -> None:
        """Once for each pool."""
        if not self._warned_of_loop:
            self._warned_of_loop = True
            logger.warning(
                "%s: a blocking pool is used in a thread that runs an event loop, which stands still meanwhile: use"
                " Pool there; this is said once",
                self.name,
            )

    # --- one-shot statements --------------------------------------------------------------------------------

    def execute(
        self, query: Query, params: Params | None = None, *, timeout: float | None = None, retry: bool = False
    ) -> str:
        """Run one statement in a transaction of its own, on a connection that other threads' statements are under way
        on too; what the server says of it: `INSERT 0 1`. As `Pool.execute`, which says what it raises.

        After Ctrl-C what was not sent is never sent; of what was sent nobody knows the end.
        """
        return self._one_shot(query, params, timeout, retry).status_message()

    @overload
    def fetch(
        self: SyncPool[Connection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> list[Row]: ...
    @overload
    def fetch(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: RowFactory[Row],
        binary: bool = False,
    ) -> list[Row]: ...
    @overload  # a subclass of psycopg's connection does not tell its rows
    def fetch(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> list[Any]: ...
    def fetch(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: RowFactory[Any] | None = None,
        binary: bool = False,
    ) -> list[Any]:
        """As `execute`, but all rows, made by `row_factory` or the pool's; none of a statement without a result.
        `binary` asks for the binary format.
        """
        statement = self._one_shot(query, params, timeout, retry, binary, row_factory)
        rows = statement.rows(row_factory)
        if rows is None:
            rows = []
            for _ in statement.rows_at_leisure(row_factory, rows):
                pass  # the interpreter gives other threads their turn
        return rows

    @overload
    def fetchrow(
        self: SyncPool[Connection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> Row | None: ...
    @overload
    def fetchrow(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: RowFactory[Row],
        binary: bool = False,
    ) -> Row | None: ...
    @overload  # a subclass of psycopg's connection does not tell its rows
    def fetchrow(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> Any: ...
    def fetchrow(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: RowFactory[Any] | None = None,
        binary: bool = False,
    ) -> Any:
        """As `fetch`, but the first row, or None."""
        return self._one_shot(query, params, timeout, retry, binary, row_factory).row(row_factory)

    def fetchval(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        binary: bool = False,
    ) -> Any:
        """As `fetch`, but the first column of the first row, or None."""
        return self._one_shot(query, params, timeout, retry, binary).value()

    def executemany(self, query: Query, params_seq: Iterable[Params]) -> int:
        """Run a statement for each set of parameters, all in one transaction on a connection of its own. How many rows
        that has changed. Raises as `transaction()` and `execute()` do.
        """
        pace_of(Paces(), query, self.name)
        frame = _getframe(1)
        with self._acquisition(DEFAULT, frame.f_code, frame.f_lasti) as connection, connection.transaction():
            cursor = (RawCursor if has_raw_cursors(connection) else Cursor)(connection)
            cursor.executemany(query, params_seq)
            return max(0, cursor.rowcount)

    def _one_shot(
        self,
        query: Query,
        params: Params | None,
        timeout: float | None,
        retry: bool,
        binary: bool = False,
        row_factory: Any = None,
    ) -> OneShot:
        if _get_running_loop() is not None:
            self._warn_of_loop()
        runner = self._pool._runner
        if runner is None:
            runner = self._open_runner()
        check_one_shot(timeout, retry, binary, row_factory)
        frame = _getframe(2)
        statement = ThreadOneShot(query, params, timeout, retry=retry, binary=binary)
        runner.submissions.run(statement, frame.f_code, frame.f_lasti)
        return statement

    # --- administration -------------------------------------------------------------------------------------

    def resize(self, min_size: int, max_size: int) -> None:
        """Change the bounds, at once. Idle connections in excess are closed, those in use when given back.

        Raises TypeError or ValueError for impossible sizes.
        """

        async def resize() -> None:
            self._pool.resize(min_size, max_size)

        if self._pool._runner is None:
            self._pool.resize(min_size, max_size)
        else:
            self._in_loop(resize)

    def drain(self) -> None:
        """Replace every connection: idle ones at once, those in use when given back. Raises PoolClosed."""

        async def drain() -> None:
            self._pool.drain()

        self._open_runner()
        self._in_loop(drain)

    def check(self) -> None:
        """Ping every idle connection, and close those that do not answer within `check_timeout`. Raises PoolClosed."""
        self._open_runner()
        self._in_loop(self._pool.check)

    def stats(self) -> PoolStats:
        """The sizes now, all 0 of a closed pool, and the totals since it was last opened."""
        return self._pool.stats()

    def holders(self) -> list[Holder]:
        """The connections in use, the one held longest first."""
        return self._pool.holders()

    def observe(self, observer: Observer) -> Observation:
        """Have `observer` called for every event from now on, in a thread of its own; as `Pool.observe`."""
        return self._pool.observe(observer)

    def _forget_parent(self) -> None:
        """In a forked child: start anew, as empty as a new pool."""
        runner = self._pool._runner
        self._keys_lock = RLock()  # another thread may have held them
        self._fork_lock = RLock()
        self._keyed.clear()
        if runner is not None:
            self._forked = runner.machine.phase in (PoolPhase.OPENING, PoolPhase.OPEN)
            self._pool._runner = None
            runner.disown()


def _until(deadline: float) -> float:
    """The seconds to wait, no more than a lock takes."""
    return min(max(0.0, deadline - monotonic()), TIMEOUT_MAX)


@contextmanager
def _in_transaction(name: str, acquisition: BlockingAcquisition[C], *, track_outcome: bool) -> Iterator[C]:
    with acquisition as connection:
        pooled = cast(PooledBlockingConnection, connection)
        try:
            with connection.transaction():
                yield connection
                check_not_failed(name, pooled)
                if track_outcome:
                    with connection.lock:
                        connection.wait(track(pooled))
        finally:
            pooled._session.mark = None


_all_pools: weakref.WeakSet[SyncPool[Any]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in _all_pools:
        pool._forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
