"""What an examination of a server has found: plain facts, without a judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


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
class Capacity:
    """How many sessions the server takes, and how many it has. The one that asked is not counted."""

    max_connections: int
    superuser_reserved: int
    reserved: int
    is_superuser: bool
    may_use_reserved: bool
    used: int
    used_is_exact: bool
    """False where the role may not see of what kind the sessions of others are; then it may be some too many."""
    role_limit: int | None
    role_used: int
    database_limit: int | None
    database_used: int

    @property
    def withheld(self) -> int:
        """The places that are kept for others."""
        if self.is_superuser:
            return 0
        return self.superuser_reserved + (0 if self.may_use_reserved else self.reserved)

    @property
    def free(self) -> int:
        """How many sessions this role can have in this database now."""
        limits = [self.max_connections - self.withheld - self.used]
        if not self.is_superuser:  # whom these limits do not hold
            if self.role_limit is not None:
                limits.append(self.role_limit - self.role_used)
            if self.database_limit is not None:
                limits.append(self.database_limit - self.database_used)
        return max(0, min(limits))


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
