"""A TCP proxy that cuts the connection at a chosen byte of a COMMIT or of its answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

REQUEST = b"Q\x00\x00\x00\x0bCOMMIT\x00"
COMMAND_COMPLETE = b"C\x00\x00\x00\x0bCOMMIT\x00"
READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"
EVERYTHING = 1 << 20


@dataclass(frozen=True)
class Cut:
    """Where the exchange ends: how many bytes of the request the server sees, and of the answer the client."""

    request: int = EVERYTHING
    answer: int | None = None
    """None: the cut is made when the request is forwarded, whatever the server does with it."""
    instead: bytes = b""
    """Sent to the client after that part of the answer, and before the end."""
    before_end: Callable[[], object] | None = None
    """Called before the client sees the end."""

    def __str__(self) -> str:
        request = "all" if self.request == EVERYTHING else str(self.request)
        answer = "unheard" if self.answer is None else f"{self.answer} bytes"
        return f"request {request}, answer {answer}"


class Cutter:
    """Forwards everything, until it is armed and a message says COMMIT."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._armed: Cut | None = None
        self._sockets: list[socket.socket] = []
        self.keeps_client_open = False  # when the server closes
        self.cuts = 0
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def arm(self, cut: Cut) -> None:
        """Make this cut at the next COMMIT."""
        self._armed = cut

    def cut_all(self) -> None:
        """End every connection, both ways."""
        for sock in self._sockets:
            _end(sock)
        self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._listener)
        self.cut_all()
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # it restarts
                    client.close()
                    continue
                self._sockets += [client, server]
                pending: list[Cut] = []
                self._start(self._forward_requests, client, server, pending)
                self._start(self._forward_answers, client, server, pending)

    def _forward_requests(self, client: socket.socket, server: socket.socket, pending: list[Cut]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if b"COMMIT" in data and self._armed is not None:
                    cut, self._armed = self._armed, None
                    begin = data.index(REQUEST) if REQUEST in data else 0
                    pending.append(cut)
                    server.sendall(data[: begin + cut.request])
                    if cut.answer is None:
                        self.cuts += 1
                        break
                else:
                    server.sendall(data)
        _end(server)
        if not self.keeps_client_open:
            _end(client)

    def _forward_answers(self, client: socket.socket, server: socket.socket, pending: list[Cut]) -> None:
        kept = b""
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if not pending:
                    client.sendall(data)
                    continue
                kept += data
                if pending[0].answer is None:
                    continue  # not to be heard
                if kept.endswith(READY_FOR_QUERY):
                    [cut] = pending
                    self.cuts += 1
                    client.sendall(kept[: cut.answer] + cut.instead)
                    if cut.before_end is not None:
                        cut.before_end()
                    break
        if not self.keeps_client_open:
            _end(client)
            _end(server)


def error_response(severity: str, sqlstate: str, message: str) -> bytes:
    """An ErrorResponse as poolers make it, which name no function of the server's source."""
    fields = b"".join(
        code + text.encode() + b"\0"
        for code, text in ((b"S", severity), (b"V", severity), (b"C", sqlstate), (b"M", message))
    )
    return b"E" + (len(fields) + 5).to_bytes(4, "big") + fields + b"\0"


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
