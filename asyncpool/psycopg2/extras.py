"""psycopg2.extras is not here: importing this says what to use for it."""

from __future__ import annotations

from .absent import what_to_use_for

raise ImportError(what_to_use_for("extras"))
