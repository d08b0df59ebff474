"""Ctrl-C at every instant in which the interpreter can raise it inside the pool: no connection is lost."""

from __future__ import annotations

import dis
import gc
import random
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from kit.waiting import eventually_blocking

from asyncpool import PoolTimeout, SyncPool

if TYPE_CHECKING:
    from collections.abc import Callable
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
# Of the places in a row one is tried, in each test another.
STEP = 3
NEVER = 10**9


class CtrlC:
    """Raises KeyboardInterrupt in the pool's code, at the nth place where the interpreter would look for it: the start
    of a function, the end of a call, the turn of a loop.
    """

    def __init__(self, instant: int) -> None:
        self._left = instant
        self._previous: dict[FrameType, str] = {}

    @property
    def has_struck(self) -> bool:
        return self._left == 0

    def trace(self, frame: FrameType, event: str, _: Any) -> Trace | None:
        if "/asyncpool/" not in frame.f_code.co_filename:
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
                    raise KeyboardInterrupt
        return self.trace


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
    eventually_blocking(lambda: pool.stats().waiting == 1)
    for conn in held:
        pool.putconn(conn)


def hand_over_what_needs_work(pool: Pool, threads: Threads) -> None:
    first, second = [pool.getconn() for _ in range(SIZE)]
    threads.append(threading.Thread(target=lambda: pool.putconn(pool.getconn(timeout=20))))
    threads[-1].start()
    eventually_blocking(lambda: pool.stats().waiting == 1)
    first.prepare_threshold = None
    pool.putconn(first)
    pool.putconn(second, close=True)


@pytest.mark.parametrize(
    "work",
    [
        take_and_give_back,
        take_one_that_was_idle_for_long,
        give_back_with_changed_settings,
        give_back_to_be_closed,
        leave_a_block,
        wait_in_vain,
        hand_over,
        hand_over_what_needs_work,
    ],
    ids=lambda work: work.__name__,
)
def test_ctrl_c_loses_nothing_whenever_it_strikes(dsn: str, work: Callable[[Pool, Threads], None]) -> None:
    with SyncPool(dsn, min_size=SIZE, max_size=SIZE, autocommit=True) as pool:
        for _ in range(3):
            interrupt(pool, work, NEVER)  # Python 3.12 tells of opcodes only when it has seen the code before
        instant = random.randrange(STEP)
        struck = True
        while struck:
            instant += STEP
            struck = interrupt(pool, work, instant)
            assert_healthy(pool, instant)
        assert instant > 10, "it was hardly ever interrupted"


def interrupt(pool: Pool, work: Callable[[Pool, Threads], None], instant: int) -> bool:
    """Whether there was such an instant."""
    ctrl_c = CtrlC(instant)
    threads: Threads = []
    before = sys.gettrace()
    sys.settrace(ctrl_c.trace)
    try:
        work(pool, threads)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    gc.collect()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), f"a thread waits for ever after instant {instant}"
    return ctrl_c.has_struck


def assert_healthy(pool: Pool, instant: int) -> None:
    eventually_blocking(lambda: pool.stats().idle == pool.stats().size == SIZE and not pool.stats().waiting, timeout=10)
    held = [pool.getconn(timeout=10) for _ in range(SIZE)]
    assert [conn.execute("select 1").fetchone() for conn in held] == [(1,)] * SIZE, instant
    for conn in held:
        pool.putconn(conn)
