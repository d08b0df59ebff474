"""The driver of connections that threads use: the user's callables block, so each runs in a thread of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import anyio
from psycopg import BaseConnection, Connection, Cursor

from .callables import Overdue, name_of
from .daemon_thread import in_daemon_thread
from .driver import Driver
from .session import SEVERED


class BlockingDriver(Driver):
    """Makes `psycopg.Connection`s. What the user's callables do may hang without stalling the event loop."""

    connection_class: type[BaseConnection[Any]] = Connection
    cursor_class: type[Any] = Cursor

    async def _call_conninfo(self, conninfo: Callable[[], object]) -> object:
        answer = await in_daemon_thread(conninfo, "asyncpool: ask for a conninfo")
        return await answer if inspect.isawaitable(answer) else answer

    async def _run_callback(self, callback: Callable[[Any], object], connection: Any) -> None:
        session = connection._session
        running = True

        def run() -> None:
            nonlocal running
            try:
                answer = callback(connection)
                if inspect.iscoroutine(answer):
                    answer.close()
                    raise TypeError(f"{name_of(callback)} must not be async: a SyncPool calls it in a thread")
            finally:
                running = False

        with anyio.move_on_after(self._config.check_timeout) as scope:
            try:
                await in_daemon_thread(run, f"asyncpool {self._config.name}: {name_of(callback)}")
            except BaseException:
                if running:  # it is abandoned: what it waits for is ended, and it can do nothing more
                    session.lease = SEVERED
                    session.sever()
                raise
        if scope.cancelled_caught:
            raise Overdue("it did not end in time")
