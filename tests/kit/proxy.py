"""A TCP proxy between pool and server, to be told, at any time, what the network between them does.

    with Proxy(server.dsn) as proxy:
        async with Pool(proxy.dsn) as pool:
            proxy.apply(Weather(stall_after=0))     # on all links, both ways, for ever
            proxy.links[0].reset()                  # one of them
            proxy.clear()                           # what was held up goes on

It runs in a thread and an event loop of its own, so that a test's loop, however busy, does not drive it. Every method
may be called in any thread, and has taken effect when it returns. Whatever the weather is, the bytes of a direction
keep their order, and the end of one (EOF) comes after them, through the same weather.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

T = TypeVar("T")

CHUNK = 65536
# Chunks in the proxy's own hands, for each direction of a link. What is stalled beyond that stays in the sockets'
# buffers, and then holds up the sender, as on a real network.
MAX_CHUNKS = 16
PATIENCE = 20.0

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds
# The request codes in the second word of what a client sends first.
_CANCEL_REQUEST = 80877102


class Towards(Enum):
    """A direction of a link."""

    SERVER = "server"
    CLIENT = "client"


class Arrival(Enum):
    """What becomes of a client that connects."""

    PASS = "it is connected to the server"
    REFUSE = "nobody listens: ECONNREFUSED"
    RESET = "it is accepted and reset"
    CLOSE = "it is accepted and closed, without a word"
    IGNORE = "it is accepted, and nobody says anything, for ever"
    SILENCE = "its SYN is not answered, as if the host were dead; on Linux only"


@dataclass(frozen=True)
class Weather:
    """What happens to the bytes of one direction. The numbers of bytes are counted from when it is applied."""

    latency: float = 0.0  # seconds that each byte is under way
    piece: int | None = None  # at most so many bytes are delivered at a time, in packets of their own
    stall_after: int | None = None  # after so many bytes nothing is delivered any more, also not the end
    garble_after: int | None = None  # after so many bytes each is another one
    reset_after: int | None = None  # after so many bytes the link is reset, both ways
    close_after: int | None = None  # after so many bytes the receiver is told that this was the end


FAIR = Weather()
STALLED = Weather(stall_after=0)
GARBAGE = Weather(garble_after=0)
BYTE_BY_BYTE = Weather(piece=1)


class Link:
    """One connection of a client, and the proxy's own to the server. Links are never removed from `Proxy.links`."""

    def __init__(self, proxy: Proxy, number: int) -> None:
        self.number = number
        self.is_open = True
        self.opening = b""  # the first bytes that the client sent
        self._proxy = proxy
        self._flows: dict[Towards, _Flow] = {}

    @property
    def is_cancel_request(self) -> bool:
        """Whether it was made only to have a statement cancelled, in clear text."""
        return len(self.opening) >= 8 and struct.unpack_from("!I", self.opening, 4)[0] == _CANCEL_REQUEST

    def received(self, towards: Towards) -> int:
        """How many bytes the proxy has received that go in this direction."""
        return self._flows[towards].received if towards in self._flows else 0

    def delivered(self, towards: Towards) -> int:
        """How many bytes the proxy has sent on in this direction."""
        return self._flows[towards].delivered if towards in self._flows else 0

    def apply(self, weather: Weather, towards: Towards | None = None) -> None:
        """Change the weather of this link, in one direction or both. What is under way already is subject to it."""
        self._proxy._call(lambda: self._apply(weather, towards))

    def _apply(self, weather: Weather, towards: Towards | None) -> None:
        for direction, flow in self._flows.items():
            if towards in (None, direction):
                flow.apply(weather)

    def send(self, data: bytes, towards: Towards) -> None:
        """Slip bytes of our own in between those that are under way."""
        self._proxy._call(lambda: self._flows[towards].inject(data))

    def half_close(self, towards: Towards) -> None:
        """Tell the receiver that nothing follows, past whatever is stalled; the other direction goes on."""
        self._proxy._call(self._flows[towards].end)

    def reset(self) -> None:
        """Reset the connection, on both sides, at once."""
        self._proxy._call(self._reset)

    def _reset(self) -> None:
        self._close(reset=True)

    def _close(self, *, reset: bool = False) -> None:
        if not self.is_open:
            return
        self.is_open = False
        for flow in self._flows.values():
            flow.cancel()
        for flow in self._flows.values():
            if reset:
                _reset_at_close(flow.source)
            # Before its number is another socket's: the tasks are only cancelled in the next turn.
            self._proxy._loop.remove_reader(flow.source.fileno())
            self._proxy._loop.remove_writer(flow.source.fileno())
            flow.source.close()


class _Leg(NamedTuple):
    """A part of a journey to and fro: to which counting of round trips it belongs, and its number in that."""

    counting: int
    number: int


class _Flow:
    """One direction of a link: one task receives, another delivers."""

    def __init__(self, proxy: Proxy, link: Link, towards: Towards, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.received = 0
        self.delivered = 0
        self.ended = False
        self._proxy = proxy
        self._link = link
        self._towards = towards
        self._sink = sink
        self._weather = FAIR
        self._passed = 0  # since the weather was applied
        self._changed = asyncio.Event()
        self._queue: asyncio.Queue[tuple[float, _Leg, bytes | None]] = asyncio.Queue(MAX_CHUNKS)
        self._tasks = [asyncio.ensure_future(work) for work in (self._receive(), self._deliver())]

    def apply(self, weather: Weather) -> None:
        self._weather = weather
        self._passed = 0
        self._changed.set()

    def cancel(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def inject(self, data: bytes) -> None:
        with suppress(OSError):
            self._sink.send(data)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            with suppress(OSError):  # the other side has gone
                self._sink.shutdown(socket.SHUT_WR)

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self.source, CHUNK):
                self.received += len(data)
                if self._towards is Towards.SERVER and len(self._link.opening) < 8:
                    self._link.opening += data[:8]
                await self._queue.put((loop.time(), self._proxy._depart(self._towards), data))
        except OSError:  # reset by one side: so it is for the other
            self._link._close(reset=True)
            return
        await self._queue.put((loop.time(), self._proxy._depart(self._towards), None))

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            at, leg, data = await self._queue.get()
            await self._wait_until_due(at)
            if data is None:
                await self._pass(1)
                break
            while data:
                count = await self._pass(len(data))
                piece, data = data[:count], data[count:]
                if self._is_past(self._weather.garble_after):
                    piece = bytes(byte ^ 0xA5 for byte in piece)
                self._passed += count
                self._proxy._arrive(self._towards, leg)
                try:
                    if not self.ended:
                        await loop.sock_sendall(self._sink, piece)
                except OSError:
                    self._link._close(reset=True)
                    return
                self.delivered += count
                if data:
                    await asyncio.sleep(0)
        self._proxy._arrive(self._towards, leg)
        self.end()
        if all(flow.ended for flow in self._link._flows.values()):
            self._link._close()

    async def _wait_until_due(self, at: float) -> None:
        while (remaining := at + self._weather.latency - asyncio.get_running_loop().time()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), remaining)

    async def _pass(self, wanted: int) -> int:
        """Wait until something may be delivered: how much of that."""
        while self._is_past(self._weather.stall_after):
            self._changed.clear()
            await self._changed.wait()
        if self._is_past(self._weather.reset_after):
            self._link._close(reset=True)
            await asyncio.sleep(0)  # this task is not among the cancelled
            raise asyncio.CancelledError
        if self._is_past(self._weather.close_after):
            self.end()
        weather = self._weather
        bounds = (weather.stall_after, weather.garble_after, weather.reset_after, weather.close_after)
        left = [bound - self._passed for bound in bounds if bound is not None and bound > self._passed]
        return min([wanted, weather.piece or wanted, *left])

    def _is_past(self, bound: int | None) -> bool:
        return bound is not None and self._passed >= bound


class Proxy:
    """A context manager. `dsn` leads to the server of `server_dsn` (TCP or Unix socket) through the proxy, in clear
    text unless that says otherwise; `links` has every connection that was let through, in the order of their arrival.
    """

    def __init__(self, server_dsn: str) -> None:
        self.links: list[Link] = []
        self.arrivals = 0  # connections that were accepted, whatever became of them
        self.port = 0
        self._server_dsn = server_dsn
        self._address = _address_of(server_dsn)
        self._arrival = Arrival.PASS
        self._weather = dict.fromkeys(Towards, FAIR)
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._ignored: list[socket.socket] = []
        self._fillers: list[socket.socket] = []
        self._introductions: set[asyncio.Task[None]] = set()
        self._count = 0
        self._legs = dict.fromkeys(Towards, 0)
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test: proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    @property
    def dsn(self) -> str:
        """The server's conninfo with the proxy's address in place of the server's."""
        parameters: dict[str, Any] = {"sslmode": "disable", "gssencmode": "disable"}
        parameters |= {name: value for name, value in conninfo_to_dict(self._server_dsn).items() if value is not None}
        parameters |= {"host": "127.0.0.1", "port": self.port}
        parameters.pop("hostaddr", None)
        return make_conninfo(**parameters)

    @property
    def open_links(self) -> list[Link]:
        """Those that neither side has left, nor the proxy closed."""
        return [link for link in self.links if link.is_open]

    def apply(self, weather: Weather, towards: Towards | None = None) -> None:
        """Change the weather of all links, and of those to come, in one direction or both."""

        def change() -> None:
            self._apply_to_new(weather, towards)
            for link in self.links:
                link._apply(weather, towards)

        self._call(change)

    def apply_to_new(self, weather: Weather, towards: Towards | None = None) -> None:
        """Change the weather of links to come."""
        self._call(lambda: self._apply_to_new(weather, towards))

    def _apply_to_new(self, weather: Weather, towards: Towards | None) -> None:
        self._weather |= {direction: weather for direction in Towards if towards in (None, direction)}

    def receive(self, arrival: Arrival) -> None:
        """Say what becomes of those who connect from now on. Those who were ignored stay so."""

        def change() -> None:
            self._arrival = arrival
            self._stop_listening()
            if arrival is Arrival.SILENCE:
                self._fill_backlog()
            elif arrival is not Arrival.REFUSE:
                self._listen()

        self._call(change)

    def clear(self) -> None:
        """Fair weather on all links, and everybody is welcome again. Only what was ignored or closed stays lost."""
        self.apply(FAIR)
        self.receive(Arrival.PASS)

    # --- round trips ----------------------------------------------------------------------------------------

    def count_round_trips(self) -> None:
        """Begin anew with `round_trips`. What is under way now does not count."""
        self._call(self._begin_count)

    def _begin_count(self) -> None:
        self._count += 1
        self._legs = dict.fromkeys(Towards, 0)

    @property
    def round_trips(self) -> int:
        """How many journeys to the server and back followed from one another, over all links together, until now.

        The one in which TCP itself connects, for each link, is counted too. It holds if both sides take much less time
        to answer than what is under way.
        """
        return (self._legs[Towards.CLIENT] + 1) // 2

    def _depart(self, towards: Towards) -> _Leg:
        """A leg begins. Its number is one more than that of the last that arrived where it begins."""
        return _Leg(self._count, self._legs[Towards.CLIENT if towards is Towards.SERVER else Towards.SERVER] + 1)

    def _arrive(self, towards: Towards, leg: _Leg) -> None:
        if leg.counting == self._count:
            self._legs[towards] = max(self._legs[towards], leg.number)

    # --- in the proxy's own thread ----------------------------------------------------------------------------

    def _call(self, function: Callable[[], T]) -> T:
        """Run a function in the proxy's thread."""

        async def run() -> T:
            return function()

        return self._wait(run())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def _listen(self) -> None:
        self._listener = self._bind(200)
        self.port = self._listener.getsockname()[1]
        self._accepting = self._loop.create_task(self._accept(self._listener))

    def _bind(self, backlog: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(backlog)
        listener.setblocking(False)
        return listener

    def _fill_backlog(self) -> None:
        """Listen and accept nobody: Linux answers no SYN as long as there is no room for another who waits."""
        self._listener = self._bind(0)
        for _ in range(4):
            filler = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)

    def _stop_listening(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listener)
            self.arrivals += 1
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._arrival is Arrival.PASS:
                task = self._loop.create_task(self._introduce(client))
                self._introductions.add(task)
                task.add_done_callback(self._introductions.discard)
            elif self._arrival is Arrival.IGNORE:
                self._ignored.append(client)
            else:
                if self._arrival is not Arrival.CLOSE:
                    _reset_at_close(client)
                client.close()

    async def _introduce(self, client: socket.socket) -> None:
        """Connect a client with the server, in the weather for new links. As with TCP itself, it takes a round trip."""
        link = Link(self, next(self._numbers))
        self.links.append(link)
        leg = self._depart(Towards.SERVER)
        family, address = self._address
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setblocking(False)
        try:
            await asyncio.sleep(sum(weather.latency for weather in self._weather.values()))
            await self._loop.sock_connect(server, address)
        except BaseException:  # noqa: BLE001 — the server is not there
            link.is_open = False
            server.close()
            _reset_at_close(client)
            client.close()
            return
        if family == socket.AF_INET:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arrive(Towards.SERVER, leg)
        self._arrive(Towards.CLIENT, _Leg(leg.counting, leg.number + 1))
        for towards, source, sink in ((Towards.SERVER, client, server), (Towards.CLIENT, server, client)):
            flow = _Flow(self, link, towards, source, sink)
            flow.apply(self._weather[towards])
            link._flows[towards] = flow

    async def _stop(self) -> None:
        self._stop_listening()
        for link in self.links:
            link._close()
        for sock in self._ignored:
            sock.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset_at_close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)


def _address_of(dsn: str) -> tuple[int, Any]:
    """Where the server of a conninfo listens: a Unix socket if the host is a directory."""
    parameters = conninfo_to_dict(dsn)
    host = str(parameters.get("host") or "127.0.0.1")
    port = int(parameters.get("port") or 5432)
    if os.path.isabs(host):
        return socket.AF_UNIX, os.path.join(host, f".s.PGSQL.{port}")
    return socket.AF_INET, (host, port)
