"""300 devices store their readings through 8 connections at most, and one of them sends nonsense.

Every device is a task, and every reading a one-shot statement, a transaction of its own. The reading that the server
refuses is an error to its device, and to nobody else.
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
            await pool.execute("insert into example_readings (device, celsius) values (%s, %s)", (device, celsius))
            stored += 1
        except psycopg.errors.CheckViolation:
            print(f"device {device}: {celsius} °C is no reading")
    return stored


async def main(url: str) -> None:
    async with Pool(url, min_size=1, max_size=8, application_name="devices example") as pool:
        await pool.execute("drop table if exists example_readings")
        await pool.execute(
            "create table example_readings"
            " (device int, celsius float check (celsius < 200), at timestamptz default now())"
        )
        try:
            stored = await asyncio.gather(*(run_device(pool, device) for device in range(DEVICES)))
            rows = await pool.fetchval("select count(*) from example_readings")
            stats = pool.stats()
            print(f"{sum(stored)} readings acknowledged, {rows} rows, {stats.connects} connections opened")
            assert rows == sum(stored) == DEVICES * READINGS_EACH - READINGS_EACH // 2
            assert stats.connects <= 8
        finally:
            await pool.execute("drop table example_readings")


with server_at_hand() as url:
    asyncio.run(main(url))
