"""How many more sessions a server lets a role have in a database: what `doctor` tells and `tune` keeps to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Others' rows are there for every role; of what kind their sessions are is not. Of these, one with a database and a
# user is a client's, or a parallel worker's.
QUESTION = """
    with me as (
        select r.oid, r.rolsuper, r.rolconnlimit from pg_catalog.pg_roles r where r.rolname = session_user
    ), place as (
        select d.oid, d.datconnlimit from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()
    ), client as (
        select a.usesysid, a.datid, a.backend_type is not null as is_sure from pg_catalog.pg_stat_activity a
        where a.pid <> pg_catalog.pg_backend_pid() and a.usesysid is not null
            and (a.backend_type = 'client backend' or a.backend_type is null and a.datid is not null)
    )
    select pg_catalog.current_setting('max_connections'),
        pg_catalog.current_setting('superuser_reserved_connections'),
        coalesce(pg_catalog.current_setting('reserved_connections', true), '0'),
        me.rolsuper,
        exists (
            select from pg_catalog.pg_roles r where r.rolname = 'pg_use_reserved_connections'
                and pg_catalog.pg_has_role(session_user, r.oid, 'usage')
        ),
        (select count(*) from client),
        (select coalesce(bool_and(is_sure), true) from client),
        me.rolconnlimit,
        (select count(*) from client where usesysid = me.oid),
        place.datconnlimit,
        (select count(*) from client where datid = place.oid)
    from me, place
"""


# The server's text, and Python's.
TRUE = ("t", "True")


class Whose(Enum):
    """What a limit of sessions belongs to."""

    SERVER = "server"
    ROLE = "role"
    DATABASE = "database"


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
        """The places that are kept for others, or for an administrator in need: also a superuser's pool is neither."""
        return self.superuser_reserved + self.reserved

    @property
    def free(self) -> int:
        """How many sessions a pool of this role can have in this database now."""
        return self._tightest[0]

    @property
    def limit(self) -> str:
        """What bounds that, in words."""
        return self._tightest[1]

    @property
    def whose(self) -> Whose:
        """Whose limit that is."""
        return self._tightest[2]

    @property
    def _tightest(self) -> tuple[int, str, Whose]:
        server = f"max_connections {self.max_connections}, {self.withheld} reserved, {self.used} in use"
        places = [(self.max_connections - self.withheld - self.used, server, Whose.SERVER)]
        if not self.is_superuser:  # whom these limits do not hold
            for whose, limit, used in (
                (Whose.ROLE, self.role_limit, self.role_used),
                (Whose.DATABASE, self.database_limit, self.database_used),
            ):
                if limit is not None:
                    places.append((limit - used, f"this {whose.value}'s limit of {limit}, {used} in use", whose))
        free, limit_in_words, tightest = min(places, key=lambda place: place[0])
        return max(0, free), limit_in_words, tightest


def capacity_of(row: Sequence[object]) -> Capacity:
    """Of the row that answers QUESTION, as text or as Python's values."""
    texts = [str(value) for value in row]
    numbers = [int(text) if text.lstrip("-").isdigit() else 0 for text in texts]
    return Capacity(
        max_connections=numbers[0],
        superuser_reserved=numbers[1],
        reserved=numbers[2],
        is_superuser=texts[3] in TRUE,
        may_use_reserved=texts[4] in TRUE,
        used=numbers[5],
        used_is_exact=texts[6] in TRUE,
        role_limit=numbers[7] if numbers[7] >= 0 else None,
        role_used=numbers[8],
        database_limit=numbers[9] if numbers[9] >= 0 else None,
        database_used=numbers[10],
    )
