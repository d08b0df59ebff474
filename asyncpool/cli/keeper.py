"""The process that owns an embedded PostgreSQL, so that nothing outlives the program that asked for one.

It is run as a script, with the standard library only. It makes the temporary directory, starts and stops the
server in it on command, and, as soon as its standard input ends, stops the server and removes the directory.
The input ends however the other program ends: by `close()`, by Ctrl-C in the middle of the start, by SIGKILL.
There is no other way to clean up, and so none that could be forgotten.

A command is a line of JSON, `{"command": "start"}` or `{"command": "stop", "mode": "fast"}`; the answer is
a line of JSON as well, `{"ok": ...}` or `{"error": "..."}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn, TypedDict

START_DEADLINE = 60.0
STOP_DEADLINE = 60.0
CLEAN_UP_DEADLINE = 15.0
POLL_INTERVAL = 0.01

# A socket's address holds 104 bytes on macOS and the BSDs, 108 on Linux, its final NUL included.
MAX_SOCKET_PATH = 103

STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
    "kill": signal.SIGKILL,
}


class Plan(TypedDict):
    """What the other program asks for."""

    installation: str
    port: int
    settings: dict[str, str]
    host_authentication: str | None
    standby_of: str | None


class Refusal(Exception):
    """What cannot be done, in words for the user."""


class Identity:
    """Whom the server runs as: ourselves, or `nobody` when we are root, which PostgreSQL refuses to be."""

    def __init__(self) -> None:
        # As subprocess takes them: None leaves it as it is.
        self.user: int | None = None
        self.group: int | None = None
        self.extra_groups: list[int] | None = None
        if os.geteuid() != 0:
            return
        try:
            entry = pwd.getpwnam("nobody")
        except KeyError:
            raise Refusal(
                "PostgreSQL refuses to run as root, and this system has no user `nobody` to run it as: "
                "run this as an ordinary user"
            ) from None
        self.user, self.group, self.extra_groups = entry.pw_uid, entry.pw_gid, []

    def take_over(self, path: Path) -> None:
        if self.user is not None and self.group is not None:
            os.chown(path, self.user, self.group)

    def can_read(self, path: Path) -> bool:
        """Whether the permissions let this identity reach and read `path`."""
        if self.user is None:
            return os.access(path, os.R_OK)
        try:
            reachable = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)
            return reachable and bool(path.stat().st_mode & stat.S_IROTH)
        except OSError:
            return False


class Keeper:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.identity = Identity()
        self.directory = self._make_directory()
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self.installation = Path(plan["installation"])
        self.server: subprocess.Popen[bytes] | None = None
        # The server's processes inherit the writing end: once all are gone, the reading end says so.
        self.witness: int | None = None

    def _make_directory(self) -> Path:
        for place in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - mkdtemp makes it private
            longest = place / "asyncpool-postgres-12345678" / f".s.PGSQL.{self.plan['port']}"
            if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
                continue
            if not self.identity.can_read(place):
                continue
            directory = Path(tempfile.mkdtemp(prefix="asyncpool-postgres-", dir=place))
            self.identity.take_over(directory)
            return directory
        raise Refusal(f"the temporary directory {tempfile.gettempdir()} is private, or its name too long")

    def initialise(self) -> None:
        """Create the cluster, by `initdb` or as a copy of the primary's: the settings, who may log in."""
        self._make_installation_readable()
        if primary := self.plan["standby_of"]:
            options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
            self._run("pg_basebackup", "-D", str(self.data), "-d", primary, *options)
        else:
            options = ["--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"]
            self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", *options)
        settings = {"unix_socket_directories": str(self.directory), **self.plan["settings"]}
        with (self.data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                quoted = value.replace("'", "''")
                conf.write(f"{name} = '{quoted}'\n")
        rules = ["local all all trust", "local replication all trust"]
        if authentication := self.plan["host_authentication"]:
            rules += [f"host {what} all 127.0.0.1/32 {authentication}" for what in ("all", "replication")]
        (self.data / "pg_hba.conf").write_text("\n".join(rules) + "\n")

    def _make_installation_readable(self) -> None:
        """Copy the binaries into our directory if they lie where the server's user cannot read them.

        A virtual environment below root's home is such a place. Loosening the permissions up to there would
        outlive us.
        """
        needed = [self.installation / name for name in ("bin/postgres", "share/postgres.bki")]
        # A distribution's PostgreSQL has its `share` somewhere else, where everybody may read it.
        if all(self.identity.can_read(path) for path in needed if path.exists()):
            return
        # The binaries look for the libraries that came with them beside the package, by relative path.
        package = self.installation.parent
        copies = self.directory / "copies"
        for part in (package, package.with_name(package.name + ".libs")):
            if part.exists():
                shutil.copytree(part, copies / part.name, ignore=shutil.ignore_patterns("include", "*.py*"))
        for path in (copies, *copies.rglob("*")):
            self.identity.take_over(path)
        self.installation = copies / package.name / self.installation.name

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._program(program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.directory,
            env=clean_environment(),
            user=self.identity.user,
            group=self.identity.group,
            extra_groups=self.identity.extra_groups,
            umask=0o077,
        )
        if done.returncode:
            raise Refusal(f"{program} failed: {(done.stderr or done.stdout).strip()}")

    def _program(self, name: str) -> str:
        return str(self.installation / "bin" / name)

    def start(self) -> int:
        """Start the server and wait until it takes connections. Returns the postmaster's process id."""
        if self.server is not None and self.server.poll() is None:
            return self.server.pid
        self._wait_until_all_processes_ended(STOP_DEADLINE)
        self.witness, held_by_server = os.pipe()
        try:
            with self.log.open("ab") as log:
                self.server = server = subprocess.Popen(
                    [self._program("postgres"), "-D", str(self.data)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[held_by_server],
                    cwd=self.directory,
                    env=clean_environment(),
                    user=self.identity.user,
                    group=self.identity.group,
                    extra_groups=self.identity.extra_groups,
                    umask=0o077,
                )
        finally:
            os.close(held_by_server)
        self._wait_until_ready(server)
        return server.pid

    def _wait_until_ready(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_DEADLINE
        while not self._is_ready(server.pid):
            if server.poll() is not None:
                raise Refusal(f"PostgreSQL did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise Refusal(f"PostgreSQL was not ready after {START_DEADLINE:g} s: {self._last_words()}")
            time.sleep(POLL_INTERVAL)

    def _is_ready(self, pid: int) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # A file left by a crash has another first line; the eighth is written last.
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace").strip()[-2000:] if self.log.exists() else "(no log)"

    def stop(self, mode: str, deadline: float = STOP_DEADLINE) -> None:
        """Stop the server, if it runs, and wait until each of its processes ended."""
        if self.server is None:
            return
        if self.server.poll() is None:
            # A frozen postmaster (SIGSTOP) would not see the signal.
            self.server.send_signal(signal.SIGCONT)
            self.server.send_signal(STOP_SIGNALS[mode])
        try:
            self.server.wait(deadline)
        except subprocess.TimeoutExpired:
            raise Refusal(f"PostgreSQL did not stop within {deadline:g} s (mode {mode})") from None
        self.server = None
        self._wait_until_all_processes_ended(deadline)

    def _wait_until_all_processes_ended(self, deadline: float) -> None:
        """After SIGKILL the backends outlive the postmaster by a moment, and hold its shared memory."""
        if self.witness is None:
            return
        readable, _, _ = select.select([self.witness], [], [], deadline)
        if not readable:
            raise Refusal(f"processes of the stopped server were still there after {deadline:g} s")
        os.close(self.witness)
        self.witness = None

    def clean_up(self) -> None:
        """Stop the server at once, its data being of no further use, and remove the directory."""
        for mode in ("immediate", "kill"):
            with contextlib.suppress(Refusal):
                self.stop(mode, CLEAN_UP_DEADLINE)
        shutil.rmtree(self.directory, ignore_errors=True)


def clean_environment() -> dict[str, str]:
    """Ours without PGPORT, PGDATA and their like, meant for another server."""
    # Under another locale macOS loads threads into the postmaster, which refuses to start then.
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def serve(keeper: Keeper) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        match request["command"]:
            case "start":
                answer(ok=keeper.start())
            case "stop":
                keeper.stop(request["mode"])
                answer(ok=None)
            case unknown:
                raise Refusal(f"unknown command {unknown!r}")


def answer(**content: object) -> None:
    # Unbuffered: nothing is left to be flushed into a broken pipe at the interpreter's end.
    os.write(sys.stdout.fileno(), json.dumps(content).encode() + b"\n")


def leave(*_: object) -> NoReturn:
    raise SystemExit(0)


def main() -> None:
    # The machine shuts down, or somebody ends us by name: clean up as if the input had ended.
    signal.signal(signal.SIGTERM, leave)
    # Nobody reads the answers of a program that died.
    with contextlib.suppress(BrokenPipeError):
        try:
            keeper = Keeper(json.loads(sys.argv[1]))
        except Refusal as refusal:
            answer(error=str(refusal))
            return
        try:
            keeper.initialise()
            answer(ok=str(keeper.directory))
            serve(keeper)
        except Refusal as refusal:
            answer(error=str(refusal))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            keeper.clean_up()


if __name__ == "__main__":
    main()
