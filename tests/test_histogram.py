"""Histograms of durations: exact counts, quantiles within a quarter, whatever comes."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncpool import histogram as histogram_module
from asyncpool.histogram import BOUNDS, EMPTY, GATHERED, SHORTEST, Durations, Histogram

durations = st.lists(st.floats(min_value=0.0, max_value=100_000.0), max_size=60)


def of(*seconds: float) -> Histogram:
    counted = Durations()
    for each in seconds:
        counted.record(each)
    return counted.snapshot()


@given(durations)
@example([0.0])
@example([BOUNDS[0], BOUNDS[5], BOUNDS[-1], BOUNDS[-1] * 2])
def test_every_duration_is_counted_in_the_bucket_whose_bound_it_does_not_exceed(seconds: list[float]) -> None:
    histogram = of(*seconds)
    assert histogram.count == len(seconds)
    for bound, count in histogram.cumulative():
        assert count == sum(each <= bound for each in seconds)
    assert histogram.max == max(seconds, default=0.0)
    assert math.isclose(histogram.sum, sum(each for each in seconds if each > SHORTEST))


@given(durations.filter(bool), st.floats(min_value=0.0, max_value=1.0))
def test_a_quantile_is_a_quarter_off_at_most(seconds: list[float], share: float) -> None:
    histogram = of(*seconds)
    exact = sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)]
    found = histogram.quantile(share)
    assert found <= histogram.max
    if exact <= SHORTEST:
        assert 0 <= found <= SHORTEST
    elif exact <= BOUNDS[-1]:
        assert exact / 1.25 - 1e-12 <= found <= exact * 1.25 + 1e-12


def test_the_named_quantiles_are_those_of_their_shares() -> None:
    histogram = of(*(number / 1000 for number in range(1, 1001)))
    assert histogram.p50 == histogram.quantile(0.5) == pytest.approx(0.5, rel=0.25)
    assert histogram.p90 == histogram.quantile(0.9) == pytest.approx(0.9, rel=0.25)
    assert histogram.p99 == histogram.quantile(0.99) == pytest.approx(0.99, rel=0.25)
    assert histogram.p50 < histogram.p90 < histogram.p99 < histogram.max == 1.0


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        of(1.0).quantile(share)


def test_an_empty_one_has_no_durations() -> None:
    assert of() == EMPTY
    assert (EMPTY.count, EMPTY.sum, EMPTY.max, EMPTY.p50, EMPTY.p99) == (0, 0.0, 0.0, 0.0, 0.0)
    assert [count for _, count in EMPTY.cumulative()] == [0] * len(BOUNDS)


def test_those_that_were_not_recorded_count_among_the_shortest() -> None:
    counted = Durations()
    counted.record(1.0)
    histogram = counted.snapshot(total=100)
    assert histogram.count == 100
    assert histogram.counts[0] == 99
    assert histogram.p90 <= SHORTEST
    assert (histogram.max, histogram.sum) == (1.0, 1.0)


def test_its_repr_is_short() -> None:
    assert repr(of(0.5, 0.5)).startswith("<Histogram of 2 durations: p50=0.")
    assert len(repr(of(*range(1000)))) < 100


def test_a_histogram_is_a_value() -> None:
    assert of(0.5) == of(0.5) != of(0.7)
    assert pickle.loads(pickle.dumps(of(0.5))) == of(0.5)


def test_what_was_told_once_stays_told() -> None:
    """One that another thread has recorded may not be among the total yet; a counter that goes down is a reset."""
    counted = Durations()
    assert counted.snapshot(total=10).counts[0] == 10
    counted.record(1.0)
    assert counted.snapshot(total=10).counts[0] == 10
    assert counted.snapshot(total=11).counts[0] == 10
    assert counted.snapshot(total=12).counts[0] == 11


def test_however_many_there_are_each_is_counted_once() -> None:
    counted = Durations()
    for number in range(3 * GATHERED + 1):
        counted.record(number / 1000)
        if number % (GATHERED // 2) == 0:
            assert counted.count == counted.snapshot().count == number + 1
    histogram = counted.snapshot()
    assert histogram == of(*(number / 1000 for number in range(3 * GATHERED + 1)))
    assert histogram.count == 3 * GATHERED + 1
    assert histogram.max == 3 * GATHERED / 1000
    assert len(counted._items) == 1  # what was counted is not kept


def test_a_signal_handler_in_the_midst_of_counting_finds_all_and_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Durations()
    seen: list[int] = []

    def interrupted(items: list[Any]) -> Histogram:
        monkeypatch.setattr(histogram_module, "_counted", undisturbed)
        counted.record(1.0)
        seen.append(counted.snapshot().count)
        return undisturbed(items)

    undisturbed = histogram_module._counted
    counted.record(0.5)
    monkeypatch.setattr(histogram_module, "_counted", interrupted)
    assert counted.snapshot().count == 2
    assert seen == [2]
    assert counted.snapshot().count == counted.count == 2


def test_counting_that_is_interrupted_is_done_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Durations()
    counted.record(0.5)

    def struck(items: list[Any]) -> Histogram:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(histogram_module, "_counted", struck)
        with pytest.raises(KeyboardInterrupt):
            counted.snapshot()
    assert counted.snapshot().count == counted.count == 1
