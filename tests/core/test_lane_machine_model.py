"""LaneMachine under hypothesis: any sequence of statements, answers, losses and withdrawals, shrunk to the shortest
that breaks what must hold.

The model remembers by itself what became of each statement, and what is on each lane.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncpool._core.lanes import (
    LANE_STALL,
    LANE_WORK,
    MAX_BYTES,
    MAX_SENDS,
    MAX_STATEMENTS,
    QUICK_LANES,
    WORTH_A_LANE,
    Lane,
    LaneMachine,
    Pace,
    Statement,
)
from asyncpool._core.policy import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    T = TypeVar("T")

# How long a statement may wait to be sent.
PATIENCE = 2.0

# What rounding may make of a sum of some hundred times.
ROUNDING = 1e-9

picks = st.integers(0, 7)
sizes = st.sampled_from([0, 0, 1, MAX_BYTES // 3, MAX_BYTES])
spans = st.sampled_from([0.0, 0.0001, 0.001, 0.004, 0.015, 0.05, 0.5])


def pick_from(candidates: Sequence[T], pick: int) -> T:
    return candidates[pick % len(candidates)]


@dataclass(eq=False)
class Flight:
    """What the world remembers of a lane by itself."""

    lane: Lane
    statements: list[Statement] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)  # of each, when it was sent
    front_since: float = NEVER  # when the one in front came to the front, at the server
    answered_at: float = -NEVER
    seen_at: float = -NEVER
    is_leaving: bool = False

    def is_stalled(self) -> bool:
        return bool(self.statements) and self.seen_at >= self.front_since + LANE_STALL

    def takes_more(self) -> bool:
        if self.is_leaving or not self.statements:
            return not self.is_leaving
        expected = sum(self.expected)
        most = LANE_WORK + self.lane.round_trip
        if abs(expected - most) < ROUNDING:
            return self.lane.accepts()
        return (
            len(self.statements) < MAX_STATEMENTS
            and sum(one.size for one in self.statements) < MAX_BYTES
            and expected < most
            and self.statements[-1].pace.average is not None
            and not self.is_stalled()
        )


def with_flights(is_meant: Callable[[Flight], bool]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return precondition(lambda model: any(map(is_meant, model.flights)))


def is_busy(flight: Flight) -> bool:
    return bool(flight.statements)


def is_idle(flight: Flight) -> bool:
    return not flight.statements


class LaneMachineModel(RuleBasedStateMachine):
    machine: LaneMachine

    @initialize(lanes=st.integers(0, 4), more=st.integers(0, 2), round_trip=st.sampled_from([0.0, 0.002]))
    def begin(self, lanes: int, more: int, round_trip: float) -> None:
        self.machine = LaneMachine(lanes + more)
        self.round_trip = round_trip
        self.now = 1000.0
        self.paces = [Pace() for _ in range(6)]
        for pace, average in zip(self.paces[2:], (0.0, 0.0001, 0.0004, LANE_WORK), strict=True):
            pace.note(average)
        self.made = 0
        self.unsent: list[Statement] = []
        self.flights: list[Flight] = []
        self.ended: Counter[Statement] = Counter()  # answered, failed, refused, or withdrawn before they were sent
        self.requested = 0
        for _ in range(lanes):
            self.open_lane()

    def flight(self, pick: int, is_meant: Callable[[Flight], bool] = lambda flight: True) -> Flight:
        return pick_from([flight for flight in self.flights if is_meant(flight)], pick)

    # --- statements -----------------------------------------------------------------------------------------

    @rule(pace=picks, size=sizes, retry=st.sampled_from([True, True, False]), count=st.sampled_from([1, 1, 3, 150]))
    def submit(self, pace: int, size: int, retry: bool, count: int) -> None:
        for _ in range(count):
            one = Statement(pick_from(self.paces, pace), retry=retry)
            one.size = size
            one.deadline = self.now + PATIENCE
            self.made += 1
            lane = self.machine.lane_for()
            if lane is None:
                self.machine.enqueue(one)
                self.unsent.append(one)
            else:
                assert not self.unsent, "somebody was overtaken"
                [flight, *_] = [flight for flight in self.flights if flight.takes_more()]
                assert lane is flight.lane, "not the first lane that takes it"
                self.send(flight, one)

    def send(self, flight: Flight, one: Statement) -> None:
        if not flight.statements:
            flight.front_since = self.now + flight.lane.round_trip
        flight.lane.sent(one, self.now)
        flight.statements.append(one)
        flight.expected.append(one.pace.average or 0.0)

    @with_flights(lambda flight: True)
    @rule(pick=picks)
    def fill(self, pick: int) -> None:
        flight = self.flight(pick)
        while (one := self.machine.next_for(flight.lane)) is not None:
            assert flight.takes_more(), "more than the lane takes"
            assert one is self.unsent.pop(0), "not first come, first served"
            self.send(flight, one)
        assert not self.unsent or not flight.takes_more(), "waits, and could be sent"

    @with_flights(is_busy)
    @rule(pick=picks, span=spans, count=st.sampled_from([1, 1, 2, 50, 500]))
    def answer(self, pick: int, span: float, count: int) -> None:
        self.now += span
        flight = self.flight(pick, is_busy)
        answered = flight.statements[:count]
        for one in answered:
            assert one is flight.lane.in_flight.popleft(), "not in the order in which they were sent"
        flight.lane.answered(answered, flight.answered_at, self.now)
        del flight.statements[:count], flight.expected[:count]
        flight.answered_at = self.now
        if flight.statements:
            flight.front_since = max(self.now, flight.statements[0].sent_at + flight.lane.round_trip)
        self.ended.update(answered)

    @rule(span=spans)
    def look(self, span: float) -> None:
        self.now += span
        for flight in filter(is_busy, self.flights):
            was_stalled = flight.is_stalled()
            flight.lane.seen_pending(self.now)
            flight.seen_at = self.now
            if flight.is_stalled() and not was_stalled:
                assert flight.statements[0].pace.is_slow

    @precondition(lambda self: self.withdrawable())
    @rule(pick=st.integers(0, 200), count=st.sampled_from([1, 1, 2, 100]))
    def withdraw(self, pick: int, count: int) -> None:
        candidates = self.withdrawable()
        for one in candidates[pick % len(candidates) :][:count]:
            self.machine.withdraw(one)
            if one in self.unsent:
                self.unsent.remove(one)
                self.ended[one] += 1

    def withdrawable(self) -> list[Statement]:
        """Those whose callers may leave, some of which have ended and have not heard of that yet."""
        in_flight = [one for flight in self.flights for one in flight.statements]
        ended = list(self.ended)[-20:]
        return [*self.unsent, *(one for one in (*in_flight, *ended) if one.is_wanted)]

    @rule(span=spans)
    def refuse_overdue(self, span: float) -> None:
        self.now += span
        overdue = self.machine.take_overdue(self.now)
        assert overdue == [one for one in self.unsent if one.deadline <= self.now]
        self.unsent = [one for one in self.unsent if one not in overdue]
        self.ended.update(overdue)

    def refuse_all(self) -> None:
        refused = self.machine.take_unsent()
        assert refused == self.unsent
        self.unsent.clear()
        self.ended.update(refused)

    # --- lanes ----------------------------------------------------------------------------------------------

    @rule(deed=st.sampled_from(["ask", "ask", "grant", "grant", "refuse", "leave", "give back"]), pick=picks)
    def change_lanes(self, deed: str, pick: int) -> None:
        if deed == "ask" and self.machine.wants_lane(self.requested):
            self.requested += 1
        elif deed in ("grant", "refuse") and self.requested:
            self.requested -= 1
            if deed == "grant":
                self.open_lane()
            else:
                self.refuse_all()
        elif deed == "leave" and self.flights:
            flight = self.flight(pick)
            flight.lane.is_leaving = flight.is_leaving = True
        elif deed == "give back" and any(map(is_idle, self.flights)):
            self.remove(self.flight(pick, is_idle))

    def open_lane(self) -> None:
        flight = Flight(Lane())
        flight.lane.round_trip = self.round_trip
        self.machine.lanes.append(flight.lane)
        self.flights.append(flight)

    @with_flights(is_busy)
    @rule(pick=picks)
    def lose(self, pick: int) -> None:
        flight = self.flight(pick, is_busy)
        self.remove(flight)
        self.open_lane()
        again = [one for one in flight.statements if one.is_wanted and one.retry and one.sends < MAX_SENDS]
        self.machine.enqueue_again(again)
        self.unsent[:0] = again
        self.ended.update(one for one in flight.statements if one not in again)

    def remove(self, flight: Flight) -> None:
        self.machine.lanes.remove(flight.lane)
        self.flights.remove(flight)

    # --- what must hold -------------------------------------------------------------------------------------

    @invariant()
    def each_statement_is_in_one_place(self) -> None:
        places = Counter(self.ended)
        places.update(self.machine.unsent())
        for flight in self.flights:
            assert list(flight.lane.in_flight) == flight.statements, "lost on its lane, or out of turn"
            places.update(flight.lane.in_flight)
        assert len(places) == self.made, "a statement is lost"
        assert set(places.values()) <= {1}, "a statement is in two places"

    @invariant()
    def those_that_wait_keep_their_order(self) -> None:
        machine = self.machine
        assert list(machine.unsent()) == self.unsent
        assert machine.waiting == len(self.unsent)
        assert all(one.is_enqueued and not one.is_sent for one in self.unsent)
        assert machine.next_deadline() == min((one.deadline for one in self.unsent), default=NEVER)

    @invariant()
    def lanes_are_as_the_world_remembers_them(self) -> None:
        for flight in self.flights:
            lane = flight.lane
            assert lane.accepts() is flight.takes_more()
            assert lane.is_stalled is flight.is_stalled()
            assert lane.is_forsaken is (is_busy(flight) and not any(one.is_wanted for one in flight.statements))
            for one in flight.statements:
                assert (one.is_sent, one.is_enqueued) == (True, False)
                assert 1 <= one.sends <= MAX_SENDS
        counted = sum(not (flight.is_leaving or flight.is_stalled()) for flight in self.flights)
        enough = self.machine.limit
        if self.unsent and self.is_quick(self.unsent[0].pace):
            enough = min(enough, QUICK_LANES)
        is_wanted = self.requested < len(self.unsent) and counted + self.requested < enough
        assert self.machine.wants_lane(self.requested) is is_wanted

    def is_quick(self, pace: Pace) -> bool:
        """Further lanes are for what waits for something: as it is known, or as nobody is just finding out."""
        if pace.average is None:
            return any(flight.lane.in_flight and flight.lane.in_flight[-1].pace is pace for flight in self.flights)
        return pace.average < WORTH_A_LANE


TestLaneMachine = LaneMachineModel.TestCase
TestLaneMachine.settings = settings(max_examples=80, stateful_step_count=60, deadline=None, print_blob=True)
