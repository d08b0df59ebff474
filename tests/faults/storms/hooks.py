"""Callables for a pool in a storm: slow now and then, and failing now and then."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import TYPE_CHECKING, Any

from .actions import HookFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

    from .plan import Plan
    from .record import Record

OFTEN = 0.05


class Hooks:
    """Those that a plan asks for. `harmless` until the pool is open, and again when the storm is over."""

    def __init__(self, plan: Plan, record: Record) -> None:
        self._plan = plan
        self._record = record
        self._rng = Random(f"{plan.seed}/hooks")
        self.harmless = True

    def options(self) -> dict[str, Any]:
        """As the pool's keywords."""
        return {name: self._make(name) for name in sorted(self._plan.hooks)}

    def _make(self, name: str) -> Callable[[Any], object]:
        if self._plan.threads:
            return self._blocking(name)

        async def hook(conn: psycopg.AsyncConnection[Any]) -> None:
            self._record.operations[name] += 1
            fate = 1.0 if self.harmless else self._rng.random()
            if fate < OFTEN:
                raise HookFailed(name)
            if fate < 2 * OFTEN:
                await asyncio.sleep(self._rng.uniform(0, 0.01))
            await conn.execute("select 1")
            if fate < 3 * OFTEN:
                raise HookFailed(f"{name}, in a transaction")
            if fate < 4 * OFTEN:
                await conn.execute("select pg_sleep(0.005)")
            await conn.rollback()

        return hook

    def _blocking(self, name: str) -> Callable[[Any], object]:
        def hook(conn: psycopg.Connection[Any]) -> None:
            fate = 1.0 if self.harmless else self._rng.random()
            if fate < OFTEN:
                raise HookFailed(name)
            if fate < 2 * OFTEN:
                time.sleep(self._rng.uniform(0, 0.01))
            conn.execute("select 1")
            if fate < 3 * OFTEN:
                raise HookFailed(f"{name}, in a transaction")
            conn.rollback()

        return hook
