"""A PostgreSQL server of the tests, in the event loop of its clients: every answer, and its time, is scripted.

It speaks as much of the protocol as a pool does: what is said to it is real, and so is everything on the pool's side,
the driver and libpq included. It knows no SQL but what it is told, and no prepared statements.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import struct
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_CANCEL_REQUEST = 80877102

_PARAMETERS = {
    "server_version": "18.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "TimeZone": "UTC",
}


class Gate(StrEnum):
    """A step in which a connection may fail, or not come back."""

    CONNECT = "connect"
    CONFIGURE = "configure"
    CHECK = "check"
    QUERY = "query"
    ROLLBACK = "rollback"
    RESET = "reset"
    CANCEL = "cancel"
    CLOSE = "close"


class Outcome(Enum):
    """What becomes of it."""

    OK = "ok"
    ERROR = "error"
    SLOW = "slow"
    NEVER = "never"
    LOST = "lost"
    """The server drops the connection instead of answering."""

    def __repr__(self) -> str:
        return self.value


OK, ERROR, SLOW, NEVER, LOST = Outcome

# How long SLOW takes, in seconds.
SLOWNESS = 0.125


@dataclass(frozen=True)
class Visit:
    """Somebody came to a gate."""

    gate: Gate
    outcome: Outcome
    sql: str  # that arrives there, or is to be cancelled
    when: float


def gate_of(sql: str) -> Gate | None:
    """Which gate a statement goes through; None: it is answered at once."""
    if sql == "":
        return Gate.CHECK
    if sql.startswith("SET SESSION AUTHORIZATION"):
        return Gate.RESET
    word = sql.split(maxsplit=1)[0]
    return _GATES.get(word)


_GATES = {"ROLLBACK": Gate.ROLLBACK, "configure": Gate.CONFIGURE, "query": Gate.QUERY}


@dataclass
class ScriptedServer:
    """Listens on a Unix socket in a directory of its own. `script` says what becomes of a visit; OK without."""

    script: Callable[[Gate, str], Outcome] = lambda gate, sql: OK
    on_visit: Callable[[Visit], None] = lambda visit: None
    connect_error: tuple[str, str] = ("53300", "sorry, too many clients already")
    max_connections: float = float("inf")
    """More sessions than these are refused with 53300."""
    answer_after: Callable[[str], float] = lambda sql: 0.0
    """Seconds that a statement takes."""
    visits: list[Visit] = field(default_factory=list)
    attempts: list[float] = field(default_factory=list)
    """When somebody connected to the socket, but for cancel requests."""
    sessions: set[Backend] = field(default_factory=set)
    most_sessions: int = 0
    cancels: int = 0
    statements: Counter[str] = field(default_factory=Counter)
    _server: asyncio.Server | None = None
    _directory: str = ""

    def __post_init__(self) -> None:
        self._pids = itertools.count(1)
        self.by_pid: dict[int, Backend] = {}
        self.transports: set[asyncio.Transport] = set()

    async def __aenter__(self) -> Self:
        self._directory = tempfile.mkdtemp(prefix="pg-")
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        shutil.rmtree(self._directory)

    @property
    def dsn(self) -> str:
        """Where it listens, once it does."""
        assert self._directory
        return f"host={self._directory} port=5432 user=test dbname=test"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def start(self) -> None:
        """Listen."""
        path = str(Path(self._directory) / ".s.PGSQL.5432")
        self._server = await self.loop.create_unix_server(lambda: Backend(self), path, backlog=2000)

    async def stop(self) -> None:
        """Drop every session and listen no more: connecting is refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
            (Path(self._directory) / ".s.PGSQL.5432").unlink(missing_ok=True)
        for transport in list(self.transports):
            transport.abort()
        for _ in range(3):  # until they are gone
            await asyncio.sleep(0)

    def begin_anew(self, script: Callable[[Gate, str], Outcome], on_visit: Callable[[Visit], None]) -> None:
        """Drop what is left of an earlier use, and forget it."""
        for transport in list(self.transports):
            transport.abort()
        self.script, self.on_visit = script, on_visit
        self.visits.clear()
        self.attempts.clear()
        self.statements.clear()
        self.by_pid.clear()

    def visit(self, gate: Gate, sql: str = "") -> Outcome:
        outcome = self.script(gate, sql)
        visit = Visit(gate, outcome, sql, self.loop.time())
        self.visits.append(visit)
        self.on_visit(visit)
        return outcome

    def new_pid(self, backend: Backend) -> int:
        pid = next(self._pids)
        self.by_pid[pid] = backend
        return pid


class Backend(asyncio.Protocol):
    """One connection to the server, by whomever."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.transport: asyncio.Transport
        self.buffer = b""
        self.started = False
        self.closing = False
        self.lost = False
        self.pid = 0
        self.status = b"I"
        self.running: str | None = None  # the statement that has not been answered yet
        self.timer: asyncio.TimerHandle | None = None

    # --- what arrives ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.timer is not None:
            self.timer.cancel()
        self.server.transports.discard(self.transport)
        self.server.sessions.discard(self)

    def eof_received(self) -> bool:
        self.close()
        return True  # this side ends when the script says so

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while not self.closing and (message := self.next_message()) is not None:
            kind, body = message
            if kind == b"":
                self.start_up(body)
            elif kind == b"Q":
                self.run(body[:-1].decode())
            elif kind == b"X":
                self.close()
            else:
                raise AssertionError(f"the scripted server does not know the message {kind!r}")

    def next_message(self) -> tuple[bytes, bytes] | None:
        header = 5 if self.started else 4
        if len(self.buffer) < header:
            return None
        end = header - 4 + int(struct.unpack("!I", self.buffer[header - 4 : header])[0])
        if len(self.buffer) < end:
            return None
        message = self.buffer[: header - 4], self.buffer[header:end]
        self.buffer = self.buffer[end:]
        return message

    # --- what is done ---------------------------------------------------------------------------------------

    def start_up(self, body: bytes) -> None:
        server = self.server
        if struct.unpack("!I", body[:4])[0] == _CANCEL_REQUEST:
            self.cancel(int(struct.unpack("!I", body[4:8])[0]))
            return
        self.started = True
        server.attempts.append(server.loop.time())
        if len(server.sessions) >= server.max_connections:
            self.refuse("53300", "sorry, too many clients already")
            return
        server.sessions.add(self)
        server.most_sessions = max(server.most_sessions, len(server.sessions))
        outcome = server.visit(Gate.CONNECT)
        if outcome is ERROR:
            self.refuse(*server.connect_error)
        else:
            self.follow(outcome, self.welcome)

    def welcome(self) -> None:
        self.pid = self.server.new_pid(self)
        self.send(b"R", struct.pack("!I", 0))
        for name, value in _PARAMETERS.items():
            self.send(b"S", f"{name}\0{value}\0".encode())
        self.send(b"K", struct.pack("!II", self.pid, 7))
        self.send(b"Z", self.status)

    def refuse(self, sqlstate: str, words: str) -> None:
        self.send_error("FATAL", sqlstate, words)
        self.closing = True
        self.transport.close()

    def run(self, sql: str) -> None:
        server = self.server
        server.statements[sql] += 1
        assert self.running is None
        self.running = sql
        gate = gate_of(sql)
        outcome = server.visit(gate, sql) if gate is not None else OK
        if outcome is ERROR:
            self.fail("XX000", f"{gate} fails")
        else:
            self.follow(outcome, self.succeed, server.answer_after(sql))

    def succeed(self) -> None:
        sql = self.running
        assert sql is not None
        self.running = None
        word = sql.split(maxsplit=1)[0] if sql else ""
        if word == "BEGIN":
            self.status = b"T"
        elif word in ("COMMIT", "ROLLBACK"):
            self.status = b"I"
        if sql:
            self.send(b"C", word.encode() + b"\0")
        else:
            self.send(b"I")
        self.send(b"Z", self.status)

    def fail(self, sqlstate: str, words: str) -> None:
        self.running = None
        if self.status == b"T":
            self.status = b"E"
        self.send_error("ERROR", sqlstate, words)
        self.send(b"Z", self.status)

    def cancel(self, pid: int) -> None:
        server = self.server
        server.cancels += 1
        backend = server.by_pid[pid]

        def act() -> None:
            if backend.running is not None and not backend.lost:
                if backend.timer is not None:
                    backend.timer.cancel()
                backend.fail("57014", "canceling statement due to user request")
            self.transport.close()

        outcome = server.visit(Gate.CANCEL, backend.running or "")
        if outcome is ERROR:
            self.transport.abort()  # not heard
        else:
            self.follow(outcome, act)

    def close(self) -> None:
        """The client has said goodbye, or is gone."""
        if self.closing or self.lost:
            return
        self.closing = True
        if self.timer is not None:
            self.timer.cancel()
        if not self.started:
            self.transport.close()  # a cancel request whose sender waits no more
            return
        outcome = self.server.visit(Gate.CLOSE)
        if outcome is ERROR:
            self.send_error("FATAL", "XX000", "an error of the last moment")
        self.follow(OK if outcome is ERROR else outcome, self.transport.close)

    def follow(self, outcome: Outcome, act: Callable[[], None], seconds: float = 0.0) -> None:
        if outcome is OK and not seconds:
            act()
        elif outcome in (OK, SLOW):
            self.timer = self.server.loop.call_later(seconds + (SLOWNESS if outcome is SLOW else 0.0), act)
        elif outcome is LOST:
            self.transport.abort()

    # --- what is sent ---------------------------------------------------------------------------------------

    def send(self, kind: bytes, body: bytes = b"") -> None:
        if not self.transport.is_closing():
            self.transport.write(kind + struct.pack("!I", len(body) + 4) + body)

    def send_error(self, severity: str, sqlstate: str, words: str) -> None:
        fields = {"S": severity, "V": severity, "C": sqlstate, "M": words}
        self.send(b"E", b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0")
