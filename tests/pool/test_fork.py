"""A process that forks while it has a pool: the child's end must not disturb the parent's connections."""

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
from asyncpool import Pool
from kit.loops import loop_factories

# Python warns of a fork in a process with threads; there are none, but uvloop's and libpq's own.
warnings.filterwarnings("ignore", category=DeprecationWarning)
ending = sys.argv[2]

async def pid(pool):
    async with pool.acquire() as connection:
        row = await (await connection.execute("select pg_backend_pid()")).fetchone()
        return row[0]

def live_as_the_child(pool, connection):
    if ending == "exits at once":
        os._exit(0)
    if ending == "drops the pool":
        warnings.simplefilter("ignore", ResourceWarning)
        del pool, connection
        gc.collect()
    os._exit(0)

async def main():
    pool = Pool(sys.argv[1], min_size=3, max_size=3, check_interval=None)
    async with pool:
        leased = await pool.acquire()
        before = {await pid(pool), leased.info.backend_pid}
        child = os.fork()
        if child == 0:
            live_as_the_child(pool, leased)
        assert os.waitpid(child, 0)[1] == 0
        await leased.execute("select 1")
        await leased.commit()
        await pool.release(leased)
        held = [await pool.acquire() for _ in range(3)]
        assert before <= {connection.info.backend_pid for connection in held}
        for connection in held:
            await connection.execute("select 1")
            await connection.commit()
            await pool.release(connection)
        assert pool.stats().connects == 3, pool.stats()
        assert not pool.stats().closes, pool.stats()
        print("fine")

with asyncio.Runner(loop_factory=loop_factories()[sys.argv[3]]) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", loop_factories())
@pytest.mark.parametrize("ending", ["exits at once", "drops the pool"])
def test_a_forked_child_that_ends_leaves_the_parents_pool_as_it_was(
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
