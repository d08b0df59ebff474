"""executemany()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import AsyncRawCursor

from asyncpool import Pool

if TYPE_CHECKING:
    from psycopg import AsyncConnection


async def test_executemany_has_the_placeholders_of_raw_cursors(dsn: str) -> None:
    async def configure(conn: AsyncConnection[Any]) -> None:
        conn.cursor_factory = AsyncRawCursor

    async with Pool(dsn, configure=configure) as pool:
        assert await pool.executemany("select $1::int", [(1,), (2,)]) == 2
