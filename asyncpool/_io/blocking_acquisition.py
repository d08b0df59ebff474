"""A lease of a thread's: a block that commits at its end, and the end itself, whatever strikes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psycopg
from psycopg import Connection

from .acquisition import Elsewhere, check_not_undone, has_to_commit
from .connection import Leased
from .leases import Leases
from .locked_machine import ensure_stack
from .session import IDLE, SEVERED, Session

C = TypeVar("C", bound=Connection[Any])


class BlockingLeases(Leases):
    """Ends a lease in the thread that had it, whatever strikes meanwhile."""

    finish_interrupted: Callable[[Any, int], None]  # the runner's
    take_back: Callable[[Any, Session, int, float], bool]  # the machine's

    def end_lease(self, connection: Leased, *, after_block: bool = False) -> None:
        """Take a connection back, in whatever condition it is."""
        ensure_stack()
        lease = connection._session.lease
        try:
            super().end_lease(connection, after_block=after_block)
        except BaseException:
            self.finish_interrupted(connection, lease)
            raise


class BlockingAcquisition(Generic[C]):
    """A connection to be, for a `with` block that commits at its end."""

    __slots__ = ("_connection", "_finish_interrupted", "_lease", "_number")

    def __init__(self, lease: Callable[[], C], finish_interrupted: Callable[[C, int], None]) -> None:
        self._lease = lease
        self._finish_interrupted = finish_interrupted

    if not TYPE_CHECKING:  # for who takes it for a connection, or for what Pool.acquire() returns
        close, commit, cursor, execute, pipeline, rollback, transaction = (
            Elsewhere("use `with` on what acquire() returns to get a connection, or getconn()") for _ in range(7)
        )

        async def __aenter__(self):
            raise TypeError("what SyncPool.acquire() returns wants `with`; Pool is the one for `async with`")

        async def __aexit__(self, *_):
            """Python looks for it before it calls __aenter__."""

    def __enter__(self) -> C:
        connection: Any = self._lease()
        self._connection = connection
        session: Session = connection._session
        self._number = session.lease
        session.slot.owner = session.holder  # type: ignore[union-attr]  # it has one while it is leased
        return connection  # type: ignore[no-any-return]  # a C

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        connection: Any = self._connection
        try:
            self._end(connection, connection._session, connection._pool, is_normal=exc_type is None)
        except psycopg.Error:
            raise
        except BaseException:  # no error of the connection's or the pool's
            self._finish_interrupted(connection, self._number)
            raise

    def _end(self, connection: Any, session: Session, leases: BlockingLeases, *, is_normal: bool) -> None:
        if session.lease == self._number:
            if (
                not session.touched
                and session.pgconn.transaction_status == IDLE
                and leases.take_back(connection, session, self._number, monotonic())
            ):
                return
            ensure_stack()
            if session.lease == self._number and leases.give_back_clean(connection):
                return
        elif session.lease != SEVERED:
            if is_normal:
                check_not_undone(leases.name, session, self._number)
            return  # it was given back inside the block
        try:
            if is_normal and has_to_commit(leases.name, connection):
                connection.commit()
        finally:
            if session.lease in (self._number, SEVERED):
                leases.end_lease(connection, after_block=True)
