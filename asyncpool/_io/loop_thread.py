"""The background event loop of the blocking pools: one thread for all of them, which ends with the last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import selectors
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..errors import PoolError

T = TypeVar("T")

OWN_THREAD = "a SyncPool cannot be waited for in the thread of its own event loop, from a finalizer or a log handler"

# How long the end of the loop's thread is waited for, in seconds: a callback never takes as long.
STOP_TIMEOUT = 1.0


class LoopThread:
    """An event loop that runs in a daemon thread for as long as somebody holds it.

    A daemon thread, because others are joined at interpreter exit: scripts that never close their pool would hang.
    """

    def __init__(self) -> None:
        # A selector of ours, so that a forked child can be separated from the parent's.
        self._selector = selectors.DefaultSelector()
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop(self._selector)
        self.loop.set_debug(False)  # with -X dev it would tell the user's stderr how long our callbacks take
        self._holders = 0
        self._forks = 0  # under way: for so long the thread stands still
        self._start()

    def _start(self) -> None:
        self._runs = True
        self._thread = threading.Thread(target=self._run, name="asyncpool: event loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._runs:
            self.loop.run_forever()
            with _lock:
                # A stop that was asked for a fork may come when that is over.
                self._runs = bool(self._holders) and not self._forks
        if not self._holders:
            self.loop.close()

    @classmethod
    def hold(cls) -> LoopThread:
        """The thread that all share, started if there is none. To be let go by `release`."""
        global _shared
        with _lock:
            if _shared is None:
                _shared = cls()
            _shared._holders += 1
            return _shared

    def release(self) -> None:
        """One holder less; the last one stops the loop, which is then closed."""
        global _shared
        with _lock:
            self._holders -= 1
            if self._holders:
                return
            if _shared is self:
                _shared = None
            self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_TIMEOUT)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it. Ctrl-C cancels it and is raised at once.

        Raises PoolError in the loop's own thread, where finalizers and log handlers may run: it would wait for itself.
        """
        if self.is_current():
            work.close()
            raise PoolError(OWN_THREAD)
        answer = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()
            raise

    def is_current(self) -> bool:
        """Whether the caller is in the loop's own thread."""
        return threading.current_thread() is self._thread

    # --- fork -----------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the thread for the time of a fork, so that the interpreter finds none to warn of."""
        with _lock:
            self._forks += 1
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT)
        task = f"/proc/self/task/{self._thread.native_id}"
        deadline = time.monotonic() + STOP_TIMEOUT
        while not self._runs and os.path.exists(task) and time.monotonic() < deadline:
            time.sleep(0)  # it outlives its join() for some microseconds

    def go_on(self) -> None:
        """After the fork, in the parent."""
        with _lock:
            self._forks -= 1
            if not self._forks and not self._runs:
                if self._holders:
                    self._start()
                else:
                    self.loop.close()

    def bury(self) -> None:
        """After the fork, in the child: close the loop without touching the parent's, which shares its epoll."""
        if hasattr(select, "epoll") and isinstance(self._selector, selectors.EpollSelector):
            with select.epoll() as own:
                os.dup2(own.fileno(), self._selector.fileno(), inheritable=False)
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is not lost: it goes on in the parent
        with contextlib.suppress(RuntimeError):  # it was too busy to pause, and counts as running for ever
            self.loop.close()


_shared: LoopThread | None = None
_lock = threading.Lock()


def _before_fork() -> None:
    _forking.thread = _shared
    if _shared is not None:
        _shared.pause()


def _after_fork_in_parent() -> None:
    if (thread := _forking.thread) is not None:
        thread.go_on()


def _after_fork_in_child() -> None:
    global _shared, _lock
    _lock = threading.Lock()  # another thread may have held it
    if _shared is not None:
        thread, _shared = _shared, None
        _inherited.append(thread)
        thread.bury()


class _Forking(threading.local):
    """What the calling thread has paused for its fork."""

    thread: LoopThread | None = None


_forking = _Forking()
_inherited: list[LoopThread] = []  # kept, as is all that hangs on it: its finalizers would speak to the parent's server

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
