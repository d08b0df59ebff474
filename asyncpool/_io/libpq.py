"""What psycopg does not expose of libpq: the SQLSTATE of an error met while connecting, and a Sync that waits."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from typing import TYPE_CHECKING

from psycopg import pq

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.pq.abc import PGconn

# PGVerbosity of libpq-fe.h. An enum is passed as an int.
PQERRORS_DEFAULT = 1
PQERRORS_VERBOSE = 2

# What the fallback to another kind of encryption gets where pg_hba.conf has no entry for it.
INVALID_AUTHORIZATION_SPECIFICATION = "28000"

# libpq's beginning of each failed attempt, if it does not speak another language.
ATTEMPT = "connection to server "

# `connection to server at "db", port 5432 failed: FATAL:  28P01: password authentication failed …`. The two
# spaces are libpq's in every language; the words before them are the server's (the severity) and libpq's own.
# libpq before version 14 writes no words of its own and psycopg then strips the severity.
FIRST_LINE = re.compile(
    r"^(?P<words>[^\n]*?(?:: |：))??(?:[^:：\n]+:  |\A)(?P<sqlstate>(?=[A-Z]*[0-9])[0-9A-Z]{5}): ",
    re.MULTILINE,
)

# `LOCATION:  auth_failed, auth.c:326`. libpq translates the label; then the function's name must be there.
# In French the colons stand between spaces.
LOCATION_LINE = re.compile(
    r"\n(?:LOCATION:  [^\n]*|[^\s:：][^\n:：]{0,30}[:：] *[^\s,]+, [^\n]+\.\w+ ?: ?[0-9]+)(?=\n|\Z)"
)

# The other lines that only a verbose message has: a login event trigger can bring them.
OBJECT_LINE = re.compile(r"\n(?:SCHEMA|TABLE|COLUMN|DATATYPE|CONSTRAINT) NAME:  [^\n]*")


def set_verbose_errors(pgconn: PGconn, verbose: bool) -> bool:
    """Let the error messages of this connection carry the SQLSTATE, or no longer.

    Call it right after `PGconn.connect_start()`: that reads nothing from the server, so every error of the
    login is affected. Switch it off when connected, or statements fail with verbose messages too.

    Returns whether it was done; False where psycopg's libpq cannot be reached, or the connection is finished.
    """
    set_error_verbosity = _find_set_error_verbosity()
    address: int | None = getattr(pgconn, "pgconn_ptr", None)  # public, but not in psycopg's protocol class
    if set_error_verbosity is None or not address:
        return False
    set_error_verbosity(address, PQERRORS_VERBOSE if verbose else PQERRORS_DEFAULT)
    return True


def split_sqlstate(message: str) -> tuple[str | None, str]:
    """Take a verbose connect error apart: the SQLSTATE, and the message as it would be without verbosity.

    libpq may try more than once (with TLS, then without) and reports all attempts in one message. The
    SQLSTATE is then the last one's, but 28000 only if all attempts say so: in the last one it means that
    pg_hba.conf has no entry for this kind of encryption, and what happened before counts. That is None where
    it was no refusal by the server, but a lost connection.
    """
    answers = _answers(message)
    if not answers:
        return None, message
    plain = _plain(message, answers)
    sqlstates = [answer["sqlstate"] for answer in answers]
    telling = [sqlstate for sqlstate in sqlstates if sqlstate != INVALID_AUTHORIZATION_SPECIFICATION]
    if telling:
        return telling[-1], plain
    return (None if _attempts(message, answers) > len(answers) else sqlstates[-1]), plain


def _answers(message: str) -> list[re.Match[str]]:
    """The first lines of the server's refusals; not what looks like one within a DETAIL or HINT."""
    location_ends = {line.end() for line in LOCATION_LINE.finditer(message)}
    return [
        line
        for number, line in enumerate(FIRST_LINE.finditer(message))
        if number == 0 or line["words"] or line.start() - 1 in location_ends
    ]


def _attempts(message: str, answers: list[re.Match[str]]) -> int:
    # libpq's own words are the same for every attempt at an address, in whatever language.
    beginnings = (ATTEMPT, *{answer["words"] for answer in answers if answer["words"]})
    return max(len(answers), sum(line.startswith(beginnings) for line in message.split("\n")))


def _plain(message: str, answers: list[re.Match[str]]) -> str:
    pieces = []
    position = 0
    for answer in answers:
        pieces.append(message[position : answer.start("sqlstate")])
        position = answer.end()
    pieces.append(message[position:])
    return OBJECT_LINE.sub("", LOCATION_LINE.sub("", "".join(pieces)))


@functools.cache
def _find_set_error_verbosity() -> Callable[[int, int], int] | None:
    try:
        function = _loaded_libpq().PQsetErrorVerbosity
    except (AttributeError, KeyError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_int)
    function.restype = ctypes.c_int
    found: Callable[[int, int], int] = function
    return found


@functools.cache
def find_send_sync() -> Callable[[int], int] | None:
    """PQsendPipelineSync, which libpq has from version 17 on: a Sync that is sent with what comes next or with a flush,
    where psycopg's takes a system call each. It is called with a PGconn's address. None where it is not to be had.
    """
    try:
        # It does not block, so that there is no reason to let go of the GIL for it.
        function = ctypes.PyDLL(None, handle=_loaded_libpq()._handle).PQsendPipelineSync
    except (AttributeError, KeyError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p,)
    function.restype = ctypes.c_int
    found: Callable[[int], int] = function
    return found


def _loaded_libpq() -> ctypes.CDLL:
    if pq.__impl__ == "python":
        # psycopg's own handle: a second look for the library might find another one.
        handle: ctypes.CDLL = sys.modules["psycopg.pq._pq_ctypes"].pq
        return handle
    # A look-up through the handle of psycopg's extension searches the libraries it was linked with, where the
    # process may hold several libpq. Windows does not search them, so that nothing is found there.
    extension = sys.modules[pq.PGconn.__module__]
    if extension.__file__ is None:
        raise OSError("psycopg's libpq wrapper is not a file")
    return ctypes.CDLL(extension.__file__)
