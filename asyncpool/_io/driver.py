"""What is done to connections: connect, ping, reset. Each has a deadline and says what its failure means."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

import anyio
from psycopg import AsyncConnection, AsyncCursor, BaseConnection, InterfaceError, OperationalError, ProgrammingError, pq
from psycopg import errors as e
from psycopg._preparing import PrepareManager
from psycopg.abc import ConnDict
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_attempts, make_conninfo
from psycopg.pq.abc import PGconn

from .._core.policy import ConnectFailure
from ..config import PoolConfig
from ..conninfo import PSYCOPG_OPTIONS, Redactor, needs_lookup, parse
from ..events import CloseReason
from .callables import Overdue, check_nothing_open, errors_of, name_of
from .client_state import Baseline
from .connect_errors import ConnectFailed, attempt_on, brief, failure_of, named, summary
from .connection import Leased, PooledConnection, pooled_class
from .daemon_thread import in_daemon_thread
from .libpq import set_verbose_errors
from .reader import BAD, duplicate, socket_of
from .role import role_of
from .session import IDLE, NOT_LEASED, POOLS_OWN, Session, linger
from .watch import peer_has_closed

T = TypeVar("T")

Conninfo = str | Callable[[], str | Awaitable[str]]

# `"discard"` is all the server offers; it must travel alone and outside a transaction. `"session"` leaves out
# what is no user's state, cached plans and sequence values, and travels in one message. Session authorization
# comes first, because what follows may need its rights.
_SESSION_RESET = (
    b"SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; DEALLOCATE ALL;"
    b" DISCARD TEMP; SELECT pg_catalog.pg_advisory_unlock_all()"
)
_DISCARD = b"DISCARD ALL"


# How long, in seconds, the end of a failed attempt is waited for when there is another address to try: many round
# trips to a server that lives, and next to nothing beside the connect_timeout that a dead one has cost already.
NEXT_HOST_PATIENCE = 0.1

# How long, in seconds, the end of an attempt is waited for that the server has not answered, from its beginning: one
# that is heard answers in a fraction of that, and from one that is silent no end is to be expected. At least as above.
SILENCE_PATIENCE = 1.0

_UNANSWERED = (pq.ConnStatus.STARTED, pq.ConnStatus.MADE, pq.ConnStatus.AWAITING_RESPONSE, pq.ConnStatus.SSL_STARTUP)


READ_ONLY = "the server has become read-only"


class Unusable(Exception):
    """A connection did not pass a check or a reset, for this reason."""

    def __init__(self, reason: CloseReason, words: str) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to make a connection object: psycopg's part of the options, and the class. Its repr has no secrets."""

    connection_class: type[BaseConnection[Any]]
    autocommit: bool
    prepare_threshold: int | None
    row_factory: Any
    cursor_factory: Any
    adapters: AdaptersMap | None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], default: type[BaseConnection[Any]]) -> ConnectionOptions:
        """From those of psycopg's keywords that were given."""
        context = options.get("context")
        return cls(
            connection_class=options.get("connection_class", default),
            autocommit=bool(options.get("autocommit", False)),
            prepare_threshold=options.get("prepare_threshold", 5),
            row_factory=options.get("row_factory"),
            cursor_factory=options.get("cursor_factory"),
            adapters=context.adapters if context is not None else None,
        )

    def make(self, pgconn: PGconn) -> Leased:
        """The connection object over an open PGconn, as psycopg's `connect()` would set it up."""
        connection = pooled_class(self.connection_class)(pgconn)
        connection._autocommit = self.autocommit
        connection.prepare_threshold = self.prepare_threshold
        if self.row_factory is not None:
            connection.row_factory = self.row_factory
        if self.cursor_factory is not None:
            connection.cursor_factory = self.cursor_factory
        if self.adapters is not None:
            connection._adapters = AdaptersMap(self.adapters)
        return connection


class Driver:
    """Makes, checks and resets the connections of one pool. Its repr shows no connection parameters."""

    connection_class: type[BaseConnection[Any]] = AsyncConnection
    cursor_class: type[Any] = AsyncCursor
    guard: AbstractContextManager[object] | None = None  # if threads use the connections: for who ends a session

    def __init__(self, config: PoolConfig, conninfo: Conninfo, given: Mapping[str, Any]) -> None:
        self._config = config
        self._conninfo = conninfo
        self._libpq_options = {name: value for name, value in given.items() if name not in _NOT_LIBPQ}
        self._options = ConnectionOptions.from_options(given, self.connection_class)
        # Given as an option of its own it is a float and holds for each host; libpq's would be whole seconds.
        self._connect_timeout = config.connect_timeout
        if isinstance(conninfo, str):
            parse(conninfo, self._libpq_options)
        elif not callable(conninfo):
            raise TypeError(f"conninfo must be a str or a callable that returns one, not {type(conninfo).__name__}")
        else:
            parse("", self._libpq_options)
        self.abandoned = 0
        self._last_good: tuple[object, ...] = ()  # the place of the last connection, to be tried first
        self._half_open: set[PGconn] = set()
        self._lingering: set[socket.socket] = set()

    # --- connect --------------------------------------------------------------------------------------------

    async def connect(self) -> Session:
        """A session that `configure` has seen. Raises ConnectFailed; a cancellation leaves no session behind."""
        conninfo, redactor = await self._ask_conninfo()
        attempts = await self._resolve(conninfo, redactor)
        failures: list[tuple[ConnDict, ConnectFailed]] = []
        for number, attempt in enumerate(attempts, 1):
            patience = self._config.check_timeout if number == len(attempts) else NEXT_HOST_PATIENCE
            try:
                pgconn = await self._connect_to(attempt, redactor, patience)
                break
            except ConnectFailed as failed:
                failures.append((attempt, failed))
        else:
            raise summary(failures)
        self._last_good = _place(attempt)
        return await self._set_up(pgconn)

    async def _ask_conninfo(self) -> tuple[ConnDict, Redactor]:
        conninfo: object = self._conninfo
        if callable(conninfo):
            try:
                with errors_of("conninfo", conninfo), anyio.fail_after(self._connect_timeout):
                    conninfo = await self._call_conninfo(conninfo)
            except Exception as ex:
                # Its words may hold what it was about to return.
                raised = ex.__cause__ if isinstance(ex, RuntimeError) and ex.__cause__ is not None else ex
                words = f"the conninfo callable raised {type(raised).__name__}"
                raise ConnectFailed(OperationalError(words), ConnectFailure.TRANSIENT) from None
        if not isinstance(conninfo, str):
            words = f"the conninfo callable must return a str, not {type(conninfo).__name__}"
            raise ConnectFailed(TypeError(words), ConnectFailure.FINAL)
        try:
            return parse(conninfo, self._libpq_options), Redactor(conninfo, self._libpq_options)
        except (ProgrammingError, TypeError) as error:
            raise ConnectFailed(error, ConnectFailure.FINAL) from None

    async def _call_conninfo(self, conninfo: Callable[[], object]) -> object:
        answer = conninfo()
        return await answer if inspect.isawaitable(answer) else answer

    async def _resolve(self, params: ConnDict, redactor: Redactor) -> list[ConnDict]:
        """One set of parameters for each address to try, in order."""
        params = {name: value for name, value in params.items() if name != "connect_timeout"}
        try:
            if not needs_lookup(params):
                return self._in_order(conninfo_attempts(params))
            with anyio.fail_after(self._connect_timeout):
                found = await in_daemon_thread(lambda: conninfo_attempts(params), "asyncpool: look up a host name")
            return self._in_order(found)
        except TimeoutError:
            hosts = redactor.mask(str(params.get("host")))
            words = f'host "{hosts}" not resolved within {self._connect_timeout:g} s'
            raise ConnectFailed(named(e.ConnectionTimeout, words), ConnectFailure.TRANSIENT) from None
        except e.Error as error:
            unknown = named(OperationalError, redactor.redact(str(error)))
            raise ConnectFailed(unknown, ConnectFailure.TRANSIENT) from None

    def _in_order(self, attempts: list[ConnDict]) -> list[ConnDict]:
        """The place of the last success first, among those of the same role, unless the load is to be spread."""
        if (attempts[0].get("load_balance_hosts") or os.environ.get("PGLOADBALANCEHOSTS")) == "random":
            return attempts
        first_role = attempts[0].get("target_session_attrs")  # with prefer-standby, all come once more behind these
        return sorted(
            attempts,
            key=lambda attempt: (
                attempt.get("target_session_attrs") != first_role,
                _place(attempt) != self._last_good,
            ),
        )

    async def _connect_to(self, attempt: ConnDict, redactor: Redactor, patience: float) -> PGconn:
        """One attempt on one address, within `connect_timeout`; `patience` is for the end of one that failed."""
        pgconn = pq.PGconn.connect_start(make_conninfo("", **attempt).encode())
        set_verbose_errors(pgconn, True)
        self._half_open.add(pgconn)
        began = monotonic()
        try:
            with anyio.move_on_after(self._connect_timeout):
                if await _poll_until_connected(pgconn):
                    pgconn.nonblocking = 1
                    set_verbose_errors(pgconn, False)
                    return pgconn
                raise failure_of(pgconn, redactor)
            words = f"connection timeout expired after {self._connect_timeout:g} s"
            error = named(e.ConnectionTimeout, attempt_on(attempt, redactor) + words)
            raise ConnectFailed(error, ConnectFailure.REFUSED)
        except BaseException:
            if pgconn.status in _UNANSWERED:
                patience = min(patience, max(NEXT_HOST_PATIENCE, began + SILENCE_PATIENCE - monotonic()))
            await self._give_up(pgconn, patience)
            raise
        finally:
            self._half_open.discard(pgconn)

    async def _give_up(self, pgconn: PGconn, patience: float) -> None:
        """Close a half-open connection, and wait until the server counts no session for it."""
        fd = socket_of(pgconn)
        sock = None
        with contextlib.suppress(OSError):  # no descriptor left: then the end is not waited for
            sock = duplicate(fd) if fd is not None else None
        pgconn.finish()
        if sock is not None:
            self._lingering.add(sock)
            with anyio.CancelScope(shield=True):
                confirmed = await linger(sock, patience)
                self.abandoned += not confirmed  # apart: `+= await` would add to what there was before the wait
            self._lingering.discard(sock)

    def abandon(self) -> None:
        """Close what half-done connects hold, when there is no event loop to wait in."""
        for pgconn in self._half_open:
            pgconn.finish()
        for sock in self._lingering:
            sock.close()
        self._half_open.clear()
        self._lingering.clear()

    def disown(self) -> object:
        """In a forked child: start anew. What is returned must be kept, as it is the parent's."""
        inherited = self._half_open, self._lingering
        self._half_open, self._lingering = set(), set()
        return inherited

    async def _set_up(self, pgconn: PGconn) -> Session:
        session = Session(pgconn, asyncio.get_running_loop(), self._config.cancel_timeout, guard=self.guard)
        session.role = role_of(pgconn)
        try:
            connection = self._options.make(pgconn)
            connection._session = session
            connection._pool = None
            session.connection = connection
            await self._configure(session)
        except BaseException:
            with anyio.CancelScope(shield=True):
                confirmed = await session.close(self._config.check_timeout)
                self.abandoned += not confirmed
            raise
        return session

    async def _configure(self, session: Session) -> None:
        if self._config.configure is not None:
            try:
                await self._call("configure", session)
            except Exception as ex:
                # One that did not end in time may have waited for a server that is not heard, which is no answer.
                unheard = session.is_lost or isinstance(ex, Overdue)
                failure = ConnectFailure.TRANSIENT if unheard else ConnectFailure.FINAL
                raise ConnectFailed(_as_error("configure", ex), failure, CloseReason.CONFIGURE_FAILED) from None
        session.baseline = Baseline(session.connection)

    # --- check and reset ------------------------------------------------------------------------------------

    async def check(self, session: Session) -> None:
        """Ask whether the connection works. Raises Unusable."""
        fd = socket_of(session.pgconn)
        if fd is None or session.pgconn.status == BAD or peer_has_closed(fd):
            raise Unusable(CloseReason.DISCONNECTED, "the server has closed the connection")
        try:
            if self._config.check is not None:
                await self._call("check", session)
                self._restore_client_state(session)
            if self._config.check is None or session.role is not None:
                with anyio.fail_after(self._config.check_timeout):
                    await self._ask_role(session)
        except Unusable:
            raise
        except Exception as ex:
            reason = CloseReason.DISCONNECTED if session.is_lost else CloseReason.CHECK_FAILED
            raise Unusable(reason, f"check: {brief(ex)}") from ex

    async def recycle(self, session: Session) -> None:
        """Roll back, and reset as the `reset` option says. Raises Unusable."""
        try:
            with anyio.fail_after(self._config.check_timeout):
                await self._roll_back(session)
                if self._config.reset == "session":
                    await session.command(_SESSION_RESET)
                elif self._config.reset == "discard":
                    await session.command(_DISCARD)
            self._restore_client_state(session)
            session.prepared = session.connection._prepared._prepared_idx
            if callable(self._config.reset):
                await self._call("reset", session)
                self._restore_client_state(session)
            elif self._config.reset != "rollback":
                session.connection._prepared = _anew(session.connection._prepared)
                self._restore_client_state(session)
                if self._config.configure is not None:
                    await self._call("configure", session)
                    session.baseline = Baseline(session.connection)
            if session.is_read_only:
                raise Unusable(CloseReason.READ_ONLY, READ_ONLY)
            if session.refused_write:
                session.refused_write = False
                with anyio.fail_after(self._config.check_timeout):
                    await self._ask_role(session)
        except Unusable:
            raise
        except Exception as ex:
            reason = CloseReason.DISCONNECTED if session.is_lost else CloseReason.RESET_FAILED
            raise Unusable(reason, f"reset: {brief(ex)}") from ex

    async def _ask_role(self, session: Session) -> None:
        """A round trip; for a pool that asked for a server of some role, with the question whether it still has it."""
        if session.role is None:
            await session.command(b"")
        elif session.role.is_denied(await session.command(session.role.question)):
            raise Unusable(CloseReason.READ_ONLY, READ_ONLY)

    async def _roll_back(self, session: Session) -> None:
        if session.pgconn.transaction_status == IDLE:
            return
        await session.command(b"ROLLBACK")
        if session.pgconn.transaction_status != IDLE:
            raise ProgrammingError("ROLLBACK did not end the transaction")
        prepared = session.connection._prepared
        if prepared._prepared_idx != session.prepared:
            # What was prepared in this lease may rely on what was rolled back, and would fail with 0A000.
            await session.command(b"DEALLOCATE ALL")
            session.connection._prepared = _anew(prepared)

    async def set_up_lease(self, connection: PooledConnection) -> None:
        """Run `setup`, which the caller waits for. Raises what it raises."""
        try:
            await self._run("setup", connection)
        except Overdue as ex:
            raise _as_error("setup", ex) from None

    def _restore_client_state(self, session: Session) -> None:
        assert session.baseline is not None
        session.baseline.restore(session.connection)

    async def _call(self, option: str, session: Session) -> None:
        """Lend an unleased connection to a callable of the user."""
        session.lease = POOLS_OWN
        try:
            await self._run(option, session.connection)
        finally:
            if session.lease == POOLS_OWN:
                session.lease = NOT_LEASED

    async def _run(self, option: str, connection: Any) -> None:
        """Run `configure`, `check`, `setup` or `reset` on a connection. Raises what it raises, or Overdue.

        What it leaves open is an error as well: the next user would inherit it.
        """
        callback = getattr(self._config, option)
        session: Session = connection._session
        lease = session.lease
        with errors_of(option, callback):
            await self._run_callback(callback, connection)
        if session.lease == lease:  # else `setup` has given it back, and it may be somebody else's
            check_nothing_open(callback, connection)

    async def _run_callback(self, callback: Callable[[Any], object], connection: Any) -> None:
        scope = anyio.CancelScope()
        session: Session = connection._session
        lease = session.lease

        def expire() -> None:
            # Nobody uses this connection again: its statement is not given `cancel_timeout` to end in good order.
            scope.cancel()
            if session.lease == lease:  # else `setup` has given it back, and then hung
                session.sever()

        limit = asyncio.get_running_loop().call_later(self._config.check_timeout, expire)
        try:
            with scope:
                answer = callback(connection)
                if not inspect.isawaitable(answer):
                    raise TypeError(f"{name_of(callback)} must be async: it returned {type(answer).__name__}")
                await answer
        except Exception:
            if not scope.cancel_called:
                raise
        finally:
            limit.cancel()
        if scope.cancel_called:
            raise Overdue("it did not end in time")


def _anew(prepared: PrepareManager) -> PrepareManager:
    """An empty cache of prepared statements that goes on with their numbers, to tell old from new."""
    empty = PrepareManager()
    empty._prepared_idx = prepared._prepared_idx
    return empty


def _place(attempt: ConnDict) -> tuple[object, ...]:
    return tuple(attempt.get(name) for name in ("host", "hostaddr", "port"))


_NOT_LIBPQ = PSYCOPG_OPTIONS | {"connection_class"}


async def _poll_until_connected(pgconn: PGconn) -> bool:
    """Drive libpq's connect without blocking. False when it failed; the PGconn has the words."""
    while pgconn.status != BAD:
        status = pgconn.connect_poll()
        if status == pq.PollingStatus.OK:
            return True
        if status == pq.PollingStatus.FAILED:
            return False
        await _wait_ready(pgconn.socket, reading=status == pq.PollingStatus.READING)
    return False


async def _wait_ready(fd: int, *, reading: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (loop.add_reader, loop.remove_reader) if reading else (loop.add_writer, loop.remove_writer)
    add(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(fd)


def _as_error(what: str, ex: Exception) -> Exception:
    """The user's own error, or one that says what took too long."""
    if isinstance(ex, Overdue):
        return OperationalError(f"{what} did not end in time")
    return ex


def check_event_loop() -> None:
    """Raise InterfaceError on the one event loop that psycopg cannot use."""
    loop = asyncio.get_running_loop()
    proactor = getattr(asyncio, "ProactorEventLoop", None)
    if proactor is not None and isinstance(loop, proactor):
        raise InterfaceError(
            "asyncpool cannot use the ProactorEventLoop, which cannot wait for psycopg's sockets: run"
            " asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop)"
        )
