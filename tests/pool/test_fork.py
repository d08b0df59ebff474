"""A process that forks while it has a pool: the child must not disturb the parent's connections."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from kit.loops import loop_factories

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

SCRIPT = """
import asyncio, gc, os, sys, warnings
from asyncpool import Pool, PoolError
from kit.loops import loop_factories

# Python warns of a fork in a process with threads: uvloop and libpq may have some of their own.
warnings.filterwarnings("ignore", category=DeprecationWarning)
dsn, ending, loop = sys.argv[1:]
kept = {}  # the only references, so that the child can drop them

async def use(connection):
    row = await (await connection.execute("select pg_backend_pid()")).fetchone()
    await connection.commit()
    return row[0]

async def use_all(pool):
    connections = [await pool.acquire() for _ in range(3)]
    pids = {await use(connection) for connection in connections}
    for connection in connections:
        await pool.release(connection)
    return pids

async def try_the_parents_and_use_its_own():
    for forbidden in (kept["pool"].acquire, kept["pool"].close, kept["pool"].check):
        try:
            await forbidden()
        except PoolError:
            continue
        raise AssertionError(forbidden)
    async with Pool(dsn, min_size=3, max_size=3) as own:
        await use_all(own)

def live_as_the_child():
    if ending == "drops the pool":
        warnings.simplefilter("ignore", ResourceWarning)
        kept.clear()
        gc.collect()
    elif ending == "has a pool of its own":
        with asyncio.Runner(loop_factory=loop_factories()[loop]) as runner:
            runner.run(try_the_parents_and_use_its_own())

async def main():
    kept["pool"] = Pool(dsn, min_size=3, max_size=3, check_interval=None)
    await kept["pool"].open()
    before = await use_all(kept["pool"])
    kept["leased"] = await kept["pool"].acquire()
    child = os.fork()
    if child == 0:
        try:
            live_as_the_child()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert await use(kept["leased"]) in before
    await kept["pool"].release(kept["leased"])
    assert await use_all(kept["pool"]) == before
    assert not kept["pool"].stats().closes, kept["pool"].stats()
    await kept["pool"].close()
    print("fine")

with asyncio.Runner(loop_factory=loop_factories()[loop]) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", loop_factories())
@pytest.mark.parametrize("ending", ["exits at once", "drops the pool", "has a pool of its own"])
def test_whatever_a_forked_child_does_the_parents_pool_goes_on(
    dsn: str, admin: Admin, application_name: str, ending: str, loop: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, dsn, ending, loop],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("fine\n", "")
    assert admin.sessions(application_name) == 0
