"""The exceptions that asyncpool raises on its own account; the server's own errors pass through as psycopg's."""

from __future__ import annotations

from psycopg import OperationalError


class PoolError(OperationalError):
    """Base of all errors of the pool. An OperationalError, so that code that handles those handles these."""


class PoolTimeout(PoolError, TimeoutError):
    """No connection within the time allowed. The last connect error, if there is one, is its `__cause__`."""


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
