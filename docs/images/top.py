"""Draws top.svg, the README's picture of `asyncpool top`: the view of a real pool under load, on a PostgreSQL that this
starts.

    pip install '.[demo]' && python docs/images/top.py
"""

from __future__ import annotations

import asyncio
import io
import random
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from asyncpool import Pool, PoolTimeout
from asyncpool.cli.embedded import EmbeddedServer
from asyncpool.cli.top.feed import Feed, Look
from asyncpool.cli.top.view import PoolView

PICTURE = Path(__file__).with_suffix(".svg")
SECONDS = 8
FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


async def place_orders(pool: Pool) -> None:
    while True:
        try:
            async with pool.acquire(timeout=0.025) as conn:
                await conn.execute("select pg_sleep(%s)", (random.expovariate(200),))
                await conn.execute("select 1")
        except PoolTimeout:
            await asyncio.sleep(0.1)
        await asyncio.sleep(random.expovariate(200))


async def store_readings(pool: Pool) -> None:
    while True:
        await pool.execute("select 1")
        await asyncio.sleep(0.02)


async def nightly_report(pool: Pool) -> None:
    async with pool.transaction() as conn:
        await conn.execute("select 1")
        await asyncio.sleep(3600)  # the mistake that the picture shows


async def work(conninfo: str, path: str) -> Look:
    async with Pool(conninfo, name="shop", min_size=2, max_size=8, monitor=path) as pool:
        workers = [
            asyncio.create_task(nightly_report(pool), name="nightly report"),
            *(asyncio.create_task(place_orders(pool), name=f"order {number}") for number in range(24)),
            *(asyncio.create_task(store_readings(pool), name=f"reading {number}") for number in range(10)),
        ]
        look = await asyncio.to_thread(watch, path)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return look


def watch(path: str) -> Look:
    """For some seconds, as `asyncpool top` does."""
    with Feed(path) as feed:
        look = Look(feed.first())
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            if (snapshot := feed.receive()) is not None:
                look = look.then(snapshot)
            time.sleep(0.01)
    return look


def draw(look: Look) -> str:
    console = Console(record=True, width=80, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(PoolView(look))
    picture = console.export_svg(title="asyncpool top /run/shop/pool.sock", theme=MONOKAI, unique_id="top")
    # A picture on a page loads no fonts: those that are there.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    picture = re.sub(r"font-family: [^;]*;", f"font-family: {FONTS};", picture)
    # The ends of lines are drawn too, and some programs strip blanks at the beginning of a text.
    picture = re.sub(r"<text [^>]*>\n</text>", "", picture)
    return picture.replace("<text ", '<text xml:space="preserve" ')


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="top-") as directory, EmbeddedServer() as server:
        look = asyncio.run(work(server.dsn(), f"{directory}/pool.sock"))
    PICTURE.write_text(draw(look) + "\n", encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
