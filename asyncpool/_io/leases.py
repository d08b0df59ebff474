"""The end of a lease: what is handed on, what is cleaned, what is closed; lost leases, and long-held ones."""

from __future__ import annotations

import asyncio
import logging
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import cast

from psycopg import pq

from .._core.effects import Effects
from .._core.machine import PoolMachine
from .._core.slot import Slot
from .._core.states import SlotState
from ..config import PoolConfig
from ..errors import PoolError, WrongLoop
from ..events import Acquired, CloseReason, Released, seconds_in_words
from ..histogram import SHORTEST, Durations
from .client_state import read_client_state
from .connection import Leased, describe_unfinished
from .holders import name_of_holder
from .log import Log, logger
from .observation import Observations
from .reader import BAD
from .session import FORKED, IDLE, NOT_LEASED, SEVERED, Session
from .site import LANE, describe_stack
from .watch import DisconnectWatch

LEASED = SlotState.LEASED
_IDLE = int(IDLE)
_TRANSACTION = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)


class Leases:
    """Takes connections back on behalf of a runner, whose `perform` carries out what the machine says to it."""

    close_returns = True  # psycopg's hook for pools: `conn.close()` calls `putconn` in place of closing

    def __init__(
        self,
        config: PoolConfig,
        machine: PoolMachine,
        watch: DisconnectWatch[Session],
        perform: Callable[[Effects], None],
        observations: Observations,
        *,
        debug: bool,
    ) -> None:
        self.name = config.name
        self._config = config
        self._machine = machine
        self._perform = perform
        self._observations = observations
        self._watch = watch
        self._loop = watch.loop
        self.log = Log(config.name, self._loop)
        self.holds = Durations()  # but for those that are shorter than SHORTEST
        self.returned_bad = 0
        self.finished: asyncio.Future[None] = self._loop.create_future()  # for what was done when it was called
        self.finished.set_result(None)
        self._debug = debug
        self._reset_needed = config.reset != "rollback"
        self.warn_in_transaction = True  # until it was done once
        self._held_timer: asyncio.TimerHandle | None = None
        self.dropped: deque[tuple[Session, int]] = deque()  # for `take_back_dropped`

    def give_back_clean(self, connection: Leased) -> bool:
        """End a lease whose connection can go to the next user as it is; False, and nothing done, if it cannot."""
        session = connection._session
        if session.pgconn.transaction_status != _IDLE or (session.touched and not self._is_clean(connection, session)):
            return False
        session.lease = NOT_LEASED
        session.connection = connection
        now = monotonic()
        slot: Slot = session.slot  # type: ignore[assignment]  # it has one while it is leased; a cast() takes time
        if session.is_noted:
            self.note_end(session, now)
        elif (held := now - slot.leased_at) > SHORTEST:  # the same in fewer calls
            self.holds.record(held)
        if self._machine.waiters:
            self._watch.look(now)  # it is handed out at once
        effects = self._machine.give_back(slot, session.reader.answered_at, now)
        if effects:
            self._perform(effects)
        return True

    def _is_clean(self, connection: Leased, session: Session) -> bool:
        assert session.baseline is not None
        if (
            self._reset_needed
            or session.lease == SEVERED
            or connection.lock.locked()
            or session.refused_write
            or session.is_read_only
            or read_client_state(connection) != session.baseline.state
        ):
            return False
        session.touched = session.in_transaction = False
        session.round_trip = 0.0  # libpq may be in the row-by-row mode of a stream(), until a Sync: one measures anew
        session.prepared = connection._prepared._prepared_idx
        return True

    def end_lease(self, connection: Leased, *, after_block: bool = False) -> None:
        """Take a connection back, in whatever condition it is. Acts at once; what takes time follows behind.

        `after_block`: at the end of an `async with`, where a transaction left open needs no warning.
        """
        if self.give_back_clean(connection):
            return
        session = connection._session
        lease = session.lease
        session.lease = NOT_LEASED
        if lease == SEVERED:
            return  # by close(), which sees to the rest
        if session.pgconn.transaction_status in _TRANSACTION and not after_block:
            session.undone_lease = lease
        session.connection = connection
        now = monotonic()
        self.note_end(session, now)
        self._watch.look(now)
        effects = self._take_back_changed(connection, session, cast(Slot, session.slot), now, after_block=after_block)
        self._perform(effects)
        session.touched = session.in_transaction = False
        session.round_trip = 0.0  # libpq may be in the row-by-row mode of a stream(), until a Sync: one measures anew

    def _take_back_changed(
        self, connection: Leased, session: Session, slot: Slot, now: float, *, after_block: bool
    ) -> Effects:
        assert session.baseline is not None
        if session.pgconn.status == BAD:
            self.returned_bad += 1
            reason = CloseReason.DISCONNECTED if session.is_lost else CloseReason.DISCARDED
            return self._machine.discard(slot, reason, now)
        if busy := describe_unfinished(connection):
            self.returned_bad += 1
            text = "closing a connection that was returned %s (acquired at %s)"
            self.log.write(logging.WARNING, "returned busy", text, busy, session.site)
            return self._machine.discard(slot, CloseReason.RETURNED_BUSY, now)
        if session.pgconn.transaction_status in _TRANSACTION and not after_block:
            self.returned_bad += 1
            self._warn_in_transaction(session)
        session.baseline.restore(connection)
        if session.refused_write:
            if session.role is not None:
                return self._machine.recycle(slot, now)  # which asks for its role, and tells of a lost one
            session.refused_write = False
        if session.pgconn.transaction_status == IDLE and not self._reset_needed:
            if session.is_read_only:
                self.log.write(logging.INFO, "read-only", "closing a connection whose server has become read-only")
                return self._machine.discard(slot, CloseReason.READ_ONLY, now)
            session.prepared = connection._prepared._prepared_idx
            return self._machine.give_back(slot, session.reader.answered_at, now)
        return self._machine.recycle(slot, now)

    def _warn_in_transaction(self, session: Session) -> None:
        """Once for each pool: a connection was released in a transaction, which is rolled back."""
        if self.warn_in_transaction:
            self.warn_in_transaction = False
            logger.warning(
                "%s: a connection was released in a transaction, which is rolled back (acquired at %s); this is"
                " said once: commit, or use a `with` block of `pool.acquire()`",
                self._config.name,
                session.site,
            )

    def check_pool(self, config: PoolConfig) -> None:
        """Raise unless these are leases of that pool."""
        if self._config is not config:
            raise PoolError(f"{config.name}: this connection is not of this pool")

    def check_former(self, config: PoolConfig) -> None:
        """Raise unless these are leases of an earlier opening of that pool, which its close() has ended."""
        self.check_pool(config)
        if self._loop.is_closed():
            raise PoolError(f"{config.name}: this connection's event loop is closed, and so is the connection")

    async def putconn(self, connection: Leased) -> None:
        """What psycopg calls when the user closes a leased connection."""
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop(f"{self._config.name} was opened in another event loop than the one that uses it now")
        self.end_lease(connection)

    def discard_lease(self, connection: Leased, reason: CloseReason) -> None:
        """Take a connection back to close it, unless close() does that already."""
        session = connection._session
        session.lease = NOT_LEASED
        slot = cast(Slot, session.slot)
        if slot.state is LEASED:
            self.note_end(session, monotonic())
            session.connection = connection
            session.touched = False
            if reason is CloseReason.DISCARDED:
                session.sever()  # at once, so that it is closed for its former user too
            self._perform(self._machine.discard(slot, reason, monotonic()))

    def restore(self, session: Session, connection: Leased) -> None:
        """Put back the settings of a connection that is about to be handed out."""
        assert session.baseline is not None
        session.baseline.restore(connection)
        session.touched = False

    def adopt(self, session: Session, connection: Leased) -> None:
        """Notice when the session's connection object is collected while it is leased."""
        session.reference = weakref.ref(connection, partial(self._on_collected, session))

    def _on_collected(self, session: Session, reference: object) -> None:
        # Called by the garbage collector, in any thread and at any moment: it may take no lock.
        slot = session.slot
        if slot is None or slot.state is not LEASED or session.reference is not reference or session.lease == FORKED:
            return
        try:
            self._loop.call_soon_threadsafe(self._take_back_lost, session, slot.uses)
        except RuntimeError:
            if self._loop.is_closed():
                session.abandon()
            else:  # too near to the recursion limit
                self.dropped.append((session, slot.uses))

    def take_back_dropped(self) -> None:
        """Take back what was collected where nobody could be told."""
        while self.dropped:
            self._take_back_lost(*self.dropped.popleft())

    def _take_back_lost(self, session: Session, lease: int) -> None:
        slot = session.slot
        if slot is None or slot.state is not LEASED or slot.uses != lease:
            return
        site = session.stack or session.site
        self.returned_bad += 1
        self.note_end(session, monotonic())
        text = "a connection was dropped without release, and is closed: use acquire() as a block (acquired at %s)"
        self.log.write(logging.WARNING, "lost", text, session.site)
        session.lease = SEVERED
        session.touched = True
        self._perform(self._machine.discard(slot, CloseReason.LEASE_LOST, monotonic()))
        warnings.warn(f"{self._config.name}: {text % site}", ResourceWarning, stacklevel=1)

    def begin(self, session: Session, former: Leased, began: float) -> Leased:
        """Tell observers of a lease that was asked for at `began`. With `debug`: keep the acquire's full stack, and
        take a connection object that no other lease shares.
        """
        if self._observations:
            session.is_noted = True
            self._observations.note(Acquired, max(0.0, cast(Slot, session.slot).leased_at - began))
        if not self._debug:
            return former
        session.stack = describe_stack()
        connection: Leased = former._renewed()
        self.adopt(session, connection)  # before the former one can be collected: it is not lost
        return connection

    # --- long-held leases -----------------------------------------------------------------------------------

    def watch_long_held(self) -> None:
        """Warn of leases that last longer than `long_held_after`, once each; look again when the next could."""
        limit = self._config.long_held_after
        assert limit is not None
        now = monotonic()
        due = now + limit
        for slot in self._machine.leases():
            session = slot.resource
            assert isinstance(session, Session)
            if session.held_warned or session.site_code is LANE:
                continue
            if now < slot.leased_at + limit:
                due = min(due, slot.leased_at + limit)
                continue
            session.held_warned = session.is_noted = True
            logger.warning(
                "%s: a connection is held for %s, longer than long_held_after=%.3g s (by %s, acquired at %s)",
                self._config.name,
                seconds_in_words(now - slot.leased_at),
                limit,
                name_of_holder(session),
                session.stack or session.site,
            )
        self._held_timer = self._loop.call_later(due - now, self.watch_long_held)

    def note_end(self, session: Session, now: float) -> None:
        """Count a lease that ends, and tell of it whoever wants to know."""
        assert session.slot is not None
        if session.site_code is LANE:
            session.is_noted = False
            return
        held = now - session.slot.leased_at
        if held > SHORTEST:
            self.holds.record(held)
        if session.is_noted:
            session.is_noted = False
            self._observations.note(Released, held)
            if session.held_warned:
                session.held_warned = False
                text = "%s: the long-held connection came back after %s (acquired at %s)"
                logger.warning(text, self._config.name, seconds_in_words(held), session.site)

    def stop(self) -> None:
        """Look for long-held leases no more."""
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
