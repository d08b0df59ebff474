"""What the tests of one-shot statements share: the ways that they may go, and statements that wait on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kit.servers import Admin

# Seconds: no statement of a test takes so long.
NEVER = 1e6


def lanes_know_as_slow(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what average on a statement takes a lease of its own."""
    monkeypatch.setattr("asyncpool._core.lanes.SLOW", seconds)


@pytest.fixture
def nothing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has to do besides, no statement takes a lease of its own for having been slow."""
    lanes_know_as_slow(NEVER, monkeypatch)


@pytest.fixture
def nothing_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late an answer is, and however long what is in flight will take, a lane takes more statements."""
    monkeypatch.setattr("asyncpool._core.lanes.LANE_STALL", NEVER)
    monkeypatch.setattr("asyncpool._core.lanes.LANE_WORK", NEVER)


@pytest.fixture
def gate(admin: Admin, application_name: str) -> Iterator[Gate]:
    """Statements that wait on the server until they are let go on."""
    gate = Gate(admin, application_name)
    yield gate
    gate.open()


def on_a_lane(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    lanes_know_as_slow(NEVER, monkeypatch)
    return {"lanes": 1}


def on_leases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"lanes": 0}


def known_as_slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    lanes_know_as_slow(-1.0, monkeypatch)
    return {"lanes": 1}


def with_a_setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    async def setup(conn: object) -> None:
        """What it would do makes no difference."""

    return {"lanes": 1, "setup": setup}


WAYS: list[Callable[[pytest.MonkeyPatch], dict[str, Any]]] = [on_a_lane, on_leases, known_as_slow, with_a_setup]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a pool for each of the ways that a statement may go: in all that is visible they are the same."""
    options: dict[str, Any] = request.param(monkeypatch)
    return options
