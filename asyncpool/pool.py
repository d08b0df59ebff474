"""Pool: the asyncio connection pool."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from threading import get_ident
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, Unpack, cast, overload

import anyio
from psycopg import AsyncConnection
from psycopg.abc import Params, Query
from psycopg.rows import AsyncRowFactory, TupleRow

from ._core.states import PoolPhase
from ._io.acquisition import DEFAULT, Acquisition, Default, Elsewhere, check_not_failed
from ._io.commit import ask_status, known_status, track
from ._io.connection import PooledConnection
from ._io.driver import Conninfo, Driver, check_event_loop
from ._io.holders import holders_of
from ._io.leases import Leases
from ._io.log import logger
from ._io.monitor import listen
from ._io.observation import Observation, Observations
from ._io.one_shot import TaskOneShot, one_shot, rows_of, run_many
from ._io.refusals import timed_out
from ._io.runner import Runner
from ._io.session import NOT_LEASED, POOLS_OWN
from ._io.statement import pace_of
from ._io.statistics import stats_of
from .config import (
    OPTION_NAMES,
    PoolConfig,
    check_bool,
    check_connection_options,
    check_one_shot,
    check_sizes,
    check_timeout,
    shown,
    split_options,
)
from .conninfo import CONNECT_OPTIONS, check_option_names
from .errors import CommitOutcomeUnknown, PoolClosed, PoolError
from .events import CommitStatus, Holder, Observer, PoolStats
from .options import Options

_NOT_A_LEASE = (NOT_LEASED, POOLS_OWN)
_getframe = sys._getframe

if TYPE_CHECKING:
    # The default, which `typing` has from 3.13 on, is for annotations that say `Pool` alone.
    from typing_extensions import TypeVar

    C = TypeVar("C", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow])
else:
    from typing import TypeVar

    C = TypeVar("C", bound=AsyncConnection[Any])
Row = TypeVar("Row")

# How long `async with pool` waits at its end for connections that are still leased, in seconds; psycopg_pool's value.
CLOSE_TIMEOUT = 5.0


class Pool(Generic[C]):
    """Connections to one database, shared by the tasks of one event loop.

    `conninfo` is a libpq connection string, or a callable, sync or async, that is asked for one at every physical
    connect. The keywords are the pool's options and psycopg's and libpq's connection parameters. The constructor
    does no I/O: `async with` the pool, or `await pool.open()`.

    Raises TypeError for an unknown or mistyped option, ValueError for one out of range, and
    psycopg.ProgrammingError for a malformed conninfo.
    """

    _runner: Runner | None = None
    # What a SyncPool has in their place.
    _runner_class: type[Runner] = Runner
    _driver_class: type[Driver] = Driver
    _class_name = "Pool"
    _warns_at_exit = True
    _how_to_open = "use `async with Pool(...) as pool`, or `await pool.open()`"
    _how_to_close = "use `async with`, or `await pool.close()`"

    @overload
    def __init__(
        self: Pool[AsyncConnection[TupleRow]], conninfo: Conninfo = "", **options: Unpack[Options]
    ) -> None: ...
    @overload
    def __init__(
        self: Pool[AsyncConnection[Row]],
        conninfo: Conninfo = "",
        *,
        row_factory: AsyncRowFactory[Row],
        **options: Unpack[Options],
    ) -> None: ...
    @overload
    def __init__(
        self,
        conninfo: Conninfo = "",
        *,
        connection_class: type[C],
        row_factory: AsyncRowFactory[Any] | None = None,
        **options: Unpack[Options],
    ) -> None: ...
    def __init__(self, conninfo: Conninfo = "", **options: Any) -> None:
        own, given = split_options(options)
        check_option_names(given, CONNECT_OPTIONS | OPTION_NAMES | {"connection_class"}, self._class_name)
        check_connection_options(given, self._driver_class.connection_class, self._driver_class.cursor_class)
        self._config = PoolConfig(**own)
        self._driver = self._driver_class(self._config, conninfo, given)
        self._sizes = self._config.min_size, self._config.max_size
        self._observations = Observations(self._config.name)
        self._made_by = os.getpid()

    def __repr__(self) -> str:
        runner = self._runner
        state = "closed" if runner is None else f"{runner.phase.name.lower()}, {runner.describe()}"
        return f"<{self._class_name} {self.name!r} {state}>"

    @property
    def name(self) -> str:
        """The pool's name in logs and errors."""
        return self._config.name

    # --- life cycle -----------------------------------------------------------------------------------------

    async def open(self, *, wait: bool = True, timeout: float | Default | None = DEFAULT) -> None:
        """Connect `min_size` connections. A pool that is open already is left as it is.

        `wait=False` returns at once and connects in the background. `timeout` is seconds, by default
        `acquire_timeout`; None waits for ever; 0 makes one round and raises its error.

        Raises the server's own error if it is final (wrong password, unknown database), and PoolTimeout, with the
        last connect error as its cause, if the server is not there in time; PoolError if it cannot listen where the
        `monitor` option says. After an error, or a cancellation, the pool is closed, for which sessions that were
        there, or half there, are given up to `check_timeout`.
        """
        check_event_loop()
        limit = self._config.acquire_timeout if isinstance(timeout, Default) else timeout
        check_timeout("timeout", limit)
        check_bool("wait", wait)
        runner = self._runner_to_open(single_round=limit == 0)
        if not wait:
            return
        runner.opening_is_awaited = True
        try:
            await asyncio.wait((runner.opening,), timeout=limit or None)
            if not runner.opening.done():
                words = f"min_size={runner.machine.min_size} was not connected within {limit:g} s"
                raise timed_out(runner, words, limit or 0.0)
            if error := runner.opening.exception():
                raise error
            if runner.phase is not PoolPhase.OPEN:
                raise PoolClosed(f"{self.name} was closed while it was being opened")
        except BaseException:
            with anyio.CancelScope(shield=True):
                runner.close()
                await asyncio.wait((runner.closing,), timeout=2 * self._config.check_timeout)
            raise

    def _runner_to_open(self, *, single_round: bool) -> Runner:
        """The present runner if it is at work, else a new one that is opening."""
        runner = self._runner
        if runner is not None:
            if runner.loop.is_closed():
                runner.abandon()
            elif runner.phase is not PoolPhase.CLOSED:
                runner.check_loop()
                if runner.phase is PoolPhase.CLOSING:
                    raise PoolClosed(f"{self.name} is being closed: await close() before opening it again")
                return runner
        path = self._config.monitor
        listener = None if path is None else listen(path, self.name, made_by=self._made_by)
        debug = self._config.debug if self._config.debug is not None else sys.flags.dev_mode
        self._runner = runner = self._runner_class(self._config, self._driver, self._observations, debug=debug)
        runner.machine.min_size, runner.machine.max_size = self._sizes
        runner.open(single_round=single_round, listener=listener)
        return runner

    async def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Refuse new and waiting callers, and close every connection. A closed pool can be opened again.

        Waits up to `timeout` seconds (None: for ever) for the connections in use; then shuts those down, with a
        warning that names where they were acquired. After a cancellation the pool goes on closing by itself, but
        shuts no connection down that is in use.
        """
        check_timeout("timeout", timeout)
        runner = self._runner
        if runner is not None and runner.loop.is_closed():
            runner.abandon()
            self._runner = None
            return
        if runner is None or runner.phase is PoolPhase.CLOSED:
            return
        runner.check_loop()
        runner.close()
        if timeout != 0:
            await asyncio.wait((runner.closing,), timeout=timeout)
        if not runner.closing.done() and (holders := self.holders()):
            logger.log(
                logging.INFO if timeout == 0 else logging.WARNING,  # at once, whoever holds them: as was asked
                "%s: closing with connections in use (%d), acquired at %s",
                self.name,
                len(holders),
                "; ".join(holder.site for holder in holders),
            )
            runner.sever()
        await asyncio.wait((runner.closing,))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    if not TYPE_CHECKING:  # for who mistakes it for a SyncPool, or another pool
        connection = Elsewhere("use `async with pool.acquire() as conn`")
        getconn = Elsewhere("use `await pool.acquire()`, or `async with pool.acquire() as conn`")
        putconn = Elsewhere("use pool.release(conn)")

        def __enter__(self):
            raise TypeError(f"{self._class_name} wants `async with`; SyncPool is the one for `with`")

        def __exit__(self, *_):
            """Python looks for it before it calls __enter__."""

    def __del__(self, _warn: Any = warnings.warn) -> None:
        runner = self._runner
        if runner is None or runner.machine.phase is PoolPhase.CLOSED:
            return
        try:
            runner.let_go()
        finally:
            if self._warns_at_exit or not sys.is_finalizing():
                _warn(f"{self.name} was dropped without being closed: {self._how_to_close}", ResourceWarning)

    # --- connections ----------------------------------------------------------------------------------------

    def acquire(self, timeout: float | Default | None = DEFAULT) -> Acquisition[C]:
        """A connection: `conn = await pool.acquire()`, or `async with pool.acquire() as conn`.

        `timeout` is seconds, by default `acquire_timeout`; None waits for ever, 0 does not wait. The block commits
        at its end, rolls back after an exception, and gives the connection back; awaited by hand, it is for
        `release()` to give back.

        Raises PoolTimeout, PoolClosed, TooManyWaiting; PoolError if the server's refusal is final and
        there is no connection. A cancellation leaves nothing behind.
        """
        runner = self._runner
        if runner is None:
            raise self._not_open()
        if timeout is not DEFAULT:
            check_timeout("timeout", timeout)
        frame = _getframe(1)
        return Acquisition(runner, timeout, frame.f_code, frame.f_lasti)

    def release(self, connection: C) -> Awaitable[None]:
        """Give a connection back, in any condition. A transaction left open is rolled back in the background.

        It acts when it is called; what it returns is finished and may be awaited or not, so that no cancellation
        can come in between. Raises PoolError for a connection that was released already or is not the pool's,
        WrongLoop outside the pool's event loop; neither changes anything.
        """
        runner = self._runner
        try:
            leases: Any = connection._pool
        except Exception:  # noqa: BLE001  # of whatever kind: it is no connection
            leases = None
        if runner is None or leases is not runner.leases:
            if not isinstance(leases, Leases):
                raise PoolError(f"{self.name}: this connection is not of this pool: {shown(connection)}")
            leases.check_former(self._config)
        elif get_ident() != runner.thread or not runner.loop.is_running():
            runner.check_loop()
        pooled: Any = connection  # a cast() takes time
        if pooled._session.lease in _NOT_A_LEASE:
            raise PoolError(f"{self.name}: this connection was released already")
        if not leases.give_back_clean(pooled):
            leases.end_lease(pooled)
        return leases.finished

    def transaction(
        self, timeout: float | Default | None = DEFAULT, *, track_outcome: bool = False
    ) -> AbstractAsyncContextManager[C]:
        """A connection inside a transaction, also with autocommit: `async with pool.transaction() as conn`.

        `track_outcome` takes one more round trip before the COMMIT, to learn the transaction's id, by which
        `commit_status()` can find out what became of it if the connection is lost in the midst of the COMMIT.

        Raises as `acquire()` does, what the COMMIT raises, CommitOutcomeUnknown if it was lost, and PoolError if
        the block ends in a failed transaction, which is rolled back.
        """
        check_bool("track_outcome", track_outcome)
        runner = self._runner
        if runner is None:
            raise self._not_open()
        if timeout is not DEFAULT:
            check_timeout("timeout", timeout)
        frame = _getframe(1)
        acquisition = Acquisition[C](runner, timeout, frame.f_code, frame.f_lasti)
        return _in_transaction(self.name, acquisition, track_outcome=track_outcome)

    async def commit_status(
        self, error: CommitOutcomeUnknown, timeout: float | Default | None = DEFAULT
    ) -> CommitStatus:
        """What became of a transaction whose COMMIT was lost, as a server of this pool knows it: committed, aborted,
        in progress, nothing written, or unknown. It is for blocks of `transaction(track_outcome=True)`, and unknown of
        all others.

        A connection is acquired for it, within `timeout` seconds. On another cluster or timeline, as after a failover,
        the answer is unknown; also after a crash of the server, if it says committed: it may say so of a later
        transaction, which got the id again that had not reached the disk. In progress may be a session that has not
        noticed the loss; the server can be asked again.

        Raises as `acquire()` does, and psycopg.OperationalError if the connection is lost.
        """
        if (known := known_status(error)) is not None:
            return known
        if timeout is not DEFAULT:
            check_timeout("timeout", timeout)
        frame = _getframe(1)
        acquisition = Acquisition[C](self._open_runner(), timeout, frame.f_code, frame.f_lasti)
        async with acquisition as connection, connection.lock:
            return await connection.wait(ask_status(cast(PooledConnection, connection), error))

    # --- one-shot statements --------------------------------------------------------------------------------

    async def execute(
        self, query: Query, params: Params | None = None, *, timeout: float | None = None, retry: bool = False
    ) -> str:
        """Run one statement in a transaction of its own, on a connection that other callers' statements are under way
        on too; what the server says of it: `INSERT 0 1`.

        A statement waits up to `acquire_timeout` for a connection. `timeout` is seconds for the whole call; None: no
        limit beyond that. `retry` declares that it only reads: it is sent again if its connection is lost.

        Raises psycopg's errors for this statement alone; psycopg.ProgrammingError for a command that needs a connection
        of its own; PoolTimeout, PoolClosed, TooManyWaiting and PoolDeadlock if it was not sent; StatementTimeout and
        StatementOutcomeUnknown if it was, and nobody knows its end. After a cancellation what was not sent is never
        sent. Of what was sent nobody knows the end either: it is executed, and its result dropped; or, if it is one
        that is known to be slow and has a connection of its own, the server is asked to cancel it.
        """
        return (await self._one_shot(query, params, timeout, retry)).status_message()

    @overload
    async def fetch(
        self: Pool[AsyncConnection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> list[Row]: ...
    @overload
    async def fetch(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: AsyncRowFactory[Row],
        binary: bool = False,
    ) -> list[Row]: ...
    @overload  # a subclass of psycopg's connection does not tell its rows
    async def fetch(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> list[Any]: ...
    async def fetch(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: AsyncRowFactory[Any] | None = None,
        binary: bool = False,
    ) -> list[Any]:
        """As `execute`, but all rows, made by `row_factory` or the pool's; none of a statement without a result.
        `binary` asks for the binary format. Many rows are made in turns with other tasks' work.
        """
        statement = await self._one_shot(query, params, timeout, retry, binary, row_factory)
        return await rows_of(statement, row_factory)

    @overload
    async def fetchrow(
        self: Pool[AsyncConnection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> Row | None: ...
    @overload
    async def fetchrow(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: AsyncRowFactory[Row],
        binary: bool = False,
    ) -> Row | None: ...
    @overload  # a subclass of psycopg's connection does not tell its rows
    async def fetchrow(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: None = None,
        binary: bool = False,
    ) -> Any: ...
    async def fetchrow(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        row_factory: AsyncRowFactory[Any] | None = None,
        binary: bool = False,
    ) -> Any:
        """As `fetch`, but the first row, or None."""
        return (await self._one_shot(query, params, timeout, retry, binary, row_factory)).row(row_factory)

    async def fetchval(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        retry: bool = False,
        binary: bool = False,
    ) -> Any:
        """As `fetch`, but the first column of the first row, or None."""
        return (await self._one_shot(query, params, timeout, retry, binary)).value()

    async def executemany(self, query: Query, params_seq: Iterable[Params]) -> int:
        """Run a statement for each set of parameters, all in one transaction on a connection of its own. How many rows
        that has changed.

        Raises as `transaction()` and `execute()` do. A cancellation rolls back, unless it comes during the COMMIT.
        """
        runner = self._open_runner()
        pace_of(runner.multiplexer.paces, query, self.name)
        frame = _getframe(1)
        acquisition = Acquisition[C](runner, DEFAULT, frame.f_code, frame.f_lasti)
        return await run_many(acquisition, query, params_seq)

    def _one_shot(
        self,
        query: Query,
        params: Params | None,
        timeout: float | None,
        retry: bool,
        binary: bool = False,
        row_factory: Any = None,
    ) -> TaskOneShot:
        runner = self._runner
        if runner is None:
            raise self._not_open()
        check_one_shot(timeout, retry, binary, row_factory)
        return one_shot(runner, query, params, timeout, retry=retry, binary=binary)

    # --- administration -------------------------------------------------------------------------------------

    def resize(self, min_size: int, max_size: int) -> None:
        """Change the bounds, at once. Idle connections in excess are closed, leased ones when given back.

        Raises TypeError or ValueError for impossible sizes.
        """
        check_sizes(min_size, max_size)
        runner = self._runner
        if runner is not None and runner.phase is not PoolPhase.CLOSED:
            runner.check_loop()
            runner.perform(runner.machine.resize(min_size, max_size, monotonic()))
        self._sizes = min_size, max_size

    def drain(self) -> None:
        """Replace every connection: idle ones at once, leased ones when given back. Raises PoolClosed."""
        runner = self._open_runner()
        runner.perform(runner.machine.drain(monotonic()))

    async def check(self) -> None:
        """Ping every idle connection, and close those that do not answer within `check_timeout`. Raises PoolClosed."""
        runner = self._open_runner()
        runner.perform(runner.machine.check(monotonic()))
        await runner.wait_for_checks()

    def stats(self) -> PoolStats:
        """The sizes now, all 0 of a closed pool, and the totals since it was last opened. Any thread may ask."""
        return stats_of(self.name, self._sizes, self._runner, self._driver.abandoned)

    def holders(self) -> list[Holder]:
        """The connections in use, the one held longest first. Any thread may ask."""
        runner = self._runner
        if runner is None or runner.phase is PoolPhase.CLOSED:
            return []
        return holders_of(runner.machine.leases(), monotonic())

    def observe(self, observer: Observer) -> Observation:
        """Have `observer` called for every event from now on (see `asyncpool.events`), one after the other, in a thread
        of its own, some 20 ms after it has happened; until `stop()` of what is returned.

        Its errors are logged, and its pace is not the pool's: if it is more than 100,000 events behind, what comes then
        is not told, which the log says. It ends with the pool, unless the observer itself refers to that. Raises
        TypeError if it cannot be called.
        """
        if not callable(observer):
            raise TypeError(f"observer must be a callable that takes an event, not {shown(observer)}")
        observation = self._observations.add(observer)
        ending = weakref.finalize(self, observation.stop)
        ending.atexit = False
        observation.at_stop = ending.detach  # else the pool would keep it, and the observer
        return observation

    # --- refusals -------------------------------------------------------------------------------------------

    def _open_runner(self) -> Runner:
        runner = self._runner
        if runner is None or runner.phase not in (PoolPhase.OPENING, PoolPhase.OPEN):
            raise self._not_open()
        runner.check_loop()
        return runner

    def _not_open(self) -> PoolClosed:
        return PoolClosed(f"{self.name} is not open: {self._how_to_open}")


@asynccontextmanager
async def _in_transaction(name: str, acquisition: Acquisition[C], *, track_outcome: bool) -> AsyncIterator[C]:
    async with acquisition as connection:
        pooled = cast(PooledConnection, connection)
        try:
            async with connection.transaction():
                yield connection
                check_not_failed(name, pooled)
                if track_outcome:
                    async with connection.lock:
                        await connection.wait(track(pooled))
        finally:
            pooled._session.mark = None
