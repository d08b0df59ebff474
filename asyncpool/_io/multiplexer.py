"""Multiplexer: one-shot statements of many callers on few connections, each leased for as long as it is busy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, cast

from psycopg import errors as e
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

from .._core.effects import Refusal
from .._core.lanes import LANE_STALL, LOOK_EVERY, MAX_SENDS, Lane, LaneMachine, Paces, Statement
from .._core.policy import NEVER
from .._core.queue import GroupWaiter
from .._core.slot import Slot
from .._core.states import PoolPhase
from ..errors import PoolClosed, StatementOutcomeUnknown, StatementTimeout
from ..events import CloseReason, LaneClosed, LaneOpened, Queued
from .connection import Leased
from .leases import LEASED
from .log import logger
from .pipe import Pipe
from .reader import READ, poll_ready
from .session import NOT_LEASED, Session
from .site import LANE
from .statement import OneShot

if TYPE_CHECKING:
    from .runner import Runner

_READY_R = int(Ready.R)
_WAIT_R = Wait.R
_WAIT_RW = Wait.RW

# How many statements are gathered before they are sent, while others are under way: a system call wakes the server, and
# takes as long as two statements; meanwhile the server should have work.
FLUSH_EVERY = 16


class OpenLane(Lane):
    """A lane with its connection."""

    __slots__ = ("future", "generator", "is_ending", "pipe", "slot", "unflushed")

    def __init__(self, slot: Slot, connection: Leased, session: Session) -> None:
        super().__init__()
        self.slot = slot
        self.pipe = Pipe(connection, session, self)
        self.unflushed = 0  # statements that were put on it since the last flush
        self.is_ending = False  # whether it is about to be looked at, as it has nothing to do
        self.generator: PQGen[None]
        self.future: asyncio.Future[None]


class Multiplexer:
    """Sends the one-shot statements of a runner's pool. All of it is called in the event loop."""

    def __init__(self, runner: Runner, limit: int) -> None:
        self._runner = runner
        self._loop = runner.loop
        self._lanes = LaneMachine(limit)
        self.paces = Paces()
        self.answered = 0  # statements so far, on lanes and in tasks
        self.answered_in_threads = 0  # those that had a lease
        self.timeouts = 0
        self.cancelled = 0  # callers who left while their statement waited to be sent
        self._requests: set[GroupWaiter] = set()
        self._alone: dict[Lane, int] = {}  # those of statements that have a lease of their own, and their sockets
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many callers wait for their statement to be sent."""
        return self._lanes.waiting

    @property
    def lanes(self) -> int:
        """How many connections carry one-shot statements now."""
        return len(self._lanes.lanes)

    @property
    def requested(self) -> int:
        """How many places in the pool's queue are theirs."""
        return len(self._requests)

    def submit(self, statement: OneShot, now: float, timeout: float | None) -> None:
        """Send it, or let it wait. `timeout` is how long it may wait, in seconds; None: for ever."""
        statement.deadline = NEVER if timeout is None else now + timeout
        lane = self._lanes.lane_for()
        if lane is not None and not (self._runner.machine.waiters and self._must_yield()):
            self._put(cast(OpenLane, lane), statement, now)
        else:
            self._enqueue(statement, now)

    def _put(self, lane: OpenLane, statement: OneShot, now: float) -> None:
        was_idle = not lane.in_flight
        try:
            if not lane.pipe.put(statement, now):
                return
        except BaseException as error:  # the connection is lost; or Ctrl-C, in the midst of anything
            if not statement.is_sent:
                self._lanes.enqueue_again([statement])
            self._give_up(lane)
            if not isinstance(error, Exception):
                raise
            return
        lane.unflushed += 1
        if self._timer is None:
            self._watch(now)
        if was_idle or lane.unflushed >= FLUSH_EVERY:
            self._flush(lane)
        elif lane.unflushed == 1:
            self._loop.call_soon(self._flush, lane)

    def _flush(self, lane: OpenLane) -> None:
        if lane.unflushed and lane in self._lanes.lanes:
            lane.unflushed = 0
            try:
                if lane.pipe.session.pgconn.flush():
                    lane.pipe.session.reader.await_writable()
            except e.Error:
                self._give_up(lane)

    def _give_up(self, lane: OpenLane) -> None:
        """End a lane with its connection; in a turn of its own, as its generator may be running."""
        lane.is_leaving = True
        lane.pipe.session.reader.stop_if_lost()
        self._loop.call_soon(self._sever, lane)

    def _sever(self, lane: OpenLane) -> None:
        if lane in self._lanes.lanes:
            lane.pipe.session.sever()
            lane.pipe.session.reader.fail()  # libpq may have closed the socket by itself: no event will come

    def _must_yield(self) -> bool:
        """Whether others wait for a connection than those who would get it back for a lane."""
        return len(self._runner.machine.waiters) > len(self._requests)

    def _is_over(self, lane: OpenLane, now: float) -> bool:
        """Whether the connection of a lane is to be closed."""
        slot, machine = lane.slot, self._runner.machine
        is_doomed = now >= slot.expires_at and slot.doom is not CloseReason.MAX_USES  # that allows for this one use
        return now >= slot.retires_at or is_doomed or machine.size > machine.max_size or lane.pipe.session.is_read_only

    # --- what is not sent yet -------------------------------------------------------------------------------

    def _enqueue(self, statement: OneShot, now: float) -> None:
        runner = self._runner
        if runner.phase not in (PoolPhase.OPENING, PoolPhase.OPEN):
            statement.fail(runner.refusal(Refusal.CLOSED, began=now))
            return
        self._lanes.enqueue(statement)
        if self._lanes.wants_lane(len(self._requests)):
            self._request(now)
            if statement.is_sent or statement.error is not None:
                return
        max_waiting = runner.config.max_waiting
        if max_waiting is not None and self._lanes.waiting > max_waiting:
            self._refuse(statement, Refusal.TOO_MANY_WAITING, now)
        elif statement.deadline <= now:
            self._refuse(statement, Refusal.TIMEOUT, now)
        elif any(runner.machine.joined(waiter, statement.owner) for waiter in self._requests):
            self._refuse(statement, Refusal.DEADLOCK, now)
        else:
            self._watch(now)
            if runner.observations:
                runner.observations.note(Queued, runner.waiting)

    def _refuse(self, statement: OneShot, refusal: Refusal, began: float) -> None:
        self._lanes.withdraw(statement)
        self._fail(statement, refusal, began)
        self._withdraw_requests()

    def _fail(self, statement: OneShot, refusal: Refusal, began: float) -> None:
        self.timeouts += refusal is Refusal.TIMEOUT
        error = self._runner.refusal(refusal, began=began, owner=statement.owner)
        statement.forget()
        statement.fail(error)

    def withdraw(self, statement: OneShot) -> None:
        """The caller is gone. What was sent is not cancelled: that could hit another's statement."""
        if not statement.is_wanted:
            return
        if statement.timer is not None:
            statement.timer.cancel()
        self._lanes.withdraw(statement)
        if not statement.is_sent:
            self.cancelled += statement.error is None  # else it is counted as what it was refused for
            statement.forget()
            self._withdraw_requests()

    def expire(self, statement: OneShot) -> None:
        """The time that the caller gives to the whole call is over."""
        if not statement.is_wanted or statement.error is not None or statement.result is not None:
            return
        if statement.is_sent:
            words = "a one-shot statement was sent, and not answered in time; it may be executed all the same"
            statement.fail(StatementTimeout(f"{self._runner.config.name}: {words}"))
            self.withdraw(statement)
        else:
            self._refuse(statement, Refusal.TIMEOUT, statement.began)

    def _withdraw_requests(self) -> None:
        """Leave the pool's queue if nobody waits for a lane any more."""
        if self._requests and not self._lanes.waiting:
            for waiter in tuple(self._requests):
                self._requests.discard(waiter)
                self._runner.perform(self._runner.machine.withdraw(waiter, monotonic()))

    def _watch(self, now: float) -> None:
        """Look again when something may be overdue."""
        if self._timer is None:
            # What is known to be slow needs no close look.
            is_new = any(not lane.is_stalled for lane in (*self._lanes.lanes, *self._alone) if lane.in_flight)
            soon = min(LOOK_EVERY if is_new else LANE_STALL, max(0.0, self._lanes.next_deadline() - now))
            self._timer = self._loop.call_later(soon, self._look, context=self._runner.context)

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        for statement in cast("list[OneShot]", self._lanes.take_overdue(now)):
            self._fail(statement, Refusal.TIMEOUT, statement.began)
        self._withdraw_requests()
        self._look_for_answers(now)
        self._fill_all(now)
        lanes = cast("list[OpenLane]", self._lanes.lanes)
        if self._lanes.waiting or self._alone or any(lane.pipe.is_busy for lane in lanes):
            self._watch(now)

    def _look_for_answers(self, now: float) -> None:
        for lane, fd in tuple(self._alone.items()):
            if not poll_ready(fd, READ):
                lane.seen_pending(now)
        for lane in cast("list[OpenLane]", self._lanes.lanes[:]):
            if lane.pipe.is_busy and not poll_ready(lane.pipe.session.reader.fd, READ):
                if lane.in_flight:
                    lane.seen_pending(now)
                if self._is_hopeless(lane, now):
                    self._give_up(lane)

    def _is_hopeless(self, lane: OpenLane, now: float) -> bool:
        """Whether nobody waits for what is under way, and that takes too long: its place is worth more than its end."""
        if lane.in_flight:
            stalls_at = lane.stalls_at if lane.is_forsaken else NEVER
        else:  # its users' statements could not be sent, and the network is silent
            stalls_at = lane.pipe.probed_at + LANE_STALL
        return now >= stalls_at + self._runner.config.cancel_timeout

    @contextmanager
    def watching(self, pipe: Pipe) -> Iterator[None]:
        """Look for the answer to a statement that has a lease of its own."""
        self._alone[pipe.lane] = pipe.session.reader.fd
        self._watch(monotonic())
        try:
            yield
        finally:
            del self._alone[pipe.lane]

    # --- lanes ----------------------------------------------------------------------------------------------

    def _fill_all(self, now: float) -> None:
        for lane in tuple(self._lanes.lanes):
            self._fill(cast(OpenLane, lane), now)
        while self._lanes.wants_lane(len(self._requests)):
            if not self._request(now):
                return

    def _fill(self, lane: OpenLane, now: float) -> None:
        if self._lanes.waiting and not self._must_yield():
            self._fill_at_least_once(lane, now)

    def _fill_at_least_once(self, lane: OpenLane, now: float) -> None:
        while (statement := self._lanes.next_for(lane)) is not None:
            self._put(lane, cast(OneShot, statement), now)
        self._flush(lane)

    def _request(self, now: float) -> bool:
        """Open a lane, or stand in the pool's queue for it. Whether one was opened."""
        runner = self._runner
        runner.watch.look(now)
        slot = runner.machine.take(now)
        if slot is not None:
            runner.machine.note_unused(was_granted=False)
            self._open(slot, now)
            return True
        waiter = GroupWaiter(NEVER, self._owners)
        self._requests.add(waiter)
        runner.perform(runner.machine.enqueue(waiter, now))
        return False

    def _owners(self) -> Iterable[object]:
        return (statement.owner for statement in self._lanes.unsent())

    def granted(self, waiter: GroupWaiter) -> None:
        """The pool's queue has a connection for us."""
        # In a turn of its own: whoever has given the connection back is not to be kept from its work.
        self._loop.call_soon(self._take_granted, waiter, context=self._runner.context)

    def _take_granted(self, waiter: GroupWaiter) -> None:
        if waiter not in self._requests:
            return  # withdrawn meanwhile
        self._requests.discard(waiter)
        slot = waiter.slot
        now = monotonic()
        if slot is None or slot.state is not LEASED or not self._lanes.waiting:
            # The pool was closed since, or they were refused.
            self._runner.perform(self._runner.machine.withdraw(waiter, now))
            return
        self._runner.machine.note_unused(was_granted=True)
        self._runner.watch.look(now)
        if slot.is_disconnected:
            self._runner.perform(self._runner.machine.discard(slot, slot.doom, now))
            self._fill_all(now)
        else:
            self._open(slot, now)

    def refused(self, waiter: GroupWaiter, refusal: Refusal) -> None:
        """The pool has no connection for us."""
        self._requests.discard(waiter)
        now = monotonic()
        statements = cast("list[OneShot]", self._lanes.take_unsent())
        if refusal is Refusal.DEADLOCK:
            # One is enough for the others to go on: the last that came, as with those who wait for a lease.
            holders = {id(slot.owner()) for slot in self._runner.machine.leases() if slot.owner is not None}
            last = next((statement for statement in reversed(statements) if id(statement.owner) in holders), None)
            for statement in statements:
                if statement is not last:
                    self._lanes.enqueue(statement)
            statements = [last] if last is not None else []  # it has gone since
        for statement in statements:
            self._fail(statement, refusal, statement.began)
        if self._lanes.waiting:
            self._watch(now)

    def _open(self, slot: Slot, now: float) -> None:
        session = cast(Session, slot.resource)
        connection = session.connection
        if session.touched:  # somebody went on with the object after its release
            self._runner.leases.restore(session, connection)
        slot.owner = None  # it goes back whatever its users do
        session.site_code = LANE
        session.is_noted = True  # its end is none of a lease
        session.holder = session.stack = None  # those of its last lease
        session.connection = session.granted_to = None
        session.lease = NOT_LEASED  # for whoever has kept the object after its release
        lane = OpenLane(slot, connection, session)
        try:
            lane.pipe.enter()
        except e.Error:
            session.reader.stop_if_lost()
            self._runner.leases.end_lease(connection)
            return
        lane.unflushed = int(lane.pipe.is_busy)  # with what measures the round trip, if nothing comes of the statement
        lane.generator = self._run(lane)
        lane.future = session.reader.drive(lane.generator, next(lane.generator))
        lane.future.add_done_callback(partial(self._lost, lane))
        self._lanes.lanes.append(lane)
        self._runner.observations.note(LaneOpened)
        while (statement := self._lanes.next_for(lane)) is not None:
            self._put(lane, cast(OneShot, statement), now)
        self._flush(lane)
        if not lane.pipe.is_busy:
            self._end_soon(lane)
        elif not lane.in_flight:
            self._watch(now)

    def _run(self, lane: OpenLane) -> PQGen[None]:
        """What the reader drives: it takes the answers, sends what waits, and has no end of its own."""
        pipe = lane.pipe
        pgconn = pipe.session.pgconn
        wait = _WAIT_R
        while True:
            ready = yield wait
            if ready & _READY_R:
                self.answered += pipe.read()
                self._go_on(lane)
            lane.unflushed = 0
            wait = _WAIT_RW if pgconn.flush() else _WAIT_R

    def _go_on(self, lane: OpenLane) -> None:
        """Something has come on a lane."""
        now = monotonic()
        if self._is_over(lane, now):
            lane.is_leaving = lane.pipe.session.touched = True
        if self._lanes.waiting:
            self._fill_all(now)
        elif self._requests:
            self._withdraw_requests()
        if not lane.pipe.is_busy:
            self._end_soon(lane)

    def _end_soon(self, lane: OpenLane) -> None:
        """Look again when whoever was answered has had time to go on."""
        if not lane.is_ending:
            lane.is_ending = True
            self._loop.call_soon(self._end_if_idle, lane, context=self._runner.context)

    def _end_if_idle(self, lane: OpenLane) -> None:
        lane.is_ending = False
        if lane.pipe.is_busy or lane.future.done() or lane not in self._lanes.lanes:
            return
        self._lanes.lanes.remove(lane)
        self._runner.observations.note(LaneClosed, monotonic() - lane.slot.leased_at, False)
        lane.pipe.session.reader.let_go()
        lane.generator.close()
        with contextlib.suppress(e.Error):  # it was lost in this moment
            lane.pipe.leave()
        self._runner.leases.end_lease(lane.pipe.connection)
        if self._lanes.waiting:
            self._fill_all(monotonic())

    def _lost(self, lane: OpenLane, future: asyncio.Future[None]) -> None:
        """The connection was lost, or is of no use any more. What was sent on it nobody knows the end of."""
        if lane not in self._lanes.lanes:
            return
        self._lanes.lanes.remove(lane)
        self._runner.observations.note(LaneClosed, monotonic() - lane.slot.leased_at, True)
        error = future.exception()
        name = self._runner.config.name
        if isinstance(error, Exception) and not isinstance(error, e.Error):
            logger.error("%s: a bug in asyncpool: a lane failed", name, exc_info=error)
        is_closed = self._runner.phase in (PoolPhase.CLOSING, PoolPhase.CLOSED)
        cause = lane.pipe.last_words or (PoolClosed(f"{name} was closed") if is_closed else error)
        again: list[Statement] = []
        now = monotonic()
        limit = self._runner.config.acquire_timeout
        for statement in cast("Iterable[OneShot]", lane.in_flight):
            if statement.is_wanted and statement.retry and statement.sends < MAX_SENDS:
                statement.deadline = NEVER if limit is None else now + limit  # it may have run for long
                again.append(statement)
            elif statement.is_wanted:
                statement.fail(outcome_unknown(name, cause))
        lane.in_flight.clear()
        self._lanes.enqueue_again(again)
        lane.pipe.session.sever()
        self._runner.leases.end_lease(lane.pipe.connection)
        self._fill_all(now)
        if self._lanes.waiting:
            self._watch(now)
        if error is not None and not isinstance(error, Exception):
            raise error  # Ctrl-C has struck where a lane was served: that is the event loop's

    # --- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send nothing more. What was sent is waited for, and the lanes given back."""
        for lane in self._lanes.lanes:
            lane.is_leaving = True
        for statement in cast("list[OneShot]", self._lanes.take_unsent()):
            self._fail(statement, Refusal.CLOSED, statement.began)

    def stop(self) -> None:
        """Look at nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def outcome_unknown(name: str, cause: BaseException | None) -> StatementOutcomeUnknown:
    """The error for a statement that was sent, and whose answer did not come."""
    reason = str(cause).partition("\n")[0] if cause is not None else "the connection was lost"
    words = "a one-shot statement was sent, and the connection lost before its answer: it was executed, or not"
    error = StatementOutcomeUnknown(f"{name}: {words} ({reason})")
    error.__cause__ = cause
    return error
