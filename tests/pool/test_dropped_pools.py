"""A pool that nobody closed: a warning, and nothing is left of it."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from kit.loops import loop_factories, on_both_loops
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.loops import LoopFactory
    from kit.servers import Admin

each_loop = pytest.mark.parametrize("factory", loop_factories().values(), ids=loop_factories())

LEFT = "dropped without being closed"


def collect(drop: Callable[[], object]) -> None:
    """Drop a pool, and see the warning."""
    with pytest.warns(ResourceWarning, match=LEFT):
        drop()
    gc.collect()


def descriptors() -> int:
    """How many files and sockets this process has open; where it cannot be seen, always 0."""
    directory = "/proc/self/fd"
    return len(os.listdir(directory)) if os.path.isdir(directory) else 0


def timers() -> int:
    """How many timers wait in asyncio's own loop."""
    scheduled = getattr(asyncio.get_running_loop(), "_scheduled", ())
    return sum(not handle.cancelled() for handle in scheduled)


def watched() -> int:
    """How many descriptors asyncio's own loop watches."""
    selector = getattr(asyncio.get_running_loop(), "_selector", None)
    return len(selector.get_map()) if selector is not None else 0


@on_both_loops
async def test_nothing_is_left_of_a_pool_that_is_dropped(dsn: str, admin: Admin, application_name: str) -> None:
    def left() -> tuple[Any, ...]:
        return len(asyncio.all_tasks()), threading.enumerate(), timers(), watched(), descriptors()

    gc.collect()
    await asyncio.sleep(0)  # as it is while a test runs, also for a loop that has just been made
    before = left()
    pools = [Pool(dsn, min_size=3, max_idle=100, long_held_after=100)]
    await pools[0].open()
    async with pools[0].acquire() as connection:
        await connection.execute("select 1")
    del connection
    assert admin.sessions(application_name) == 3
    collect(pools.clear)
    await eventually(lambda: admin.sessions(application_name) == 0)
    await eventually(lambda: left() == before)


@on_both_loops
async def test_nothing_is_left_of_a_pool_that_is_dropped_while_it_opens(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pools = [Pool(dsn, min_size=3)]
    await pools[0].open(wait=False)
    await asyncio.sleep(0)
    collect(pools.clear)
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert admin.sessions(application_name) == 0


@on_both_loops
async def test_a_pool_that_another_thread_drops_is_closed_in_its_own(
    dsn: str, admin: Admin, application_name: str
) -> None:
    pools = [Pool(dsn, min_size=2)]
    await pools[0].open()
    with pytest.warns(ResourceWarning, match=LEFT):
        await asyncio.to_thread(pools.clear)
    await eventually(lambda: admin.sessions(application_name) == 0)
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


@each_loop
def test_a_pool_whose_loop_is_gone_ends_its_sessions_when_it_is_dropped(
    dsn: str, admin: Admin, application_name: str, factory: LoopFactory
) -> None:
    pools = [Pool(dsn, min_size=2)]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(pools[0].open())
    assert admin.sessions(application_name) == 2
    collect(pools.clear)
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


@each_loop
def test_a_pool_whose_loop_stands_still_ends_its_sessions_when_it_is_dropped(
    dsn: str, admin: Admin, application_name: str, factory: LoopFactory
) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        pools = [Pool(dsn, min_size=2)]
        runner.run(pools[0].open())
        collect(pools.clear)
        eventually_blocking(lambda: admin.sessions(application_name) == 0)
        runner.run(asyncio.sleep(0))


async def test_a_pool_that_was_closed_or_never_opened_is_dropped_in_silence(dsn: str) -> None:
    Pool(dsn)
    pool = Pool(dsn)
    async with pool:
        pass
    del pool
    gc.collect()


@pytest.mark.parametrize(
    "ending", ["pass", "await pool.acquire()", "pool.drain()", "asyncio.create_task(pool.close())"]
)
def test_a_script_that_closes_nothing_ends_at_once_and_says_so(
    dsn: str, admin: Admin, application_name: str, ending: str
) -> None:
    script = f"""
import asyncio, sys
from asyncpool import Pool

pool = Pool(sys.argv[1], min_size=2)

async def main():
    await pool.open()
    {ending}

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", script, dsn],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if "close" not in ending:
        assert LEFT in done.stderr
    eventually_blocking(lambda: admin.sessions(application_name) == 0)
