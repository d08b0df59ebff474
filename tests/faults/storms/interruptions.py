"""The ways in which a task of a storm is stopped: each runs `work`, stops it after a while if it still runs, and says
whether it has. A task that was stopped must end so, and in no other way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

if TYPE_CHECKING:
    from random import Random

    from .record import Record

Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class Sibling(Exception):
    """What fails beside the work in a task group."""


@dataclass(frozen=True)
class Delay:
    """Turns of the event loop, then seconds: the former hits each step of a hand-over, the latter a server's work."""

    turns: int
    seconds: float

    async def __call__(self) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if self.seconds:
            await asyncio.sleep(self.seconds)


def draw_delay(rng: Random) -> Delay:
    if rng.random() < 0.4:
        return Delay(int(rng.expovariate(1 / 10)), 0.0)
    return Delay(rng.randrange(3), rng.expovariate(1 / rng.choice((0.002, 0.01, 0.05))))


async def undisturbed(work: Work, _: Delay, __: Record) -> bool:
    await work()
    return False


async def task_cancel(work: Work, delay: Delay, record: Record) -> bool:
    return await _cancel(work, delay, record, again=0)


async def task_cancel_again_and_again(work: Work, delay: Delay, record: Record) -> bool:
    return await _cancel(work, delay, record, again=20)


async def _cancel(work: Work, delay: Delay, record: Record, again: int) -> bool:
    task = asyncio.create_task(work(), name="storm: to be cancelled")
    record.cancellable.add(task)
    await delay()
    stopped = task.cancel()
    for _ in range(again):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait((task,))
    record.cancellable.discard(task)
    if task in record.struck:
        record.struck.discard(task)
        stopped = True
    if stopped:
        record.expect(task.cancelled(), "a cancelled task went on to its end")
    elif not task.cancelled():
        task.result()
    return stopped


async def asyncio_timeout(work: Work, delay: Delay, record: Record) -> bool:
    timeout = asyncio.timeout(delay.seconds)
    try:
        async with timeout:
            await work()
    except TimeoutError:
        return True
    record.expect(not timeout.expired(), "asyncio.timeout() expired, and raised nothing")
    return False


async def asyncio_wait_for(work: Work, delay: Delay, _: Record) -> bool:
    try:
        await asyncio.wait_for(work(), delay.seconds)
    except TimeoutError:
        return True
    return False


async def failing_task_group(work: Work, delay: Delay, record: Record) -> bool:
    async def sibling() -> None:
        await delay()
        if not task.done():
            raise Sibling

    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work(), name="storm: in a task group")
            group.create_task(sibling(), name="storm: its sibling")
    except BaseExceptionGroup as errors:
        record.expect(not errors.split(Sibling)[1], f"a cancelled task ended with {errors!r}")
        return True
    return False


async def anyio_deadline(work: Work, delay: Delay, _: Record) -> bool:
    with anyio.move_on_after(delay.seconds) as scope:
        await work()
    return scope.cancelled_caught


async def anyio_scope(work: Work, delay: Delay, _: Record) -> bool:
    scope = anyio.CancelScope()

    async def stop() -> None:
        await delay()
        scope.cancel()

    stopping = asyncio.create_task(stop(), name="storm: cancels a scope")
    with scope:
        await work()
    stopping.cancel()
    await asyncio.wait((stopping,))
    return scope.cancelled_caught


async def anyio_task_group(work: Work, delay: Delay, _: Record) -> bool:
    ended: list[bool] = []

    async def run() -> None:
        await work()
        ended.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await delay()
        group.cancel_scope.cancel()
    return not ended


async def anyio_scope_and_task_cancel(work: Work, delay: Delay, record: Record) -> bool:
    """Both at once, of which one must not hide the other."""

    async def scoped() -> None:
        with anyio.move_on_after(delay.seconds):
            await work()

    await _cancel_quietly(scoped, delay)
    return True


async def _cancel_quietly(work: Work, delay: Delay) -> None:
    task = asyncio.create_task(work(), name="storm: scoped and to be cancelled")
    await delay()
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()


Way: TypeAlias = Callable[[Work, Delay, "Record"], Awaitable[bool]]

WAYS: list[Way] = [
    task_cancel,
    task_cancel_again_and_again,
    asyncio_timeout,
    asyncio_wait_for,
    failing_task_group,
    anyio_deadline,
    anyio_scope,
    anyio_task_group,
    anyio_scope_and_task_cancel,
]
