"""Telling observers what happens in a pool, in threads of their own: their errors and their pace are not the pool's."""

from __future__ import annotations

import logging
import threading
from collections import deque
from time import monotonic, sleep
from typing import Any

from ..events import Event, Observer
from .log import logger

# Events that an observer may be behind; what comes then is not told. They take some 200 bytes each.
MAX_BEHIND = 100_000
# Seconds for which events are gathered: waking a thread for each of them would take more of a service's time than they.
GATHERING = 0.02
# Seconds between two lines in the log about the same observer.
TOLD_EVERY = 60.0


class Observation:
    """One observer of one pool, from `pool.observe()` until `stop()`."""

    def __init__(self, pool_name: str, observer: Observer) -> None:
        self._pool_name = pool_name
        self._observer = observer
        self._events: deque[tuple[type[Event], float, tuple[Any, ...]]] = deque()
        self._dropped = 0
        self._errors = 0
        self._logged_at = -TOLD_EVERY
        self._logged = (0, 0)
        self.is_stopped = False
        self.start()

    def __repr__(self) -> str:
        state = "stopped" if self.is_stopped else f"{len(self._events)} to tell, {self._dropped} dropped"
        return f"<Observation of {self._pool_name!r}: {state}>"

    @property
    def dropped(self) -> int:
        """Events that were not told, as the observer was too far behind."""
        return self._dropped

    def start(self) -> None:
        """Begin to tell; anew in a forked child, where what came before is the parent's to tell."""
        self._events.clear()
        self._telling = threading.RLock()  # an observer may flush
        self._something = threading.Event()
        name = f"asyncpool {self._pool_name}: tell an observer"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def note(self, kind: type[Event], at: float, *details: Any) -> None:
        """Have an event told, soon. From any thread, at any moment."""
        if len(self._events) >= MAX_BEHIND:
            self._dropped += 1
            return
        self._events.append((kind, at, details))
        if not self._something.is_set():
            self._something.set()

    def _run(self) -> None:
        while not self.is_stopped:
            self._something.wait()
            sleep(GATHERING)
            self._something.clear()
            self.flush()

    def flush(self) -> None:
        """Tell, before this returns, all that has happened so far: in the calling thread, for as long as that takes."""
        with self._telling:
            for _ in range(len(self._events)):
                kind, at, details = self._events.popleft()
                try:
                    self._observer(kind(self._pool_name, at, *details))
                except Exception as error:
                    self._errors += 1
                    self._log("its last error", error)
            if self._dropped > self._logged[1]:
                self._log("it is too slow", None)

    def _log(self, what: str, error: Exception | None) -> None:
        now = monotonic()
        if now >= self._logged_at + TOLD_EVERY:
            errors, dropped = self._errors - self._logged[0], self._dropped - self._logged[1]
            self._logged_at, self._logged = now, (self._errors, self._dropped)
            text = "%s: an observer has failed on %d events, and %d were dropped; %s"
            logger.log(logging.WARNING, text, self._pool_name, errors, dropped, what, exc_info=error)

    def stop(self) -> None:
        """Tell what has happened so far, soon, and nothing more."""
        self.is_stopped = True
        self._something.set()


class Observations:
    """The observers of one pool."""

    def __init__(self, pool_name: str) -> None:
        self._pool_name = pool_name
        self._running: tuple[Observation, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._running)

    def add(self, observer: Observer) -> Observation:
        """One more."""
        observation = Observation(self._pool_name, observer)
        self._running = (*self._running, observation)
        return observation

    def note(self, kind: type[Event], *details: Any) -> None:
        """Have an event told to each of them."""
        if self._running:
            now = monotonic()
            for observation in self._running:
                if observation.is_stopped:
                    self._running = tuple(each for each in self._running if not each.is_stopped)
                else:
                    observation.note(kind, now, *details)

    def stop(self) -> None:
        """End all; what has happened is told still."""
        for observation in self._running:
            observation.stop()

    def restart(self) -> None:
        """In a forked child: threads do not come along."""
        for observation in self._running:
            observation.start()
