"""The `monitor` option: who may look at a pool and what he sees, and that nobody who looks can do it harm."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import gc
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolError, PoolTimeout, SyncPool
from asyncpool._io import monitor
from asyncpool.config import SOCKET_PATH_LENGTH
from asyncpool.psycopg2 import pool as psycopg2_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

fcntl = pytest.importorskip("fcntl")

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="Python has no Unix sockets on this system")

NOBODY = 65534


@pytest.fixture
def path() -> Iterator[str]:
    """Of a socket that is not there yet, in a directory that everybody may enter; short enough for one."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        Path(directory).chmod(0o755)
        yield f"{directory}/s"


def connect(path: str) -> socket.socket:
    """A client that waits for ten seconds at most."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    try:
        client.connect(path)
    except BaseException:
        client.close()
        raise
    return client


def next_line(path: str) -> dict[str, Any]:
    """What a client is told who comes now."""
    with connect(path) as client, client.makefile("rb") as lines:
        return told(lines.readline())


def told(line: bytes) -> dict[str, Any]:
    assert line.endswith(b"\n")
    outcome: dict[str, Any] = json.loads(line)
    return outcome


async def look(path: str) -> dict[str, Any]:
    return await asyncio.to_thread(next_line, path)


def looking(pool: Pool[Any]) -> int:
    """How many clients the pool has."""
    assert pool._runner is not None
    assert pool._runner._monitor is not None
    return pool._runner._monitor.clients


def is_there(path: str) -> bool:
    return os.path.lexists(path)


# --- what is told -------------------------------------------------------------------------------------------


@on_both_loops
async def test_who_connects_is_told_a_line_at_once_and_one_each_second(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path, min_size=2, max_size=3) as pool:
        for _ in range(30):
            async with pool.acquire():
                pass
        reader, writer = await asyncio.open_unix_connection(path)
        first = told(await reader.readline())
        await pool.fetchval("select 1")
        for _ in range(30):
            async with pool.acquire():
                pass
        second = told(await reader.readline())
        writer.close()
    between = second["open_for"] - first["open_for"]
    assert 0.9 < between < 10
    assert second["acquires_per_second"] == pytest.approx(30 / between, rel=0.01)
    assert (first["totals"]["one_shots"], second["totals"]["one_shots"]) == (0, 1)
    assert (first["format"], first["pool"], first["pid"]) == (1, pool.name, os.getpid())


async def test_the_line_has_the_sizes_the_totals_the_histograms_and_the_holders(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path, min_size=2, max_size=3, name="shop") as pool:
        async with pool.acquire() as conn, pool.acquire():
            await conn.execute("select 1")
            line = await look(path)
            [longest, _] = line["holders"]
            assert longest["pid"] == conn.info.backend_pid
        stats = pool.stats()
    sizes = {"min": 2, "max": 3, "all": 2, "leased": 2, "idle": 0}
    assert {state: line["sizes"][state] for state in sizes} == sizes
    assert (line["pool"], line["phase"], line["waiting"], line["connect_error"]) == ("shop", "open", 0, None)
    assert (line["totals"]["acquires"], line["totals"]["connects"]) == (2, 2)
    assert (line["wait"]["count"], line["connect"]["count"]) == (2, 2)
    assert line["connect"]["max"] == pytest.approx(stats.connect.max, abs=1e-6)
    assert line["connect"]["counts"] == list(stats.connect.counts[: len(line["connect"]["counts"])])
    assert "test_monitor.py" in longest["site"]
    assert "Task-" in longest["owner"]
    assert longest["transaction"] == "in a transaction"
    assert 0 < longest["held_for"] < 10


async def test_callers_in_line_and_the_rate_of_acquires_are_told(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path, max_size=1) as pool:
        async with pool.acquire():
            waiting = asyncio.ensure_future(pool.acquire(timeout=0.05))
            await eventually(lambda: pool.stats().waiting == 1)
            line = await look(path)
            with pytest.raises(PoolTimeout):
                await waiting
        assert line["waiting"] == 1
        assert line["acquires_per_second"] == pytest.approx(1 / line["open_for"], rel=0.1, abs=0.1)
        await asyncio.sleep(monitor.STALE_AFTER)  # within it the same line is told again
        assert (await look(path))["totals"]["timeouts"] == 1


async def test_the_last_connect_error_is_told_without_the_password(path: str) -> None:
    wrong = "host=127.0.0.1 port=1 user=app password=hunter2secret dbname=app"
    pool: Pool[Any] = Pool(wrong, monitor=path, min_size=1)
    await pool.open(wait=False)
    with connect(path) as client:
        client.setblocking(False)
        received = b""

        def error() -> Any:
            nonlocal received
            try:
                received += client.recv(65536)
            except BlockingIOError:
                return None
            *lines, _ = received.split(b"\n")
            return lines and json.loads(lines[-1])["connect_error"]

        found = await eventually(error)
    await pool.close()
    assert "connection failed" in found["text"]
    assert 0 <= found["age"] < 10
    assert b"hunter2secret" not in received


async def test_of_many_holders_those_who_hold_longest_are_told_and_a_line_stays_short(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path, max_size=60, max_connecting=20) as pool:
        connections = [await pool.acquire() for _ in range(60)]
        line = await look(path)
        for connection in connections:
            await pool.release(connection)
    assert line["sizes"]["leased"] == 60
    assert len(line["holders"]) == 50
    held = [holder["held_for"] for holder in line["holders"]]
    assert held == sorted(held, reverse=True)
    assert len(json.dumps(line)) < monitor.SEND_BUFFER / 4


def test_a_pool_of_threads_has_one_too(dsn: str, path: str) -> None:
    with SyncPool(dsn, monitor=path, min_size=1) as pool:
        with pool.acquire():
            line = next_line(path)
        assert line["sizes"]["leased"] == 1
        assert "MainThread" in line["holders"][0]["owner"]
    assert not is_there(path)


def test_the_drop_in_for_psycopg2_takes_the_option_as_well(dsn: str, path: str) -> None:
    connections = psycopg2_pool.SimpleConnectionPool(1, 2, dsn, monitor=path)
    assert next_line(path)["sizes"]["max"] == 2
    connections.closeall()
    assert not is_there(path)


# --- the file -----------------------------------------------------------------------------------------------


async def test_the_file_is_there_while_the_pool_is_open_and_at_every_opening(dsn: str, path: str) -> None:
    pool: Pool[Any] = Pool(dsn, monitor=Path(path))
    for _ in range(2):
        assert not is_there(path)
        async with pool:
            assert stat.S_ISSOCK(os.lstat(path).st_mode)
            assert (await look(path))["phase"] == "open"
    assert not is_there(path)


async def test_it_is_removed_when_the_pool_cannot_be_opened(path: str) -> None:
    with pytest.raises(psycopg.OperationalError):
        await Pool("host=/nowhere", monitor=path).open(timeout=0)
    assert not is_there(path)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
async def test_only_the_user_may_open_it_whatever_the_umask_is(dsn: str, path: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        async with Pool(dsn, monitor=path):
            assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    finally:
        os.umask(before)


async def test_nobody_can_connect_before_the_mode_is_right(
    dsn: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file does not take the socket's mode, it has that of the umask until it is changed."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "as on macOS")

    def chmod(changed: str, mode: int) -> None:
        with pytest.raises(ConnectionRefusedError):
            connect(changed)
        modes.append(mode)
        real_chmod(changed, mode)

    modes: list[int] = []
    real_chmod = os.chmod
    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "chmod", chmod)
    before = os.umask(0)
    try:
        async with Pool(dsn, monitor=path):
            assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    finally:
        os.umask(before)
    assert modes == [0o600]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_not_let_in(dsn: str, path: str) -> None:
    client = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    async with Pool(dsn, monitor=path):
        process = await asyncio.create_subprocess_exec(
            shutil.which("python3", path="/usr/bin") or sys.executable,
            "-c",
            client,
            path,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            stderr=subprocess.PIPE,
        )
        _, errors = await process.communicate()
    assert b"PermissionError" in errors


def stale_socket(path: str) -> None:
    """That of a process which has died: bound, and nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)


async def test_the_file_of_a_dead_process_is_replaced(dsn: str, path: str) -> None:
    stale_socket(path)
    async with Pool(dsn, monitor=path):
        assert (await look(path))["phase"] == "open"
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert not is_there(path)


async def test_where_another_pool_listens_opening_fails_and_says_so(
    dsn: str, path: str, application_name: str, admin: Any
) -> None:
    async with Pool(dsn, monitor=path, name="first"):
        second: Pool[Any] = Pool(dsn, monitor=path, name="second")
        words = "second: cannot listen at monitor='.*': somebody listens there already: give each pool"
        with pytest.raises(PoolError, match=words):
            await second.open()
        assert second.stats().size == 0
        assert (await look(path))["pool"] == "first"
    async with second:
        assert (await look(path))["pool"] == "second"


def test_a_blocking_pool_is_refused_in_the_same_way_and_leaves_no_thread(dsn: str, path: str) -> None:
    with SyncPool(dsn, monitor=path), pytest.raises(PoolError, match="somebody listens there already"):
        SyncPool(dsn, monitor=path).open()
    assert not is_there(path)


def test_a_socket_that_does_not_listen_yet_is_not_taken_for_a_dead_ones(
    dsn: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pools that open at once, of which the other has come between its bind() and its listen()."""
    monkeypatch.setattr(monitor, "_LOCK_TRIES", 10_000)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        fcntl.flock(directory, fcntl.LOCK_EX)
        other.bind(path)

        def go_on() -> None:
            other.listen()
            os.close(directory)

        timer = threading.Timer(0.1, go_on)
        timer.start()
        with pytest.raises(PoolError, match="somebody listens there already"):
            SyncPool(dsn, monitor=path).open()
        timer.join()


def test_a_directory_that_somebody_keeps_locked_is_not_waited_for(dsn: str, path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with SyncPool(dsn, monitor=path):
        assert is_there(path)
    os.close(directory)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_never_removed(dsn: str, path: str, kind: str) -> None:
    if kind == "file":
        Path(path).write_text("precious")
    elif kind == "directory":
        Path(path).mkdir()
    else:
        Path(path).symlink_to("precious")
    before = os.lstat(path)
    with pytest.raises(PoolError, match="a file that is no socket is there, and is left alone"):
        SyncPool(dsn, monitor=path).open()
    assert os.lstat(path) == before


def test_a_file_that_somebody_has_put_there_meanwhile_stays(dsn: str, path: str) -> None:
    with SyncPool(dsn, monitor=path):
        os.unlink(path)
        Path(path).write_text("precious")
    assert Path(path).read_text() == "precious"


async def test_a_missing_directory_is_named(dsn: str, path: str) -> None:
    with pytest.raises(PoolError, match=f"there is no directory '{path}': make it first"):
        await Pool(dsn, monitor=f"{path}/s").open()


def test_it_may_lie_where_one_may_write_and_not_read(dsn: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_directory(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")  # root would not get that

    monkeypatch.setattr(os, "open", open_directory)
    listener = monitor.listen(path, "shop", made_by=os.getpid())
    assert listener is not None
    assert is_there(path)
    listener.remove()


def test_a_forked_child_goes_without_only_where_somebody_else_listens(path: str) -> None:
    with pytest.raises(PoolError, match="there is no directory"):
        monitor.listen(f"{path}/s", "shop", made_by=0)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("", ValueError, "monitor must be the path of a socket, not ''"),
        ("a\0b", ValueError, "monitor must be the path of a socket"),
        ("\0abstract", ValueError, "monitor must be the path of a socket"),
        ("/tmp/" + "x" * 200, ValueError, f"monitor is a path of 205 bytes, and .* {SOCKET_PATH_LENGTH} here"),
        ("/" + "ä" * 54, ValueError, "monitor is a path of 109 bytes"),
        ("/\ud800", ValueError, "monitor must be a path that this system can encode"),
        (b"/tmp/s", TypeError, "monitor must be the path of a socket, a str or os.PathLike, not b'/tmp/s'"),
        (True, TypeError, "monitor must be the path of a socket, a str or os.PathLike, not True"),
        (7, TypeError, "monitor must be the path of a socket"),
    ],
)
def test_a_path_that_no_socket_can_have_is_refused_when_the_pool_is_made(
    value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Pool(monitor=value)
    with pytest.raises(error, match=words):
        SyncPool(monitor=value)


async def test_the_longest_path_that_is_not_refused_can_be_listened_at(dsn: str, path: str) -> None:
    longest = path + "x" * (SOCKET_PATH_LENGTH - len(path))
    async with Pool(dsn, monitor=longest):
        assert is_there(longest)
    with pytest.raises(ValueError, match="monitor is a path of"):
        Pool(dsn, monitor=longest + "x")


def test_without_unix_sockets_the_option_is_refused_when_the_pool_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(ValueError, match="monitor needs Unix sockets, which Python does not have on this system"):
        Pool(monitor="s")


# --- those who look -----------------------------------------------------------------------------------------


async def test_what_a_client_sends_is_not_taken(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path) as pool:
        with connect(path) as client:
            await asyncio.to_thread(client.recv, 65536)
            with pytest.raises(BrokenPipeError):
                client.send(b'{"resize": [0, 1]}\n')
            assert await asyncio.to_thread(client.recv, 65536)
        assert pool.stats().max_size == 10


async def test_who_says_that_he_sends_nothing_is_told_all_the_same(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path):
        with connect(path) as client:
            client.shutdown(socket.SHUT_WR)
            for _ in range(2):
                assert await asyncio.to_thread(client.recv, 65536)


async def test_who_does_not_read_is_let_go_and_holds_up_nobody(
    dsn: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "INTERVAL", 0.001)
    monkeypatch.setattr(monitor, "STALE_AFTER", 0.001)
    monkeypatch.setattr(monitor, "SEND_BUFFER", 8192)
    async with Pool(dsn, monitor=path) as pool:
        with connect(path):
            await eventually(lambda: looking(pool) == 1)
            await eventually(lambda: looking(pool) == 0)
            assert await pool.fetchval("select 1") == 1
            assert (await look(path))["phase"] == "open"


def test_a_client_whom_the_system_takes_a_part_for_is_let_go_as_the_rest_would_have_to_be_kept() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        assert monitor._tell(ours, b"a line\n")
        assert not monitor._tell(ours, bytes(50_000_000) + b"\n")
        assert len(theirs.recv(65536)) > len(b"a line\n")


@on_both_loops
async def test_a_hundred_clients_are_told_of_it_or_that_there_are_too_many(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path) as pool:

        def connect_all() -> list[dict[str, Any]]:
            with ExitStack() as stack:
                clients = [stack.enter_context(connect(path)) for _ in range(100)]
                return [told(stack.enter_context(client.makefile("rb")).readline()) for client in clients]

        lines = await asyncio.to_thread(connect_all)
        assert [line.get("refused") for line in lines[: monitor.MOST_CLIENTS]] == [None] * monitor.MOST_CLIENTS
        assert {line.get("refused") for line in lines[monitor.MOST_CLIENTS :]} == {
            "8 clients look at this pool already"
        }
        # They have left, and make room for others at once.
        assert (await look(path))["phase"] == "open"
        assert await pool.fetchval("select 1") == 1
        await eventually(lambda: looking(pool) == 0)


async def test_when_nobody_looks_any_more_nothing_is_done(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path) as pool:
        assert pool._runner is not None
        assert pool._runner._monitor is not None
        await look(path)
        assert pool._runner._monitor._timer is not None
        monitored = pool._runner._monitor
        await eventually(lambda: monitored._timer is None)


async def test_without_a_descriptor_for_a_client_the_loop_is_not_kept_busy(
    dsn: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "PAUSE", 0.3)
    async with Pool(dsn, monitor=path) as pool:
        assert pool._runner is not None
        assert pool._runner._monitor is not None
        listener = pool._runner._monitor._listener
        tries = 0

        class Exhausted:
            fileno = listener.socket.fileno

            def accept(self) -> Any:
                nonlocal tries
                tries += 1
                if tries < 2:
                    raise OSError(errno.EMFILE, "Too many open files")
                return real.accept()

            def close(self) -> None:
                real.close()

        real, listener.socket = listener.socket, Exhausted()  # type: ignore[assignment]
        looking = asyncio.create_task(look(path))
        await eventually(lambda: tries)
        for _ in range(20):
            await asyncio.sleep(0)
        assert tries == 1
        assert (await looking)["phase"] == "open"
        assert tries == 2


@on_both_loops
async def test_what_it_does_by_itself_sees_no_context_variables_of_who_has_opened_the_pool(dsn: str, path: str) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    token = variable.set("of the opener")
    async with Pool(dsn, monitor=path) as pool:
        variable.reset(token)
        variable.set("of the test")
        assert pool._runner is not None
        assert pool._runner._monitor is not None
        snapshot = pool._runner._monitor._snapshot
        seen = []

        def see() -> bytes:
            seen.append(variable.get())
            return snapshot()

        pool._runner._monitor._snapshot = see
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readline()
        await reader.readline()
        writer.close()
    assert seen == ["none", "none"]


async def test_the_end_of_the_pool_is_the_end_of_the_line(dsn: str, path: str) -> None:
    async with Pool(dsn, monitor=path):
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readline()
    assert await reader.read() == b""
    writer.close()


@on_both_loops
async def test_no_task_comes_with_it_and_none_stays(dsn: str, path: str) -> None:
    before = asyncio.all_tasks()
    async with Pool(dsn, monitor=path):
        await look(path)
        await eventually(lambda: not (asyncio.all_tasks() - before))
    assert asyncio.all_tasks() == before


async def test_without_the_option_there_is_nothing(dsn: str) -> None:
    async with Pool(dsn) as pool:
        assert pool._runner is not None
        assert pool._runner._monitor is None


@pytest.mark.filterwarnings("ignore:.*was dropped without being closed:ResourceWarning")
async def test_a_pool_that_is_dropped_takes_its_socket_along(dsn: str, path: str) -> None:
    pool: Pool[Any] | None = Pool(dsn, monitor=path)
    assert pool is not None
    await pool.open()
    await look(path)
    pool = None
    gc.collect()
    await eventually(lambda: not is_there(path))


@pytest.mark.filterwarnings("ignore:.*was dropped without being closed:ResourceWarning")
def test_a_pool_whose_loop_is_gone_takes_its_socket_along_too(dsn: str, path: str) -> None:
    pool: Pool[Any] | None = Pool(dsn, monitor=path)
    assert pool is not None
    asyncio.run(pool.open())
    assert is_there(path)
    pool = None
    gc.collect()
    assert not is_there(path)


# --- processes ----------------------------------------------------------------------------------------------

FORKING = """
import os, signal, socket, sys, warnings
from asyncpool import SyncPool

warnings.filterwarnings("ignore", category=DeprecationWarning)
signal.alarm(20)
dsn, path, ending = sys.argv[1:]

def told():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        return b"open" in client.recv(65536)

with SyncPool(dsn, monitor=path) as pool:
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.recv(65536)
    if (child := os.fork()) == 0:
        client.close()
        if ending == "uses the pool":
            with pool.acquire() as conn:
                conn.execute("select 1")
            pool.close()
        elif ending == "closes the pool":
            pool.close()
        sys.stdout.flush()
        if ending == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
    assert told()
    assert client.recv(65536)  # who looked before goes on
    client.close()
assert not os.path.exists(path)
print("fine")
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("ending", ["exits", "is killed", "uses the pool", "closes the pool"])
def test_a_forked_child_leaves_the_parents_socket_alone(dsn: str, path: str, ending: str) -> None:
    done = run(FORKING, dsn, path, ending)
    assert done.stdout == "fine\n", done.stderr
    told_of = "this forked process has no monitor: cannot listen at" if ending == "uses the pool" else ""
    assert told_of in done.stderr
    assert bool(told_of) == bool(done.stderr)


DYING = """
import asyncio, os, signal, sys
from asyncpool import Pool

async def main():
    async with Pool(sys.argv[1], monitor=sys.argv[2]):
        if (child := os.fork()) == 0:
            signal.pause()
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_outlives_a_killed_parent_does_not_keep_the_socket(dsn: str, path: str) -> None:
    with tempfile.TemporaryFile("w+") as output:  # a pipe's end would be the child's
        with subprocess.Popen([sys.executable, "-c", DYING, dsn, path], stdout=output) as process:
            process.wait(20)
        output.seek(0)
        child = int(output.read())
        try:
            assert is_there(path)
            with SyncPool(dsn, monitor=path):
                assert next_line(path)["pid"] == os.getpid()
        finally:
            os.kill(child, 9)


UNCLOSED = """
import sys
from asyncpool import SyncPool

pool = SyncPool(sys.argv[1], monitor=sys.argv[2])
pool.open()
"""


def test_a_script_that_ends_without_closing_leaves_no_file(dsn: str, path: str) -> None:
    done = run(UNCLOSED, dsn, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    eventually_blocking(lambda: not is_there(path))
