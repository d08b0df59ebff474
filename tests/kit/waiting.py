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

# Enough for a machine that has much else to do; less than the pool's own `check_interval`, which would hide that
# something is noticed by a ping only.
PATIENCE = 20.0


@overload
async def eventually(condition: Callable[[], Awaitable[T]], *, timeout: float = PATIENCE) -> T: ...
@overload
async def eventually(condition: Callable[[], T], *, timeout: float = PATIENCE) -> T: ...
async def eventually(condition: Callable[[], object], *, timeout: float = PATIENCE) -> object:
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


def eventually_blocking(condition: Callable[[], T], *, timeout: float = PATIENCE) -> T:
    """The same for a test without an event loop."""
    deadline = time.monotonic() + timeout
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout:g} s; last: {outcome!r}")
        time.sleep(POLL_INTERVAL)
    return outcome
