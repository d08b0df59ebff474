"""One server session as the pool holds it: raw commands, cancelling a statement, and an end that is certain."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import TYPE_CHECKING, Any

import anyio
from psycopg import errors as e
from psycopg import pq, waiting
from psycopg.abc import PQGen, PQGenConn
from psycopg.generators import cancel, execute, fetch, send
from psycopg.pq.abc import PGcancelConn, PGconn, PGresult
from psycopg.waiting import Wait

from .client_state import Baseline
from .commit import CommitPhase, TransactionMark
from .reader import BAD, Reader, duplicate, socket_of
from .role import Role
from .site import describe_site
from .watch import end_of_peer, peer_has_closed

if TYPE_CHECKING:
    from .._core.slot import Slot

ACTIVE = pq.TransactionStatus.ACTIVE
IDLE = pq.TransactionStatus.IDLE
WAIT_R = Wait.R
WAIT_W = Wait.W

# Values of `Session.lease` that are no number of a lease.
NOT_LEASED = 0
POOLS_OWN = -1
SEVERED = -2
FORKED = -3

# How often, in seconds, it is looked whether the server has ended a session whose socket may not be read here: some
# round trips at first, as what is waited for is one.
END_INTERVAL = 0.002
MAX_END_INTERVAL = 0.1

_COPY_OUT = frozenset({pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH})
_FINE = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY})


class Session:
    """A PGconn, the reader of its socket, and the connection object that its user sees.

    The connection object is held here while nobody else has it. While it is leased only a weak reference is kept,
    so that a lease that is dropped without release is noticed when it is collected.
    """

    __slots__ = (
        "__weakref__",
        "alive_at",
        "backend_pid",
        "baseline",
        "cancel",
        "cancel_timeout",
        "commit",
        "connection",
        "ending",
        "ending_limit",
        "granted_to",
        "guard",
        "has_ended",
        "has_several",
        "held_warned",
        "holder",
        "in_thread",
        "in_transaction",
        "is_noted",
        "lease",
        "mark",
        "pgconn",
        "prepared",
        "reader",
        "reference",
        "refused_write",
        "role",
        "round_trip",
        "shared",
        "site_code",
        "site_offset",
        "slot",
        "stack",
        "touched",
        "undone_lease",
    )

    def __init__(
        self,
        pgconn: PGconn,
        loop: asyncio.AbstractEventLoop,
        cancel_timeout: float,
        *,
        guard: AbstractContextManager[object] | None = None,
    ) -> None:
        self.pgconn = pgconn
        self.backend_pid = pgconn.backend_pid
        shared = self.shared = guard is not None  # whether its users run their statements in threads of their own
        self.reader = Reader(loop, pgconn, keeps_reading=not shared)
        # Who ends a session looks at its descriptor, which a thread inside libpq may close in that instant.
        self.guard = guard or contextlib.nullcontext()
        self.granted_to: Any = None  # if shared: the waiter that has not taken it yet, and the number of its lease
        self.alive_at = 0.0  # if shared: when its socket was last seen open, or the server heard
        self.in_thread = False  # whether one is inside libpq now: then nobody else may finish the PGconn
        self.cancel_timeout = cancel_timeout
        self.connection: Any = None
        self.reference: weakref.ref[Any] | None = None
        self.baseline: Baseline | None = None
        self.slot: Slot | None = None
        self.ending: socket.socket | None = None  # after `sever`: the server's end of the session comes here
        self.ending_limit: asyncio.TimerHandle | None = None  # severs if a cancelled statement does not end
        self.cancel: PGcancelConn | None = None  # and by this it is asked to stop working for it
        self.has_several = False  # whether that is a pipeline, each statement of which is to be cancelled
        self.undone_lease = NOT_LEASED  # the last one that was ended by hand with a transaction open
        self.lease = NOT_LEASED  # the number of the current lease
        self.prepared = 0  # how many statements psycopg had prepared when the last lease ended
        self.touched = False  # whether anything may have changed in the current lease, on the server or here
        self.in_transaction = False  # whether losing the connection now would lose work
        self.role: Role | None = None  # which its server must have
        self.refused_write = False  # whether it has refused a write in the current lease, as one of another role does
        self.commit = CommitPhase.NONE
        self.has_ended = end_of_peer(self.reader.fd)  # for as long as the descriptor is this session's
        self.mark: TransactionMark | None = None  # of a tracked transaction that is about to be committed
        self.site_code: CodeType | str | None = None
        self.site_offset = 0
        self.stack: str | None = None
        self.held_warned = False
        self.is_noted = False  # whether the end of the current lease is more than its duration to be counted
        # Who took the current lease; a weak reference, as a lease must not keep its task from being collected.
        self.holder: Callable[[], object] | None = None
        self.round_trip = 0.0  # the least that a lane has seen, in seconds; 0 until then

    @property
    def site(self) -> str:
        """Where the current lease was acquired."""
        return describe_site(self.site_code, self.site_offset)

    @property
    def is_read_only(self) -> bool:
        """Whether the server has reported that it takes no writes, in a pool that asked for one that does."""
        return self.role is not None and self.role.is_lost(self.pgconn)

    async def command(self, sql: bytes) -> list[PGresult]:
        """Run SQL by the simple protocol, below psycopg's transactions and caches. Raises the server's error."""
        try:
            self.pgconn.send_query(sql)
        except e.Error:
            self.reader.stop_if_lost()
            raise
        results: list[PGresult] = await self.reader.run(execute(self.pgconn))
        for result in results:
            if result.status not in _FINE:
                raise e.error_from_result(result)
        return results

    # --- ending a statement that nobody waits for any more --------------------------------------------------

    async def end_statement(self, generator: Any) -> None:
        """Have the server cancel the running statement and read to its end, for at most `cancel_timeout`.

        `generator` is the one that is half-way, None if it has ended and only its stream goes on. Past the time
        the socket is shut down, and the connection is lost. Whoever calls this re-raises the cancellation that he
        caught; further ones that arrive meanwhile change nothing, as the time is bounded.
        """
        with anyio.CancelScope(shield=True):
            deadline = self.reader.loop.time() + self.cancel_timeout
            request = self._start_cancel()
            ended = self.reader.resume(generator) if generator is not None else None
            in_time = ended is None or await self._await_until(ended, deadline)
            if in_time:
                await self._drop_results(deadline)
            # The server may act on the request until it has closed its connection: then it would hit what the
            # next user does.
            requested = await self._await_until(request, deadline) and request.result()
            # What a pipeline has left is read when psycopg ends that.
            ended_whole = self.pgconn.transaction_status != ACTIVE or self.pgconn.pipeline_status
            if not (requested and in_time and ended_whole):
                self.sever()

    async def await_rollback(self, generator: Any) -> None:
        """Read to the end of a running ROLLBACK, for at most `cancel_timeout`; then sever.

        Whoever it is run for was cancelled and is, in a scope of anyio's, cancelled again here. A request to cancel
        would take longer than a ROLLBACK does, and might hit it.
        """
        with anyio.CancelScope(shield=True):
            deadline = self.reader.loop.time() + self.cancel_timeout
            if generator is not None and not await self._await_until(self.reader.resume(generator), deadline):
                self.sever()

    async def cancel_statement(self) -> None:
        """Have the server cancel the running statement, which is then to be read to its end. Severs if it is not known
        to have done so within `cancel_timeout`: the request might still be carried out, upon the next user's statement.
        As with `end_statement`, cancellations that arrive meanwhile change nothing.
        """
        with anyio.CancelScope(shield=True):
            deadline = self.reader.loop.time() + self.cancel_timeout
            request = self._start_cancel()
            if not (await self._await_until(request, deadline) and request.result()):
                self.sever()

    def limit_ending(self) -> None:
        """Give the running statement, which was cancelled, `cancel_timeout` to end; then sever."""
        self._drop_limit()
        self.ending_limit = self.reader.loop.call_later(self.cancel_timeout, self.sever)
        self.lift_limit()

    def lift_limit(self) -> None:
        """Forget the limit, if there is one, when the statement has ended."""
        if self.ending_limit is not None and self.pgconn.transaction_status != ACTIVE:
            self._drop_limit()

    def _drop_limit(self) -> None:
        if self.ending_limit is not None:
            self.ending_limit.cancel()
            self.ending_limit = None

    def _start_cancel(self) -> asyncio.Task[bool]:
        return self.reader.loop.create_task(self._request_cancel(), name="asyncpool: cancel a statement")

    async def _request_cancel(self) -> bool:
        """Ask the server to cancel what it does for this session. False if it is not known to have done so."""
        if self.pgconn.status == BAD:
            return True
        return await self._send_cancel(self.pgconn.cancel_conn())

    async def _send_cancel(self, request: PGcancelConn) -> bool:
        try:
            await waiting.wait_conn_async(_run_cancel(request), interval=1.0, timeout=self.cancel_timeout)
        except e.Error:
            return False
        finally:
            request.reset()  # one that was not answered has its socket still
        return True

    async def _drop_results(self, deadline: float) -> None:
        """Read what a stream or a COPY has left: psycopg fetches it piece by piece, and a cancellation stops that."""
        if self.pgconn.transaction_status == ACTIVE and not self.pgconn.pipeline_status:
            work = self.reader.run(_read_to_the_end(self.pgconn))
            reading = self.reader.loop.create_task(work, name="asyncpool: read a cancelled statement's rest")
            if not await self._await_until(reading, deadline):
                reading.cancel()

    def drop_results_in_thread(self) -> None:
        """The same after Ctrl-C: psycopg has cancelled the statement and read the error, not what follows it."""
        if self.pgconn.transaction_status == ACTIVE and not self.pgconn.pipeline_status:
            with contextlib.suppress(e.Error):  # lost, or not in time: then it comes back in the middle of something
                waiting.wait(_read_to_the_end(self.pgconn), self.pgconn.socket, timeout=self.cancel_timeout)

    async def _await_until(self, future: asyncio.Future[Any], deadline: float) -> bool:
        """Wait for a future until the loop's time `deadline`, cancelled or not. Its result is not looked at."""
        while not future.done():
            remaining = deadline - self.reader.loop.time()
            if remaining <= 0:
                future.add_done_callback(_retrieve)
                return False
            try:
                await asyncio.wait((future,), timeout=remaining)
            except asyncio.CancelledError:
                continue  # for the caller to raise
        _retrieve(future)
        return True

    # --- the end --------------------------------------------------------------------------------------------

    def sever(self) -> None:
        """Close this side at once: whoever waits on the session gets an error. `close` waits for the server's side.

        If it is a thread that waits on it, the PGconn is left to that thread. The lease is to be ended before.
        """
        self._drop_limit()
        with self.guard:
            if not self._duplicate():
                return
            if self.in_thread or self.pgconn.transaction_status == ACTIVE:
                self.cancel = self.pgconn.cancel_conn()
                self.has_several = bool(self.pgconn.pipeline_status)
            if self.in_thread:
                return
        self._finish()

    def sever_in_thread(self) -> None:
        """The same, by the thread that is inside libpq, when its lease has been ended meanwhile."""
        with self.guard:
            self._duplicate()
            self.pgconn.finish()
            self.in_thread = False

    def _duplicate(self) -> bool:
        """Keep a descriptor by which the server's end of the session is seen. False if it is not for us to end."""
        fd = socket_of(self.pgconn)
        if fd is None or self.pgconn.status == BAD or self.ending is not None or self.lease == FORKED:
            return False
        with contextlib.suppress(OSError):  # no descriptor left: then the end is not waited for
            self.ending = duplicate(fd)
        return True

    def _finish(self) -> None:
        if self.shared and asyncio._get_running_loop() is not self.reader.loop:
            self.leave_loop()
            self.pgconn.finish()
            return
        self.reader.stop()
        self.pgconn.finish()
        self.reader.fail()

    def leave_loop(self) -> None:
        """The socket is closed, or about to be, in another thread: have the event loop forget it."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.reader.loop.call_soon_threadsafe(self.reader.stop)

    async def close(self, timeout: float) -> bool:
        """End the session and wait until the server has. False if it has not within `timeout` seconds."""
        self.reference = None
        self.sever()
        if not self.in_thread:
            self._finish()
        if self.ending is None:
            return True  # the server has ended it
        loop = self.reader.loop
        deadline = loop.time() + timeout
        if self.cancel is not None:
            with anyio.move_on_after(timeout):
                await self._send_cancel(self.cancel)
                await self._wait_for_thread(self.ending, self.cancel)
        if self.in_thread:
            return _shut_down(self.ending)
        cancelling = None
        if self.cancel is not None and self.has_several:
            cancelling = loop.create_task(self._cancel_the_next(self.cancel), name="asyncpool: cancel a pipeline")
        try:
            return await linger(self.ending, max(0.0, deadline - loop.time()))
        finally:
            if cancelling is not None:
                cancelling.cancel()
                cancelling.add_done_callback(_retrieve)

    async def _wait_for_thread(self, ending: socket.socket, request: PGcancelConn) -> None:
        """Wait until no thread is inside libpq, or the server has ended the session: until then what arrives is the
        thread's. It may just be about to send its statement, so that one request to cancel could come too early.
        """
        pause = END_INTERVAL
        if self.in_thread:
            with contextlib.suppress(OSError):  # the server has closed it
                ending.shutdown(socket.SHUT_WR)
        while self.in_thread and not peer_has_closed(ending.fileno()):
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_END_INTERVAL)
            await self._send_cancel(request)

    async def _cancel_the_next(self, request: PGcancelConn) -> None:
        """Cancel one statement of a pipeline after the other: the server has read them, and would execute them all."""
        while True:
            await asyncio.sleep(END_INTERVAL)
            await self._send_cancel(request)

    @property
    def is_lost(self) -> bool:
        """Whether it was ended from outside, not by `sever`."""
        return self.pgconn.status == BAD and self.ending is None

    def abandon(self) -> None:
        """End the session without waiting; for when there is no event loop to wait in."""
        self.reference = None
        self._drop_limit()
        if not self.reader.loop.is_closed():
            self.reader.stop()
        self.pgconn.finish()
        if self.ending is not None:
            self.ending.close()


def _read_to_the_end(pgconn: PGconn) -> PQGen[None]:
    """Read and forget all that the running statement sends; a COPY from here is ended with a failure."""
    while (result := (yield from fetch(pgconn))) is not None:
        if result.status == pq.ExecStatus.COPY_IN:
            while pgconn.put_copy_end(b"cancelled") == 0:
                while not (yield WAIT_W):
                    continue
            yield from send(pgconn)
        elif result.status in _COPY_OUT:
            with contextlib.suppress(e.DatabaseError):  # the error is the next result as well
                while (size := pgconn.get_copy_data(1)[0]) >= 0:
                    if size == 0:
                        while not (yield WAIT_R):
                            continue
                        pgconn.consume_input()


def _retrieve(future: asyncio.Future[Any]) -> None:
    """See the exception of a statement that nobody waits for any more, lest asyncio complain of it."""
    if not future.cancelled():
        future.exception()


def _run_cancel(request: PGcancelConn) -> PQGenConn[None]:
    request.start()
    yield from cancel(request)


def _shut_down(sock: socket.socket) -> bool:
    """End a socket for a thread that waits on it. Whether the peer had closed it before."""
    with sock:
        ended = peer_has_closed(sock.fileno())
        with contextlib.suppress(OSError):  # both sides have closed it
            sock.shutdown(socket.SHUT_RDWR)
        return ended


async def linger(sock: socket.socket, timeout: float) -> bool:
    """Wait until the peer closes a socket whose other descriptor is closed already: the server counts a session
    until then. False if that takes longer than `timeout` seconds. Closes the socket.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        sock.close()  # never connected, or gone already
        return True
    ended = loop.create_future()

    def read() -> None:
        try:
            while sock.recv(65536):
                pass
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(sock.fileno(), read)
    try:
        with anyio.move_on_after(timeout):
            await ended
    finally:
        loop.remove_reader(sock.fileno())
        sock.close()
    return ended.done() and not ended.cancelled()
