"""What a storm writes down: what was committed, what went wrong, and what nobody else would see."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool import PoolStats

MOST_VIOLATIONS = 20


@dataclass
class Ledger:
    """The rows that the clients of a storm have written, by what their writer was told."""

    acknowledged: set[int] = field(default_factory=set)
    in_doubt: set[int] = field(default_factory=set)
    """Their COMMIT was sent, and its answer has not come: yet, or ever."""

    @contextmanager
    def committing(self, rows: list[int]) -> Iterator[None]:
        """The block commits these rows: in doubt if it raises, acknowledged if it does not."""
        self.in_doubt.update(rows)
        yield
        self.in_doubt.difference_update(rows)
        self.acknowledged.update(rows)


@dataclass
class Record:
    """One storm's counts and violations."""

    ledger: Ledger = field(default_factory=Ledger)
    operations: Counter[str] = field(default_factory=Counter)
    cancels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    pool_warnings: list[str] = field(default_factory=list)
    """The first that the pool has logged: what it says beside a violation."""
    dropped: int = 0
    """Leases whose connection was dropped without release: each may be warned of."""
    held: set[int] = field(default_factory=set)
    """The server's processes behind the connections that some client has now."""
    acquiring: dict[asyncio.Task[Any], None] = field(default_factory=dict)
    """The tasks that wait for a connection, about in the order of the queue."""
    cancellable: set[asyncio.Task[Any]] = field(default_factory=set)
    """Those that are to be cancelled anyway, and may be so earlier."""
    struck: set[asyncio.Task[Any]] = field(default_factory=set)
    """Those of them that were."""
    stats: PoolStats | None = None
    """The pool's, when it was quiet again."""

    def violation(self, text: str) -> None:
        """Something that must not be. Only the first are kept: the others are their consequences."""
        if len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(text)

    def expect(self, condition: object, text: str) -> None:
        """Unless the condition holds, a violation."""
        if not condition:
            self.violation(text)

    def take(self, pid: int) -> None:
        """Somebody has got this connection."""
        self.expect(pid not in self.held, f"connection {pid} is in two hands")
        self.held.add(pid)

    def put_back(self, pid: int) -> None:
        """Somebody is about to give it back."""
        self.held.discard(pid)


@contextmanager
def nothing_unseen(record: Record) -> Iterator[None]:
    """What only a log, a hook or a warning tells, is a violation: inside a running loop, also what its handler gets."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    former_handler = loop.get_exception_handler() if loop is not None else None
    if loop is not None:
        loop.set_exception_handler(lambda _, context: record.violation(f"the event loop was told: {context!r}"))
    former_hook = sys.unraisablehook

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        record.violation(f"unraisable: {args.exc_value!r} in {args.object!r}: {args.err_msg}")

    sys.unraisablehook = unraisable
    former_thread_hook = threading.excepthook
    threading.excepthook = lambda args: record.violation(f"a thread died: {args.exc_value!r} in {args.thread}")
    handler = _ErrorsAreViolations(record)
    loggers = [logging.getLogger(name) for name in ("asyncpool", "asyncio", "psycopg")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False  # whoever collects records keeps what they speak of from being collected
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield
            gc.collect()  # what was never awaited or retrieved, is told when it is collected
        _judge_warnings(record, [warning.message for warning in seen])
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
        sys.unraisablehook = former_hook
        threading.excepthook = former_thread_hook
        if loop is not None:
            loop.set_exception_handler(former_handler)


def _judge_warnings(record: Record, seen: list[Any]) -> None:
    drops = [one for one in seen if isinstance(one, ResourceWarning) and "dropped without release" in str(one)]
    record.expect(len(drops) <= record.dropped, f"{len(drops)} leases lost, and {record.dropped} dropped")
    for other in seen:
        # A cursor whose close() was cancelled is psycopg's to speak of.
        if other not in drops and "ServerCursor" not in str(other):
            record.violation(f"warning: {other!r}")


class _ErrorsAreViolations(logging.Handler):
    def __init__(self, record: Record) -> None:
        super().__init__(logging.WARNING)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "asyncpool" and len(self._record.pool_warnings) < MOST_VIOLATIONS:
            self._record.pool_warnings.append(record.getMessage())
        if record.levelno >= logging.ERROR:
            told = f": {record.exc_info[1]!r}" if record.exc_info else ""
            self._record.violation(f"logged by {record.name}: {record.getMessage()}{told}")
