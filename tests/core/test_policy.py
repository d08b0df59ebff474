"""When a connection retires, and when the next connect may be tried."""

from __future__ import annotations

import pytest

from asyncpool._core.policy import NEVER, RETIREMENT_SPREAD, Backoff, ConnectFailure, retirement

FINAL, REFUSED, TRANSIENT = ConnectFailure
ALMOST_1 = 1.0 - 2.0**-53

failures = pytest.mark.parametrize("failure", list(ConnectFailure))


def pause_after(backoff: Backoff, failure: ConnectFailure, now: float, draw: float) -> float:
    backoff.failed(failure, now, draw)
    return backoff.not_before - now


def pauses(backoff: Backoff, count: int, draw: float, failure: ConnectFailure = TRANSIENT) -> list[float]:
    """Those of an outage in which every connect fails at once, as soon as it may be tried."""
    now = 0.0
    result = []
    for _ in range(count):
        result.append(pause_after(backoff, failure, now, draw))
        now = backoff.not_before
    return result


def test_without_a_max_lifetime_a_connection_never_retires() -> None:
    assert retirement(5.0, None, 0.5) == NEVER


def test_a_connection_retires_at_max_lifetime_or_up_to_the_spread_sooner() -> None:
    assert retirement(5.0, 100.0, 0.0) == 105.0
    soonest = retirement(5.0, 100.0, ALMOST_1)
    assert 105.0 - 100.0 * RETIREMENT_SPREAD <= soonest < 95.1


def test_connections_born_together_retire_at_times_of_their_own() -> None:
    times = [retirement(0.0, 3600.0, draw / 100) for draw in range(100)]
    assert len(set(times)) == 100
    assert max(times) - min(times) > 0.9 * 3600.0 * RETIREMENT_SPREAD


def test_at_first_a_connect_may_be_tried_at_once() -> None:
    backoff = Backoff(0.1, 10.0)
    assert not backoff.failing
    assert backoff.not_before < 0.0


@failures
def test_after_a_failure_it_pauses(failure: ConnectFailure) -> None:
    backoff = Backoff(0.1, 10.0)
    backoff.failed(failure, 1.0, 0.5)
    assert backoff.failing
    assert backoff.not_before > 1.0


@failures
def test_after_a_success_it_may_be_tried_at_once(failure: ConnectFailure) -> None:
    backoff = Backoff(0.1, 10.0)
    backoff.failed(failure, 1.0, 0.5)
    backoff.succeeded()
    assert not backoff.failing
    assert backoff.not_before < 1.0


@pytest.mark.parametrize("failure", [FINAL, TRANSIENT])
def test_the_bound_of_the_pause_doubles_up_to_backoff_max(failure: ConnectFailure) -> None:
    bounds = pauses(Backoff(0.5, 10.0), 7, 1.0, failure)
    assert bounds == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0])


@pytest.mark.parametrize("draw", [0.0, 0.25, ALMOST_1])
def test_the_jitter_is_full(draw: float) -> None:
    """From no pause at all to the bound, so that the pools of many processes do not come back together."""
    assert pauses(Backoff(0.5, 100.0), 4, draw) == pytest.approx([draw * bound for bound in (0.5, 1.0, 2.0, 4.0)])


@pytest.mark.parametrize("draw", [0.25, 0.75])
def test_the_jitter_is_full_however_long_the_outage_lasts(draw: float) -> None:
    assert pauses(Backoff(0.5, 10.0), 50, draw)[-1] == pytest.approx(draw * 10.0)


def test_an_outage_of_any_length_keeps_to_backoff_max() -> None:
    assert pauses(Backoff(0.1, 10.0), 5000, 1.0)[-1] == pytest.approx(10.0)


@failures
def test_a_success_begins_anew_with_the_shortest_pause(failure: ConnectFailure) -> None:
    backoff = Backoff(0.5, 10.0)
    first = pauses(backoff, 6, 1.0, failure)[0]
    backoff.succeeded()
    assert pause_after(backoff, failure, 1e6, 1.0) == pytest.approx(first)


def test_connects_that_fail_side_by_side_count_as_one_failure() -> None:
    backoff = Backoff(0.5, 100.0)
    together = [pause_after(backoff, TRANSIENT, 1.0, 1.0) for _ in range(4)]
    assert together == [0.5] * 4
    assert pause_after(backoff, TRANSIENT, backoff.not_before, 1.0) == 1.0


def test_a_server_that_refuses_is_tried_every_percent_of_its_outage() -> None:
    backoff = Backoff(0.1, 10.0)
    assert pause_after(backoff, REFUSED, 1000.0, 0.5) == pytest.approx(0.1)
    assert pause_after(backoff, REFUSED, 1010.0, 0.5) == pytest.approx(0.1)
    assert pause_after(backoff, REFUSED, 1200.0, 0.5) == pytest.approx(2.0)
    assert pause_after(backoff, REFUSED, 1800.0, 0.5) == pytest.approx(8.0)
    assert pause_after(backoff, REFUSED, 9000.0, 0.5) == pytest.approx(10.0)


def test_a_long_outage_of_refusals_does_not_prolong_the_pause_after_another_failure() -> None:
    """A server that is back, but full, is tried again soon, however often it refused before."""
    backoff = Backoff(0.1, 10.0)
    pauses(backoff, 100, 1.0, REFUSED)
    after = backoff.not_before
    assert [pause_after(backoff, TRANSIENT, after, 1.0) for _ in range(2)] == pytest.approx([0.1, 0.1])
    assert pause_after(backoff, REFUSED, backoff.not_before, 1.0) > 0.0
    assert pause_after(backoff, TRANSIENT, backoff.not_before, 1.0) == pytest.approx(0.2)


def test_the_outage_lasts_as_long_as_nothing_connects_whatever_the_failures_are() -> None:
    backoff = Backoff(0.1, 10.0)
    backoff.failed(TRANSIENT, 1000.0, 0.5)
    assert pause_after(backoff, REFUSED, 1200.0, 0.5) == pytest.approx(2.0)
    backoff.succeeded()
    assert pause_after(backoff, REFUSED, 1300.0, 0.5) == pytest.approx(0.1)
