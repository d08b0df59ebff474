"""A FastAPI service: the pool lives as long as the application; a request borrows a connection, or just a statement.

Here a client in the same process sends the requests. As a service:
`uvicorn --factory examples.web_app:create_app`, with DATABASE_URL set.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from psycopg import AsyncConnection

from asyncpool import Pool, PoolTimeout
from asyncpool.cli.embedded import server_at_hand


async def connection(request: Request) -> AsyncIterator[AsyncConnection[Any]]:
    """A connection for one request: what it did is committed at the end, or rolled back if it failed."""
    pool: Pool[AsyncConnection] = request.app.state.pool
    try:
        async with pool.acquire(timeout=2) as conn:
            yield conn
    except PoolTimeout:
        raise HTTPException(503, "the database is busy") from None


# `scope="function"`: committed before the answer is sent, so that whoever reads 200 can rely on it.
Connection = Annotated[AsyncConnection[Any], Depends(connection, scope="function")]


def create_app(url: str | None = None) -> FastAPI:
    """The application. Its pool opens and closes with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Pool(url or os.environ["DATABASE_URL"], min_size=1, max_size=5) as pool:
            app.state.pool = pool
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/square/{number}")
    async def square(number: int, conn: Connection) -> dict[str, int]:
        cursor = await conn.execute("select %s::bigint * %s", (number, number))
        row = await cursor.fetchone()
        assert row is not None
        return {"square": row[0]}

    @app.get("/double/{number}")
    async def double(number: int) -> dict[str, int]:
        pool: Pool[AsyncConnection] = app.state.pool
        return {"double": await pool.fetchval("select %s::bigint * 2", (number,), timeout=2)}

    @app.get("/health")
    async def health(request: Request) -> dict[str, int]:
        stats = request.app.state.pool.stats()
        return {"idle": stats.idle, "leased": stats.leased, "waiting": stats.waiting}

    return app


async def main(url: str) -> None:
    app = create_app(url)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        answers = await asyncio.gather(*(client.get(f"/square/{number}") for number in range(50)))
        assert [answer.json()["square"] for answer in answers] == [number * number for number in range(50)]
        answers = await asyncio.gather(*(client.get(f"/double/{number}") for number in range(50)))
        assert [answer.json()["double"] for answer in answers] == [2 * number for number in range(50)]
        print("100 requests answered;", (await client.get("/health")).json())


if __name__ == "__main__":
    with server_at_hand() as server_url:
        asyncio.run(main(server_url))
