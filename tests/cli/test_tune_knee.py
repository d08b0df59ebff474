"""What is made of readings: pure functions, so that every shape of a curve can be tried."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncpool.cli.tune.knee import (
    FEWEST_STATEMENTS,
    MOST_TOLERANCE,
    TOLERANCE,
    Ending,
    Obstacle,
    Reading,
    find_knee,
    is_flat,
    milliseconds,
    noise,
    recommend,
    sizes_up_to,
    tolerance,
)


def reading(size: int, *rates: float, p99: float = 0.02) -> Reading:
    """What a size carried, the client being idle half of the time."""
    return Reading(size=size, statements=1000, rates=rates, p50=0.01, p99=p99, wait_share=0.5, processor_share=0.5)


def curve(*rates: float) -> list[Reading]:
    """One pass each of the sizes 1, 2, 3, 4, 6, …"""
    return [reading(size, rate) for size, rate in zip(sizes_up_to(1000), rates, strict=False)]


rates = st.floats(min_value=0.1, max_value=1e6)
curves = st.lists(rates, min_size=1, max_size=12).map(lambda found: curve(*found))


def test_the_sizes_grow_by_a_half_and_a_third_in_turn_and_end_with_the_largest() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(2) == [1, 2]
    assert sizes_up_to(10) == [1, 2, 3, 4, 6, 8, 10]
    assert sizes_up_to(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


@given(st.integers(min_value=1, max_value=5000))
def test_sizes_rise_from_one_to_the_largest_and_at_most_double(largest: int) -> None:
    sizes = sizes_up_to(largest)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(smaller < larger <= 2 * smaller for smaller, larger in pairwise(sizes))


@pytest.mark.parametrize(
    ("rising", "flat"),
    [
        ((100, 200, 300), False),
        ((100, 104), False),
        ((100, 104, 104), True),
        ((100, 104, 106), False),  # creeps: no step is 5 %, but both together are
        ((100, 50, 60), True),
        ((100, 50, 110, 108), False),
        ((100, 50, 110, 108, 112), True),
        ((), False),
    ],
)
def test_a_sweep_is_flat_when_two_sizes_in_a_row_did_not_raise_the_rate(rising: tuple[float, ...], flat: bool) -> None:
    assert is_flat(curve(*rising)) is flat


def test_the_knee_is_the_smallest_size_within_five_percent_of_the_best() -> None:
    assert find_knee(curve(100, 194, 196, 200)).size == 2
    assert find_knee(curve(100, 189, 196, 200)).size == 3
    assert find_knee(curve(200, 100, 50)).size == 1


@given(curves)
def test_no_smaller_size_than_the_knee_is_within_the_tolerance_of_the_best(readings: list[Reading]) -> None:
    knee = find_knee(readings)
    enough = max(one.rate for one in readings) * (1 - TOLERANCE)
    assert knee.rate >= enough
    assert all(one.rate < enough for one in readings if one.size < knee.size)


@given(curves, st.floats(min_value=0.01, max_value=100))
def test_a_machine_that_is_faster_by_a_factor_has_the_same_knee(readings: list[Reading], factor: float) -> None:
    # Figures right at the edge of the tolerance are rounded to this side or that.
    best = max(one.rate for one in readings)
    if any(abs(one.rate / best - (1 - TOLERANCE)) < 1e-9 for one in readings):
        return
    faster = [replace(one, rates=tuple(rate * factor for rate in one.rates)) for one in readings]
    assert find_knee(faster).size == find_knee(readings).size


@given(curves, st.sampled_from(Ending))
def test_whatever_was_measured_there_is_a_recommendation_with_one_reason(
    readings: list[Reading], ending: Ending
) -> None:
    recommendation = recommend(readings, ending)
    assert recommendation.max_size in [one.size for one in readings]
    assert recommendation.reason.endswith(".")
    if recommendation.conclusive:
        assert recommendation.max_size != readings[-1].size
        assert ending in (Ending.FLAT, Ending.LARGEST_SIZE)


def test_the_reason_tells_what_more_connections_would_bring_and_cost() -> None:
    small, knee, flat, worse = reading(1, 100), reading(2, 198), reading(3, 202), reading(4, 190, p99=0.05)
    recommendation = recommend([small, knee, flat, worse], Ending.FLAT)
    assert recommendation.max_size == 2
    assert recommendation.conclusive
    assert recommendation.reason == (
        "2 connections carry 198/s, and 3 only 2 % more, while p99 rises from 20.0 to 50.0 ms with 4."
    )


def test_where_no_larger_size_is_better_the_reason_says_so() -> None:
    assert (
        recommend(curve(200, 150, 150), Ending.FLAT).reason == "1 connection carries 200/s, and more do not carry more."
    )


def test_a_rate_that_still_rises_at_the_largest_size_is_not_conclusive() -> None:
    recommendation = recommend(curve(100, 200, 300), Ending.LARGEST_SIZE)
    assert (recommendation.max_size, recommendation.obstacle) == (3, Obstacle.STILL_RISING)
    assert "still rising" in recommendation.reason


@pytest.mark.parametrize("ending", [Ending.INTERRUPTED, Ending.TIME_IS_UP])
def test_what_ended_early_is_not_conclusive(ending: Ending) -> None:
    assert recommend(curve(100, 200, 200, 200), ending).obstacle is Obstacle.ENDED_EARLY


def test_too_few_statements_are_not_conclusive() -> None:
    readings = curve(100, 200, 200, 200)
    thin = [replace(readings[0], statements=FEWEST_STATEMENTS - 1), *readings[1:]]
    recommendation = recommend(thin, Ending.FLAT)
    assert recommendation.obstacle is Obstacle.TOO_FEW
    assert f"{FEWEST_STATEMENTS - 1} statements at size 1" in recommendation.reason


def test_nothing_measured_recommends_nothing() -> None:
    assert recommend([], Ending.INTERRUPTED).max_size is None
    assert recommend([reading(1, 0.0), reading(2, 0.0, 7.0, 0.0)], Ending.FLAT).max_size is None


def test_a_client_that_takes_a_whole_core_or_waits_for_one_is_what_limits() -> None:
    def client_limited(took: float, waited: float) -> bool:
        busy = [replace(one, processor_share=took, processor_wait_share=waited) for one in curve(100, 100, 100)]
        return recommend(busy, Ending.FLAT).client_limited

    assert client_limited(0.97, 0.0)
    assert client_limited(0.6, 0.35)
    assert not client_limited(0.6, 0.1)


def test_one_disturbed_pass_does_not_move_a_rate() -> None:
    assert reading(1, 100, 101, 12, 99).rate == 99.5


def test_where_passes_differ_sizes_must_differ_by_more_to_be_told_apart() -> None:
    calm = [reading(1, 100, 100), reading(2, 110, 110), reading(3, 112, 112)]
    assert tolerance(calm) == TOLERANCE
    assert find_knee(calm).size == 2
    restless = [reading(1, 80, 120), reading(2, 88, 132), reading(3, 90, 134)]
    assert noise(restless) == pytest.approx(0.2, abs=0.01)
    assert find_knee(restless).size == 1
    assert "which is within what passes of the same size differ by" in recommend(restless, Ending.FLAT).reason


def test_a_machine_that_is_too_restless_tells_nothing() -> None:
    wild = [reading(size, 40, 160) for size in (1, 2, 3)]
    assert tolerance(wild) > MOST_TOLERANCE
    recommendation = recommend(wild, Ending.FLAT)
    assert recommendation.obstacle is Obstacle.RESTLESS
    assert "± 60 % apart" in recommendation.reason


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0001234, "0.12"), (0.00123, "1.2"), (0.0999, "99.9"), (1.5, "1,500")]
)
def test_milliseconds_have_as_many_digits_as_they_deserve(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown
