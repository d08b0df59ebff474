"""psycopg's composition of SQL, for `from asyncpool.psycopg2.sql import SQL`."""

from __future__ import annotations

from psycopg.sql import DEFAULT, NULL, SQL, Composable, Composed, Identifier, Literal, Placeholder

__all__ = ["DEFAULT", "NULL", "SQL", "Composable", "Composed", "Identifier", "Literal", "Placeholder"]
