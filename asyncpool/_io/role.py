"""What a pool that asked for a server that takes writes knows of its server's role, and how it asks."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg.pq.abc import PGconn, PGresult

_TRUE = (b"on", b"t")


@dataclass(frozen=True, slots=True)
class Role:
    """One of `target_session_attrs`: the reported settings that must not be on, and the question whose answer is no."""

    reported: tuple[bytes, ...]
    question: bytes

    def is_lost(self, pgconn: PGconn) -> bool:
        """Whether the server has reported, with its last answer, that it is not of this role.

        Before version 14 it reports nothing; a user's own SET looks the same.
        """
        return any(pgconn.parameter_status(name) == b"on" for name in self.reported)

    def is_denied(self, results: list[PGresult]) -> bool:
        """Whether this is the answer of a server that is not of this role."""
        return results[-1].get_value(0, 0) in _TRUE


_ROLES = {
    b"read-write": Role((b"in_hot_standby", b"default_transaction_read_only"), b"SHOW transaction_read_only"),
    b"primary": Role((b"in_hot_standby",), b"SELECT pg_catalog.pg_is_in_recovery()"),
}


def role_of(pgconn: PGconn) -> Role | None:
    """The role that its parameters, the environment or a service file asked for; None if it need not take writes."""
    return next(
        (_ROLES.get(option.val or b"") for option in pgconn.info if option.keyword == b"target_session_attrs"), None
    )
