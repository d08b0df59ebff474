"""psycopg's errors, for `from asyncpool.psycopg2.errors import UniqueViolation`."""

from __future__ import annotations

# All that there are: one for each of the server's, some 250.
from psycopg.errors import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]
