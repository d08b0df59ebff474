"""Running a one-shot statement for a task: on a lane, or on a lease of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Generator, Iterable
from contextlib import asynccontextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, Self, cast

from psycopg import AsyncCursor, AsyncRawCursor
from psycopg import errors as e
from psycopg.abc import Params, Query

from .._core.lanes import MAX_SENDS, Lane, Pace
from ..errors import StatementOutcomeUnknown, StatementTimeout
from .acquisition import Acquisition, current_task
from .connection import PooledConnection
from .multiplexer import outcome_unknown
from .pipe import Pipe, has_raw_cursors, run_alone
from .reader import BAD
from .statement import BINARY, TEXT, OneShot, pace_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .runner import Runner

_getframe = sys._getframe


class TaskOneShot(OneShot):
    """A statement that a task waits for, by awaiting it."""

    __slots__ = ("_runner", "_timeout")

    def __init__(
        self,
        runner: Runner,
        query: Query,
        params: Params | None,
        pace: Pace,
        timeout: float | None,
        *,
        retry: bool,
        binary: bool,
    ) -> None:
        super().__init__(query, params, pace, retry=retry, result_format=BINARY if binary else TEXT)
        self._runner = runner
        self._timeout = timeout

    def __await__(self) -> Generator[Any, Any, Self]:
        runner = self._runner
        if self.pace.is_slow or not runner.shares_lanes:
            yield from _run_on_lease(runner, self, self._timeout).__await__()
            return self
        multiplexer = runner.multiplexer
        self.future = runner.loop.create_future()
        multiplexer.submit(self, self.began, runner.config.acquire_timeout)
        if self._timeout is not None and self.error is None:
            self.timer = runner.loop.call_later(self._timeout, multiplexer.expire, self)
        try:
            if self.error is not None:
                yield  # refused at once: a loop that tries again must not keep the event loop from everybody else
            yield from self.future
        except BaseException:
            multiplexer.withdraw(self)
            raise
        return self


def one_shot(
    runner: Runner, query: Query, params: Params | None, timeout: float | None, *, retry: bool, binary: bool
) -> TaskOneShot:
    """A statement to await, whose methods then give the answer or raise the error.

    Raises PoolError as `acquire()` does, psycopg.ProgrammingError for a command that needs a session of its own.
    """
    task = current_task(runner.loop)
    if get_ident() != runner.thread or task is None:
        runner.check_loop()
    pace = pace_of(runner.multiplexer.paces, query, runner.config.name)
    statement = TaskOneShot(runner, query, params, pace, timeout, retry=retry, binary=binary)
    statement.owner = task
    return statement


async def _run_on_lease(runner: Runner, statement: OneShot, timeout: float | None) -> None:
    frame = _getframe(3)  # past the pool's methods: whoever awaits them
    code, offset = frame.f_code, frame.f_lasti
    deadline = _deadline(runner, timeout)
    while not statement.is_sent:
        acquisition = Acquisition[Any](runner, _until(runner, deadline), code, offset)
        async with acquisition as connection, _limited(runner.config.name, deadline):
            lost = await _run_once(runner, cast(PooledConnection, connection), statement)
        if lost is not None:
            raise lost


async def _run_once(runner: Runner, connection: PooledConnection, statement: OneShot) -> StatementOutcomeUnknown | None:
    """Run it. An error is returned if it was lost with its connection, and is not to be sent again."""
    pipe = Pipe(connection, connection._session, Lane())
    try:
        with runner.multiplexer.watching(pipe):
            await connection.wait(run_alone(pipe, statement))
    except e.OperationalError as error:
        return what_was_lost(runner.config.name, pipe, statement, error)
    finally:
        connection._session.in_transaction = False  # nothing but this statement, whose error says what there is to say
    statement.is_sent = True
    runner.multiplexer.answered += 1
    return None


def what_was_lost(
    name: str, pipe: Pipe, statement: OneShot, error: e.OperationalError
) -> StatementOutcomeUnknown | None:
    """The error for a statement that had a lease of its own and was lost with its connection; None if it is to be sent
    again, or has an error of its own. Raises `error` if it is another.
    """
    if statement.error is not None:  # it could not be sent
        statement.is_sent = True
        return None
    if pipe.session.pgconn.status != BAD:
        raise error
    if not statement.is_sent:
        statement.sends += 1
        if statement.sends >= MAX_SENDS:
            raise error
        return None
    if statement.retry and statement.sends < MAX_SENDS:
        statement.is_sent = False
        return None
    return outcome_unknown(name, pipe.last_words or error)


def _deadline(runner: Runner, timeout: float | None) -> float | None:
    """The loop's time when this timeout is over."""
    return None if timeout is None else runner.loop.time() + timeout


def _until(runner: Runner, deadline: float | None) -> float | None:
    """How long a connection may be waited for."""
    limit = runner.config.acquire_timeout
    if deadline is None:
        return limit
    remaining = max(0.0, deadline - runner.loop.time())
    return remaining if limit is None else min(limit, remaining)


@asynccontextmanager
async def _limited(name: str, deadline: float | None) -> AsyncIterator[None]:
    """Raise StatementTimeout if the block lasts until then."""
    scope = asyncio.timeout_at(deadline)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        words = "a one-shot statement was sent, and cancelled as it was not answered in time"
        raise StatementTimeout(f"{name}: {words}") from None


async def run_many(acquisition: Acquisition[Any], query: Query, params_seq: Iterable[Params]) -> int:
    """Run a statement for each set of parameters, in one transaction: how many rows that has changed."""
    async with acquisition as connection, connection.transaction():
        cursor = (AsyncRawCursor if has_raw_cursors(connection) else AsyncCursor)(connection)
        await cursor.executemany(query, params_seq)
        return max(0, cursor.rowcount)


async def rows_of(statement: OneShot, row_factory: Any) -> list[Any]:
    """All rows of an answer; where these are many, others have their turn meanwhile."""
    rows: list[Any] | None = statement.rows(row_factory)
    if rows is None:
        rows = []
        for _ in statement.rows_at_leisure(row_factory, rows):
            await asyncio.sleep(0)
    return rows
