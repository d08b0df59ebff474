"""A thread of a storm on a SyncPool: as `client.py`, with what threads have in place of cancellation."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import tuple_row

from asyncpool import PoolError, PoolTimeout

from .actions import HookFailed
from .client import IDLE, INTRANS, SHORT_TIMEOUTS, Failure
from .grounds import SESSION_STATE
from .plan import PATIENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from asyncpool import SyncPool

    from .grounds import Grounds
    from .plan import Plan
    from .record import Record

Connection = psycopg.Connection[Any]


class ThreadClient:
    """Some leases, one after the other, in the thread that calls `run`."""

    def __init__(self, plan: Plan, number: int, pool: SyncPool, table: str, record: Record) -> None:
        self.plan = plan
        self.rng = Random(f"{plan.seed}/client {number}")
        self.pool = pool
        self.table = table
        self.record = record
        self.pending: list[int] = []
        self.operations: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._next_row = 1_000 * number
        self._provoked: tuple[type[BaseException], ...] = ()

    def run(self) -> None:
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.pending = []
            self._provoked = (Failure, psycopg.errors.DivisionByZero, psycopg.errors.RaiseException)
            if self.plan.hooks:
                self._provoked += (HookFailed, PoolError)
            try:
                self._draw_lease()()
            except Exception as error:  # noqa: BLE001 — judged
                self._judge(error)

    def _draw_lease(self) -> Callable[[], None]:
        messy = [self.close, self.put_back_twice, self.put_back_to_be_closed, self.leave_in_a_transaction]
        if self.plan.messy and self.rng.random() < 0.3:
            return self.rng.choice(messy)
        return self.rng.choice((self.block, self.block, self.transaction, self.by_hand))

    def _judge(self, error: Exception) -> None:
        self.errors[type(error).__name__] += 1
        lost = isinstance(error, psycopg.OperationalError) and not isinstance(error, psycopg.errors.QueryCanceled)
        forgiven = self.plan.loses_sessions and (lost or isinstance(error, psycopg.Rollback))
        if not (forgiven or isinstance(error, self._provoked)):
            self.record.violation("unexpected: " + "".join(traceback.format_exception(error)[-3:]).strip())

    def _draw_timeout(self) -> float:
        if self.rng.random() < 0.9:
            return PATIENT * 2
        self._provoked += (PoolTimeout,)
        return self.rng.choice(SHORT_TIMEOUTS)

    def _have(self, conn: Connection, status: int = IDLE) -> int:
        self.operations["acquire"] += 1
        pid = conn.pgconn.backend_pid
        self.record.take(pid)
        found = conn.pgconn.transaction_status
        self.record.expect(found == status or conn.closed, f"handed out with transaction status {found}")
        self.record.expect(conn.autocommit is self.plan.autocommit, "handed out with another's autocommit")
        self.record.expect(conn.row_factory is tuple_row, "handed out with another's row_factory")
        return pid

    # --- leases ---------------------------------------------------------------------------------------------

    def _in_block(self, context: AbstractContextManager[Connection], status: int = IDLE) -> None:
        conn = context.__enter__()
        pid = self._have(conn, status)
        try:
            self.work(conn)
        except BaseException as error:
            self.record.put_back(pid)
            if not context.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            self.record.put_back(pid)
            with self.record.ledger.committing(self.pending):
                context.__exit__(None, None, None)

    def block(self) -> None:
        self._in_block(self.pool.acquire(self._draw_timeout()))

    def transaction(self) -> None:
        self._in_block(self.pool.transaction(self._draw_timeout()), INTRANS)

    def by_hand(self) -> None:
        conn = self.pool.getconn(timeout=self._draw_timeout())
        pid = self._have(conn)
        try:
            self.work(conn)
            if self.rng.random() < 0.7:
                with self.record.ledger.committing(self.pending):
                    conn.commit()
        finally:
            self.record.put_back(pid)
            self.pool.putconn(conn)

    def close(self) -> None:
        self._give_back_by(lambda conn: conn.close())

    def put_back_to_be_closed(self) -> None:
        self._give_back_by(lambda conn: self.pool.putconn(conn, close=True))

    def put_back_twice(self) -> None:
        """The second one may come when the object is another's already: so it is only tried on one that is closed."""

        def put_back(conn: Connection) -> None:
            self.pool.putconn(conn, close=True)
            try:
                self.pool.putconn(conn)
            except PoolError:
                pass
            else:
                self.record.violation("a second putconn was taken for one")

        self._give_back_by(put_back)

    def leave_in_a_transaction(self) -> None:
        def leave(conn: Connection) -> None:
            with suppress(psycopg.Error), conn.transaction():  # its end comes too late, and says so
                try:
                    conn.execute("select 1")
                finally:
                    self.pool.putconn(conn)
                    given_back.append(True)
            if not given_back:  # the connection was lost before
                self.pool.putconn(conn)

        given_back: list[bool] = []
        self._give_back_by(leave)

    def _give_back_by(self, give_back: Callable[[Connection], None]) -> None:
        conn = self.pool.getconn(timeout=self._draw_timeout())
        pid = self._have(conn)
        try:
            self.work(conn)
        except BaseException:
            self.record.put_back(pid)
            self.pool.putconn(conn)
            raise
        self.record.put_back(pid)
        give_back(conn)

    # --- what is done on a connection -----------------------------------------------------------------------

    def work(self, conn: Connection) -> None:
        actions = [
            self.query,
            self.slow_query,
            self.write,
            self.write,
            self.copy_in,
            self.read_stream,
            self.pipeline,
            self.transaction_block,
            self.fail,
            self.run_out_of_time,
            self.change_client_state,
        ]
        if self.plan.cleans_sessions:
            actions.append(self.leave_on_the_session)
        for _ in range(self.rng.choice((0, 1, 1, 2, 3))):
            action = self.rng.choice(actions)
            action(conn)
            self.operations[action.__name__.replace("_", " ")] += 1
            if self.rng.random() < 0.05:
                raise Failure

    def _write(self, conn: Connection, rows: list[int], write: Callable[[], None]) -> None:
        if conn.autocommit and conn.pgconn.transaction_status == IDLE:
            with self.record.ledger.committing(rows):
                write()
        else:
            write()
            self.pending += rows

    def _new_rows(self, count: int) -> list[int]:
        self._next_row += count
        return list(range(self._next_row - count + 1, self._next_row + 1))

    def query(self, conn: Connection) -> None:
        token = self.rng.getrandbits(30)
        found = conn.execute("select %s::int", [token]).fetchall()
        self.record.expect(found == [(token,)], f"asked for {token}, answered {found}")

    def slow_query(self, conn: Connection) -> None:
        conn.execute("select pg_sleep(%s)", [self.rng.uniform(0, 0.005)])
        time.sleep(self.rng.choice((0, 0.001)))

    def write(self, conn: Connection) -> None:
        rows = self._new_rows(1)
        self._write(conn, rows, lambda: self._insert(conn, rows))

    def _insert(self, conn: Connection, rows: list[int]) -> None:
        conn.execute(f"insert into {self.table} values (%s)".encode(), rows)

    def copy_in(self, conn: Connection) -> None:
        rows = self._new_rows(3)

        def write() -> None:
            with conn.cursor().copy(f"copy {self.table} from stdin".encode()) as copy:
                for row in rows:
                    copy.write_row([row])

        self._write(conn, rows, write)

    def read_stream(self, conn: Connection) -> None:
        found = len(list(conn.cursor().stream("select generate_series(1, 50)")))
        self.record.expect(found == 50, f"a stream of 50 rows gave {found}")

    def pipeline(self, conn: Connection) -> None:
        conn.execute("select 1")  # as in actions.py
        with conn.pipeline():
            cursors = [conn.execute("select %s::int", [number]) for number in range(3)]
            found = [cursor.fetchone() for cursor in cursors]
        self.record.expect(found == [(0,), (1,), (2,)], f"a pipeline gave {found}")

    def transaction_block(self, conn: Connection) -> None:
        outermost = conn.pgconn.transaction_status == IDLE
        before, self.pending = self.pending, []
        context = conn.transaction()
        context.__enter__()
        try:
            self.rng.choice((self.write, self.query, self.transaction_block))(conn)
            if self.rng.random() < 0.3:
                raise Failure
        except BaseException as error:
            self.pending = before
            if not context.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            if outermost:
                with self.record.ledger.committing(self.pending):
                    context.__exit__(None, None, None)
                self.pending = before
            else:
                context.__exit__(None, None, None)
                self.pending = before + self.pending

    def fail(self, conn: Connection) -> None:
        conn.execute("select 1/0")

    def run_out_of_time(self, conn: Connection) -> None:
        self._provoked += (psycopg.errors.QueryCanceled,)
        with conn.transaction():
            conn.execute("set local statement_timeout = '2ms'")
            conn.execute("select pg_sleep(%s)", [self.rng.choice((0, 1))])

    def change_client_state(self, conn: Connection) -> None:
        if conn.pgconn.transaction_status == IDLE and not conn.autocommit:
            conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.prepare_threshold = 1
        conn.cursor_factory = psycopg.ClientCursor

    def leave_on_the_session(self, conn: Connection) -> None:
        conn.execute("listen storm")
        conn.execute("set work_mem to '3MB'")
        conn.execute("select pg_try_advisory_lock(%s)", [100 + self.rng.randrange(5)])


def judge_connections(plan: Plan, pool: SyncPool, grounds: Grounds, record: Record) -> None:
    """As many as there may be are had at once, and each of them works."""
    conns = [pool.getconn(timeout=PATIENT) for _ in range(plan.max_size)]
    record.expect(len({conn.pgconn.backend_pid for conn in conns}) == plan.max_size, "two leases of one session")
    for conn in conns:
        row = conn.execute("select pg_backend_pid()").fetchone()
        record.expect(row == (conn.pgconn.backend_pid,), f"answered {row}")
        if plan.cleans_sessions:
            grounds.judge_session(record, conn.execute(SESSION_STATE.encode()).fetchone())
        conn.rollback()
        pool.putconn(conn)
