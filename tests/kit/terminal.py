"""A terminal of a given size with a program in it: its keys, and what it shows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

from .waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

# The program becomes the leader of a session of its own, so that Ctrl-C in the terminal reaches it.
_LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"

_HOME = "\x1b[H"
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\r")


class Terminal:
    """A program on a pseudo-terminal. It is killed if the test leaves it running."""

    def __init__(self, *command: str, columns: int = 80, lines: int = 24, **environment: str) -> None:
        self._ours, self._theirs = pty.openpty()
        termios.tcsetwinsize(self._theirs, (lines, columns))
        self.settings = termios.tcgetattr(self._theirs)
        self.output = ""
        unwanted = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOGIN, *command],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={**inherited, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def settings_now(self) -> list[object]:
        """The terminal's modes, to be compared with `settings`."""
        return termios.tcgetattr(self._theirs)

    def type(self, keys: str) -> None:
        """Strike keys."""
        os.write(self._ours, keys.encode())

    def read(self, timeout: float) -> None:
        """Take what the program writes, waiting so long for something."""
        if select.select((self._ours,), (), (), timeout)[0]:
            self.output += os.read(self._ours, 65536).decode(errors="replace")

    def screen(self) -> list[str]:
        """The lines of the last whole picture of a program that draws one over the other, without colours."""
        pictures = self.output.split(_HOME)
        picture = pictures[-2] if len(pictures) > 2 else pictures[-1]
        return [line.rstrip() for line in _SEQUENCE.sub("", picture).split("\n")]

    def wait_for(self, condition: Callable[[list[str]], object], *, timeout: float = PATIENCE) -> list[str]:
        """The first screen of which this is true."""
        deadline = time.monotonic() + timeout
        while not condition(self.screen()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError("not so on the screen:\n" + "\n".join(self.screen()))
            self.read(0.05)
        return self.screen()

    def end(self, *, timeout: float = PATIENCE) -> int:
        """The program's exit status, when it has ended."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self.read(0.05)
        self.read(0)
        return self.process.returncode
