"""The examples that were moved over by their import lines, run as a user runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit.waiting import eventually_blocking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin

ROOT = Path(__file__).parents[2]

# Seconds for a whole run, and from its last line to its end.
PATIENCE = 10.0
LIMIT = 5.0

OUTPUTS = {
    "legacy_functions": ["1 Ada", "2 Grace", "3 None"],
    "legacy_simple_pool": [
        "the pool is there",
        "station 1: 20.5 degrees",
        "station 3: 21.5 degrees",
        "station 5: 22.5 degrees",
        "the connection is back",
        "done",
    ],
    "legacy_threaded_pool": ["1: 6, 2: 21, 3: 45, 4: 78, 5: 120, 6: 171, 7: 231, 8: 300"],
}


def run(example: str, *options: str, **environment: str | None) -> tuple[list[str], float]:
    """The lines that an example prints, and how many seconds later it has ended."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    path = ROOT / "examples" / f"{example}.py"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-u", *options, str(path)],
            env={name: text for name, text in given.items() if text is not None},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        lines, printed = [], time.monotonic()
        # It ends with the process, as nobody else has inherited it.
        for line in iter(process.stdout.readline, ""):
            lines.append(line.rstrip("\n"))
            printed = time.monotonic()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
        ended = time.monotonic()
        errors.seek(0)
        assert (process.returncode, errors.read()) == (0, "")
    return lines, ended - printed


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("options", [(), ("-X", "dev", "-W", "error")], ids=["plainly", "strictly"])
@pytest.mark.parametrize("example", OUTPUTS)
def test_an_example_ends_by_itself_in_silence_and_leaves_no_session(
    dsn: str, admin: Admin, application_name: str, example: str, options: tuple[str, ...]
) -> None:
    began = time.monotonic()
    # Not every script hands on all of the URL.
    lines, lingered = run(example, *options, DATABASE_URL=dsn, PGAPPNAME=application_name)
    assert time.monotonic() - began < PATIENCE
    assert lines == OUTPUTS[example]
    assert lingered < LIMIT
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


@pytest.fixture
def own_temporary_directory() -> Iterator[Path]:
    """An empty directory, with a name short enough for a socket in it, and open to the server's user."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        directory = Path(name)
        directory.chmod(0o1777)
        yield directory


def command_lines() -> str:
    """Those of all processes, if this system tells."""
    if shutil.which("ps") is None:
        return ""
    return subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout


def test_without_a_server_at_hand_it_has_one_of_its_own_of_which_nothing_is_left(own_temporary_directory: Path) -> None:
    lines, lingered = run("legacy_functions", "-W", "error", DATABASE_URL=None, TMPDIR=str(own_temporary_directory))
    assert lines == OUTPUTS["legacy_functions"]
    assert lingered < LIMIT
    # The process that keeps the server outlives the script by a moment.
    eventually_blocking(lambda: not any(own_temporary_directory.iterdir()), timeout=20)
    assert str(own_temporary_directory) not in command_lines()
