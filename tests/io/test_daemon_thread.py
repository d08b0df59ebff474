"""What runs in a daemon thread is nowhere shown, whatever it returns or raises."""

from __future__ import annotations

import asyncio

import pytest

from asyncpool._io.daemon_thread import in_daemon_thread

SECRET = "sesame"


def returns() -> str:
    return SECRET


def raises() -> str:
    raise ValueError(SECRET)


@pytest.mark.parametrize("function", [returns, raises])
async def test_its_outcome_is_not_seen_in_the_task_that_waits_for_it(function: object) -> None:
    """A task's repr shows the future that it waits for, and of one that is done also its outcome."""
    assert callable(function)
    loop = asyncio.get_running_loop()
    seen: list[str] = []
    task = asyncio.ensure_future(in_daemon_thread(function, "test"))

    def look() -> None:
        seen.append(repr(task))
        if not task.done():
            loop.call_soon(look)

    look()
    await asyncio.wait((task,), timeout=20)
    assert any("wait_for=<Future finished" in text for text in seen)
    assert not any(SECRET in text for text in seen[:-1])
    if function is returns:
        assert task.result() == SECRET
    else:
        with pytest.raises(ValueError, match=SECRET):
            task.result()
