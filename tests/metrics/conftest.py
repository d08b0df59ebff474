"""What the tests of metrics share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually_blocking

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def in_every_test(no_bug_reported: None) -> Iterator[None]:
    """Errors in the log fail the test, and so does a thread that outlives its pool."""
    yield
    eventually_blocking(lambda: not any("tell an observer" in thread.name for thread in threading.enumerate()))
