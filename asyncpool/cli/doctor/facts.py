"""What an examination of a server has found: plain facts, without a judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncpool.cli.capacity import Capacity


class PoolMode(Enum):
    """How long a pooler in between leaves a server connection with its client; the names are PgBouncer's."""

    SESSION = "session"
    TRANSACTION = "transaction"
    STATEMENT = "statement"

    @property
    def is_shared(self) -> bool:
        """Whether other clients have the same server connection in between."""
        return self is not PoolMode.SESSION


class Prepared(Enum):
    """Whether a prepared statement is there when it is executed later on."""

    USABLE = "usable"
    LOST = "lost"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Pooler:
    """What stands in between and speaks PostgreSQL's protocol itself."""

    product: str | None
    version: str | None = None
    mode: PoolMode | None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of its own, where the role may see them."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How the connection that was made is encrypted, as far as the first peer."""

    in_use: bool
    protocol: str | None = None
    cipher: str | None = None
    sslmode: str = "prefer"
    """What was asked for, in libpq's words."""

    @property
    def is_verified(self) -> bool:
        """Whether the peer had to prove who it is."""
        return self.in_use and self.sslmode in ("verify-ca", "verify-full")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All of them. None: it could not be asked; then `unanswered` has the server's words."""

    place: str
    user: str
    is_remote: bool
    """On TCP, and not to this machine."""
    given: frozenset[str]
    """The names of the connection parameters that were given."""
    target_session_attrs: str
    server_version: str
    product: str
    """`PostgreSQL`, or what else calls itself by another name."""
    round_trip_ms: float
    capacity: Capacity | None
    pooler: Pooler | None
    passed_on: bool
    """Whether the server sees the connection come from another port: a proxy or an address translation."""
    prepared: Prepared
    tls: Tls
    is_standby: bool | None
    settings: Mapping[str, str]
    """The server's, for this role in this database; times in ms as the server stores them, or in s."""
    unanswered: Mapping[str, str] = field(default_factory=dict)

    def milliseconds(self, name: str) -> int | None:
        """A setting that is a time in ms; 0 is no limit, None where the server does not know it."""
        value = self.settings.get(name)
        return int(value) if value is not None and value.lstrip("-").isdigit() else None
