"""What the demo carries: devices that send payloads, one after the other, until each is stored."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator

# A payload that could not be stored for so long ends the round: the server is not coming back.
GIVE_UP_AFTER = 30.0

# Between the tries of a payload, doubling, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5


@dataclass(frozen=True, slots=True)
class Payload:
    """One reading. Device and number identify it, so that it can be sent again without being stored twice."""

    device: int
    number: int

    def body(self) -> str:
        """The reading itself, as JSON."""
        temperature = 20 + 5 * math.sin(self.device + self.number / 10)
        return json.dumps({"temperature": round(temperature, 2), "battery": 100 - self.number % 100})


@dataclass(slots=True)
class Tally:
    """What happened so far in a round. `latencies`: seconds from a payload's first try to its storing."""

    expected: int
    refused: int = 0
    sent_again: int = 0
    latencies: list[float] = field(default_factory=list)
    half_way: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def acknowledged(self) -> int:
        """How many payloads were stored, as far as their senders were told."""
        return len(self.latencies)

    def acknowledge(self, latency: float) -> None:
        """A payload was stored, so long after its first try."""
        self.latencies.append(latency)
        if self.acknowledged * 2 >= self.expected:
            self.half_way.set()


class Refused(Exception):
    """The server did not let us in: nothing was sent."""


class Store(Protocol):
    """Stores a payload: returns when that is committed. Raises Refused, or psycopg's error if it is lost."""

    async def __call__(self, payload: Payload) -> None: ...


@dataclass(frozen=True, slots=True)
class Workload:
    """So many payloads, spread evenly over so many devices."""

    devices: int
    payloads: int

    def of_device(self, device: int) -> Iterator[Payload]:
        """What a device sends, in order."""
        for number in range(device, self.payloads, self.devices):
            yield Payload(device, number)

    async def run(self, store: Store, tally: Tally) -> None:
        """Let all devices send at once, each payload until it is stored. Raises what the first gave up on."""
        try:
            async with asyncio.TaskGroup() as group:
                for device in range(min(self.devices, self.payloads)):
                    group.create_task(self._send_all(device, store, tally), name=f"device {device}")
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _send_all(self, device: int, store: Store, tally: Tally) -> None:
        for payload in self.of_device(device):
            begun = time.perf_counter()
            await self._send(payload, store, tally)
            tally.acknowledge(time.perf_counter() - begun)

    async def _send(self, payload: Payload, store: Store, tally: Tally) -> None:
        deadline = time.monotonic() + GIVE_UP_AFTER
        pause = FIRST_PAUSE
        while True:
            try:
                await store(payload)
                return
            except Refused:
                tally.refused += 1
                if time.monotonic() > deadline:
                    raise
            except (psycopg.OperationalError, psycopg.InterfaceError):
                # Perhaps it was stored and only the answer was lost: sending it again does no harm.
                tally.sent_again += 1
                if time.monotonic() > deadline:
                    raise
            # Where everybody is turned away, everybody hammering the door lets nobody in.
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
