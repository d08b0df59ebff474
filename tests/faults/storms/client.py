"""A task of a storm: it acquires, does this and that, and writes down what it was told."""

from __future__ import annotations

import asyncio
import traceback
from contextlib import AsyncExitStack, suppress
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
from pool.leftovers import LEFTOVERS
from psycopg.rows import tuple_row

from asyncpool import PoolError, PoolTimeout

from . import actions, one_shots
from .plan import PATIENT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from asyncpool import Pool

    from .plan import Plan
    from .record import Record

Connection = psycopg.AsyncConnection[Any]

IDLE = psycopg.pq.TransactionStatus.IDLE
INTRANS = psycopg.pq.TransactionStatus.INTRANS

# Seconds that some clients wait for a connection; the others wait as long as it takes.
SHORT_TIMEOUTS = (0, 0.0005, 0.003, 0.02)


class Failure(Exception):
    """A client's own."""


def _told(error: BaseException) -> str:
    """With what was raised before it, and where."""
    return "".join(traceback.format_exception(error)[-30:]).strip()


class Client:
    """One task. Its random choices are its own, so that they do not depend on what others do."""

    def __init__(self, plan: Plan, number: int, pool: Pool, table: str, record: Record) -> None:
        self.plan = plan
        self.rng = Random(f"{plan.seed}/client {number}")
        self.pool = pool
        self.table = table
        self.record = record
        self.pending: list[int] = []
        """The rows that were written in this lease, and not committed."""
        self._next_row = 1_000 * number
        self._provoked: tuple[type[BaseException], ...] = ()
        self._outlives_its_lease = False
        """Whether a block of psycopg's is to end when its connection has been given back."""

    async def run(self) -> None:
        """Some leases, one after the other. Only a cancellation ends it otherwise."""
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.pending = []
            self._provoked = (Failure, psycopg.errors.DivisionByZero, psycopg.errors.RaiseException)
            self._outlives_its_lease = False
            if "setup" in self.plan.hooks or "configure" in self.plan.hooks:
                self.provoke(actions.HookFailed, PoolError)
            try:
                await self._draw_work()()
            except Exception as error:
                self._judge(error)
                if task.cancelling() > cancellations:
                    self._judge_instead_of_cancellation(error)
                    raise asyncio.CancelledError from error

    def _draw_work(self) -> Callable[[], Awaitable[None]]:
        if self.plan.one_shots and self.rng.random() < self.plan.one_shots:
            return self.send_one_shots
        return self._draw_lease()

    def _draw_lease(self) -> Callable[[], Awaitable[None]]:
        clean = [self.block, self.block, self.transaction, self.by_hand]
        messy = [self.close_in_block, self.give_back_twice, self.leave_in_the_middle, self.drop, self.close]
        if self.plan.messy and self.rng.random() < 0.4:
            return self.rng.choice(messy)
        return self.rng.choice(clean)

    def _judge(self, error: Exception) -> None:
        self.record.errors[type(error).__name__] += 1
        if isinstance(error, self._provoked):
            return
        # A QueryCanceled was meant for somebody else: whoever is cancelled himself gets a CancelledError.
        lost = isinstance(error, psycopg.OperationalError) and not isinstance(error, psycopg.errors.QueryCanceled)
        # A Rollback passes its block when there is no connection left to roll back on.
        if self.plan.loses_sessions and (lost or isinstance(error, psycopg.Rollback)):
            return
        self.record.violation(f"unexpected: {_told(error)}")

    def _judge_instead_of_cancellation(self, error: BaseException) -> None:
        """A block of psycopg's, a server-side cursor's for one, may fail to end on a connection that was lost or given
        back, and say so in the midst of a cancellation. Nothing else may take its place.
        """
        told = self._told_instead(error)
        excused = self.plan.loses_sessions or self._outlives_its_lease
        self.record.expect(excused and told, f"a cancellation became this: {_told(error)}")

    @staticmethod
    def _told_instead(error: BaseException) -> bool:
        context = error.__context__
        while context is not None and not isinstance(context, asyncio.CancelledError):
            context = context.__context__
        return context is not None

    def provoke(self, *kinds: type[BaseException]) -> None:
        """From now on, in this lease, these errors are what the client has deserved."""
        self._provoked += kinds

    # --- acquiring ------------------------------------------------------------------------------------------

    def _draw_timeout(self) -> float:
        if self.rng.random() < 0.9:
            return PATIENT * 2
        self.provoke(PoolTimeout)
        return self.rng.choice(SHORT_TIMEOUTS)

    async def _watched(self, acquire: Awaitable[Connection], status: int = IDLE) -> Connection:
        """Acquire. A cancellation meanwhile ends in CancelledError and nothing else."""
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        self.record.acquiring[task] = None
        try:
            conn = await acquire
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            cancelled = task.cancelling() > cancellations
            self.record.expect(not cancelled, f"a cancelled acquire raised {error!r}")
            raise
        finally:
            del self.record.acquiring[task]
        self.record.expect(task.cancelling() <= cancellations, "a cancelled acquire returned a connection")
        self.record.operations["acquire"] += 1
        self.record.take(conn.pgconn.backend_pid)
        found = conn.pgconn.transaction_status
        self.record.expect(found == status or conn.closed, f"handed out with transaction status {found}")
        self.record.expect(conn.autocommit is self.plan.autocommit, "handed out with another's autocommit")
        self.record.expect(conn.row_factory is tuple_row, "handed out with another's row_factory")
        self.record.expect(conn.isolation_level is None, "handed out with another's isolation level")
        self.record.expect(conn.cursor_factory is psycopg.AsyncCursor, "handed out with another's cursor_factory")
        return conn

    async def _in_block(self, context: AbstractAsyncContextManager[Connection], status: int = IDLE) -> None:
        conn = await self._watched(context.__aenter__(), status)
        pid = conn.pgconn.backend_pid
        try:
            await self.work(conn)
        except BaseException as error:
            self.pending = []
            self.record.put_back(pid)
            if not await context.__aexit__(type(error), error, error.__traceback__):
                raise
        else:
            # Its end gives the connection back, and may give way before that only for the COMMIT.
            self.record.put_back(pid)
            with self.record.ledger.committing(self.pending):
                await context.__aexit__(None, None, None)
            self._strike()

    def _strike(self) -> None:
        """Right after a give-back, before anybody else runs: cancel whoever may just have been granted the place."""
        if self.rng.random() < 0.2:
            for task in self.record.acquiring:
                if task in self.record.cancellable:
                    task.cancel()
                    self.record.struck.add(task)
                    break

    # --- without a lease ------------------------------------------------------------------------------------

    async def send_one_shots(self) -> None:
        await one_shots.burst(self)

    # --- leases that end as they should ---------------------------------------------------------------------

    async def block(self) -> None:
        await self._in_block(self.pool.acquire(self._draw_timeout()))

    async def transaction(self) -> None:
        await self._in_block(self.pool.transaction(self._draw_timeout()), INTRANS)

    async def by_hand(self) -> None:
        conn = await self._watched(self.pool.acquire(self._draw_timeout()))
        pid = conn.pgconn.backend_pid
        try:
            await self.work(conn)
            end = self.rng.random()
            if end < 0.6:
                with self.record.ledger.committing(self.pending):
                    await conn.commit()
            elif end < 0.8:
                await conn.rollback()
        finally:
            self.record.put_back(pid)
            await self.pool.release(conn)
            self._strike()

    # --- those that do not ----------------------------------------------------------------------------------

    async def close_in_block(self) -> None:
        async with self.pool.acquire(self._draw_timeout()) as conn:
            await self.work(conn)
            # What is open is rolled back, and the end of the block says so.
            self.provoke(PoolError)
            await conn.close()

    async def close(self) -> None:
        conn = await self._watched(self.pool.acquire(self._draw_timeout()))
        pid = conn.pgconn.backend_pid
        try:
            await self.work(conn)
        finally:
            self.record.put_back(pid)
            await conn.close()
            await conn.close()

    async def give_back_twice(self) -> None:
        conn = await self._watched(self.pool.acquire(self._draw_timeout()))
        pid = conn.pgconn.backend_pid
        try:
            await self.work(conn)
        finally:
            self.record.put_back(pid)
            # One after the other at once: later on the object may be another's.
            self.pool.release(conn)
            try:
                self.pool.release(conn)
            except PoolError:
                pass
            else:
                self.record.violation("a second release was taken for one")

    async def leave_in_the_middle(self) -> None:
        possible = [left for left in LEFTOVERS if not (self.plan.autocommit and left.leave.__name__ == "in_copy_in")]
        leftover = self.rng.choice(possible)
        conn = await self._watched(self.pool.acquire(self._draw_timeout()))
        pid = conn.pgconn.backend_pid
        async with AsyncExitStack() as stack:
            try:
                await leftover.leave(conn, stack)
            finally:
                self.record.put_back(pid)
                self.pool.release(conn)
                self._outlives_its_lease = True
                self.provoke(psycopg.Error, RuntimeError)  # blocks of psycopg end on a connection that is gone
            self.record.operations["leave in the middle"] += 1

    async def drop(self) -> None:
        conn = await self._watched(self.pool.acquire(self._draw_timeout()))
        self.record.dropped += 1
        self.record.put_back(conn.pgconn.backend_pid)
        with suppress(Failure):
            await self.work(conn)

    # --- what is done on a connection -----------------------------------------------------------------------

    async def work(self, conn: Connection) -> None:
        """Some actions, one after the other; sometimes a failure in between."""
        for _ in range(self.rng.choice((0, 1, 1, 2, 3))):
            action = self.rng.choice(actions.of(self.plan))
            await action(self, conn)
            self.record.operations[action.__name__.replace("_", " ")] += 1
            if self.rng.random() < 0.05:
                raise Failure

    def new_row(self) -> int:
        """A number that no other row has."""
        self._next_row += 1
        return self._next_row
