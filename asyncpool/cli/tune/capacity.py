"""How many more sessions a server lets this role have in this database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psycopg import AsyncConnection

# Roles that may not look at others' sessions see these, but not of what kind they are; a server's own processes
# belong to no role. `reserved_connections` came with version 16.
QUESTION = b"""
    with client as (
        select usesysid, datid from pg_catalog.pg_stat_activity
        where usesysid is not null and coalesce(backend_type, 'client backend') = 'client backend'
        and pid <> pg_catalog.pg_backend_pid()
    )
    select
        pg_catalog.current_setting('max_connections')::int,
        pg_catalog.current_setting('superuser_reserved_connections')::int
            + coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::int,
        (select count(*) from client)::int,
        role.rolconnlimit, role.rolsuper, (select count(*) from client where usesysid = role.oid)::int,
        base.datconnlimit, (select count(*) from client where datid = base.oid)::int
    from pg_catalog.pg_roles role, pg_catalog.pg_database base
    where role.rolname = session_user and base.datname = pg_catalog.current_database()
"""


@dataclass(frozen=True, slots=True)
class Capacity:
    """`free` is how many more sessions there can be, ours not counted; `limit` is what bounds it, in words."""

    free: int
    limit: str


async def read_capacity(conn: AsyncConnection[Any]) -> Capacity:
    """Ask the server, by a session that is going to end. Raises psycopg.Error."""
    cursor = await conn.execute(QUESTION)
    row = await cursor.fetchone()
    assert row is not None
    maximum, reserved, used, role_limit, is_superuser, of_role, database_limit, of_database = row
    places = [Capacity(maximum - reserved - used, f"max_connections {maximum}, {reserved} reserved, {used} in use")]
    # A limit of -1 is none, and superusers have none.
    if role_limit >= 0 and not is_superuser:
        places.append(Capacity(role_limit - of_role, f"this role's limit of {role_limit}, {of_role} in use"))
    if database_limit >= 0 and not is_superuser:
        places.append(
            Capacity(database_limit - of_database, f"this database's limit of {database_limit}, {of_database} in use")
        )
    tightest = min(places, key=lambda place: place.free)
    return Capacity(max(0, tightest.free), tightest.limit)
