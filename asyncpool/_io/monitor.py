"""The socket of the `monitor` option: who connects gets the pool's state, a line of JSON each second.

Nobody is heard, and nobody is waited for: a client's sending side is shut, and one that does not read until the system
keeps no more for it is let go. So there is no task here, only callbacks of the pool's event loop, none of which waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import json
import os
import select
import socket
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from time import monotonic

from ..errors import PoolError
from .log import logger

try:
    import fcntl
except ImportError:  # Windows, where there is no monitor
    fcntl = None  # type: ignore[assignment]

# Seconds between two lines; for as long as a line is given to newcomers, so that many of them cost no more than one.
INTERVAL = 1.0
STALE_AFTER = 0.1
# More than people look at; each may make the system keep a few hundred kilobytes.
MOST_CLIENTS = 8
SEND_BUFFER = 256 * 1024
# Those who come while the event loop is at something else: beyond these the system sends them away.
BACKLOG = 128
# Seconds in which nobody is let in after the process had no descriptor left for a client.
PAUSE = 1.0
# How often another pool that is just putting its socket into the same directory is waited for, and how long: it takes
# microseconds. Who holds the directory longer is no pool.
_LOCK_TRIES, _LOCK_PAUSE = 20, 0.001

_NO_SIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)


# --- the socket's place in the file system ------------------------------------------------------------------


class Listener:
    """A socket that listens at a path, for this user alone, and the file's removal."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.setblocking(False)
            with _alone_in(os.path.dirname(path) or "."):
                _bind(self.socket, path)
                self._finalizer = weakref.finalize(self, _remove, os.path.abspath(path), os.lstat(path), os.getpid())
                self.socket.listen(BACKLOG)
        except BaseException:
            self.socket.close()
            raise

    def remove(self) -> None:
        """Remove the file, then close: in this order nobody finds a socket there that nobody serves."""
        self._finalizer()
        self.socket.close()


@contextlib.contextmanager
def _alone_in(directory: str) -> Iterator[None]:
    """Keep other pools from replacing a socket in that directory meanwhile: one that is bound and does not listen yet
    is like one of a dead process.
    """
    assert fcntl is not None  # where there are Unix sockets, there is that
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # one may have the right to make files in it, and not to read it
        yield
        return
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _bind(listener: socket.socket, path: str) -> None:
    """Give the socket its file, which only this user may open from its first instant."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux the file does not take the socket's mode
        os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
    try:
        listener.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _make_room(path)
        listener.bind(path)
    # Nobody can connect in between, whatever the mode is: it does not listen yet.
    if stat.S_IMODE(os.lstat(path).st_mode) != stat.S_IRUSR | stat.S_IWUSR:
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)


def _make_room(path: str) -> None:
    """Remove the socket of a process that is gone. Raises OSError for anything else that is there."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "a file that is no socket is there, and is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # it listens, and its queue is full
        except PermissionError:
            raise PermissionError(errno.EACCES, "another user's socket is there") from None
    raise OSError(
        errno.EADDRINUSE, "somebody listens there already: give each pool, and each process, a path of its own"
    )


def _remove(path: str, made: os.stat_result, pid: int) -> None:
    """Remove the file, if it is this process's still."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            present = os.lstat(path)
            if (present.st_dev, present.st_ino) == (made.st_dev, made.st_ino):
                os.unlink(path)


def listen(path: str | os.PathLike[str], pool_name: str, *, made_by: int) -> Listener | None:
    """Listen for those who look at a pool that the process `made_by` has constructed.

    Raises PoolError if that cannot be. A forked child has no path of its own, and where another process listens it goes
    without, which the log says.
    """
    text = os.fspath(path)
    try:
        return Listener(text)
    except OSError as error:
        words = f"cannot listen at monitor={text!r}: {_reason(error, text)}"
        if error.errno != errno.EADDRINUSE or os.getpid() == made_by:
            raise PoolError(f"{pool_name}: {words}") from None
        logger.warning("%s: this forked process has no monitor: %s", pool_name, words)
        return None


def _reason(error: OSError, path: str) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no directory {os.path.dirname(path)!r}: make it first"
    return error.strerror or str(error)


# --- who looks at the pool ----------------------------------------------------------------------------------


class Monitor:
    """Tells those who connect to a listener what `snapshot` returns: a line, its end included."""

    def __init__(
        self,
        listener: Listener,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        snapshot: Callable[[], bytes],
    ) -> None:
        self._listener = listener
        self._loop = loop
        self._context = context
        self._snapshot = snapshot
        self._clients: set[socket.socket] = set()
        self._line = b""
        self._made_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._pid = os.getpid()
        _monitors.add(self)
        self._listen()

    @property
    def clients(self) -> int:
        """How many look."""
        return len(self._clients)

    def _listen(self) -> None:
        # In a context without variables of whoever opened the pool, as all that it does by itself.
        contextvars.Context().run(self._loop.add_reader, self._listener.socket.fileno(), self._on_client)

    def _on_client(self) -> None:
        if os.getpid() != self._pid:
            return  # the parent's, whose event loop a forked child has a copy of
        try:
            client, _ = self._listener.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # gone again
        except OSError as error:
            # No descriptor is left: it stays in the queue, and would wake the loop again and again.
            logger.debug("the monitor lets nobody in for %g s: %s", PAUSE, error)
            self._loop.remove_reader(self._listener.socket.fileno())
            self._loop.call_later(PAUSE, self._listen_again, context=self._context)
            return
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            client.shutdown(socket.SHUT_RD)
        if len(self._clients) >= MOST_CLIENTS:
            self._forget_those_gone()
        if len(self._clients) >= MOST_CLIENTS:
            _tell(client, json.dumps({"refused": f"{MOST_CLIENTS} clients look at this pool already"}).encode() + b"\n")
            client.close()
            return
        self._clients.add(client)
        if self._timer is None:
            self._timer = self._loop.call_later(INTERVAL, self._on_timer, context=self._context)
        self._tell((client,))

    def _listen_again(self) -> None:
        if self._listener.socket.fileno() >= 0:
            self._listen()

    def _on_timer(self) -> None:
        self._timer = None
        if os.getpid() != self._pid:
            return
        if self._clients:
            self._timer = self._loop.call_later(INTERVAL, self._on_timer, context=self._context)
            self._tell(tuple(self._clients))

    def _tell(self, clients: tuple[socket.socket, ...]) -> None:
        now = monotonic()
        if now >= self._made_at + STALE_AFTER:
            self._line, self._made_at = self._snapshot(), now
        for client in clients:
            if not _tell(client, self._line):
                self._clients.discard(client)
                client.close()

    def _forget_those_gone(self) -> None:
        for client in tuple(self._clients):
            if _has_left(client):
                self._clients.discard(client)
                client.close()

    def close(self) -> None:
        """Let everybody go, and remove the socket."""
        if os.getpid() != self._pid:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._loop.is_closed() and self._listener.socket.fileno() >= 0:
            self._loop.remove_reader(self._listener.socket.fileno())
        self._listener.remove()
        self._close_clients()

    def _close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def disown(self) -> None:
        """In a forked child: it would keep the socket open after the parent's end. The loop, whose epoll the two share,
        is not told.
        """
        self._listener.socket.close()
        self._close_clients()


def _tell(client: socket.socket, line: bytes) -> bool:
    """Whether the client, or the system for it, has taken all of the line. Of a part the rest would have to be kept."""
    try:
        return client.send(line, _NO_SIGNAL) == len(line)
    except OSError:
        return False


def _has_left(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, 0)  # what is always told: that the other side is closed
    return bool(poll.poll(0))


_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for monitor in tuple(_monitors):
        monitor.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
