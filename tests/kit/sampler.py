"""How many sessions the server counts, looked at thousands of times a second."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self

import psycopg

from .waiting import eventually_blocking

if TYPE_CHECKING:
    from types import TracebackType

# The server reads its list entry by entry, so that a session and its successor may both be in one reading. Only
# those that had begun before the reading are counted: all of them existed at that moment.
#
# A session says its name late in its login: until then it has none, and at first no user either.
SAMPLE = """
create function pg_temp.sample(wanted text, nameless_too bool, milliseconds float, out samples int, out most int)
language plpgsql as $$
declare
    ends timestamptz := clock_timestamp() + milliseconds * interval '1 ms';
    begun timestamptz;
    found int;
begin
    samples := 0;
    most := 0;
    loop
        begun := clock_timestamp();
        exit when begun > ends;
        perform pg_stat_clear_snapshot();
        select count(*) into found from pg_stat_get_activity(null)
        where backend_start <= begun and coalesce(backend_type, 'client backend') = 'client backend'
            and (application_name = wanted or (nameless_too and application_name = ''));
        samples := samples + 1;
        most := greatest(most, found);
    end loop;
end $$
"""

CHUNK_MILLISECONDS = 20.0
PATIENCE = 30.0


class Sampler:
    """Counts the sessions of a name, while its `with` block lasts; `most` is the highest count at any instant.

    `nameless_too` counts those that have not said their name yet as well: on a server that no one else uses.
    """

    def __init__(self, dsn: str, application_name: str, *, nameless_too: bool) -> None:
        self.samples = 0
        self.most = 0
        self._nameless_too = nameless_too
        self._wanted = application_name, nameless_too, CHUNK_MILLISECONDS
        self._conn: psycopg.Connection[Any] = psycopg.connect(
            dsn, autocommit=True, application_name="asyncpool-test-sampler"
        )
        self._conn.execute(SAMPLE)
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        if self._nameless_too:
            eventually_blocking(lambda: self._nameless() == 0)  # those of the test before may still be at their end
        self._thread.start()
        assert self._started.wait(PATIENCE), "the sampler has not begun"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(PATIENCE)
        self._conn.close()
        if self._failure is not None:
            raise self._failure

    def _nameless(self) -> int:
        row = self._conn.execute(
            "select count(*) from pg_stat_activity where backend_type = 'client backend' and application_name = ''"
        ).fetchone()
        assert row is not None
        return int(row[0])

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                row = self._conn.execute("select * from pg_temp.sample(%s, %s, %s)", self._wanted).fetchone()
                assert row is not None
                self.samples += row[0]
                self.most = max(self.most, row[1])
                self._started.set()
        except BaseException as error:  # noqa: BLE001 — raised where the block ends
            self._failure = error
            self._started.set()
