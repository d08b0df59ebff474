"""Every step of a connection's life goes well, fails, is slow or never ends, and its user is cancelled at any of them.

The product of all that, in virtual time, against a server whose answers are scripted; the pool is the real one, with
its driver and libpq. After each case nothing is lost, and everybody got what was due to him, in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import random
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import psycopg
import pytest
from kit.scripted_server import ERROR, LOST, NEVER, OK, SLOW, Gate, Outcome, ScriptedServer, Visit
from kit.virtual_time import VirtualLoop, run_virtually

from asyncpool import Pool, PoolError, PoolTimeout
from asyncpool._core.states import SlotState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

CONNECT_TIMEOUT = 1.0
CHECK_TIMEOUT = 0.5
CANCEL_TIMEOUT = 0.25
QUERY_TIMEOUT = 0.75  # the user's own
PATIENT, HASTY = 30.0, 0.2
# What virtual time allows for turns of the loop, which take a microsecond each.
PROMPTLY = 0.01

OUTCOMES = (OK, ERROR, SLOW, NEVER)
WAYS = ("task.cancel", "cancel scope")
CANCELS: tuple[tuple[Gate, str] | None, ...] = (None, *itertools.product(Gate, WAYS))


class Case(NamedTuple):
    """What becomes of the first visit to each gate; all later ones go well."""

    outcomes: tuple[Outcome, ...]  # in the order of Gate
    cancel: tuple[Gate, str] | None  # at the first visit to this gate, and how
    acquire_timeout: float
    max_size: int

    def __str__(self) -> str:
        steps = [f"{gate} {outcome.value}" for gate, outcome in zip(Gate, self.outcomes, strict=True)]
        cancel = "nobody cancelled" if self.cancel is None else f"{self.cancel[1]} at {self.cancel[0]}"
        return f"{', '.join(steps)}; {cancel}; acquire_timeout {self.acquire_timeout}, max_size {self.max_size}"


DIMENSIONS: tuple[Sequence[Any], ...] = (*itertools.repeat(OUTCOMES, len(Gate)), CANCELS, (PATIENT, HASTY), (1, 2))
ALL_CASES = prod(len(dimension) for dimension in DIMENSIONS)
# 4.5 million cases would take six hours: every STRIDE-th is run, a prime that shares no factor with any dimension, so
# that each pair and each triple of values comes up. GATES_STRIDE=1 runs them all.
STRIDE = int(os.environ.get("GATES_STRIDE", "3911"))
CHUNKS = 6


def case_number(number: int) -> Case:
    """The case at this place of the product."""
    values = []
    for dimension in DIMENSIONS:
        number, index = divmod(number, len(dimension))
        values.append(dimension[index])
    return Case(tuple(values[: len(Gate)]), *values[len(Gate) :])


def cases_of_one_fault() -> Iterator[Case]:
    """All cases in which at most one step does not go well; here the server may also drop the connection."""
    all_well = [OK] * len(Gate)
    for cancel, max_size in itertools.product(CANCELS, (1, 2)):
        yield Case(tuple(all_well), cancel, PATIENT, max_size)
        for index, outcome in itertools.product(range(len(Gate)), (ERROR, SLOW, NEVER, LOST)):
            outcomes = all_well.copy()
            outcomes[index] = outcome
            yield Case(tuple(outcomes), cancel, PATIENT, max_size)


# --- one case -----------------------------------------------------------------------------------------------


class Undo(Exception):
    """Has a block rolled back."""


@dataclass
class User:
    """Somebody who acquires, runs a statement, and commits or not."""

    name: str
    pool: Pool[Any]
    acquire_timeout: float
    undoes: bool = False
    began: float = float("inf")
    got_it: float | None = None
    ended: float = 0.0
    cancelled_at: float | None = None
    way: str = ""
    outcome: object = None  # what it ended with: None, or an exception
    task: asyncio.Task[None] = field(init=False)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    def start(self) -> None:
        self.task = asyncio.create_task(self._run(), name=f"user {self.name}")

    def cancel(self, way: str) -> None:
        self.cancelled_at = self._now()
        self.way = way
        if way == "task.cancel":
            self.task.cancel()
        else:
            self.scope.cancel()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _run(self) -> None:
        self.began = self._now()
        try:
            with self.scope:
                await self._use()
            if self.scope.cancelled_caught:
                self.outcome = asyncio.CancelledError()
        except BaseException as ex:
            self.outcome = ex
            if isinstance(ex, asyncio.CancelledError):
                raise
        finally:
            self.ended = self._now()

    async def _use(self) -> None:
        with contextlib.suppress(Undo):
            async with self.pool.acquire(self.acquire_timeout) as conn:
                self.got_it = self._now()
                async with asyncio.timeout(QUERY_TIMEOUT):
                    await conn.execute(f"query {self.name}".encode())
                if self.undoes:
                    raise Undo


async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
    await conn.set_autocommit(True)
    await conn.execute("configure")
    await conn.set_autocommit(False)


def make_pool(server: ScriptedServer, max_size: int) -> Pool[Any]:
    """One that goes through every gate as soon as it can."""
    return Pool(
        server.dsn,
        min_size=0,
        max_size=max_size,
        check_interval=0,
        reset="session",
        configure=configure,
        connect_timeout=CONNECT_TIMEOUT,
        check_timeout=CHECK_TIMEOUT,
        cancel_timeout=CANCEL_TIMEOUT,
        backoff_initial=0.05,
        backoff_max=0.5,
    )


@dataclass
class Play:
    """A case, played: A rolls back, B stands behind it, C comes when the connection is idle, D while it is closed."""

    case: Case
    server: ScriptedServer
    users: list[User] = field(default_factory=list)
    visited: set[Gate] = field(default_factory=set)

    def script(self, gate: Gate, sql: str) -> Outcome:
        if gate in self.visited:
            return OK
        self.visited.add(gate)
        return self.case.outcomes[list(Gate).index(gate)]

    def on_visit(self, visit: Visit) -> None:
        if self.case.cancel is None or visit.gate is not self.case.cancel[0]:
            return
        if [v.gate for v in self.server.visits].count(visit.gate) > 1:
            return
        for user in self.users:
            if not user.task.done():
                user.cancel(self.case.cancel[1])
                return

    def add(self, name: str, pool: Pool[Any], *, undoes: bool = False) -> User:
        user = User(name, pool, self.case.acquire_timeout, undoes)
        self.users.append(user)
        user.start()
        return user

    async def run(self) -> None:
        server, case = self.server, self.case
        server.begin_anew(self.script, self.on_visit)
        random.seed(0)
        pool = make_pool(server, case.max_size)
        async with pool:
            self.add("A", pool, undoes=True)
            self.add("B", pool)
            await self.all_ended()
            await asyncio.sleep(0.001)
            self.add("C", pool)
            await self.all_ended()
            pool.drain()
            self.add("D", pool)
            await self.all_ended()
            for user in self.users:
                self.judge(user)
            self.visited.update(Gate)
            await assert_nothing_is_lost(pool, server)
            began = server.loop.time()
        assert server.loop.time() - began <= 2 * CHECK_TIMEOUT + PROMPTLY, "close() took too long"
        assert pool_tasks() == []
        assert len(server.transports) <= pool.stats().abandoned, "a session is left on the server"

    async def all_ended(self) -> None:
        await asyncio.wait([user.task for user in self.users])
        for user in self.users:
            if user.task.cancelled():
                user.outcome = asyncio.CancelledError()  # perhaps before it began
                user.ended = max(user.ended, user.cancelled_at or 0.0)

    # --- what everybody is due ------------------------------------------------------------------------------

    def judge(self, user: User) -> None:
        outcome = user.outcome
        words = f"{user.name}: {outcome!r}"
        if user.cancelled_at is not None and user.way == "task.cancel":
            assert type(outcome) is asyncio.CancelledError, words
        if isinstance(outcome, asyncio.CancelledError):
            assert user.cancelled_at is not None, words
            late = user.ended - user.cancelled_at
            assert late <= CANCEL_TIMEOUT + PROMPTLY, f"{words}: {late:g} s after its cancellation"
            return
        waited = (user.ended if user.got_it is None else user.got_it) - user.began
        assert waited <= user.acquire_timeout + PROMPTLY, f"{words}: waited {waited:g} s"
        if user.got_it is None:
            self.judge_refusal(user, waited)
        else:
            self.judge_statement(user, user.ended - user.got_it)

    def judge_refusal(self, user: User, waited: float) -> None:
        outcome = user.outcome
        words = f"{user.name}: {outcome!r}"
        if isinstance(outcome, PoolTimeout):
            assert user.acquire_timeout == HASTY, words
            assert waited >= HASTY, f"{words}: after {waited:g} s"
            assert (outcome.__cause__ is not None) == ("last connect error" in str(outcome)), words
        else:
            # What `configure` raises is final, but for a connection that is lost or was not heard any more.
            assert type(outcome) is PoolError, words
            assert self.configure_ends_alive(), words
            assert outcome.__cause__ is not None
            assert "configure" in str(outcome), words

    def configure_ends_alive(self) -> bool:
        """Whether the connection lived when `configure` failed: a statement of it that does not end is cancelled."""
        visits = iter(self.server.visits)
        configured = next(visit for visit in visits if visit.gate is Gate.CONFIGURE)
        cancels = (visit.outcome for visit in visits if visit.gate is Gate.CANCEL and visit.sql == "configure")
        cancelled = next(cancels, None)
        return configured.outcome is ERROR or (configured.outcome is NEVER and cancelled in (OK, SLOW))

    def judge_statement(self, user: User, lasted: float) -> None:
        outcome = user.outcome
        words = f"{user.name}: {outcome!r}"
        [visit] = [v for v in self.server.visits if v.gate is Gate.QUERY and v.sql == f"query {user.name}"]
        if visit.outcome is ERROR:
            assert isinstance(outcome, psycopg.errors.InternalError_), words
        elif visit.outcome is NEVER:
            assert type(outcome) is TimeoutError, words
            assert QUERY_TIMEOUT <= lasted <= QUERY_TIMEOUT + CANCEL_TIMEOUT + PROMPTLY, f"{words}: {lasted:g} s"
        elif visit.outcome is LOST:
            assert isinstance(outcome, psycopg.OperationalError), words
        else:
            assert outcome is None, words


def pool_tasks() -> list[str]:
    """The pool's own tasks that are not done."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("asyncpool")]


async def assert_nothing_is_lost(pool: Pool[Any], server: ScriptedServer) -> None:
    """What is under way ends in its time; then every place is idle or free, and can be had."""
    for _ in range(100):
        if not pool_tasks():
            break
        await asyncio.sleep((CONNECT_TIMEOUT + 4 * CHECK_TIMEOUT) / 100)
    assert pool_tasks() == [], "something takes longer than its deadline"
    await asyncio.sleep(0)  # for their callbacks
    stats = pool.stats()
    assert (stats.leased, stats.waiting, stats.idle) == (0, 0, stats.size), stats
    assert len(server.transports) <= stats.size + stats.abandoned, stats
    runner = pool._runner
    assert runner is not None
    assert not runner._tasks
    assert not runner._scopes
    assert all(slot.state is SlotState.IDLE for slot in runner.machine.slots())
    began = server.loop.time()
    connections = [await pool.acquire(PATIENT) for _ in range(stats.max_size)]
    assert server.loop.time() - began <= 0.5 + PROMPTLY, "a place was not free"
    with pytest.raises(PoolTimeout):
        await pool.acquire(0)
    for connection in connections:
        await connection.execute("query of the last user")
        await connection.commit()
        await pool.release(connection)


# --- all cases ----------------------------------------------------------------------------------------------


class Errors(logging.Handler):
    """What the pool or the loop logs as an error is a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def no_errors_logged() -> Iterator[Errors]:
    errors = Errors()
    loggers = [logging.getLogger(name) for name in ("asyncpool", "asyncio")]
    level = loggers[0].level
    loggers[0].setLevel(logging.ERROR)
    for logger in loggers:
        logger.addHandler(errors)
    try:
        yield errors
        gc.collect()
        assert errors.messages == []
    finally:
        loggers[0].setLevel(level)
        for logger in loggers:
            logger.removeHandler(errors)


def open_descriptors() -> int:
    """How many this process has; 0 where that cannot be seen."""
    directory = Path("/proc/self/fd")
    return len(list(directory.iterdir())) if directory.exists() else 0


def play_all(cases: Iterable[Case]) -> None:
    """Play them one after the other, and tell of all that fail."""
    failures: list[str] = []

    async def main(_: VirtualLoop) -> None:
        async with ScriptedServer() as server:
            for case in cases:
                try:
                    async with asyncio.timeout(300):
                        await Play(case, server).run()
                    assert errors.messages == []
                except Exception as ex:  # noqa: BLE001  # told below
                    failures.append(f"{case}:\n    {type(ex).__name__}: {ex}")
                    errors.messages.clear()

    descriptors = open_descriptors()
    with no_errors_logged() as errors:
        run_virtually(main)
    assert open_descriptors() <= descriptors
    assert not failures, f"{len(failures)} failed, among them\n" + "\n".join(failures[:10])


# --- opening and closing ------------------------------------------------------------------------------------


async def cancelled_at_gate(
    server: ScriptedServer, gate: Gate, outcome: Outcome, way: str, work: Callable[[], Coroutine[Any, Any, None]]
) -> tuple[asyncio.Task[None], float]:
    """Run `work` until somebody visits the gate, and cancel it then. Returns its task, and how long it took to end."""
    loop = server.loop
    visited: asyncio.Future[float] = loop.create_future()
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await work()

    def on_visit(visit: Visit) -> None:
        if visit.gate is gate and not visited.done():
            visited.set_result(loop.time())
            task.cancel() if way == "task.cancel" else scope.cancel()

    seen: set[Gate] = set()

    def script(at: Gate, sql: str) -> Outcome:
        first = at is gate and at not in seen
        seen.add(at)
        return outcome if first else OK

    server.script, server.on_visit = script, on_visit
    task = asyncio.create_task(run())
    await asyncio.wait([task], timeout=30)
    return task, loop.time() - (visited.result() if visited.done() else loop.time())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outcome", [*OUTCOMES, LOST])
@pytest.mark.parametrize("gate", [Gate.CONNECT, Gate.CONFIGURE])
def test_a_cancelled_open_leaves_the_pool_closed_and_no_session(gate: Gate, outcome: Outcome, way: str) -> None:
    async def main(_: VirtualLoop) -> None:
        async with ScriptedServer() as server:
            pool = make_pool(server, 2)
            pool.resize(2, 2)
            task, took = await cancelled_at_gate(server, gate, outcome, way, pool.open)
            assert task.done()
            assert way != "task.cancel" or task.cancelled()
            # It waits for the end of what it has begun.
            assert took <= CHECK_TIMEOUT + CANCEL_TIMEOUT + PROMPTLY
            assert pool.stats().size == 0
            assert not server.transports
            assert pool_tasks() == []
            async with pool:
                await assert_nothing_is_lost(pool, server)

    with no_errors_logged():
        run_virtually(main)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outcome", [*OUTCOMES, LOST])
def test_a_cancelled_close_goes_on_by_itself(outcome: Outcome, way: str) -> None:
    async def main(_: VirtualLoop) -> None:
        async with ScriptedServer() as server:
            pool = make_pool(server, 2)
            pool.resize(2, 2)
            await pool.open()
            task, took = await cancelled_at_gate(server, Gate.CLOSE, outcome, way, pool.close)
            assert task.done()
            assert took <= PROMPTLY
            await asyncio.sleep(CHECK_TIMEOUT + PROMPTLY)
            assert pool.stats().size == 0
            assert pool.stats().abandoned == len(server.transports) == (outcome is NEVER)
            assert pool_tasks() == []
            async with pool:
                await assert_nothing_is_lost(pool, server)

    with no_errors_logged():
        run_virtually(main)


def test_a_server_that_falls_silent_in_configure_fails_nobody() -> None:
    """Its connection is severed, which says no more about the next one than a connection that is lost."""
    silent = {Gate.CONFIGURE: NEVER, Gate.CANCEL: NEVER}
    case = Case(tuple(silent.get(gate, OK) for gate in Gate), None, PATIENT, 1)
    plays: list[Play] = []

    async def main(_: VirtualLoop) -> None:
        async with ScriptedServer() as server:
            plays.append(Play(case, server))
            await plays[0].run()

    run_virtually(main)
    assert [user.outcome for user in plays[0].users] == [None, None, None, None]


# --- the product --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_one_step_goes_wrong(chunk: int) -> None:
    play_all(itertools.islice(cases_of_one_fault(), chunk, None, CHUNKS))


@pytest.mark.timeout(0 if STRIDE < 1000 else 60)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_any_steps_go_wrong(chunk: int) -> None:
    play_all(map(case_number, range(chunk * STRIDE, ALL_CASES, CHUNKS * STRIDE)))
