"""Connection strings out of nothing, guided by coverage: `nox -s fuzz`, or `python tests/faults/fuzz_conninfo.py` with
libFuzzer's options, such as -max_total_time=60 (seconds). Needs atheris.

Whatever the string is, it is taken or refused with ProgrammingError, and neither the refusal nor a connect error tells
the password that it holds.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

if importlib.util.find_spec("atheris") is None:
    raise SystemExit("atheris is not installed here: nothing is fuzzed")

from psycopg import ProgrammingError

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["asyncpool.conninfo", "psycopg.conninfo"]):
    from asyncpool.conninfo import Redactor, describe, needs_lookup, parse

MARK = "Zq7xW9kPvJ4"
PLACES = ["postgresql://app:%s%s@127.0.0.1:1/orders", "host=db password=%s %s", "postgresql://db/x?password=%s&%s"]


def try_one(data: bytes) -> None:
    """One string, with or without a password in it."""
    provider = atheris.FuzzedDataProvider(data)
    place = provider.ConsumeIntInRange(0, len(PLACES))
    text = provider.ConsumeUnicode(200)
    conninfo = text if place == len(PLACES) else PLACES[place] % (MARK, text)
    redactor = Redactor(conninfo, {})
    try:
        params = parse(conninfo, {})
    except ProgrammingError as error:
        shown = f"{error!s} {error!r} {error.__cause__!r} {error.__context__!r}"
    else:
        needs_lookup(params)
        host, dbname = params.get("host"), params.get("dbname")
        shown = describe(params, redactor) + redactor.redact(f'"{host}" {host!r} database "{dbname}" does not exist')
    if MARK in shown:
        raise AssertionError(f"{conninfo!r} is told: {shown}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
