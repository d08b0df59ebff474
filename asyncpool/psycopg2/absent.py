"""What of psycopg2 is not here, and what to use for it."""

from __future__ import annotations

_REMEDIES = {
    "extras": "for rows as dictionaries give row_factory=psycopg.rows.dict_row, for much data use cursor.executemany()"
    " or cursor.copy(), for JSON psycopg.types.json.Jsonb",
    "extensions": "isolation levels are psycopg.IsolationLevel, a transaction's status is"
    " conn.info.transaction_status, types are registered with psycopg.adapters",
}


def what_to_use_for(module: str) -> str:
    """In words, for an error."""
    return f"asyncpool.psycopg2 has no {module}: {_REMEDIES[module]}"
