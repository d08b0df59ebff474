"""The runner of a pool that threads use, and what they hold of it: taking a connection, waiting for one, a block."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from types import CodeType
from typing import Any, TypeVar, cast

from psycopg import Connection

from .._core.effects import Close, Effects
from .._core.machine import PoolMachine
from .._core.policy import NEVER
from .._core.slot import Slot
from ..config import PoolConfig
from ..errors import PoolClosed, PoolError
from ..events import CloseReason, Queued
from .acquisition import Default
from .blocking_acquisition import BlockingLeases
from .blocking_one_shot import Submissions
from .driver import Driver
from .leases import LEASED, Leases
from .locked_machine import LockedMachine, ThreadWaiter, current, ensure_stack
from .loop_thread import OWN_THREAD, Hold, LoopThread, check_not_finalizing
from .observation import Observations
from .reader import socket_of
from .runner import Runner, is_bound_to_its_owner
from .session import FORKED, NOT_LEASED, SEVERED, Session
from .watch import peer_has_closed

C = TypeVar("C", bound=Connection[Any])


class WaitUnlessExhausted:
    """The type of WAIT_UNLESS_EXHAUSTED: a caller who waits for what is being connected, cleaned or closed, and is
    refused at once if every place is leased, and as soon as a connect fails.
    """


WAIT_UNLESS_EXHAUSTED = WaitUnlessExhausted()

Timeout = float | Default | WaitUnlessExhausted | None


class BlockingRunner(Runner):
    """Any thread takes and gives connections here; all else happens in the event loop."""

    machine: LockedMachine
    leases: BlockingLeases
    _leases_class = BlockingLeases
    is_drop_in = False  # for psycopg2's pools: there close() closes, and giving back a transaction is the custom

    def __init__(self, config: PoolConfig, driver: Driver, observations: Observations, *, debug: bool) -> None:
        super().__init__(config, driver, observations, debug=debug)
        if self.is_drop_in:
            self.leases.close_returns = False
            self.leases.warn_in_transaction = False
        self.leases.finish_interrupted = self.finish_interrupted
        self.leases.take_back = self.machine.take_back
        self.machine.holds = self.leases.holds
        hold = LoopThread.hold()
        self._loop_thread = hold.thread
        self.submissions = Submissions(self)
        driver.guard = threading.RLock()
        self._locks = {self.machine.lock, driver.guard}
        self._loop_thread.locks.update(self._locks)
        self.closing.add_done_callback(lambda _: self._leave(hold))

    def _leave(self, hold: Hold) -> None:
        self._loop_thread.locks.difference_update(self._locks)
        hold.release()

    def _make_machine(self) -> PoolMachine:
        return LockedMachine(
            self.config, random.random, is_bound_to_its_owner, partial(self.in_loop, self._start_what_was_lost)
        )

    def perform(self, effects: Effects) -> None:
        """Have the event loop do what there is for it."""
        if self.machine.for_loop:
            if asyncio._get_running_loop() is self.loop:
                self._perform_kept()
            else:
                self.in_loop(self._perform_kept)

    def in_loop(self, work: Callable[[], None]) -> None:
        """Have the event loop do something, if it is still there."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so is everything
            self.loop.call_soon_threadsafe(work)

    def _perform_kept(self) -> None:
        kept = self.machine.for_loop
        while kept:
            super().perform((kept.popleft(),))

    def _start_what_was_lost(self) -> None:
        """A decision was disturbed: what was to be done may have been postponed, or swallowed."""
        self.machine.carry_out_postponed()
        self.machine.find_lost(self._tasks)
        self._perform_kept()
        self.perform(self.machine.wake(monotonic()))

    def finish_interrupted(self, connection: Any, lease: int) -> None:
        """Ctrl-C, or a lack of memory, has struck while this lease was being ended: end it, if that is still to be
        done.
        """
        ensure_stack()
        session: Session = connection._session
        slot = session.slot
        if slot is None:
            return  # with `debug`: its session has another connection object now
        with self.machine.lock:
            is_mine = slot.uses == lease and slot.state is LEASED and session.granted_to is None
            is_given_back = session.connection is connection
        if is_mine and session.lease == lease:
            Leases.end_lease(self.leases, connection, after_block=True)
        elif is_mine and is_given_back:
            self.perform(self.machine.recycle(slot, monotonic()))
        self.in_loop(self._start_what_was_lost)

    def sever(self) -> None:
        """End the leases that keep the pool from closing."""
        now = monotonic()
        # One that its thread is just ending is counted there.
        running = {slot for slot in self.machine.leases() if cast(Session, slot.resource).lease == slot.uses}
        effects = self.machine.sever(now)
        for effect in effects:
            if type(effect) is Close and isinstance(effect.slot.resource, Session):
                if effect.slot in running:
                    self.leases.note_end(effect.slot.resource, now)
                effect.slot.resource.sever()
        self.perform(effects)

    def disown(self) -> None:
        """In a forked child: the sessions are the parent's."""
        for slot in self.machine.slots():
            if isinstance(slot.resource, Session):
                slot.resource.lease = FORKED
        _inherited.extend((self, self.driver.disown()))

    def check_loop(self) -> None:
        """Raise PoolClosed if the event loop is gone. Any thread may call the machine."""
        if self.loop.is_closed():
            raise PoolClosed(f"{self.config.name} is closed")

    def must_not_wait(self) -> bool:
        """Whether the event loop stands still for as long as the caller waits."""
        return asyncio._get_running_loop() is self.loop or self._loop_thread.waits_for_caller()

    # --- what threads call ----------------------------------------------------------------------------------

    def lease(self, timeout: Timeout, code: CodeType, offset: int) -> Any:
        """A connection, taken or waited for. Raises as `SyncPool.getconn`; Ctrl-C leaves nothing behind."""
        now = monotonic()
        connection = self.machine.lend(now, -NEVER, code, offset)
        if connection is not None and not self._has_ended(connection, was_granted=False):
            session: Session = connection._session
        else:
            connection = self._wait_for_one(now, timeout)
            session = connection._session
            session.site_code = code
            session.site_offset = offset
            session.holder = current.owner
            if session.touched:  # somebody went on with the object after its release
                self.leases.restore(session, connection)  # `session.connection` is None of a lease
        return connection if self.is_plain else self.prepare(connection, now)

    def _has_ended(self, connection: Any, *, was_granted: bool) -> bool:
        """Look at the socket of a connection that is about to be handed out; one that has ended is discarded."""
        session: Session = connection._session
        fd = socket_of(session.pgconn)
        if fd is not None and not peer_has_closed(fd):
            session.alive_at = monotonic()
            return False
        ensure_stack()
        self.machine.note_unused(was_granted=was_granted)
        session.lease = NOT_LEASED
        session.connection = connection
        self.perform(self.machine.discard(cast(Slot, session.slot), CloseReason.DISCONNECTED, monotonic()))
        return True

    def _wait_for_one(self, began: float, timeout: Timeout) -> Any:
        check_not_finalizing(self.config.name)
        if self.must_not_wait():
            raise PoolError(f"{self.config.name}: {OWN_THREAD}")
        ensure_stack()
        if self.leases.dropped:
            self.in_loop(self.leases.take_back_dropped)
        seconds = timeout if timeout is None or isinstance(timeout, (int, float)) else self.config.acquire_timeout
        deadline = NEVER if seconds is None else began + seconds
        now = began
        while True:
            waiter = ThreadWaiter(deadline, began, wants_errors=timeout is WAIT_UNLESS_EXHAUSTED)
            try:
                if timeout is WAIT_UNLESS_EXHAUSTED:
                    effects = self.machine.enqueue_unless_exhausted(waiter, now)
                else:
                    effects = self.machine.enqueue(waiter, now)
                self.perform(effects)
                if self.observations:
                    self.observations.note(Queued, self.waiting)
                waiter.wait()
                connection = self.machine.lend_granted(waiter.slot) if waiter.slot is not None else None
            except BaseException:
                self.cancelled += waiter.refusal is None  # else it is counted as what it was refused for
                self.perform(self.machine.withdraw(waiter, monotonic()))
                raise
            if waiter.refusal is not None:
                raise self.refusal(waiter.refusal, waiter.position, began=waiter.began, owner=waiter.owner)
            if connection is None:
                self.machine.note_unused(was_granted=True)
                raise PoolClosed(f"{self.config.name} is closed")  # between the grant and now
            now = monotonic()
            if not self._has_ended(connection, was_granted=True):
                self.waits.record(now - began)
                return connection

    async def _set_up(self, connection: Any) -> TimeoutError | None:
        """Run `setup`. A TimeoutError is returned, because a future makes another one of it on its way to a thread."""
        try:
            await self.driver.set_up_lease(connection)
        except TimeoutError as error:
            return error
        return None

    def prepare(self, connection: Any, began: float) -> Any:
        """What `debug`, `setup` and observers want to be done with a lease that was asked for at that time."""
        session: Session = connection._session
        connection = self.leases.begin(session, connection, began)
        if self.config.setup is not None:
            lease = session.lease
            answer = asyncio.run_coroutine_threadsafe(self._set_up(connection), self.loop)
            try:
                if (error := answer.result()) is not None:
                    raise error
            except BaseException:
                answer.cancel()
                if session.lease in (lease, SEVERED):  # else it has given it back, and it may be somebody else's
                    self.leases.discard_lease(connection, CloseReason.SETUP_FAILED)
                raise
            if session.lease != lease:
                raise PoolError(f"{self.config.name}: setup has given its connection back")
        return connection


class DropInRunner(BlockingRunner):
    """That of a pool that stands in for psycopg2's."""

    is_drop_in = True


_inherited: list[object] = []  # of the parent process: what hangs on them must never be finalized here
