"""The servers that tests run against, and an independent look into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpool.cli.embedded import EmbeddedServer

# Each has something that a URL or a key=value conninfo must quote, or that libpq repeats in its messages.
ODD_PASSWORDS = {
    "with_space": "open sesame now",
    "with_percent": "100%41%zz",
    "with_at": "p@ss@127.0.0.1",
    "with_quotes": """it's "quoted" \\ twice""",
    "with_equals": "user=postgres password=x",
    "with_slash_colon": "a:b/c?d#e",
}


@dataclass(frozen=True)
class Server:
    """A server that tests may use, but must leave running."""

    dsn: str
    embedded: EmbeddedServer | None


@dataclass(frozen=True)
class PasswordServer:
    """A server on TCP that lets nobody in without a password: `ODD_PASSWORDS` by user name."""

    embedded: EmbeddedServer

    def parameters(self, user: str) -> dict[str, Any]:
        """What identifies that user, as keyword arguments of a connect."""
        return {
            "host": "127.0.0.1",
            "port": self.embedded.port,
            "user": user,
            "password": ODD_PASSWORDS[user],
            "dbname": "postgres",
        }

    def conninfo(self, user: str, style: Literal["url", "key=value"], password: str | None = None) -> str:
        """The same as one string, quoted as it should be; `password` instead of the right one."""
        secret = ODD_PASSWORDS[user] if password is None else password
        if style == "url":
            return self.embedded.host_dsn(user=user, password=secret)
        return make_conninfo(**{**self.parameters(user), "password": secret})


def create_users_with_odd_passwords(embedded: EmbeddedServer) -> None:
    with psycopg.connect(embedded.dsn(), autocommit=True) as conn:
        for user, password in ODD_PASSWORDS.items():
            statement = sql.SQL("create role {} login password {}")
            conn.execute(statement.format(sql.Identifier(user), sql.Literal(password)))


class Admin:
    """A session of its own, by which a test looks at the server, or turns on it, past the pool.

    It blocks, for a fraction of a millisecond a question: so it serves in every event loop and without one.
    After a restart of the server it connects anew.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._conn: psycopg.Connection[Any] | None = None

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement, in autocommit. Returns its rows, or none."""
        conn = self._connected()
        try:
            cursor = conn.execute(statement.encode(), parameters)
        except psycopg.OperationalError:
            if not conn.broken:
                raise
            cursor = self._connected().execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def _connected(self) -> psycopg.Connection[Any]:
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(self._dsn, autocommit=True, application_name="asyncpool-test-admin")
        return self._conn

    def value(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """The first column of the first row."""
        return self.execute(statement, parameters)[0][0]

    def pids(self, application_name: str) -> list[int]:
        """The server's processes behind the sessions of that name, oldest first."""
        found = self.execute(
            "select pid from pg_stat_activity where application_name = %s order by backend_start, pid",
            [application_name],
        )
        return [pid for (pid,) in found]

    def sessions(self, application_name: str) -> int:
        """How many sessions of that name the server counts at this moment."""
        return len(self.pids(application_name))

    def states(self, application_name: str) -> list[str]:
        """What these sessions do: `idle`, `active`, `idle in transaction`, …"""
        found = self.execute(
            "select state from pg_stat_activity where application_name = %s order by backend_start, pid",
            [application_name],
        )
        return [state for (state,) in found]

    def terminate_busy(self, application_name: str) -> None:
        """End those of that name that execute a statement or are in a transaction."""
        self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s and state <> 'idle'",
            [application_name],
        )

    def asleep(self, application_name: str) -> int:
        """How many of these sessions are in `pg_sleep`. One that is `active` may be in a BEGIN before that: what ends a
        statement then is not the end of the one that is meant.
        """
        found = self.value(
            "select count(*) from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'",
            [application_name],
        )
        return int(found)

    def client_sessions(self) -> int:
        """All client sessions of this database but this one, also those that have not said their name yet."""
        return int(
            self.value(
                "select count(*) from pg_stat_activity where backend_type = 'client backend'"
                " and (datname = current_database() or datname is null) and pid <> pg_backend_pid()"
            )
        )

    def terminate(self, *pids: int) -> None:
        """Let the server end these sessions, and return when it has."""
        for pid in pids:
            self.execute("select pg_terminate_backend(%s, 10000)", [pid])

    def close(self) -> None:
        """End the session."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None
