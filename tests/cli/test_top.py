"""`asyncpool top`: what it shows in a terminal and elsewhere, and what it says when there is nothing to show."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kit.waiting import eventually_blocking

from asyncpool import SyncPool
from asyncpool.cli import main
from asyncpool.cli.top import feed
from asyncpool.cli.top.feed import Look, NotReadable, Snapshot, difference, parse
from asyncpool.events import Holder
from asyncpool.histogram import Durations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if not hasattr(socket, "AF_UNIX"):
    pytest.skip("Python has no Unix sockets on this system", allow_module_level=True)

pytest.importorskip("rich")

from kit.terminal import Terminal
from rich.console import Console

from asyncpool.cli.top.view import PoolView, duration, shortened

TOP = (sys.executable, "-W", "error", "-m", "asyncpool", "top")
NOBODY = 65534


@pytest.fixture
def path() -> Iterator[str]:
    """Of a socket that is not there yet; short enough for one."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        Path(directory).chmod(0o755)
        yield f"{directory}/s"


@pytest.fixture
def pool(dsn: str, path: str) -> Iterator[SyncPool[Any]]:
    """An open pool, which publishes itself."""
    with SyncPool(dsn, monitor=path, name="shop", min_size=2, max_size=4) as pool:
        yield pool


def top(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run without a terminal."""
    environment = {"PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [*TOP, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
        check=False,
        env={**os.environ, **environment},
    )


# --- in a terminal ------------------------------------------------------------------------------------------


def test_a_terminal_of_80_columns_shows_the_pool_and_goes_on_until_q(pool: SyncPool[Any], path: str) -> None:
    with Terminal(*TOP, path) as terminal, pool.acquire() as conn:
        conn.execute("select 1")
        screen = terminal.wait_for(lambda screen: any("acquired at" in line for line in screen))
        assert screen[0].startswith("shop  2 to 4 connections, open for ")
        assert set(screen[1]) <= set("█▓▒░·")
        assert screen[2] == "1 in use, 1 idle, of 4"
        assert screen[3] == "0 waiting"
        [holder] = [line for line in screen if "test_top.py" in line]
        assert re.match(rf" +[\d.]+ (m?s|min) transaction +{conn.info.backend_pid} MainThread ", holder)
        assert max(map(len, screen)) <= 80
        assert len(screen) <= 24
        # It lives: what happened in the last second is told with the second line that comes.
        for _ in range(20):
            pool.execute("select 1")
        terminal.wait_for(lambda screen: any(re.match(r"one-shots +[\d.]+ +20$", line) for line in screen))
        assert terminal.settings_now != terminal.settings
        terminal.type("q")
        assert terminal.end() == 0
        assert terminal.settings_now == terminal.settings
        assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(("signal_number", "status"), [(None, 0), (signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_control_c_and_a_signal_end_it_and_leave_the_terminal_as_it_was(
    pool: SyncPool[Any], path: str, signal_number: int | None, status: int
) -> None:
    with Terminal(*TOP, path) as terminal:
        terminal.wait_for(lambda screen: "0 waiting" in screen)
        if signal_number is None:
            terminal.type("\x03")
        else:
            terminal.process.send_signal(signal_number)
        assert terminal.end() == status
        assert terminal.settings_now == terminal.settings
        assert "Traceback" not in terminal.output
        assert "\x1b[?1049l" in terminal.output  # what was on the screen before is there again


def test_a_narrow_and_low_terminal_shows_what_it_has_room_for(pool: SyncPool[Any], path: str) -> None:
    with Terminal(*TOP, path, columns=50, lines=18) as terminal:
        connections = [pool.getconn() for _ in range(4)]
        screen = terminal.wait_for(lambda screen: any("more" in line for line in screen))
        for connection in connections:
            pool.putconn(connection)
    assert max(map(len, screen)) <= 50
    assert len(screen) <= 18
    assert sum("test_top.py" in line for line in screen) >= 1
    assert any(re.match(r"and \d more$", line) for line in screen)


def test_without_colours_the_states_are_told_apart_by_their_characters(pool: SyncPool[Any], path: str) -> None:
    with Terminal(*TOP, path, NO_COLOR="1") as terminal, pool.acquire():
        screen = terminal.wait_for(lambda screen: "1 in use, 1 idle, of 4" in screen)
    assert screen[1] == "█" * 15 + "░" * 15 + "·" * 30
    assert not re.search(r"\x1b\[[0-9;]*\b[34][0-9]\b[0-9;]*m", terminal.output)


def test_it_awaits_a_pool_that_is_gone_and_shows_it_when_it_is_back(pool: SyncPool[Any], path: str) -> None:
    with Terminal(*TOP, path) as terminal:
        terminal.wait_for(lambda screen: "0 waiting" in screen)
        pool.close()
        screen = terminal.wait_for(lambda screen: "gone, and awaited" in screen[1])
        assert screen[0].startswith("shop")  # the last that was heard is still shown
        pool.open()
        terminal.wait_for(lambda screen: "gone, and awaited" not in screen[1] and "0 waiting" in screen)
        terminal.type("q")
        assert terminal.end() == 0


def test_once_prints_to_the_terminal_and_ends(pool: SyncPool[Any], path: str) -> None:
    with Terminal(*TOP, path, "--once") as terminal:
        assert terminal.end() == 0
    assert "0 in use, 2 idle, of 4" in terminal.screen()
    assert "\x1b[?1049h" not in terminal.output


# --- elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_what_is_no_terminal_gets_the_pool_once(pool: SyncPool[Any], path: str, environment: dict[str, str]) -> None:
    with pool.acquire():
        done = top(path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "shop" in done.stdout
    assert "test_top.py" in done.stdout
    assert "\x1b[?1049h" not in done.stdout
    if not environment:
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_an_output_of_ascii_gets_ascii(pool: SyncPool[Any], path: str) -> None:
    done = top(path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "=" * 30 + "." * 30 in done.stdout


def test_json_is_one_line_as_the_pool_sends_it(pool: SyncPool[Any], path: str) -> None:
    done = top(path, "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert json.loads(done.stdout)["pool"] == "shop"


def test_json_needs_no_library_and_what_is_printed_says_which_one_it_needs(pool: SyncPool[Any], path: str) -> None:
    script = "import sys; sys.modules['rich.console'] = None; from asyncpool.cli import main; sys.exit(main())"
    for arguments, status, words in (([path, "--json"], 0, ""), ([path], 2, "pip install 'asyncpool-pg[cli]'")):
        command = [sys.executable, "-c", script, "top", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == status, done.stderr
        assert words in done.stderr


# --- when there is nothing to show --------------------------------------------------------------------------


def refused(path: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What it says when it ends with status 2."""
    assert main(["top", path, "--json"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"asyncpool top: {path}: ")
    assert errors.count("\n") == 1
    return errors


def test_a_file_that_is_not_there_is_named(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such file: is the pool open" in refused(path, capsys)


def test_a_file_that_is_no_socket_is_told_from_a_socket_of_a_dead_process(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    assert "nobody listens there: the process that made it has ended" in refused(path, capsys)
    os.unlink(path)
    Path(path).write_text("")
    assert "this is no socket" in refused(path, capsys)


def test_a_path_that_no_socket_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "too long" in refused("/tmp/" + "x" * 200, capsys)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody else")
def test_another_users_pool_is_not_for_looking_at(
    pool: SyncPool[Any], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.seteuid(NOBODY)
    try:
        assert "permission denied: only the user who runs the pool may look" in refused(path, capsys)
    finally:
        os.seteuid(0)


@contextmanager
def somebody(path: str, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Who listens there and is no pool."""

    def serve() -> None:
        with listener.accept()[0] as client:
            answer(client)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(10)
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\n", "somebody listens there who is no pool's monitor"),
        (b"\xff\xfe\n", "somebody listens there who is no pool's monitor"),
        (b"[]\n", "somebody listens there who is no pool's monitor"),
        (b'{"format":1}\n', "somebody listens there who is no pool's monitor"),
        (b'{"format":2}\n', "it speaks format 2, and this program 1: use the pool's version"),
        (b'{"refused":"8 clients look at this pool already"}\n', "lets nobody else in: 8 clients look"),
        (b"", "the pool was closed"),
    ],
)
def test_who_does_not_speak_as_a_pool_does_is_found_out(
    path: str, capsys: pytest.CaptureFixture[str], answer: bytes, words: str
) -> None:
    with somebody(path, lambda client: client.sendall(answer)):
        assert words in refused(path, capsys)


def test_a_line_that_never_ends_is_not_read_to_its_end(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LONGEST_LINE", 100_000)

    def flood(client: socket.socket) -> None:
        with pytest.raises(OSError):
            while True:
                client.sendall(b"x" * 4096)

    with somebody(path, flood):
        assert "somebody listens there who is no pool's monitor" in refused(path, capsys)


def test_who_says_nothing_is_not_waited_for_long(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "FIRST_LINE_WITHIN", 0.1)

    def listen(client: socket.socket) -> None:
        assert client.recv(1) == b""

    with somebody(path, listen):
        assert "no answer within 0.1 s: the pool's event loop is blocked" in refused(path, capsys)


# --- what is made of the lines ------------------------------------------------------------------------------


def histogram(*seconds: float) -> Any:
    durations = Durations()
    for each in seconds:
        durations.record(each)
    return durations.snapshot()


def snapshot(**changed: Any) -> Snapshot:
    """Of a pool with one connection."""
    states = ("min", "max", "all", "leased", "idle", "connecting", "checking", "recycling", "closing")
    totals = ("acquires", "timeouts", "cancelled", "connects", "connect_errors", "one_shots")
    one = Snapshot(
        line="",
        pool="shop",
        pid=4711,
        open_for=10.0,
        phase="open",
        sizes={**dict.fromkeys(states, 0), "max": 10, "all": 1, "idle": 1},
        waiting=0,
        totals=dict.fromkeys(totals, 0),
        wait=histogram(),
        hold=histogram(),
        connect=histogram(),
        holders=[],
        connect_error=None,
    )
    return replace(one, **changed)


def shown(look: Look, *, width: int = 80, height: int | None = None, trouble: str | None = None) -> list[str]:
    """The view, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(PoolView(look, height=height, trouble=trouble))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_rates_are_those_of_the_time_between_two_looks() -> None:
    first = Look(snapshot(totals={**snapshot().totals, "acquires": 100}))
    assert first.rate("acquires") is None
    assert first.since("wait") is None
    second = first.then(snapshot(open_for=12.0, totals={**snapshot().totals, "acquires": 130}))
    assert second.rate("acquires") == 15


@pytest.mark.parametrize(
    "changed", [{"pid": 4712, "open_for": 11.0}, {"open_for": 0.5}, {"open_for": 11.0, "totals": snapshot().totals}]
)
def test_a_pool_that_was_opened_anew_is_not_compared_with_what_it_was(changed: dict[str, Any]) -> None:
    first = Look(snapshot(totals={**snapshot().totals, "acquires": 100}))
    assert first.then(snapshot(**changed)).before is None


def test_the_last_seconds_quantiles_are_those_of_the_difference() -> None:
    now, before = histogram(0.001, 0.001, 2.0, 2.0, 2.0), histogram(0.001, 0.001)
    between = difference(now, before)
    assert between.count == 3
    assert between.p50 == pytest.approx(2.0, rel=0.25)
    quiet = difference(now, now)
    assert (quiet.count, quiet.max, quiet.p99) == (0, 0.0, 0.0)
    assert difference(before, now).count == 0  # a bucket that seems to have lost one


def test_holders_are_sorted_and_cut_to_the_lines_that_there_are() -> None:
    holders = [Holder(f"/srv/app.py:{line} in work", line, 100 + line, None, f"task 't{line}'") for line in range(30)]
    line = json.dumps({**told(), "holders": [told_holder(holder) for holder in holders]})
    now = parse(line.encode())
    assert [holder.held_for for holder in now.holders] == sorted(range(30), reverse=True)
    look = Look(replace(now, sizes={**now.sizes, "leased": 40}))
    for height in range(14, 60):
        lines = shown(look, height=height)
        assert len(lines) <= height
        held = sum("app.py" in line for line in lines)
        assert lines[-1] == f"and {40 - held} more" if held else "app.py" not in "".join(lines)
    assert sum("app.py" in line for line in shown(look)) == 30


def told() -> dict[str, Any]:
    """A line as the pool sends it."""
    empty = {"count": 0, "sum": 0.0, "max": 0.0, "counts": []}
    one = snapshot()
    return {
        "format": 1,
        "pool": one.pool,
        "pid": one.pid,
        "open_for": one.open_for,
        "phase": one.phase,
        "sizes": one.sizes,
        "waiting": one.waiting,
        "totals": one.totals,
        "wait": empty,
        "hold": empty,
        "connect": empty,
        "holders": [],
        "connect_error": None,
    }


def told_holder(holder: Holder) -> dict[str, Any]:
    return {
        "site": holder.site,
        "owner": holder.owner,
        "held_for": holder.held_for,
        "transaction": holder.transaction,
        "pid": holder.backend_pid,
    }


def test_names_cannot_move_the_cursor_nor_be_taken_for_markup() -> None:
    nasty = "\x1b[2J[bold red]x[/]\r\n\x07"
    holder = Holder(nasty, 1.0, 1, None, nasty, nasty)
    line = {**told(), "pool": nasty, "holders": [told_holder(holder)], "connect_error": {"text": nasty, "age": 1.0}}
    text = "\n".join(shown(Look(parse(json.dumps(line).encode())), width=200))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\x07" not in text
    assert text.count("[bold") == 5  # in the title, the error and the three columns


@pytest.mark.parametrize("width", [20, 30, 50, 79, 80, 81, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    huge = dict.fromkeys(snapshot().totals, 123_456_789)
    holder = Holder("/a/very/long/way/to/a/program.py:12345 in " + "x" * 300, 1e5, 2**22, None, "y" * 300, "lost")
    now = snapshot(
        pool="z" * 300,
        sizes=dict.fromkeys(snapshot().sizes, 100),
        waiting=10**9,
        totals=huge,
        wait=histogram(86400.0, 7.0),
        holders=[holder] * 3,
        connect_error=("w" * 300, 3.0),
    )
    for line in shown(Look(now), width=width, trouble="v" * 300):
        assert len(line) <= width


def test_what_is_wrong_is_told_in_as_many_lines_as_it_takes_and_room_is_left_for_the_rest() -> None:
    words = "connection to server failed: Connection refused. Is the server running on that host and accepting it?"
    look = Look(snapshot(connect_error=(words, 3.0), holders=[Holder("app.py:1 in work", 1.0, 1)] * 9))
    lines = shown(look, width=50, height=24, trouble=f"gone, and awaited: {words}")
    assert len(lines) <= 24
    joined = " ".join(lines)
    assert f"gone, and awaited: {words}" in joined
    assert f"last connect error, 3.0 s ago: {words}" in joined


def test_few_connections_of_many_are_seen_in_the_bar() -> None:
    sizes = {**snapshot().sizes, "max": 1000, "all": 999, "leased": 1, "connecting": 1, "idle": 997}
    bar = shown(Look(snapshot(sizes=sizes)))[1]
    assert (bar.count("█"), bar.count("▒"), len(bar)) == (1, 1, 60)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "<0.1 ms"),
        (0.0001, "<0.1 ms"),
        (0.00234, "2.3 ms"),
        (0.0456, "46 ms"),
        (0.9999, "1000 ms"),
        (1.0, "1.0 s"),
        (59.0, "59 s"),
        (90.0, "1.5 min"),
        (7200.0, "2.0 h"),
        (864000.0, "10 d"),
    ],
)
def test_a_duration_has_its_unit_and_no_more_digits_than_are_read(seconds: float, words: str) -> None:
    assert duration(seconds) == words
    assert len(words) <= 8


def test_of_a_long_site_the_file_and_the_line_are_left() -> None:
    site = "/srv/application/package/module.py:12 in handler"
    assert shortened(site, 80) == site
    assert shortened(site, 30) == "module.py:12 in handler"
    assert shortened(site, 15) == "module.py:12 i…"


def test_a_snapshot_that_lacks_something_is_not_shown() -> None:
    for field in told():
        incomplete = {name: value for name, value in told().items() if name != field}
        with pytest.raises(NotReadable):
            parse(json.dumps(incomplete).encode())


def test_the_connection_is_ended_with_the_look(pool: SyncPool[Any], path: str) -> None:
    assert main(["top", path, "--json"]) == 0
    runner = pool._pool._runner
    assert runner is not None
    monitor = runner._monitor
    assert monitor is not None
    eventually_blocking(lambda: monitor.clients == 0)
