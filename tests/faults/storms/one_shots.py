"""What a client of a storm asks for without a connection of its own: one-shot statements, one by one or many at once.

Each carries a token or a row of its own, by which its answer is known.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from psycopg.rows import dict_row

from asyncpool import CommitOutcomeUnknown, PoolError, PoolTimeout, StatementOutcomeUnknown, StatementTimeout

from .actions import HookFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .client import Client

# Seconds that some statements may take; the others take as long as they do.
SHORT_TIMEOUTS = (0.00001, 0.0005, 0.003, 0.02)


@dataclass
class Call:
    """One statement of a client, and the errors that it has deserved."""

    client: Client
    timeout: float | None = None
    provoked: tuple[type[BaseException], ...] = ()

    @classmethod
    def draw(cls, client: Client) -> Call:
        call = cls(client)
        if "setup" in client.plan.hooks or "configure" in client.plan.hooks:
            call.provoked += (HookFailed, PoolError)
        if client.rng.random() < 0.15:
            call.timeout = client.rng.choice(SHORT_TIMEOUTS)
            call.provoked += (PoolTimeout, StatementTimeout)
        if client.plan.loses_sessions:
            call.provoked += (StatementOutcomeUnknown,)
        return call

    @property
    def options(self) -> dict[str, Any]:
        return {"timeout": self.timeout}

    def reading(self) -> dict[str, Any]:
        """The options of a statement that may be sent again."""
        return {**self.options, "retry": self.client.rng.random() < 0.5}

    def token(self) -> int:
        return self.client.rng.getrandbits(30)

    def expect(self, found: object, asked: object) -> None:
        self.client.record.expect(found == asked, f"a one-shot asked for {asked}, answered {found}")

    @contextmanager
    def writing(self, rows: list[int]) -> Iterator[None]:
        """The block writes these rows. Unless its outcome is unknown, an error means that it has written none."""
        ledger = self.client.record.ledger
        if any(row % 101 == 0 for row in rows):  # the table's trigger refuses these
            self.provoked += (psycopg.errors.RaiseException,)
        with ledger.committing(rows):
            try:
                yield
            except (StatementOutcomeUnknown, CommitOutcomeUnknown):
                raise
            except Exception:
                ledger.in_doubt.difference_update(rows)
                raise

    def judge(self, error: Exception) -> None:
        self.client.record.errors[type(error).__name__] += 1
        if not isinstance(error, self.provoked):
            told = "".join(traceback.format_exception(error)[-30:]).strip()
            self.client.record.violation(f"unexpected of a one-shot: {told}")


async def value(call: Call) -> None:
    token = call.token()
    call.expect(await call.client.pool.fetchval("select %s::int", [token], **call.reading()), token)


async def row(call: Call) -> None:
    token, other = call.token(), str(call.token())
    found = await call.client.pool.fetchrow("select %s::int, %s::text", [token, other], **call.reading())
    call.expect(found, (token, other))


async def rows(call: Call) -> None:
    token = call.token()
    count = call.client.rng.choice((1, 3, 50, 3000))
    statement = "select %(token)s::int + n as n from generate_series(1, %(count)s) as n"
    parameters = {"token": token, "count": count}
    found = await call.client.pool.fetch(statement, parameters, row_factory=dict_row, **call.reading())
    call.expect(found[:1] + found[-1:], [{"n": token + 1}, {"n": token + count}])
    call.expect(len(found), count)


async def binary_value(call: Call) -> None:
    token = call.token()
    call.expect(await call.client.pool.fetchval("select %b::int4", [token], binary=True, **call.reading()), token)


async def one_of_many_texts(call: Call) -> None:
    token, number = call.token(), call.client.rng.randrange(150)
    found = await call.client.pool.fetchval(f"select %s::int + {number} * 0".encode(), [token], **call.reading())
    call.expect(found, token)


async def slow_value(call: Call) -> None:
    token, seconds = call.token(), call.client.rng.uniform(0, 0.008)
    statement = "select %s::int from pg_sleep(%s)"
    call.expect(await call.client.pool.fetchval(statement, [token, seconds], **call.reading()), token)


async def much(call: Call) -> None:
    """More than a socket takes at once, both ways."""
    text = f"{call.token()} " * call.client.rng.choice((10, 10_000, 100_000))
    found = await call.client.pool.fetchval("select %s::text", [text], **call.reading())
    call.expect(found == text, True)


async def write(call: Call) -> None:
    number = call.client.new_row()
    with call.writing([number]):
        statement = f"insert into {call.client.table} values (%s)".encode()
        call.expect(await call.client.pool.execute(statement, [number], **call.options), "INSERT 0 1")


async def write_and_return(call: Call) -> None:
    number = call.client.new_row()
    with call.writing([number]):
        statement = f"insert into {call.client.table} values (%s) returning id".encode()
        call.expect(await call.client.pool.fetchval(statement, [number], **call.options), number)


async def write_many(call: Call) -> None:
    """On a lease, in a transaction: losing that is one of a lease's errors."""
    if call.client.plan.loses_sessions:
        call.provoked += (psycopg.OperationalError,)
    numbers = [call.client.new_row() for _ in range(3)]
    with call.writing(numbers):
        statement = f"insert into {call.client.table} values (%s)".encode()
        parameters = [(number,) for number in numbers]
        call.expect(await call.client.pool.executemany(statement, parameters), len(numbers))


async def failing(call: Call) -> None:
    call.provoked += (psycopg.errors.DivisionByZero,)
    await call.client.pool.execute("select %s::int / 0", [call.token()], **call.options)
    call.client.record.violation("a division by zero gave something")


async def failing_to_parse(call: Call) -> None:
    call.provoked += (psycopg.errors.SyntaxError,)
    await call.client.pool.execute("selec %s", [call.token()], **call.options)


async def failing_to_adapt(call: Call) -> None:
    call.provoked += (psycopg.ProgrammingError,)
    await call.client.pool.execute("select %s", [object()], **call.options)


async def refused(call: Call) -> None:
    call.provoked += (psycopg.ProgrammingError,)
    await call.client.pool.execute("begin", **call.options)
    call.client.record.violation("BEGIN was taken for a one-shot")


Kind: TypeAlias = Callable[[Call], Awaitable[None]]

KINDS: list[Kind] = [
    value,
    value,
    value,
    row,
    row,
    rows,
    binary_value,
    one_of_many_texts,
    slow_value,
    much,
    write,
    write,
    write,
    write_and_return,
    write_and_return,
    write_many,
    failing,
    failing_to_parse,
    failing_to_adapt,
    refused,
]


async def burst(client: Client) -> None:
    """Some statements, one after the other or at once. Whoever is cancelled meanwhile sees nothing but that."""
    kinds = [client.rng.choice(KINDS) for _ in range(client.rng.choice((1, 1, 2, 5, 20)))]
    if client.rng.random() < 0.5:
        for kind in kinds:
            await _send(client, kind)
    else:
        ended = await asyncio.gather(*(_send(client, kind) for kind in kinds), return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error


async def _send(client: Client, kind: Kind) -> None:
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    call = Call.draw(client)
    try:
        await kind(call)
    except Exception as error:
        call.judge(error)
        if task.cancelling() > cancellations:
            client.record.violation(f"a cancelled one-shot raised {error!r}")
            raise asyncio.CancelledError from error
    else:
        client.record.operations["one-shots"] += 1
        client.record.expect(task.cancelling() <= cancellations, "a cancelled one-shot has returned")
