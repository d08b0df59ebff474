"""LaneMachine: which one-shot statement goes on which lane, which waits, and what becomes of those on a lost one.

A lane is a connection on which statements of many callers are under way at once, each with its own end. Time is an
argument; nothing here does I/O or looks at a clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator

from .policy import NEVER

# How long the statement in front of a lane may take, in seconds, before the lane gets nothing more and does not count:
# what is not sent goes elsewhere.
LANE_STALL = 0.02

# How much work is in flight on a lane at most, in seconds, by the averages of its statements: what fills the time in
# which answers come and others go, and no more, as those behind wait for it.
LANE_WORK = 0.003

# So many lanes are enough for statements of less than `WORTH_A_LANE`, in seconds: they are limited by this process and
# the server's processors. Longer ones wait for something, such as the disk at a commit, and may do so side by side.
QUICK_LANES = 2
WORTH_A_LANE = 0.0003

# From this average on, in seconds, a statement takes a lease of its own: it would hold up what is behind it for longer
# than a lease costs, which is some 0.1 ms.
SLOW = 0.005

# How often it is looked, in seconds, whether statements are still unanswered: by that slow ones are told from a slow
# event loop, which finds the answers of quick ones late.
LOOK_EVERY = 0.005

# What an answer may have taken, in seconds, that came before anybody has looked for it: less than SLOW.
UNSEEN = 0.002

# The weight of the newest time in the moving average: one that is out of the common is forgotten in some twenty others.
WEIGHT = 1 / 8

# What is in flight on a lane: more fills the round trip to a server that is 3 ms away no better, and is more to lose.
MAX_STATEMENTS = 128
MAX_BYTES = 1 << 20

# How often a statement declared with `retry` is sent, in all: one may be what kills the server.
MAX_SENDS = 3

# Of how many texts the times are kept.
MAX_PACES = 2000


class Pace:
    """How long the statements of one text take on the server: the moving average, in seconds; None until it is known.

    `needs` is the command's name if it cannot be run on a connection that is others' as well.
    """

    __slots__ = ("average", "needs")

    def __init__(self, needs: str | None = None) -> None:
        self.average: float | None = None
        self.needs = needs

    def note(self, seconds: float) -> None:
        """One more was answered."""
        average = self.average
        self.average = seconds if average is None else average + (seconds - average) * WEIGHT

    def suspect(self) -> None:
        """One takes so long that it stalls its lane."""
        self.average = max(LANE_STALL, self.average or 0.0)

    @property
    def is_slow(self) -> bool:
        """Whether it is to have a connection of its own."""
        return self.average is not None and self.average >= SLOW


class Paces:
    """The paces by text; the one that was used last stays longest."""

    def __init__(self) -> None:
        self._paces: OrderedDict[Hashable, Pace] = OrderedDict()

    def find(self, text: Hashable) -> Pace | None:
        """That of this text."""
        pace = self._paces.get(text)
        if pace is not None:
            self._paces.move_to_end(text)
        return pace

    def add(self, text: Hashable, pace: Pace) -> None:
        """Keep a new one."""
        self._paces[text] = pace
        if len(self._paces) > MAX_PACES:
            self._paces.popitem(last=False)


class Statement:
    """A one-shot statement on its way. `deadline` is when it must be sent, `owner` the task or thread that waits."""

    __slots__ = (
        "deadline",
        "expected",
        "is_enqueued",
        "is_sent",
        "is_wanted",
        "owner",
        "pace",
        "retry",
        "sends",
        "sent_at",
        "size",
    )

    def __init__(self, pace: Pace, *, retry: bool) -> None:
        self.pace = pace
        self.retry = retry
        self.deadline = NEVER
        self.owner: object = None
        self.is_wanted = True  # whether somebody waits for its result
        self.is_enqueued = False  # whether it is among the unsent
        self.is_sent = False
        self.sends = 0
        self.sent_at = 0.0
        self.size = 0  # bytes of its parameters
        self.expected = 0.0  # how long it was thought to take when it was sent


class Lane:
    """What is in flight on one connection, in the order in which it was sent. `is_watched`: `seen_pending` is told when
    answers have not come; without it the time of an answer is believed.
    """

    __slots__ = (
        "_expected",
        "_is_watched",
        "_pending_at",
        "_size",
        "in_flight",
        "is_leaving",
        "round_trip",
        "stalls_at",
    )

    def __init__(self, *, is_watched: bool = True) -> None:
        self._is_watched = is_watched
        self.in_flight: deque[Statement] = deque()
        self.is_leaving = False  # it gets nothing more, and its connection is to be given back
        self.round_trip = 0.0  # the least that was seen, in seconds; 0 until then
        self.stalls_at = NEVER  # when the statement in front will have taken too long
        self._pending_at = -NEVER  # when it was last seen unanswered
        self._size = 0
        self._expected = 0.0

    def accepts(self) -> bool:
        """Whether one more may be sent. Nothing is sent behind one whose time is not known: it could take for ever."""
        in_flight = self.in_flight
        if not in_flight:
            return not self.is_leaving
        return (
            self._pending_at < self.stalls_at
            and in_flight[-1].pace.average is not None
            and len(in_flight) < MAX_STATEMENTS
            and self._size < MAX_BYTES
            and self._expected < LANE_WORK + self.round_trip
            and not self.is_leaving
        )

    @property
    def is_stalled(self) -> bool:
        """Whether the statement in front takes too long."""
        return self._pending_at >= self.stalls_at

    def seen_pending(self, now: float) -> None:
        """The statement in front is not answered yet. One that stalls the lane counts as slow from now on: its like are
        not to stall others before it has ended, which it may never do.
        """
        if now >= self.stalls_at and not self.is_stalled:
            self.in_flight[0].pace.suspect()
        self._pending_at = now

    @property
    def is_forsaken(self) -> bool:
        """Whether nobody waits for what is in flight."""
        return bool(self.in_flight) and not any(statement.is_wanted for statement in self.in_flight)

    def sent(self, statement: Statement, now: float) -> None:
        """It is on its way, behind the others."""
        if not self.in_flight:
            self.stalls_at = now + self.round_trip + LANE_STALL
            self._size = 0
            self._expected = 0.0
        statement.sent_at = now
        statement.is_sent = True
        statement.sends += 1
        statement.expected = statement.pace.average or 0.0
        self._size += statement.size
        self._expected += statement.expected
        self.in_flight.append(statement)

    def answered(self, statements: list[Statement], began: float, now: float) -> None:
        """These, which have left `in_flight`, were answered together. The server worked on the first since `began`, the
        answer before, or since it came there.
        """
        began = max(began, statements[0].sent_at + self.round_trip)
        seconds = now - began
        if self._is_watched:
            seconds = min(seconds, max(0.0, self._pending_at - began) + UNSEEN)
        share = max(0.0, seconds) / len(statements)
        for statement in statements:
            statement.pace.note(share)
            self._size -= statement.size
            self._expected -= statement.expected
        round_trip = now - statements[-1].sent_at
        if round_trip < self.round_trip:
            self.round_trip = round_trip
        if self.in_flight:
            arrives = self.in_flight[0].sent_at + self.round_trip
            self.stalls_at = (max(now, arrives)) + LANE_STALL
        else:
            self.stalls_at = NEVER


class LaneMachine:
    """The lanes of a pool and the statements that were not sent yet, first come, first served."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lanes: list[Lane] = []
        self._unsent: deque[Statement] = deque()
        self._unwanted = 0  # of those, how many nobody waits for any more

    @property
    def waiting(self) -> int:
        """How many callers wait for their statement to be sent."""
        return len(self._unsent) - self._unwanted

    def lane_for(self) -> Lane | None:
        """A lane for a statement that has just come: nobody is to be overtaken."""
        if self.waiting == 0:
            for lane in self.lanes:
                if lane.accepts():
                    return lane
        return None

    def enqueue(self, statement: Statement) -> None:
        """Let it wait until a lane takes it."""
        statement.is_enqueued = True
        self._unsent.append(statement)

    def enqueue_again(self, statements: list[Statement]) -> None:
        """These are to be sent once more: before all others, in their order."""
        for statement in reversed(statements):
            statement.is_sent = False
            statement.is_enqueued = True
            self._unsent.appendleft(statement)

    def next_for(self, lane: Lane) -> Statement | None:
        """The statement that the lane is to send next, if there is one and it may."""
        while self._unsent and lane.accepts():
            statement = self._unsent.popleft()
            statement.is_enqueued = False
            if statement.is_wanted:
                return statement
            self._unwanted -= 1
        return None

    def wants_lane(self, requested: int) -> bool:
        """Whether a further lane is to be asked for, when so many wait for their connection."""
        self._drop_unwanted()
        if requested >= self.waiting:
            return False
        limit = min(QUICK_LANES, self.limit) if self._is_quick(self._unsent[0].pace) else self.limit
        counted = sum(not (lane.is_leaving or lane.is_stalled) for lane in self.lanes)
        return counted + requested < limit

    def _is_quick(self, pace: Pace) -> bool:
        """Whether further lanes would be of no use; also where it is just being found out how long they take."""
        if pace.average is None:
            return any(lane.in_flight and lane.in_flight[-1].pace is pace for lane in self.lanes)
        return pace.average < WORTH_A_LANE

    def withdraw(self, statement: Statement) -> None:
        """Its caller is gone. Unsent it is never sent; sent, its result is dropped when it comes."""
        statement.is_wanted = False
        if statement.is_enqueued:  # else it was sent, or refused when its caller had not heard of that yet
            self._unwanted += 1
            if self._unwanted > len(self._unsent) // 2 + 64:
                self._unsent = deque(statement for statement in self._unsent if statement.is_wanted)
                self._unwanted = 0

    def unsent(self) -> Iterator[Statement]:
        """Those that wait, in their order."""
        return (statement for statement in self._unsent if statement.is_wanted)

    def take_unsent(self) -> list[Statement]:
        """All that wait; they wait no longer."""
        statements = list(self.unsent())
        for statement in statements:
            statement.is_enqueued = False
        self._unsent.clear()
        self._unwanted = 0
        return statements

    def take_overdue(self, now: float) -> list[Statement]:
        """Those whose time to be sent is over."""
        overdue: list[Statement] = []
        kept: list[Statement] = []
        while self._unsent:
            statement = self._unsent[0]
            is_due = not statement.is_wanted or statement.deadline <= now
            if not is_due and not statement.sends:
                break  # all behind it came later
            self._unsent.popleft()
            if not is_due:
                kept.append(statement)
            elif statement.is_wanted:
                statement.is_enqueued = False
                overdue.append(statement)
            else:
                self._unwanted -= 1
        self._unsent.extendleft(reversed(kept))
        return overdue

    def next_deadline(self) -> float:
        """When the first of those that wait is overdue: as they all wait for as long, it is the first that came. Those
        that are sent again stand before it, and may have more time.
        """
        self._drop_unwanted()
        deadline = NEVER
        for statement in self.unsent():
            deadline = min(deadline, statement.deadline)
            if not statement.sends:
                break
        return deadline

    def _drop_unwanted(self) -> None:
        """Forget those at the front for which nobody waits."""
        while self._unsent and not self._unsent[0].is_wanted:
            self._unsent.popleft()
            self._unwanted -= 1
