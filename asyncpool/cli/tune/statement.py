"""The user's statement: its values, and whether it works at all, found out before anything is measured."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import ExecStatus
from psycopg.types.json import Jsonb

from asyncpool._io.one_shot_rules import needs_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

# What psycopg takes for the place of a value, and what a server does.
PLACEHOLDER = re.compile(r"%(?:\(\w+\))?[sbt]|\$\d")

# Seconds of execution after which the next one would tell nothing new.
LONG_ENOUGH = 0.25

EXAMPLE = "such as '[7, 21.5]' or '{\"device\": 7}'"


class StatementFailed(Exception):
    """The statement cannot be measured; the message says why, in the server's words where they are the server's."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What each task does again and again. `commit`: and keep it, rather than roll it back; `prepare`: as psycopg does
    from the sixth time on.
    """

    query: str
    params: Sequence[Any] | Mapping[str, Any] | None
    commit: bool
    prepare: bool = True

    @property
    def encoded(self) -> bytes:
        """psycopg takes a str for a literal of the program's, which this is not."""
        return self.query.encode()


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of it: how many seconds it takes alone, whether it only reads, and how often it was committed."""

    seconds: float
    only_reads: bool
    committed: int = 0


def query_argument(text: str) -> str:
    """The value of `--query`."""
    if not text.strip().strip(";"):
        raise argparse.ArgumentTypeError("it is empty: give one SQL statement")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None
    if command := needs_session(encoded):
        raise argparse.ArgumentTypeError(
            f"{command} cannot be measured: give one statement that works in a transaction of its own, such as a"
            " SELECT or an INSERT"
        )
    return text


def params_argument(text: str) -> list[Any] | dict[str, Any]:
    """The value of `--params`: JSON, in which an object within is a value of type jsonb."""
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8, or has half of a surrogate pair") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is no JSON ({error}): give a list or an object, {EXAMPLE}") from None
    if isinstance(values, list):
        return [_adaptable(value) for value in values]
    if isinstance(values, dict):
        return {name: _adaptable(value) for name, value in values.items()}
    raise argparse.ArgumentTypeError(f"it is JSON, but neither a list nor an object: give one, {EXAMPLE}")


def _adaptable(value: Any) -> Any:
    return Jsonb(value) if isinstance(value, dict) else value


async def try_out(conn: psycopg.AsyncConnection[Any], statement: Statement, patience: float) -> Trial:
    """Run it, on a connection in autocommit: first in a READ ONLY transaction, which tells whether it writes, then as
    it is going to be run. Raises StatementFailed if it fails, and TimeoutError if it does not end within `patience`
    seconds.
    """
    try:
        alone = await _alone_if_it_only_reads(conn, statement, patience)
        durations = [alone] if alone is not None and not statement.commit else []
        # What is committed may stand in its own way the second time.
        for _ in range(2):
            if sum(durations) < LONG_ENOUGH:
                durations.append(await _run(conn, statement, patience, commit=statement.commit))
    except TypeError as error:  # psycopg's, of parameters
        raise StatementFailed(explain(psycopg.ProgrammingError(str(error)), statement)) from error
    except psycopg.Error as error:
        if conn.broken:
            raise
        raise StatementFailed(explain(error, statement)) from error
    return Trial(min(durations), alone is not None, len(durations) if statement.commit else 0)


async def _alone_if_it_only_reads(
    conn: psycopg.AsyncConnection[Any], statement: Statement, patience: float
) -> float | None:
    """How long it takes, None if the server does not let it run in a READ ONLY transaction."""
    try:
        return await _run(conn, statement, patience, commit=False, read_only=True)
    except psycopg.errors.ReadOnlySqlTransaction:
        return None


async def _run(
    conn: psycopg.AsyncConnection[Any], statement: Statement, patience: float, *, commit: bool, read_only: bool = False
) -> float:
    async with _transaction(conn, commit=commit, read_only=read_only), asyncio.timeout(patience):
        begun = time.perf_counter()
        # In a pipeline psycopg leaves the simple protocol, which would take several statements, a COMMIT among them.
        async with conn.pipeline():
            cursor = await conn.execute(statement.encoded, statement.params)
        seconds = time.perf_counter() - begun
        if cursor.pgresult and cursor.pgresult.status == ExecStatus.EMPTY_QUERY:
            raise StatementFailed("--query holds no statement: give one")
        return seconds


@asynccontextmanager
async def _transaction(conn: psycopg.AsyncConnection[Any], *, commit: bool, read_only: bool) -> AsyncIterator[None]:
    await conn.set_read_only(True if read_only else None)
    async with conn.transaction(force_rollback=not commit):
        yield


def explain(error: psycopg.Error, statement: Statement) -> str:
    """The statement's failure in the server's words, and what may help."""
    words = str(error).strip() or type(error).__name__
    if error.sqlstate is None and isinstance(error, psycopg.ProgrammingError):
        return (
            f"the statement could not be sent: {words}: --params are to fit the placeholders in --query, in which any"
            " other % is written %%"
        )
    if isinstance(error, (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement)):
        words += "\nbehind a pooler that does not carry prepared statements give --no-prepare"
    if statement.params is None and PLACEHOLDER.search(statement.query):
        words += "\nplaceholders in --query are written %s or %(name)s, and need values: --params, " + EXAMPLE
    return f"the statement fails: {words}"
