"""A connection in pipeline mode: statements are put on it, each with a Sync of its own, and answered in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from psycopg import OperationalError, ProgrammingError, pq
from psycopg import errors as e
from psycopg._preparing import Prepare
from psycopg._queries import PostgresQuery, PostgresRawQuery
from psycopg.abc import PQGen
from psycopg.adapt import Transformer
from psycopg.waiting import Ready, Wait

from .._core.lanes import Lane, Statement
from ..config import shown
from .connection import Leased
from .libpq import find_send_sync
from .log import Log
from .one_shot_rules import needs_session, remedy
from .reader import BAD
from .session import Session
from .statement import OneShot

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

# Plain numbers: comparing them with libpq's is three times as fast as with enums.
_PIPELINE_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
_PIPELINE_ABORTED = int(pq.ExecStatus.PIPELINE_ABORTED)
_COMMAND_OK = int(pq.ExecStatus.COMMAND_OK)
_FINE = frozenset(map(int, (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)))
_COPY = frozenset(map(int, (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)))
_READY_R = int(Ready.R)
_WAIT_R = Wait.R
_WAIT_RW = Wait.RW
_NO, _SHOULD = Prepare.NO, Prepare.SHOULD
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_MESSAGE = pq.DiagnosticField.MESSAGE_PRIMARY
_SOURCE_FUNCTION = pq.DiagnosticField.SOURCE_FUNCTION

# The server's functions that find a prepared statement gone, or its result changed; before it was executed.
_NO_STATEMENT = b"26000"
_NOT_EXECUTED = {_NO_STATEMENT: b"FetchPreparedStatement", b"0A000": b"RevalidateCachedQuery"}

# What the server says when a transaction was begun.
_BEGUN = frozenset((b"BEGIN", b"START TRANSACTION"))

# Of a write on a server that takes none.
_READ_ONLY = b"25006"

# What psycopg tells the server with its BEGIN.
_OF_TRANSACTIONS = ("isolation_level", "read_only", "deferrable")

# What the protocol can count of a statement's parameters.
MAX_PARAMETERS = 65535

# Of how many texts, of how many characters at most, the conversion is kept for a lane. The length is psycopg's.
_MAX_QUERIES = 500
_MAX_LENGTH = 4096

# How often get_result() may have nothing to say when it was not busy.
_MAX_NULLS = 3


class Pipe:
    """Puts statements on a connection, and takes their results.

    A statement's end is the answer to its Sync, where it is committed: until then an error may follow its result.
    """

    def __init__(self, connection: Leased, session: Session, lane: Lane) -> None:
        self.connection = connection
        self.session = session
        self.lane = lane
        self._pgconn = session.pgconn
        self.row_factory: Any = connection.row_factory
        leases = cast(Any, connection._pool)
        self._pool_name: str = leases.name
        self._log: Log = leases.log
        self._unheeded = "" if connection.autocommit else _set_for_transactions(connection)
        self._prepared = connection._prepared
        self.transformer = Transformer(connection)
        self._query_class = _query_class(connection)
        self._queries: dict[tuple[str | bytes, bool], PostgresQuery] = {}
        self._sync = _sync_of(session)
        self._began = 0.0  # when the statement in front came to the front
        self.probed_at = 0.0  # when the Sync was sent by which the round trip is measured; 0 if none is under way
        self._result: PGresult | None = None  # of the statement in front, while its Sync is not answered
        self._has_failed = False  # whether that is an error, which nothing behind it replaces

    def enter(self) -> None:
        """Begin. Raises psycopg.Error if the connection is lost."""
        self._pgconn.enter_pipeline_mode()
        if not self.session.round_trip:
            self.probed_at = monotonic()
            self._sync()
        self.lane.round_trip = self.session.round_trip

    def leave(self) -> None:
        """End, when nothing is in flight. Raises psycopg.Error if the connection is lost."""
        self.session.round_trip = self.lane.round_trip
        self.session.prepared = self._prepared._prepared_idx
        self._pgconn.exit_pipeline_mode()

    # --- sending --------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether an answer is to come."""
        return bool(self.lane.in_flight or self.probed_at)

    def put(self, statement: OneShot, now: float) -> bool:
        """Put a statement on the pipe, to be sent by the next flush. False if nothing was put there; the caller of one
        that cannot be sent was told.

        Raises psycopg.Error if the connection is lost: then the statement was not sent.
        """
        try:
            query = self._convert(statement)
        except Exception as error:  # of whatever kind: adapters may be the user's
            statement.fail(_explained(error, statement))
            return False
        if self._prepared._to_flush:
            self._deallocate(now)
        try:
            self._send(statement, query)
        except Exception as error:
            if self._pgconn.status == BAD:
                raise
            # The statement's own fault: a dumper that returns no bytes, or more of them than libpq takes. Its Parse may
            # be under way, and is to have its Sync.
            self._sync()
            self.lane.sent(OneShot.of_pool(), now)
            statement.fail(error)
        else:
            self.lane.sent(statement, now)
        return True

    def _convert(self, statement: OneShot) -> PostgresQuery:
        if self._unheeded:
            raise ProgrammingError(
                f"{self._pool_name}: {self._unheeded}, as configure has set it, holds for transactions that psycopg"
                " begins, not for one-shot statements: use pool.acquire(), or have the server know it"
                " (options='-c default_transaction_read_only=on' and the like)"
            )
        text, params = statement.query, statement.params
        converted = None
        if isinstance(text, (str, bytes)) and len(text) <= _MAX_LENGTH:
            key = text, params is None
            converted = self._queries.get(key)
            if converted is not None:
                converted.dump(params)
            else:
                converted = self._query_class(self.transformer)
                converted.convert(statement.query, params)
                if len(self._queries) >= _MAX_QUERIES:
                    self._queries.clear()
                self._queries[key] = converted
        else:
            converted = self._query_class(self.transformer)
            converted.convert(statement.query, params)
            if not isinstance(text, (str, bytes)) and (command := needs_session(converted.query)):
                raise ProgrammingError(remedy(self._pool_name, command))  # it could not be read before
        statement.size = 0
        if values := converted.params:
            if len(values) > MAX_PARAMETERS:
                raise ProgrammingError(f"a statement takes {MAX_PARAMETERS} parameters at most, not {len(values)}")
            statement.size = sum([len(value) for value in values if value is not None])
        return converted

    def _send(self, statement: OneShot, query: PostgresQuery) -> None:
        prepared = self._prepared
        statement.pipe = self
        statement.key = key = query.query, query.types
        name = prepared._names.get(key)
        if name is not None and prepared.prepare_threshold is not None and not statement.was_prepared_again:
            # What get() and maybe_add_to_cache() do then, in line: a tenth of a statement's cost.
            prepared._names.move_to_end(key)
            statement.name = name
            statement.is_parsing = False
            self._pgconn.send_query_prepared(
                name, query.params, param_formats=query.formats, result_format=statement.result_format
            )
        else:
            self._send_unprepared(statement, query)
        query.params = None  # it is kept for the next one
        self._sync()

    def _send_unprepared(self, statement: OneShot, query: PostgresQuery) -> None:
        prepared = self._prepared
        prepare, name = prepared.get(query)
        if statement.was_prepared_again and prepare is not _SHOULD:
            prepare, name = _NO, b""  # it is to depend on no other's Parse any more, which may fail
        statement.name = name
        statement.is_parsing = prepare is _SHOULD
        if statement.is_parsing:
            self._pgconn.send_prepare(name, query.query, param_types=query.types)
            self._pgconn.send_query_prepared(
                name, query.params, param_formats=query.formats, result_format=statement.result_format
            )
        else:
            self._pgconn.send_query_params(
                query.query,
                query.params,
                param_types=query.types,
                param_formats=query.formats,
                result_format=statement.result_format,
            )
        if prepared.maybe_add_to_cache(query, prepare, name) is not None or statement.is_parsing:
            prepared._rotate()

    def _deallocate(self, now: float) -> None:
        """Have the server forget prepared statements of which there are too many."""
        while self._prepared._to_flush:
            name = self._prepared._to_flush.popleft()
            command = b"DEALLOCATE ALL" if name is None else b"DEALLOCATE " + name
            self._pgconn.send_query_params(command, None)
            self._sync()
            self.lane.sent(OneShot.of_pool(), now)

    # --- reading --------------------------------------------------------------------------------------------

    def read(self) -> int:
        """Take what has come, and tell the callers. How many were answered; psycopg.Error if the connection is lost."""
        lost: e.Error | None = None
        try:
            self._pgconn.consume_input()
        except e.Error as error:
            lost = error  # after what it has read
        answered: list[Statement] = []
        again: list[OneShot] = []
        self._take_all(answered, again)
        if answered:
            now = monotonic()
            self.lane.answered(answered, self._began, now)
            self._began = now
            self._put_again(again, now)
        if lost is not None:
            raise lost
        self._pass_on_notifies()
        return len(answered) - len(again)

    def _take_all(self, answered: list[Statement], again: list[OneShot]) -> None:
        """Take the results that have come whole. `again` are those to be sent once more."""
        pgconn = self._pgconn
        in_flight = self.lane.in_flight
        nulls = 0
        while (in_flight or self.probed_at) and not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                nulls += 1
                if nulls > _MAX_NULLS:
                    return
                continue
            nulls = 0
            status = result.status
            if status != _PIPELINE_SYNC:
                self._take(result, status)
            elif self.probed_at:
                self._note_round_trip()
            else:
                statement = cast(OneShot, in_flight.popleft())
                answered.append(statement)
                if self._has_failed and self._is_to_be_sent_again(statement):
                    again.append(statement)
                elif statement.is_wanted:
                    statement.resolve(self._result)
                self._result = None
                self._has_failed = False

    def _pass_on_notifies(self) -> None:
        """Take notifications: a lease may have left a LISTEN behind."""
        while (notify := self._pgconn.notifies()) is not None:
            if self._pgconn.notify_handler is not None:
                try:
                    self._pgconn.notify_handler(notify)
                except Exception as error:
                    # Those whose statements are under way here have nothing to do with it.
                    self._log.write(logging.ERROR, "notify", "a notify handler has failed", exc_info=error)

    def _put_again(self, statements: list[OneShot], now: float) -> None:
        for position, statement in enumerate(statements):
            try:
                self.put(statement, now)
            except Exception as error:
                for unsent in statements[position:]:
                    unsent.fail(OperationalError(str(error)))
                raise

    def _take(self, result: PGresult, status: int) -> None:
        """A result of the statement in front; the first error is the one that counts, else the last one."""
        if self._has_failed or status == _PIPELINE_ABORTED:
            return
        if not self.lane.in_flight:  # the session has ended while nothing but the round trip was measured
            self._has_failed, self._result = status not in _FINE, result
            return
        statement = cast(OneShot, self.lane.in_flight[0])
        if status in _COPY:
            raise OperationalError("a one-shot statement has begun a COPY, which has no end in a pipeline")
        if status == _COMMAND_OK and result.command_status in _BEGUN:
            # It was not seen in its text. What is behind it would be lost with that transaction.
            raise OperationalError("a one-shot statement has begun a transaction")
        self._has_failed = status not in _FINE
        if self._has_failed and not result.error_field(_SQLSTATE):
            # libpq's own words: it has found the connection lost, and ends what was under way by itself.
            self._has_failed = False
            raise OperationalError(result.get_error_message(self.transformer.encoding))
        if statement.is_parsing:
            statement.is_parsing = False
            if status == _COMMAND_OK:
                return  # this is the answer to the Parse
            self._forget(statement)
        self._result = result

    def _forget(self, statement: OneShot) -> None:
        if self._prepared._names.get(statement.key) == statement.name:
            del self._prepared._names[statement.key]

    def _is_to_be_sent_again(self, statement: OneShot) -> bool:
        """Whether the server has not executed a prepared statement because that is gone, or what it returns has
        changed. Once: it could be so each time behind a pooler.
        """
        assert self._result is not None
        sqlstate = self._result.error_field(_SQLSTATE) or b""
        if sqlstate == _READ_ONLY:
            self.session.refused_write = self.session.touched = True
            self.lane.is_leaving = True
        if not statement.name:
            self._prepared._counts.pop(statement.key, None)  # psycopg prepares nothing that fails: a lease may have it
        if (
            not statement.name
            or statement.was_prepared_again
            or _NOT_EXECUTED.get(sqlstate) != (self._result.error_field(_SOURCE_FUNCTION) or b"")
            or (sqlstate == _NO_STATEMENT and statement.name not in (self._result.error_field(_MESSAGE) or b""))
        ):
            return False  # that of a statement that a function has prepared is the function's error
        self._forget(statement)
        statement.was_prepared_again = True
        return statement.is_wanted

    def _note_round_trip(self) -> None:
        now = monotonic()
        self.lane.round_trip = self.session.round_trip = now - self.probed_at
        self.probed_at = 0.0
        self._began = now

    @property
    def last_words(self) -> Exception | None:
        """What the server has said last, if it was an error that nobody was told of. libpq's own has no SQLSTATE."""
        if self._has_failed and self._result is not None and self._result.error_field(_SQLSTATE):
            return e.error_from_result(self._result, encoding=self.transformer.encoding)
        return None


def run_alone(pipe: Pipe, statement: OneShot) -> PQGen[None]:
    """Run one statement, on a connection that is nobody else's meanwhile."""
    pgconn = pipe.session.pgconn
    pipe.enter()
    try:
        pipe.put(statement, monotonic())
        while pipe.is_busy:
            ready = yield _WAIT_RW if pgconn.flush() else _WAIT_R
            if ready and ready & _READY_R:  # who takes up another's wait sends None at first
                pipe.read()
        pipe.leave()
    except BaseException:
        pgconn.finish()  # nobody knows where it stands
        raise


def _set_for_transactions(connection: Leased) -> str:
    """Which of these is set; empty if none."""
    return next((name for name in _OF_TRANSACTIONS if getattr(connection, name) is not None), "")


def _explained(error: Exception, statement: OneShot) -> Exception:
    """The error of a statement that could not be made PostgreSQL's, with what it means here."""
    params: object = statement.params
    query = statement.query
    if isinstance(error, TypeError) and params is not None and not isinstance(params, (Sequence, Mapping)):
        return TypeError(f"params must be a sequence or a mapping, such as (1,) for one value, not {shown(params)}")
    if isinstance(error, ProgrammingError) and isinstance(query, (str, bytes)):
        text = query if isinstance(query, str) else query.decode(errors="replace")
        if "$1" in text:
            error.add_note("the placeholders are psycopg's: %s or %(name)s")
    return error


def has_raw_cursors(connection: Any) -> bool:
    """Whether the connection's cursors are of psycopg's raw ones, which have $1 for placeholders."""
    return issubclass(getattr(connection.cursor_factory, "_query_cls", PostgresQuery), PostgresRawQuery)


def _query_class(connection: Leased) -> type[PostgresQuery]:
    """The converter of the connection's cursors, if they are raw ones; else that of the ordinary ones."""
    return connection.cursor_factory._query_cls if has_raw_cursors(connection) else PostgresQuery


def _sync_of(session: Session) -> Callable[[], object]:
    """What ends a statement, without a system call where libpq can do that."""
    send_sync = find_send_sync()
    address: int | None = getattr(session.pgconn, "pgconn_ptr", None)  # public, but not in psycopg's protocol class
    if send_sync is None or not address:
        return session.pgconn.pipeline_sync

    def sync() -> None:
        if not send_sync(address):
            raise OperationalError(session.pgconn.get_error_message())

    return sync
