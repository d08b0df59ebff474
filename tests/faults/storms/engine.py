"""A storm: many tasks on one pool, stopped at random points; and what must hold when it is over."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any

from kit.loops import loop_factories
from kit.waiting import eventually

from asyncpool import Pool, SyncPool

from .client import Client
from .disturbances import disturb
from .grounds import SESSION_STATE, open_descriptors
from .hooks import Hooks
from .interruptions import WAYS, draw_delay, undisturbed
from .plan import PATIENT
from .record import Record, nothing_unseen
from .threads import ThreadClient, judge_connections

if TYPE_CHECKING:
    from .grounds import Grounds
    from .plan import Plan

# Seconds in which at least one task must end: longer than any of them may wait for a connection.
LONGEST = 3 * PATIENT


def run_storm(plan: Plan, grounds: Grounds) -> Record:
    """Run it in an event loop of its own, and judge."""
    record = Record()
    factory = loop_factories()[plan.loop]
    with asyncio.Runner(loop_factory=factory, debug=plan.debug_loop) as runner:
        runner.run(_storm(plan, grounds, record))
    return record


async def _waited_for(plan: Plan, what: Callable[[], Any]) -> None:
    """`open` and `close` of either pool."""
    await (asyncio.to_thread(what) if plan.threads else what())


async def _storm(plan: Plan, grounds: Grounds, record: Record) -> None:
    hooks = Hooks(plan, record)
    pool: Any = (SyncPool if plan.threads else Pool)(
        grounds.dsn,
        name=f"storm {plan.kind} {plan.seed}",
        **{**_patience(plan), **plan.options, **hooks.options()},
    )
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(plan.crowd + 2))
    asyncio.get_running_loop().slow_callback_duration = 60.0  # how long a step takes is not judged here
    descriptors = open_descriptors()
    with nothing_unseen(record):
        await _waited_for(plan, pool.open)
        hooks.harmless = False
        await _rage(plan, pool, grounds, record)
        hooks.harmless = True
        await _judged(record, "the storm's end", lambda: _judge(plan, pool, grounds, record))
        await _judged(record, "closing", lambda: _judge_closing(plan, pool, grounds, record, descriptors))


def _patience(plan: Plan) -> dict[str, Any]:
    """A busy machine must not look like a server that does not answer."""
    return {
        "min_size": plan.min_size,
        "max_size": plan.max_size,
        "reset": plan.reset,
        "autocommit": plan.autocommit,
        "acquire_timeout": 2 * PATIENT,
        "check_timeout": PATIENT,
        "cancel_timeout": PATIENT,
        "backoff_initial": 0.01,
        "backoff_max": 0.1,
    }


# --- while it lasts -----------------------------------------------------------------------------------------


async def _rage(plan: Plan, pool: Any, grounds: Grounds, record: Record) -> None:
    over = asyncio.Event()
    disturbing = [
        asyncio.create_task(disturb(name, pool, plan, grounds, over), name=f"storm: {name}")
        for name in plan.disturbances
    ]
    disturbing.append(asyncio.create_task(_collect(over), name="storm: collects garbage"))
    numbers = iter(range(1, plan.tasks + 1))

    run = _run_thread if plan.threads else _run_client

    async def lane() -> None:
        for number in numbers:
            await run(plan, number, pool, grounds, record)

    lanes = [asyncio.create_task(lane(), name=f"storm: lane {number}") for number in range(plan.crowd)]
    hanging = await _hanging(lanes, record)
    if hanging:
        record.violation(f"{len(hanging)} tasks hang: {_where(asyncio.all_tasks())}; {pool!r}; {pool.holders()}")
        for task in hanging:
            task.cancel()
        await asyncio.wait(hanging, timeout=PATIENT)
    over.set()
    for ended in [*(lane for lane in lanes if lane.done() and not lane.cancelled()), *disturbing]:
        try:
            await ended
        except Exception as error:  # noqa: BLE001 — told with the others
            record.violation(f"the storm's own {ended.get_name()}: {error!r}")


async def _hanging(lanes: Sequence[asyncio.Task[None]], record: Record) -> set[asyncio.Task[None]]:
    """Those that are left when none has got on any more; empty when all have ended."""
    ended = -1
    running = set(lanes)
    while running and ended < record.operations["tasks"]:
        ended = record.operations["tasks"]
        _, running = await asyncio.wait(running, timeout=LONGEST)
    return running


async def _collect(over: asyncio.Event) -> None:
    """A connection that was dropped in a cycle of references comes back only then, and everybody may wait for it."""
    while not over.is_set():
        gc.collect()
        await asyncio.sleep(0.1)


async def _run_client(plan: Plan, number: int, pool: Pool, grounds: Grounds, record: Record) -> None:
    client = Client(plan, number, pool, grounds.table, record)
    rng = Random(f"{plan.seed}/interruption {number}")
    way = rng.choice(WAYS) if rng.random() < 0.6 else undisturbed
    stopped = await way(client.run, draw_delay(rng), record)
    record.operations["tasks"] += 1
    if stopped:
        record.cancels[way.__name__.replace("_", " ")] += 1


async def _run_thread(plan: Plan, number: int, pool: SyncPool, grounds: Grounds, record: Record) -> None:
    client = ThreadClient(plan, number, pool, grounds.table, record)
    await asyncio.to_thread(client.run)
    record.operations += client.operations
    record.operations["tasks"] += 1
    record.errors += client.errors


def _where(tasks: Iterable[asyncio.Task[Any]]) -> str:
    """Where they are, from the outside in."""
    chains = []
    for task in tasks:
        awaited: Any = task.get_coro()
        chain = []
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
            if frame is not None:
                chain.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
        chains.append(f"{task.get_name()}: {' > '.join(chain)}")
    return "; ".join(chains)


# --- when it is over ----------------------------------------------------------------------------------------


async def _judged(record: Record, what: str, judge: Callable[[], Awaitable[None]]) -> None:
    try:
        await judge()
    except Exception as error:  # noqa: BLE001 — it is the verdict
        record.violation(f"{what}: {error!r}")


async def _judge(plan: Plan, pool: Any, grounds: Grounds, record: Record) -> None:
    pool.resize(plan.min_size, plan.max_size)
    gc.collect()
    await eventually(
        # Between two attempts to connect it is quiet too.
        lambda: (
            _is_quiet(pool) and plan.min_size <= pool.stats().size == grounds.admin.sessions(grounds.application_name)
        ),
        timeout=PATIENT,
    )
    record.stats = stats = pool.stats()
    record.expect(not record.held, f"still held: {record.held}")
    record.expect(pool.holders() == [], f"holders: {pool.holders()}")
    record.expect(plan.min_size <= stats.size <= plan.max_size, f"size {stats.size}")
    record.expect(stats.abandoned == 0 or plan.loses_sessions, f"{stats.abandoned} sessions abandoned")
    if plan.is_calm:
        record.expect(
            not stats.closes, f"a cancellation cost connections: {dict(stats.closes)}, {record.pool_warnings}"
        )
        record.expect(stats.connects == stats.size, f"{stats.connects} connects for {stats.size} connections")
    grounds.judge_server(record)
    grounds.judge_table(record)
    if plan.threads:
        await asyncio.to_thread(judge_connections, plan, pool, grounds, record)
    else:
        await _judge_connections(plan, pool, grounds, record)


def _is_quiet(pool: Pool | SyncPool) -> bool:
    stats = pool.stats()
    busy = stats.leased + stats.waiting + stats.connecting + stats.checking + stats.recycling + stats.closing
    return not busy


async def _judge_connections(plan: Plan, pool: Pool, grounds: Grounds, record: Record) -> None:
    """As many as there may be are had at once, and each of them works."""
    async with asyncio.timeout(PATIENT):
        conns = [await pool.acquire() for _ in range(plan.max_size)]
    pids = set()
    for number, conn in enumerate(conns):
        cursor = await conn.execute("select pg_backend_pid(), %s::int", [number])
        row = await cursor.fetchone()
        record.expect(row == (conn.pgconn.backend_pid, number), f"answered {row}")
        pids.add(conn.pgconn.backend_pid)
        if plan.cleans_sessions:
            cursor = await conn.execute(SESSION_STATE.encode())
            grounds.judge_session(record, await cursor.fetchone())
        await conn.rollback()
        await pool.release(conn)
    record.expect(len(pids) == plan.max_size, "two leases of one session")


async def _judge_closing(plan: Plan, pool: Any, grounds: Grounds, record: Record, descriptors: int) -> None:
    began = monotonic()
    await _waited_for(plan, pool.close)
    record.expect(monotonic() - began < PATIENT, f"closing took {monotonic() - began:.1f} s")
    await eventually(lambda: grounds.admin.sessions(grounds.application_name) == 0, timeout=PATIENT)
    this = asyncio.current_task()
    await eventually(lambda: not [task for task in asyncio.all_tasks() if task is not this], timeout=PATIENT)
    gc.collect()
    await eventually(lambda: open_descriptors() <= descriptors, timeout=PATIENT)
