"""Event loops: a test runs on asyncio's own, or, with this mark, on uvloop as well."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable

import pytest

# Where uvloop is not installed, its half is skipped and says so.
on_both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

on_uvloop = pytest.mark.asyncio(loop_factories=["uvloop"])

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def loop_factories() -> dict[str, LoopFactory]:
    """The event loops that this environment has."""
    factories: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories
