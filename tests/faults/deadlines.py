"""How long past its deadline something ends. Each is logged: `pytest -o log_cli=true --log-cli-level=INFO`."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

figures = logging.getLogger("figures")

# So much longer that at least one attempt to connect has ended by then, on a busy machine too.
ACQUIRE_TIMEOUT = 1.0
CONNECT_TIMEOUT = 0.2


def short_deadlines(check_timeout: float) -> dict[str, Any]:
    """The options of a pool that is to give up soon, in seconds."""
    return {
        "acquire_timeout": ACQUIRE_TIMEOUT,
        "connect_timeout": CONNECT_TIMEOUT,
        "check_timeout": check_timeout,
        "cancel_timeout": check_timeout,
        "backoff_initial": 0.02,
        "backoff_max": 0.05,
    }


def patient_deadlines(check_timeout: float) -> dict[str, Any]:
    """The same for tests in which nothing is the matter with connecting, which a busy machine may take long for."""
    return {**short_deadlines(check_timeout), "acquire_timeout": 20.0, "connect_timeout": 5.0}


# Seconds that a busy machine may take beyond a deadline. On a quiet one nothing takes more than 0.1.
MARGIN = 1.5


def check_overrun(what: str, took: float, deadline: float) -> None:
    """Assert that what took `took` seconds ended by its deadline, give or take the machine's own slowness."""
    figures.info("%s: %+.1f ms beyond %g s", what, 1000 * (took - deadline), deadline)
    assert took < deadline + MARGIN, f"{what} took {took:.3f} s, its deadline is {deadline:g} s"


def altered(options: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The same options of a pool but for these."""
    return {**options, **changes}


@contextmanager
def ends_within(deadline: float, what: str) -> Iterator[None]:
    """Assert that the block ends by its deadline, in seconds from now, however it ends."""
    began = time.monotonic()
    try:
        yield
    finally:
        check_overrun(what, time.monotonic() - began, deadline)
