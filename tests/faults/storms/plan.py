"""What one storm is to be: drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["rollback", "session", "discard"]

# A server that is busy, or a machine that is, must not look like one that does not answer.
PATIENT = 20.0


@dataclass(frozen=True)
class Plan:
    """One storm. Everything random in it comes from `seed`, as far as the server's timing allows."""

    kind: str
    seed: int
    tasks: int = 500
    crowd: int = 20
    """How many tasks there are at a time."""
    loop: str = "asyncio"
    threads: bool = False
    """A SyncPool, and threads in place of tasks."""
    min_size: int = 1
    max_size: int = 4
    reset: Mode = "rollback"
    autocommit: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Further ones of the pool."""
    messy: bool = False
    """Clients close and drop their connections, give them back twice and in the middle of something."""
    one_shots: float = 0.0
    """In place of how many leases, as a share, clients send one-shot statements."""
    hooks: frozenset[str] = frozenset()
    """Which of `configure`, `setup`, `check`, `reset` are there: slow, and failing."""
    disturbances: tuple[str, ...] = ()
    """What happens to the pool and its server meanwhile: names in `disturbances.py`."""
    debug_loop: bool = False

    @property
    def is_calm(self) -> bool:
        """Whether nothing but cancellations and errors of the clients' own happens: none may cost a connection."""
        turnover = {"max_uses", "max_lifetime", "max_idle"} & set(self.options)
        return not (self.messy or self.hooks or self.disturbances or turnover)

    @property
    def loses_sessions(self) -> bool:
        """Whether the server, or the way to it, fails: then its errors reach the clients."""
        return bool({"terminate", "restart", "network"} & set(self.disturbances))

    @property
    def cleans_sessions(self) -> bool:
        """Whether what a client leaves on its server session is undone at the end of the lease."""
        return self.reset != "rollback" and "reset" not in self.hooks

    def describe(self) -> str:
        """In a line, for whoever looks at a failure."""
        workers = "threads" if self.threads else "tasks"
        debug = " in debug mode" if self.debug_loop else ""
        parts = [
            f"{self.tasks} {workers}, {self.crowd} at a time, on {self.loop}{debug}",
            f"{self.min_size} to {self.max_size} connections",
            f"reset={self.reset}",
            "autocommit" if self.autocommit else "",
            "messy" if self.messy else "",
            f"{self.one_shots:.0%} one-shots" if self.one_shots else "",
            *(f"{name}={value}" for name, value in self.options.items()),
            *(f"failing {hook}" for hook in sorted(self.hooks)),
            *self.disturbances,
        ]
        return ", ".join(part for part in parts if part)
