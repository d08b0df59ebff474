"""Statements that wait on the server until they are let go on: in place of sleeps, and of locks that tests forget."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import contextmanager

    from kit.servers import Admin
else:
    from contextlib import contextmanager

# Takes the gate's key. Its row is (1,).
PASS = "select 1 where pg_advisory_xact_lock_shared(%s) is not null"
# Takes an id and the gate's key, inside of `insert into a_table`.
INSERTED = "select %s::int where pg_advisory_xact_lock_shared(%s) is not null"


class Gate:
    """An advisory lock that a session past the pool holds while the gate is closed. It is open at first."""

    def __init__(self, admin: Admin, application_name: str) -> None:
        self.key = uuid.uuid4().int >> 66
        self._admin = admin
        self._application_name = application_name
        self._closed = False

    def close(self) -> None:
        """Statements wait from now on."""
        self._admin.execute("select pg_advisory_lock(%s)", [self.key])
        self._closed = True

    def open(self) -> None:
        """All that wait go on."""
        if self._closed:
            self._admin.execute("select pg_advisory_unlock(%s)", [self.key])
            self._closed = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closed while the block lasts."""
        self.close()
        try:
            yield
        finally:
            self.open()

    def waiting(self) -> int:
        """How many of the test's sessions wait before it at this moment."""
        return int(
            self._admin.value(
                "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'advisory'",
                [self._application_name],
            )
        )
