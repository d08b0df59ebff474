"""`asyncpool doctor`, as a user runs it: what it prints and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.pgbouncer import PgBouncer
from kit.waiting import eventually_blocking
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from asyncpool import Pool
from asyncpool.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.mortal_server import MortalServer
    from kit.servers import PasswordServer, Server

    from asyncpool.cli.embedded import EmbeddedServer

SECRET = "hunter2secret"


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """The command is to see what it is given. The fixture has read it before."""
    monkeypatch.delenv("DATABASE_URL", raising=False)


@pytest.fixture
def transaction_pooler(server: Server) -> Iterator[PgBouncer]:
    with PgBouncer(server.dsn, "transaction") as bouncer:
        yield bouncer


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """The exit status, and the JSON."""
    status = main(["doctor", "--json", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, json.loads(captured.out)


def in_terminal(columns: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """The exit status, and what a terminal of that width is sent."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        unset = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "DATABASE_URL"}
        settings = {name: value for name, value in os.environ.items() if name not in unset}
        command = [sys.executable, "-m", "asyncpool", "doctor", *arguments]
        os.execve(sys.executable, command, {**settings, "TERM": "xterm-256color", **environment})
    output = b""
    with closing(os.fdopen(terminal, "rb", buffering=0)) as screen:
        while True:
            try:
                piece = screen.read(65536)
            except OSError:  # its end, on Linux
                break
            if not piece:
                break
            output += piece
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode().replace("\r\n", "\n")


def in_pipe(*arguments: str, program: tuple[str, ...] = ("-m", "asyncpool")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *program, "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


# --- what it says --------------------------------------------------------------------------------------------


def test_json_has_its_documented_keys(capsys: pytest.CaptureFixture[str], transaction_pooler: PgBouncer) -> None:
    status, told = outcome(capsys, transaction_pooler.dsn())
    assert (status, told["ok"], told["verdict"]) == (1, False, "fit for a pool, with 1 warning to see to")
    assert told.keys() == {"ok", "verdict", "findings", "recommended", "facts"}
    assert {tuple(finding) for finding in told["findings"]} == {("level", "topic", "text", "fix")}
    assert told["recommended"]["options"] == {"max_size": 10, "prepare_threshold": None}
    pool = eval(told["recommended"]["line"], {"Pool": Pool, "conninfo": transaction_pooler.dsn()})
    assert isinstance(pool, Pool)
    facts = told["facts"]
    assert facts.keys() == {
        "place",
        "user",
        "product",
        "server_version",
        "round_trip_ms",
        "connections",
        "pooler",
        "passed_on",
        "prepared_statements",
        "tls",
        "is_standby",
        "settings",
        "unanswered",
    }
    assert facts["pooler"] == {"product": "PgBouncer", "version": None, "mode": "transaction", "settings": {}}
    assert facts["prepared_statements"] == "lost"
    assert facts["connections"]["free"] > 0


def test_a_server_without_a_warning_ends_it_with_0(capsys: pytest.CaptureFixture[str], dsn: str) -> None:
    status, told = outcome(capsys, dsn)
    if any(finding["level"] in ("warning", "problem") for finding in told["findings"]):
        pytest.skip("the server of DATABASE_URL has its own")
    assert (status, told["ok"]) == (0, True)


def test_the_environment_names_the_server(
    capsys: pytest.CaptureFixture[str], dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    assert outcome(capsys)[0] in (0, 1)


@pytest.mark.parametrize("columns", [80, 60, 30])
def test_a_terminal_gets_lines_of_its_width_and_the_whole_text(transaction_pooler: PgBouncer, columns: int) -> None:
    status, screen = in_terminal(columns, transaction_pooler.dsn(), NO_COLOR="1")
    assert status == 1
    # No colours; bold is none.
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", screen)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", screen)
    *lines, recommended = plain.rstrip("\n").split("\n")
    assert max(map(len, lines)) <= columns
    assert recommended == "Pool(conninfo, max_size=10, prepare_threshold=None)"
    assert plain.isascii()
    in_one = "".join(plain.split())  # however the lines are broken
    assert "PgBouncer,intransactionmode:" in in_one
    assert "max_prepared_statements=200" in in_one
    assert "..." not in in_one.replace("'...'", "")


def test_a_terminal_gets_colours(dsn: str) -> None:
    _, screen = in_terminal(80, dsn)
    assert "\x1b[32mok" in screen


def test_a_pipe_gets_a_line_for_each_finding_and_each_remedy(transaction_pooler: PgBouncer) -> None:
    done = in_pipe(transaction_pooler.dsn())
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    findings = [line for line in done.stdout.split("\n") if re.match(r"(ok|note|warning|problem) +\S", line)]
    remedies = [line for line in done.stdout.split("\n") if re.match(r" {9}fix: \S", line)]
    assert any(line.startswith("warning  prepared statements: not usable") for line in findings)
    assert len(remedies) == sum(not line.startswith("ok") for line in findings)
    # The place, the verdict, the options, and three lines between them.
    assert len(findings) + len(remedies) + 6 == len(done.stdout.rstrip("\n").split("\n"))


# --- it could not be examined --------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """The kind, and the server's words."""
    status, told = outcome(capsys, *arguments)
    assert (status, told["ok"]) == (2, False)
    assert told.keys() == {"ok", "error"}
    assert told["error"].keys() == {"kind", "message", "fix"}
    assert SECRET not in json.dumps(told)
    assert told["error"]["fix"]
    return told["error"]["kind"], told["error"]["message"]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (f"postgresql://app:{SECRET}@127.0.0.1:1/app", "refused"),
        (f"postgresql://app:{SECRET}@127.0.0.1:1,127.0.0.1:2/app", "refused"),
        (f"postgresql://app:{SECRET}@nowhere.invalid/app", "DNS"),
        (f"postgresql://app:{SECRET}@/app?host=/nowhere", "no socket"),
        (f"postgresql://app:{SECRET}@127.0.0.1:port/app", "connection string"),
        (f"postgresql://app:{SECRET}@x@127.0.0.1:1/app", "connection string"),
        (f"host=127.0.0.1 port=1 password=not {SECRET}", "connection string"),
    ],
)
def test_what_is_wrong_before_a_server_is_reached(capsys: pytest.CaptureFixture[str], url: str, kind: str) -> None:
    assert refusal(capsys, url)[0] == kind


def test_a_host_that_is_silent_is_given_up_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        kind, words = refusal(
            capsys, f"host=127.0.0.1 port={silent.getsockname()[1]} user=app sslmode=disable", "--timeout", "0.3"
        )
        assert (kind, time.monotonic() - began < 20) == ("timeout", True)
        assert "timeout expired after 0.3 s" in words


def test_a_pooler_that_lets_in_and_does_not_answer_is_given_up_in_time(
    capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    with (
        PgBouncer(server.dsn, "session", settings={"default_pool_size": 1}) as bouncer,
        psycopg.connect(bouncer.dsn()) as conn,
    ):
        conn.execute("select 1")  # now it has the only server connection
        kind, words = refusal(capsys, bouncer.dsn(), "--timeout", "0.3")
    assert (kind, words) == ("no answer", "no answer within 0.3 s: ask for the version")


def test_a_wrong_password_and_none(
    capsys: pytest.CaptureFixture[str], password_server: PasswordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, words = refusal(capsys, password_server.conninfo("with_space", "url", SECRET))
    assert kind == "password"
    assert 'password authentication failed for user "with_space"' in words
    monkeypatch.setenv("PGPASSFILE", os.devnull)
    assert refusal(capsys, password_server.embedded.host_dsn(user="with_space"))[0] == "no password"


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        ({"dbname": "nowhere"}, "no such database"),
        ({"user": "nobody_at_all"}, "no such role"),
        ({"sslmode": "require"}, "no TLS"),
        ({"target_session_attrs": "standby"}, "wrong role"),
    ],
)
def test_what_the_server_itself_refuses(
    capsys: pytest.CaptureFixture[str], mortal: MortalServer, parameters: dict[str, str], kind: str
) -> None:
    assert refusal(capsys, make_conninfo(mortal.dsn("doctor"), **parameters))[0] == kind


def test_a_role_that_has_no_connection_left(capsys: pytest.CaptureFixture[str], mortal: MortalServer) -> None:
    mortal.admin.execute("alter role app connection limit 0")
    try:
        kind, words = refusal(capsys, mortal.dsn("doctor", user="app"))
    finally:
        mortal.admin.execute("alter role app connection limit -1")
    assert kind == "too many clients"
    assert 'too many connections for role "app"' in words


def test_a_server_that_recovers(capsys: pytest.CaptureFixture[str], mortal: MortalServer) -> None:
    mortal.stop()
    mortal.start_in_recovery()
    try:
        assert refusal(capsys, mortal.dsn("doctor"))[0] == "starting"
    finally:
        mortal.end_recovery()
        # It lets in before it takes writes.
        eventually_blocking(lambda: mortal.admin.value("select pg_is_in_recovery()") is False)


@contextmanager
def own_pg_hba(server: EmbeddedServer, *lines: str) -> Iterator[None]:
    """Only these lines, and one for the Unix socket."""
    path = server.directory / "data" / "pg_hba.conf"
    before = path.read_text()

    def load(content: str) -> None:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            row: Any = conn.execute("select pg_conf_load_time()").fetchone()
            path.write_text(content)
            conn.execute("select pg_reload_conf()")
        eventually_blocking(lambda: loaded_after(server, row[0]))

    load("\n".join(("local all all trust", *lines, "")))
    try:
        yield
    finally:
        load(before)


def loaded_after(server: EmbeddedServer, when: Any) -> bool:
    with psycopg.connect(server.dsn()) as conn:
        row: Any = conn.execute("select pg_conf_load_time() > %s", [when]).fetchone()
        return bool(row[0])


def test_a_missing_entry_in_pg_hba_is_told_from_one_that_wants_tls(
    capsys: pytest.CaptureFixture[str], tls_server: EmbeddedServer
) -> None:
    with own_pg_hba(tls_server, "hostssl all postgres all trust"):
        assert refusal(capsys, tls_server.host_dsn(sslmode="disable"))[0] == "TLS required"
        for sslmode in ("prefer", "require"):
            dsn = tls_server.host_dsn(user="somebody", sslmode=sslmode)
            assert refusal(capsys, dsn)[0] == "no pg_hba.conf entry"
        assert main(["doctor", "--json", tls_server.host_dsn(sslmode="require")]) in (0, 1)


def test_a_certificate_that_cannot_be_verified(
    capsys: pytest.CaptureFixture[str], tls_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(capsys, tls_server.host_dsn(sslmode="verify-full", sslrootcert="/nowhere"))[0] == "certificate"
    assert refusal(capsys, tls_server.host_dsn(sslmode="verify-full", sslrootcert="system"))[0] == "certificate"


def test_what_pgbouncer_refuses(capsys: pytest.CaptureFixture[str], transaction_pooler: PgBouncer) -> None:
    assert refusal(capsys, transaction_pooler.dsn(dbname="nowhere"))[0] == "no such database"
    assert refusal(capsys, transaction_pooler.dsn(user="somebody_else"))[0] == "password"
    assert refusal(capsys, transaction_pooler.dsn(options="-c geqo=off"))[0] == "startup parameter"


def test_without_json_the_servers_words_and_the_remedy_are_on_standard_error() -> None:
    done = in_pipe(f"postgresql://app:{SECRET}@127.0.0.1:1/app")
    assert (done.returncode, done.stdout) == (2, "")
    first, *_, last = done.stderr.rstrip("\n").split("\n")
    assert first.startswith('asyncpool doctor: connection failed: connection to server at "127.0.0.1", port 1')
    assert last.startswith("fix: nobody listens there")
    assert SECRET not in done.stderr


# --- the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("x", "--timeout", "0"), ("x", "--timeout", "soon"), ("x", "y")])
def test_arguments_that_make_no_sense_are_refused_with_the_usage(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_the_help_tells_the_exit_statuses_and_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(f"\n  {status}    " in told for status in (0, 1, 2))
    for key in ("ok", "verdict", "findings", "recommended", "facts", "error"):
        assert f"\n  {key} " in told


WITHOUT_RICH = """if True:
    import sys
    sys.modules["rich"] = sys.modules["rich.console"] = None  # as if it were not installed
    from asyncpool.cli import main
    sys.exit(main(sys.argv[1:]))
"""


def test_without_rich_it_says_what_to_install_and_json_works(dsn: str) -> None:
    done = in_pipe(dsn, program=("-c", WITHOUT_RICH))
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'asyncpool-pg[cli]'" in done.stderr
    done = in_pipe(dsn, "--json", program=("-c", WITHOUT_RICH))
    assert done.returncode in (0, 1)
    assert json.loads(done.stdout)["facts"]["product"] == "PostgreSQL"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(which: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        conninfo = f"host=127.0.0.1 port={silent.getsockname()[1]} user=app sslmode=disable"
        with subprocess.Popen(
            [sys.executable, "-m", "asyncpool", "doctor", conninfo, "--timeout", "50"],
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            connection, _ = silent.accept()
            process.send_signal(which)
            connection.recv(1000)  # what it says before it goes; its end is waited for
            connection.close()
            _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + which, "interrupted\n")


def test_the_place_is_shown_without_a_password(
    capsys: pytest.CaptureFixture[str], password_server: PasswordServer
) -> None:
    conninfo = password_server.conninfo("with_at", "url")
    _, told = outcome(capsys, conninfo)
    assert told["facts"]["place"] == f"with_at@127.0.0.1:{password_server.embedded.port}/postgres"
    password = conninfo_to_dict(conninfo)["password"]
    assert str(password) not in json.dumps(told)
