"""The kinds of storms, and how often each comes in a chaos run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

from kit.loops import loop_factories

from .plan import Mode, Plan

Draw: TypeAlias = Callable[[Random], dict[str, Any]]

SIZES = ((0, 1), (1, 1), (0, 4), (1, 4), (4, 4), (2, 10), (10, 10))
MODES: tuple[Mode, ...] = ("rollback", "rollback", "session", "discard")


@dataclass(frozen=True)
class Kind:
    """What all storms of a kind have in common; `draw` gives what differs, as fields of a Plan."""

    name: str
    weight: int
    draw: Draw
    needs_own_server: bool = False

    def plan(self, seed: int, **fixed: Any) -> Plan:
        """The storm of that seed; `fixed` instead of what is drawn."""
        rng = Random(f"{self.name}/{seed}")
        min_size, max_size = rng.choice(SIZES)
        common: dict[str, Any] = {
            "tasks": rng.choice((200, 500, 1000, 2000)),
            "crowd": max_size * rng.choice((1, 3, 10)) + rng.randrange(5),
            "loop": rng.choice(sorted(loop_factories())),
            "min_size": min_size,
            "max_size": max_size,
            "reset": rng.choice(MODES),
            "autocommit": rng.random() < 0.3,
            "debug_loop": rng.random() < 0.1,
        }
        return Plan(kind=self.name, seed=seed, **{**common, **self.draw(rng), **fixed})


def draw_cancel(_: Random) -> dict[str, Any]:
    return {}


def draw_messy(rng: Random) -> dict[str, Any]:
    return {"messy": True, "options": {"debug": rng.random() < 0.2}}


def draw_hooks(rng: Random) -> dict[str, Any]:
    names = ["configure", "setup", "check", "reset"]
    hooks = frozenset(rng.sample(names, rng.randint(1, len(names))))
    return {"hooks": hooks, "messy": rng.random() < 0.5, "options": {"check_interval": rng.choice((0, 0.005, 30))}}


def draw_turnover(rng: Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_uses": rng.choice((None, 1, 2, 10)),
        "max_lifetime": rng.choice((None, 0.1, 0.5)),
        "max_idle": rng.choice((None, 0.01, 0.1)),
        "check_interval": rng.choice((0, 0.01, 30)),
        "max_connecting": rng.choice((1, 4)),
    }
    disturbances = tuple(rng.sample(("resize", "drain", "check"), rng.randint(1, 3)))
    return {"options": options, "disturbances": disturbances, "messy": rng.random() < 0.5}


def draw_terminate(rng: Random) -> dict[str, Any]:
    more = tuple(rng.sample(("resize", "drain", "check"), rng.randint(0, 2)))
    return {"disturbances": ("terminate", *more), "messy": rng.random() < 0.5}


def draw_restart(rng: Random) -> dict[str, Any]:
    return {"disturbances": ("restart",), "messy": rng.random() < 0.5, "tasks": rng.choice((2000, 5000))}


def with_one_shots(draw: Draw) -> Draw:
    def drawn(rng: Random) -> dict[str, Any]:
        few = rng.randint(1, 4)
        mixed: dict[str, Any] = {
            **draw(rng),
            "min_size": rng.randint(0, few),
            "max_size": few,
            "crowd": rng.choice((4, 20, 60)),
        }
        given: dict[str, Any] = mixed.get("options", {})
        options = {"lanes": rng.choice((0, 1, 2, 2)), "prepare_threshold": rng.choice((None, 1, 5))}
        return {**mixed, "one_shots": rng.choice((0.3, 0.7, 1.0)), "options": {**given, **options}}

    return drawn


def in_threads(draw: Draw) -> Draw:
    def drawn(rng: Random) -> dict[str, Any]:
        crowd = rng.choice((4, 8, 16))
        return {"tasks": rng.choice((200, 500)), **draw(rng), "threads": True, "crowd": crowd}

    return drawn


KINDS = {
    kind.name: kind
    for kind in (
        Kind("cancel", 3, draw_cancel),
        Kind("messy", 3, draw_messy),
        Kind("hooks", 3, draw_hooks),
        Kind("turnover", 3, draw_turnover),
        Kind("terminate", 3, draw_terminate),
        Kind("restart", 1, draw_restart, needs_own_server=True),
        Kind("one-shots", 2, with_one_shots(draw_cancel)),
        Kind("one-shots, hooks", 1, with_one_shots(draw_hooks)),
        Kind("one-shots, turnover", 2, with_one_shots(draw_turnover)),
        Kind("one-shots, terminate", 2, with_one_shots(draw_terminate)),
        Kind("one-shots, restart", 1, with_one_shots(draw_restart), needs_own_server=True),
        Kind("threads", 1, in_threads(draw_messy)),
        Kind("threads, hooks", 1, in_threads(draw_hooks)),
        Kind("threads, turnover", 1, in_threads(draw_turnover)),
        Kind("threads, terminate", 1, in_threads(draw_terminate)),
        Kind("threads, restart", 1, in_threads(draw_restart), needs_own_server=True),
    )
}
