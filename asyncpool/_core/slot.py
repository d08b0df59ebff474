"""A slot: a place under `max_size`, and what the machine knows of the connection in it."""

from __future__ import annotations

from collections.abc import Callable

from ..events import CloseReason
from .policy import NEVER
from .states import SlotState


class Slot:
    """Its times are the machine's. `resource` is the runner's, and never looked at here."""

    __slots__ = (
        "doom",
        "expires_at",
        "fresh_until",
        "generation",
        "idle_since",
        "leased_at",
        "number",
        "owner",
        "resource",
        "retires_at",
        "state",
        "uses",
        "verified_at",
    )

    def __init__(self, number: int, generation: int) -> None:
        self.number = number
        self.generation = generation
        self.state = SlotState.CONNECTING
        self.uses = 0  # leases so far: the number of the current one while leased
        self.leased_at = self.idle_since = self.verified_at = -NEVER
        self.fresh_until = -NEVER  # may be handed out unverified before this; only meaningful while idle
        self.retires_at = NEVER  # to be replaced from here on, at leisure
        self.expires_at = NEVER  # never handed out from here on; in the past once it is doomed
        self.doom: CloseReason = CloseReason.MAX_LIFETIME  # why it is closed when it expires
        self.resource: object = None
        # Who entered the block whose lease it is, and is to end it; None: somebody may give it back. A call, so that
        # it can be a weak reference: a lease must not keep its task from being collected.
        self.owner: Callable[[], object] | None = None

    @property
    def is_disconnected(self) -> bool:
        """Whether the server has ended this session."""
        return self.expires_at == -NEVER and self.doom is CloseReason.DISCONNECTED

    def __repr__(self) -> str:
        return f"<Slot {self.number} {self.state.name}>"
