"""The sweep over pool sizes: up until the rate is flat, and then again and again, so that no size has all the luck."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import psycopg

from asyncpool import Pool
from asyncpool.cli.tune.knee import Ending, Reading, find_knee, is_flat, sizes_up_to
from asyncpool.cli.tune.load import GRACE, Pass, as_one_shot, measure, on_a_lease, reading_of
from asyncpool.cli.tune.statement import StatementFailed, explain
from asyncpool.errors import PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpool.cli.tune.load import Once, Worker
    from asyncpool.cli.tune.statement import Statement, Trial

# The measuring of a size is cut into so many passes, and the sizes take turns: whatever else the machine does for a
# while hits several of them. But a pass is to see a few statements on one connection.
MOST_PASSES = 4
STATEMENTS_IN_A_PASS = 5

# A new connection's first statements are planned, and fill the server's caches.
WARM_UP = 0.25
WARM_UP_STATEMENTS = 7

# How long the pool of a pass may take to connect, in seconds; and how long it does take, as far as can be told before.
CONNECT_PATIENCE = 10.0
USUAL_CONNECT = 0.25

DEFAULT_SECONDS = 2.0
# Without --seconds a slow statement is given more, up to this.
LONGEST_DEFAULT = 20.0
STATEMENTS_WANTED = 10

# So many times what all tasks' first answers take, if they come one by one, is planned for.
ROOM_FOR_ANSWERS = 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be measured. Times are in seconds: `seconds` for each size, `at_most` for everything,
    `statement_seconds` for the statement alone, as it was tried out.
    """

    sizes: tuple[int, ...]
    tasks: int
    seconds: float
    passes: int
    warm_up: float
    at_most: float
    one_shots: bool
    statement_seconds: float = 0.0

    @property
    def all_passes(self) -> int:
        """Of all sizes, and of the one-shots."""
        return self.passes * (len(self.sizes) + self.one_shots)

    def seconds_for_passes(self, done: int) -> float:
        """How long those take that follow when so many are done, without what is waited for first answers."""
        around = self.warm_up + USUAL_CONNECT + min(GRACE, 2 * self.statement_seconds)
        return (self.all_passes - done) * (self.seconds / self.passes + around)

    @property
    def enough_seconds(self) -> int:
        """What --max-seconds has to be for all sizes: with the trial before, a connection, and the ending."""
        return math.ceil(self.seconds_for_passes(0) + 2 * self.statement_seconds + 1)


def seconds_for(given: float | None, trial: Trial) -> float:
    """How long each size is measured. Raises StatementFailed where that would show next to nothing."""
    longest = LONGEST_DEFAULT if given is None else given
    if trial.seconds * STATEMENTS_IN_A_PASS > longest:
        raise StatementFailed(
            f"the statement takes {trial.seconds:.2g} s, and {longest:g} s for each size are too few to tell a rate"
            f" from: give --seconds {trial.seconds * STATEMENTS_WANTED:.0f}, or a quicker statement"
        )
    return max(DEFAULT_SECONDS, trial.seconds * STATEMENTS_WANTED) if given is None else given


def check_there_is_time(seconds: float, of: float, planned: Plan) -> None:
    """Raises StatementFailed if a slow statement cannot be measured in the `seconds` that are left `of` all."""
    takes = planned.statement_seconds
    if takes * STATEMENTS_IN_A_PASS > seconds:
        raise StatementFailed(
            f"the statement takes {takes:.2g} s, and --max-seconds {of:g} are too few to measure that: give"
            f" --max-seconds {planned.enough_seconds} for all sizes, or a quicker statement"
        )


def plan(*, largest: int, tasks: int, seconds: float, most_seconds: float, trial: Trial, one_shots: bool) -> Plan:
    """Cut the time into passes, and tell how long it takes at most."""
    sizes = tuple(sizes_up_to(largest))
    passes = MOST_PASSES
    if trial.seconds:
        passes = max(1, min(MOST_PASSES, int(seconds / (trial.seconds * STATEMENTS_IN_A_PASS))))
    warm_up = min(max(WARM_UP, trial.seconds * WARM_UP_STATEMENTS), seconds / passes)
    planned = Plan(sizes, tasks, seconds, passes, warm_up, most_seconds, one_shots, trial.seconds)
    # For the tasks' first answers, even if no size is quicker than one connection.
    first_answers = ROOM_FOR_ANSWERS * tasks * trial.seconds * (len(sizes) + one_shots)
    return replace(planned, at_most=min(most_seconds, planned.seconds_for_passes(0) + first_answers))


class Progress(Protocol):
    """Where a sweep says how far it is."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def begin_pass(self, title: str, done: float) -> None:
        """A pass begins, and that share of the time that it all takes at most is over."""

    def reading(self, title: str, reading: Reading) -> None:
        """The first figures of a size."""


class Sweep:
    """Measures until the knee is seen. What it has measured so far is there at any time, also when it is cancelled."""

    def __init__(self, conninfo: str, statement: Statement, plan: Plan, progress: Progress) -> None:
        self._conninfo = conninfo
        self._statement = statement
        self._plan = plan
        self._progress = progress
        self._passes: dict[int, list[Pass]] = {}
        self._one_shot_passes: list[Pass] = []
        self._ends_at = float("inf")
        self.executed = 0
        self.ending = Ending.INTERRUPTED

    @property
    def readings(self) -> list[Reading]:
        """By rising size."""
        return [reading_of(size, passes, waiting_is_known=True) for size, passes in sorted(self._passes.items())]

    @property
    def one_shots(self) -> Reading | None:
        """The one-shot statements; its size is how many connections they took."""
        if not self._one_shot_passes:
            return None
        connections = max(one.connections for one in self._one_shot_passes)
        return reading_of(connections, self._one_shot_passes, waiting_is_known=False)

    async def run(self) -> None:
        """Measure. Raises StatementFailed, and psycopg.OperationalError if the server does not let enough of us in."""
        self._ends_at = asyncio.get_running_loop().time() + self._plan.at_most
        limit = asyncio.timeout_at(self._ends_at)
        try:
            async with limit:
                self.ending = await self._measure_sizes()
                if self._plan.one_shots:
                    await self._measure_one_shots(find_knee(self.readings).size)
        except TimeoutError:
            if not limit.expired():
                raise  # a PoolTimeout is one
            # If only the one-shots are missing, the question is answered.
            if self.ending is Ending.INTERRUPTED:
                self.ending = Ending.TIME_IS_UP

    async def _measure_sizes(self) -> Ending:
        remaining = list(self._plan.sizes)
        while True:
            while remaining and not is_flat(self.readings):
                await self._measure_size(remaining.pop(0))
            # Every size as often as planned, in turns that go down and up again.
            for number in range(1, self._plan.passes):
                for size in sorted(self._passes, reverse=bool(number % 2)):
                    if len(self._passes[size]) <= number:
                        await self._measure_size(size)
            # With more passes a size may look better than at first, and the end be further up.
            if is_flat(self.readings):
                return Ending.FLAT
            if not remaining:
                return Ending.LARGEST_SIZE

    async def _measure_size(self, size: int) -> None:
        passes = self._passes.get(size, [])
        title = f"size {size}"
        self._progress.begin_pass(title, self._share_done())
        measured = await self._measure_pool(size, passes, one_shots=False)
        self._passes[size] = [*passes, measured]
        if not passes:
            self._progress.reading(title, reading_of(size, [measured], waiting_is_known=True))

    async def _measure_one_shots(self, size: int) -> None:
        """In a pool of the size that the knee is at: would they do better there?"""
        for number in range(self._plan.passes):
            self._progress.begin_pass("one-shots", self._share_done())
            measured = await self._measure_pool(size, self._one_shot_passes, one_shots=True)
            self._one_shot_passes.append(measured)
            if number == 0 and (reading := self.one_shots):
                self._progress.reading("one-shots", reading)

    async def _measure_pool(self, size: int, before: Sequence[Pass], *, one_shots: bool) -> Pass:
        plan = self._plan
        pool = self._pool("one-shots", 1, size) if one_shots else self._pool(f"size {size}", size, size)
        try:
            await pool.open(timeout=CONNECT_PATIENCE)
        except PoolTimeout as timeout:
            raise timeout.__cause__ or timeout from None
        try:
            once = self._counted((as_one_shot if one_shots else on_a_lease)(pool, self._statement))
            patience = self._patience(size, before)
            measured = await measure(once, plan.tasks, plan.warm_up, plan.seconds / plan.passes, patience=patience)
            measured.connections = pool.stats().size
        except psycopg.Error as error:
            raise StatementFailed(f"under load, {explain(error, self._statement)}") from error
        finally:
            await pool.close()
        return measured

    def _pool(self, title: str, min_size: int, max_size: int) -> Pool:
        return Pool(
            self._conninfo,
            name=f"tune, {title}",
            min_size=min_size,
            max_size=max_size,
            # Whoever waits does so until the pass is over.
            acquire_timeout=None,
            prepare_threshold=5 if self._statement.prepare else None,
            fallback_application_name="asyncpool tune",
        )

    def _counted(self, once: Once) -> Once:
        """Also in the warm-up, and in a pass that is cut short."""

        async def counted(worker: Worker) -> None:
            await once(worker)
            self.executed += 1

        return counted

    def _patience(self, size: int, before: Sequence[Pass]) -> float:
        """How long first answers may be waited for after the warm-up: while there is time for it in a size's first
        pass, for as long as a pass takes in the others; not at all if it would be in vain.
        """
        plan = self._plan
        # Half of it, so that the first size does not take all.
        spare = (self._ends_at - asyncio.get_running_loop().time() - plan.seconds_for_passes(self._done())) / 2
        longest = min(spare, plan.seconds / plan.passes) if before else spare
        round_takes = plan.tasks * plan.statement_seconds / size
        return longest if plan.warm_up + longest > round_takes else 0.0

    def _done(self) -> int:
        return sum(map(len, self._passes.values())) + len(self._one_shot_passes)

    def _share_done(self) -> float:
        return self._done() / self._plan.all_passes
