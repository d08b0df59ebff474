"""What must be so of a pool when the server is well again."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolTimeout, SyncPool

if TYPE_CHECKING:
    from kit.load import Load
    from kit.mortal_server import MortalServer

PATIENCE = 20.0


async def backend_pid(conn: Any) -> int:
    """Its server process, asked from the server."""
    row = await (await conn.execute("select pg_backend_pid()")).fetchone()
    await conn.commit()
    return int(row[0])


def blocking_backend_pid(conn: Any) -> int:
    """The same in a thread."""
    row = conn.execute("select pg_backend_pid()").fetchone()
    conn.commit()
    return int(row[0])


async def assert_whole(pool: Pool[Any], server: MortalServer, application_name: str) -> None:
    """It is at `min_size`, each connection works, and the server counts those and no other."""
    stats = pool.stats()
    assert (stats.leased, stats.waiting) == (0, 0)
    await eventually(lambda: pool.stats().idle == pool.stats().size >= stats.min_size, timeout=PATIENCE)
    async with AsyncExitStack() as stack:
        conns = [await stack.enter_async_context(pool.acquire(timeout=PATIENCE)) for _ in range(pool.stats().idle)]
        pids = {await backend_pid(conn) for conn in conns}
        assert len(pids) == len(conns)
    await eventually(lambda: set(server.admin.pids(application_name)) == pids, timeout=PATIENCE)
    assert server.strangers() == len(pids)
    assert pool.stats().idle == len(pids)


def assert_whole_blocking(pool: SyncPool[Any], server: MortalServer, application_name: str) -> None:
    """The same of a pool that threads use."""
    stats = pool.stats()
    assert (stats.leased, stats.waiting) == (0, 0)
    eventually_blocking(lambda: pool.stats().idle == pool.stats().size >= stats.min_size, timeout=PATIENCE)
    with ExitStack() as stack:
        conns = [stack.enter_context(pool.acquire(timeout=PATIENCE)) for _ in range(pool.stats().idle)]
        pids = {blocking_backend_pid(conn) for conn in conns}
        assert len(pids) == len(conns)
    eventually_blocking(lambda: set(server.admin.pids(application_name)) == pids, timeout=PATIENCE)
    assert server.strangers() == len(pids)


def assert_no_more_failed_than_were_in_use(load: Load, size: int, opened: float) -> None:
    """An outage costs each connection one request at most: the one that it was in the middle of."""
    assert len(load.errors) <= size, load.errors
    assert [error for error in load.errors if isinstance(error, PoolTimeout)] == []
    assert load.errors_since(opened) == []
