"""Which one-shot statement goes on which lane, what waits, and how long statements are thought to take."""

from __future__ import annotations

import pytest

from asyncpool._core.lanes import (
    LANE_STALL,
    LANE_WORK,
    LOOK_EVERY,
    MAX_BYTES,
    MAX_PACES,
    MAX_STATEMENTS,
    QUICK_LANES,
    SLOW,
    UNSEEN,
    WEIGHT,
    WORTH_A_LANE,
    Lane,
    LaneMachine,
    Pace,
    Paces,
    Statement,
)
from asyncpool._core.policy import NEVER

NOW = 1000.0

# Times that are sums of a few powers of two, so that no rounding is in the way.
STEP = 1 / 1024


def pace_of(average: float | None) -> Pace:
    """What is known of the statements of one text."""
    pace = Pace()
    if average is not None:
        pace.note(average)
    return pace


def statement(average: float | None = 0.0, *, size: int = 0, retry: bool = False, deadline: float = NEVER) -> Statement:
    """One with a pace of its own."""
    made = Statement(pace_of(average), retry=retry)
    made.size = size
    made.deadline = deadline
    return made


def lane_with(*statements: Statement, round_trip: float = 0.0, is_watched: bool = True) -> Lane:
    """A lane on which these were sent at `NOW`."""
    lane = Lane(is_watched=is_watched)
    lane.round_trip = round_trip
    for one in statements:
        lane.sent(one, NOW)
    return lane


def is_stalled(lane: Lane) -> bool:
    """As it is now: type checkers think that a property stays as it was."""
    return lane.is_stalled


def is_forsaken(lane: Lane) -> bool:
    return lane.is_forsaken


def answer(lane: Lane, now: float, *, count: int = 1, began: float = NOW) -> list[Statement]:
    """The first so many are answered together."""
    answered = [lane.in_flight.popleft() for _ in range(count)]
    lane.answered(answered, began, now)
    return answered


# --- how long statements take -------------------------------------------------------------------------------


def test_nothing_is_known_of_a_text_until_one_was_answered() -> None:
    pace = Pace()
    assert pace.average is None
    assert not pace.is_slow
    assert pace.needs is None


def test_the_first_time_is_the_average_and_the_next_moves_it_by_their_weight() -> None:
    pace = Pace()
    pace.note(STEP)
    assert pace.average == STEP
    pace.note(9 * STEP)
    assert pace.average == STEP + 8 * STEP * WEIGHT
    pace.note(0.0)
    assert pace.average == 2 * STEP - 2 * STEP * WEIGHT


@pytest.mark.parametrize(("average", "is_slow"), [(0.0, False), (SLOW * 0.999, False), (SLOW, True), (1.0, True)])
def test_a_text_is_slow_from_a_certain_average_on(average: float, is_slow: bool) -> None:
    assert pace_of(average).is_slow is is_slow


def test_a_time_that_was_out_of_the_common_is_forgotten() -> None:
    pace = pace_of(STEP)
    pace.note(64 * STEP)
    assert pace.is_slow
    for _ in range(10):
        pace.note(STEP)
    assert not pace.is_slow


def test_a_text_that_stalls_a_lane_is_slow_before_anything_was_answered() -> None:
    pace = Pace()
    pace.suspect()
    assert pace.average == LANE_STALL
    assert pace.is_slow


@pytest.mark.parametrize(("average", "then"), [(STEP, LANE_STALL), (1.0, 1.0)])
def test_a_text_that_stalls_a_lane_is_as_slow_as_that_or_slower(average: float, then: float) -> None:
    pace = pace_of(average)
    pace.suspect()
    assert pace.average == then


def test_a_command_that_needs_a_connection_of_its_own_is_known_by_its_text() -> None:
    assert Pace("LISTEN").needs == "LISTEN"


def test_paces_are_found_by_the_text_that_they_were_added_with() -> None:
    paces = Paces()
    texts = ["select 1", b"select 1", ("select ", "")]
    kept = {text: Pace() for text in texts}
    assert [paces.find(text) for text in texts] == [None] * 3
    for text, pace in kept.items():
        paces.add(text, pace)
    assert [paces.find(text) for text in texts] == list(kept.values())


def test_of_too_many_texts_the_one_that_was_not_used_for_longest_is_forgotten() -> None:
    paces = Paces()
    for number in range(MAX_PACES):
        paces.add(number, Pace())
    assert paces.find(0) is not None
    paces.add("one more", Pace())
    assert paces.find(1) is None
    assert paces.find(0) is not None
    assert paces.find(2) is not None
    assert paces.find(MAX_PACES - 1) is not None
    assert paces.find("one more") is not None


def test_a_statement_that_was_made_is_wanted_and_not_sent() -> None:
    pace = Pace()
    made = Statement(pace, retry=True)
    assert (made.pace, made.retry, made.is_wanted, made.is_sent) == (pace, True, True, False)
    assert (made.deadline, made.owner, made.sends, made.size, made.is_enqueued) == (NEVER, None, 0, 0, False)


# --- what a lane takes --------------------------------------------------------------------------------------


def test_of_a_lane_that_was_made_nothing_is_known_and_it_is_watched() -> None:
    lane = Lane()
    assert (lane.is_leaving, lane.round_trip, lane.stalls_at) == (False, 0.0, NEVER)
    one = statement(None)
    lane.sent(one, NOW)
    answer(lane, NOW + 1)
    assert one.pace.average == pytest.approx(UNSEEN)


@pytest.mark.parametrize("average", [None, 0.0, 1.0])
def test_a_lane_on_which_nothing_is_takes_anything(average: float | None) -> None:
    lane = Lane()
    assert lane.accepts()
    lane.sent(statement(average, size=MAX_BYTES), NOW)
    answer(lane, NOW)
    assert lane.accepts()


def test_nothing_is_sent_behind_one_whose_time_is_not_known() -> None:
    unknown = statement(None)
    lane = lane_with(statement())
    assert lane.accepts()
    lane.sent(unknown, NOW)
    assert not lane.accepts()
    unknown.pace.note(STEP)  # one of the same text was answered on another lane
    assert lane.accepts()


def test_a_lane_takes_so_many_statements_at_once() -> None:
    lane = lane_with(*[statement() for _ in range(MAX_STATEMENTS - 1)])
    assert lane.accepts()
    lane.sent(statement(), NOW)
    assert not lane.accepts()
    answer(lane, NOW)
    assert lane.accepts()


def test_a_lane_takes_so_many_bytes_at_once() -> None:
    lane = lane_with(statement(size=1), statement(size=MAX_BYTES - 2))
    assert lane.accepts()
    lane.sent(statement(size=1), NOW)
    assert not lane.accepts()
    answer(lane, NOW)
    assert lane.accepts()
    lane.sent(statement(size=1), NOW)
    assert not lane.accepts()


def test_one_statement_may_be_of_any_size_and_is_alone_then() -> None:
    lane = lane_with(statement(size=10 * MAX_BYTES))
    assert not lane.accepts()
    answer(lane, NOW)
    lane.sent(statement(size=1), NOW)
    assert lane.accepts()


def test_a_lane_takes_so_much_work_at_once() -> None:
    quarter = LANE_WORK / 4
    lane = lane_with(*[statement(quarter) for _ in range(3)])
    assert lane.accepts()
    lane.sent(statement(quarter), NOW)
    assert not lane.accepts()
    answer(lane, NOW)
    assert lane.accepts()
    lane.sent(statement(quarter), NOW)
    assert not lane.accepts()


def test_a_lane_to_a_server_that_is_far_away_takes_the_work_of_a_round_trip_more() -> None:
    lane = lane_with(statement(LANE_WORK), statement(7 * STEP), round_trip=8 * STEP)
    assert lane.accepts()
    lane.sent(statement(STEP), NOW)
    assert not lane.accepts()


def test_what_was_expected_of_a_statement_goes_with_it_whatever_it_has_taken() -> None:
    """Its pace may have changed meanwhile, and does with its own answer."""
    quarter = LANE_WORK / 4
    pace = pace_of(quarter)
    lane = Lane()
    for _ in range(4):
        lane.sent(Statement(pace, retry=False), NOW)
    pace.note(1.0)
    answer(lane, NOW, count=2)
    for _ in range(2):
        assert lane.accepts()
        lane.sent(statement(quarter), NOW)
    assert not lane.accepts()


def test_a_lane_that_has_nothing_on_it_expects_nothing_whatever_was_there() -> None:
    lane = lane_with(statement(LANE_WORK / 3), statement(LANE_WORK / 7), statement(1.0, size=MAX_BYTES))
    answer(lane, NOW, count=3)
    lane.sent(statement(0.0, size=MAX_BYTES - 1), NOW)
    assert lane.accepts()
    lane.sent(statement(LANE_WORK), NOW)
    assert not lane.accepts()


def test_a_lane_that_is_leaving_takes_nothing() -> None:
    lane = lane_with(statement())
    lane.is_leaving = True
    assert not lane.accepts()
    answer(lane, NOW)
    assert not lane.accepts()


def test_what_is_sent_is_in_flight_in_that_order() -> None:
    first, second = statement(), statement()
    lane = Lane()
    lane.sent(first, NOW)
    lane.sent(second, NOW + 1)
    assert list(lane.in_flight) == [first, second]
    assert (first.sent_at, second.sent_at) == (NOW, NOW + 1)
    assert first.is_sent
    assert (first.sends, second.sends) == (1, 1)


# --- stalled lanes ------------------------------------------------------------------------------------------


def test_a_lane_is_stalled_when_the_statement_in_front_was_seen_unanswered_for_too_long() -> None:
    lane = lane_with(statement())
    assert not is_stalled(lane)
    lane.seen_pending(NOW + LANE_STALL * 0.999)
    assert not is_stalled(lane)
    assert lane.accepts()
    lane.seen_pending(NOW + LANE_STALL)
    assert is_stalled(lane)
    assert not lane.accepts()


def test_one_that_stalls_its_lane_counts_as_slow_from_then_on() -> None:
    """Its like would stall other lanes, before it has ended itself."""
    front, behind = statement(STEP), statement(STEP)
    lane = lane_with(front, behind)
    lane.seen_pending(NOW + LANE_STALL * 0.999)
    assert front.pace.average == STEP
    lane.seen_pending(NOW + LANE_STALL)
    assert front.pace.average == LANE_STALL
    assert behind.pace.average == STEP


def test_one_that_goes_on_stalling_its_lane_counts_once() -> None:
    """Others of its text may have been answered meanwhile."""
    front = statement(STEP)
    lane = lane_with(front)
    lane.seen_pending(NOW + LANE_STALL)
    front.pace.average = STEP
    lane.seen_pending(NOW + 2 * LANE_STALL)
    assert front.pace.average == STEP
    answer(lane, NOW + 2 * LANE_STALL)
    front.pace.average = STEP
    lane.sent(front, NOW + 1)
    lane.seen_pending(NOW + 2)
    assert front.pace.average == LANE_STALL


def test_a_lane_at_which_nobody_has_looked_is_not_stalled() -> None:
    """The event loop is slow, and the answer may have come long ago."""
    lane = lane_with(statement())
    lane.seen_pending(NOW)
    lane.sent(statement(), NOW + 10)
    assert not is_stalled(lane)
    assert lane.accepts()


def test_the_time_counts_from_when_the_statement_comes_to_the_server() -> None:
    lane = lane_with(statement(), round_trip=8 * STEP)
    assert lane.stalls_at == NOW + 8 * STEP + LANE_STALL


def test_what_is_sent_later_does_not_give_the_one_in_front_more_time() -> None:
    lane = lane_with(statement())
    lane.sent(statement(), NOW + STEP)
    assert lane.stalls_at == NOW + LANE_STALL


def test_with_an_answer_the_next_one_has_its_own_time() -> None:
    lane = lane_with(statement(), statement(), round_trip=8 * STEP)
    lane.seen_pending(NOW + 1)
    assert is_stalled(lane)
    answer(lane, NOW + 2)
    assert not is_stalled(lane)
    assert lane.stalls_at == NOW + 2 + LANE_STALL
    lane.seen_pending(NOW + 2 + LANE_STALL)
    assert is_stalled(lane)


def test_the_next_one_has_its_own_time_from_when_it_comes_to_the_server() -> None:
    lane = lane_with(statement(), round_trip=8 * STEP)
    lane.sent(statement(), NOW + 7 * STEP)
    answer(lane, NOW + 10 * STEP)
    assert lane.stalls_at == NOW + 15 * STEP + LANE_STALL


def test_a_lane_on_which_nothing_is_cannot_stall() -> None:
    lane = lane_with(statement())
    lane.seen_pending(NOW + 1)
    assert is_stalled(lane)
    answer(lane, NOW + 1)
    assert lane.stalls_at == NEVER
    assert not is_stalled(lane)
    assert not is_stalled(Lane())
    lane.sent(statement(), NOW + 2)
    assert not is_stalled(lane)


def test_a_lane_is_forsaken_when_nobody_waits_for_anything_on_it() -> None:
    lane = Lane()
    assert not is_forsaken(lane)
    first, second = statement(), statement()
    for one in (first, second):
        lane.sent(one, NOW)
    assert not is_forsaken(lane)
    second.is_wanted = False
    assert not is_forsaken(lane)
    first.is_wanted = False
    assert is_forsaken(lane)
    answer(lane, NOW, count=2)
    assert not is_forsaken(lane)


# --- what an answer says of the times -----------------------------------------------------------------------


def times(lane: Lane, now: float, *, count: int = 1, began: float = NOW) -> list[float | None]:
    """What these took, as is noted at their answer."""
    return [one.pace.average for one in answer(lane, now, count=count, began=began)]


def test_those_that_are_answered_together_have_taken_equal_shares() -> None:
    lane = lane_with(*[statement(None) for _ in range(5)], is_watched=False)
    assert times(lane, NOW + 4 * STEP, count=4) == [STEP] * 4
    assert times(lane, NOW + 6 * STEP, began=NOW + 4 * STEP) == [2 * STEP]


def test_the_time_counts_from_the_answer_before() -> None:
    lane = lane_with(statement(None), is_watched=False)
    assert times(lane, NOW + 8 * STEP, began=NOW + 5 * STEP) == [3 * STEP]


def test_the_time_does_not_count_before_the_statement_came_to_the_server() -> None:
    lane = lane_with(statement(None), is_watched=False, round_trip=4 * STEP)
    assert times(lane, NOW + 7 * STEP, began=NOW) == [3 * STEP]


def test_of_several_it_is_the_first_that_came_to_the_server_when_the_work_began() -> None:
    lane = lane_with(statement(None), is_watched=False, round_trip=4 * STEP)
    lane.sent(statement(None), NOW + 4 * STEP)
    assert times(lane, NOW + 8 * STEP, count=2) == [2 * STEP] * 2


def test_an_answer_that_is_quicker_than_the_round_trip_took_no_time() -> None:
    lane = lane_with(statement(None), round_trip=4 * STEP, is_watched=False)
    assert times(lane, NOW + STEP) == [0.0]


@pytest.mark.parametrize("is_watched", [True, False])
def test_the_least_round_trip_is_kept(is_watched: bool) -> None:
    lane = lane_with(*[statement() for _ in range(4)], round_trip=4 * STEP, is_watched=is_watched)
    answer(lane, NOW + 6 * STEP)
    assert lane.round_trip == 4 * STEP
    answer(lane, NOW + 4 * STEP)
    assert lane.round_trip == 4 * STEP
    answer(lane, NOW + 2 * STEP)
    assert lane.round_trip == 2 * STEP
    answer(lane, NOW + 3 * STEP)
    assert lane.round_trip == 2 * STEP


def test_the_round_trip_is_that_of_the_last_that_was_answered() -> None:
    lane = lane_with(statement(), round_trip=8 * STEP)
    lane.sent(statement(), NOW + 2 * STEP)
    answer(lane, NOW + 3 * STEP, count=2)
    assert lane.round_trip == STEP


def test_a_round_trip_that_was_never_measured_is_not_taken_from_a_statement() -> None:
    lane = lane_with(statement())
    answer(lane, NOW + STEP)
    assert lane.round_trip == 0


def test_an_answer_for_which_nobody_has_looked_has_not_taken_long() -> None:
    """It may have lain there while the event loop did something else."""
    lane = lane_with(statement(None), statement(None))
    assert times(lane, NOW + 1) == [pytest.approx(UNSEEN)]
    assert times(lane, NOW + 2, began=NOW + 1) == [pytest.approx(UNSEEN)]
    assert UNSEEN < SLOW


def test_a_time_is_believed_as_far_as_the_statement_was_seen_unanswered() -> None:
    lane = lane_with(statement(None))
    lane.seen_pending(NOW + 16 * STEP)
    assert times(lane, NOW + 1) == [pytest.approx(16 * STEP + UNSEEN)]


def test_a_statement_that_was_seen_unanswered_until_its_answer_has_taken_all_that_time() -> None:
    lane = lane_with(statement(None))
    lane.seen_pending(NOW + 16 * STEP)
    assert times(lane, NOW + 17 * STEP) == [17 * STEP]


def test_that_others_were_seen_unanswered_before_says_nothing() -> None:
    lane = lane_with(statement(None), statement(None))
    lane.seen_pending(NOW + 16 * STEP)
    answer(lane, NOW + 17 * STEP)
    assert times(lane, NOW + 1, began=NOW + 17 * STEP) == [pytest.approx(UNSEEN)]


def test_what_was_seen_counts_from_when_the_statement_came_to_the_server() -> None:
    lane = lane_with(statement(None), round_trip=4 * STEP)
    lane.seen_pending(NOW + 16 * STEP)
    assert times(lane, NOW + 1) == [pytest.approx(12 * STEP + UNSEEN)]


def test_of_those_that_are_answered_together_each_has_its_share_of_what_was_seen() -> None:
    lane = lane_with(statement(None), statement(None))
    lane.seen_pending(NOW + 16 * STEP)
    assert times(lane, NOW + 1, count=2) == [pytest.approx(8 * STEP + UNSEEN / 2)] * 2


def test_at_a_lane_that_nobody_watches_the_time_is_believed() -> None:
    lane = lane_with(statement(None), is_watched=False)
    assert times(lane, NOW + 1) == [1.0]


def test_a_slow_statement_is_found_slow_by_the_looks_of_an_event_loop_that_is_not() -> None:
    lane = lane_with(statement(None))
    now = NOW
    while now < NOW + 2 * SLOW:
        now += LOOK_EVERY
        lane.seen_pending(now)
    [slow] = answer(lane, now)
    assert slow.pace.is_slow


# --- which lane ---------------------------------------------------------------------------------------------


def machine_with(*lanes: Lane, limit: int = 2) -> LaneMachine:
    machine = LaneMachine(limit)
    machine.lanes += lanes
    return machine


def waiting_in(machine: LaneMachine, *statements: Statement) -> list[Statement]:
    """These wait there, in this order."""
    for one in statements:
        machine.enqueue(one)
    return list(statements)


def taken_by(machine: LaneMachine, lane: Lane) -> list[Statement]:
    """All that the lane takes now."""
    taken = []
    while (one := machine.next_for(lane)) is not None:
        lane.sent(one, NOW)
        taken.append(one)
    return taken


def test_the_first_lane_that_takes_a_statement_gets_it() -> None:
    full, free, another = lane_with(statement(None)), lane_with(statement()), Lane()
    assert machine_with(full, free, another).lane_for() is free


def test_without_a_lane_that_takes_it_a_statement_waits() -> None:
    assert machine_with().lane_for() is None
    assert machine_with(lane_with(statement(None))).lane_for() is None


def test_nobody_is_overtaken_by_one_who_has_just_come() -> None:
    machine = machine_with(Lane())
    waiting_in(machine, statement())
    assert machine.lane_for() is None


def test_those_that_wait_are_taken_in_their_order() -> None:
    lane = Lane()
    machine = machine_with(lane)
    statements = waiting_in(machine, *[statement() for _ in range(5)])
    assert list(machine.unsent()) == statements
    assert machine.waiting == 5
    assert taken_by(machine, lane) == statements
    assert machine.waiting == 0
    assert machine.lane_for() is lane


def test_a_lane_takes_no_more_than_it_may_and_another_goes_on() -> None:
    lanes = Lane(), Lane()
    machine = machine_with(*lanes)
    first, unknown, third, fourth = waiting_in(machine, statement(), statement(None), statement(), statement(None))
    assert taken_by(machine, lanes[0]) == [first, unknown]
    assert list(machine.unsent()) == [third, fourth]
    assert taken_by(machine, lanes[1]) == [third, fourth]


def test_what_is_sent_again_comes_before_all_others_in_its_order() -> None:
    lane = Lane()
    machine = machine_with(lane)
    waiting = waiting_in(machine, statement(), statement())
    lost = [statement(retry=True) for _ in range(3)]
    lane_with(*lost)
    machine.enqueue_again(lost)
    assert [one.is_sent for one in lost] == [False] * 3
    assert machine.waiting == 5
    assert taken_by(machine, lane) == [*lost, *waiting]
    assert [one.sends for one in lost] == [2, 2, 2]


# --- withdrawals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_what_is_withdrawn_before_it_was_sent_is_never_sent(gone: int) -> None:
    lane = Lane()
    machine = machine_with(lane)
    statements = waiting_in(machine, statement(), statement(), statement())
    machine.withdraw(statements[gone])
    del statements[gone]
    assert machine.waiting == 2
    assert list(machine.unsent()) == statements
    assert taken_by(machine, lane) == statements
    assert machine.waiting == 0


def test_what_is_withdrawn_after_it_was_sent_stays_where_it_is() -> None:
    sent, waiting = statement(), statement()
    lane = lane_with(sent)
    machine = machine_with(lane)
    waiting_in(machine, waiting)
    machine.withdraw(sent)
    assert (sent.is_wanted, waiting.is_wanted) == (False, True)
    assert list(lane.in_flight) == [sent]
    assert machine.waiting == 1


def test_when_all_were_withdrawn_nobody_waits_and_the_next_is_sent_as_ever() -> None:
    lane = Lane()
    machine = machine_with(lane)
    for one in waiting_in(machine, statement(), statement()):
        machine.withdraw(one)
    assert machine.waiting == 0
    assert machine.next_for(lane) is None
    assert machine.waiting == 0
    assert machine.lane_for() is lane


def test_those_that_were_withdrawn_are_let_go_of_and_the_others_keep_their_order() -> None:
    """Whatever stands in front of them: while the server is away many come and give up behind one that waits on."""
    machine = machine_with()
    kept = []
    for number in range(2000):
        [one] = waiting_in(machine, statement())
        if number % 100 == 0:
            kept.append(one)
        else:
            machine.withdraw(one)
        assert machine.waiting == len(kept)
        assert len(machine._unsent) <= 2 * len(kept) + 130
    assert list(machine.unsent()) == kept
    lane = Lane()
    assert taken_by(machine, lane) == kept
    assert machine.waiting == 0


@pytest.mark.parametrize("how", ["taken by a lane", "refused", "overdue"])
def test_who_leaves_before_he_has_heard_that_his_statement_waits_no_longer_counts_for_none_that_does(how: str) -> None:
    machine = machine_with()
    [gone] = waiting_in(machine, statement(deadline=NOW))
    if how == "taken by a lane":
        machine.next_for(Lane())  # and could not be sent
    elif how == "refused":
        machine.take_unsent()
    else:
        machine.take_overdue(NOW)
    assert gone.is_enqueued is False
    waiting = waiting_in(machine, statement())
    machine.withdraw(gone)
    assert machine.waiting == 1
    assert list(machine.unsent()) == waiting


def test_what_was_never_enqueued_counts_for_none_that_waits() -> None:
    machine = machine_with()
    waiting_in(machine, statement())
    machine.withdraw(statement())
    assert machine.waiting == 1


def test_what_is_sent_again_can_be_withdrawn() -> None:
    machine = machine_with()
    lost = [statement(retry=True), statement(retry=True)]
    lane_with(*lost)
    machine.enqueue_again(lost)
    machine.withdraw(lost[0])
    assert machine.waiting == 1
    assert machine.next_for(Lane()) is lost[1]


# --- how many lanes -----------------------------------------------------------------------------------------


def test_no_lane_is_asked_for_while_nobody_waits() -> None:
    machine = machine_with()
    assert not machine.wants_lane(0)
    first, second = waiting_in(machine, statement(), statement())
    assert machine.wants_lane(0)
    machine.withdraw(first)
    assert machine.wants_lane(0)
    machine.withdraw(second)
    assert not machine.wants_lane(0)
    assert machine.waiting == 0


@pytest.mark.parametrize("average", [None, 0.0, WORTH_A_LANE / 2, WORTH_A_LANE, 1.0])
@pytest.mark.parametrize(
    ("limit", "lanes", "requested", "wants"),
    [
        (0, 0, 0, False),
        (1, 0, 0, True),
        (1, 1, 0, False),
        (2, 0, 1, True),
        (2, 1, 0, True),
        (2, 1, 1, False),
        (2, 0, 2, False),
        (2, 2, 0, False),
    ],
)
def test_lanes_are_asked_for_up_to_the_limit_with_those_that_are_asked_for_already(
    average: float | None, limit: int, lanes: int, requested: int, wants: bool
) -> None:
    machine = machine_with(*[Lane() for _ in range(lanes)], limit=limit)
    waiting_in(machine, *[statement(average) for _ in range(3)])
    assert machine.wants_lane(requested) is wants


def test_no_more_lanes_are_asked_for_than_callers_wait() -> None:
    machine = machine_with(limit=8)
    waiting_in(machine, statement(1.0), statement(1.0))
    assert machine.wants_lane(1)
    assert not machine.wants_lane(2)


def test_while_one_is_sent_to_find_out_how_long_its_like_take_the_others_wait_for_that() -> None:
    pace = Pace()
    machine = machine_with(lane_with(Statement(pace, retry=False)), lane_with(Statement(pace, retry=False)), limit=8)
    waiting_in(machine, Statement(pace, retry=False))
    assert not machine.wants_lane(0)


@pytest.mark.parametrize(
    ("average", "enough"),
    [(None, 8), (0.0, QUICK_LANES), (WORTH_A_LANE * 0.999, QUICK_LANES), (WORTH_A_LANE, 8), (1.0, 8)],
)
def test_quick_statements_get_no_more_lanes_than_are_of_use(average: float | None, enough: int) -> None:
    machine = machine_with(*[Lane() for _ in range(enough - 1)], limit=8)
    waiting_in(machine, statement(average), statement(0.0), statement(1.0))
    assert machine.wants_lane(0)
    assert not machine.wants_lane(1)
    machine.lanes.append(Lane())
    assert not machine.wants_lane(0)


def test_it_is_the_first_that_waits_who_says_how_many_lanes_are_of_use() -> None:
    machine = machine_with(*[Lane() for _ in range(QUICK_LANES)], limit=8)
    quick, _ = waiting_in(machine, statement(), statement(1.0))
    assert not machine.wants_lane(0)
    machine.withdraw(quick)
    assert machine.wants_lane(0)


def test_a_lane_that_is_stalled_does_not_count() -> None:
    lane = lane_with(statement(), statement())
    machine = machine_with(lane, limit=1)
    waiting_in(machine, statement())
    assert not machine.wants_lane(0)
    lane.seen_pending(NOW + 1)
    assert machine.wants_lane(0)
    answer(lane, NOW + 1)
    assert not machine.wants_lane(0)


def test_a_lane_that_is_leaving_does_not_count() -> None:
    lane = lane_with(statement())
    machine = machine_with(lane, limit=1)
    waiting_in(machine, statement())
    lane.is_leaving = True
    assert machine.wants_lane(0)


# --- those that wait for too long ---------------------------------------------------------------------------


def test_those_whose_time_is_over_are_taken_out_and_no_others() -> None:
    machine = machine_with()
    assert machine.next_deadline() == NEVER
    first, second, third = waiting_in(machine, *[statement(deadline=NOW + number) for number in range(3)])
    assert machine.next_deadline() == NOW
    assert machine.take_overdue(NOW - 1) == []
    assert machine.take_overdue(NOW + 1) == [first, second]
    assert machine.waiting == 1
    assert machine.next_deadline() == NOW + 2
    assert machine.take_overdue(NOW + 10) == [third]
    assert machine.next_deadline() == NEVER
    assert machine.waiting == 0


def test_those_that_are_sent_again_do_not_hide_the_deadlines_of_others() -> None:
    """They stand before all others, and may have more time, or less, in any order."""
    lane = Lane()
    machine = machine_with()
    waiting = waiting_in(machine, statement(deadline=NOW + 3), statement(deadline=NOW + 4))
    lost = [statement(retry=True, deadline=NOW + seconds) for seconds in (5, 2, 6)]
    for one in lost:
        lane.sent(one, NOW)
    machine.enqueue_again(lost)
    assert machine.next_deadline() == NOW + 2
    assert machine.take_overdue(NOW + 3) == [lost[1], waiting[0]]
    assert list(machine.unsent()) == [lost[0], lost[2], waiting[1]]
    assert machine.next_deadline() == NOW + 4
    machine.withdraw(lost[0])
    assert machine.take_overdue(NOW + 4) == [waiting[1]]
    assert list(machine.unsent()) == [lost[2]]
    assert machine.waiting == 1
    assert machine.next_deadline() == NOW + 6


def test_what_was_withdrawn_between_others_is_not_overdue() -> None:
    machine = machine_with()
    first, second, third = waiting_in(machine, *[statement(deadline=NOW + number) for number in range(3)])
    machine.withdraw(second)
    assert machine.take_overdue(NOW + 1) == [first]
    assert machine.waiting == 1
    assert list(machine.unsent()) == [third]


def test_what_was_withdrawn_has_no_deadline() -> None:
    machine = machine_with()
    first, second, third = waiting_in(machine, *[statement(deadline=NOW + number) for number in range(3)])
    machine.withdraw(first)
    assert machine.next_deadline() == NOW + 1
    assert machine.waiting == 2
    machine.withdraw(second)
    machine.withdraw(third)
    assert machine.take_overdue(NOW + 10) == []
    assert machine.next_deadline() == NEVER
    assert machine.waiting == 0


def test_those_that_wait_for_ever_are_never_overdue() -> None:
    machine = machine_with()
    waiting_in(machine, statement(deadline=NEVER))
    assert machine.next_deadline() == NEVER
    assert machine.take_overdue(NOW) == []
    assert machine.waiting == 1


def test_all_that_wait_can_be_taken_out() -> None:
    machine = machine_with()
    first, second, third = waiting_in(machine, statement(), statement(), statement())
    machine.withdraw(second)
    assert machine.take_unsent() == [first, third]
    assert machine.waiting == 0
    assert list(machine.unsent()) == []
    waiting_in(machine, first)
    assert machine.waiting == 1
