"""What `pool.acquire()` returns: awaited it is a connection, entered it is a block that commits at its end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Generator
from threading import get_ident
from time import monotonic
from types import CodeType, FunctionType, TracebackType, coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

from psycopg import AsyncConnection, pq

from .._core.policy import NEVER
from .._core.slot import Slot
from ..errors import PoolClosed, PoolError
from ..events import CloseReason, Queued
from .connection import Leased, PooledConnection, describe_unfinished
from .leases import LEASED
from .reader import BAD
from .runner import FutureWaiter, Runner
from .session import SEVERED, Session
from .watch import WATCH_STALENESS

C = TypeVar("C", bound=AsyncConnection[Any])

if TYPE_CHECKING or sys.version_info >= (3, 12):
    current_task: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = asyncio.current_task
else:
    # What the function of that name reads; it is slow there.
    current_task = asyncio.tasks._current_tasks.get

INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR


class Default:
    """The type of DEFAULT, which stands for the pool's own setting where None has a meaning."""

    def __repr__(self) -> str:
        return "acquire_timeout"


DEFAULT = Default()


class Elsewhere:
    """An attribute that is none: something else has it, for which this is taken, and the error says what to do.

    A `__getattr__` would slow every attribute down.
    """

    def __init__(self, remedy: str) -> None:
        self._remedy = remedy

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> object:
        raise AttributeError(f"{owner.__name__} has no {self._name!r}: {self._remedy}")


class Acquisition(Generic[C]):
    """A connection to be: `await` it, or enter it with `async with`."""

    __slots__ = ("_code", "_connection", "_lease", "_offset", "_runner", "_timeout")

    _connection: Any

    def __init__(self, runner: Runner, timeout: float | Default | None, code: CodeType, offset: int) -> None:
        self._runner = runner
        self._timeout = timeout
        self._code = code  # where acquire() was called
        self._offset = offset

    def __await__(self, in_block: bool = False) -> Generator[Any, Any, C]:
        runner = self._runner
        task = current_task(runner.loop)
        if get_ident() != runner.thread or task is None:
            runner.check_loop()
        now = monotonic()
        if now - runner.watch.polled_at > WATCH_STALENESS:
            runner.watch.poll()
        slot = runner.machine.take(now)
        if slot is None:
            slot = yield from self._wait(now)
        session: Session = slot.resource  # type: ignore[assignment]  # an object to the machine, which never looks
        session.holder = ref(task or runner.loop)
        session.site_code = self._code
        session.site_offset = self._offset
        if session.touched:  # somebody went on with the object after its release
            runner.leases.restore(session, session.connection)
        connection: Any = session.connection
        session.connection = None
        session.lease = slot.uses
        if in_block:
            slot.owner = session.holder
            self._lease = slot.uses
            self._connection = connection
        else:
            slot.owner = None
        if runner.is_plain:
            return connection  # type: ignore[no-any-return]  # of the class that the pool was given
        self._lease = slot.uses
        self._connection = connection = runner.leases.begin(session, connection, now)
        if runner.config.setup is not None:
            yield from self._set_up(connection).__await__()
        if session.lease != self._lease:
            raise PoolError(f"{runner.config.name}: setup has given its connection back")
        return connection  # type: ignore[no-any-return]  # as above

    def _wait(self, began: float) -> Generator[Any, Any, Slot]:
        """Stand in the queue until a connection comes that lives.

        Every local variable of this costs 8 bytes for each that waits.
        """
        runner = self._runner
        deadline = runner.config.acquire_timeout if isinstance(self._timeout, Default) else self._timeout
        deadline = NEVER if deadline is None else began + deadline
        now = began
        while True:
            waiter = FutureWaiter(deadline, current_task(runner.loop), runner.loop.create_future())
            runner.perform(runner.machine.enqueue(waiter, now))
            if not runner.is_plain and runner.observations:
                runner.observations.note(Queued, runner.waiting)
            try:
                if waiter.future.done() and waiter.slot is None:
                    yield  # refused at once: a loop that tries again must not keep the event loop from everybody else
                yield from waiter.future
            except BaseException:
                # One that was refused in the same instant, be it before or after, is counted as that.
                runner.cancelled += waiter.slot is not None or waiter in runner.machine.waiters
                runner.perform(runner.machine.withdraw(waiter, monotonic()))
                raise
            slot = waiter.slot
            if slot is None or slot.state is not LEASED:
                raise self._refused(waiter, began)
            now = monotonic()
            runner.watch.look(now)
            if not slot.is_disconnected:
                runner.waits.record(now - began)
                return slot
            runner.machine.note_unused(was_granted=True)
            runner.perform(runner.machine.discard(slot, slot.doom, now))  # it ended since it was granted

    def _refused(self, waiter: FutureWaiter, began: float) -> PoolError:
        if (refused := waiter.future.result()) is not None:
            return self._runner.refusal(*refused, began=began, owner=waiter.owner)
        self._runner.machine.note_unused(was_granted=True)
        return PoolClosed(f"{self._runner.config.name} is closed")  # with timeout=0, between the grant and now

    async def _set_up(self, connection: PooledConnection) -> None:
        runner = self._runner
        session = connection._session
        try:
            await runner.driver.set_up_lease(connection)
        except BaseException as ex:
            if session.lease in (self._lease, SEVERED):  # else it has given it back, and it may be somebody else's
                if isinstance(ex, Exception):
                    runner.leases.discard_lease(connection, CloseReason.SETUP_FAILED)
                else:
                    runner.leases.end_lease(connection, after_block=True)
            raise

    if TYPE_CHECKING:  # typeshed's AsyncExitStack wants coroutines

        async def __aenter__(self) -> C: ...

        async def __aexit__(
            self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
        ) -> None: ...

    else:
        # The same code, for `async with` to run without a call that returns what it is to await.
        __aenter__ = coroutine(FunctionType(__await__.__code__, globals(), "__aenter__", (True,)))

        def __aexit__(self, exc_type, exc, tb):
            return self._exit(exc_type)

        def __enter__(self):
            raise TypeError("what acquire() returns wants `async with`; SyncPool is the pool for `with`")

        def __exit__(self, *_):
            """Python looks for it before it calls __enter__."""

        close, commit, cursor, execute, pipeline, rollback, transaction = (
            Elsewhere("`await` what acquire() returns, or use `async with`, to get a connection") for _ in range(7)
        )

    def _exit(self, exc_type: type[BaseException] | None) -> Awaitable[None]:
        leases = self._runner.leases
        connection: PooledConnection = self._connection
        session = connection._session
        if session.lease == self._lease:
            if leases.give_back_clean(connection):
                return leases.finished
        elif session.lease != SEVERED:
            if exc_type is None:
                check_not_undone(leases.name, session, self._lease)
            return leases.finished  # it was given back inside the block
        if exc_type is not None:
            leases.end_lease(connection, after_block=True)
            return leases.finished
        return self._finish(connection, session)

    async def _finish(self, connection: PooledConnection, session: Session) -> None:
        """Commit what the block has done, or say why that is impossible. The lease ends in either case."""
        try:
            if has_to_commit(self._runner.config.name, connection):
                await connection.commit()
        finally:
            if session.lease in (self._lease, SEVERED):
                self._runner.leases.end_lease(connection, after_block=True)


def check_not_undone(name: str, session: Session, lease: int) -> None:
    """Raise PoolError if a block that ends normally gave its connection back with a transaction open."""
    if session.undone_lease == lease:
        raise PoolError(
            f"{name}: the block's connection was given back inside of it, by close() or by hand, with a transaction"
            " open, which is rolled back: leave that to the end of the block, which commits"
        )


def has_to_commit(name: str, connection: Leased) -> bool:
    """Whether a block of the pool `name` that ends normally leaves something to commit.

    Raises PoolError if what it did cannot be committed.
    """
    session = connection._session
    status = session.pgconn.transaction_status
    if session.pgconn.status == BAD:
        if session.in_transaction:
            raise PoolError(f"{name}: the connection was lost inside the block, and what it did is not committed")
        return False
    if unfinished := describe_unfinished(connection):
        raise PoolError(
            f"{name}: the block ended with its connection {unfinished}; it is closed, and nothing committed"
        )
    check_not_failed(name, connection)
    return status == INTRANS


def check_not_failed(name: str, connection: Leased) -> None:
    """Raise PoolError if a block of the pool `name` ends normally in a failed transaction."""
    if connection.pgconn.transaction_status == INERROR:
        raise PoolError(
            f"{name}: the block ended in a failed transaction, which is rolled back: a COMMIT would only seem to"
            " succeed. Let the error pass, or use `conn.transaction()` around what may fail"
        )
