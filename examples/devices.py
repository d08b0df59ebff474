"""300 devices store their readings through 8 connections, and one of them sends nonsense.

Every device is a task that waits in the pool's queue for its turn. The reading that the server refuses rolls
back its own block, and nobody else's.
"""

import asyncio

import psycopg
from psycopg import AsyncConnection

from asyncpool import Pool
from asyncpool.cli.embedded import server_at_hand

DEVICES = 300
READINGS_EACH = 10
BROKEN_DEVICE = 13


async def run_device(pool: Pool[AsyncConnection], device: int) -> int:
    """Store what the device reads. Returns how many readings the server took."""
    stored = 0
    for number in range(READINGS_EACH):
        celsius = 1000 if device == BROKEN_DEVICE and number % 2 else 20 + number / 10
        try:
            async with pool.acquire() as conn:
                await conn.execute("insert into example_readings (device, celsius) values (%s, %s)", (device, celsius))
            stored += 1
        except psycopg.errors.CheckViolation:
            print(f"device {device}: {celsius} °C is no reading")
    return stored


async def main(url: str) -> None:
    async with Pool(url, min_size=1, max_size=8, application_name="devices example") as pool:
        async with pool.acquire() as conn:
            await conn.execute("drop table if exists example_readings")
            await conn.execute(
                "create table example_readings"
                " (device int, celsius float check (celsius < 200), at timestamptz default now())"
            )
        try:
            stored = await asyncio.gather(*(run_device(pool, device) for device in range(DEVICES)))
            async with pool.acquire() as conn:
                cursor = await conn.execute("select count(*) from example_readings")
                (rows,) = await cursor.fetchone() or (0,)
            stats = pool.stats()
            print(f"{sum(stored)} readings acknowledged, {rows} rows, {stats.connects} connections opened")
            assert rows == sum(stored) == DEVICES * READINGS_EACH - READINGS_EACH // 2
            assert stats.connects <= 8
        finally:
            async with pool.acquire() as conn:
                await conn.execute("drop table example_readings")


with server_at_hand() as url:
    asyncio.run(main(url))
