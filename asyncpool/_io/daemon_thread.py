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
    # What the function returns or raises may hold a password: it is nowhere where a repr, a task's above all, shows it.
    over: asyncio.Future[None] = loop.create_future()
    results: list[T] = []
    error: BaseException | None = None

    def wake() -> None:
        if not over.done():
            over.set_result(None)

    def run() -> None:
        nonlocal error
        try:
            results.append(function())
        except BaseException as ex:
            error = ex
            if isinstance(ex, StopIteration) or not isinstance(ex, Exception):
                error = RuntimeError(brief(ex))
                error.__cause__ = ex
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(wake)

    threading.Thread(target=run, name=name, daemon=True).start()
    await over
    if error is not None:
        try:
            raise error
        finally:
            error = None  # it refers to this frame
    return results[0]
