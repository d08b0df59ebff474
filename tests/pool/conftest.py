"""What the tests of a pool share besides servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(autouse=True)
def in_every_test(no_bug_reported: None) -> None:
    """Errors in the log fail the test."""


@pytest.fixture
async def plain(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of psycopg's own, of no pool."""
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        yield conn
