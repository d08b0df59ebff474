"""`connection_class`, `row_factory` and the like: the connections are the user's own kind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually
from psycopg.rows import dict_row, namedtuple_row

from asyncpool import Pool, PoolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kit.servers import Admin


class Counting(psycopg.AsyncCursor[Any]):
    """A cursor that counts, on its connection, what it executes."""

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self.connection, Audited)
        self.connection.executed += 1
        return await super().execute(*args, **kwargs)


class Audited(psycopg.AsyncConnection[Any]):
    """A connection with an attribute, a property, methods and a cursor class of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executed = 0
        self.committed = 0
        self.cursor_factory = Counting

    @property
    def audit(self) -> tuple[int, int]:
        return self.executed, self.committed

    async def commit(self) -> None:
        await super().commit()
        self.committed += 1

    async def values(self, query: str) -> Sequence[Any]:
        cursor = await self.execute(query.encode())
        return [row[0] for row in await cursor.fetchall()]


class Slotted(psycopg.AsyncConnection[Any]):
    """One with slots, a class attribute and a mixin's method."""

    __slots__ = ("note",)

    note: str
    kind = "slotted"


class OwnClose(psycopg.AsyncConnection[Any]):
    """One that has a close() of its own."""

    async def close(self) -> None:
        await super().close()


async def test_a_connection_is_one_of_the_users_class_with_all_it_has(dsn: str) -> None:
    async with Pool(dsn, max_size=1, connection_class=Audited) as pool:
        async with pool.acquire() as conn:
            assert isinstance(conn, Audited)
            assert isinstance(conn, psycopg.AsyncConnection)
            assert await conn.values("select generate_series(1, 3)") == [1, 2, 3]
            assert isinstance(conn.cursor(), Counting)
            assert conn.audit == (1, 0)
        async with pool.acquire() as conn:
            assert conn.audit == (1, 1), "the block's end goes through the user's commit()"


async def test_the_users_own_attributes_are_the_users_to_restore(dsn: str) -> None:
    async def forget(conn: Any) -> None:
        conn.executed = conn.committed = 0

    async with Pool(dsn, max_size=1, connection_class=Audited, reset=forget) as pool:
        async with pool.acquire() as conn:
            await conn.values("select 1")
        async with pool.acquire() as conn:
            assert conn.audit == (0, 0)


@pytest.mark.parametrize("debug", [False, True])
async def test_every_object_of_a_class_with_slots_keeps_them(dsn: str, debug: bool) -> None:
    async with Pool(dsn, max_size=1, connection_class=Slotted, debug=debug) as pool:
        async with pool.acquire() as conn:
            conn.note = "kept"
        async with pool.acquire() as conn:
            assert (conn.note, conn.kind) == ("kept", "slotted")


async def test_what_the_pool_takes_over_it_takes_over_from_any_class(
    dsn: str, admin: Admin, application_name: str
) -> None:
    async with Pool(dsn, max_size=1, connection_class=Audited, cancel_timeout=25) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
        with pytest.raises(PoolError, match="released"):
            await conn.values("select 1")

        async def sleep() -> None:
            async with pool.acquire() as conn:
                await conn.values("select pg_sleep(600)")

        task = asyncio.create_task(sleep())
        await eventually(lambda: admin.asleep(application_name) == 1)
        task.cancel()
        await asyncio.wait([task])
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            await conn.close()
        assert pool.stats().connects == 1


async def test_two_pools_of_one_class_do_not_disturb_each_other(dsn: str) -> None:
    async with (
        Pool(dsn, max_size=1, connection_class=Audited) as one,
        Pool(dsn, max_size=1, connection_class=Audited) as two,
        one.acquire() as first,
        two.acquire() as second,
    ):
        assert type(first) is type(second)
        assert first is not second
        await first.values("select 1")
        assert second.audit == (0, 0)


async def test_a_class_that_is_no_connection_is_refused(dsn: str) -> None:
    mistakes: list[Any] = [int, psycopg.Connection, psycopg.AsyncCursor, "psycopg.AsyncConnection"]
    for mistake in mistakes:
        with pytest.raises(TypeError, match="connection_class"):
            Pool(dsn, connection_class=mistake)


async def test_rows_are_what_row_factory_makes_of_them(dsn: str) -> None:
    async with Pool(dsn, row_factory=dict_row) as pool, pool.acquire() as conn:
        assert await (await conn.execute("select 1 as one")).fetchone() == {"one": 1}
        async with conn.cursor("named") as cursor:
            await cursor.execute("select 2 as two")
            assert await cursor.fetchall() == [{"two": 2}]
        async with conn.cursor(row_factory=namedtuple_row) as other:
            await other.execute("select 3 as three")
            row = await other.fetchone()
            assert row is not None
            assert row._asdict() == {"three": 3}


async def test_the_repr_of_a_connection_shows_its_class_and_state(dsn: str) -> None:
    async with Pool(dsn, connection_class=Audited) as pool, pool.acquire() as conn:
        assert "Audited" in repr(conn)
        assert "IDLE" in repr(conn)


async def test_a_class_with_a_close_of_its_own_is_returned_by_it_all_the_same(dsn: str) -> None:
    async with Pool(dsn, max_size=1, connection_class=OwnClose) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            await conn.close()
            assert pool.stats().idle == 1
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
