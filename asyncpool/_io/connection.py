"""The connection objects of a lease: psycopg's, with their waits and their close() the pool's."""

from __future__ import annotations

import asyncio
import copy
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from types import FunctionType
from typing import Any, Self, TypeAlias, TypeVar, cast

from psycopg import AsyncConnection, AsyncTransaction, BaseConnection, Connection, Transaction, pq
from psycopg import errors as e
from psycopg._connection_base import NoticeHandler, NotifyHandler
from psycopg._pipeline_base import BasePipeline
from psycopg.abc import PQGen, QueryNoTemplate
from psycopg.generators import copy_end, fetch_many
from psycopg.pq.abc import PGconn, PGresult
from psycopg.sql import Composable
from psycopg.transaction import BaseTransaction

from ..errors import PoolError, WrongLoop
from .commit import CommitPhase, is_commit, is_outcome_lost, outcome_unknown, run_commit
from .reader import BAD
from .session import ACTIVE, FORKED, IDLE, NOT_LEASED, SEVERED, Session

RV = TypeVar("RV")

TEXT = pq.Format.TEXT
UNKNOWN = pq.TransactionStatus.UNKNOWN

# Why a connection object cannot be used in a thread.
RELEASED = "this connection was released to its pool: acquire one in place of keeping it"
UNUSABLE = {
    NOT_LEASED: RELEASED,
    SEVERED: "this connection was shut down by its pool, which was closed or has waited too long for a callable",
    FORKED: "this connection belongs to the parent process: take one from the pool in this one",
}


class _Retired:
    """In place of a session, for a connection object that has none yet, or none any more."""

    lease = undone_lease = NOT_LEASED
    touched = False
    reader = slot = None
    commit = CommitPhase.NONE


class TouchedConnection(BaseConnection[Any]):
    """What the async and the blocking connections share: the session learns that its user has changed something."""

    _session: Session = cast(Session, _Retired())

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        self._session.touched = True

    def _exec_command(self, command: QueryNoTemplate, result_format: pq.Format = TEXT) -> PQGen[PGresult | None]:
        """What psycopg runs on its own account, such as BEGIN and COMMIT."""
        if isinstance(command, Composable):
            command = command.as_bytes(self)
        if is_commit(command):
            return run_commit(self, command)
        return super()._exec_command(command, result_format)

    def _raise_if_outcome_lost(self, error: BaseException) -> None:
        if is_outcome_lost(self):
            raise outcome_unknown(self) from error

    def _note_loss(self, session: Session) -> None:
        """The connection is found lost at the end of a wait: has its user anything to lose that he does not know of?"""
        if session.commit is CommitPhase.SETTLED:
            session.commit = CommitPhase.NONE
            session.in_transaction = False
        elif not self._autocommit:
            session.in_transaction = True

    # What changes these lists and maps does not set an attribute.

    def add_notice_handler(self, callback: NoticeHandler) -> None:
        self._session.touched = True
        super().add_notice_handler(callback)

    def remove_notice_handler(self, callback: NoticeHandler) -> None:
        self._session.touched = True
        super().remove_notice_handler(callback)

    def add_notify_handler(self, callback: NotifyHandler) -> None:
        self._session.touched = True
        super().add_notify_handler(callback)

    def remove_notify_handler(self, callback: NotifyHandler) -> None:
        self._session.touched = True
        super().remove_notify_handler(callback)

    def _renewed(self) -> Self:
        """An object of its own for the next lease of the same session, so that this one is useless for ever."""
        other = copy.copy(self)
        other._notice_handlers = list(self._notice_handlers)
        other._notify_handlers = list(self._notify_handlers)
        self._session = cast(Session, _Retired())
        pgconn = other.pgconn
        wself: weakref.ref[BaseConnection[Any]] = weakref.ref(other)
        pgconn.notice_handler = partial(BaseConnection._notice_handler, wself)
        pgconn.notify_handler = partial(BaseConnection._notify_handler, wself)
        return other


class PooledConnection(TouchedConnection, AsyncConnection[Any]):
    """Comes before a connection class in the bases of `pooled_class`, to take over its waits and its close()."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Drive a generator of psycopg, which does all I/O of a connection through this method.

        A cancellation ends the statement on the server and keeps the connection, within `cancel_timeout`; it is
        then re-raised. So is one that struck in the user's own code, inside a block of psycopg's that now ends. A
        ROLLBACK for which one is the reason is let end.
        `interval` is psycopg's and not needed here. Raises PoolError after the release.
        """
        session = self._session
        reader = session.reader
        self._check_use(session)
        gen = _whole(gen, self.pgconn)
        try:
            state = next(gen)
        except StopIteration as done:
            session.lift_limit()
            if getattr(gen, "gi_code", None) is not _PIPELINE_BEGIN:
                await self._let_others_run()
            result: RV = done.value
            return result
        except BaseException as error:
            session.refused_write |= isinstance(error, e.ReadOnlySqlTransaction)
            reader.stop_if_lost()
            self._raise_if_outcome_lost(error)
            raise
        future = reader.drive(gen, state)
        timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            timer = reader.loop.call_later(timeout, reader.expire)
        elif _ends_cancelled_block(gen):
            timer = reader.loop.call_later(session.cancel_timeout, session.sever)
        try:
            return await future
        except e.ReadOnlySqlTransaction:
            session.refused_write = True
            raise
        except asyncio.CancelledError:
            await self._end_wait(gen, half_way=future.cancelled(), ends_block=timer is not None and timeout is None)
            raise
        except GeneratorExit:
            session.sever()  # the coroutine was closed: nobody can wait for the statement's end
            raise
        except Exception as error:
            self._raise_if_outcome_lost(error)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            session.lift_limit()
            if self.pgconn.status != BAD:
                session.in_transaction = self.pgconn.transaction_status != IDLE
            else:
                self._note_loss(session)

    async def _let_others_run(self) -> None:
        try:
            await self._session.reader.let_others_run()
        except asyncio.CancelledError:
            await self._end_statement(None)
            raise

    def _check_use(self, session: Session) -> None:
        if session.lease == NOT_LEASED:
            raise PoolError(RELEASED)
        session.touched = True
        if asyncio.get_running_loop() is not session.reader.loop:
            raise WrongLoop("this connection belongs to a pool that was opened in another event loop")

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        """psycopg's block, which ends in silence if its connection was lost meanwhile: PoolError is raised there."""
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            yield transaction
        _check_not_lost(transaction)

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:
        """psycopg's way to end a COPY or a stream half-way. It then reads to the end, for which there is no more than
        `cancel_timeout`, whatever comes meanwhile. A cancellation that comes meanwhile is raised at that end.
        """
        session = self._session
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        await session.cancel_statement()
        session.limit_ending()
        if task.cancelling() > cancellations:
            await self._end_statement(None)
            raise asyncio.CancelledError

    async def _end_wait(self, gen: PQGen[Any], *, half_way: bool, ends_block: bool) -> None:
        """After a cancellation in the midst of a wait."""
        rest = gen if half_way else None
        if ends_block and getattr(gen, "gi_code", None) is _TRANSACTION_EXIT:
            await self._session.await_rollback(rest)
        else:
            await self._end_statement(rest)

    async def _end_statement(self, gen: PQGen[Any] | None) -> None:
        """After a cancellation. In pipeline mode there is something to end also before it was sent."""
        if self.pgconn.transaction_status == ACTIVE or (gen is not None and self.pgconn.pipeline_status):
            await self._session.end_statement(gen)

    async def close(self) -> None:
        """Give the connection back to its pool, which closes it if it cannot be used again.

        Like psycopg's, it may be called any number of times.
        """
        if self._session.lease > NOT_LEASED:
            await self._pool.putconn(self)  # type: ignore[union-attr]  # set for as long as it is leased


class PooledBlockingConnection(TouchedConnection, Connection[Any]):
    """The same for connections that threads use: the event loop has opened it, and each statement is waited for in
    the thread that runs it.
    """

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Drive a generator of psycopg, which does all I/O of a connection through this method.

        Ctrl-C ends the statement on the server and keeps the connection, as psycopg does it. Raises PoolError after
        the release.
        """
        session = self._session
        if session.lease in UNUSABLE:
            raise PoolError(UNUSABLE[session.lease])
        session.touched = True
        asks = getattr(gen, "gi_code", None) not in _MAY_BE_SILENT or self.pgconn.transaction_status != IDLE
        session.in_thread = True
        heard = False
        try:
            if session.lease in UNUSABLE:  # whoever severs looks at these two in the other order
                raise PoolError(UNUSABLE[session.lease])
            result = super().wait(_whole(gen, self.pgconn), interval, timeout)
            heard = asks
            return result
        except Exception as error:
            heard = isinstance(error, e.Error) and error.pgresult is not None
            session.refused_write |= isinstance(error, e.ReadOnlySqlTransaction)
            self._raise_if_outcome_lost(error)
            raise
        except BaseException:
            session.drop_results_in_thread()
            raise
        finally:
            session.in_thread = False  # first, as whoever severs looks at these two in the other order here too
            if session.lease in UNUSABLE:
                session.sever_in_thread()
            if heard:
                session.reader.answered_at = session.alive_at = monotonic()
            status = self.pgconn.transaction_status
            if status != UNKNOWN:
                session.in_transaction = status != IDLE
            else:
                session.leave_loop()
                self._note_loss(session)

    @contextmanager
    def transaction(self, savepoint_name: str | None = None, force_rollback: bool = False) -> Iterator[Transaction]:
        """psycopg's block, which ends in silence if its connection was lost meanwhile: PoolError is raised there."""
        with super().transaction(savepoint_name, force_rollback) as transaction:
            yield transaction
        _check_not_lost(transaction)

    def close(self) -> None:
        """Give the connection back to its pool, which closes it if it cannot be used again; or, if the pool is a
        drop-in for one that leaves that to `putconn`, close it.

        Like psycopg's, it may be called any number of times.
        """
        session = self._session
        if session.lease > NOT_LEASED:
            leases = cast(Any, self._pool)  # set for as long as it is leased
            if leases.close_returns:
                leases.end_lease(self)
            else:
                with self.lock:  # another thread may be in the midst of a statement
                    session.sever()


def _check_not_lost(transaction: BaseTransaction[Any]) -> None:
    if transaction.status is BaseTransaction.Status.FAILED and not transaction.force_rollback:
        raise PoolError("the connection was lost inside conn.transaction(), and what that did is not committed")


# These ask the server nothing when no transaction is open.
_MAY_BE_SILENT = frozenset(
    cast(FunctionType, function).__code__
    for function in (
        BaseConnection._commit_gen,
        BaseConnection._rollback_gen,
        BaseConnection._set_autocommit_gen,
        BaseConnection._set_isolation_level_gen,
        BaseConnection._set_read_only_gen,
        BaseConnection._set_deferrable_gen,
    )
)

# By these psycopg ends a block that was left.
_TRANSACTION_EXIT = cast(FunctionType, BaseTransaction._exit_gen).__code__
_PIPELINE_EXIT = cast(FunctionType, BasePipeline._exit_gen).__code__


def _whole(gen: PQGen[RV], pgconn: PGconn) -> PQGen[RV]:
    return _exit_whole(gen, pgconn) if getattr(gen, "gi_code", None) is _PIPELINE_EXIT else gen


def _exit_whole(gen: PQGen[RV], pgconn: PGconn) -> PQGen[RV]:
    """End a pipeline by psycopg's generator. If what fails is the COMMIT at its Sync, psycopg takes that error for the
    Sync's own end, which follows it, and could not leave the pipeline.
    """
    try:
        return (yield from gen)
    except (e.Error, IndexError) as ex:
        while pgconn.status != BAD and pgconn.pipeline_status and pgconn.transaction_status == ACTIVE:
            yield from fetch_many(pgconn)
        if isinstance(ex, IndexError) and (error := _not_raised(ex)) is not None:
            raise error from None  # the two came at once
        raise


def _not_raised(ex: IndexError) -> e.Error | None:
    """The server's error that psycopg held in its hands when it found an end that it did not expect."""
    tb = ex.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    found = tb.tb_frame.f_locals.get("exception") if tb is not None else None
    return found if isinstance(found, e.Error) else None


_BLOCK_ENDS = frozenset({_TRANSACTION_EXIT, cast(FunctionType, copy_end).__code__, _exit_whole.__code__})


# By this it begins one. A cancellation behind it would leave the block entered, and never to be left.
_PIPELINE_BEGIN = cast(FunctionType, BasePipeline._enter_gen).__code__


def _ends_cancelled_block(gen: PQGen[Any]) -> bool:
    """Whether a block of psycopg's is left because its user was cancelled in it."""
    return isinstance(sys.exception(), asyncio.CancelledError) and getattr(gen, "gi_code", None) in _BLOCK_ENDS


def describe_unfinished(connection: Leased) -> str:
    """What a connection is in the middle of, so that it cannot be used by anyone else; empty: nothing."""
    if connection._pipeline is not None or connection.pgconn.pipeline_status:
        return "in pipeline mode"
    if connection._num_transactions:
        return "inside conn.transaction()"
    if connection._tpc is not None:
        return "in a two-phase transaction"
    if connection.lock.locked():
        return "in the middle of a statement, COPY or stream()"
    if connection.pgconn.transaction_status == ACTIVE:
        return "with results half-read"
    return ""


Leased: TypeAlias = PooledConnection | PooledBlockingConnection

_classes: dict[type[BaseConnection[Any]], type[Leased]] = {
    AsyncConnection: PooledConnection,
    Connection: PooledBlockingConnection,
}


def pooled_class(connection_class: type[BaseConnection[Any]]) -> type[Leased]:
    """`connection_class` with the pool's waits and close(); isinstance() still holds for it."""
    if connection_class not in _classes:
        ours = PooledConnection if issubclass(connection_class, AsyncConnection) else PooledBlockingConnection
        name = f"Pooled{connection_class.__name__}"
        namespace = {"__module__": connection_class.__module__}
        _classes[connection_class] = cast("type[Leased]", type(name, (ours, connection_class), namespace))
    return _classes[connection_class]
