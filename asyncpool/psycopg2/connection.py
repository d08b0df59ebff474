"""Connections with psycopg2's manners where psycopg 3's differ without an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import ClientCursor, ServerCursor
from psycopg.abc import AdaptContext, Buffer, DumperKey, PyFormat
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.pq import TransactionStatus
from psycopg.types.array import ListDumper
from psycopg.types.composite import TupleDumper
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.string import ByteaLoader, TextLoader

from ..config import is_true, shown

# psycopg2.extensions' numbers, which are not psycopg 3's.
_ISOLATION_LEVELS = {
    1: psycopg.IsolationLevel.READ_COMMITTED,
    2: psycopg.IsolationLevel.REPEATABLE_READ,
    3: psycopg.IsolationLevel.SERIALIZABLE,
    4: psycopg.IsolationLevel.READ_UNCOMMITTED,
}

# Types whose values psycopg2 leaves as the server writes them.
_LEFT_AS_TEXT = ("uuid", "inet", "cidr", "record")


class InDumper(TupleDumper):
    """A tuple is what stands behind IN: `(1, 2, 3)`."""

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self._transformer = Transformer.from_context(context)

    def quote(self, obj: Sequence[Any]) -> bytes:
        return b"(" + b", ".join(bytes(self._transformer.as_literal(item)) for item in obj) + b")"


class ArrayDumper(ListDumper):
    """A list is `ARRAY[1, 2, 3]`, whose type the server finds out from the items, if one is not NULL."""

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self._transformer = Transformer.from_context(context)

    def get_key(self, obj: list[Any], format: PyFormat) -> DumperKey:  # noqa: A002  # psycopg calls it so
        return self.cls

    def upgrade(self, obj: list[Any], format: PyFormat) -> Self:  # noqa: A002
        return self

    def quote(self, obj: list[Any]) -> Buffer:
        if not _has_values(obj):
            return super().quote(obj)
        return b"ARRAY[" + b", ".join(bytes(self._transformer.as_literal(item)) for item in obj) + b"]"


def _has_values(items: list[Any]) -> bool:
    return any(_has_values(item) if isinstance(item, list) else item is not None for item in items)


class MemoryviewLoader(ByteaLoader):
    """A bytea is a memoryview."""

    def load(self, data: Buffer) -> Any:
        return memoryview(super().load(bytes(data)))


class FixedOffsetLoader(TimestamptzLoader):
    """A timestamptz has the offset that the server wrote, and differences of two are in real hours."""

    def load(self, data: Buffer) -> datetime:
        moment = super().load(data)
        return moment.replace(tzinfo=timezone(moment.utcoffset() or timedelta()), fold=0)


class Context:
    """What psycopg takes adapters from."""

    connection = None

    def __init__(self) -> None:
        self.adapters = AdaptersMap(psycopg.adapters)
        self.adapters.register_dumper(tuple, InDumper)
        self.adapters.register_dumper(list, ArrayDumper)
        self.adapters.register_loader("bytea", MemoryviewLoader)
        self.adapters.register_loader("timestamptz", FixedOffsetLoader)
        for name in _LEFT_AS_TEXT:
            self.adapters.register_loader(name, TextLoader)


class LegacyCursor(ClientCursor[Any]):
    """Binds on the client, and shows the result of the last of several statements, not that of the first."""

    _total: int | None = None  # of `executemany`

    @property
    def rowcount(self) -> int:
        """How many rows the last `execute` or `executemany` has changed or found."""
        return super().rowcount if self._total is None else self._total

    def mogrify(self, query: Any, params: Any = None) -> bytes:  # type: ignore[override]  # psycopg2's returns bytes
        """The query with the values in it."""
        return super().mogrify(query, params).encode(self.connection.info.encoding)

    def execute(self, *args: Any, **kwargs: Any) -> Self:
        self._total = None
        super().execute(*args, **kwargs)
        while self.nextset():
            continue
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **kwargs: Any) -> None:
        """Execute it for each, one after the other: psycopg 3's pipeline would make one transaction of autocommit."""
        if kwargs.get("returning"):  # psycopg 3's
            super().executemany(query, params_seq, **kwargs)
            return
        total = 0
        for params in params_seq:
            self.execute(query, params)
            total += max(0, self.rowcount)
        self._total = total


class LegacyServerCursor(ServerCursor[Any]):
    """A named cursor that binds on the client as well."""

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        if params is not None:
            query, params = ClientCursor(self.connection).mogrify(query, params).encode(), None
        return super().execute(query, params, **kwargs)


class ConnectionClosed(psycopg.InterfaceError, psycopg.OperationalError):
    """What psycopg2 raises of a closed connection, and psycopg 3."""


class LegacyConnection(psycopg.Connection[Any]):
    """`with` is a transaction, also with autocommit, and does not close; isolation levels and cursors are as in
    psycopg2.
    """

    _in_block = False
    _was_autocommit = False  # before the `with` block

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = LegacyCursor
        self.server_cursor_factory = LegacyServerCursor

    def __enter__(self) -> Self:
        if self._in_block:
            raise psycopg.ProgrammingError("the connection cannot be re-entered recursively")
        self._in_block = True
        self._was_autocommit = self.autocommit and self.info.transaction_status == TransactionStatus.IDLE
        if self._was_autocommit:
            self.autocommit = False
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self.commit()
            else:
                with contextlib.suppress(psycopg.Error):  # lost: the error that led here is the one to see
                    self.rollback()
        finally:
            self._in_block = False
            if self._was_autocommit and self.info.transaction_status == TransactionStatus.IDLE:
                self.autocommit = True

    @property
    def readonly(self) -> bool | None:
        """psycopg 3's `read_only`."""
        return self.read_only

    @readonly.setter
    def readonly(self, value: bool | None) -> None:
        self.read_only = value

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionClosed("connection already closed")

    def commit(self) -> None:
        """Commit what has been done since the last one. Raises InterfaceError if the connection is closed."""
        self._check_open()
        super().commit()

    def rollback(self) -> None:
        """Undo what has been done since the last commit. Raises InterfaceError if the connection is closed."""
        self._check_open()
        super().rollback()

    def cursor(  # type: ignore[override]  # psycopg2's signature
        self,
        name: str | None = None,
        cursor_factory: type[psycopg.Cursor[Any]] | None = None,
        scrollable: bool | None = None,
        withhold: bool = False,
        **kwargs: Any,
    ) -> psycopg.Cursor[Any]:
        """A cursor; with a name, one that stays on the server."""
        self._check_open()
        cursor: psycopg.Cursor[Any]
        if name:
            cursor = super().cursor(name, scrollable=scrollable, withhold=withhold, **kwargs)
        elif cursor_factory is None:
            cursor = super().cursor(**kwargs)
        else:
            check_cursor_factory(cursor_factory)
            cursor = cursor_factory(self, **kwargs)
        return cursor

    def set_isolation_level(self, value: Any) -> None:
        """Set it by psycopg2's number or name; 0 is autocommit, and keeps the level. Raises ValueError."""
        if self.autocommit is not (value == 0):
            self.autocommit = value == 0
        if value != 0:
            super().set_isolation_level(_isolation_level(value))


def _isolation_level(value: Any) -> psycopg.IsolationLevel | None:
    if value is None or isinstance(value, psycopg.IsolationLevel):
        return value
    name = str(value).upper().replace(" ", "_")
    if name == "DEFAULT":
        return None
    try:
        return _ISOLATION_LEVELS[value] if isinstance(value, int) else psycopg.IsolationLevel[name]
    except KeyError:
        raise ValueError(
            f"isolation_level must be a number from 0 to 4 or a level's name, not {shown(value)}"
        ) from None


def check_cursor_factory(cursor_factory: object) -> None:
    """Raise TypeError unless it is a cursor class of psycopg 3."""
    if not (isinstance(cursor_factory, type) and issubclass(cursor_factory, psycopg.Cursor)):
        raise TypeError(
            f"cursor_factory must be a cursor class of psycopg 3, not {shown(cursor_factory)}: for rows as"
            " dictionaries use row_factory=psycopg.rows.dict_row"
        )


def connect(
    dsn: str | None = None,
    connection_factory: type[LegacyConnection] | None = None,
    cursor_factory: type[psycopg.Cursor[Any]] | None = None,
    **parameters: Any,
) -> LegacyConnection:
    """A connection of no pool. Its parameters are those of psycopg2's `connect`, or libpq's.

    Raises OperationalError if the server cannot be reached or refuses, TypeError for parameters that contradict
    each other.
    """
    conninfo, options = split_parameters(dsn, connection_factory, cursor_factory, parameters)
    connection_class = options.pop("connection_class")
    return connection_class.connect(conninfo, context=Context(), **options)  # type: ignore[no-any-return]  # as asked


def split_parameters(
    dsn: object, connection_factory: Any, cursor_factory: Any, parameters: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What psycopg2's `connect` takes, as a conninfo and psycopg 3's options."""
    options = {name: value for name, value in parameters.items() if value is not None}
    if any(is_true(name, options.pop(name, 0)) for name in ("async", "async_")):
        raise TypeError("async connections are not there: use asyncpool.Pool")
    if "database" in options:
        if "dbname" in options:
            raise TypeError("both database= and dbname= are given, which mean the same: leave one out")
        options["dbname"] = options.pop("database")
    if dsn is not None and not isinstance(dsn, str):
        raise TypeError(f"dsn must be a str, not {type(dsn).__name__}")
    if cursor_factory is not None:
        check_cursor_factory(cursor_factory)
        options["cursor_factory"] = cursor_factory
    if connection_factory is None:
        connection_factory = LegacyConnection
    elif not (isinstance(connection_factory, type) and issubclass(connection_factory, psycopg.Connection)):
        raise TypeError(f"connection_factory must be a connection class of psycopg 3, not {shown(connection_factory)}")
    options["connection_class"] = connection_factory
    return dsn or "", options
