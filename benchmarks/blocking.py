"""The blocking facade beside psycopg2's pool, psycopg_pool's and SQLAlchemy's, in threads.

    python benchmarks/blocking.py [--rounds N] [--json] [--url URL]

getconn + putconn in one thread, and in 8 threads on 4 connections; its tail while another thread computes; and a
statement through a pooled connection beside one on a bare psycopg connection over the same server session.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import contenders
import harness
from harness import Samples, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 4
THREADS = 8
# How many times each sample repeats what it measures.
ALONE = 20_000
SHARED = 4_000  # by each thread
SWITCHING = 250  # by each thread
TAIL = 20_000
STATEMENTS = 300

FLOOR = "(Semaphore + list)"
OURS, DROP_IN, PSYCOPG2, PSYCOPG_POOL, SQLALCHEMY = (
    "asyncpool, SyncPool",
    "asyncpool.psycopg2.pool",
    "psycopg2.pool",
    "psycopg_pool",
    "SQLAlchemy, QueuePool",
)
BARE = "(psycopg.Connection)"


@dataclass(frozen=True, slots=True)
class BlockingPool:
    """A pool, open and warm."""

    getconn: Callable[[], Any]
    putconn: Callable[[Any], Any]
    close: Callable[[], Any]
    waits: bool = True  # when all connections are in use; psycopg2's raises


def open_ours(url: str) -> BlockingPool:
    from asyncpool import SyncPool

    pool = SyncPool(url, min_size=SIZE, max_size=SIZE, autocommit=True)
    pool.open()
    return BlockingPool(pool.getconn, pool.putconn, pool.close)


def open_drop_in(url: str) -> BlockingPool:
    from asyncpool.psycopg2.pool import ThreadedConnectionPool

    pool = ThreadedConnectionPool(SIZE, SIZE, url, timeout=30)
    return BlockingPool(pool.getconn, pool.putconn, pool.closeall)


def open_psycopg2(url: str) -> BlockingPool:
    from psycopg2.pool import ThreadedConnectionPool

    pool = ThreadedConnectionPool(SIZE, SIZE, url)
    return BlockingPool(pool.getconn, pool.putconn, pool.closeall, waits=False)


def open_psycopg_pool(url: str) -> BlockingPool:
    from psycopg_pool import ConnectionPool

    pool = ConnectionPool(url, min_size=SIZE, max_size=SIZE, open=True, kwargs={"autocommit": True})
    pool.wait()
    return BlockingPool(pool.getconn, pool.putconn, pool.close)


def open_sqlalchemy(url: str) -> BlockingPool:
    import psycopg
    from sqlalchemy.pool import QueuePool

    pool = QueuePool(lambda: psycopg.connect(url, autocommit=True), pool_size=SIZE, max_overflow=0)
    for connection in [pool.connect() for _ in range(SIZE)]:
        connection.close()
    return BlockingPool(pool.connect, lambda connection: connection.close(), pool.dispose)


class SemaphoreAndList:
    """The least that can be called a pool: nobody checks anything, and there are no connections."""

    def __init__(self) -> None:
        self._semaphore = threading.Semaphore(SIZE)
        self._list = [object() for _ in range(SIZE)]

    def getconn(self) -> object:
        self._semaphore.acquire()
        return self._list.pop()

    def putconn(self, connection: object) -> None:
        self._list.append(connection)
        self._semaphore.release()


def open_floor(_: str) -> BlockingPool:
    pool = SemaphoreAndList()
    return BlockingPool(pool.getconn, pool.putconn, lambda: None)


OPENERS: dict[str, tuple[tuple[str, ...], Callable[[str], BlockingPool]]] = {
    FLOOR: ((), open_floor),
    OURS: (("asyncpool",), open_ours),
    DROP_IN: (("asyncpool",), open_drop_in),
    PSYCOPG2: (("psycopg2",), open_psycopg2),
    PSYCOPG_POOL: (("psycopg_pool",), open_psycopg_pool),
    SQLALCHEMY: (("sqlalchemy",), open_sqlalchemy),
}


# --- what is measured: each returns the seconds that one getconn + putconn, or one statement, took -----------


def alone(pool: BlockingPool) -> float:
    getconn, putconn = pool.getconn, pool.putconn
    start = perf_counter()
    for _ in range(ALONE):
        putconn(getconn())
    return (perf_counter() - start) / ALONE


def shared(pool: BlockingPool) -> float:
    """Nobody holds a connection for longer than it takes to give it back: now and then a thread has to wait."""
    getconn, putconn = pool.getconn, pool.putconn

    def work() -> None:
        for _ in range(SHARED):
            putconn(getconn())

    return _all_of(work) / (SHARED * THREADS)


def switching(pool: BlockingPool) -> float:
    """Each thread lets go of the interpreter while it holds its connection, so that nearly all have to wait."""
    getconn, putconn = pool.getconn, pool.putconn

    def work() -> None:
        for _ in range(SWITCHING):
            connection = getconn()
            time.sleep(0)
            putconn(connection)

    return _all_of(work) / (SWITCHING * THREADS)


def _all_of(work: Callable[[], None]) -> float:
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - start


@contextmanager
def another_thread_computing() -> Iterator[None]:
    stop = False

    def compute() -> None:
        while not stop:
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


def tail(pool: BlockingPool) -> float:
    """The 99th percentile while another thread computes."""
    getconn, putconn = pool.getconn, pool.putconn
    times = []
    with another_thread_computing():
        for _ in range(TAIL):
            start = perf_counter()
            putconn(getconn())
            times.append(perf_counter() - start)
    return statistics.quantiles(times, n=100)[98]


def statement(connection: Any) -> float:
    execute = connection.execute
    start = perf_counter()
    for _ in range(STATEMENTS):
        execute("select 1").fetchone()
    return (perf_counter() - start) / STATEMENTS


# --- the run ------------------------------------------------------------------------------------------------

ALONE_CASE, SHARED_CASE, SWITCHING_CASE, TAIL_CASE = "one thread", f"{THREADS} on {SIZE}", "switching", "p99"
CASES: dict[str, Callable[[BlockingPool], float]] = {
    ALONE_CASE: alone,
    SHARED_CASE: shared,
    SWITCHING_CASE: switching,
    TAIL_CASE: tail,
}
STATEMENT_CASE = "select 1"
# A statement takes long and varies by more than what is looked for: many short samples, taken in turns.
STATEMENT_ROUNDS = 40


def measure(url: str, rounds: int) -> Samples:
    samples = Samples()
    order = random.Random(0)
    with ExitStack() as stack:
        pools: dict[str, BlockingPool] = {}
        for name, (modules, opener) in OPENERS.items():
            if contenders.Contender(name, modules, (), None).missing():  # type: ignore[arg-type]  # not opened
                print(f"left out: {name} (not installed: {', '.join(modules)})", file=sys.stderr)
                continue
            pools[name] = opener(url)
            stack.callback(pools[name].close)
        turns = [
            (case, name)
            for case in CASES
            for name, pool in pools.items()
            if pool.waits or CASES[case] not in (shared, switching)
        ]
        for case, name in turns:
            CASES[case](pools[name])
        gc.collect()
        gc.freeze()
        for _ in range(rounds):
            order.shuffle(turns)
            for case, name in turns:
                gc.collect()
                samples.add(case, name, CASES[case](pools[name]))
        measure_statements(pools[OURS], samples, order)
        gc.unfreeze()
    return samples


def measure_statements(pool: BlockingPool, samples: Samples, order: random.Random) -> None:
    """Both over one server session, as two sessions differ by more than what is looked for."""
    import psycopg

    pooled = pool.getconn()
    bare = psycopg.Connection(pooled.pgconn)
    bare._autocommit = True
    bare._pool = None  # it is not to warn that nobody closes it
    # Each has a cache of prepared statements of its own, and would call its first one by the same name.
    pooled.prepare_threshold = bare.prepare_threshold = None
    turns = [(BARE, bare), (OURS, pooled)]
    for _, connection in turns:
        statement(connection)
    for _ in range(STATEMENT_ROUNDS):
        order.shuffle(turns)
        for name, connection in turns:
            samples.add(STATEMENT_CASE, name, statement(connection))
    pool.putconn(pooled)


def cost_table(samples: Samples) -> Table:
    columns = ["getconn + putconn, µs"]
    for case in CASES:
        columns += [case, "ratio"]
    rows = []
    for name in OPENERS:
        if name not in samples.figures[ALONE_CASE]:
            continue
        row = [name]
        for case in CASES:
            ratio = samples.ratio((case, name), (case, OURS))
            row += [harness.microseconds(samples.median(case, name)), harness.times(ratio)]
        rows.append(row)
    note = (
        f"ratio: to {OURS}, round by round. {SHARED_CASE}: threads on connections; {SWITCHING_CASE}: the same, each"
        f" gives way while it holds one. {TAIL_CASE}: of one thread, while another computes. psycopg2's pool cannot"
        " wait."
    )
    return Table(columns, rows, note)


def statement_table(samples: Samples) -> Table:
    rows = [
        [
            name,
            harness.microseconds(samples.median(STATEMENT_CASE, name)),
            f"×{samples.ratio((STATEMENT_CASE, name), (STATEMENT_CASE, BARE)):.3f}",
        ]
        for name in samples.figures[STATEMENT_CASE]
    ]
    return Table(["a statement, µs", STATEMENT_CASE, "ratio"], rows, f"ratio: to {BARE}, turn by turn.")


def main() -> None:
    arguments = harness.options("the blocking facade, in threads", rounds=7).parse_args()
    with harness.server(arguments.url) as url:
        where = harness.machine(url)
        samples = measure(url, arguments.rounds)
    if arguments.json:
        harness.show_json({"machine": where, "seconds": samples.figures})
        return
    print(f"blocking pools of {SIZE} connections, median of {arguments.rounds} interleaved rounds\n{where}\n")
    harness.show([cost_table(samples), statement_table(samples)])


if __name__ == "__main__":
    main()
