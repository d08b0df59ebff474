"""Blocking functions beside the event loop, in threads that hold up nobody's exit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from .connect_errors import brief

T = TypeVar("T")


async def in_daemon_thread(function: Callable[[], T], name: str) -> T:
    """Run a blocking function where it cannot hold up the interpreter's exit, as an executor's thread would.

    Raises what it raises; what would end the event loop in its place, as SystemExit does, becomes a RuntimeError. A
    cancellation leaves the thread behind; it ends when the function does.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]  # a T where there is no error

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function()
        except BaseException as ex:
            error = ex
            if isinstance(ex, StopIteration) or not isinstance(ex, Exception):
                error = RuntimeError(brief(ex))
                error.__cause__ = ex
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer
