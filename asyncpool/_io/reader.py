"""Waiting for psycopg's generators on a socket whose reader stays registered between the waits.

psycopg adds and removes a reader, a future and a timer for every wait. Here the reader stays, the generator is
driven from its callback, and the waiting task is woken once, when the generator has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import select
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

from psycopg import OperationalError, pq
from psycopg import errors as e
from psycopg.abc import PQGen
from psycopg.pq.abc import PGconn
from psycopg.waiting import Ready, Wait

RV = TypeVar("RV")

BAD = pq.ConnStatus.BAD
READ = int(Wait.R)
WRITE = int(Wait.W)
_READY_R = Ready.R
_READY_W = Ready.W
_READY_RW = Ready.RW

# How long, in seconds, generators that never block may keep the event loop; psycopg's value.
MAX_BUSY_TIME = 0.005


class Reader:
    """Drives one generator at a time on one socket. The loop holds the Reader, never the connection object."""

    __slots__ = (
        "_context",
        "_future",
        "_generator",
        "_pgconn",
        "_reading",
        "_state",
        "_writing",
        "answered_at",
        "fd",
        "keeps_reading",
        "loop",
        "on_lost",
        "yielded_at",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, pgconn: PGconn, *, keeps_reading: bool = True) -> None:
        self.loop = loop
        self.keeps_reading = keeps_reading  # between generators; not if others than the loop read in that time
        self.fd = pgconn.socket
        self.on_lost: Callable[[], None] | None = None  # called when libpq has closed the socket by itself
        self._pgconn = pgconn
        self._context = contextvars.Context()  # not that of the lease in which the reader happens to be registered
        self.answered_at = monotonic()  # when the server was last heard
        self.yielded_at = 0.0  # when the event loop last had control
        self._future: asyncio.Future[Any] | None = None
        self._generator: PQGen[Any] | None = None
        self._state = READ
        self._reading = False
        self._writing = False

    def drive(self, generator: PQGen[RV], state: int) -> asyncio.Future[RV]:
        """Start driving a generator that has yielded `state`. The future has its return value or its exception.

        Cancelling the future leaves the generator where it is: `resume` goes on with it.
        """
        if self._future is not None and not self._future.done():
            raise e.InterfaceError("another task is waiting for a result on this connection")
        future: asyncio.Future[RV] = self.loop.create_future()
        self._future = future
        self._generator = generator
        self._state = state
        if self._pgconn.status == BAD:
            self.fail()
        else:
            self._await(state)
        return future

    def resume(self, generator: PQGen[RV]) -> asyncio.Future[RV]:
        """Go on driving a generator whose future was cancelled."""
        return self.drive(generator, self._state)

    async def run(self, generator: PQGen[RV]) -> RV:
        """Drive a generator from its start to its end."""
        try:
            state = next(generator)
        except StopIteration as done:
            result: RV = done.value
            return result
        except BaseException:
            self.stop_if_lost()
            raise
        return await self.drive(generator, state)

    async def let_others_run(self) -> None:
        """Yield to the event loop if generators that never block have kept it for long."""
        if monotonic() - self.yielded_at >= MAX_BUSY_TIME:
            await asyncio.sleep(0)
            self.yielded_at = monotonic()

    def expire(self) -> None:
        """Fail the wait with psycopg's timeout, unless what has arrived already completes it."""
        future = self._future
        if future is None or future.done():
            return
        if ready := poll_ready(self.fd, self._state):
            self._advance(ready)
        if not future.done():
            self._end()
            future.set_exception(e._WaitTimeout("wait timeout expired"))  # what notifies() expects

    def await_writable(self) -> None:
        """There is more to send than the socket takes: send the generator on also when it takes more."""
        if self._future is not None and not self._state & WRITE:
            self._state |= WRITE
            self._set_writing(True)

    def let_go(self) -> None:
        """Drive the generator no more, whatever it waits for."""
        self._end()

    def stop(self) -> None:
        """Take the socket out of the event loop, before its descriptor is closed."""
        self._stop_reading()
        if self._writing:
            self._set_writing(False)
        if self.on_lost is not None:
            self.on_lost()
            self.on_lost = None

    def stop_if_lost(self) -> None:
        """libpq closes the socket when it finds it dead. The number may be another socket's in a moment, which the
        event loop would take for the old one.
        """
        if self._pgconn.status == BAD:
            self.stop()

    def renew(self) -> None:
        """The peer has closed the socket: register anew, as uvloop may have dropped the reader by itself."""
        if self._reading:
            self._stop_reading()
            if self._future is not None and self._state & READ:
                self._context.run(self.loop.add_reader, self.fd, self._on_readable)
                self._reading = True

    def fail(self) -> None:
        """The PGconn is finished: let the generator that waits for it find out."""
        future = self._future
        if future is None or future.done():
            return
        self._send(_READY_R)
        if not future.done():
            self._end()
            future.set_exception(OperationalError("the connection is closed"))

    def _await(self, state: int) -> None:
        """Have the generator sent on when the socket is in the state that it asks for."""
        while state & WRITE:
            # Nearly always writable: a poll is much cheaper than a round through the event loop.
            if monotonic() - self.yielded_at >= MAX_BUSY_TIME:
                self._state = state
                self.loop.call_soon(self._on_turn)
                return
            if not (ready := poll_ready(self.fd, state)):
                break
            next_state = self._send(ready)
            if next_state is None:
                return
            state = next_state
        self._state = state
        if state & READ and not self._reading:
            self._context.run(self.loop.add_reader, self.fd, self._on_readable)
            self._reading = True
        if bool(state & WRITE) is not self._writing:
            self._set_writing(bool(state & WRITE))

    def _advance(self, ready: Ready) -> None:
        state = self._send(ready)
        if state is not None and (state != self._state or state & WRITE):
            self._await(state)

    def _send(self, ready: Ready) -> int | None:
        """Send the generator on; its next state, or None when it has ended and the future is set."""
        future, generator = self._future, self._generator
        assert future is not None
        assert generator is not None
        try:
            return generator.send(ready)
        except StopIteration as done:
            self._end()
            future.set_result(done.value)
        except OSError as ex:
            self._end()
            future.set_exception(OperationalError(f"connection socket closed: {ex}"))
        except BaseException as ex:
            self._end()
            future.set_exception(ex)
        return None

    def _end(self) -> None:
        self._future = None
        self._generator = None
        if self._writing:
            self._set_writing(False)
        if not self.keeps_reading:
            self._stop_reading()
        self.stop_if_lost()

    def _on_readable(self) -> None:
        future = self._future
        if future is None or future.done() or not self._state & READ:
            # Nobody reads what has come, be it a notice, a notification or the end: the loop must not spin on it.
            self._stop_reading()
            return
        self.answered_at = self.yielded_at = monotonic()
        self._advance(_READY_R)
        # uvloop stops calling for a socket that was reset, whatever is left to be read.
        while not future.done() and self._state & READ and _has_failed(self.fd):
            self._advance(_READY_R)

    def _on_writable(self) -> None:
        if self._future is None or self._future.done():
            self._set_writing(False)
            return
        self.yielded_at = monotonic()
        self._advance(_READY_W)

    def _on_turn(self) -> None:
        """The loop has had its turn: go on with a generator that was about to write."""
        self.yielded_at = monotonic()
        if self._future is not None and not self._future.done():
            self._await(self._state)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            with contextlib.suppress(OSError):  # as in `_set_writing`
                self.loop.remove_reader(self.fd)

    def _set_writing(self, writing: bool) -> None:
        self._writing = writing
        if writing:
            self.loop.add_writer(self.fd, self._on_writable)
        else:
            # asyncio fails to go on with a reader alone on a socket that libpq has closed, and has forgotten both then.
            with contextlib.suppress(OSError):
                self.loop.remove_writer(self.fd)


if hasattr(select, "poll"):

    def poll_ready(fd: int, state: int) -> Ready:
        """Which of READ and WRITE in `state` the socket is ready for, now."""
        poll = select.poll()
        poll.register(fd, (select.POLLIN if state & READ else 0) | (select.POLLOUT if state & WRITE else 0))
        ready = 0
        for _, event in poll.poll(0):
            if event & ~select.POLLOUT and state & READ:
                ready |= _READY_R
            if event & ~select.POLLIN and state & WRITE:
                ready |= _READY_W
        return Ready(ready)

    def _has_failed(fd: int) -> bool:
        poll = select.poll()
        poll.register(fd, 0)
        return bool(poll.poll(0))

else:

    def poll_ready(fd: int, state: int) -> Ready:
        """Which of READ and WRITE in `state` the socket is ready for, now."""
        readable, writable, _ = select.select([fd] if state & READ else [], [fd] if state & WRITE else [], [], 0)
        return Ready((_READY_R if readable else 0) | (_READY_W if writable else 0))

    def _has_failed(fd: int) -> bool:
        return False


def socket_of(pgconn: PGconn) -> int | None:
    """The descriptor of a connection's socket; None when libpq has closed it."""
    try:
        return pgconn.socket
    except OperationalError:
        return None


def duplicate(fd: int) -> socket.socket:
    """A socket object over a descriptor of its own for the same connection."""
    return socket.socket(fileno=socket.dup(fd))
