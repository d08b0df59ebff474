"""Drop-in for `psycopg2.pool`: its classes, signatures and messages, over a SyncPool."""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable
from contextlib import suppress
from types import FrameType
from typing import Any

from .. import errors
from .._io.blocking import WAIT_UNLESS_EXHAUSTED, Timeout
from ..config import OPTION_NAMES, check_timeout, is_true, shown
from ..conninfo import CONNECT_OPTIONS, check_option_names
from ..sync import DropInLoopPool, SyncPool
from .connection import Context, LegacyConnection, split_parameters

_getframe = sys._getframe


class PoolError(errors.PoolError):
    """No connection is left, or one was put that is not of this pool."""


class _DropInPool(SyncPool[LegacyConnection]):
    _loop_pool_class = DropInLoopPool


class AbstractConnectionPool:
    """What the pools of this module share; for classes that say how `getconn` and `putconn` are called.

    `minconn` connections are opened at once, and there are never more than `maxconn`. What follows is for psycopg2's
    `connect`, or an option of `SyncPool` except its sizes. `timeout`, in seconds, makes `getconn` wait that long when
    all connections are in use, in place of raising at once.

    Raises OperationalError if the server cannot be reached or refuses; TypeError and ValueError for parameters that
    are wrong.
    """

    def __init__(self, minconn: int | str, maxconn: int | str, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "_connect"):
            raise TypeError("_connect is not called here: use configure=, which is, with each new connection")
        self._closed = False
        self._minconn, self._maxconn = _check_sizes(_as_int("minconn", minconn), _as_int("maxconn", maxconn))
        self._timeout: Timeout = kwargs.pop("timeout", None)
        if self._timeout is None:
            self._timeout = WAIT_UNLESS_EXHAUSTED
        else:
            check_timeout("timeout", self._timeout)
        options = _options(self._minconn, self._maxconn, *args, **kwargs)
        known = CONNECT_OPTIONS | OPTION_NAMES | {"connection_class", "conninfo"}
        check_option_names(options, known, type(self).__name__)
        self._sync_pool = _DropInPool(**options)
        self._sync_pool.open(timeout=0)

    @property
    def closed(self) -> bool:
        """Whether `closeall` was called."""
        return self._closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = is_true("closed", closed)

    @property
    def minconn(self) -> int:
        """How many connections are kept open, also when nobody uses them."""
        return self._minconn

    @minconn.setter
    def minconn(self, minconn: int) -> None:
        self._resize(_as_int("minconn", minconn), self._maxconn)

    @property
    def maxconn(self) -> int:
        """How many connections there may be."""
        return self._maxconn

    @maxconn.setter
    def maxconn(self, maxconn: int) -> None:
        self._resize(self._minconn, _as_int("maxconn", maxconn))

    def _resize(self, minconn: int, maxconn: int) -> None:
        # They are set one after the other: in between the lower bound may be the greater.
        _check_sizes(minconn, max(minconn, maxconn, 1))
        minimum, _ = _check_sizes(max(0, min(minconn, maxconn)), maxconn)
        self._sync_pool.resize(minimum, maxconn)
        self._minconn, self._maxconn = minconn, maxconn

    # psycopg2 has these names, and classes derived from its own call them.

    def _getconn(self, key: Hashable = None) -> LegacyConnection:
        """A connection; the same one for the same key. Raises PoolError if all are in use, or the pool is closed."""
        return self._lease(key, _getframe(1))

    def _lease(self, key: Hashable, frame: FrameType) -> LegacyConnection:
        if self._closed:
            raise PoolError("connection pool is closed")
        if key is None and (connection := self._sync_pool._lend(frame)) is not None:
            return connection
        try:
            return self._sync_pool._lease_for(key, self._timeout, frame.f_code, frame.f_lasti)
        except errors.TooManyWaiting:
            raise PoolError("connection pool exhausted") from None
        except errors.PoolClosed as error:
            raise PoolError("connection pool is closed") from error
        except errors.PoolTimeout as error:
            if error.__cause__ is not None:
                raise  # the server is not there
            raise PoolError("connection pool exhausted") from error

    def _putconn(self, conn: LegacyConnection, key: Hashable = None, close: bool = False) -> None:
        """Give a connection back; an open transaction is rolled back. With `close` it is closed.

        Raises PoolError if it is not in use, or not of this pool, or the pool is closed.
        """
        if self._closed:
            raise PoolError("connection pool is closed")
        try:
            self._sync_pool.putconn(conn, key, close)
        except errors.PoolError as error:
            raise PoolError("trying to put unkeyed connection") from error

    def _closeall(self) -> None:
        """Close all connections, those in use too. Raises PoolError if that was done."""
        if self._closed:
            raise PoolError("connection pool is closed")
        self._closed = True
        self._sync_pool.closeall()


class SimpleConnectionPool(AbstractConnectionPool):
    """A connection pool; that of psycopg2 is for one thread, this one for any number."""

    getconn = AbstractConnectionPool._getconn
    putconn = AbstractConnectionPool._putconn
    closeall = AbstractConnectionPool._closeall


class ThreadedConnectionPool(AbstractConnectionPool):
    """A connection pool for threads."""

    getconn = AbstractConnectionPool._getconn
    putconn = AbstractConnectionPool._putconn
    closeall = AbstractConnectionPool._closeall


class PersistentConnectionPool(AbstractConnectionPool):
    """A connection pool in which each thread has one connection, the same until it puts it back.

    That of a thread that has ended comes back by itself, and is closed.
    """

    def __init__(self, minconn: int | str, maxconn: int | str, *args: Any, **kwargs: Any) -> None:
        super().__init__(minconn, maxconn, *args, **kwargs)
        self._of_thread = threading.local()  # goes with its thread, and what is leased with it

    def getconn(self) -> LegacyConnection:
        """The calling thread's connection. Raises as that of the other pools."""
        connection = None if self._closed else self._of_this_thread()
        if connection is None:
            connection = self._lease(None, _getframe(1))
            self._of_thread.leased = connection, connection._session.lease  # type: ignore[attr-defined]  # the pool's
        return connection

    def putconn(self, conn: LegacyConnection | None = None, close: bool = False) -> None:
        """Give the calling thread's connection back. Raises PoolError if it has none, or `conn` is another."""
        connection = self._of_this_thread()
        if connection is None or (conn is not None and conn is not connection):
            raise PoolError("connection pool is closed" if self._closed else "trying to put unkeyed connection")
        self._putconn(connection, close=close)
        del self._of_thread.leased

    def _of_this_thread(self) -> LegacyConnection | None:
        connection: Any
        connection, lease = getattr(self._of_thread, "leased", (None, 0))
        return connection if connection is not None and connection._session.lease == lease else None

    closeall = AbstractConnectionPool._closeall


def _as_int(name: str, value: Any) -> int:
    """psycopg2 takes what int() takes."""
    kind: type[Exception] = TypeError
    try:
        return int(value)
    except (ValueError, OverflowError):
        kind = ValueError
    except Exception:  # noqa: BLE001, S110  # of whatever kind: it is no number
        pass
    # Raised here, where no exception is being handled: a chained one may hold a connection string in the wrong place.
    raise kind(f"{name} must be an int, not {shown(value)}")


def _as_seconds(name: str, text: str) -> float:
    with suppress(ValueError):
        return float(text)
    raise ValueError(f"{name} must be a number of seconds, not {shown(text)}")


def _check_sizes(minconn: int, maxconn: int) -> tuple[int, int]:
    if minconn < 0:
        raise ValueError(f"minconn must be 0 or more, not {shown(minconn)}")
    if maxconn < 1:
        raise ValueError(f"maxconn must be 1 or more, not {shown(maxconn)}")
    if minconn > maxconn:
        raise ValueError(
            f"minconn={shown(minconn)} is greater than maxconn={shown(maxconn)}: lower it or raise maxconn"
        )
    return minconn, maxconn


def _options(
    minconn: int,
    maxconn: int,
    dsn: str | None = None,
    connection_factory: type[LegacyConnection] | None = None,
    cursor_factory: Any = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Those of a SyncPool, from what psycopg2's pools are given."""
    for size, replacement in (("min_size", "minconn"), ("max_size", "maxconn")):
        if size in parameters:
            raise TypeError(f"{size} is called {replacement} here, and is the pool's first or second argument")
    conninfo, options = split_parameters(dsn, connection_factory, cursor_factory, parameters)
    if isinstance(seconds := options.get("connect_timeout"), str):
        options["connect_timeout"] = _as_seconds("connect_timeout", seconds)
    options.setdefault("context", Context())
    return {"conninfo": conninfo, "min_size": minconn, "max_size": maxconn, **options}
