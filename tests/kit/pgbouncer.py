"""A real PgBouncer before a server: Debian's binary, on a free port of 127.0.0.1, as a child of the test's process."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from asyncpool.cli.embedded import _reserve_port

from .waiting import eventually_blocking

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

PoolMode = Literal["session", "transaction", "statement"]

ABSENT = "no `pgbouncer` on this machine: apt-get install pgbouncer, or what your system calls that package"

# It refuses to run as root.
UNPRIVILEGED = "nobody"

# Debian keeps it where only root looks.
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))


def find_pgbouncer() -> str:
    """The program, or skip the test."""
    if os.name != "posix" or (program := shutil.which("pgbouncer", path=SEARCH_PATH)) is None:
        pytest.skip(ABSENT)
    return program


class PgBouncer:
    """One in front of the server at `dsn`, in a pool mode. A context manager; its port stays the same across restarts.

    `settings` are of its section [pgbouncer]. Those in `users` are let in, beside the user of the dsn, without a
    password; the names that its settings `stats_users` and `admin_users` need must be among them.
    """

    def __init__(
        self, dsn: str, pool_mode: PoolMode, *, settings: Mapping[str, str | int] | None = None, users: str = ""
    ) -> None:
        self._program = find_pgbouncer()
        self._server = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
        self._settings = {"pool_mode": pool_mode, **(settings or {})}
        self._users = users.split()
        self._process: subprocess.Popen[bytes] | None = None
        self._reservation = _reserve_port()
        self.port: int = self._reservation.getsockname()[1]
        if sys.platform != "linux":  # where PgBouncer could not listen beside it
            self._reservation.close()
        self._directory = Path(tempfile.mkdtemp(prefix="asyncpool-pgbouncer-", dir="/tmp"))

    def __enter__(self) -> Self:
        self._write_configuration()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)
        self._reservation.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def dsn(self, **parameters: str) -> str:
        """It as key=value, for the server's user and database if nothing else is said."""
        place = {"host": "127.0.0.1", "port": str(self.port), "user": self._user, "dbname": self._database}
        return make_conninfo("", **(place | parameters))

    @property
    def _user(self) -> str:
        return self._server.get("user", "postgres")

    @property
    def _database(self) -> str:
        return self._server.get("dbname", self._user)

    def start(self) -> None:
        """Start it, if it does not run, and wait until it listens."""
        if self._process is not None:
            return
        as_whom = ["-u", UNPRIVILEGED] if os.geteuid() == 0 else []
        command = [self._program, "-q", *as_whom, str(self._directory / "pgbouncer.ini")]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        eventually_blocking(self._listens)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and all its connections with it, at once. SIGKILL: without a word to its clients."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(timeout=20)

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop and start."""
        self.stop(how)
        self.start()

    def log(self) -> str:
        """What it logged so far."""
        return (self._directory / "log").read_text(errors="replace")

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    def _write_configuration(self) -> None:
        server = " ".join(f"{name}={self._server[name]}" for name in ("host", "port") if name in self._server)
        settings: dict[str, str | int] = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(self._directory / "users"),
            "logfile": str(self._directory / "log"),
            # Their default is 5 s, for which a test need not wait.
            "server_login_retry": 1,
            **self._settings,
        }
        lines = [
            "[databases]",
            f"* = {server}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        passwords = dict.fromkeys(self._users, "") | {self._user: self._server.get("password", "")}
        users = [f'"{user}" "{password}"' for user, password in passwords.items()]
        for name, content in (("pgbouncer.ini", lines), ("users", users), ("log", [])):
            path = self._directory / name
            path.write_text("".join(f"{line}\n" for line in content))
            if os.geteuid() == 0:
                os.chown(path, pwd.getpwnam(UNPRIVILEGED).pw_uid, -1)
        if os.geteuid() == 0:
            os.chown(self._directory, pwd.getpwnam(UNPRIVILEGED).pw_uid, -1)
