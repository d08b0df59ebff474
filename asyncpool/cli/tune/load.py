"""Closed-loop load on a pool: so many tasks, each of which does its statement again as soon as it is done."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg.generators import execute

from asyncpool.cli.tune.knee import Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from psycopg import AsyncConnection

    from asyncpool import Pool
    from asyncpool.cli.tune.statement import Statement

    Once = Callable[["Worker"], Awaitable[None]]

# How long statements that are under way when a pass is over may take to end, in seconds, before they are cancelled.
GRACE = 2.0


@dataclass(slots=True)
class Pass:
    """What ended while it was measured. Times are in seconds; `waited` is all waiting for connections together.

    `is_steady`: every task had its first answer before. Those are quicker than later ones, as the line in front of them
    was only forming, so that latencies of a pass that is not steady say nothing; its rate does.
    """

    is_steady: bool = False
    seconds: float = 0.0
    processor_seconds: float = 0.0
    processor_waited: float = 0.0
    waited: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    connections: int = 0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


@dataclass(slots=True)
class Worker:
    """One task of the load. `sent`: it has its connection, so that what it does should be let end."""

    record: Callable[[float, float], None]
    sent: bool = False
    waited: float = 0.0
    last: bool = False
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self, once: Once) -> None:
        """Until it is told that this one is the last, or cancelled."""
        while not self.last:
            begun = time.perf_counter()
            await once(self)
            self.sent = False
            self.answered.set()
            self.record(time.perf_counter() - begun, self.waited)


def on_a_lease(pool: Pool, statement: Statement) -> Once:
    """A statement in a transaction, on a connection of its own."""
    query, params, commit = statement.encoded, statement.params, statement.commit

    async def once(worker: Worker) -> None:
        begun = time.perf_counter()
        conn = await pool.acquire(timeout=None)
        worker.waited = time.perf_counter() - begun
        worker.sent = True
        try:
            cursor = await conn.execute(query, params)
            if cursor.description:
                await cursor.fetchall()
            if commit:
                await conn.commit()
            else:
                await _roll_back(conn)
        finally:
            pool.release(conn)

    return once


async def _roll_back(conn: AsyncConnection[Any]) -> None:
    """As the pool does it, and not psycopg's rollback(): that drops what is prepared, and each statement would be
    planned anew, as none is where transactions are committed.
    """
    conn.pgconn.send_query(b"ROLLBACK")
    await conn.wait(execute(conn.pgconn))


def as_one_shot(pool: Pool, statement: Statement) -> Once:
    """The same as a one-shot statement; how long it waits for its turn on a lane is not to be seen from here."""
    query, params = statement.encoded, statement.params

    async def once(worker: Worker) -> None:
        worker.sent = True
        await pool.fetch(query, params)

    return once


async def measure(once: Once, tasks: int, warm_up: float, seconds: float, *, patience: float = 0.0) -> Pass:
    """Put the load on, let it run in, and count for so many seconds. For each task to have its first answer is waited
    for `patience` seconds more than the warm-up, at most. Raises what a statement raises.
    """
    measured = Pass()

    def record(latency: float, waited: float) -> None:
        if counting:
            measured.latencies.append(latency)
            measured.waited += waited

    counting = False
    workers = [Worker(record) for _ in range(tasks)]
    running = {
        asyncio.create_task(worker.work(once), name=f"load {number}"): worker for number, worker in enumerate(workers)
    }
    try:
        await _let_run(running, warm_up)
        measured.is_steady = await _all_answered(running, patience)
        counting = True
        begun, worked, waited = time.perf_counter(), time.process_time(), _waited_for_a_processor()
        await _let_run(running, seconds)
        counting = False
        measured.seconds = time.perf_counter() - begun
        measured.processor_seconds = time.process_time() - worked
        measured.processor_waited = _waited_for_a_processor() - waited
        await _let_end(running)
    finally:
        await _cancel(running)
    return measured


def _waited_for_a_processor() -> float:
    """How many seconds this thread could have run and was not let, so far; 0 where the system does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


async def _let_run(running: dict[asyncio.Task[None], Worker], seconds: float) -> None:
    done, _ = await asyncio.wait(running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _all_answered(running: dict[asyncio.Task[None], Worker], patience: float) -> bool:
    """Whether every task has had an answer, for which is waited so many seconds."""
    if all(worker.answered.is_set() for worker in running.values()):
        return True

    async def answers() -> None:
        for worker in running.values():
            await worker.answered.wait()

    everyone = asyncio.create_task(answers(), name="first answers")
    try:
        done, _ = await asyncio.wait([everyone, *running], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    finally:
        everyone.cancel()
    for task in done:
        task.result()
    return everyone in done


async def _let_end(running: dict[asyncio.Task[None], Worker]) -> None:
    """Whoever waits for a connection goes; who has one may end what it does."""
    for worker in running.values():
        worker.last = True
    waiting = [task for task, worker in running.items() if not worker.sent]
    for task in waiting:
        task.cancel()
    await asyncio.wait(running, timeout=GRACE)


async def _cancel(running: dict[asyncio.Task[None], Worker]) -> None:
    for task in running:
        task.cancel()
    # What they raise now is the consequence of what has been raised, or of being cancelled.
    await asyncio.gather(*running, return_exceptions=True)


def reading_of(size: int, passes: Sequence[Pass], *, waiting_is_known: bool) -> Reading:
    """All passes of one size together; latencies, if any of them was steady."""
    steady = [one for one in passes if one.is_steady]
    latencies = sorted(latency for one in steady for latency in one.latencies)
    total = sum(latencies)
    seconds = sum(one.seconds for one in passes)
    return Reading(
        size=size,
        statements=sum(len(one.latencies) for one in passes),
        rates=tuple(one.rate for one in passes),
        mean=total / len(latencies) if latencies else None,
        p50=_quantile(latencies, 0.5),
        p99=_quantile(latencies, 0.99),
        wait_share=sum(one.waited for one in steady) / total if waiting_is_known and total else None,
        processor_share=sum(one.processor_seconds for one in passes) / seconds,
        processor_wait_share=sum(one.processor_waited for one in passes) / seconds,
    )


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
