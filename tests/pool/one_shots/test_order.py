"""The statements of one task are executed in the order in which it sent them; between tasks nothing is promised."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin

# On one connection: where a pool may open others, a lane that has stalled hands on what it has not sent.
ONE: dict[str, Any] = {"max_size": 1, "lanes": 1}


@pytest.fixture
def journal(admin: Admin, table: str) -> Iterator[str]:
    """The name of a table whose rows are numbered in the order of their arrival: `arrival bigserial, id int`."""
    admin.execute(f"create table {table}_journal (arrival bigserial, id int)")
    yield f"{table}_journal"
    admin.execute(f"drop table {table}_journal")


def arrived(admin: Admin, journal: str) -> list[int]:
    return [number for (number,) in admin.execute(f"select id from {journal} order by arrival")]


@on_both_loops
async def test_what_a_task_awaits_one_by_one_happens_one_by_one(
    dsn: str, admin: Admin, table: str, way: dict[str, Any]
) -> None:
    """Each sees what the one before it has done, on whichever connection it goes."""
    async with Pool(dsn, max_size=3, **way) as pool:

        async def count(key: int) -> None:
            await pool.execute(f"insert into {table} values (%s)".encode(), [key])
            for number in range(key, key + 30):
                update = f"update {table} set id = %s where id = %s".encode()
                assert await pool.execute(update, [number + 1, number]) == "UPDATE 1"
                select = f"select id from {table} where id between %s and %s".encode()
                assert await pool.fetchval(select, [key, key + 100]) == number + 1

        await asyncio.gather(*(count(task * 1000) for task in range(10)))


@on_both_loops
@pytest.mark.usefixtures("nothing_is_slow")
async def test_what_a_task_gathers_on_one_lane_happens_in_that_order(dsn: str, admin: Admin, journal: str) -> None:
    insert = f"insert into {journal} (id) values (%s)".encode()
    async with Pool(dsn, **ONE) as pool:
        for turn in range(3):
            numbers = range(turn * 1000, turn * 1000 + 1000)
            await asyncio.gather(*(pool.execute(insert, [number]) for number in numbers))
    assert arrived(admin, journal) == list(range(3000))


@on_both_loops
@pytest.mark.usefixtures("nothing_is_slow")
async def test_the_order_holds_for_texts_known_and_unknown_good_and_bad_great_and_small(
    dsn: str, admin: Admin, journal: str
) -> None:
    """What is unknown is sent alone, what is great goes in pieces, what fails leaves a gap: nobody overtakes."""

    async def send(number: int) -> None:
        match number % 7:
            case 0:  # a text that was never seen
                await pool.execute(f"insert into {journal} (id) values (%s) -- {number}".encode(), [number])
            case 1:  # the server refuses it
                with pytest.raises(psycopg.errors.DivisionByZero):
                    await pool.execute(f"insert into {journal} (id) values (1 / %s)".encode(), [0])
            case 2:  # psycopg refuses it
                with pytest.raises(psycopg.ProgrammingError):
                    await pool.execute(f"insert into {journal} (id) values (%s)".encode(), [object()])
            case 3:  # more than fits into one packet, or into a socket's buffer
                size = 1_000_000 if number % 2 else 10_000
                insert = f"insert into {journal} (id) select %s where length(%s::text) = %s"
                await pool.execute(insert.encode(), [number, "x" * size, size])
            case _:
                await pool.execute(f"insert into {journal} (id) values (%s)".encode(), [number])

    async with Pool(dsn, **ONE) as pool:
        await asyncio.gather(*map(send, range(280)))
    assert arrived(admin, journal) == [number for number in range(280) if number % 7 not in (1, 2)]


@on_both_loops
@pytest.mark.usefixtures("nothing_is_slow")
async def test_the_order_holds_for_those_that_had_to_wait_for_a_connection(
    dsn: str, admin: Admin, journal: str
) -> None:
    insert = f"insert into {journal} (id) values (%s)".encode()
    async with Pool(dsn, **ONE) as pool:
        async with pool.acquire():
            tasks = [asyncio.create_task(pool.execute(insert, [number])) for number in range(300)]
            await eventually(lambda: pool.stats().waiting > 0)
            for number in (0, 7, 100, 299):
                tasks[number].cancel()
            await asyncio.sleep(0)
            # Statements that are made while others wait come after them.
            tasks += [asyncio.create_task(pool.execute(insert, [number])) for number in range(300, 400)]
        await asyncio.gather(*tasks, return_exceptions=True)
    assert arrived(admin, journal) == [number for number in range(400) if number not in (0, 7, 100, 299)]


@pytest.mark.usefixtures("nothing_is_slow")
async def test_the_order_holds_when_leases_take_the_connection_now_and_then(
    dsn: str, admin: Admin, journal: str
) -> None:
    """A lane gives its connection back to who waits for it, and what is unsent goes on later, in its order."""
    insert = f"insert into {journal} (id) values (%s)".encode()
    sent = 0

    async def lease() -> None:
        async with pool.acquire() as conn:
            await conn.execute("select 1")

    async with Pool(dsn, **ONE) as pool:
        tasks: list[asyncio.Task[Any]] = []
        for turn in range(40):
            tasks += [asyncio.create_task(pool.execute(insert, [number])) for number in range(sent, sent + 20)]
            sent += 20
            tasks.append(asyncio.create_task(lease()))
            for _ in range(turn % 4):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
    assert arrived(admin, journal) == list(range(sent))
