"""Where a storm takes place: a server, and a look into it past the pool."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.servers import Admin
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from asyncpool.cli.embedded import EmbeddedServer

    from .record import Record

_numbers = itertools.count(1)

# What every session of a pool must show that is fit for the next user, whoever had it before.
SESSION_STATE = """
    select (select count(*) from pg_listening_channels()),
        (select count(*) from pg_class where relnamespace = pg_my_temp_schema()),
        (select count(*) from pg_cursors where name = 'portal'),
        current_setting('work_mem')
"""


# A COMMIT takes a moment for some rows, so that cancellations strike in it, and fails for some.
COMMIT_FUNCTION = """
    create function {table}_commit() returns trigger language plpgsql as $$
    begin
        if mod(new.id, 3) = 0 then perform pg_sleep(0.002); end if;
        if mod(new.id, 101) = 0 then raise exception using message = 'not this one'; end if;
        return new;
    end $$
"""
COMMIT_TRIGGER = """
    create constraint trigger slow after insert on {table} deferrable initially deferred
        for each row execute function {table}_commit()
"""


class Grounds:
    """For one storm: its table, and the name of its sessions. `embedded` is there if it may be restarted."""

    def __init__(self, dsn: str, embedded: EmbeddedServer | None = None) -> None:
        number = next(_numbers)
        self.application_name = f"storm-{os.getpid()}-{number}"
        self.table = f"storm_{os.getpid()}_{number}"
        self.dsn = make_conninfo(dsn, application_name=self.application_name)
        self.embedded = embedded
        self.admin = Admin(dsn)
        self.admin.execute(f"create table {self.table} (id integer)")
        self.admin.execute(COMMIT_FUNCTION.replace("{table}", self.table))
        self.admin.execute(COMMIT_TRIGGER.replace("{table}", self.table))
        self.work_mem = self.admin.value("show work_mem")

    def close(self) -> None:
        """Leave nothing behind."""
        self.admin.execute(f"drop table {self.table}")
        self.admin.execute(f"drop function {self.table}_commit()")
        self.admin.close()

    def judge_server(self, record: Record) -> None:
        """Nothing is left on the server but idle sessions."""
        found = self.admin.execute(
            "select pid, state, xact_start, query from pg_stat_activity where application_name = %s"
            " and (state <> 'idle' or xact_start is not null)",
            [self.application_name],
        )
        record.expect(not found, f"left on the server: {found}")
        locks = self.admin.execute(
            "select l.pid, l.locktype, l.mode, a.query from pg_locks l join pg_stat_activity a using (pid)"
            " where a.application_name = %s",
            [self.application_name],
        )
        record.expect(not locks, f"locks left: {locks}")

    def judge_table(self, record: Record) -> None:
        """Every acknowledged row is there, every row there was acknowledged or is in doubt, and none is there twice."""
        found = Counter(row for (row,) in self.admin.execute(f"select id from {self.table}"))
        twice = [row for row, count in found.items() if count > 1]
        record.expect(not twice, f"{len(twice)} rows there more than once: {twice[:5]}")
        rows = set(found)
        ledger = record.ledger
        lost = sorted(ledger.acknowledged - rows)
        record.expect(not lost, f"{len(lost)} rows acknowledged, and not there: {lost[:5]}")
        unwanted = sorted(rows - ledger.acknowledged - ledger.in_doubt)
        record.expect(not unwanted, f"{len(unwanted)} rows there that nobody committed: {unwanted[:5]}")
        record.operations["rows committed"] += len(rows)

    def judge_session(self, record: Record, state: Any) -> None:
        """`state` is what SESSION_STATE gave in a session of the pool that is cleaned after each lease."""
        record.expect(state == (0, 0, 0, self.work_mem), f"left on a session: {state}")


def open_descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/dev/fd").iterdir()))
