"""The ways to commit a row, in tasks and in threads, and what their user learns of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from kit.waiting import eventually
from psycopg import sql

from asyncpool import CommitOutcomeUnknown, CommitStatus, Pool, SyncPool
from asyncpool.psycopg2.pool import ThreadedConnectionPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

AnyPool = Pool[psycopg.AsyncConnection[Any]]
AnySyncPool = SyncPool[psycopg.Connection[Any]]


@dataclass(frozen=True)
class Learned:
    """What a user knows at the end: nothing was raised, or this error, and what the pool says of it."""

    error: Exception | None
    status: CommitStatus | None = None

    @property
    def is_unknown(self) -> bool:
        return isinstance(self.error, CommitOutcomeUnknown)


def insertion(table: str) -> sql.Composed:
    return sql.SQL("insert into {} values (1)").format(sql.Identifier(table))


# --- in tasks -----------------------------------------------------------------------------------------------


async def by_hand(pool: AnyPool, table: str) -> None:
    conn = await pool.acquire()
    try:
        await conn.execute(insertion(table))
        await conn.commit()
    finally:
        await pool.release(conn)


async def block(pool: AnyPool, table: str) -> None:
    async with pool.acquire() as conn:
        await conn.execute(insertion(table))


async def transaction_of_connection(pool: AnyPool, table: str) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(insertion(table))


async def entered_connection(pool: AnyPool, table: str) -> None:
    conn = await pool.acquire()
    try:
        async with conn:
            await conn.execute(insertion(table))
    finally:
        await pool.release(conn)


async def transaction_of_pool(pool: AnyPool, table: str) -> None:
    async with pool.transaction() as conn:
        await conn.execute(insertion(table))


async def tracked(pool: AnyPool, table: str) -> None:
    async with pool.transaction(track_outcome=True) as conn:
        await conn.execute(insertion(table))


WAYS: list[Callable[[AnyPool, str], Awaitable[None]]] = [
    by_hand,
    block,
    transaction_of_connection,
    entered_connection,
    transaction_of_pool,
    tracked,
]


# --- in threads ---------------------------------------------------------------------------------------------


def blocking_by_hand(pool: AnySyncPool, table: str) -> None:
    conn = pool.getconn()
    try:
        conn.execute(insertion(table))
        conn.commit()
    finally:
        pool.putconn(conn)


def blocking_block(pool: AnySyncPool, table: str) -> None:
    with pool.acquire() as conn:
        conn.execute(insertion(table))


def blocking_transaction_of_connection(pool: AnySyncPool, table: str) -> None:
    with pool.acquire() as conn, conn.transaction():
        conn.execute(insertion(table))


def blocking_entered_connection(pool: AnySyncPool, table: str) -> None:
    conn = pool.getconn()
    try:
        with conn:
            conn.execute(insertion(table))
    finally:
        pool.putconn(conn)


def blocking_transaction_of_pool(pool: AnySyncPool, table: str) -> None:
    with pool.transaction() as conn:
        conn.execute(insertion(table))


def blocking_tracked(pool: AnySyncPool, table: str) -> None:
    with pool.transaction(track_outcome=True) as conn:
        conn.execute(insertion(table))


BLOCKING_WAYS: list[Callable[[AnySyncPool, str], None]] = [
    blocking_by_hand,
    blocking_block,
    blocking_transaction_of_connection,
    blocking_entered_connection,
    blocking_transaction_of_pool,
    blocking_tracked,
]


def drop_in_commit(pool: ThreadedConnectionPool, table: str) -> None:
    conn = pool.getconn()
    try:
        with conn.cursor() as cursor:
            cursor.execute(insertion(table))
        conn.commit()
    finally:
        pool.putconn(conn)


def drop_in_block(pool: ThreadedConnectionPool, table: str) -> None:
    conn = pool.getconn()
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute(insertion(table))
    finally:
        pool.putconn(conn)


DROP_IN_WAYS: list[Callable[[ThreadedConnectionPool, str], None]] = [drop_in_commit, drop_in_block]


async def final_status(pool: AnyPool, error: CommitOutcomeUnknown) -> CommitStatus:
    """What the pool says when the server has noticed that its client is gone."""

    async def answer() -> CommitStatus | None:
        status = await pool.commit_status(error, timeout=30)
        return None if status is CommitStatus.IN_PROGRESS else status

    status = await eventually(answer, timeout=30)
    assert status is not None
    return status


async def learn(pool: AnyPool, work: Callable[[], Awaitable[None]]) -> Learned:
    """Do it, and ask what became of it if that is unknown."""
    try:
        await work()
    except CommitOutcomeUnknown as error:
        return Learned(error, await final_status(pool, error))
    except psycopg.Error as error:
        return Learned(error)
    return Learned(None)
