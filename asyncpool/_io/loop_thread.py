"""The background event loop of the blocking pools: one thread for all of them, which ends with the last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import selectors
import sys
import threading
import time
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..errors import PoolClosed, PoolError

T = TypeVar("T")

OWN_THREAD = (
    "a SyncPool cannot be waited for in the thread of its own event loop, from a finalizer or a log handler, nor from a"
    " finalizer that runs in the midst of a pool's own work"
)

# How long the end of the loop's thread is waited for, in seconds: a callback never takes as long.
STOP_TIMEOUT = 1.0


def check_not_finalizing(name: str) -> None:
    """Raise PoolClosed at the interpreter's end, when the loop's thread stands still and nobody may wait for it."""
    if sys.is_finalizing():
        raise PoolClosed(f"{name}: the interpreter is shutting down")


class Hold:
    """A share in the loop's thread, until it is released, or dropped: Ctrl-C may make its owner forget it."""

    __slots__ = ("__weakref__", "thread")

    def __init__(self, thread: LoopThread) -> None:
        self.thread = thread

    def release(self) -> None:
        """Let go; the last one stops the loop, which is then closed."""
        self.thread._release(self)


class LoopThread:
    """An event loop that runs in a daemon thread for as long as somebody holds it.

    A daemon thread, because others are joined at interpreter exit: scripts that never close their pool would hang.
    """

    def __init__(self) -> None:
        # A selector of ours, so that a forked child can be separated from the parent's.
        self._selector = selectors.DefaultSelector()
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop(self._selector)
        self.loop.set_debug(False)  # with -X dev it would tell the user's stderr how long our callbacks take
        self.locks: set[Any] = set()  # what is done in the loop may have to wait for these
        self._holds: set[weakref.ref[Hold]] = set()
        self._forks = 0  # under way: for so long the thread stands still
        self._runs = self._has_begun = False
        self._running = threading.Lock()  # held by the thread
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        self._runs = True
        threading.Thread(target=self._run, name="asyncpool: event loop", daemon=True).start()

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return  # Ctrl-C struck while the first was started, which has come all the same
        self._thread = threading.current_thread()
        self._has_begun = True
        ends = False
        while self._runs:
            self.loop.run_forever()
            with _lock:
                # A stop that was asked for a fork may come when that is over.
                self._runs = self._is_held() and not self._forks
                ends = not self._is_held()
                if not self._runs and not ends:
                    self._running.release()  # for the next thread, after the fork
        if ends:
            self._end_tasks()
            with _lock:
                self.loop.close()

    def _end_tasks(self) -> None:
        """What Ctrl-C has made its caller leave, before it had begun."""
        if tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=STOP_TIMEOUT))

    def _is_held(self) -> bool:
        return any(reference() is not None for reference in tuple(self._holds))

    @classmethod
    def hold(cls) -> Hold:
        """A share in the thread that all share, which is started if there is none."""
        global _shared
        with _lock:
            if _shared is None:
                _shared = cls()
            thread = _shared
            hold = Hold(thread)
            thread._holds.add(weakref.ref(hold, thread._on_dropped))
            if not thread._has_begun:
                thread._start()
            return hold

    def _release(self, hold: Hold) -> None:
        with _lock:
            self._holds = {reference for reference in self._holds if reference() not in (None, hold)}
            if self._holds:
                return
            self._retire()
            with contextlib.suppress(RuntimeError):  # released before
                self.loop.call_soon_threadsafe(self.loop.stop)
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(STOP_TIMEOUT)

    def _on_dropped(self, reference: weakref.ref[Hold]) -> None:
        # Called at any moment in any thread: it may take no lock.
        self._holds.discard(reference)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it was released
            self.loop.call_soon_threadsafe(self._end_if_dropped)

    def _end_if_dropped(self) -> None:
        with _lock:
            if not self._is_held():
                self._retire()
                self.loop.stop()

    def _retire(self) -> None:
        global _shared
        if _shared is self:
            _shared = None

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it. Ctrl-C cancels it and is raised at once.

        Raises PoolError where it would wait for itself: in the loop's own thread, where finalizers and log handlers
        may run, and in a finalizer that runs while its thread holds what the loop waits for.
        """
        if self.waits_for_caller():
            work.close()
            raise PoolError(OWN_THREAD)
        answer = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()
            raise

    def waits_for_caller(self) -> bool:
        """Whether the loop stands still for as long as the caller does."""
        return threading.current_thread() is self._thread or any(map(_is_mine, (_lock, *self.locks)))

    # --- fork -----------------------------------------------------------------------------------------------

    def ask_to_pause(self) -> None:
        """Stop the thread for the time of a fork, so that the interpreter finds none to warn of."""
        self._forks += 1
        self.loop.call_soon_threadsafe(self.loop.stop)

    def await_pause(self) -> None:
        """Wait until it stands still, or is too busy for that."""
        if self._thread is None:
            return  # it has not begun
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
                if self._is_held():
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


def _is_mine(lock: Any) -> bool:
    """Whether the caller's thread holds this RLock. The method is what threading.Condition asks, of every Python."""
    return bool(lock._is_owned())


_shared: LoopThread | None = None
_lock = threading.RLock()  # a finalizer may want it in the midst of what its thread does here


def _before_fork() -> None:
    with _lock:  # else it might just be closed
        _forking.thread = thread = _shared
        if thread is not None:
            thread.ask_to_pause()
    if thread is not None:
        thread.await_pause()


def _after_fork_in_parent() -> None:
    if (thread := _forking.thread) is not None:
        thread.go_on()


def _after_fork_in_child() -> None:
    global _shared, _lock
    _lock = threading.RLock()  # another thread may have held it
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
