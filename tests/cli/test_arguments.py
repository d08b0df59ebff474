"""What all commands have in common on their command lines, and the words for what is wrong there."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import asyncpool
from asyncpool.cli import main

if TYPE_CHECKING:
    from kit.servers import Admin

COMMANDS = ("demo", "doctor", "tune", "top")


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """The exit status, and all that argparse says."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--min-size", "5", "--max-size", "4"), "--min-size 5 is more than --max-size 4"),
        (("demo", "--devices", "x"), "argument --devices: 'x' is no whole number"),
        (("demo", "surplus"), "unrecognized arguments: surplus"),
        (("doctor", "x", "--timeout", "soon"), "'soon' is no number of seconds from 0.01 to 3600"),
        (("doctor", "x", "--timeout", "0"), "'0' is no number of seconds from 0.01 to 3600"),
        (("doctor", "x", "--timeuot=3"), "unrecognized option --timeuot: did you mean --timeout?"),
        (("tune", "--qeury", "select 1"), "unrecognized option --qeury: did you mean --query?"),
        (("tune", "--query", "select 1", "--tasks", "x"), "argument --tasks: 'x' is no whole number"),
        (("top", "x", "--onec"), "unrecognized option --onec: did you mean --once?"),
    ],
)
def test_what_is_wrong_is_told_with_the_usage_of_the_command(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    status, told = said(capsys, *arguments)
    assert status == 2
    assert told.startswith(f"usage: asyncpool {arguments[0]} ")
    assert words in told
    assert "invalid _" not in told


def test_a_misspelt_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert ": did you mean doctor?" in said(capsys, "doctr")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("postgresql://app:hunter2@db/app",),
        ("demo", "postgresql://app:hunter2@db/app"),
        ("doctor", "--timeout=postgresql://app:hunter2@db/app"),
        ("tune", "--query", "select 1", "db", "host=db password=hunter2"),
    ],
)
def test_a_url_in_the_wrong_place_is_told_without_its_password(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    status, told = said(capsys, *arguments)
    assert status == 2
    assert "***" in told
    assert "hunter2" not in told


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == (0, f"asyncpool {asyncpool.__version__}\n")


@pytest.mark.parametrize("arguments", [("doctor", ""), ("tune", " ", "--query", "select 1"), ("demo", "--url", "")])
def test_an_empty_url_is_no_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("DATABASE_URL", "host=127.0.0.1 port=1")
    status, told = said(capsys, *arguments)
    assert status == 2
    assert "the URL is empty: name the server, or leave the URL out and set DATABASE_URL" in told


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [50, 100])
def test_the_help_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, told = said(capsys, command, "--help")
    assert status == 0
    assert max(map(len, told.splitlines())) <= columns
    # Sentences are not broken at a width of their own.
    assert columns < 100 or max(map(len, told.splitlines())) > 85


def test_the_demo_keeps_no_more_connections_than_the_largest_size_by_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--max-size", "1", "--url", "host=127.0.0.1 port=1"]) == 2
    errors = capsys.readouterr().err
    assert "--min-size" not in errors
    assert "\nfix: nobody listens there" in errors


def usual_environment() -> dict[str, str]:
    """In which what is printed is written when there is enough of it, or at the end."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"COLUMNS": "80"}


def in_shell(redirected: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, in a shell, `redirected` there."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-W", "error", "-m", "asyncpool", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=usual_environment() | environment,
    )


TUNE = ("tune", "--query", "select 1", "--seconds", "0.1", "--max-size", "1")
NOBODY = "host=127.0.0.1 port=1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [("doctor",), ("doctor", "--json"), TUNE, (*TUNE, "--json")])
@pytest.mark.parametrize("is_reachable", [True, False])
def test_an_output_that_cannot_be_written_is_told_in_a_line(
    dsn: str, arguments: tuple[str, ...], is_reachable: bool
) -> None:
    done = in_shell(">/dev/full", *arguments, dsn if is_reachable else NOBODY)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    # Otherwise it is standard error that has the message.
    has_output = is_reachable or "--json" in arguments
    assert done.stderr.count("the output cannot be written: [Errno 28] No space left on device") == has_output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_picture_that_cannot_be_written_does_not_take_the_figures_along(dsn: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    picture.symlink_to("/dev/full")
    done = in_shell("", *TUNE, dsn, "--json", "--plot", str(picture))
    assert done.returncode == 2
    assert json.loads(done.stdout)["sizes"]
    assert done.stderr.count("No space left on device") == 1


@pytest.mark.parametrize("redirected", ["<&-", ">&-", "2>&-"])
@pytest.mark.parametrize("arguments", [("doctor", "--json"), (*TUNE, "--json"), ("demo", "--payloads", "9", "--url")])
def test_a_stream_that_is_closed_is_done_without(dsn: str, redirected: str, arguments: tuple[str, ...]) -> None:
    done = in_shell(redirected, *arguments, dsn)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if redirected == ">&-":
        assert done.stdout == ""
    elif "--json" in arguments:
        assert json.loads(done.stdout)


def test_a_name_that_the_output_has_no_characters_for_is_told_without_them(admin: Admin, dsn: str) -> None:
    role = "rôle_" + secrets.token_hex(4)
    admin.execute(f'create role "{role}" login')
    try:
        done = in_shell("", "doctor", f"{dsn} user={role}", PYTHONIOENCODING="ascii")
    finally:
        admin.execute(f'drop role "{role}"')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{role.replace('ô', '?')}@")


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(("setting", "status"), [("off", 0), ("on", 1)])
def test_a_reader_who_has_seen_enough_does_not_change_the_exit_status(
    dsn: str, setting: str, status: int, more: tuple[str, ...]
) -> None:
    server = f"{dsn} options='-c default_transaction_read_only={setting}'"  # a warning, if it is on
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "asyncpool", "doctor", server, *more],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=usual_environment(),
        )
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("variable", [None, "", " "], ids=["unset", "empty", "blank"])
@pytest.mark.parametrize("arguments", [("doctor",), ("tune", "--query", "select 1")], ids=" ".join)
def test_without_a_server_it_is_said_how_to_name_one(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    variable: str | None,
) -> None:
    if variable is not None:
        monkeypatch.setenv("DATABASE_URL", variable)
    status, told = said(capsys, *arguments)
    assert status == 2
    assert "no server is named: give its URL, or set DATABASE_URL" in told
