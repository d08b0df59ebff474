"""A process that forks while it has a SyncPool: the child starts with an empty pool, the parent's goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually_blocking

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

# `alarm`: what hangs in a child or in the parent ends here, and is seen by its exit status.
BEGIN = """
import logging, multiprocessing, os, signal, sys, threading, time, warnings
from contextlib import suppress
import psycopg
from asyncpool import PoolClosed, PoolError, SyncPool

logging.getLogger("asyncio").setLevel(logging.ERROR)  # with `-X dev` it tells how slow a busy machine is
signal.alarm(20)
dsn = sys.argv[1]

def pid(conn):
    return conn.execute("select pg_backend_pid()").fetchone()[0]

def pids(pool):
    conns = [pool.getconn() for _ in range(3)]
    found = {pid(conn) for conn in conns}
    for conn in conns:
        conn.commit()
        pool.putconn(conn)
    return found

def use(pool):
    with pool.acquire() as conn:
        return pid(conn)

def fork(live):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            live()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child

def wait_for(*children):
    for child in children:
        assert os.waitpid(child, 0)[1] == 0

def refused(work, words=""):
    try:
        work()
    except PoolError as refusal:
        assert words in str(refusal), refusal
    else:
        raise AssertionError(work)

def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.005)

def descriptors():
    directory = "/proc/self/fd"
    return len(os.listdir(directory)) if os.path.isdir(directory) else 0

def open_pool(**options):
    pool = SyncPool(dsn, **{"min_size": 3, "max_size": 3, "check_interval": None, **options})
    pool.open()
    return pool
"""

END = """
pool.close()
print("fine")
"""

# From 3.12 on Python warns of a fork in a process with threads; as an error that would be dropped unseen. These
# count the thread that goes on after the fork as well (python/cpython#137109).
COUNTS_TOO_LATE = (3, 13) <= sys.version_info < (3, 13, 10) or (3, 14) <= sys.version_info < (3, 14, 1)
OF_THREADS = "ignore::DeprecationWarning" if COUNTS_TOO_LATE else "always::DeprecationWarning"

QUIET = ("-W", "error", "-W", OF_THREADS)
DEV = ("-X", "dev", "-W", OF_THREADS)
# For tests in which the threads are the user's own.
WITH_THREADS = ("-W", "ignore::DeprecationWarning")


def check(script: str, dsn: str, *options: tuple[str, ...], end: str = END) -> None:
    """Run a script, and its children, which say nothing: at the same time with each of these options, or QUIET."""
    with ThreadPoolExecutor() as executor:
        for done in executor.map(lambda each: run(BEGIN + script + end, dsn, each), options or [QUIET]):
            assert done.stderr == ""
            assert (done.stdout, done.returncode) == ("fine\n", 0)


def run(script: str, dsn: str, options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", script, dsn],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture(autouse=True)
def nothing_left(application_name: str, admin: Admin) -> object:
    """After each test the server has no session of its script, nor of a child."""
    yield
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


CHILDS_END = {
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit()",
    "sys.exit with everything leased": "leased = [pool.getconn() for _ in range(3)]; sys.exit()",
    "its last line": "",
    "its last line, the pool closed": "pool.close()",
}


@pytest.mark.parametrize("childs_end", CHILDS_END.values(), ids=CHILDS_END)
def test_a_child_has_sessions_of_its_own_and_the_parent_keeps_its_own(dsn: str, childs_end: str) -> None:
    check(
        f"""
pool = open_pool()
before = pids(pool)
child = os.fork()
if child == 0:
    stats = pool.stats()
    assert (stats.size, stats.idle, stats.acquires) == (0, 0, 0), stats
    own = pids(pool)
    assert len(own) == 3 and not own & before
    assert pids(pool) == own
    {childs_end}
else:
    wait_for(child)
    assert pids(pool) == before
    assert not pool.stats().closes, pool.stats()
    pool.close()
    print("fine")
""",
        dsn,
        QUIET,
        DEV,
        end="",
    )


def test_a_child_connects_only_when_it_first_takes_a_connection(dsn: str, admin: Admin, application_name: str) -> None:
    check(
        """
pool = open_pool(name="shared")
name = psycopg.conninfo.conninfo_to_dict(dsn)["application_name"]
count = "select count(*) from pg_stat_activity where application_name = %s"

def live():
    with psycopg.connect(dsn, autocommit=True, application_name="asyncpool-test-child") as observer:
        assert observer.execute(count, [name]).fetchone()[0] == 3
        use(pool)
        eventually(lambda: pool.stats().idle == 3)
        assert observer.execute(count, [name]).fetchone()[0] == 6

wait_for(fork(live))
""",
        dsn,
    )


def test_a_child_that_never_uses_the_pool_starts_no_thread_and_ends_in_silence(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)

def live():
    assert threading.active_count() == 1

wait_for(fork(live), fork(live))
assert pids(pool) == before
""",
        dsn,
        QUIET,
        DEV,
    )


def test_a_pool_that_was_closed_or_never_opened_is_so_in_the_child(dsn: str) -> None:
    check(
        """
pool = open_pool()
closed = open_pool()
closed.close()
unopened = SyncPool(dsn)

def live():
    for each in closed, unopened:
        refused(each.getconn)
        with each:
            use(each)
        refused(each.getconn)

wait_for(fork(live))
""",
        dsn,
    )


def test_a_pool_that_the_child_closes_is_closed_there_alone(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)

def close_at_once():
    pool.close()
    refused(pool.getconn)
    pool.open()
    use(pool)
    pool.close()

def close_after_use():
    use(pool)
    pool.close()
    refused(pool.getconn)

wait_for(fork(close_at_once), fork(close_after_use))
assert pids(pool) == before
""",
        dsn,
    )


def test_a_child_may_open_resize_check_and_drain_the_pool_before_it_uses_it(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)

def resize():
    pool.resize(1, 1)
    use(pool)
    assert pool.stats().size == 1

def open_again():
    pool.open()
    assert pool.stats().size == 3

def check():
    pool.check()
    use(pool)

def drain():
    pool.drain()
    use(pool)

for live in resize, open_again, check, drain:
    wait_for(fork(live))
assert pids(pool) == before
assert pool.stats().max_size == 3
""",
        dsn,
    )


def test_a_grandchild_is_a_child_too(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)

def live_unused():
    wait_for(fork(lambda: use(pool)))
    assert use(pool) not in before

def live_used():
    own = pids(pool)
    wait_for(fork(lambda: pids(pool) & own and os._exit(1)))
    assert pids(pool) == own

wait_for(fork(live_unused), fork(live_used))
assert pids(pool) == before
""",
        dsn,
    )


def test_a_connection_leased_across_the_fork_is_refused_in_the_child_and_good_in_the_parent(
    dsn: str, table: str
) -> None:
    check(
        f"""
pool = open_pool()
conn = pool.getconn()
conn.execute("insert into {table} values (1)")

def live():
    words = "belongs to the parent process"
    refused(lambda: conn.execute("select 1"), words)
    refused(conn.commit, words)
    refused(conn.rollback, words)
    refused(lambda: pool.putconn(conn), words)
    conn.close()
    assert pool.stats().leased == 0
    assert pool.holders() == []
    own = use(pool)
    refused(lambda: conn.execute("select 1"), words)
    refused(lambda: pool.putconn(conn), words)
    refused(lambda: pool.putconn(conn, close=True), words)
    assert use(pool) == own

wait_for(fork(live))
conn.execute("insert into {table} values (2)")
conn.commit()
assert conn.execute("select count(*) from {table}").fetchone() == (2,)
conn.commit()
pool.putconn(conn)
""",
        dsn,
    )


LEAVE = {"in order": "return", "by sys.exit": "sys.exit()", "by an exception": "raise LookupError"}


@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_a_block_that_the_child_leaves_ends_in_the_parent_alone(dsn: str, table: str, leave: str) -> None:
    check(
        f"""
pool = open_pool()

def work():
    with pool.acquire() as conn:
        conn.execute("insert into {table} values (1)")
        child = os.fork()
        if child == 0:
            {leave}
        wait_for(child)
        conn.execute("insert into {table} values (2)")

before = os.getpid()
with suppress(SystemExit, LookupError):
    work()
if os.getpid() != before:
    use(pool)
    os._exit(0)
with pool.acquire() as conn:
    assert conn.execute("select count(*) from {table}").fetchone() == (2,)
""",
        dsn,
    )


def test_a_key_means_another_connection_in_the_child(dsn: str) -> None:
    check(
        """
pool = open_pool()
conn = pool.getconn("key")
mine = pid(conn)

def live():
    other = pool.getconn("key")
    assert other is not conn
    assert pid(other) != mine
    assert pool.getconn("key") is other
    other.commit()
    pool.putconn(other, "key")

wait_for(fork(live))
assert pool.getconn("key") is conn
assert pid(conn) == mine
conn.commit()
pool.putconn(conn, "key")
assert pool.stats().leased == 0
""",
        dsn,
    )


# The child says when it has done its part, and goes when the parent says so.
WITH_A_CHILD_THAT_WORKS = """
said, says = os.pipe()
told, tells = os.pipe()

def live():
    os.close(tells)
    pids(pool)
    os.write(says, b".")
    while os.read(told, 1):
        with suppress(psycopg.OperationalError):
            pids(pool)

def terminate(victims):
    with psycopg.connect(dsn, autocommit=True, application_name="asyncpool-test-killer") as killer:
        for victim in victims:
            killer.execute("select pg_terminate_backend(%s)", [victim])

child = fork(live)
os.close(told)
assert os.read(said, 1) == b"."
"""


def test_the_parent_notices_ended_sessions_while_and_after_the_child_works(dsn: str) -> None:
    check(
        f"""
from asyncpool.events import CloseReason

pool = open_pool()

def replaced(number):
    return pool.stats().closes.get(CloseReason.DISCONNECTED, 0) == number and pool.stats().idle == 3

first = pids(pool)
{WITH_A_CHILD_THAT_WORKS}
assert pids(pool) == first
terminate(first)
eventually(lambda: replaced(3))  # nobody takes one: only the event loop can see it
second = pids(pool)
assert not first & second
os.write(tells, b".")
os.close(tells)
wait_for(child)
assert pids(pool) == second
terminate(second)
eventually(lambda: replaced(6))
assert not pids(pool) & second
""",
        dsn,
    )


def test_the_parent_is_not_told_of_what_happens_to_the_childs_sessions(dsn: str) -> None:
    check(
        f"""
pool = open_pool()
first = pids(pool)
{WITH_A_CHILD_THAT_WORKS}
with psycopg.connect(dsn, autocommit=True, application_name="asyncpool-test-killer") as killer:
    name = psycopg.conninfo.conninfo_to_dict(dsn)["application_name"]
    found = killer.execute("select pid from pg_stat_activity where application_name = %s", [name]).fetchall()
    terminate({{number for (number,) in found}} - first)
os.write(tells, b".")
os.close(tells)
wait_for(child)
assert pids(pool) == first
pool.check()
assert pids(pool) == first
assert not pool.stats().closes, pool.stats()
""",
        dsn,
        WITH_THREADS,
    )


def test_the_parent_grows_shrinks_and_times_out_while_a_child_lives(dsn: str) -> None:
    check(
        f"""
pool = open_pool(min_size=1, max_idle=0.05)
{WITH_A_CHILD_THAT_WORKS}
leased = [pool.getconn() for _ in range(3)]
refused(lambda: pool.getconn(timeout=0.05), "no connection within")
for conn in leased:
    pool.putconn(conn)
eventually(lambda: pool.stats().size == 1)
os.close(tells)
wait_for(child)
leased = [pool.getconn() for _ in range(3)]
refused(lambda: pool.getconn(timeout=0.05), "no connection within")
for conn in leased:
    pool.putconn(conn)
""",
        dsn,
    )


def test_the_parents_sessions_end_on_the_server_although_a_child_holds_their_sockets(
    dsn: str, admin: Admin, application_name: str
) -> None:
    check(
        """
pool = open_pool(min_size=3)
said, says = os.pipe()
child = fork(lambda: (os.close(says), os.read(said, 1)))
os.close(said)
pool.close()
with psycopg.connect(dsn, application_name="asyncpool-test-observer") as observer:
    name = psycopg.conninfo.conninfo_to_dict(dsn)["application_name"]
    count = "select count(*) from pg_stat_activity where application_name = %s"
    assert observer.execute(count, [name]).fetchone()[0] == 0
assert pool.stats().abandoned == 0
os.close(says)
wait_for(child)
""",
        dsn,
    )


def test_twenty_forks_in_a_row_cost_the_parent_nothing(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)
had = descriptors(), threading.active_count()

def live():
    assert use(pool) not in before

for _ in range(20):
    wait_for(fork(live))
    assert pids(pool) == before
assert (descriptors(), threading.active_count()) == had
assert not pool.stats().closes, pool.stats()
""",
        dsn,
    )


def test_workers_of_a_server_that_has_loaded_the_application_before_it_forks(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)
said, says = os.pipe()

def live():
    for _ in range(20):
        own = use(pool)
        assert own not in before
    os.write(says, own.to_bytes(4, "big"))

workers = [fork(live) for _ in range(4)]
for _ in range(5):
    assert pids(pool) == before
wait_for(*workers)
assert len({os.read(said, 4) for _ in workers}) == 4
assert pids(pool) == before
""",
        dsn,
        QUIET,
        DEV,
    )


def test_the_threads_of_a_worker_may_all_be_the_first_to_take_a_connection(dsn: str) -> None:
    check(
        """
pool = open_pool()
before = pids(pool)

def live():
    together = threading.Barrier(8)
    errors = []

    def handle():
        together.wait()
        try:
            assert use(pool) not in before
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=handle) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [], errors
    assert pool.stats().acquires == 8

for _ in range(5):
    wait_for(fork(live))
""",
        dsn,
    )


def test_multiprocessing_with_forked_processes(dsn: str) -> None:
    check(
        """
def live(pipe):
    pipe.send(pids(pool))

def square(number):
    with pool.acquire() as conn:
        return conn.execute("select %s * %s", [number, number]).fetchone()[0]

pool = open_pool()
before = pids(pool)
forking = multiprocessing.get_context("fork")
ours, theirs = forking.Pipe()
processes = [forking.Process(target=live, args=(theirs,)) for _ in range(2)]
for process in processes:
    process.start()
found = [ours.recv() for _ in processes]
for process in processes:
    process.join()
    assert process.exitcode == 0
assert len(before.union(*found)) == 9
with forking.Pool(2) as workers:
    assert workers.map(square, range(20)) == [number**2 for number in range(20)]
assert pids(pool) == before
""",
        dsn,
    )


def test_a_subprocess_with_a_preexec_fn_leaves_the_pool_as_it_is(dsn: str) -> None:
    check(
        """
import subprocess

pool = open_pool()
before = pids(pool)
for _ in range(3):
    done = subprocess.run([sys.executable, "-c", "pass"], preexec_fn=os.setsid, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
assert pids(pool) == before
""",
        dsn,
    )


def test_forks_while_other_threads_use_the_pool(dsn: str, table: str) -> None:
    check(
        f"""
import itertools

pool = open_pool()
numbers = itertools.count()
stop = threading.Event()
acknowledged = []
errors = []

def work():
    try:
        while not stop.is_set():
            number = next(numbers)
            with pool.acquire() as conn:
                conn.execute("insert into {table} values (%s)", [number])
            acknowledged.append(number)
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for _ in range(10):
    done = len(acknowledged)
    wait_for(fork(lambda: use(pool)))
    eventually(lambda: errors or len(acknowledged) > done + 20)
stop.set()
for thread in threads:
    thread.join()
assert errors == [], errors
assert pool.stats().leased == pool.stats().waiting == 0
with pool.acquire() as conn:
    found = {{number for (number,) in conn.execute("select id from {table}")}}
assert found == set(acknowledged)
assert not pool.stats().closes, pool.stats()
""",
        dsn,
        WITH_THREADS,
    )


def test_threads_that_fork_at_the_same_time_leave_the_pool_working(dsn: str) -> None:
    check(
        """
pool = open_pool(check_interval=0)
errors = []

def fork_on():
    try:
        for _ in range(6):
            wait_for(fork(lambda: use(pool)))
    except BaseException as error:
        errors.append(error)

for _ in range(2):
    threads = [threading.Thread(target=fork_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [], errors
    for _ in range(10):
        with pool.acquire(timeout=5):
            pass
""",
        dsn,
        WITH_THREADS,
    )


def test_a_fork_that_finds_the_event_loop_busy_for_long_leaves_it_working(dsn: str) -> None:
    check(
        """
class Slow(logging.Handler):
    def emit(self, record):
        if record.getMessage().endswith("closing connection 1: drained"):
            busy.set()
            assert forked.wait(10)

busy = threading.Event()
forked = threading.Event()
logger = logging.getLogger("asyncpool")
logger.setLevel(logging.DEBUG)
logger.addHandler(Slow())
logger.propagate = False
pool = open_pool()
draining = threading.Thread(target=pool.drain)
draining.start()
assert busy.wait(5)
child = fork(lambda: None)
forked.set()
draining.join()
wait_for(child)
eventually(lambda: pool.stats().idle == 3)
pool.check()
""",
        dsn,
        WITH_THREADS,
    )


def test_a_waiting_thread_is_served_or_refused_after_a_fork_of_another(dsn: str) -> None:
    check(
        """
pool = open_pool(min_size=1, max_size=1)
conn = pool.getconn()
served = []
refusals = []

def wait_long():
    with pool.acquire(timeout=10) as own:
        served.append(pid(own))

def wait_briefly():
    try:
        pool.getconn(timeout=0.3)
    except PoolError as error:
        refusals.append(error)

threads = [threading.Thread(target=wait) for wait in (wait_long, wait_briefly)]
for thread in threads:
    thread.start()
eventually(lambda: pool.stats().waiting == 2)
wait_for(fork(lambda: use(pool)))
eventually(lambda: refusals)
pool.putconn(conn)
for thread in threads:
    thread.join()
assert len(served) == 1
""",
        dsn,
        WITH_THREADS,
    )


def test_a_fork_while_connections_are_opened_and_closed_harms_neither_side(dsn: str) -> None:
    check(
        """
pool = open_pool()
for _ in range(5):
    pool.drain()
    child = fork(lambda: pids(pool))
    eventually(lambda: pool.stats().idle == 3)
    pids(pool)
    wait_for(child)
assert pool.stats().abandoned == 0
""",
        dsn,
    )
