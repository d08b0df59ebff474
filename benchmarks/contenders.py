"""The pools under comparison, each behind the same four calls.

An adapter hands out the pool's *own* bound methods wherever their signature fits, so that no wrapper
is timed along with them. Every pool holds `size` connections in autocommit, opened before anything is timed,
and is otherwise left at its defaults, but for what a comment here says.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Opened = TypeVar("Opened")

# Connections are of five different classes here; nothing is asked of them but `select 1`.
Connection = Any


class Block(Protocol):
    """What `async with` takes."""

    def __aenter__(self) -> Awaitable[Connection]: ...
    def __aexit__(self, *exc_info: Any) -> Awaitable[bool | None]: ...


@dataclass(frozen=True, slots=True)
class OpenPool:
    """A pool, open and warm. `select_one` runs one statement and fetches its row."""

    acquire: Callable[[], Awaitable[Connection]]
    release: Callable[[Connection], Awaitable[Any]]
    block: Callable[[], Block]
    select_one: Callable[[Connection], Awaitable[None]]
    close: Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Contender(Generic[Opened]):
    """One row of a table: what it is called, what must be installed for it, and how it is opened."""

    name: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    open: Callable[[str, int], Awaitable[Opened]]

    def missing(self) -> list[str]:
        """The modules that this contender needs and that are not installed."""
        return [module for module in self.modules if not _importable(module)]

    def version(self) -> str:
        """The versions of its distributions; a checkout that was never installed has none."""
        return ", ".join(_version(distribution) for distribution in self.distributions)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} (not installed, from the source tree)"


async def _psycopg_select_one(connection: Connection) -> None:
    cursor = await connection.execute("select 1")
    assert await cursor.fetchone() == (1,)


async def _asyncpg_select_one(connection: Connection) -> None:
    row = await connection.fetchrow("select 1")
    assert row[0] == 1


async def _sqlalchemy_select_one(connection: Connection) -> None:
    # exec_driver_sql is SQLAlchemy's thinnest way: no compiled statement.
    result = await connection.exec_driver_sql("select 1")
    assert result.scalar_one() == 1


# --- ours ---------------------------------------------------------------------------------------------------


async def open_asyncpool(url: str, size: int) -> OpenPool:
    from asyncpool import Pool

    pool = Pool(url, min_size=size, max_size=size, autocommit=True)
    await pool.open()
    return OpenPool(pool.acquire, pool.release, pool.acquire, _psycopg_select_one, pool.close)


# --- psycopg_pool -------------------------------------------------------------------------------------------


async def open_psycopg_pool(url: str, size: int) -> OpenPool:
    # Defaults: no check before hand-out, no reset beyond the rollback of an open transaction.
    from psycopg_pool import AsyncConnectionPool

    pool = AsyncConnectionPool(url, min_size=size, max_size=size, open=False, kwargs={"autocommit": True})
    await pool.open(wait=True)
    return OpenPool(pool.getconn, pool.putconn, pool.connection, _psycopg_select_one, pool.close)


# --- asyncpg ------------------------------------------------------------------------------------------------


async def open_asyncpg(url: str, size: int) -> OpenPool:
    # Defaults: every release sends a query that unlocks, unlistens and resets, and waits for the answer.
    import asyncpg  # type: ignore[import-untyped, unused-ignore]

    return _open_asyncpg(await asyncpg.create_pool(url, min_size=size, max_size=size))


async def open_asyncpg_without_reset(url: str, size: int) -> OpenPool:
    # The documented way to switch the reset query off, and the cheapest: `Connection.reset()` sends nothing
    # when `get_reset_query()` is empty, unless a transaction is open.
    import asyncpg

    class WithoutReset(asyncpg.Connection):  # type: ignore[misc, unused-ignore]
        def get_reset_query(self) -> str:
            return ""

    pool = await asyncpg.create_pool(url, min_size=size, max_size=size, connection_class=WithoutReset)
    return _open_asyncpg(pool)


def _open_asyncpg(pool: Any) -> OpenPool:
    return OpenPool(pool.acquire, pool.release, pool.acquire, _asyncpg_select_one, pool.close)


# --- SQLAlchemy ---------------------------------------------------------------------------------------------


async def open_sqlalchemy_psycopg(url: str, size: int) -> OpenPool:
    import psycopg

    async def connect() -> Connection:
        return await psycopg.AsyncConnection.connect(url, autocommit=True)

    return await _open_sqlalchemy("postgresql+psycopg://", connect, size)


async def open_sqlalchemy_asyncpg(url: str, size: int) -> OpenPool:
    import asyncpg

    async def connect() -> Connection:
        return await asyncpg.connect(url)

    return await _open_sqlalchemy("postgresql+asyncpg://", connect, size)


async def _open_sqlalchemy(dialect: str, connect: Callable[[], Awaitable[Any]], size: int) -> OpenPool:
    # `engine.connect()` is how a user checks a connection out; the AsyncConnection around it is part of that.
    # In AUTOCOMMIT, skip_autocommit_rollback saves the rollback at check-in, which SQLAlchemy does otherwise.
    from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

    engine = create_async_engine(
        dialect,
        async_creator=connect,
        pool_size=size,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )
    for connection in [await engine.connect() for _ in range(size)]:
        await connection.close()
    return OpenPool(engine.connect, AsyncConnection.close, engine.connect, _sqlalchemy_select_one, engine.dispose)


# --- connpool -----------------------------------------------------------------------------------------------


async def open_connpool(url: str, size: int) -> OpenPool:
    # A pool of anything that a factory makes, here psycopg connections. An asyncio.Condition guards a deque,
    # a wait is an asyncio.timeout() on it, each checkout tells the listeners (its own statistics) twice.
    # By default it neither resets nor rolls back what is returned; `validate`, which is not given here, is
    # asked after 30 s idle. What is returned is handed to nobody: a newcomer may overtake the queue.
    import psycopg
    from connpool import AsyncConnectionPool, PoolConfig

    async def create() -> Connection:
        return await psycopg.AsyncConnection.connect(url, autocommit=True)

    pool: AsyncConnectionPool[Connection] = AsyncConnectionPool.from_callables(
        create, config=PoolConfig(min_size=size, max_size=size)
    )
    await pool.open()
    return OpenPool(pool.acquire, pool.release, pool.connection, _psycopg_select_one, pool.close)


# --- baselines: what the harness itself costs ---------------------------------------------------------------


class _NoBlock:
    async def __aenter__(self) -> Connection:
        return None

    async def __aexit__(self, *exc_info: object) -> None:
        return None


async def _no_select(_: Connection) -> None:
    # One turn of the loop stands in for the statement; without it the tasks would run one after the other.
    await asyncio.sleep(0)


async def _nothing(*_: object) -> None:
    return None


async def open_nothing(_url: str, _size: int) -> OpenPool:
    # Nobody waits here: the cost of the harness's own tasks, coroutines and turns of the loop.
    return OpenPool(_nothing, _nothing, _NoBlock, _no_select, _nothing)


class _Shelf:
    """The least that can be called a fair pool: asyncio's semaphore in front of a list."""

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)
        self._things: list[object] = [object() for _ in range(size)]

    async def acquire(self) -> object:
        await self._free.acquire()
        return self._things.pop()

    async def release(self, thing: object) -> None:
        self._things.append(thing)
        self._free.release()

    def block(self) -> _ShelfBlock:
        return _ShelfBlock(self)


class _ShelfBlock:
    __slots__ = ("_shelf", "_thing")

    def __init__(self, shelf: _Shelf) -> None:
        self._shelf = shelf

    async def __aenter__(self) -> object:
        self._thing = await self._shelf.acquire()
        return self._thing

    async def __aexit__(self, *exc_info: object) -> None:
        await self._shelf.release(self._thing)


async def open_semaphore(_url: str, size: int) -> OpenPool:
    shelf = _Shelf(size)
    return OpenPool(shelf.acquire, shelf.release, shelf.block, _no_select, _nothing)


# --- the list -----------------------------------------------------------------------------------------------

OURS = "asyncpool"
PSYCOPG_POOL = "psycopg_pool"
ASYNCPG_WITHOUT_RESET = "asyncpg, no reset query"
BARE = "(bare loop, no pool)"
SEMAPHORE = "(asyncio.Semaphore + list)"

BASELINES = [
    Contender(BARE, (), (), open_nothing),
    Contender(SEMAPHORE, (), (), open_semaphore),
]
POOLS = [
    Contender(OURS, ("asyncpool.pool", "psycopg"), ("asyncpool-pg", "psycopg"), open_asyncpool),
    Contender(PSYCOPG_POOL, ("psycopg_pool", "psycopg"), ("psycopg-pool",), open_psycopg_pool),
    Contender(ASYNCPG_WITHOUT_RESET, ("asyncpg",), ("asyncpg",), open_asyncpg_without_reset),
    Contender("asyncpg", ("asyncpg",), ("asyncpg",), open_asyncpg),
    Contender(
        "SQLAlchemy, psycopg",
        ("sqlalchemy", "greenlet", "psycopg"),
        ("sqlalchemy", "greenlet"),
        open_sqlalchemy_psycopg,
    ),
    Contender(
        "SQLAlchemy, asyncpg",
        ("sqlalchemy", "greenlet", "asyncpg"),
        ("sqlalchemy", "greenlet"),
        open_sqlalchemy_asyncpg,
    ),
    Contender("connpool", ("connpool", "psycopg"), ("connpool",), open_connpool),
]
