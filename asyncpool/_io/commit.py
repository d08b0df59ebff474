"""The COMMIT of a pooled connection: what is known of its outcome when the connection is lost, and asking for it.

Only an answer tells. The server's CommandComplete says that it is committed, also if the connection ends before the
ReadyForQuery; an ERROR that a backend raised says that it is not. So does a FATAL of `ProcessInterrupts`, where a
backend ends itself because it was terminated or timed out: it never does so between the commit and the CommandComplete.
Every other end leaves the outcome unknown, above all a FATAL without the name of a function: poolers send such when
they have lost the server themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

from psycopg import OperationalError, pq
from psycopg import errors as e
from psycopg.abc import PQGen
from psycopg.generators import fetch, send
from psycopg.pq.abc import PGconn, PGresult

from ..errors import CommitOutcomeUnknown
from ..events import CommitStatus
from .reader import BAD, socket_of

if TYPE_CHECKING:
    from .connection import Leased, TouchedConnection
    from .session import Session

COMMIT = b"COMMIT"
COMMIT_PREPARED = b"COMMIT PREPARED "
INTRANS = pq.TransactionStatus.INTRANS
OK = pq.ConnStatus.OK
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
PIPELINE_ABORTED = pq.ExecStatus.PIPELINE_ABORTED
SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED
SOURCE_FUNCTION = pq.DiagnosticField.SOURCE_FUNCTION

# Which server this is, in its own words: the cluster, its timeline (none on a standby), and since when it counts. A
# clean stop keeps its statistics, a crash resets them; nothing else that every role may see tells of a crash. Names are
# qualified, because the search path is the user's; what is text is the same in every session, whatever its settings.
_SERVER = (
    b"system_identifier,"
    b" case when pg_catalog.pg_is_in_recovery() then null else"
    b" pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) end,"
    b" pg_catalog.encode(pg_catalog.timestamptz_send(pg_catalog.pg_stat_get_bgwriter_stat_reset_time()), 'hex')"
    b" from pg_catalog.pg_control_system()"
)
_IDENTIFY = b"select " + _SERVER
_TRACK = b"select pg_catalog.pg_current_xact_id_if_assigned(), " + _SERVER
_STATUS = b"select pg_catalog.pg_xact_status('%d'::pg_catalog.xid8)"


class CommitPhase(Enum):
    """How far the COMMIT of a session is."""

    NONE = "none on its way"
    SENT = "sent, at least in part, and not answered"
    SETTLED = "its user knows what there is to know, and the connection is lost"


@dataclass(frozen=True, slots=True)
class TransactionMark:
    """What is kept of a transaction that is about to be committed: its id, and the server's own."""

    xid: int | None
    system_identifier: int
    timeline: int | None
    epoch: str


def is_commit(command: object) -> TypeGuard[bytes]:
    """Whether an internal command of psycopg's commits."""
    return isinstance(command, bytes) and (command == COMMIT or command.startswith(COMMIT_PREPARED))


def run_commit(connection: TouchedConnection, command: bytes) -> PQGen[PGresult | None]:
    """In place of psycopg's `_exec_command`, which does not tell a lost COMMIT from one that was answered."""
    session, pgconn = connection._session, connection.pgconn
    if socket_of(pgconn) is None:
        raise OperationalError("the connection is closed")
    if (pipeline := connection._pipeline) is not None:
        pipeline.command_queue.append(partial(_send_in_pipeline, session, pgconn, command))
        pipeline.result_queue.append((_PipelinedAnswer(session, pgconn), None))  # type: ignore[arg-type]  # what of a cursor is called
        return None
    if session.has_ended():
        yield from _learn_of_the_end(connection)
    session.commit = CommitPhase.SENT
    try:
        answer = yield from _exchange(session, pgconn, command)
    except Exception:
        raise  # for the wait to judge
    except BaseException:
        session.commit = CommitPhase.NONE  # nobody waits for it any more
        raise
    if answer.status == FATAL_ERROR:
        raise e.error_from_result(answer, encoding=pgconn._encoding)
    return answer


def _learn_of_the_end(connection: TouchedConnection) -> PQGen[None]:
    """The session ended before the COMMIT, which is not sent: what is sent to hear the reason cannot commit."""
    yield from connection._exec_command(b"ROLLBACK")
    raise OperationalError("the server has closed the connection before the COMMIT, and nothing is committed")


def _exchange(session: Session, pgconn: PGconn, command: bytes) -> PQGen[PGresult]:
    """Send the COMMIT, and read the answer and what follows it. Notes whether the answer tells the outcome."""
    try:
        pgconn.send_query(command)
    except e.Error:
        if pgconn.status == OK:
            session.commit = CommitPhase.NONE  # refused by libpq: nothing was sent
        raise
    if pgconn.flush() != 0:
        yield from send(pgconn)
    answer: PGresult | None = yield from fetch(pgconn)
    if answer is None:
        raise e.InternalError("no result from COMMIT")
    if answer.status != FATAL_ERROR or _says_not_committed(answer):
        session.commit = CommitPhase.NONE
    try:
        while (yield from fetch(pgconn)) is not None:
            continue
    except e.Error:
        if answer.status != FATAL_ERROR:
            session.commit = CommitPhase.SETTLED  # it is committed: the next statement is the one that fails
    else:
        session.commit = CommitPhase.NONE  # the session goes on, so that an error was the backend's
    return answer


def _says_not_committed(error: PGresult) -> bool:
    function = error.error_field(SOURCE_FUNCTION)
    return function == b"ProcessInterrupts" or (function is not None and error.error_field(SEVERITY) == b"ERROR")


def _send_in_pipeline(session: Session, pgconn: PGconn, command: bytes) -> None:
    session.commit = CommitPhase.SENT
    pgconn.send_query_params(command, None)


class _PipelinedAnswer:
    """Stands in a pipeline's queue of results where a cursor would, and takes the answer to a COMMIT."""

    __slots__ = ("_pgconn", "_session")

    def __init__(self, session: Session, pgconn: PGconn) -> None:
        self._session = session
        self._pgconn = pgconn

    def _check_results(self, results: list[PGresult]) -> None:
        (answer,) = results
        if answer.status != FATAL_ERROR or _says_not_committed(answer):
            self._session.commit = CommitPhase.NONE
        if answer.status == FATAL_ERROR:
            raise e.error_from_result(answer, encoding=self._pgconn._encoding)
        if answer.status == PIPELINE_ABORTED:
            raise e.PipelineAborted("pipeline aborted")

    def _set_results(self, results: list[PGresult]) -> None:
        pass


def is_outcome_lost(connection: TouchedConnection) -> bool:
    """Whether the error that a wait ends with leaves the outcome of a COMMIT unknown."""
    return connection._session.commit is CommitPhase.SENT and (
        connection._pipeline is None or connection.pgconn.status == BAD
    )


def outcome_unknown(connection: TouchedConnection) -> CommitOutcomeUnknown:
    """The error to raise then. The session counts as one that has nothing more to lose."""
    session = connection._session
    session.commit = CommitPhase.SETTLED
    session.in_transaction = False
    name = getattr(connection._pool, "name", "asyncpool")
    mark = session.mark
    lost = f"{name}: the connection was lost during COMMIT, and "
    if mark is None:
        hint = "; with `pool.transaction(track_outcome=True)` the server can be asked"
        return CommitOutcomeUnknown(
            f"{lost}it is not known whether the transaction is committed: look for what it wrote before you do it"
            f" again{hint if getattr(connection._pool, 'close_returns', True) else ''}"
        )
    if mark.xid is None:
        message = f"{lost}the transaction had written nothing until then"
    else:
        message = (
            f"{lost}it is not known whether transaction {mark.xid} is committed: ask `pool.commit_status(error)` before"
            " you do it again"
        )
    return CommitOutcomeUnknown(
        message,
        xid=mark.xid,
        system_identifier=mark.system_identifier,
        timeline=mark.timeline,
        epoch=mark.epoch,
    )


# --- tracking -----------------------------------------------------------------------------------------------


def track(connection: Leased) -> PQGen[None]:
    """Before a COMMIT: have the session know which transaction this is, on which server."""
    if connection._pipeline is not None or connection.pgconn.transaction_status != INTRANS:
        return  # no COMMIT of its own follows
    xid, *server = _row((yield from connection._exec_command(_TRACK)))
    connection._session.mark = TransactionMark(None if xid is None else int(xid), *_server(server))


def known_status(error: CommitOutcomeUnknown) -> CommitStatus | None:
    """What can be said of a lost COMMIT without asking a server; None: nothing."""
    if not isinstance(error, CommitOutcomeUnknown):
        raise TypeError(f"commit_status() takes a CommitOutcomeUnknown, not {type(error).__name__}")
    if error.system_identifier is None:
        return CommitStatus.UNKNOWN
    return CommitStatus.NOTHING_WRITTEN if error.xid is None else None


def ask_status(connection: Leased, error: CommitOutcomeUnknown) -> PQGen[CommitStatus]:
    """What a server says of the transaction.

    A crash may lose the id of a transaction that had not reached the disk, and the next one gets it again: since then
    `committed` may be said of that. What the server does not know as committed is not committed in either case.
    """
    system_identifier, timeline, epoch = _server(_row((yield from connection._exec_command(_IDENTIFY))))
    if (system_identifier, timeline) != (error.system_identifier, error.timeline):
        return CommitStatus.UNKNOWN
    has_crashed = not epoch or epoch != error.epoch
    try:
        [status] = _row((yield from connection._exec_command(_STATUS % error.xid)))
    except e.InvalidParameterValue:  # not given to anybody yet
        return CommitStatus.ABORTED if has_crashed else CommitStatus.UNKNOWN
    if status is None:  # too long ago
        return CommitStatus.UNKNOWN
    if has_crashed:
        return CommitStatus.UNKNOWN if status == b"committed" else CommitStatus.ABORTED
    return CommitStatus(status.decode())


def _row(result: PGresult | None) -> list[bytes | None]:
    assert result is not None  # only a pipeline has none
    return [result.get_value(0, column) for column in range(result.nfields)]


def _server(row: list[bytes | None]) -> tuple[int, int | None, str]:
    system_identifier, timeline, epoch = row
    assert system_identifier is not None
    return int(system_identifier), None if timeline is None else int(timeline, 16), (epoch or b"").decode()
