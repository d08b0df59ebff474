"""One-shot statements without a pause, and what became of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpool import Pool

# Its answer tells whether it is this statement's, and by which session.
STATEMENT = "select %s::int, pg_backend_pid()"


@dataclass
class Flow:
    """Statements that go on from a number of tasks; the sessions that answered, in the order of their first answer."""

    answered: int = 0
    by_session: Counter[int] = field(default_factory=Counter)
    stopping: bool = False

    @property
    def sessions(self) -> list[int]:
        return list(self.by_session)

    async def more(self, count: int) -> None:
        """Wait until so many more were answered."""
        wanted = self.answered + count
        await eventually(lambda: self.answered >= wanted, timeout=30)

    async def another_session(self) -> None:
        """Wait until one answers that has not answered before."""
        known = len(self.by_session)
        await eventually(lambda: len(self.by_session) > known, timeout=30)


@asynccontextmanager
async def flowing(pool: Pool[Any], tasks: int) -> AsyncIterator[Flow]:
    """That many tasks send statements while the block lasts. An error, or a wrong answer, fails the test."""
    flow = Flow()

    async def send(task: int) -> None:
        number = task
        while not flow.stopping:
            number += tasks
            row = await pool.fetchrow(STATEMENT, [number])
            assert row is not None
            assert row[0] == number
            flow.answered += 1
            flow.by_session[row[1]] += 1

    async with asyncio.TaskGroup() as group:
        for task in range(tasks):
            group.create_task(send(task))
        try:
            yield flow
        finally:
            flow.stopping = True
