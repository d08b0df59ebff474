"""Waiting for a condition, with a deadline: the tests' replacement for a sleep."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

POLL_INTERVAL = 0.005


@overload
async def eventually(condition: Callable[[], Awaitable[T]], *, timeout: float = 5.0) -> T: ...
@overload
async def eventually(condition: Callable[[], T], *, timeout: float = 5.0) -> T: ...
async def eventually(condition: Callable[[], object], *, timeout: float = 5.0) -> object:
    """Await until `condition()`, sync or async, is truthy, and return what it gave.

    Past `timeout` seconds it fails with the last value. An AssertionError of the condition means "not yet".
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            outcome = condition()
            last: object = await outcome if inspect.isawaitable(outcome) else outcome
            if last:
                return last
        except AssertionError as not_yet:
            last = not_yet
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout:g} s; last: {last!r}")
        await asyncio.sleep(POLL_INTERVAL)


def eventually_blocking(condition: Callable[[], T], *, timeout: float = 5.0) -> T:
    """The same for a test without an event loop."""
    deadline = time.monotonic() + timeout
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout:g} s; last: {outcome!r}")
        time.sleep(POLL_INTERVAL)
    return outcome
