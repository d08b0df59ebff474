"""A cancelled statement ends on the server, and its connection goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asyncpool import Pool

from .interruptions import OPERATIONS, WAYS, Operation, Way

if TYPE_CHECKING:
    from kit.servers import Admin

# Seconds. So long that nothing here is severed because the machine is slow.
PATIENCE = 25.0

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


def is_asleep(admin: Admin, application_name: str) -> bool:
    asleep = "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'"
    return bool(admin.value(asleep, [application_name]))


@each_way
@each_operation
async def test_a_cancelled_statement_ends_and_its_connection_goes_on(
    dsn: str, admin: Admin, application_name: str, way: Way, operation: Operation
) -> None:
    async with Pool(dsn, max_size=1, cancel_timeout=PATIENCE, check_timeout=PATIENCE) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid

        async def work() -> None:
            async with pool.acquire() as conn:
                await operation(conn)

        await way(work, lambda: is_asleep(admin, application_name))
        assert pool.stats().leased == 0
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pid
            cursor = await conn.execute("select 'fine'")
            assert await cursor.fetchall() == [("fine",)]
        assert pool.stats().closes == {}
