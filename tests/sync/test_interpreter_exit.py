"""A script ends at once and in silence, whatever it leaves open, and the server is left with no session of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually_blocking

if TYPE_CHECKING:
    from pathlib import Path

    from kit.servers import Admin

# The last line of every script says the time: the clock is the system's, the same in all processes.
BEGIN = """
import atexit, gc, logging, sys, threading, time
from asyncpool import PoolError, SyncPool

logging.getLogger("asyncio").setLevel(logging.ERROR)  # with `-X dev` it tells how slow a busy machine is
dsn = sys.argv[1]

def say_the_time():
    print(time.monotonic(), flush=True)

def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.005)
"""

# Seconds from a script's last line to the end of its process: some 0.1 are taken where nothing else runs, and whatever
# a pool waits for has 5 or more. Then, until a script that hangs is given up.
LIMIT = 4.0
PATIENCE = 30.0

LEFT_OPEN = {
    "an open pool": """
pool = SyncPool(dsn)
pool.open()
with pool.acquire() as conn:
    conn.execute("select 1")
""",
    "a pool that is just being opened": """
pool = SyncPool(dsn, min_size=4)
pool.open(wait=False)
""",
    "leased connections": """
pool = SyncPool(dsn, min_size=3)
pool.open()
leased = [pool.getconn() for _ in range(3)]
leased[0].execute("select 1")
leased[0].commit()
""",
    "an open transaction": """
pool = SyncPool(dsn)
pool.open()
conn = pool.getconn()
conn.execute("create table never_committed (id int)")
""",
    "blocks that are never left": """
pool = SyncPool(dsn)
pool.open()

def rows():
    with pool.acquire() as conn, conn.transaction(), conn.cursor() as cursor:
        yield from cursor.stream("select generate_series(1, 100000)")

half_read = [rows(), rows()]
for generator in half_read:
    next(generator)
""",
    "a thread that waits for a connection": """
pool = SyncPool(dsn, min_size=1, max_size=1)
pool.open()
leased = pool.getconn()
threading.Thread(target=pool.getconn, daemon=True).start()
eventually(lambda: pool.stats().waiting)
""",
    "a thread that waits for a statement": """
pool = SyncPool(dsn)
pool.open()

sleepers = []

def sleep():
    with pool.acquire() as conn:
        sleepers.append(conn.info.backend_pid)
        conn.execute("select pg_sleep(2)")

threading.Thread(target=sleep, daemon=True).start()

def is_sleeping():
    with pool.acquire() as conn:
        query = "select wait_event = 'PgSleep' from pg_stat_activity where pid = %s"
        return sleepers and conn.execute(query, sleepers).fetchone()[0]

eventually(is_sleeping)
""",
    "threads that are at work": """
pool = SyncPool(dsn, max_size=3)
pool.open()

def work():
    while True:
        with pool.acquire() as conn:
            conn.execute("select 1")

for _ in range(6):
    threading.Thread(target=work, daemon=True).start()
eventually(lambda: pool.stats().acquires > 50)
""",
    "a callable that hangs": """
inside = threading.Event()

def configure(conn):
    inside.set()
    threading.Event().wait()

pool = SyncPool(dsn, configure=configure)
pool.open(wait=False)
assert inside.wait(5)
""",
    "connections that are just being closed": """
pool = SyncPool(dsn, min_size=3)
pool.open()
kept = [pool.getconn() for _ in range(3)]
pool.drain()
pool.putconn(kept[0])
pool.putconn(kept[1], close=True)
kept[2].close()
""",
    "a connection that is just being rolled back": """
pool = SyncPool(dsn)
pool.open()
logging.getLogger("asyncpool").setLevel(logging.ERROR)  # for its warning
conn = pool.getconn()
conn.execute("create temp table never_committed (id int)")
pool.putconn(conn)
""",
    "a pool that a thread has made and opened": """
made = []

def make():
    made.append(SyncPool(dsn))
    made[0].open()
    with made[0].acquire() as conn:
        conn.execute("select 1")

thread = threading.Thread(target=make)
thread.start()
thread.join()
""",
    "a pool in a module": """
import lasting

conn = lasting.pool.getconn()
conn.execute("select 1")
""",
    "a pool in a reference cycle": """
class Application:
    def __init__(self):
        self.itself = self
        self.pool = SyncPool(dsn)
        self.pool.open()
        self.leased = self.pool.getconn()

gc.disable()
application = Application()
del application
""",
    "a pool that an object of a module closes in its end": """
class Application:
    def __init__(self):
        self.pool = SyncPool(dsn)
        self.pool.open()

    def __del__(self):
        self.pool.close()

application = Application()
""",
    "a lease that an object of a module gives back in its end": """
class Request:
    def __init__(self):
        self.conn = pool.getconn()
        self.conn.execute("select 1")

    def __del__(self):
        self.conn.rollback()
        self.conn.close()

pool = SyncPool(dsn)
pool.open()
request = Request()
""",
    "a pool that an object of a module waits for in its end": """
class Request:
    def __init__(self):
        self.pool = SyncPool(dsn, max_size=1)
        self.pool.open()
        self.conn = self.pool.getconn()

    def __del__(self, refusal=PoolError):
        try:
            self.pool.getconn(timeout=0.1)
        except refusal:
            pass

request = Request()
""",
    "a generator that closes the pool in its end": """
def connections():
    with SyncPool(dsn) as pool:
        with pool.acquire() as conn:
            yield conn

generator = connections()
next(generator)
""",
    "an exit handler that uses the pool, and one that closes it": """
pool = SyncPool(dsn, max_size=1)
pool.open()
atexit.register(pool.close)

@atexit.register
def use():
    with pool.acquire() as conn:
        conn.execute("select 1")
""",
}


@dataclass(frozen=True)
class Outcome:
    """How a script has ended: its exit code, what it has said on stderr, and whether it ended soon enough."""

    code: int | None
    stderr: str
    at_once: bool


SILENT = Outcome(0, "", at_once=True)


def run(script: str, dsn: str, *options: str) -> Outcome:
    """Run a script by `python -c`."""
    return run_command(*options, "-c", script, dsn)


def run_command(*arguments: str, **environment: str) -> Outcome:
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as hung:
        return Outcome(None, f"it hangs; it has said {hung.stdout!r} {hung.stderr!r}", at_once=False)
    ended = time.monotonic()
    assert done.stdout, done.stderr
    return Outcome(done.returncode, done.stderr, at_once=ended - float(done.stdout) < LIMIT)


def run_both(script: str, dsn: str) -> list[Outcome]:
    """Run it twice at the same time, once with `-X dev`."""
    with ThreadPoolExecutor(2) as executor:
        plain = executor.submit(run, script, dsn)
        return [executor.submit(run, script, dsn, "-X", "dev").result(), plain.result()]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `lasting`, for scripts only, which holds a pool."""
    text = "import sys\nfrom asyncpool import SyncPool\n\npool = SyncPool(sys.argv[1])\npool.open()\n"
    (tmp_path / "lasting.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("left_open", LEFT_OPEN.values(), ids=LEFT_OPEN)
def test_a_script_ends_at_once_and_in_silence(
    dsn: str, admin: Admin, application_name: str, module: None, left_open: str
) -> None:
    script = f"{BEGIN}\n{left_open}\nsay_the_time()"
    assert run_both(script, dsn) == [SILENT, SILENT]
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_a_file_and_a_module_that_are_run_end_as_one_given_by_option(
    dsn: str, admin: Admin, application_name: str, tmp_path: Path
) -> None:
    file = tmp_path / "script.py"
    file.write_text(f"{BEGIN}\n{LEFT_OPEN['leased connections']}\nsay_the_time()")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert run_command(str(file), dsn) == SILENT
    assert run_command("-m", "script", dsn, PYTHONPATH=path) == SILENT
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


HOLDING = """
pool = SyncPool(dsn, max_size=1)
pool.open()
conn = pool.getconn()
conn.execute("select 1")
threading.Thread(target=pool.getconn, daemon=True).start()
eventually(lambda: pool.stats().waiting)
say_the_time()
"""


def test_after_an_unhandled_exception_its_traceback_is_all_that_is_said(
    dsn: str, admin: Admin, application_name: str
) -> None:
    for ended in run_both(f"{BEGIN}\n{HOLDING}\nraise LookupError('the end')", dsn):
        first, *others, last = ended.stderr.splitlines()
        assert (first, last) == ("Traceback (most recent call last):", "LookupError: the end")
        assert all(line.startswith("  ") for line in others), ended.stderr
        assert (ended.code, ended.at_once) == (1, True)
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_an_exception_that_leaves_the_pools_block_closes_the_pool(
    dsn: str, admin: Admin, application_name: str
) -> None:
    block = """
with SyncPool(dsn) as pool, pool.acquire() as conn:
    conn.execute("select 1")
    say_the_time()
    raise LookupError("the end")
"""
    for ended in run_both(BEGIN + block, dsn):
        assert ended.stderr.count("Traceback") == 1
        assert ended.stderr.endswith("\nLookupError: the end\n")
        assert (ended.code, ended.at_once) == (1, True)
    assert admin.sessions(application_name) == 0


BLOCKS = {
    "the pool": "with SyncPool(dsn) as pool:",
    "a transaction": "with SyncPool(dsn) as pool, pool.acquire() as conn, conn.transaction():",
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_sys_exit_inside_a_block_keeps_its_code(dsn: str, admin: Admin, application_name: str, block: str) -> None:
    script = f"{BEGIN}\n{block}\n    say_the_time()\n    sys.exit(3)"
    assert run_both(script, dsn) == [replace(SILENT, code=3)] * 2
    assert admin.sessions(application_name) == 0


def test_sys_exit_keeps_its_code_also_when_everything_is_left_open(
    dsn: str, admin: Admin, application_name: str
) -> None:
    assert run_both(f"{BEGIN}\n{HOLDING}\nsys.exit(3)", dsn) == [replace(SILENT, code=3)] * 2
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_a_thread_that_outlives_the_main_one_goes_on_with_the_pool(
    dsn: str, admin: Admin, application_name: str
) -> None:
    script = """
pool = SyncPool(dsn, max_size=2, check_interval=0)
pool.open()

def work():
    threading.main_thread().join()
    for _ in range(20):
        with pool.acquire() as conn:
            conn.execute("select 1")
    say_the_time()

threading.Thread(target=work).start()
"""
    assert run_both(BEGIN + script, dsn) == [SILENT, SILENT]
    eventually_blocking(lambda: admin.sessions(application_name) == 0)
