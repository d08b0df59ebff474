"""Nothing is lost: what holds after a storm of tasks that are cancelled, timed out, or fail at random points.

The long run of the same is `nox -s chaos`. The seed of each storm here is fixed, so that whoever breaks something sees
it again; what is random beyond that is the server's timing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from faults.storms.engine import run_storm
from faults.storms.grounds import Grounds
from faults.storms.kinds import KINDS
from kit.loops import loop_factories

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Server

    from asyncpool.cli.embedded import EmbeddedServer

# A machine with nothing else to do needs some 2 s for the longest.
pytestmark = pytest.mark.timeout(180)

FOUR: dict[str, Any] = {"min_size": 1, "max_size": 4, "crowd": 20}

on_each_loop = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@pytest.fixture
def grounds(server: Server) -> Iterator[Grounds]:
    """The shared server."""
    grounds = Grounds(server.dsn)
    yield grounds
    grounds.close()


@pytest.fixture
def own_grounds(private_server: EmbeddedServer) -> Iterator[Grounds]:
    """A server that the storm may restart."""
    grounds = Grounds(private_server.dsn(), private_server)
    yield grounds
    grounds.close()


def assert_nothing_is_lost(kind: str, seed: int, grounds: Grounds, **fixed: Any) -> None:
    if fixed.get("loop", "asyncio") not in loop_factories():
        pytest.skip("uvloop is not installed")
    record = run_storm(KINDS[kind].plan(seed, **fixed), grounds)
    assert record.violations == [], f"{kind}, storm {seed}"
    assert record.operations["tasks"] == fixed["tasks"]
    assert record.ledger.acknowledged, "a storm without a commit shows nothing"


@on_each_loop
@pytest.mark.parametrize(("min_size", "max_size"), [(1, 1), (0, 4), (10, 10)])
def test_a_storm_of_cancelled_tasks_costs_no_connection(
    grounds: Grounds, loop: str, min_size: int, max_size: int
) -> None:
    fixed: dict[str, Any] = {"min_size": min_size, "max_size": max_size, "crowd": 5 * max_size}
    assert_nothing_is_lost("cancel", max_size, grounds, tasks=200 if max_size == 1 else 500, loop=loop, **fixed)


@pytest.mark.parametrize("reset", ["rollback", "session", "discard"])
def test_a_storm_of_cancelled_tasks_leaves_nothing_behind_whatever_the_reset(grounds: Grounds, reset: str) -> None:
    assert_nothing_is_lost("cancel", 7, grounds, tasks=300, loop="asyncio", **FOUR, reset=reset)


@on_each_loop
def test_a_storm_of_tasks_that_leave_their_connections_in_any_condition_loses_no_place(
    grounds: Grounds, loop: str
) -> None:
    assert_nothing_is_lost("messy", 3, grounds, tasks=400, loop=loop, **FOUR)


@pytest.mark.parametrize(
    ("loop", "hooks"),
    [
        ("asyncio", {"configure", "setup", "check", "reset"}),
        ("uvloop", {"configure", "setup", "check", "reset"}),
        ("asyncio", {"reset"}),  # `setup` would put right what it has left
    ],
)
def test_a_storm_with_failing_callables_loses_no_place(grounds: Grounds, loop: str, hooks: set[str]) -> None:
    # not in autocommit: what a failing one leaves is then a transaction
    fixed = {**FOUR, "hooks": frozenset(hooks), "autocommit": False}
    assert_nothing_is_lost("hooks", 3, grounds, tasks=200, loop=loop, **fixed)


@on_each_loop
def test_a_storm_while_the_pool_is_resized_drained_and_renewed_loses_no_place(grounds: Grounds, loop: str) -> None:
    disturbances = ("resize", "drain", "check")
    options = {"max_uses": 10, "max_lifetime": 0.5, "max_idle": 0.05, "check_interval": 0.01}
    fixed: dict[str, Any] = {"disturbances": disturbances, "options": options, "min_size": 2, "max_size": 10}
    assert_nothing_is_lost("turnover", 3, grounds, tasks=300, loop=loop, crowd=30, **fixed)


@on_each_loop
def test_a_storm_while_the_server_ends_sessions_loses_no_place_and_no_commit(grounds: Grounds, loop: str) -> None:
    assert_nothing_is_lost("terminate", 3, grounds, tasks=400, loop=loop, **FOUR)


def test_a_storm_while_the_server_is_restarted_loses_no_place_and_no_commit(own_grounds: Grounds) -> None:
    assert_nothing_is_lost("restart", 1, own_grounds, tasks=600, loop="asyncio", **FOUR)


@pytest.mark.parametrize("kind", ["threads", "threads, hooks", "threads, turnover", "threads, terminate"])
def test_a_storm_of_threads_loses_no_place_and_no_commit(grounds: Grounds, kind: str) -> None:
    assert_nothing_is_lost(kind, 5, grounds, tasks=100, **{**FOUR, "crowd": 8})
