"""The exceptions that asyncpool raises on its own account; the server's own errors pass through as psycopg's."""

from __future__ import annotations

from typing import Any

from psycopg import OperationalError
from psycopg.errors import TransactionResolutionUnknown

from .events import Holder


class PoolError(OperationalError):
    """Base of all errors of the pool. An OperationalError, so that code that handles those handles these."""


class PoolTimeout(PoolError, TimeoutError):
    """No connection within the time allowed. It tells who has them, and why that may be; the last connect error, if the
    pool has not connected since, is its `__cause__`. It can be pickled.
    """

    def __init__(
        self,
        *args: Any,
        pool: str = "",
        waited: float = 0.0,
        position: int | None = None,
        in_use: int = 0,
        idle: int = 0,
        connecting: int = 0,
        max_size: int = 0,
        holders: tuple[Holder, ...] = (),
        connect_error_age: float | None = None,
    ) -> None:
        super().__init__(*args)
        self.pool = pool
        """The pool's name."""
        self.waited = waited
        """For how many seconds."""
        self.position = position
        """The caller's place in the queue when its time was over, 1 for the next in turn. None if it stood in none, as
        for one-shot statements, or too far back to be counted.
        """
        self.in_use = in_use
        self.idle = idle
        self.connecting = connecting
        self.max_size = max_size
        self.holders = holders
        """The leases held longest, three at most."""
        self.connect_error_age = connect_error_age
        """How many seconds ago a connect failed; None if the pool has connected since."""


class PoolClosed(PoolError):
    """The pool is not open: never opened, being closed, closed, or its event loop is gone."""


class PoolDeadlock(PoolError):
    """Every place is held by a block whose task (or thread) itself waits for another connection: nobody can go on.

    Raised at once, and only for the one that completed the circle. Let a task hold one connection at a time, or pass on
    the one that it has.
    """


class TooManyWaiting(PoolError):
    """`max_waiting` callers are in the queue already; raised at once, without waiting."""


class WrongLoop(PoolError):
    """The pool, or a connection of it, was used from another event loop than the one it was opened in."""


class CommitOutcomeUnknown(TransactionResolutionUnknown):
    """The connection was lost while its COMMIT was on its way: it may be committed, or not. An OperationalError with
    SQLSTATE 08007, with the connection's error as its `__cause__`; any other error of a COMMIT means: not committed. A
    statement under autocommit and a COMMIT that is executed as a statement of one's own raise psycopg's bare error.

    No PoolError, because after one of those nothing is committed, and whoever tries again after it does no harm. After
    this one look for what was written first, or ask `pool.commit_status(error)`, which wants
    `pool.transaction(track_outcome=True)`. After `tpc_commit()` look into `pg_prepared_xacts`: while the transaction is
    there, it can be committed again.

    It can be pickled, and asked about by another process's pool.
    """

    def __init__(
        self,
        *args: Any,
        xid: int | None = None,
        system_identifier: int | None = None,
        timeline: int | None = None,
        epoch: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.xid = xid
        """The transaction's 64-bit id; None if it had written nothing, or was not tracked."""
        self.system_identifier = system_identifier
        """Which cluster gave that id; None if the transaction was not tracked."""
        self.timeline = timeline
        """Its timeline then; None for a standby."""
        self.epoch = epoch
        """What changes when that server crashes."""


class StatementOutcomeUnknown(TransactionResolutionUnknown):
    """A one-shot statement was sent, and the connection lost before its answer: it was executed, or not. An
    OperationalError with SQLSTATE 08007, with the connection's error as its `__cause__`; any other error of a one-shot
    statement means that it has done nothing, but for what commits by itself (a procedure with COMMIT in it).

    No PoolError, because after one of those nothing was done. Statements that only read can be declared with
    `retry=True`: they are sent again.
    """


class StatementTimeout(StatementOutcomeUnknown, TimeoutError):
    """A one-shot statement was sent, and not answered within its `timeout`. It may be executed all the same."""
