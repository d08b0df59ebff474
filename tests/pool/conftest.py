"""What the tests of a pool share besides servers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from kit.servers import Admin


@pytest.fixture(autouse=True)
def no_bug_reported(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Errors in the log are bugs of the pool, or exceptions in its callbacks and tasks that nobody else sees."""
    yield
    loggers = ("asyncpool", "asyncio")
    errors = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR and r.name in loggers]
    assert errors == []


@pytest.fixture
def table(admin: Admin, application_name: str) -> Iterator[str]:
    """The name of an empty table with one column, `id integer`, unique when the transaction ends."""
    name = application_name.replace("-", "_")
    admin.execute(f"drop table if exists {name}")
    admin.execute(f"create table {name} (id integer unique deferrable initially deferred)")
    yield name
    admin.execute(f"drop table {name}")


@pytest.fixture
async def plain(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of psycopg's own, of no pool."""
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        yield conn
