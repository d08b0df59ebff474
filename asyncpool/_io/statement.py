"""A one-shot statement: what its caller has asked for, who is told of its end, and the rows that its result holds."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from psycopg import AsyncConnection, AsyncCursor, Cursor, ProgrammingError, pq
from psycopg import errors as e
from psycopg.abc import Params, Query
from psycopg.adapt import Transformer
from psycopg.rows import tuple_row
from psycopg.sql import Composable

from .._core.lanes import Pace, Paces, Statement
from ..config import shown
from .one_shot_rules import needs_session, remedy
from .reader import MAX_BUSY_TIME

if TYPE_CHECKING:
    from psycopg.abc import Transformer as TransformerOf
    from psycopg.pq.abc import PGresult

    from .pipe import Pipe

TEXT = pq.Format.TEXT
BINARY = pq.Format.BINARY
_TUPLES_OK = int(pq.ExecStatus.TUPLES_OK)
_FINE = frozenset(map(int, (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)))

# How many values are made Python's between two looks at the clock.
_VALUES_AT_ONCE = 2000


# Of a longer text only a hash is kept.
_MAX_KEY = 1000


class OneShot(Statement):
    """A statement of a caller who waits for its result or its error."""

    __slots__ = (
        "began",
        "error",
        "future",
        "is_parsing",
        "key",
        "name",
        "params",
        "pipe",
        "query",
        "result",
        "result_format",
        "timer",
        "was_prepared_again",
    )

    pipe: Pipe  # which it was put on

    def __init__(
        self, query: Query, params: Params | None, pace: Pace, *, retry: bool, result_format: pq.Format
    ) -> None:
        # No call of the base's: what is set here is a tenth of a statement's cost.
        self.pace = pace
        self.retry = retry
        self.owner: object = None
        self.is_wanted = True
        self.is_enqueued = self.is_sent = False
        self.sends = 0
        self.query: Query = query
        self.params: Params | None = params
        self.result_format = result_format
        self.began = monotonic()
        self.result: PGresult | None = None
        self.error: Exception | None = None
        self.future: asyncio.Future[None] | None = None  # who waits, unless it is run alone
        self.timer: asyncio.TimerHandle | None = None  # that of its timeout
        self.was_prepared_again = False

    name: bytes  # by which it is prepared on the server
    key: tuple[bytes, tuple[int, ...]]  # by which psycopg knows that name
    is_parsing: bool  # whether an answer to its Parse comes first

    @classmethod
    def of_pool(cls) -> OneShot:
        """In the place of a command of the pool's own, to whose answer nobody listens."""
        pace = Pace()
        pace.note(0.0)  # what is known to take no time holds up nobody
        statement = cls(b"", None, pace, retry=False, result_format=TEXT)
        statement.is_wanted = statement.is_parsing = False
        statement.size = 0
        statement.name = b""
        return statement

    def resolve(self, result: PGresult | None) -> None:
        """The server has answered."""
        self.result = result
        self.end()

    def fail(self, error: Exception) -> None:
        """There will be no answer."""
        self.error = error
        self.end()

    def end(self) -> None:
        """Nothing more is to come."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.wake()

    def wake(self) -> None:
        """Let the caller go on."""
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def forget(self) -> None:
        """Nobody waits any more, and it is not to be sent: let go of what it holds."""
        self.query, self.params = b"", None
        self.owner = None  # a task that was cancelled holds its frames, and they the parameters

    def transformer(self) -> TransformerOf:
        """What makes Python's values of the result: its pipe's, which is for the moment only."""
        return self.pipe.transformer

    def answer(self) -> PGresult:
        """The result. Raises the error, of the server or of whatever kind."""
        if self.error is not None:
            error, self.error = self.error, None  # no circle with its traceback
            raise error
        result = self.result
        assert result is not None
        if result.status not in _FINE:
            raise self._error_of(result)
        return result

    def _error_of(self, result: PGresult) -> e.Error:
        error = e.error_from_result(result, encoding=self.pipe.transformer.encoding)
        if error.sqlstate == "42601" and error.diag.source_function == "exec_parse_message":
            error.add_note("a one-shot statement is one command: use pool.acquire() for several in one string")
        return error

    # --- rows -----------------------------------------------------------------------------------------------

    def status_message(self) -> str:
        """What the server says that it has done: `INSERT 0 1`. Raises as `answer`."""
        return (self.answer().command_status or b"").decode()

    def value(self) -> Any:
        """The first column of the first row, None without one. Raises as `answer`."""
        result = self.answer()
        if not result.ntuples or not result.nfields:
            return None
        transformer = self.transformer()
        transformer.set_pgresult(result)
        first_row: Any = transformer.load_row(0, tuple)
        return first_row[0]

    def row(self, row_factory: Any) -> Any:
        """The first row, None without one. Raises as `answer`."""
        result = self.answer()
        if not result.ntuples:
            return None
        transformer = self.transformer()
        transformer.set_pgresult(result)
        return transformer.load_row(0, self._row_maker(result, row_factory))

    def rows(self, row_factory: Any) -> list[Any] | None:
        """All rows; None if these are so many that `rows_at_leisure` is to be asked. Raises as `answer`."""
        result = self.answer()
        if result.status != _TUPLES_OK:
            return []
        if result.ntuples * result.nfields > _VALUES_AT_ONCE:
            return None
        transformer = self.transformer()
        transformer.set_pgresult(result)
        return transformer.load_rows(0, result.ntuples, self._row_maker(result, row_factory))

    def rows_at_leisure(self, row_factory: Any, rows: list[Any]) -> Iterator[None]:
        """Put all rows into a list, and come back whenever others should have their turn."""
        result = self.answer()
        transformer = Transformer(self.pipe.transformer)  # the pipe's is used for others in those turns
        transformer.set_pgresult(result)
        make_row = self._row_maker(result, row_factory)
        at_once = max(1, _VALUES_AT_ONCE // max(1, result.nfields))
        began = monotonic()
        for first in range(0, result.ntuples, at_once):
            rows += transformer.load_rows(first, min(first + at_once, result.ntuples), make_row)
            if monotonic() - began >= MAX_BUSY_TIME:
                yield
                began = monotonic()

    def _row_maker(self, result: PGresult, row_factory: Any) -> Any:
        factory = row_factory or self.pipe.row_factory
        if factory is tuple_row:
            return tuple
        connection: Any = self.pipe.connection
        cursor: Any = AsyncCursor(connection) if isinstance(connection, AsyncConnection) else Cursor(connection)
        cursor.pgresult = result
        cursor._rowcount = result.ntuples  # what a factory may ask for besides
        cursor._statusmessage = result.command_status
        return factory(cursor)


def pace_of(paces: Paces, query: Any, pool_name: str) -> Pace:
    """What is known of statements with this text. Raises psycopg.ProgrammingError for one that needs a session of its
    own, and TypeError for what is no query.
    """
    text: Hashable = query if isinstance(query, (str, bytes)) else _text_of(query)
    key = (hash(text), len(text)) if isinstance(text, (str, bytes)) and len(text) > _MAX_KEY else text
    pace = paces.find(key)
    if pace is None:
        pace = Pace(needs_session(_as_bytes(text)))
        paces.add(key, pace)
    if pace.needs is not None:
        raise ProgrammingError(remedy(pool_name, pace.needs))
    return pace


def _text_of(query: Any) -> Hashable:
    """What stands for a composed query. One with values of its own is a text of its own each time."""
    if isinstance(query, Composable):
        try:
            return query.as_string(None)
        except Exception:  # it may want adapters that only the connection has
            return repr(query)
    if (strings := getattr(query, "strings", None)) is not None:  # of a template string
        return tuple(strings)
    raise TypeError(f"query must be a str, bytes, psycopg.sql object or template string, not {shown(query)}")


def _as_bytes(text: Hashable) -> bytes:
    if isinstance(text, bytes):
        return text
    return (text if isinstance(text, str) else "".join(cast("tuple[str, ...]", text))).encode(errors="replace")
