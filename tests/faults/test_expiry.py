"""A hundred connections of one age: what becomes of them at the end of their `max_lifetime`, in virtual time.

How long acquires take meanwhile on a real server is measured by `benchmarks/expiry.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from kit.invariants import CLOSING, CONNECTING, IDLE, usable
from kit.scripted_server import ScriptedServer
from kit.virtual_pool import VirtualPool, opened_pool
from kit.virtual_time import VirtualLoop, run_virtually

from asyncpool import Pool
from asyncpool._core.policy import RETIREMENT_SPREAD
from asyncpool.events import CloseReason

if TYPE_CHECKING:
    from asyncpool._core.queue import Waiter
    from asyncpool.options import CommonOptions

SIZE = 100
LIFETIME = 3600.0
BEGIN = (1 - RETIREMENT_SPREAD) * LIFETIME
CONNECT_TAKES = 0.25  # seconds, and a close as long


@dataclass
class Turnover:
    """A generation, from its birth until the last of it is gone; what happened, and when."""

    pool: VirtualPool
    busy: int = 0  # connections that are always leased; one after the other is given back and taken anew
    retired_at: list[float] = field(default_factory=list)
    fewest: int = SIZE
    most_at_once: int = 0
    holders: list[Waiter] = field(default_factory=list)

    def run(self) -> None:
        pool = self.pool
        born = pool.now
        first = set(pool.slots(IDLE))
        pool.advance(BEGIN - 1)
        self.holders = [pool.acquire() for _ in range(self.busy)]
        while first & set(pool.machine.slots()):
            assert pool.now - born <= LIFETIME + 60
            self.step(CONNECT_TAKES)
        self.retired_at = [at - born for at in self.retired_at]

    def step(self, seconds: float) -> None:
        """Time passes; what was under way before ends."""
        pool = self.pool
        under_way = dict(pool.work)
        closed = pool.closes[CloseReason.MAX_LIFETIME]
        pool.advance(seconds)
        for slot, state in under_way.items():
            if pool.work.get(slot) is state:
                pool.tell(slot, state, well=True)
        if self.holders:
            pool.release(self.holders.pop(0))
            self.holders.append(pool.acquire())
        self.retired_at += [pool.now] * (pool.closes[CloseReason.MAX_LIFETIME] - closed)
        self.fewest = min(self.fewest, usable(pool))
        self.most_at_once = max(self.most_at_once, pool.count(CLOSING), pool.count(CONNECTING))


def turnover(max_size: int, seed: int, busy: int = 0) -> Turnover:
    pool = opened_pool(
        Random(seed).random,
        min_size=SIZE,
        max_size=max_size,
        max_lifetime=LIFETIME,
        max_idle=None,
        check_interval=None,
        max_connecting=4,
    )
    assert len({pool.histories[slot].born for slot in pool.slots(IDLE)}) == 1
    result = Turnover(pool, busy)
    result.run()
    return result


@pytest.mark.parametrize("busy", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_place_to_spare_the_pool_never_falls_under_min_size(seed: int, busy: int) -> None:
    """And never more than one connection is replaced at a time."""
    result = turnover(SIZE + 1, seed, busy)
    assert result.fewest == SIZE
    assert result.most_at_once == 1
    assert len(result.retired_at) == SIZE


@pytest.mark.parametrize("seed", range(3))
def test_nor_does_it_when_leases_last_from_the_time_of_retirement_past_max_lifetime(seed: int) -> None:
    """Their replacements are there when they come back; with leases of 15 s that can be true of a few at a time."""
    result = turnover(SIZE + 4, seed, busy=60)
    assert result.fewest == SIZE
    assert len(result.retired_at) == SIZE


@pytest.mark.parametrize("busy", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_place_to_spare_one_at_a_time_is_missing(seed: int, busy: int) -> None:
    """`max_size` is what the server may count: the old one has to go first."""
    result = turnover(SIZE, seed, busy)
    assert result.fewest == SIZE - 1
    assert result.most_at_once == 1
    assert len(result.retired_at) == SIZE


@pytest.mark.parametrize("max_size", [SIZE, SIZE + 1])
@pytest.mark.parametrize("seed", range(3))
def test_the_retirements_are_spaced_over_the_last_tenth_of_the_life(seed: int, max_size: int) -> None:
    times = turnover(max_size, seed).retired_at
    assert times == sorted(times)
    assert times[0] >= BEGIN
    assert times[-1] <= LIFETIME
    assert times[-1] - times[0] >= 0.9 * (LIFETIME - BEGIN)
    # One is gone, and its successor there, before the next one goes.
    assert min(following - time for time, following in pairwise(times)) >= 2 * CONNECT_TAKES - 0.001
    # In no tenth of that time goes much more than a tenth of them.
    tenth = (LIFETIME - BEGIN) / 10
    assert max(sum(time <= at < time + tenth for at in times) for time in times) <= 25


def test_users_notice_nothing_of_it() -> None:
    """The whole pool, its sessions scripted, each connect taking its time: nobody waits, nobody is failed."""

    async def main(loop: VirtualLoop) -> None:
        options: CommonOptions = {
            "min_size": SIZE,
            "max_size": SIZE + 1,
            "max_lifetime": 100.0,
            "check_interval": None,
        }
        async with ScriptedServer() as server, Pool(server.dsn, **options) as pool:
            until = loop.time() + 105.0
            waits: list[float] = []
            sizes: set[int] = set()

            async def user(number: int) -> None:
                random = Random(number)
                while loop.time() < until:
                    began = loop.time()
                    async with pool.acquire():
                        waits.append(loop.time() - began)
                        await asyncio.sleep(random.uniform(0.1, 1.0))
                    sizes.add(sum(usable_states(pool)))
                    await asyncio.sleep(random.uniform(0.1, 1.0))

            await asyncio.gather(*(user(number) for number in range(SIZE // 2)))
            stats = pool.stats()
            assert stats.closes[CloseReason.MAX_LIFETIME] == SIZE
            assert stats.connects == 2 * SIZE
            assert server.most_sessions <= SIZE + 1
            assert min(sizes) == SIZE
            assert max(waits) <= 0.001

    run_virtually(main)


def usable_states(pool: Pool[Any]) -> tuple[int, int, int, int]:
    stats = pool.stats()
    return stats.idle, stats.leased, stats.checking, stats.recycling
