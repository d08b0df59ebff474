"""What a user may change on a connection object without the server knowing, and putting it back."""

from __future__ import annotations

from collections import deque
from operator import attrgetter
from typing import Any

from psycopg import BaseConnection
from psycopg.abc import Dumper, Loader
from psycopg.adapt import AdaptersMap
from psycopg.types import TypeInfo, TypesRegistry

# psycopg's attributes behind autocommit, isolation_level and so on, which have no setters on async connections.
_SETTINGS = (
    "row_factory",
    "cursor_factory",
    "server_cursor_factory",
    "_autocommit",
    "_isolation_level",
    "_read_only",
    "_deferrable",
)
_MAPS = ("_dumpers", "_dumpers_by_oid", "_loaders")

_read_maps = attrgetter(*_MAPS, "types._registry")

# One C call reads everything that the baseline compares. The last three are no settings: they differ while the
# connection is in the middle of something, and it is closed then, not restored.
read_client_state = attrgetter(
    *_SETTINGS,
    "_prepared.prepare_threshold",
    "_prepared.prepared_max",
    "_notice_handlers",
    "_notify_handlers",
    "_notifies_backlog",
    *(f"_adapters.{name}" for name in _MAPS),
    "_adapters.types._registry",
    "_num_transactions",
    "_tpc",
    "_pipeline",
)


class TouchingAdaptersMap(AdaptersMap):
    """A connection's own adapters, that tell its session when somebody registers something."""

    def __init__(self, template: AdaptersMap, connection: BaseConnection[Any]) -> None:
        super().__init__(template)
        self._session = connection._session  # type: ignore[attr-defined]  # a PooledConnection
        self.types = TouchingTypesRegistry(template.types)
        self.types.session = self._session

    def register_dumper(self, cls: type | str | None, dumper: type[Dumper]) -> None:
        self._session.touched = True
        super().register_dumper(cls, dumper)

    def register_loader(self, oid: int | str, loader: type[Loader]) -> None:
        self._session.touched = True
        super().register_loader(oid, loader)


class TouchingTypesRegistry(TypesRegistry):
    """The same for its types."""

    session: Any

    def add(self, info: TypeInfo) -> None:
        self.session.touched = True
        super().add(info)


class Baseline:
    """A connection's client-side state as `configure` left it; equal `state` means that nobody changed it since."""

    __slots__ = ("_adapters", "_notice_handlers", "_notify_handlers", "_prepared", "_settings", "state")

    def __init__(self, connection: BaseConnection[Any]) -> None:
        # The copy marks the connection's own maps as shared: whoever registers something from now on replaces
        # the map that he changes in place of changing it, so that a comparison finds it.
        self._adapters = AdaptersMap(connection.adapters)
        self._settings = tuple((name, getattr(connection, name)) for name in _SETTINGS)
        self._prepared = connection.prepare_threshold, connection.prepared_max
        # Copies: the connection's own lists are changed in place.
        self._notice_handlers = tuple(connection._notice_handlers)
        self._notify_handlers = tuple(connection._notify_handlers)
        self.restore(connection)
        self.state = (
            *(value for _, value in self._settings),
            connection._prepared.prepare_threshold,
            connection._prepared.prepared_max,
            list(self._notice_handlers),
            list(self._notify_handlers),
            deque[Any](),
            *_read_maps(self._adapters),
            0,
            None,
            None,
        )

    def restore(self, connection: BaseConnection[Any]) -> None:
        """Put every setting back. Not for a connection that is in the middle of something."""
        for name, value in self._settings:
            setattr(connection, name, value)
        connection._begin_statement = b""  # psycopg's cache of what isolation level and so on amount to
        connection.prepare_threshold, connection.prepared_max = self._prepared
        connection._notice_handlers = list(self._notice_handlers)
        connection._notify_handlers = list(self._notify_handlers)
        connection._notifies_backlog = deque()
        connection._adapters = TouchingAdaptersMap(self._adapters, connection)
