"""psycopg's composition of SQL, for `from asyncpool.psycopg2.sql import SQL`."""

from __future__ import annotations

from psycopg.sql import *  # noqa: F403 - whatever a script may look for
