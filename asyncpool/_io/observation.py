"""Telling observers what happens in a pool, in threads of their own: their errors and their pace are not the pool's."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any

from ..events import Event, Observer
from .log import logger

# What is noted of an event: its kind, its time, and what else it says.
Note = tuple[type[Event], float, tuple[Any, ...]]

# Events that an observer may be behind; what comes then is not told. They take some 200 bytes each.
MAX_BEHIND = 100_000
# Seconds for which events are gathered: waking a thread for each of them would take more of a service's time than they.
GATHERING = 0.02
# Seconds for which it is told without a rest, or so much for each that waits if that is more, and the seconds of rest:
# without it the pool's own thread, when its socket is ready, waits for the interpreter until all are told, or 5 ms.
IN_A_ROW, FOR_EACH = 0.0001, 1e-8
REST = 0.00005
# Seconds between two lines in the log about the same observer.
TOLD_EVERY = 60.0
# Seconds for which a fork waits until nothing is being told; an observer that takes longer is not waited for.
PAUSE_TIMEOUT = 1.0


class Observation:
    """One observer of one pool, from `pool.observe()` until `stop()`."""

    def __init__(self, pool_name: str, observer: Observer) -> None:
        self._pool_name = pool_name
        self._observer = observer
        self._events: deque[Note] = deque()
        self._dropped = 0
        self._errors = 0
        self._logged_at = -TOLD_EVERY
        self._logged = (0, 0)
        self.is_stopped = False
        self.at_stop: Callable[[], object] = _nothing
        self._begin_anew()
        with _changing:
            _all.add(self)
        self._start()

    def __repr__(self) -> str:
        state = "stopped" if self.is_stopped else f"{len(self._events)} to tell, {self._dropped} dropped"
        return f"<Observation of {self._pool_name!r}: {state}>"

    @property
    def dropped(self) -> int:
        """Events that were not told, as the observer was too far behind."""
        return self._dropped

    def _begin_anew(self) -> None:
        """Without a thread; in a forked child, where what came before is the parent's to tell, it comes when needed."""
        self._events.clear()
        # Reentrant: an observer may flush, and a finalizer may note something in the midst of anything here.
        self._telling = threading.RLock()
        self._counting = threading.RLock()
        self._is_telling = self._is_woken = False
        self._forks = 0  # under way: for so long there is no thread
        self._wakes: SimpleQueue[None] = SimpleQueue()  # whose put() a finalizer may call at any moment
        self._thread: threading.Thread | None = None
        self._running = threading.Lock()  # held by the thread
        self._teller = 0  # its identity

    # --- in the pool's threads ------------------------------------------------------------------------------

    def note(self, event: Note) -> None:
        """Have an event told, soon. From any thread, at any moment."""
        if len(self._events) >= MAX_BEHIND:
            self._drop(event[1])
            return
        self._events.append(event)
        if not self._is_woken:
            with contextlib.suppress(RuntimeError):  # no thread can be started, as the interpreter ends
                self._wake()

    def _drop(self, now: float) -> None:
        with self._counting:
            self._dropped += 1
        if now >= self._logged_at + TOLD_EVERY:
            self._log("it is too slow", None)  # from here: one that hangs does not let its own thread say so

    def _wake(self) -> None:
        try:
            self._is_woken = True
            self._wakes.put(None)
            if self._thread is None:
                self._start()
        except BaseException:
            self._is_woken = False  # it was Ctrl-C, or a lack of threads: the next event tries again
            raise

    def _start(self) -> None:
        with self._counting:
            if self._thread is not None or self._forks:
                return
            name = f"asyncpool {self._pool_name}: tell an observer"
            self._thread = thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except BaseException:
            self._thread = None
            raise

    def stop(self) -> None:
        """Tell what has happened so far, soon, and nothing more. From any thread, at any moment."""
        self.is_stopped = True
        self._wakes.put(None)
        self.at_stop()

    # --- telling --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return  # Ctrl-C struck while the first was started, which has come all the same
        self._teller = threading.get_ident()
        ends = False
        while not ends:
            self._wait()
            ends = self.is_stopped or self._forks > 0  # before telling: what has happened until then is told
            self._is_woken = False
            self._tell_with_rests()
            self._log_what_is_left()
        with self._counting:
            self._thread = None
            self._running.release()
        if self._events and not self.is_stopped:
            self._wake()  # it was too late for a pause that is over

    def _tell_with_rests(self) -> None:
        """All that has happened so far, so that the pool's own thread need not wait for the end of it."""
        left = len(self._events)
        while left > 0:
            told = self._tell(left, max(IN_A_ROW, left * FOR_EACH))
            left = left - told if told else 0  # 0: somebody else has flushed
            if left > 0:
                sleep(REST)

    def _wait(self) -> None:
        """Until something has happened, and for GATHERING more, but for a stop."""
        with contextlib.suppress(Empty):
            is_all_logged = self._logged == (self._errors, self._dropped)
            self._wakes.get(timeout=None if is_all_logged else max(0.0, self._logged_at + TOLD_EVERY - monotonic()))
            if not self.is_stopped and not self._forks:
                self._wakes.get(timeout=GATHERING)

    def flush(self) -> None:
        """Tell, before this returns, all that has happened so far: in the calling thread, for as long as that takes.

        Called by the observer itself it does nothing: what is left is told when that has returned.
        """
        self._tell(len(self._events), inf)

    def _tell(self, number: int, seconds: float) -> int:
        """At most so many, and no further one when so many seconds are over. How many it were."""
        with self._telling:
            if self._is_telling:
                return 0
            self._is_telling = True
            told = 0
            end = monotonic() + seconds
            try:
                while told < number and self._events:
                    told += 1
                    self._tell_of(*self._events.popleft())
                    if monotonic() >= end:
                        break
            finally:
                self._is_telling = False
        return told

    def _tell_of(self, kind: type[Event], at: float, details: tuple[Any, ...]) -> None:
        try:
            self._observer(kind(self._pool_name, at, *details))
        except BaseException as error:
            if not isinstance(error, Exception) and threading.get_ident() != self._teller:
                raise  # Ctrl-C, or what else is for whoever flushes
            self._errors += 1
            if monotonic() >= self._logged_at + TOLD_EVERY:
                self._log("its last error", error)

    def _log_what_is_left(self) -> None:
        if self._logged != (self._errors, self._dropped) and monotonic() >= self._logged_at + TOLD_EVERY:
            self._log("since the last line about it", None)

    def _log(self, what: str, error: BaseException | None) -> None:
        with self._counting:
            errors, dropped = self._errors - self._logged[0], self._dropped - self._logged[1]
            self._logged_at, self._logged = monotonic(), (self._errors, self._dropped)
        text = "%s: an observer has failed on %d events, and %d were dropped; %s"
        with contextlib.suppress(Exception):  # of the user's handlers: the pool's thread may be here
            logger.log(logging.WARNING, text, self._pool_name, errors, dropped, what, exc_info=error)

    # --- fork -----------------------------------------------------------------------------------------------

    def ask_to_pause(self) -> None:
        """End the thread for the time of a fork: the interpreter warns of threads, and the child would inherit, locked
        for ever, what the observer has locked.
        """
        self._forks += 1
        self._wakes.put(None)

    def await_pause(self) -> None:
        """Wait until it has ended, or takes too long for that."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        deadline = monotonic() + PAUSE_TIMEOUT
        thread.join(PAUSE_TIMEOUT)
        task = f"/proc/self/task/{thread.native_id}"
        while not thread.is_alive() and os.path.exists(task) and monotonic() < deadline:
            sleep(0)  # it outlives its join() for some microseconds

    def go_on(self) -> None:
        """After the fork, in the parent."""
        self._forks -= 1
        if not self._forks and not self.is_stopped:
            self._wake()


class Observations:
    """The observers of one pool."""

    def __init__(self, pool_name: str) -> None:
        self._pool_name = pool_name
        self._running: tuple[Observation, ...] = ()
        self.on_change: Callable[[], Callable[[], object] | None] = _nothing
        """A weak reference to what is to be called when there is the first, or none any more."""

    def __bool__(self) -> bool:
        return bool(self._running)

    def add(self, observer: Observer) -> Observation:
        """One more."""
        observation = Observation(self._pool_name, observer)
        with _changing:
            self._running = (*self._running, observation)
        self._changed()
        return observation

    def note(self, kind: type[Event], *details: Any) -> None:
        """Have an event told to each of them."""
        if self._running:
            event = (kind, monotonic(), details)
            for observation in self._running:
                if observation.is_stopped:
                    self._remove_stopped()
                else:
                    observation.note(event)

    def _remove_stopped(self) -> None:
        with _changing:
            self._running = tuple(each for each in self._running if not each.is_stopped)
        self._changed()

    def _changed(self) -> None:
        if (call := self.on_change()) is not None:
            call()


def _nothing() -> None:
    """In place of what is not there yet."""


_all: weakref.WeakSet[Observation] = weakref.WeakSet()
_changing = threading.RLock()  # a finalizer may end an observation in the midst of this


class _Forking(threading.local):
    """What the calling thread has paused for its fork."""

    paused: tuple[Observation, ...] = ()


_forking = _Forking()


def _before_fork() -> None:
    with _changing:
        _forking.paused = tuple(each for each in _all if not each.is_stopped)
        for observation in _forking.paused:
            observation.ask_to_pause()
    for observation in _forking.paused:
        observation.await_pause()


def _after_fork_in_parent() -> None:
    paused, _forking.paused = _forking.paused, ()
    with _changing:
        for observation in paused:
            observation.go_on()


def _after_fork_in_child() -> None:
    global _changing
    _changing = threading.RLock()  # another thread may have held it
    _forking.paused = ()
    for observation in tuple(_all):
        observation._begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
