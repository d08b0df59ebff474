"""A thousand tasks on four connections: served in the order in which they came, none waiting longer than its peers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest
from kit.scripted_server import ScriptedServer
from kit.virtual_time import VirtualLoop, run_virtually

from asyncpool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

TASKS = 1000
CONNECTIONS = 4
NEIGHBOURS = 10  # before and behind, each


@dataclass
class Crowd:
    """Tasks that acquire, hold for 1 to 20 ms, and give back."""

    pool: Pool[Any]
    clock: Callable[[], float]
    random: Random
    arrived: list[int] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # in the order of arrival
    leased: int = 0

    async def use(self) -> None:
        number = len(self.arrived)
        self.arrived.append(number)
        self.waits.append(0.0)
        began = self.clock()
        async with self.pool.acquire(None):
            self.served.append(number)
            self.waits[number] = self.clock() - began
            self.leased += 1
            assert self.leased <= CONNECTIONS
            await asyncio.sleep(self.random.uniform(0.001, 0.020))
            self.leased -= 1

    async def come_at_once(self) -> None:
        await asyncio.gather(*(self.use() for _ in range(TASKS)))

    async def come_again_and_again(self, times: int) -> None:
        async def come() -> None:
            for _ in range(times):
                await self.use()

        await asyncio.gather(*(come() for _ in range(TASKS)))

    def longest_beside_its_neighbours(self) -> float:
        """The longest wait, as a multiple of the mean of those who came just before and just after."""
        longest = max(range(len(self.waits)), key=self.waits.__getitem__)
        around = range(max(0, longest - NEIGHBOURS), min(len(self.waits), longest + NEIGHBOURS + 1))
        return self.waits[longest] / fmean(self.waits[other] for other in around if other != longest)

    def worst_beside_its_neighbours(self, first: int) -> float:
        """The same for all from `first` on, and the worst of them."""
        return max(
            self.waits[number]
            / fmean(self.waits[number - NEIGHBOURS : number] + self.waits[number + 1 : number + 1 + NEIGHBOURS])
            for number in range(first, len(self.waits) - NEIGHBOURS)
        )


def in_virtual_time(play: Callable[[Crowd], Any], seed: int) -> Crowd:
    crowds: list[Crowd] = []

    async def main(loop: VirtualLoop) -> None:
        server = ScriptedServer()
        async with server, Pool(server.dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
            crowds.append(Crowd(pool, loop.time, Random(seed)))
            await play(crowds[0])
            assert pool.stats().connects == CONNECTIONS
            assert (pool.stats().idle, pool.stats().waiting) == (CONNECTIONS, 0)

    run_virtually(main)
    return crowds[0]


@pytest.mark.parametrize("seed", range(3))
def test_those_who_come_together_are_served_in_their_order(seed: int) -> None:
    crowd = in_virtual_time(Crowd.come_at_once, seed)
    assert crowd.served == crowd.arrived == list(range(TASKS))
    assert crowd.waits == sorted(crowd.waits)
    assert crowd.longest_beside_its_neighbours() <= 1.2
    # The mean lease is 10.5 ms: no time is lost between two of them.
    assert crowd.waits[-1] == pytest.approx(TASKS / CONNECTIONS * 0.0105, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_those_who_come_again_stand_at_the_end_of_the_queue(seed: int) -> None:
    """The queue is always 996 long; whoever was served goes behind all others."""
    crowd = in_virtual_time(lambda crowd: crowd.come_again_and_again(4), seed)
    assert crowd.served == crowd.arrived == list(range(4 * TASKS))
    assert crowd.longest_beside_its_neighbours() <= 1.2
    assert crowd.worst_beside_its_neighbours(first=100) <= 1.2


async def test_on_a_real_server_the_order_and_the_waits_are_the_same(dsn: str) -> None:
    async with Pool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
        crowd = Crowd(pool, time.monotonic, Random(0))
        await crowd.come_at_once()
        assert crowd.served == crowd.arrived == list(range(TASKS))
        assert crowd.longest_beside_its_neighbours() <= 1.2
