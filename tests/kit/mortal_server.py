"""A server that tests may stop, kill, freeze and reconfigure; it always comes back at the same address."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from asyncpool.cli.embedded import EmbeddedServer

from .servers import Admin
from .threads import Running, in_thread
from .waiting import eventually_blocking

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from asyncpool.cli.embedded import StopMode

Way = Literal["tcp", "unix"]

MAX_CONNECTIONS = 70
# A login that is no superuser's: the last places of the server are not for it.
APPLICATION_USER = "app"

PATIENCE = 20.0
KNOCK_INTERVAL = 0.001


class MortalServer:
    """An embedded server and the ways to make it suffer. All methods block.

    `settings` are given to the server for as long as their block lasts; the rest of it is in its default state.
    """

    def __init__(self) -> None:
        self.embedded = EmbeddedServer(settings={"max_connections": MAX_CONNECTIONS}, host_authentication="trust")
        self.embedded.start()
        self.admin = Admin(self.embedded.dsn())
        self.admin.execute(f"create role {APPLICATION_USER} login")
        self._starting: Running[None] | None = None
        self._settings_to_restore = ""

    def close(self) -> None:
        """Stop it for good."""
        self.admin.close()
        self.embedded.close()

    def dsn(self, application_name: str, way: Way = "tcp", **parameters: str) -> str:
        """It as key=value, under that name."""
        address = self.embedded.host_dsn() if way == "tcp" else self.embedded.dsn()
        return make_conninfo(address, application_name=application_name, **parameters)

    # --- stop and start -------------------------------------------------------------------------------------

    def start(self) -> float:
        """Start it, if it does not run. Returns when it let a client in, on the clock of `time.monotonic`."""
        with self.knocking() as knocking:
            self.embedded.start()
            return knocking.result()

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it, and wait for the end of its processes. `smart` waits for all sessions, `kill` is SIGKILL."""
        self.admin.close()
        self.embedded.stop(mode)

    def restart(self, mode: StopMode = "fast") -> float:
        """Stop and start; returns as `start` does."""
        self.stop(mode)
        return self.start()

    def outage(self, seconds: float, mode: StopMode = "fast") -> float:
        """Stop, let time pass, and start; returns as `start` does."""
        self.stop(mode)
        time.sleep(seconds)
        return self.start()

    def begin_smart_shutdown(self) -> None:
        """It lets nobody in from now on, and ends with its last session; `stop("smart")` waits for that."""
        self.admin.close()
        self.signal_postmaster(signal.SIGTERM)
        eventually_blocking(lambda: "the database system is shutting down" in self._refusal())

    @contextmanager
    def knocking(self) -> Iterator[Running[float]]:
        """Try to get in all the time, in a thread: the result is the time of the attempt that succeeded."""
        gone = threading.Event()
        dsn = self.dsn("asyncpool-test-knocking")

        def knock() -> float:
            while not gone.wait(KNOCK_INTERVAL):
                began = time.monotonic()
                with suppress(psycopg.OperationalError):
                    psycopg.connect(dsn).close()
                    return began
            raise AssertionError("nobody opened")

        knocking = in_thread(knock)
        try:
            yield knocking
        finally:
            gone.set()
            knocking.error(PATIENCE)

    def start_in_recovery(self) -> None:
        """Start it, and let it go no further than "the database system is starting up" until `end_recovery`.

        It recovers from an archive, whose restore command waits for us: that is before anybody is let in.
        """
        data = self.embedded.directory / "data"
        self._hold.touch()
        settings = data / "postgresql.auto.conf"
        self._settings_to_restore = settings.read_text()
        gate = f"while test -e {self._hold}; do sleep 0.01; done; false"
        settings.write_text(f"{self._settings_to_restore}restore_command = '{gate}'\n")
        signal_file = data / "recovery.signal"
        signal_file.touch()
        os.chown(signal_file, settings.stat().st_uid, settings.stat().st_gid)
        self._starting = in_thread(self.embedded.start)
        eventually_blocking(lambda: "the database system is starting up" in self._refusal(), timeout=PATIENCE)

    def end_recovery(self) -> float:
        """Let it go on; returns as `start` does."""
        assert self._starting is not None
        with self.knocking() as knocking:
            self._hold.unlink()
            self._starting.result(PATIENCE)
            opened = knocking.result(PATIENCE)
        self._starting = None
        settings = self.embedded.directory / "data" / "postgresql.auto.conf"
        settings.write_text(self._settings_to_restore)
        return opened

    def recover(self) -> None:
        """Whatever a test has left it in: it runs again."""
        if self._starting is not None:
            self.end_recovery()
        self.embedded.start()

    @property
    def _hold(self) -> Path:
        return self.embedded.directory / "hold"

    def _refusal(self) -> str:
        """Its words to those whom it does not let in; empty if it does."""
        try:
            psycopg.connect(self.embedded.dsn()).close()
        except psycopg.OperationalError as error:
            return str(error)
        return ""

    # --- signals --------------------------------------------------------------------------------------------

    def signal_postmaster(self, number: signal.Signals) -> None:
        assert self.embedded.postmaster_pid is not None
        os.kill(self.embedded.postmaster_pid, number)

    def kill_backend(self, pid: int) -> None:
        """SIGKILL: shared memory may be torn, so the postmaster ends all sessions and recovers."""
        os.kill(pid, signal.SIGKILL)

    def terminate(self, *pids: int) -> None:
        """`pg_terminate_backend` of all of them at once; returns when the last has ended."""
        self.admin.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) as pid", [list(pids)])
        eventually_blocking(lambda: self.have_ended(pids), timeout=PATIENCE)

    def have_ended(self, pids: Iterable[int]) -> bool:
        """Whether these processes of its are gone, and their sockets with them: it stops to count a session before."""
        return not any(map(_runs, pids))

    def processes(self) -> list[int]:
        """All its processes, the postmaster first."""
        postmaster = self.embedded.postmaster_pid
        assert postmaster is not None
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        family = [tuple(map(int, line.split())) for line in listed.splitlines()]
        return [postmaster, *(pid for pid, parent in family if parent == postmaster)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP to all its processes, SIGCONT at the end of the block: clients see neither data nor an end."""
        # The postmaster first: then there are no new ones while the others are being found.
        self.signal_postmaster(signal.SIGSTOP)
        stopped = self.processes()
        try:
            for pid in stopped[1:]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    # --- settings -------------------------------------------------------------------------------------------

    @contextmanager
    def settings(self, *, restart: bool = False, **values: str | int) -> Iterator[None]:
        """It runs with these settings while the block lasts; some need a restart."""
        for name, value in values.items():
            self._alter(sql.SQL("set {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        self._make_known(restart)
        try:
            yield
        finally:
            self.embedded.start()
            for name in values:
                self._alter(sql.SQL("reset {}").format(sql.Identifier(name)))
            self._make_known(restart)

    def _alter(self, what: sql.Composable) -> None:
        with psycopg.connect(self.embedded.dsn(), autocommit=True) as conn:
            conn.execute(sql.SQL("alter system {}").format(what))

    def _make_known(self, restart: bool) -> None:
        if restart:
            self.restart()
            return
        # A session of before may not have read it; one that begins after the postmaster has, has it.
        before = self.admin.value("select pg_conf_load_time()")
        self.admin.execute("select pg_reload_conf()")
        eventually_blocking(lambda: self._loaded_after(before))

    def _loaded_after(self, before: Any) -> bool:
        with psycopg.connect(self.embedded.dsn(), autocommit=True) as conn:
            row = conn.execute("select pg_conf_load_time() > %s", [before]).fetchone()
            assert row is not None
            return bool(row[0])

    # --- what it sees ---------------------------------------------------------------------------------------

    def sessions(self, application_name: str) -> int:
        """How many sessions of that name there are."""
        return self.admin.sessions(application_name)

    def strangers(self) -> int:
        """How many sessions there are of others than this object's, of whatever name."""
        return self.admin.client_sessions()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
