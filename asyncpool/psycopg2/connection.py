"""Connections with psycopg2's manners where psycopg 3's differ without an error."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import ClientCursor, ServerCursor
from psycopg.adapt import AdaptersMap
from psycopg.types.composite import TupleDumper

# psycopg2.extensions' numbers, which are not psycopg 3's.
_ISOLATION_LEVELS = {
    1: psycopg.IsolationLevel.READ_COMMITTED,
    2: psycopg.IsolationLevel.REPEATABLE_READ,
    3: psycopg.IsolationLevel.SERIALIZABLE,
    4: psycopg.IsolationLevel.READ_UNCOMMITTED,
}


class ListDumper(TupleDumper):
    """A tuple is what stands behind IN: `(1, 2, 3)`."""

    def quote(self, obj: Sequence[Any]) -> bytes:
        return b"(" + b", ".join(bytes(self._tx.as_literal(item)) for item in obj) + b")"


class Context:
    """What psycopg takes adapters from."""

    connection = None

    def __init__(self) -> None:
        self.adapters = AdaptersMap(psycopg.adapters)
        self.adapters.register_dumper(tuple, ListDumper)


class LegacyCursor(ClientCursor[Any]):
    """Binds on the client, and shows the result of the last of several statements, not that of the first."""

    def execute(self, *args: Any, **kwargs: Any) -> Self:
        super().execute(*args, **kwargs)
        while self.nextset():
            continue
        return self


class LegacyServerCursor(ServerCursor[Any]):
    """A named cursor that binds on the client as well."""

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        if params is not None:
            query, params = ClientCursor(self.connection).mogrify(query, params).encode(), None
        return super().execute(query, params, **kwargs)


class LegacyConnection(psycopg.Connection[Any]):
    """`with` ends the transaction and does not close; tuples, isolation levels and cursors are as in psycopg2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = LegacyCursor
        self.server_cursor_factory = LegacyServerCursor

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.commit()
        else:
            with contextlib.suppress(psycopg.Error):  # lost: the error that led here is the one to see
                self.rollback()

    def cursor(  # type: ignore[override]  # psycopg2's signature
        self,
        name: str | None = None,
        cursor_factory: type[psycopg.Cursor[Any]] | None = None,
        scrollable: bool | None = None,
        withhold: bool = False,
        **kwargs: Any,
    ) -> psycopg.Cursor[Any]:
        """A cursor; with a name, one that stays on the server."""
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
        """Set it by psycopg2's number or name; 0 is autocommit."""
        if self.autocommit is not (value == 0):
            self.autocommit = value == 0
        super().set_isolation_level(_isolation_level(value) if value != 0 else None)


def _isolation_level(value: Any) -> psycopg.IsolationLevel | None:
    if value is None or isinstance(value, psycopg.IsolationLevel):
        return value
    if isinstance(value, int):
        return _ISOLATION_LEVELS[value]
    name = str(value).upper().replace(" ", "_")
    return None if name == "DEFAULT" else psycopg.IsolationLevel[name]


def check_cursor_factory(cursor_factory: object) -> None:
    """Raise TypeError unless it is a cursor class of psycopg 3."""
    if not (isinstance(cursor_factory, type) and issubclass(cursor_factory, psycopg.Cursor)):
        raise TypeError(
            f"cursor_factory must be a cursor class of psycopg 3, not {cursor_factory!r}: for rows as dictionaries use"
            " row_factory=psycopg.rows.dict_row"
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
    if options.pop("async", 0) or options.pop("async_", 0):
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
    options["connection_class"] = connection_factory or LegacyConnection
    return dsn or "", options
