"""An event loop in virtual time: what would wait is done at once, and the clock says that the time has passed.

Sockets are real, and so is everything that is done on them; both ends must be in this one loop, so that whatever is
under way has arrived when the loop looks. When nothing has, the clock moves on to the next timer.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

T = TypeVar("T")

# What a turn of the loop takes, in seconds: a clock that stands still would have timers fire before they are due by
# the rounding of a float, again and again.
TURN = 1e-6
# More turns without a timer than any test needs: something spins.
MAX_TURNS_AT_ONCE = 50_000

BEGINNING = 1000.0


class Stuck(AssertionError):
    """Nobody will ever wake this loop: something is waited for that cannot come."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop but for its clock."""

    def __init__(self) -> None:
        self.now = BEGINNING
        super().__init__(_VirtualSelector(self))

    def time(self) -> float:
        """Seconds of virtual time."""
        return self.now


class _VirtualSelector(selectors.BaseSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._selector = selectors.DefaultSelector()
        self._turns = 0
        self.register = self._selector.register  # type: ignore[method-assign]
        self.unregister = self._selector.unregister  # type: ignore[method-assign]
        self.modify = self._selector.modify  # type: ignore[method-assign]
        self.get_key = self._selector.get_key  # type: ignore[method-assign]
        self.close = self._selector.close  # type: ignore[method-assign]

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        raise NotImplementedError  # the real selector's, set on the instance

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        raise NotImplementedError

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        events = self._selector.select(0)
        loop.now += TURN
        if events or timeout == 0:
            self._turns += 1
            assert self._turns < MAX_TURNS_AT_ONCE, "something keeps the loop busy, and no time passes"
            return events
        self._turns = 0
        if timeout is None:
            raise Stuck("nothing is under way, and no timer runs")
        loop.now += timeout
        return []


@contextmanager
def virtual_loop() -> Iterator[VirtualLoop]:
    """A virtual loop, whose clock is also that of asyncpool and psycopg while the block lasts."""
    loop = VirtualLoop()
    patched = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("asyncpool", "psycopg") and getattr(module, "monotonic", None) is time.monotonic
    ]
    for module in patched:
        module.monotonic = loop.time  # type: ignore[attr-defined]
    try:
        yield loop
    finally:
        for module in patched:
            module.monotonic = time.monotonic  # type: ignore[attr-defined]
        loop.close()


def run_virtually(work: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run `work(loop)` in a virtual loop of its own; what it leaves there is cancelled."""
    with virtual_loop() as loop, asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(work(loop))
