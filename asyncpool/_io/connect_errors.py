"""What an error met while connecting says about the next try, in words free of secrets."""

from __future__ import annotations

import contextlib
import errno
import os
import re

from psycopg import OperationalError
from psycopg import errors as e
from psycopg.abc import ConnDict
from psycopg.pq.abc import PGconn

from .._core.policy import ConnectFailure
from ..conninfo import Redactor
from ..events import CloseReason
from .libpq import split_sqlstate

# Wrong credentials (class 28) and unknown database: the server will say the same again.
_FINAL_CLASS = "28"
_FINAL_STATES = frozenset({"3D000"})
# The server is starting, stopping or recovering.
_REFUSED_STATES = frozenset({"57P03"})
# It is there, and not of the role that `target_session_attrs` asks for. libpq's own words, without SQLSTATE; where
# it speaks another language such a failure counts as any other.
_WRONG_ROLE = re.compile(r"session is (?:not )?read-only|server is (?:not )?in hot standby mode")
# Nobody listens, on TCP and on a Unix socket, or nobody is there.
_REFUSED_ERRNOS = (errno.ECONNREFUSED, errno.ENOENT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class ConnectFailed(Exception):
    """A connect came to nothing: the error to show, free of secrets, and what it says about the next try."""

    def __init__(self, error: Exception, failure: ConnectFailure, reason: CloseReason | None = None) -> None:
        super().__init__(words_of(error))
        self.error = error
        self.failure = failure
        self.reason = reason  # why a connection that was there already is closed again


def brief(error: BaseException) -> str:
    """Type and words of an error of anybody's."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words}".strip().rstrip(":")


def words_of(error: Exception) -> str:
    """What messages say of a connect error; of one that a callable of the user's has raised, also type and origin."""
    notes = getattr(error, "__notes__", ())
    return f"{brief(error)} ({'; '.join(map(str, notes))})" if notes else str(error)


def failure_of(pgconn: PGconn, redactor: Redactor) -> ConnectFailed:
    sqlstate, words = split_sqlstate(pgconn.get_error_message())
    error_class: type[Exception] = OperationalError
    if sqlstate is not None:
        with contextlib.suppress(KeyError):
            error_class = e.lookup(sqlstate)
        if not issubclass(error_class, OperationalError):
            error_class = OperationalError
    return ConnectFailed(named(error_class, f"connection failed: {redactor.redact(words)}"), _classify(sqlstate, words))


def _classify(sqlstate: str | None, words: str) -> ConnectFailure:
    if sqlstate is not None:
        if sqlstate.startswith(_FINAL_CLASS) or sqlstate in _FINAL_STATES:
            return ConnectFailure.FINAL
        return ConnectFailure.REFUSED if sqlstate in _REFUSED_STATES else ConnectFailure.TRANSIENT
    if _WRONG_ROLE.search(words):
        return ConnectFailure.REFUSED
    # libpq gives the cause in the words of strerror() only.
    if any(os.strerror(number) in words for number in _REFUSED_ERRNOS):
        return ConnectFailure.REFUSED
    return ConnectFailure.TRANSIENT


def summary(failures: list[tuple[ConnDict, ConnectFailed]]) -> ConnectFailed:
    """One failure out of those of all addresses. Final only if no host can change its mind."""
    last = failures[-1][1]
    if len(failures) == 1:
        return last
    kinds = [failed.failure for _, failed in failures]
    hosts = {attempt.get("host") for attempt, _ in failures}
    final_hosts = {attempt.get("host") for attempt, failed in failures if failed.failure is ConnectFailure.FINAL}
    if hosts == final_hosts:
        kind = ConnectFailure.FINAL
        shown = next(failed for _, failed in reversed(failures) if failed.failure is ConnectFailure.FINAL)
    else:
        kind = ConnectFailure.REFUSED if set(kinds) == {ConnectFailure.REFUSED} else ConnectFailure.TRANSIENT
        shown = last
    lines = [str(shown.error), "All attempts failed:", *(f"- {failed.error}" for _, failed in failures)]
    return ConnectFailed(type(shown.error)("\n".join(lines)), kind)


def attempt_on(attempt: ConnDict, redactor: Redactor) -> str:
    host = attempt.get("hostaddr") or attempt.get("host")
    return f'connection to "{redactor.redact(str(host))}" failed: ' if host else "connection failed: "


def named(error_class: type[Exception], words: str) -> Exception:
    return error_class(words.strip())
