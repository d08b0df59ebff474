"""psycopg's errors, for `from asyncpool.psycopg2.errors import UniqueViolation`."""

from __future__ import annotations

from psycopg.errors import *  # noqa: F403 - whatever a script may look for
