"""The embedded server: what its users rely on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg
import pytest
from kit.servers import ODD_PASSWORDS, Admin, PasswordServer
from kit.waiting import eventually_blocking

from asyncpool.cli import embedded
from asyncpool.cli.embedded import EmbeddedServer, EmbeddedServerError, StopMode

pytestmark = pytest.mark.skipif("DATABASE_URL" in os.environ, reason="needs the embedded server")

HOLD_A_SERVER = textwrap.dedent("""
    import sys
    from asyncpool.cli.embedded import EmbeddedServer

    server = EmbeddedServer()
    server.start()
    print(server.postmaster_pid, server.directory, flush=True)
    sys.stdin.read()
""")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
def test_committed_rows_survive_every_restart(
    private_server: EmbeddedServer, private_admin: Admin, mode: StopMode
) -> None:
    private_admin.execute("create table survivor as select 1")
    try:
        private_server.restart(mode)
        assert private_admin.value("select count(*) from survivor") == 1
    finally:
        private_admin.execute("drop table survivor")


def test_a_stopped_server_refuses_and_its_port_stays_the_same(private_server: EmbeddedServer) -> None:
    before = private_server.host_dsn()
    private_server.stop()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(before)
    private_server.start()
    assert private_server.host_dsn() == before
    psycopg.connect(before).close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port cannot be kept from others")
def test_nobody_else_gets_the_port_of_a_stopped_server(private_server: EmbeddedServer) -> None:
    private_server.stop()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", private_server.port))
    private_server.start()
    psycopg.connect(private_server.host_dsn()).close()


@pytest.mark.parametrize("user", ODD_PASSWORDS)
def test_odd_passwords_let_in_both_ways_of_writing_them(password_server: PasswordServer, user: str) -> None:
    for conninfo in (password_server.conninfo(user, "url"), password_server.conninfo(user, "key=value")):
        with psycopg.connect(conninfo) as conn:
            assert conn.info.user == user
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(password_server.conninfo(user, "url", password="not it"))


def test_a_setting_that_postgresql_refuses_is_reported_with_its_own_words() -> None:
    server = EmbeddedServer(settings={"max_connections": "plenty"})
    with pytest.raises(EmbeddedServerError, match="max_connections"):
        server.start()
    assert not server.directory.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="for root only: PostgreSQL runs as another user then")
def test_root_may_keep_its_virtual_environment_where_no_other_user_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    package = embedded.installation().parent
    for part in (package, package.with_name(package.name + ".libs")):
        if part.exists():
            shutil.copytree(part, tmp_path / part.name)
    monkeypatch.setattr(embedded, "installation", lambda: tmp_path / package.name / "pginstall")
    with EmbeddedServer() as server:
        psycopg.connect(server.dsn()).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_the_server_of_a_process_that_is_ended(ending: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_A_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        pid, directory = holder.stdout.readline().split()
        assert is_alive(int(pid))
        holder.send_signal(ending)
    eventually_blocking(lambda: not is_alive(int(pid)) and not Path(directory).exists(), timeout=20)
