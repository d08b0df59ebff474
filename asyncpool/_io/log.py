"""The pool's log. What repeats itself is told once a minute, with a count, and never in a flood."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from threading import RLock
from time import monotonic
from typing import Any

logger = logging.getLogger("asyncpool")

# Seconds in which lines of one kind are one line.
REPEATED_WITHIN = 60.0


class _Repeated:
    """Lines of one kind, of which the first of the last minute was told."""

    def __init__(self, told_at: float) -> None:
        self.told_at = told_at
        self.more = 0
        self.level = logging.NOTSET
        self.line = ""
        self.timer: asyncio.TimerHandle | None = None


class Log:
    """The log of one pool. Any thread may write to it."""

    def __init__(self, pool_name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._pool_name = pool_name
        self._loop = loop
        self._lock = RLock()  # a finalizer may write in the midst of this
        self._kinds: dict[str, _Repeated] = {}

    def write(self, level: int, kind: str, text: str, *args: Any, exc_info: BaseException | None = None) -> None:
        """A line of a kind that may come often. Of those of a minute, the first is told at once and the last with a
        count; each of them at DEBUG.
        """
        now = monotonic()
        line = text % args  # what is kept must not be an error, whose traceback may hold a connection
        with self._lock:
            repeated = self._kinds.get(kind)
            if repeated is not None and now < repeated.told_at + REPEATED_WITHIN:
                repeated.more += 1
                repeated.level, repeated.line = max(level, repeated.level), line
                if repeated.more == 1:
                    self._tell_later(repeated, repeated.told_at + REPEATED_WITHIN - now)
                level = logging.DEBUG
            else:
                self._kinds[kind] = _Repeated(now)
        logger.log(level, f"%s: {text}", self._pool_name, *args, exc_info=exc_info)  # noqa: G004  # a constant

    def _tell_later(self, repeated: _Repeated, seconds: float) -> None:
        def schedule() -> None:
            repeated.timer = self._loop.call_later(seconds, self._tell, repeated)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(schedule)

    def _tell(self, repeated: _Repeated) -> None:
        with self._lock:
            more, repeated.more = repeated.more, 0
            level, repeated.level = repeated.level, logging.NOTSET
            repeated.told_at = monotonic()
            repeated.timer = None
        if more == 1:
            logger.log(level, "%s: %s", self._pool_name, repeated.line)
        elif more:
            text = "%s: %s; the last of %d like it within a minute"
            logger.log(level, text, self._pool_name, repeated.line, more)

    def close(self) -> None:
        """Tell what was only counted so far."""
        for repeated in tuple(self._kinds.values()):
            if repeated.timer is not None:
                repeated.timer.cancel()
            self._tell(repeated)
        self._kinds.clear()
