"""What happens to a pool, and to its server, while a storm goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from asyncpool import Pool
    from asyncpool.cli.embedded import StopMode

    from .grounds import Grounds
    from .plan import Plan

Disturbance: TypeAlias = Callable[["Pool", "Plan", "Grounds", Random], Awaitable[None]]


async def resize(pool: Pool, plan: Plan, _: Grounds, rng: Random) -> None:
    most = rng.randint(1, plan.max_size)
    pool.resize(rng.randint(0, most), most)


async def drain(pool: Pool, _: Plan, __: Grounds, ___: Random) -> None:
    pool.drain()


async def check(pool: Pool, _: Plan, __: Grounds, ___: Random) -> None:
    if (checked := pool.check()) is not None:  # that of a SyncPool has waited already
        await checked


async def terminate(_: Pool, __: Plan, grounds: Grounds, rng: Random) -> None:
    pids = grounds.admin.pids(grounds.application_name)
    for pid in rng.sample(pids, min(len(pids), rng.choice((1, 1, 2, 10)))):
        grounds.admin.execute("select pg_terminate_backend(%s)", [pid])


async def restart(_: Pool, __: Plan, grounds: Grounds, rng: Random) -> None:
    assert grounds.embedded is not None
    modes: tuple[StopMode, ...] = ("fast", "immediate", "kill")
    await asyncio.to_thread(grounds.embedded.restart, rng.choice(modes))


# How long it is quiet in between, in seconds, on average.
DISTURBANCES: dict[str, tuple[Disturbance, float]] = {
    "resize": (resize, 0.03),
    "drain": (drain, 0.2),
    "check": (check, 0.05),
    "terminate": (terminate, 0.1),
    "restart": (restart, 0.8),
}


async def disturb(name: str, pool: Pool, plan: Plan, grounds: Grounds, over: asyncio.Event) -> None:
    """Do it again and again until the storm is over."""
    disturbance, interval = DISTURBANCES[name]
    rng = Random(f"{plan.seed}/{name}")
    while True:
        try:
            await asyncio.wait_for(over.wait(), rng.uniform(0.2, 1.8) * interval)
        except TimeoutError:
            await disturbance(pool, plan, grounds, rng)
        else:
            return
