"""Calls that run in threads of their own, and what becomes of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PATIENCE = 20.0


class Running(Generic[T]):
    """A call that goes on in a daemon thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"test: {function!r}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001 — for result() and error()
            self._error = error

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def error(self, timeout: float = PATIENCE) -> BaseException | None:
        """What it raised, once it has ended; it fails past `timeout` seconds."""
        self._thread.join(timeout)
        assert self.done, f"not ended within {timeout:g} s"
        return self._error

    def result(self, timeout: float = PATIENCE) -> T:
        """What it returned, once it has ended; raises what it raised."""
        if error := self.error(timeout):
            raise error
        return cast("T", self._result)


def in_thread(function: Callable[[], T]) -> Running[T]:
    """Start a call in a thread of its own."""
    return Running(function)


def in_threads(count: int, function: Callable[[], T]) -> list[Running[T]]:
    """Start the same call in several threads, all let go at once."""
    barrier = threading.Barrier(count)

    def run() -> T:
        barrier.wait(PATIENCE)
        return function()

    return [Running(run) for _ in range(count)]
