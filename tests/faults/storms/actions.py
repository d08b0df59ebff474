"""What a client of a storm does on a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from pool.leftovers import stream
from psycopg.rows import dict_row, namedtuple_row, tuple_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .client import Client
    from .plan import Plan

Connection = psycopg.AsyncConnection[Any]
Action: TypeAlias = Callable[["Client", Connection], Awaitable[None]]

IDLE = psycopg.pq.TransactionStatus.IDLE

# A few advisory locks, so that clients meet at them.
LOCKS = 5


class HookFailed(Exception):
    """What `configure`, `setup`, `check` and `reset` raise now and then."""


@contextmanager
def writing(client: Client, conn: Connection, rows: list[int]) -> Iterator[None]:
    """The block writes these rows; under autocommit, outside of a transaction, that commits them."""
    if conn.autocommit and conn.pgconn.transaction_status == IDLE and conn.pgconn.pipeline_status == 0:
        with client.record.ledger.committing(rows):
            yield
    else:
        yield
        client.pending += rows


async def query(client: Client, conn: Connection) -> None:
    """Each answer is that to one's own question."""
    token = client.rng.getrandbits(30)
    cursor = await conn.execute("select %s::int", [token])
    found = await cursor.fetchall()
    client.record.expect(found == [(token,)], f"asked for {token}, answered {found}")


async def slow_query(client: Client, conn: Connection) -> None:
    token = client.rng.getrandbits(30)
    cursor = await conn.execute("select %s::int, pg_sleep(%s)", [token, client.rng.uniform(0, 0.008)])
    found = await cursor.fetchone()
    client.record.expect(found is not None and found[0] == token, f"asked for {token}, answered {found}")


async def several_statements(client: Client, conn: Connection) -> None:
    await conn.execute("select 1; select pg_sleep(0.001); select 2", prepare=False)


async def prepared_query(client: Client, conn: Connection) -> None:
    token = client.rng.getrandbits(30)
    number = client.rng.randrange(3)
    cursor = await conn.execute(f"select %s::int + {number} * 0".encode(), [token], prepare=True)
    found = await cursor.fetchall()
    client.record.expect(found == [(token,)], f"asked for {token}, answered {found}")


async def pause(client: Client, conn: Connection) -> None:
    await asyncio.sleep(client.rng.choice((0, 0, 0.001, 0.004)))


async def write(client: Client, conn: Connection) -> None:
    row = client.new_row()
    with writing(client, conn, [row]):
        await conn.execute(f"insert into {client.table} values (%s)".encode(), [row])


async def write_many(client: Client, conn: Connection) -> None:
    rows = [client.new_row() for _ in range(3)]
    with writing(client, conn, rows):
        await conn.cursor().executemany(f"insert into {client.table} values (%s)".encode(), [(row,) for row in rows])


async def copy_in(client: Client, conn: Connection) -> None:
    rows = [client.new_row() for _ in range(5)]
    with writing(client, conn, rows):
        async with conn.cursor().copy(f"copy {client.table} from stdin".encode()) as copy:
            for row in rows:
                await copy.write_row([row])
                await asyncio.sleep(0)


async def copy_out(client: Client, conn: Connection) -> None:
    count = client.rng.choice((1, 10, 1000))
    found = 0
    async with conn.cursor().copy(f"copy (select generate_series(1, {count})) to stdout".encode()) as copy:
        async for _ in copy.rows():
            found += 1
    client.record.expect(found == count, f"COPY of {count} rows gave {found}")


async def read_stream(client: Client, conn: Connection) -> None:
    count = client.rng.choice((1, 10, 200))
    size = client.rng.choice((1, 7))
    found = 0
    async with aclosing(stream(conn, f"select generate_series(1, {count})", size=size)) as rows:
        async for _ in rows:
            found += 1
    client.record.expect(found == count, f"a stream of {count} rows gave {found}")


async def pipeline(client: Client, conn: Connection) -> None:
    # libpq keeps a stream's row-by-row mode for what a pipeline sends next, on psycopg's own connections too.
    await conn.execute("select 1")
    tokens = [client.rng.getrandbits(30) for _ in range(3)]
    async with conn.pipeline() as pipe:
        cursors = [await conn.execute("select %s::int", [token]) for token in tokens]
        if client.rng.random() < 0.5:
            await pipe.sync()
        found = [await cursor.fetchone() for cursor in cursors]
    client.record.expect(found == [(token,) for token in tokens], f"a pipeline of {tokens} gave {found}")


async def server_cursor(client: Client, conn: Connection) -> None:
    async with conn.transaction(), conn.cursor("portal") as cursor:
        await cursor.execute("select generate_series(1, 50)")
        await cursor.fetchmany(10)


async def transaction_block(client: Client, conn: Connection) -> None:
    """A transaction, or a savepoint if there is one already; one that may fail, and hold further ones."""
    outermost = conn.pgconn.transaction_status == IDLE
    before, client.pending = client.pending, []
    context = conn.transaction()
    block = await context.__aenter__()
    try:
        await client.rng.choice((write, write, query, pause, transaction_block, advisory_lock))(client, conn)
        if client.rng.random() < 0.2:
            raise psycopg.Rollback(block)
        if client.rng.random() < 0.1:
            await conn.execute("select 1/0")
    except BaseException as error:
        client.pending = before
        if not await context.__aexit__(type(error), error, error.__traceback__):
            raise
    else:
        if outermost:
            with client.record.ledger.committing(client.pending):
                await context.__aexit__(None, None, None)
            client.pending = before
        else:
            await context.__aexit__(None, None, None)
            client.pending = before + client.pending


async def failing_statement(client: Client, conn: Connection) -> None:
    await conn.execute("select 1/0")


async def advisory_lock(client: Client, conn: Connection) -> None:
    """One at a time: two of them could be a deadlock, which would be the clients' own."""
    async with conn.transaction():
        await conn.execute("select pg_try_advisory_xact_lock(%s)", [client.rng.randrange(LOCKS)])


async def change_client_state(client: Client, conn: Connection) -> None:
    conn.row_factory = dict_row
    conn.add_notice_handler(lambda _: None)
    conn.prepare_threshold = 1
    if conn.pgconn.transaction_status == IDLE and not conn.autocommit:
        await conn.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
    conn.row_factory = tuple_row if client.rng.random() < 0.5 else namedtuple_row
    await conn.execute("select 1")
    # What other actions of the same lease compare their answers with.
    conn.row_factory = tuple_row
    conn.cursor_factory = psycopg.AsyncClientCursor


# What stays on the session, unless the end of the lease undoes it.


async def listen(client: Client, conn: Connection) -> None:
    await conn.execute("listen storm")
    await conn.execute("notify storm")


async def temporary_table(client: Client, conn: Connection) -> None:
    await conn.execute("create temp table if not exists storm_scratch (id int)")
    await conn.execute("insert into storm_scratch values (1)")


async def session_lock(client: Client, conn: Connection) -> None:
    await conn.execute("select pg_try_advisory_lock(%s)", [100 + client.rng.randrange(LOCKS)])


async def setting(client: Client, conn: Connection) -> None:
    await conn.execute("set work_mem to '3MB'")


ALWAYS: list[Action] = [
    query,
    query,
    slow_query,
    slow_query,
    several_statements,
    prepared_query,
    pause,
    write,
    write,
    write_many,
    copy_in,
    copy_out,
    read_stream,
    pipeline,
    server_cursor,
    transaction_block,
    transaction_block,
    failing_statement,
    advisory_lock,
    change_client_state,
]
ON_CLEANED_SESSIONS: list[Action] = [listen, temporary_table, session_lock, setting]


def of(plan: Plan) -> list[Action]:
    """What the clients of that storm do."""
    return ALWAYS + ON_CLEANED_SESSIONS if plan.cleans_sessions else ALWAYS
