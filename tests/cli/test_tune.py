"""`asyncpool tune` on a real server. The sweeps are short: what they find is chance, how they end is not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from kit.waiting import eventually_blocking
from psycopg.conninfo import make_conninfo

from asyncpool.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kit.mortal_server import MortalServer
    from kit.servers import Admin

    Tune = Callable[..., "Done"]

QUICK = ("--seconds", "0.1", "--max-size", "2", "--tasks", "4")
READING = ("--query", "select 1")

# A machine that has much else to do may be too restless to tell.
MEASURED = (0, 1)


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    status: int
    output: str
    errors: str

    def json(self) -> dict[str, Any]:
        found = json.loads(self.output)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def tune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Run the command in this process, as in a pipe of 80 columns."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Done:
        try:
            status = main(["tune", *arguments])
        except SystemExit as refusal:  # argparse's
            assert isinstance(refusal.code, int)
            status = refusal.code
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return run


@contextmanager
def tuning(*arguments: str, stream: int = subprocess.PIPE, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own. It is killed if the test leaves it running."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "asyncpool", "tune", *arguments],
        stdout=stream,
        stderr=stream,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# --- what it measures ---------------------------------------------------------------------------------------


def test_json_has_every_size_and_the_one_shots_with_the_documented_keys(tune: Tune, dsn: str) -> None:
    done = tune(dsn, "--query", "select %(number)s::int", "--params", '{"number": 7}', "--json", *QUICK)
    assert done.status in MEASURED, done.errors
    outcome = done.json()
    assert done.status == (0 if outcome["conclusive"] else 1)
    assert [one["size"] for one in outcome["sizes"]] == [1, 2]
    for one in outcome["sizes"]:
        assert one["statements"] > 0
        assert len(one["of_each_pass"]) == 4
        assert one["statements_per_second"] >= 0
        assert 0 < one["p50_ms"] <= one["p99_ms"]
        assert 0 < one["mean_ms"] <= one["p99_ms"]
        assert 0 <= one["wait_share"] <= 1
        assert one["processor_share"] > 0
        assert one["processor_wait_share"] >= 0
    assert outcome["one_shots"]["connections"] in (1, 2)
    assert outcome["one_shots"]["wait_share"] is None
    assert outcome["max_size"] in (None, 1, 2)
    if outcome["max_size"]:
        assert outcome["processes"] == outcome["free_connections"] // outcome["max_size"]
    assert outcome["ended"] == "largest size"
    assert (outcome["query"], outcome["committed"], outcome["tasks"]) == ("select %(number)s::int", False, 4)
    assert outcome["seconds_per_size"] == 0.1
    assert {"reason", "notes", "client_limited", "server_version"} <= outcome.keys()


def test_the_mean_latency_is_what_the_tasks_wait_at_the_measured_rate(tune: Tune, dsn: str) -> None:
    """Little's law. Those whose turn comes after several passes only are not to be left out, nor those of the start
    to be counted, when the line was still forming.
    """
    slow = ("--query", "select pg_sleep(0.01)", "--tasks", "16", "--max-size", "2", "--seconds", "0.2")
    done = tune(dsn, *slow, "--json")
    outcome = done.json()
    for one in outcome["sizes"]:
        assert one["mean_ms"] / 1000 * one["statements_per_second"] == pytest.approx(16, rel=0.4), outcome
        assert one["p50_ms"] >= 0.5 * one["mean_ms"]


def test_a_latency_for_which_there_is_no_time_is_not_told(tune: Tune, dsn: str) -> None:
    slow = ("--query", "select pg_sleep(0.01)", "--tasks", "500", "--max-size", "1", "--seconds", "0.2")
    done = tune(dsn, *slow, "--max-seconds", "1.5", "--json")
    outcome = done.json()
    assert outcome["sizes"][0]["statements"] > 0, done
    assert [outcome["sizes"][0][key] for key in ("mean_ms", "p50_ms", "p99_ms", "wait_share")] == [None] * 4
    assert any("Latencies were not measured" in note for note in outcome["notes"])


def test_every_key_of_the_json_is_in_the_help(tune: Tune, dsn: str) -> None:
    outcome = tune(dsn, *READING, "--json", *QUICK).json()
    help_text = tune("--help").output
    assert max(map(len, help_text.splitlines())) <= 80
    told = set(re.findall(r"\w+", help_text))
    assert outcome.keys() | outcome["sizes"][0].keys() | outcome["one_shots"].keys() <= told


def test_nothing_is_left_in_the_table_without_commit(tune: Tune, dsn: str, admin: Admin, table: str) -> None:
    done = tune(dsn, "--query", f"insert into {table} values (%s)", "--params", "[null]", "--json", *QUICK)
    assert done.status in MEASURED, done.errors
    outcome = done.json()
    assert outcome["sizes"][0]["statements"] > 0
    assert admin.value(f"select count(*) from {table}") == 0
    # It would have been committed.
    assert outcome["one_shots"] is None
    assert any("One-shots were not measured" in note for note in outcome["notes"])


def test_rows_stay_with_commit_and_one_shots_are_measured(tune: Tune, dsn: str, admin: Admin, table: str) -> None:
    done = tune(dsn, "--query", f"insert into {table} values (null)", "--commit", "--json", *QUICK)
    assert done.status in MEASURED, done.errors
    outcome = done.json()
    measured = sum(one["statements"] for one in [*outcome["sizes"], outcome["one_shots"]])
    assert admin.value(f"select count(*) from {table}") >= measured > 0
    assert outcome["committed"] is True
    # The trial's, and those of the warm-up, too.
    assert outcome["statements_committed"] == admin.value(f"select count(*) from {table}")
    assert (
        f"{outcome['statements_committed']:,} statements were committed, and what they wrote stays." in outcome["notes"]
    )


@pytest.mark.parametrize("option", ["", "--no-prepare"])
def test_a_rolled_back_statement_stays_prepared_unless_it_is_not_to_be(
    tune: Tune, dsn: str, admin: Admin, table: str, option: str
) -> None:
    """psycopg's own rollback would drop it, and each be planned anew, as none of the user's own is, being committed."""
    admin.execute(f"create sequence {table}_s")
    try:
        # A sequence is not rolled back: it is moved by those executions only that find something prepared.
        prepared = f"case when exists (select from pg_prepared_statements) then nextval('{table}_s') end"
        done = tune(dsn, "--query", f"insert into {table} select {prepared}", *QUICK, *filter(None, [option]))
        assert done.status in MEASURED, done.errors
        assert (admin.value(f"select last_value from {table}_s") == 1) is (option == "--no-prepare")
    finally:
        admin.execute(f"drop sequence {table}_s")


def test_all_sessions_are_gone_in_the_end_and_there_were_never_more_than_the_largest_size(
    tune: Tune, dsn: str, admin: Admin, application_name: str
) -> None:
    seen = f"{application_name.replace('-', '_')}_seen"
    admin.execute(f"create table {seen} (n int)")
    try:
        query = f"insert into {seen} select count(*) from pg_stat_activity where application_name = %s"
        done = tune(dsn, "--query", query, "--params", json.dumps([application_name]), "--commit", *QUICK)
        assert done.status in MEASURED, done.errors
        assert admin.value(f"select max(n) from {seen}") in (1, 2)
        assert admin.sessions(application_name) == 0
    finally:
        admin.execute(f"drop table {seen}")


def test_it_ends_when_its_time_is_up_and_shows_what_it_has(tune: Tune, dsn: str) -> None:
    done = tune(dsn, *READING, "--json", "--seconds", "1", "--max-size", "8", "--max-seconds", "0.8")
    assert done.status == 1
    outcome = done.json()
    assert (outcome["ended"], outcome["conclusive"]) == ("time is up", False)
    assert [one["size"] for one in outcome["sizes"]] in ([], [1], [1, 2])
    assert any("--max-seconds" in note for note in outcome["notes"])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (
            "select pg_sleep(0.4)",
            r"takes 0\.4\d* s, and --max-seconds 1 are too few .*: give --max-seconds \d+ for all",
        ),
        ("select pg_sleep(5)", r"did not end within 1 s: give more with --max-seconds"),
    ],
)
def test_the_trial_of_a_slow_statement_counts_for_the_time_that_all_may_take(
    tune: Tune, dsn: str, admin: Admin, application_name: str, query: str, words: str
) -> None:
    begun = time.monotonic()
    done = tune(dsn, "--query", query, "--max-seconds", "1")
    assert time.monotonic() - begun < 3  # three executions would take no less with the shorter one
    assert done.status == 1
    assert re.search(words, done.errors), done.errors
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_statements_under_way_are_cancelled_when_the_time_is_up(
    tune: Tune, dsn: str, admin: Admin, application_name: str
) -> None:
    # Quick when it is tried out, slow when there are several sessions.
    slow = "select pg_sleep(case when count(*) > 2 then 30 else 0.01 end) from pg_stat_activity"
    query = f"{slow} where application_name = '{application_name}'"
    begun = time.monotonic()
    done = tune(dsn, "--query", query, "--seconds", "0.1", "--max-seconds", "2.5", "--json")
    assert time.monotonic() - begun < 20
    assert done.json()["ended"] == "time is up"
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_the_url_may_be_in_the_environment(tune: Tune, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    assert tune(*READING, *QUICK).status in MEASURED


# --- statements that cannot be measured ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "params", "words"),
    [
        ("selec", None, 'syntax error at or near "selec"'),
        ("select 1/0", None, "division by zero"),
        ("insert into {table} values (%s)", '["many"]', 'invalid input syntax for type integer: "many"'),
        ("insert into {table} values (1), (1)", None, "--commit"),
        ("vacuum", None, "VACUUM cannot run inside a transaction block"),
        ("delete from {table}; commit", None, "cannot insert multiple commands"),
        ("select %s", None, "need values: --params"),
        ("select $1::int", None, "need values: --params"),
        ("select %s, %s", "[1]", "2 placeholders but 1 parameters were passed: --params"),
        ("select 7 % %s", "[1]", "in which any other % is written %%"),
        ("select %(a)s", '{"b": 1}', "query parameter missing: a: --params"),
        ("select %s", '{"b": 1}', "positional placeholders (%s) require a sequence of parameters: --params"),
        ("-- nothing", None, "--query holds no statement"),
    ],
)
def test_a_statement_that_fails_is_reported_at_once_in_the_servers_words(
    tune: Tune, dsn: str, table: str, query: str, params: str | None, words: str
) -> None:
    given = ("--params", params) if params else ()
    fails_at_commit = words == "--commit"
    commit = ("--commit",) if fails_at_commit else ()
    done = tune(dsn, "--query", query.format(table=table), *given, *commit)
    assert done.status == 1
    assert done.output == ""
    assert ("duplicate key value violates unique constraint" if fails_at_commit else words) in done.errors
    assert "Traceback" not in done.errors


def test_a_second_command_is_not_executed(tune: Tune, dsn: str, admin: Admin, table: str) -> None:
    """It might be a COMMIT, of what was to be rolled back."""
    assert tune(dsn, "--query", f"insert into {table} values (1); commit").status == 1
    assert admin.value(f"select count(*) from {table}") == 0


def test_a_statement_that_takes_too_long_is_cancelled_and_the_remedy_named(
    tune: Tune, dsn: str, admin: Admin, application_name: str
) -> None:
    done = tune(dsn, "--query", "select pg_sleep(60)", "--seconds", "0.2")
    assert done.status == 1
    assert "did not end within 0.2 s: give more with --seconds" in done.errors
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


def test_a_statement_that_is_too_slow_to_be_counted_is_told_how_many_seconds_it_wants(tune: Tune, dsn: str) -> None:
    done = tune(dsn, "--query", "select pg_sleep(0.1)", "--seconds", "0.3")
    assert done.status == 1
    assert re.search(r"takes 0\.1\d* s, and 0\.3 s for each size are too few .*: give --seconds 1,", done.errors)


def test_a_statement_that_fails_under_load_ends_the_sweep_with_its_error(tune: Tune, dsn: str, table: str) -> None:
    # When there are 30 rows, which one connection after the other adds.
    query = f"insert into {table} select null from {table} having 1 / (30 - count(*)) is not null"
    done = tune(dsn, "--query", query, "--commit", "--max-size", "1")
    assert done.status == 1
    assert "under load, the statement fails: division by zero" in done.errors
    assert "30 statements were committed, and what they wrote stays" in done.errors


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--query", "select 1", "--params", "[1"), "argument --params: it is no JSON"),
        (("--query", "select 1", "--params", r'["\ud800"]'), "argument --params: it is not UTF-8"),
        (("--query", "select 1", "--params", "3"), "argument --params: it is JSON, but neither a list nor an object"),
        (("--query", " ; "), "argument --query: it is empty"),
        (("--query", "/* x */ commit"), "argument --query: COMMIT cannot be measured"),
        (("--query", "copy a to stdout"), "argument --query: COPY cannot be measured"),
        (("--query", "select 1", "--max-size", "0"), "argument --max-size: 0 is less than 1"),
        (("--query", "select 1", "--seconds", "nan"), "argument --seconds: 'nan' is no number of seconds"),
        (("--query", "select 1", "--plot", "picture.pdf"), "argument --plot: 'picture.pdf' is neither"),
        (("--query", "select 1", "--plot", "nowhere/at/all.png"), "argument --plot: 'nowhere/at/all.png' cannot be"),
        (("--query", "select 1", "--tasks", "3", "--max-size", "4"), "--tasks 3 cannot use --max-size 4"),
        ((), "--query"),
    ],
)
def test_bad_arguments_are_refused_with_the_option_and_the_remedy(
    tune: Tune, arguments: tuple[str, ...], words: str
) -> None:
    done = tune("host=127.0.0.1 port=1", *arguments)
    assert done.status == 2
    assert "usage: asyncpool tune" in done.errors
    assert words in done.errors


def test_no_server_named_is_refused(tune: Tune) -> None:
    done = tune(*READING)
    assert done.status == 2
    assert "give its URL, or set DATABASE_URL" in done.errors


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://nobody:hunter2secret@127.0.0.1:1/nowhere",
        "postgresql://nobody:hunter2secret@x@127.0.0.1:1/nowhere",
        "host=127.0.0.1 port=1 password=not hunter2secret",
    ],
)
def test_a_server_that_cannot_be_reached_is_reported_without_a_password(tune: Tune, url: str) -> None:
    done = tune(url, *READING)
    assert done.status == 2
    assert done.errors.startswith("asyncpool tune: ")
    assert "hunter2secret" not in done.output + done.errors
    of_json = tune(url, *READING, "--json")
    assert of_json.status == 2
    assert "hunter2secret" not in of_json.output + of_json.errors
    error = of_json.json()["error"]
    assert done.errors == f"asyncpool tune: {error['message']}\nfix: {error['fix']}\n"
    assert "--timeout" not in error["fix"]  # it has no such option


def test_a_statement_that_fails_is_an_error_of_the_json(tune: Tune, dsn: str) -> None:
    done = tune(dsn, "--query", "select 1/0", "--json")
    assert (done.status, done.errors) == (1, "")
    outcome = done.json()
    assert outcome["ok"] is False
    assert outcome["error"] == {"kind": "statement", "message": "the statement fails: division by zero", "fix": None}


WITHOUT_RICH = """if True:
    import sys
    sys.modules["rich"] = sys.modules["rich.console"] = None  # as if it were not installed
    from asyncpool.cli import main
    sys.exit(main(sys.argv[1:]))
"""


def test_without_rich_it_says_what_to_install_and_json_works(dsn: str) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_RICH, "tune", dsn, *READING, *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'asyncpool-pg[cli]' (from a clone: pip install '.[cli]')" in done.stderr
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode in MEASURED, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["ok"] is (done.returncode == 0)
    assert [one["size"] for one in outcome["sizes"]] == [1, 2]


def test_more_than_half_of_the_free_connections_are_taken_with_force_only(tune: Tune, mortal: MortalServer) -> None:
    dsn = mortal.dsn("tuned", user="app")
    done = tune(dsn, *READING, "--max-size", "40")
    assert done.status == 2
    assert re.search(
        r"--max-size 40 is too many: 6\d connections are free \(max_connections 70, 3 reserved", done.errors
    )
    assert "with --force only; at most 3" in done.errors
    eventually_blocking(lambda: mortal.sessions("tuned") == 0)
    forced = tune(dsn, *READING, "--max-size", "40", "--force", "--max-seconds", "0.3", "--json")
    assert forced.json()["ended"] == "time is up"
    beyond = tune(dsn, *READING, "--max-size", "99", "--force")
    assert beyond.status == 2
    assert "that is all there are" in beyond.errors


def test_doctor_and_tune_tell_a_superuser_the_same_number_of_free_connections(
    tune: Tune, mortal: MortalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    dsn = mortal.dsn("told")
    of_tune = tune(dsn, *READING, *QUICK, "--json").json()["free_connections"]
    eventually_blocking(lambda: mortal.sessions("told") == 0)
    main(["doctor", dsn, "--json"])
    assert json.loads(capsys.readouterr().out)["facts"]["connections"]["free"] == of_tune


@pytest.mark.parametrize("whose", ["role app", "database postgres"])
def test_the_limits_of_the_role_and_the_database_count(tune: Tune, mortal: MortalServer, whose: str) -> None:
    mortal.admin.execute(f"alter {whose} connection limit 5")
    try:
        done = tune(mortal.dsn("tuned", user="app"), *READING, "--seconds", "0.1", "--json")
        assert done.status in MEASURED, done.errors
        # Half of what is left; the tests' own session is in the database too.
        outcome = done.json()
        assert outcome["free_connections"] in ((5,) if whose == "role app" else (3, 4))
        assert outcome["sizes"][-1]["size"] <= 2
        mortal.admin.execute(f"alter {whose} connection limit 2")
        full = tune(mortal.dsn("tuned", user="app"), *READING, "--max-size", "2")
        assert full.status == 2
        assert "--max-size 2 is too many: " in full.errors
        assert "limit of 2" in full.errors
        mortal.admin.execute(f"alter {whose} connection limit {1 if whose == 'role app' else 2}")
        eventually_blocking(lambda: mortal.sessions("tuned") == 0)
        without = tune(mortal.dsn("tuned", user="app"), *READING)
        assert without.status == 2
        assert re.search(r"no pool can be measured: (1 connection is|0 connections are) free \(this ", without.errors)
    finally:
        mortal.admin.execute(f"alter {whose} connection limit -1")


# --- how it looks -------------------------------------------------------------------------------------------


def test_a_pipe_gets_a_plain_table_of_80_columns_and_a_sentence_a_line(dsn: str) -> None:
    with tuning(dsn, *READING, *QUICK, COLUMNS="80") as process:
        output, errors = process.communicate()
    assert process.returncode in MEASURED, errors
    assert "\x1b" not in output + errors
    assert "\r" not in output + errors
    assert re.search(r"^ +size +statements/s +p50 ms +p99 ms +waiting", output, re.MULTILINE)
    table = [line for line in output.splitlines() if "█" in line]
    assert [line.split()[0] for line in table] == ["1", "2", "one-shots"]
    assert all(len(line) <= 80 for line in table)
    assert re.search(r"^(max_size=1: 1 connection carries|No recommendation)", output, re.MULTILINE)
    assert re.search(r"^size 1: [\d,.]+/s, p99 (?:[\d,.]+|-) ms$", errors, re.MULTILINE)


def test_an_output_that_knows_ascii_only_gets_bars_of_number_signs(dsn: str) -> None:
    with tuning(dsn, "--query", "select '×'", *QUICK, PYTHONIOENCODING="ascii", COLUMNS="80") as process:
        output, errors = process.communicate()
    assert process.returncode in MEASURED, errors
    assert "##" in output
    assert output.isascii()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 30])
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_lines_that_fit_it(dsn: str, columns: int, no_color: bool) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {"TERM": "xterm-256color", "NO_COLOR": "1" if no_color else "", "COLUMNS": ""}
    with tuning(dsn, *READING, *QUICK, stream=its, **environment) as process:
        os.close(its)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # as Linux says that the other end is closed
                break
            if not piece:
                break
            output += piece
    os.close(ours)
    assert process.returncode in MEASURED
    text = output.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert [line for line in re.split(r"[\r\n]+", plain) if len(line) > columns] == []
    assert ("█" in plain) == (columns == 80)
    has_colours = re.search(r"\x1b\[(?:\d;)?3\d", text) is not None
    assert has_colours is not no_color


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_has_been_measured_so_far(
    dsn: str, admin: Admin, application_name: str, which: signal.Signals
) -> None:
    with tuning(dsn, *READING, "--seconds", "1", "--max-size", "16", "--json") as process:
        assert process.stderr is not None
        while "size 1:" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(which)
        output, errors = process.communicate()
    assert process.returncode == 128 + which
    assert errors.endswith("interrupted\n")
    outcome = json.loads(output)
    assert (outcome["ended"], outcome["conclusive"]) == ("interrupted", False)
    assert outcome["sizes"][0]["size"] == 1
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


# --- the picture --------------------------------------------------------------------------------------------


def test_a_png_and_an_svg_are_drawn(tune: Tune, dsn: str, tmp_path: Path) -> None:
    png = tmp_path / "picture.png"
    assert tune(dsn, *READING, *QUICK, "--plot", str(png)).status in MEASURED
    written = png.read_bytes()
    assert written.startswith(b"\x89PNG\r\n\x1a\n")
    assert written.endswith(b"IEND\xaeB`\x82")

    svg = tmp_path / "picture.svg"
    # What a picture's own language of formulas would trip over.
    assert tune(dsn, "--query", "select '$\\frac{$' as \"<&>\"", *QUICK, "--plot", str(svg)).status in MEASURED
    root = ET.fromstring(svg.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_without_the_extra_it_says_what_to_install_before_it_measures(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find_spec(name, *more)
    )
    done = tune("host=127.0.0.1 port=1", *READING, "--plot", str(tmp_path / "picture.png"))
    assert done.status == 2
    assert "pip install 'asyncpool-pg[plot]'" in done.errors


def test_the_picture_library_is_loaded_for_a_picture_only(dsn: str) -> None:
    script = "import sys; from asyncpool.cli import main; main(sys.argv[1:]); sys.exit('matplotlib' in sys.modules)"
    command = [sys.executable, "-c", script, "tune", dsn, *READING, *QUICK]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_application_name_of_the_url_is_kept(tune: Tune, dsn: str, application_name: str) -> None:
    query = "select 1 / (current_setting('application_name') = %s)::int"
    done = tune(make_conninfo(dsn), "--query", query, "--params", json.dumps([application_name]), *QUICK)
    assert done.status in MEASURED, done.errors
