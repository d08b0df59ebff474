"""Knowing within milliseconds that the server ended a session, without touching the connection.

Every pooled socket is registered once in a private epoll (kqueue on macOS and BSD), edge-triggered and for the
peer's close only, so that query traffic never wakes it; that epoll's own descriptor is registered in the event
loop. An event is a hint: the session's present socket is polled before it is believed, because a descriptor that
was duplicated or inherited by a fork keeps a registration alive after its number was given to another socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

# How old the last look may be when a connection is handed out, in seconds: for a loop that was too busy to look by
# itself. A look takes about 0.5 µs.
WATCH_STALENESS = 0.001


class _Poller(Protocol):
    def fileno(self) -> int: ...
    def register(self, fd: int) -> None: ...
    def unregister(self, fd: int) -> None: ...
    def events(self) -> list[int]: ...
    def close(self) -> None: ...


class DisconnectWatch(Generic[T]):
    """Calls `on_disconnect(item)` when the peer of an item's socket has closed it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_disconnect: Callable[[T], None]) -> None:
        self.loop = loop
        self._on_disconnect = on_disconnect
        self._items: dict[int, T] = {}
        self._pid = os.getpid()
        self.polled_at = 0.0
        self._poller = _make_poller()
        if self._poller is not None:
            loop.add_reader(self._poller.fileno(), self.poll)

    def register(self, fd: int, item: T) -> None:
        """Watch a socket. To be undone before its descriptor is closed."""
        self._items[fd] = item
        if self._poller is not None:
            self._poller.register(fd)

    def unregister(self, fd: int, item: T) -> None:
        """Stop watching an item's socket. Nothing happens if its number is another item's by now."""
        if self._items.get(fd) is not item:
            return
        del self._items[fd]
        if self._poller is not None:
            with contextlib.suppress(OSError):  # closed already, which has ended the watch as well
                self._poller.unregister(fd)

    def look(self, now: float) -> None:
        """Poll if the last time is too long ago for handing out a connection; in the event loop's thread only."""
        if now - self.polled_at > WATCH_STALENESS and asyncio._get_running_loop() is self.loop:
            self.poll()

    def poll(self) -> None:
        """See what has come, at once; the event loop does so by itself when it has its turn.

        Where there is neither epoll nor kqueue, this looks at every socket, and nothing else does.
        """
        self.polled_at = monotonic()
        if os.getpid() != self._pid:  # the epoll is shared with the parent of a fork
            return
        for fd in self._poller.events() if self._poller is not None else list(self._items):
            item = self._items.get(fd)
            if item is not None and peer_has_closed(fd):
                self._on_disconnect(item)

    def close(self) -> None:
        """Stop watching everything."""
        self._items.clear()
        if self._poller is not None:
            if not self.loop.is_closed() and os.getpid() == self._pid:
                self.loop.remove_reader(self._poller.fileno())
            self._poller.close()
            self._poller = None


if sys.platform == "linux":

    class _Epoll:
        def __init__(self) -> None:
            self._epoll = select.epoll()
            self.fileno = self._epoll.fileno
            self.close = self._epoll.close

        def register(self, fd: int) -> None:
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)

        def unregister(self, fd: int) -> None:
            self._epoll.unregister(fd)

        def events(self) -> list[int]:
            return [fd for fd, _ in self._epoll.poll(0)]

    _CLOSED_EVENTS = select.POLLRDHUP | select.POLLHUP | select.POLLERR

    def _make_poller() -> _Poller | None:
        return _Epoll()

    def peer_has_closed(fd: int) -> bool:
        """Whether the other side has closed this socket; what it sent before may still be unread."""
        return bool(end_of_peer(fd)())

    def end_of_peer(fd: int) -> Callable[[], object]:
        """The same question, for who asks it of one socket again and again: truthy if it is closed."""
        poll = select.poll()
        poll.register(fd, _CLOSED_EVENTS)
        return partial(poll.poll, 0)

else:
    import socket

    def peer_has_closed(fd: int) -> bool:
        """Whether the other side has closed this socket and nothing that it sent before is unread."""
        with socket.socket(fileno=socket.dup(fd)) as sock:
            try:
                return sock.recv(1, socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)) == b""
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                return True

    def end_of_peer(fd: int) -> Callable[[], object]:
        """The same question, for who asks it of one socket again and again."""
        return partial(peer_has_closed, fd)

    if hasattr(select, "kqueue"):

        class _Kqueue:
            def __init__(self) -> None:
                self._kqueue = select.kqueue()
                self.fileno = self._kqueue.fileno
                self.close = self._kqueue.close

            def register(self, fd: int) -> None:
                # A threshold that no answer reaches: only EV_EOF, which ignores it, wakes.
                flags = select.KQ_EV_ADD | select.KQ_EV_CLEAR
                event = select.kevent(fd, select.KQ_FILTER_READ, flags, select.KQ_NOTE_LOWAT, 1 << 30)
                self._kqueue.control([event], 0, 0)

            def unregister(self, fd: int) -> None:
                self._kqueue.control([select.kevent(fd, select.KQ_FILTER_READ, select.KQ_EV_DELETE)], 0, 0)

            def events(self) -> list[int]:
                events = self._kqueue.control(None, 64, 0)
                return [event.ident for event in events if event.flags & select.KQ_EV_EOF]

        def _make_poller() -> _Poller | None:
            return _Kqueue()

    else:

        def _make_poller() -> _Poller | None:
            return None
