"""The pool in twenty lines. Uses DATABASE_URL, or a PostgreSQL of its own."""

import asyncio

from asyncpool import Pool
from asyncpool.cli.embedded import server_at_hand


async def main(url: str) -> None:
    async with Pool(url, min_size=2, max_size=10) as pool:
        # A block is a transaction: committed at its end, rolled back if it raises.
        async with pool.acquire() as conn:
            await conn.execute("create temporary table greeting (id int primary key, words text)")
            await conn.execute("insert into greeting values (%s, %s)", (1, "hello from a pooled connection"))
            cursor = await conn.execute("select words from greeting where id = %s", (1,))
            print(await cursor.fetchone())
        print(pool.stats())


with server_at_hand() as url:
    asyncio.run(main(url))
