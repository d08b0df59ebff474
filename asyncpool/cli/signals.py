"""How a command ends when it is told to: SIGTERM unwinds it as Ctrl-C does, in an event loop and outside."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")


@dataclass
class Interruption:
    """What ended a command, if anything did."""

    signal_number: int = signal.SIGINT

    @property
    def exit_status(self) -> int:
        """What a shell expects of a program that this signal ended."""
        return 128 + self.signal_number


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt; asyncio makes a cancellation of its main task of it.

    SIGINT does so even if it came in ignored, as in a script's background job.
    """
    interruption = Interruption()

    def terminate(number: int, _: object) -> None:
        interruption.signal_number = number
        signal.raise_signal(signal.SIGINT)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handlers[number]) for number in handlers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore both, for a clean-up that is short and must be whole."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_interruptibly(main: Callable[[], Coroutine[object, object, T]]) -> T:
    """`asyncio.run(main())`, but a signal strikes either inside the coroutine or when the event loop is closed: one
    that came while asyncio makes or closes it would leave it half made.
    """

    async def run() -> T:
        _hold_signals_back(False)
        try:
            return await main()
        finally:
            _hold_signals_back(True)

    _hold_signals_back(True)
    try:
        return asyncio.run(run())
    finally:
        _hold_signals_back(False)


def _hold_signals_back(hold: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        how = signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, (signal.SIGINT, signal.SIGTERM))
