"""The user's callables: what they are called, what they raise, and what they may not leave behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from psycopg import ProgrammingError, pq

from ..config import shown
from .connect_errors import brief
from .connection import Leased, describe_unfinished
from .session import IDLE


class Overdue(TimeoutError):
    """A callable did not end within `check_timeout`; one that it raised itself is a TimeoutError like any other."""


def name_of(callback: Callable[..., object]) -> str:
    """What the user calls it."""
    name = getattr(callback, "__qualname__", None)
    return name if isinstance(name, str) else shown(callback)


@contextlib.contextmanager
def errors_of(option: str, callback: Callable[..., object]) -> Iterator[None]:
    """What the callable of an option raises gets a note of where it comes from.

    What would look like a cancellation or the end of the pool's own task, and is none, becomes a RuntimeError. Only
    what is meant for the whole process passes: asyncio lets KeyboardInterrupt and SystemExit out of the event loop.
    """
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as ex:
        note = f"raised by {option}, which is {name_of(callback)}"
        if note not in getattr(ex, "__notes__", ()):  # the same object may be raised again and again
            with contextlib.suppress(Exception):  # one whose attributes cannot be set
                ex.add_note(note)
        raise
    except BaseException as ex:
        if task.cancelling() > cancellations or _running_task() is not task:
            raise  # the task is cancelled, or its coroutine is being closed
        raise RuntimeError(f"{option}, which is {name_of(callback)}, raised {brief(ex)}") from ex


def _running_task() -> asyncio.Task[Any] | None:
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


def check_nothing_open(callback: Callable[[Any], object], connection: Leased) -> None:
    """Raise ProgrammingError if a callable has left its connection in the middle of something."""
    status = connection.pgconn.transaction_status
    if (unfinished := describe_unfinished(connection)) or status != IDLE:
        raise ProgrammingError(
            f"{name_of(callback)} left the connection"
            f" {unfinished or f'in a transaction ({pq.TransactionStatus(status).name})'}: end it there; what only sets"
            " something can set autocommit first"
        )
