"""Running a one-shot statement for a thread: on a lane of the event loop's, or on a lease in the thread itself."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from functools import partial
from time import monotonic
from types import CodeType
from typing import TYPE_CHECKING, Any

from psycopg import errors as e
from psycopg.abc import Params, Query
from psycopg.adapt import Transformer

from .._core.lanes import Lane, Pace
from ..errors import PoolClosed, PoolError, StatementTimeout
from .blocking_acquisition import BlockingAcquisition
from .connection import PooledBlockingConnection
from .locked_machine import current, ensure_stack
from .loop_thread import OWN_THREAD, check_not_finalizing
from .one_shot import what_was_lost
from .pipe import Pipe, run_alone
from .session import Session
from .statement import BINARY, TEXT, OneShot, pace_of

if TYPE_CHECKING:
    from psycopg.abc import Transformer as TransformerOf

    from .blocking import BlockingRunner

# How often, in seconds, it is looked whether the event loop is still there that is to wake a thread.
_LOOK_EVERY = 1.0

_UNKNOWN = Pace()


class ThreadOneShot(OneShot):
    """A statement that a thread waits for."""

    __slots__ = ("_gate", "timeout", "wants_lease")

    def __init__(
        self, query: Query, params: Params | None, timeout: float | None, *, retry: bool, binary: bool
    ) -> None:
        # Its pace is looked up in the event loop.
        super().__init__(query, params, _UNKNOWN, retry=retry, result_format=BINARY if binary else TEXT)
        self.owner = current.owner
        self.timeout = timeout
        self.wants_lease = False  # it is for the thread to run it, on a connection of its own
        self._gate = threading.Lock()
        self._gate.acquire()

    def wake(self) -> None:
        """Let the thread go on, if it was not woken before."""
        with contextlib.suppress(RuntimeError):
            self._gate.release()

    def wait(self, runner: BlockingRunner) -> None:
        """Wait until `wake`. Ctrl-C is raised from here. Raises PoolClosed if nobody is there any more to call that."""
        while not self._gate.acquire(timeout=_LOOK_EVERY):
            runner.check_loop()

    def transformer(self) -> TransformerOf:
        """One of its own: the lane's is the event loop's."""
        return Transformer(self.pipe.transformer)


class Submissions:
    """The way of statements from threads into the event loop."""

    def __init__(self, runner: BlockingRunner) -> None:
        self._runner = runner
        self._statements: deque[ThreadOneShot] = deque()
        self._is_announced = False

    def run(self, statement: ThreadOneShot, code: CodeType, offset: int) -> None:
        """Have it run, and wait for its end. Ctrl-C leaves nothing behind."""
        runner = self._runner
        name = runner.config.name
        check_not_finalizing(name)
        if runner.must_not_wait():
            raise PoolError(f"{name}: {OWN_THREAD}")
        ensure_stack()  # who announces must not fail half-way: all others would wait for what is never announced
        try:
            self._statements.append(statement)
            if not self._is_announced:
                self._is_announced = True
                self._announce()
            statement.wait(runner)
        except BaseException:
            runner.in_loop(partial(self._withdraw, statement))
            raise
        if statement.wants_lease:
            self._run_on_lease(statement, code, offset)

    def _announce(self) -> None:
        try:
            self._runner.loop.call_soon_threadsafe(self.begin_all)
        except RuntimeError:
            raise PoolClosed(f"{self._runner.config.name} is closed") from None

    def begin_all(self) -> None:
        """In the event loop: take what threads have submitted."""
        self._is_announced = False
        while self._statements:
            statement = self._statements.popleft()
            if statement.is_wanted:
                self._begin(statement)

    def _begin(self, statement: ThreadOneShot) -> None:
        runner = self._runner
        multiplexer = runner.multiplexer
        try:
            statement.pace = pace_of(multiplexer.paces, statement.query, runner.config.name)
        except Exception as error:
            statement.fail(error)
            return
        if statement.pace.is_slow or not runner.shares_lanes:
            statement.wants_lease = True
            statement.wake()
            return
        multiplexer.submit(statement, monotonic(), runner.config.acquire_timeout)
        if statement.timeout is not None:
            remaining = max(0.0, statement.began + statement.timeout - monotonic())
            statement.timer = runner.loop.call_later(remaining, multiplexer.expire, statement)

    def _withdraw(self, statement: ThreadOneShot) -> None:
        self.begin_all()  # Ctrl-C may have come before these were announced
        self._runner.multiplexer.withdraw(statement)

    # --- in the thread --------------------------------------------------------------------------------------

    def _run_on_lease(self, statement: ThreadOneShot, code: CodeType, offset: int) -> None:
        runner = self._runner
        deadline = None if statement.timeout is None else statement.began + statement.timeout
        while not statement.is_sent:
            limit = runner.config.acquire_timeout
            if deadline is not None:
                remaining = max(0.0, deadline - monotonic())
                limit = remaining if limit is None else min(limit, remaining)
            lease = partial(runner.lease, limit, code, offset)
            with BlockingAcquisition[Any](lease, runner.finish_interrupted) as connection:
                lost = self._run_once(connection, statement, deadline)
            if lost is not None:
                raise lost

    def _run_once(
        self, connection: PooledBlockingConnection, statement: ThreadOneShot, deadline: float | None
    ) -> Exception | None:
        """Run it. An error is returned if it was lost with its connection, and is not to be sent again."""
        session = connection._session
        pipe = Pipe(connection, session, Lane(is_watched=False))
        running = run_alone(pipe, statement)
        timeout = None if deadline is None else max(0.001, deadline - monotonic())
        try:
            connection.wait(running, timeout=timeout)
        except e._WaitTimeout:
            return self._cancel(connection, session, running)
        except e.OperationalError as error:
            return what_was_lost(self._runner.config.name, pipe, statement, error)
        finally:
            session.in_transaction = False  # nothing but this statement, whose error says what there is to say
        statement.is_sent = True
        with self._runner.machine.lock:
            self._runner.multiplexer.answered_in_threads += 1
        return None

    def _cancel(self, connection: PooledBlockingConnection, session: Session, running: Any) -> StatementTimeout:
        """Have the server end the statement, so that the connection is of use to the next."""
        try:
            connection.cancel_safe(timeout=session.cancel_timeout)
            connection.wait(running, timeout=session.cancel_timeout)
        except e.Error:
            running.close()
        words = "a one-shot statement was sent, and cancelled as it was not answered in time"
        return StatementTimeout(f"{self._runner.config.name}: {words}")
