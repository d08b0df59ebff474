"""LISTEN and NOTIFY: a listener keeps a connection of the pool for itself, publishers borrow others.

Whoever listens holds its connection as long as it listens: count it in when choosing max_size.
"""

import asyncio

from psycopg import AsyncConnection, sql

from asyncpool import Pool
from asyncpool.cli.embedded import server_at_hand

CHANNEL = "example_news"
HEADLINES = ["pool opened", "all connections idle", "nothing else happened"]


async def listen(pool: Pool[AsyncConnection], listening: asyncio.Event) -> list[str]:
    """Return the headlines, once there were as many as there are to come."""
    async with pool.acquire() as conn:
        await conn.set_autocommit(True)
        await conn.execute(sql.SQL("listen {}").format(sql.Identifier(CHANNEL)))
        listening.set()
        notifications = conn.notifies(stop_after=len(HEADLINES), timeout=10)
        heard = [notification.payload async for notification in notifications]
        # The next user of this connection did not subscribe; reset="session" would take care of it, too.
        await conn.execute(sql.SQL("unlisten {}").format(sql.Identifier(CHANNEL)))
    return heard


async def main(url: str) -> None:
    async with Pool(url, min_size=1, max_size=2) as pool:
        listening = asyncio.Event()
        listener = asyncio.create_task(listen(pool, listening))
        await listening.wait()
        for headline in HEADLINES:
            async with pool.acquire() as conn:
                await conn.execute("select pg_notify(%s, %s)", (CHANNEL, headline))
        heard = await listener
    print("heard:", *heard, sep="\n  ")
    assert heard == HEADLINES


with server_at_hand() as url:
    asyncio.run(main(url))
