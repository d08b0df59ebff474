"""What may strike at every instant inside the pool: Ctrl-C, a lack of memory, a finalizer that the garbage collector
runs in the midst of it; and the recursion limit. No connection is lost.
"""

from __future__ import annotations

import dis
import gc
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from kit.waiting import eventually_blocking

from asyncpool import PoolError, PoolTimeout, SyncPool
from asyncpool._io.locked_machine import ensure_stack, reach

from .pools import loop_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    Pool = SyncPool[Any]
    Threads = list[threading.Thread]
    Trace = Callable[[FrameType, str, Any], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was dropped without release:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # made, and not yet kept
    pytest.mark.timeout(120),
]

SIZE = 2
# Of so many places in a row one is tried, in each test another.
RARE_STEP = 29
NEVER = 10**9
# And an exception that a trace function raises amid the handling of another leaks objects, on Python 3.11.
NOTHING_CHANGES_IN = (ensure_stack.__code__, reach.__code__)


class Striking:
    """Calls `strike` in the pool's code, at the nth place where the interpreter would look for Ctrl-C, or for garbage:
    the start of a function, the end of a call, the turn of a loop.
    """

    def __init__(self, instant: int, strike: Callable[[], None]) -> None:
        self._left = instant
        self._strike = strike
        self._previous: dict[FrameType, str] = {}

    @property
    def has_struck(self) -> bool:
        return self._left == 0

    def trace(self, frame: FrameType, event: str, _: Any) -> Trace | None:
        if "/asyncpool/" not in frame.f_code.co_filename or frame.f_code in NOTHING_CHANGES_IN:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = self._previous.get(frame, "")
            self._previous[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith("CALL") or before in ("RESUME", "JUMP_BACKWARD"):
                self._left -= 1
                if self.has_struck:
                    sys.settrace(None)
                    self._previous.clear()
                    self._strike()
        return self.trace


def ctrl_c() -> None:
    raise KeyboardInterrupt


def lack_of_memory() -> None:
    raise MemoryError


# --- what is interrupted ------------------------------------------------------------------------------------


def take_and_give_back(pool: Pool, _: Threads) -> None:
    pool.putconn(pool.getconn())


def take_one_that_was_idle_for_long(pool: Pool, _: Threads) -> None:
    time.sleep(0.002)
    pool.putconn(pool.getconn())


def give_back_with_changed_settings(pool: Pool, _: Threads) -> None:
    conn = pool.getconn()
    conn.prepare_threshold = None
    pool.putconn(conn)


def give_back_to_be_closed(pool: Pool, _: Threads) -> None:
    pool.putconn(pool.getconn(), close=True)


def close_it(pool: Pool, _: Threads) -> None:
    pool.getconn().close()


def leave_a_block(pool: Pool, _: Threads) -> None:
    with pool.acquire():
        pass


def wait_in_vain(pool: Pool, _: Threads) -> None:
    held = [pool.getconn() for _ in range(SIZE)]
    with suppress(PoolTimeout):
        pool.getconn(timeout=0.001)
    for conn in held:
        pool.putconn(conn)


def hand_over(pool: Pool, threads: Threads) -> None:
    held = [pool.getconn() for _ in range(SIZE)]
    threads.append(threading.Thread(target=lambda: pool.putconn(pool.getconn(timeout=20))))
    threads[-1].start()
    eventually_blocking(lambda: pool.stats().waiting == 1 or not threads[-1].is_alive())  # there may be one more place
    for conn in held:
        pool.putconn(conn)


def hand_over_what_needs_work(pool: Pool, threads: Threads) -> None:
    first, second = [pool.getconn() for _ in range(SIZE)]
    threads.append(threading.Thread(target=lambda: pool.putconn(pool.getconn(timeout=20))))
    threads[-1].start()
    eventually_blocking(lambda: pool.stats().waiting == 1 or not threads[-1].is_alive())  # there may be one more place
    first.prepare_threshold = None
    pool.putconn(first)
    pool.putconn(second, close=True)


WORKS = [
    take_and_give_back,
    take_one_that_was_idle_for_long,
    give_back_with_changed_settings,
    give_back_to_be_closed,
    close_it,
    leave_a_block,
    wait_in_vain,
    hand_over,
    hand_over_what_needs_work,
]

each_work = pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)


@each_work
@pytest.mark.parametrize(
    ("strike", "debug", "step"),
    [(ctrl_c, False, 5), (ctrl_c, True, 13), (lack_of_memory, False, 13)],
    ids=["ctrl_c", "ctrl_c-debug", "lack_of_memory"],
)
def test_nothing_is_lost_whenever_it_strikes(
    dsn: str, work: Callable[[Pool, Threads], None], strike: Callable[[], None], debug: bool, step: int
) -> None:
    with SyncPool(dsn, min_size=SIZE, max_size=SIZE, autocommit=True, debug=debug) as pool:
        instant = random.randrange(step)
        for _ in instants_of(pool, work, strike, instant, step):
            assert_healthy(pool)


@each_work
def test_a_finalizer_in_the_midst_of_the_pools_work_gives_its_connection_back(
    dsn: str, work: Callable[[Pool, Threads], None]
) -> None:
    with SyncPool(dsn, min_size=SIZE + 1, max_size=SIZE + 1, autocommit=True) as pool:
        dropped: list[Any] = []

        def finalizer() -> None:
            pool.putconn(dropped.pop(), close=random.random() < 0.3)

        dropped.append(pool.getconn())
        for _ in instants_of(pool, work, finalizer, random.randrange(RARE_STEP), RARE_STEP):
            while dropped:
                pool.putconn(dropped.pop())
            assert_healthy(pool, SIZE + 1)
            dropped.append(pool.getconn())
        pool.putconn(dropped.pop())


def test_a_finalizer_in_the_midst_of_the_pools_work_is_refused_what_it_would_have_to_wait_for(dsn: str) -> None:
    with SyncPool(dsn, min_size=SIZE, max_size=SIZE, autocommit=True) as pool, SyncPool(dsn, max_size=1) as other:
        refusals: Counter[str] = Counter()
        held = other.getconn()

        def finalizer() -> None:
            waits: list[Callable[[], object]] = [lambda: other.getconn(timeout=0.001), other.check, pool.check]
            for wait in waits:
                try:
                    wait()
                except PoolTimeout:
                    refusals["waited"] += 1
                except PoolError as error:
                    refusals["refused" if "finalizer" in str(error) else str(error)] += 1

        for _ in instants_of(pool, wait_in_vain, finalizer, random.randrange(RARE_STEP), RARE_STEP):
            assert_healthy(pool)
        other.putconn(held)
        assert set(refusals) == {"waited", "refused"}


@pytest.mark.parametrize("work", WORKS[:-2], ids=lambda work: work.__name__)
def test_a_finalizer_in_the_midst_of_the_pools_work_closes_the_pool(
    dsn: str, work: Callable[[Pool, Threads], None]
) -> None:
    instant = random.randrange(2 * RARE_STEP)
    struck = True
    while struck:
        instant += 2 * RARE_STEP
        with SyncPool(dsn, min_size=SIZE, max_size=SIZE, autocommit=True) as pool:
            for _ in range(2):
                interrupt(pool, work, NEVER, ctrl_c)
            finalizer = partial(pool.close, 0)
            try:
                struck = interrupt(pool, work, instant, finalizer)
            except PoolError:
                struck = True
            else:
                struck = struck and instant < 12 * RARE_STEP
        assert "closed" in repr(pool)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_ctrl_c_while_the_loop_is_waited_for_keeps_no_thread_alive(dsn: str) -> None:
    def administrate(pool: Pool, _: Threads) -> None:
        pool.resize(1, 3)
        pool.drain()

    pool: Pool = SyncPool(dsn, min_size=1, max_size=2, autocommit=True)
    pool.open()
    for _ in instants_of(pool, administrate, ctrl_c, random.randrange(5), 5):
        pool.close()
        eventually_blocking(lambda: "closed" in repr(pool) and not loop_threads(), timeout=10)
        pool.open()
    pool.close()


class KeepingPool(SyncPool[Any]):
    """Its user keeps what he has got, and gives it back when he can."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: list[Any] = []

    def getconn(self, *args: Any, **options: Any) -> Any:
        self.kept.append(None)
        self.kept[-1] = connection = super().getconn(*args, **options)
        return connection

    def put_kept(self) -> None:
        while self.kept:
            connection = self.kept.pop()
            with suppress(PoolError):  # it was given back before
                if connection is not None:
                    self.putconn(connection)


@pytest.mark.parametrize("work", WORKS[:-2], ids=lambda work: work.__name__)
def test_near_the_recursion_limit_nothing_is_lost(dsn: str, work: Callable[[Pool, Threads], None]) -> None:
    with KeepingPool(dsn, min_size=SIZE, max_size=SIZE, autocommit=True) as pool:
        errors = 0
        for room in range(random.randint(1, 3), 90, 3):
            try:
                with_room_for(room, lambda: work(pool, []))
            except (RecursionError, PoolError):
                errors += 1
            gc.collect()  # the error holds the frames in which it was met, and what is in them
            pool.put_kept()
            assert_healthy(pool)
            pool.kept.clear()
        assert 0 < errors < 29


def with_room_for(calls: int, function: Callable[[], None]) -> None:
    """Call it where it can call so deep and no deeper."""

    errors: list[Exception] = []

    def descend() -> int:
        """How many frames are still to be left, from the limit on, until there is room; negative when it was called."""
        try:
            left = descend()
        except RecursionError:
            left = calls
        if left == 0:
            try:
                function()
            except Exception as error:  # noqa: BLE001 — for the caller, past the frames that wait for the limit
                errors.append(error)
        return left - 1

    descend()
    for error in errors:
        raise error


def instants_of(
    pool: Pool, work: Callable[[Pool, Threads], None], strike: Callable[[], None], instant: int, step: int
) -> Iterator[int]:
    """Strike at one instant after the other, until the work is done before."""
    for _ in range(3):
        interrupt(pool, work, NEVER, strike)  # Python 3.12 tells of opcodes only when it has seen the code before
    struck = True
    while struck:
        instant += step
        struck = interrupt(pool, work, instant, strike)
        yield instant
    assert instant > 10, "it was hardly ever interrupted"


def interrupt(
    pool: Pool, work: Callable[[Pool, Threads], None], instant: int, strike: Callable[[], None] = ctrl_c
) -> bool:
    """Whether there was such an instant."""
    striking = Striking(instant, strike)
    threads: Threads = []
    before = sys.gettrace()
    sys.settrace(striking.trace)
    try:
        work(pool, threads)
    except (KeyboardInterrupt, MemoryError):
        pass
    finally:
        sys.settrace(before)
        gc.collect()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), f"a thread waits for ever after instant {instant}"
    return striking.has_struck


def assert_healthy(pool: Pool, size: int = SIZE) -> None:
    eventually_blocking(lambda: pool.stats().idle == pool.stats().size == size and not pool.stats().waiting, timeout=10)
    held = [pool.getconn(timeout=10) for _ in range(size)]
    assert [conn.execute("select 1").fetchone() for conn in held] == [(1,)] * size
    for conn in held:
        pool.putconn(conn)
