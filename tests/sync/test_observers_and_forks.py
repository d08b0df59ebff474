"""A process that forks while its pools are observed: each side is told of what happens on its own."""

from __future__ import annotations

import os

import pytest

from .test_fork_blocking import DEV, QUIET, WITH_THREADS, check

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

OBSERVED = """
from asyncpool.events import Acquired, Connected, Released

def tellers():
    return [thread for thread in threading.enumerate() if "tell an observer" in thread.name]

def of_leases():
    return [event for event in told if isinstance(event, (Acquired, Released))]

told = []
pool = open_pool()
observation = pool.observe(told.append)
"""


def test_child_and_parent_are_each_told_of_their_own_leases(dsn: str) -> None:
    check(
        OBSERVED
        + """
use(pool)
eventually(lambda: len(of_leases()) == 2)
use(pool)  # perhaps not told when it forks

def live():
    told.clear()
    use(pool)
    use(pool)
    eventually(lambda: len(of_leases()) == 4)
    time.sleep(0.05)
    assert len(of_leases()) == 4, told
    assert any(isinstance(event, Connected) for event in told)

wait_for(fork(live), fork(live))
use(pool)
eventually(lambda: len(of_leases()) == 6)
""",
        dsn,
        QUIET,
        DEV,
    )


def test_a_child_that_does_not_use_the_pool_has_no_thread(dsn: str) -> None:
    check(
        OBSERVED
        + """
use(pool)

def live():
    assert threading.active_count() == 1
    observation.stop()
    assert threading.active_count() == 1

wait_for(fork(live))
assert len(tellers()) == 1
""",
        dsn,
    )


def test_a_stopped_observer_hears_nothing_in_the_child_either(dsn: str) -> None:
    check(
        OBSERVED
        + """
observation.stop()
eventually(lambda: not tellers())

def live():
    told.clear()
    use(pool)
    observation.flush()
    assert told == []
    assert tellers() == []

wait_for(fork(live))
assert tellers() == []
""",
        dsn,
    )


def test_a_pool_of_an_event_loop_that_is_first_opened_in_the_child_is_told_there(dsn: str) -> None:
    check(
        """
import asyncio
from asyncpool import Pool
from asyncpool.events import Acquired

told = []
loaded = Pool(dsn, min_size=1)
observation = loaded.observe(told.append)

async def serve():
    async with loaded:
        async with loaded.acquire():
            pass
        while not any(isinstance(event, Acquired) for event in told):
            await asyncio.sleep(0.005)

wait_for(fork(lambda: asyncio.run(serve())), fork(lambda: asyncio.run(serve())))
assert told == []
asyncio.run(serve())
""",
        dsn,
        end='print("fine")',
    )


def test_a_fork_while_an_observer_hangs_leaves_both_sides_working(dsn: str) -> None:
    check(
        OBSERVED
        + """
hangs, goes_on = threading.Event(), threading.Event()
heard = []

def hang(event):
    if os.getpid() == parent:
        hangs.set()
        goes_on.wait(10)
    heard.append(event)

parent = os.getpid()
pool.observe(hang)
use(pool)
assert hangs.wait(10)

def live():
    use(pool)
    eventually(lambda: any(isinstance(event, Released) for event in heard))
    assert [type(event) for event in heard if isinstance(event, (Acquired, Released))] == [Acquired, Released]

wait_for(fork(live))
goes_on.set()
use(pool)
eventually(lambda: len(heard) == 4)
eventually(lambda: len(of_leases()) == 4)
""",
        dsn,
        WITH_THREADS,
    )


def test_forks_while_other_threads_are_observed_lose_no_event_of_the_parents(dsn: str) -> None:
    check(
        OBSERVED
        + """
stop = threading.Event()
done = []

def work():
    count = 0
    while not stop.is_set():
        use(pool)
        count += 1
    done.append(count)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(5):
    wait_for(fork(lambda: use(pool)))
stop.set()
for thread in threads:
    thread.join()
observation.flush()
assert len(of_leases()) == 2 * sum(done), (len(of_leases()), done)
""",
        dsn,
        WITH_THREADS,
    )


def test_a_script_that_never_closes_its_observed_pool_ends_in_silence(dsn: str) -> None:
    check(
        OBSERVED
        + """
use(pool)
eventually(lambda: len(of_leases()) == 2)
use(pool)
""",
        dsn,
        end='print("fine")',
    )
