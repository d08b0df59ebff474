"""A connection to examine a server with: below psycopg's transactions and caches, and each step with a deadline."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from psycopg import errors as e
from psycopg import pq
from psycopg.generators import execute

from asyncpool._io.driver import Driver
from asyncpool._io.reader import duplicate
from asyncpool.cli.refusals import NoAnswer
from asyncpool.config import PoolConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from psycopg.pq.abc import PGconn, PGresult

    from asyncpool._io.session import Session

T = TypeVar("T")

# Seconds for the server to end the sessions that the examination has had.
CLOSE_TIMEOUT = 1.0

_TCP = (socket.AF_INET, socket.AF_INET6)

Row = tuple[str | None, ...]


class Client:
    """One connection. Whatever is asked raises the server's error, or NoAnswer, after which it is of no more use."""

    def __init__(self, session: Session, timeout: float) -> None:
        self._session = session
        self._timeout = timeout

    @property
    def pgconn(self) -> PGconn:
        """Libpq's, for what it knows without asking."""
        return self._session.pgconn

    @property
    def is_lost(self) -> bool:
        """Whether the other side has ended the connection."""
        return self.pgconn.status == pq.ConnStatus.BAD

    async def ask(self, statement: str, step: str) -> list[Row]:
        """The rows of a statement, as text; of several, those of the last one that has any."""
        results = await self._in_time(self._session.command(statement.encode()), step)
        return next((_rows(result) for result in reversed(results) if result.nfields), [])

    async def prepare(self, name: str, statement: str) -> None:
        """Prepare a statement as drivers do it, by a message of the protocol."""
        await self._send(lambda: self.pgconn.send_prepare(name.encode(), statement.encode()), "prepare a statement")

    async def execute_prepared(self, name: str) -> list[Row]:
        """The rows of a statement that was prepared."""
        sent = self._send(lambda: self.pgconn.send_query_prepared(name.encode(), None), "execute a prepared statement")
        return _rows(await sent)

    async def _send(self, send: Callable[[], None], step: str) -> PGresult:
        send()
        results: Sequence[PGresult] = await self._in_time(self._session.reader.run(execute(self.pgconn)), step)
        if results[-1].status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
            raise e.error_from_result(results[-1])
        return results[-1]

    async def _in_time(self, answer: Awaitable[T], step: str) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await answer
        except TimeoutError:
            raise NoAnswer(step, self._timeout) from None

    @property
    def local_port(self) -> int | None:
        """The port of this end, None on a Unix socket."""
        with duplicate(self.pgconn.socket) as sock:
            return int(sock.getsockname()[1]) if sock.family in _TCP else None

    @property
    def is_remote(self) -> bool:
        """Whether the other end is on TCP, and has another address than this one."""
        with duplicate(self.pgconn.socket) as sock:
            return sock.family in _TCP and sock.getsockname()[0] != sock.getpeername()[0]


@asynccontextmanager
async def connected(conninfo: str, overrides: Mapping[str, str], timeout: float) -> AsyncIterator[Client]:
    """A connection for as long as this is entered; `timeout`, in seconds, is for each address and each question.

    Raises ConnectFailed.
    """
    config = PoolConfig(connect_timeout=timeout, check_timeout=min(timeout, CLOSE_TIMEOUT))
    given = {"fallback_application_name": "asyncpool doctor", **overrides}
    session = await Driver(config, conninfo, given).connect()
    try:
        yield Client(session, timeout)
    finally:
        await session.close(min(timeout, CLOSE_TIMEOUT))


def _rows(result: PGresult) -> list[Row]:
    return [
        tuple(_text(result.get_value(row, column)) for column in range(result.nfields)) for row in range(result.ntuples)
    ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
