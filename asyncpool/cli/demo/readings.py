"""The demo's place in the database, and its look at the server: a schema of its own, which it drops."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from asyncpool.cli.signals import undisturbed

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from asyncpool import Pool
    from asyncpool.cli.demo.workload import Payload

SESSIONS_END_DEADLINE = 15.0
POLL_INTERVAL = 0.02


class Readings:
    """The table of readings, in a new schema, through a blocking session of its own.

    It is a context manager: entering creates the schema, leaving drops it. Its methods may be called from any
    thread.
    """

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._token = secrets.token_hex(4)
        self._schema = sql.Identifier(f"asyncpool_demo_{self._token}")
        insert = "insert into {}.readings (round, device, number, body) values (%s, %s, %s, %s) on conflict do nothing"
        self._insert = sql.SQL(insert).format(self._schema).as_bytes()

    def __enter__(self) -> Self:
        self._conn = self._connect()
        try:
            self._run(sql.SQL("create schema {}").format(self._schema))
            self._run(
                sql.SQL(
                    "create table {}.readings (round int, device int, number int, body jsonb,"
                    " stored_at timestamptz default now(), primary key (round, device, number))"
                ).format(self._schema)
            )
        except BaseException:
            self._drop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self._conninfo, autocommit=True, application_name="asyncpool demo")

    def _drop(self) -> None:
        with undisturbed():
            if self._conn.info.transaction_status != TransactionStatus.IDLE:
                # Ctrl-C came in the middle of a statement, whose answer nobody will read.
                self._conn.close()
                self._conn = self._connect()
            with self._conn:
                self._run(sql.SQL("drop schema if exists {} cascade").format(self._schema))

    def _run(self, statement: sql.Composed | str, *parameters: object) -> list[tuple[Any, ...]]:
        query = statement if isinstance(statement, sql.Composed) else statement.encode()
        cursor = self._conn.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    @property
    def server_version(self) -> str:
        """As the server names it."""
        return str(self._conn.info.parameter_status("server_version"))

    def application_name(self, round_number: int) -> str:
        """The name under which the server knows the sessions of that round."""
        return f"asyncpool demo {self._token} round {round_number}"

    async def insert(
        self, executor: psycopg.AsyncConnection[Any] | Pool[Any], round_number: int, payload: Payload
    ) -> None:
        """Store a payload on that connection, or by a one-shot statement of that pool, unless it is there already."""
        values = (round_number, payload.device, payload.number, payload.body())
        await executor.execute(self._insert, values)

    def rows(self, round_number: int) -> int:
        """How many rows that round left."""
        statement = sql.SQL("select count(*) from {}.readings where round = %s").format(self._schema)
        return int(self._run(statement, round_number)[0][0])

    def terminate(self, round_number: int) -> int:
        """End every session of that round, on the server. Returns how many there were."""
        found = self._run(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s",
            self.application_name(round_number),
        )
        return len(found)

    def sessions_opened(self, round_number: int) -> int | None:
        """How many sessions this database has let in since its statistics began; None if it does not count.

        A session is counted once it has ended, so this waits until none of that round is left.
        """
        if self._run("select current_setting('track_counts')") != [("on",)]:
            return None
        self._wait_until_sessions_ended(round_number)
        if self._conn.info.server_version >= 150000:
            # So that our own session is counted before the first reading, and not after it.
            self._run("select pg_stat_force_next_flush()")
        self._run("select pg_stat_clear_snapshot()")
        found = self._run("select sessions from pg_stat_database where datname = current_database()")
        return int(found[0][0])

    def _wait_until_sessions_ended(self, round_number: int) -> None:
        deadline = time.monotonic() + SESSIONS_END_DEADLINE
        name = self.application_name(round_number)
        while self._run("select 1 from pg_stat_activity where application_name = %s limit 1", name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"sessions were still open {SESSIONS_END_DEADLINE:g} s after their round")
            time.sleep(POLL_INTERVAL)
