"""Carries out the machine's effects in one event loop, and reports their outcomes back.

Every task is short, named and owned here, one at a time for each slot. There is no long-lived task: a stray
cancellation of all tasks hits what is in flight, and is reported as the outcome that it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import os
import random
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from threading import get_ident
from time import monotonic
from typing import Any

import anyio
from psycopg import OperationalError

from .._core.effects import (
    Check,
    Close,
    Closed,
    Connect,
    Effects,
    Opened,
    OpeningFailed,
    Recycle,
    Refusal,
    Refuse,
    WakeAt,
)
from .._core.machine import PoolMachine
from .._core.policy import ConnectFailure
from .._core.queue import GroupWaiter, Waiter
from .._core.slot import Slot
from .._core.states import PoolPhase, SlotState
from ..config import PoolConfig
from ..errors import PoolClosed, PoolError, PoolTimeout, WrongLoop
from ..events import CloseReason, Connected, ConnectError, Connecting, ConnectionClosed, TimedOut
from ..histogram import Durations
from .connect_errors import ConnectFailed, words_of
from .driver import Driver, Unusable
from .leases import Leases
from .log import logger
from .monitor import Listener, Monitor
from .multiplexer import Multiplexer
from .observation import Observations
from .refusals import describe_connect_error, describe_sizes, refused
from .session import SEVERED, Session
from .site import is_generator
from .snapshot import Snapshots
from .watch import DisconnectWatch


class FutureWaiter(Waiter):
    """A task in the queue, woken through its future."""

    __slots__ = ("future",)

    def __init__(
        self, deadline: float, owner: asyncio.Task[Any] | None, future: asyncio.Future[tuple[Refusal, int] | None]
    ) -> None:
        self.deadline = deadline
        self.owner = owner
        self.slot = None
        self.future = future


_all_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The child has the same thread, and its copy of the parent's loop claims to run: have the loop itself looked at.
    for runner in _all_runners:
        runner.thread = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Runner:
    """One opening of a pool, from `open` to `closed`, bound to the event loop it is made in."""

    _leases_class: type[Leases] = Leases

    def __init__(self, config: PoolConfig, driver: Driver, observations: Observations, *, debug: bool) -> None:
        self.config = config
        self.driver = driver
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()
        # The pool's own tasks and callbacks see no context variables of whoever happened to cause them.
        self.context = contextvars.Context()
        self._pid = os.getpid()
        self.machine = self._make_machine()
        self.watch: DisconnectWatch[Session] = DisconnectWatch(self.loop, self._on_disconnect)
        self.observations = observations
        observations.on_change = weakref.WeakMethod(self.find_plain)
        self.leases = self._leases_class(config, self.machine, self.watch, self.perform, observations, debug=debug)
        self.log = self.leases.log
        self.waits = Durations()
        self.connects = Durations()
        self.cancelled = 0  # callers who left the queue by themselves
        self.opening: asyncio.Future[None] = self.loop.create_future()
        self.closing: asyncio.Future[None] = self.loop.create_future()
        self.last_connect_error: Exception | None = None
        self.last_connect_error_at = 0.0
        self._single_round = False
        self.opening_is_awaited = False  # so that somebody gets the error raised that ends it
        _all_runners.add(self)
        self._tasks: dict[Slot, asyncio.Task[None]] = {}
        self._scopes: dict[Slot, anyio.CancelScope] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._monitor: Monitor | None = None
        self.multiplexer = Multiplexer(self, config.lanes)
        # `setup` is for each acquire, and a lane is none that anybody has asked for.
        self.shares_lanes = config.lanes > 0 and config.setup is None
        self._debug = debug
        self.find_plain()
        self._perform: dict[type, Callable[[Any], None]] = {
            Connect: lambda effect: self._start(effect.slot, "connect", self._connect(effect.slot)),
            Check: lambda effect: self._start(effect.slot, "check", self._check(effect.slot)),
            Recycle: lambda effect: self._start(effect.slot, "recycle", self._recycle(effect.slot)),
            Close: self._on_close,
            Refuse: self._on_refuse,
            GroupWaiter: self.multiplexer.granted,
            WakeAt: self._on_wake_at,
            Opened: lambda effect: _resolve(self.opening),
            OpeningFailed: self._on_opening_failed,
            Closed: self._on_closed,
        }

    def find_plain(self) -> None:
        """Find out anew whether a lease is ready when its connection is there."""
        self.is_plain = not self._debug and self.config.setup is None and not self.observations

    def _make_machine(self) -> PoolMachine:
        return PoolMachine(self.config, random.random, is_bound_to_its_owner)

    def check_loop(self) -> None:
        """Raise unless the running event loop is the pool's. Where it counts, this is asked only if `thread` is
        another one or `loop` does not run: a thread runs one loop at a time, and asking for it is slow on 3.11.
        """
        if self.loop.is_closed():
            raise PoolClosed(f"{self.config.name}: the event loop that it was opened in is closed; open it again")
        if asyncio._get_running_loop() is not self.loop:
            raise WrongLoop(f"{self.config.name} was opened in another event loop than the one that uses it now")
        self.thread = get_ident()  # the loop has moved to another thread

    def perform(self, effects: Effects) -> None:
        """Carry out what the machine wants."""
        for effect in effects:
            if type(effect) is FutureWaiter:  # past the table: it is the one that comes often
                if not effect.future.done():  # else it was cancelled, and will withdraw when it runs
                    effect.future.set_result(None)
            else:
                self._perform[type(effect)](effect)

    # --- opening and closing --------------------------------------------------------------------------------

    @property
    def phase(self) -> PoolPhase:
        """The pool's phase; CLOSED when the loop is gone, whatever was left in it."""
        return PoolPhase.CLOSED if self.loop.is_closed() else self.machine.phase

    def open(self, *, single_round: bool, listener: Listener | None = None) -> None:
        """Start connecting. `single_round`: the first error ends it. Who connects to `listener` is told how it goes."""
        self._single_round = single_round
        if listener is not None:
            self._monitor = Monitor(listener, self.loop, self.context, Snapshots(self).take)
        self.perform(self.machine.open(monotonic(), single_round=single_round))
        if self.config.long_held_after is not None:
            self.leases.watch_long_held()

    def close(self) -> None:
        """Start closing; `closing` is done when the last session is gone."""
        _resolve(self.opening)  # for whoever waits for it, and looks at the phase
        self.perform(self.machine.close(monotonic()))
        self.multiplexer.close()

    def sever(self) -> None:
        """End the leases that keep the pool from closing."""
        for slot in self.machine.leases():
            assert isinstance(slot.resource, Session)
            if slot.resource.lease == slot.uses:  # else it was granted to a task that has not run since
                self.leases.note_end(slot.resource, monotonic())
            slot.resource.lease = SEVERED
            slot.resource.touched = True
            slot.resource.sever()
        self.perform(self.machine.sever(monotonic()))

    def let_go(self) -> None:
        """The pool was dropped unclosed. The garbage collector calls this, in any thread, in the midst of anything."""
        if os.getpid() != self._pid:
            return  # a forked child: the sessions are the parent's
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it is just closing
                self.loop.call_soon_threadsafe(self.close)
                return
        self.abandon()

    def abandon(self) -> None:
        """Let go of everything without waiting, when there is no loop to wait in."""
        if os.getpid() != self._pid:
            return
        self._stop_timers()
        for task in self._tasks.values():
            work = task.get_coro()
            if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
                work.close()
        for slot in self.machine.slots():
            if isinstance(slot.resource, Session):
                slot.resource.lease = SEVERED
                slot.resource.abandon()
        self.driver.abandon()
        self.watch.close()
        self._close_monitor()

    def _close_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.close()

    def _stop_timers(self) -> None:
        self.leases.stop()
        self.multiplexer.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_closed(self, _: Closed) -> None:
        self._stop_timers()
        self.watch.close()
        self._close_monitor()
        self.log.close()
        _resolve(self.closing)

    def _on_opening_failed(self, _: OpeningFailed) -> None:
        if not self.opening.done():
            assert self.last_connect_error is not None
            self.opening.set_exception(self.last_connect_error)
            self.opening.exception()  # it is told to whoever waits; with open(wait=False) nobody does

    async def wait_for_checks(self) -> None:
        """Wait until no slot is being checked that is now."""
        tasks = [task for slot, task in self._tasks.items() if slot.state is SlotState.CHECKING]
        if tasks:
            await asyncio.wait(tasks)

    # --- effects --------------------------------------------------------------------------------------------

    def _on_refuse(self, refuse: Refuse) -> None:
        waiter = refuse.waiter
        if isinstance(waiter, GroupWaiter):
            self.multiplexer.refused(waiter, refuse.refusal)
            return
        assert isinstance(waiter, FutureWaiter)
        if not waiter.future.done():
            # Not the effect itself, which refers to the waiter: that cycle would keep its task.
            waiter.future.set_result((refuse.refusal, refuse.position))

    def refusal(self, refusal: Refusal, position: int = 0, *, began: float, owner: object = None) -> PoolError:
        """The error for a caller, that task or thread, who began to wait then, and stood there in the queue."""
        error = refused(self, refusal, began, owner, position)
        if isinstance(error, PoolTimeout):
            self.observations.note(TimedOut, error.waited)
        return error

    @property
    def waiting(self) -> int:
        """How many callers wait, for a connection or for their statement to be sent."""
        return self.machine.waiting + self.multiplexer.waiting - self.multiplexer.requested

    def describe(self) -> str:
        """The sizes, and the last connect error if the pool has not connected since, in words."""
        return describe_sizes(self) + describe_connect_error(self)

    def _on_wake_at(self, wake: WakeAt) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(max(0.0, wake.when - monotonic()), self._on_timer, context=self.context)

    def _on_timer(self) -> None:
        self._timer = None
        self.perform(self.machine.wake(monotonic()))

    def _on_disconnect(self, session: Session) -> None:
        session.reader.renew()
        if session.slot is not None:
            self.perform(self.machine.disconnected(session.slot, monotonic()))

    def _on_close(self, close: Close) -> None:
        slot = close.slot
        logger.debug("%s: closing connection %d: %s", self.config.name, slot.number, close.reason.value)
        self.observations.note(ConnectionClosed, close.reason)
        running = self._tasks.get(slot)
        if scope := self._scopes.get(slot):
            scope.cancel()
            if isinstance(slot.resource, Session):
                slot.resource.sever()  # so that no callable's statement is given `cancel_timeout` to end in good order
        elif running is not None:
            running.cancel()  # it has not begun
        self._start(slot, "close", self._close(slot, running))

    # --- tasks, one for each slot at a time -----------------------------------------------------------------

    def _start(self, slot: Slot, what: str, work: Coroutine[Any, Any, None]) -> None:
        name = f"asyncpool {self.config.name}: {what} {slot.number}"
        task = self.loop.create_task(work, name=name, context=self.context)
        self._tasks[slot] = task
        task.add_done_callback(partial(self._on_task_done, slot))

    def _on_task_done(self, slot: Slot, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            logger.error("%s: a bug in asyncpool: %s failed", self.config.name, task.get_name(), exc_info=error)
        if self._tasks.get(slot) is not task:
            return  # a Close has taken its place
        del self._tasks[slot]
        if task.cancelled() or error is not None:
            self._report_stray_end(slot, "was cancelled" if error is None else f"has ended by {type(error).__name__}")

    def _report_stray_end(self, slot: Slot, what: str) -> None:
        """Somebody cancelled the pool's task, perhaps before it began: its outcome is failure."""
        now = monotonic()
        if slot.state is SlotState.CONNECTING:
            error = OperationalError(f"the pool's task that connects {what}")
            self._note_connect_error(ConnectFailed(error, ConnectFailure.TRANSIENT), is_news=False)
            self.perform(self.machine.connect_failed(slot, ConnectFailure.TRANSIENT, now))
        elif slot.state is SlotState.CHECKING:
            self.perform(self.machine.check_failed(slot, CloseReason.CHECK_FAILED, now))
        elif slot.state is SlotState.RECYCLING:
            self.perform(self.machine.recycle_failed(slot, CloseReason.RESET_FAILED, now))
        elif slot.state is SlotState.CLOSING:
            if isinstance(slot.resource, Session):
                slot.resource.abandon()
            self.driver.abandoned += 1
            slot.resource = None
            self.perform(self.machine.closed(slot, now))

    async def _connect(self, slot: Slot) -> None:
        with anyio.CancelScope() as scope:
            self._scopes[slot] = scope
            began = monotonic()
            self.observations.note(Connecting)
            try:
                session = await self.driver.connect()
            except ConnectFailed as failed:
                self._note_connect_error(failed)
                self.observations.note(ConnectError, monotonic() - began, failed.error)
                self.perform(self.machine.connect_failed(slot, failed.failure, monotonic(), failed.reason))
            else:
                took = monotonic() - began
                self.connects.record(took)
                self.observations.note(Connected, took)
                self._admit(slot, session)
            finally:
                self._scopes.pop(slot, None)

    def _admit(self, slot: Slot, session: Session) -> None:
        if slot.state is SlotState.GONE:
            session.abandon()  # it came after its Close had stopped waiting for it
            return
        slot.resource = session
        session.slot = slot
        session.connection._pool = self.leases
        self.leases.adopt(session, session.connection)
        session.touched = False
        session.reader.on_lost = partial(self.watch.unregister, session.reader.fd, session)
        self.watch.register(session.reader.fd, session)
        self.perform(self.machine.connected(slot, monotonic()))
        if self.last_connect_error is not None:
            self.log.write(logging.INFO, "again", "connected again")
            self.last_connect_error = None

    def _note_connect_error(self, failed: ConnectFailed, *, is_news: bool = True) -> None:
        error = failed.error
        ends_opening = self._single_round or failed.failure is ConnectFailure.FINAL
        told = self.opening_is_awaited and ends_opening and self.phase is PoolPhase.OPENING
        if is_news and not told:  # else open() raises it, or somebody has cancelled the pool's own task
            self.log.write(logging.WARNING, "connecting", "connecting failed: %s", words_of(error))
        else:
            logger.debug("%s: connecting failed: %s", self.config.name, words_of(error))
        error.__traceback__ = None
        self.last_connect_error = error
        self.last_connect_error_at = monotonic()

    async def _check(self, slot: Slot) -> None:
        await self._supervise(slot, self.driver.check, self.machine.check_passed, self.machine.check_failed)

    async def _recycle(self, slot: Slot) -> None:
        await self._supervise(slot, self.driver.recycle, self.machine.recycled, self.machine.recycle_failed)

    async def _supervise(
        self,
        slot: Slot,
        work: Callable[[Session], Coroutine[Any, Any, None]],
        passed: Callable[[Slot, float], Effects],
        failed: Callable[[Slot, CloseReason, float], Effects],
    ) -> None:
        """Do something with an unleased session, and tell the machine how it went."""
        session = slot.resource
        assert isinstance(session, Session)
        with anyio.CancelScope() as scope:
            self._scopes[slot] = scope
            try:
                await work(session)
            except Unusable as unusable:
                if slot.state is not SlotState.CLOSING:  # else it was severed to be closed
                    self._note_unusable(unusable)
                self.perform(failed(slot, unusable.reason, monotonic()))
            else:
                session.touched = False
                self.perform(passed(slot, monotonic()))
            finally:
                self._scopes.pop(slot, None)

    def _note_unusable(self, unusable: Unusable) -> None:
        # A callable that fails each time costs a connection each time: that is news.
        is_users = (unusable.reason is CloseReason.CHECK_FAILED and self.config.check is not None) or (
            unusable.reason is CloseReason.RESET_FAILED and callable(self.config.reset)
        )
        level = logging.WARNING if is_users else logging.INFO
        self.log.write(level, f"unusable {level}", "a connection is unusable: %s", unusable)

    async def _close(self, slot: Slot, running: asyncio.Task[None] | None) -> None:
        """End a session; its place is free when the server has confirmed the end, or `check_timeout` is over."""
        if running is not None:
            # It was told to stop; a callable that does not let itself be cancelled is left behind.
            await asyncio.wait((running,), timeout=2 * self.config.check_timeout)
        if isinstance(slot.resource, Session):
            ended = await slot.resource.close(self.config.check_timeout)
            self.driver.abandoned += not ended  # not across the await, in which others count
            slot.resource = None
        self.perform(self.machine.closed(slot, monotonic()))


def is_bound_to_its_owner(slot: Slot) -> bool:
    """Whether the block whose lease this is can be ended by nobody else. That of a generator can: the event loop
    closes one that was left half-way, and a web framework steps its dependencies in one thread and another.
    """
    session = slot.resource
    return isinstance(session, Session) and not is_generator(session.site_code)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
