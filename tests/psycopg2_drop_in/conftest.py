"""What the tests of the drop-in share besides servers."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def in_every_test(no_bug_reported: None) -> None:
    """Errors in the log fail the test."""
