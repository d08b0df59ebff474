"""How large a pool should be, told from what was measured: pure decisions on numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from itertools import count
from statistics import median
from typing import TYPE_CHECKING

from asyncpool.cli.words import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Rates that differ by less are as good as equal: no machine repeats itself better than that.
TOLERANCE = 0.05

# Where passes of one size are ± 1 apart, the medians of two sizes differ by this much by chance: four passes have a
# range of 2.06 standard deviations, their median an error of 0.55 of one, and a difference has two such errors.
ERROR_OF_A_DIFFERENCE = 0.75

# Beyond this a machine is too restless to tell one size from another.
MOST_TOLERANCE = 0.25

# A 99th percentile is a rarer thing than a rate; it is worse if it is by this share.
WORSE = 0.2

# So many sizes in a row that do not raise the rate end a sweep: one alone may have had bad luck.
FLAT_SIZES = 2

# The client's event loop is one thread: from this share of a core on, it is what limits.
SATURATED = 0.9

# A rate and a 99th percentile told from fewer statements are chance.
FEWEST_STATEMENTS = 20


class Ending(StrEnum):
    """Why a sweep ended; the value is what `--json` calls it."""

    FLAT = "flat"
    """Further sizes did not raise the rate."""
    LARGEST_SIZE = "largest size"
    TIME_IS_UP = "time is up"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one size carried. `rates`: statements per second in each pass; `mean`, `p50` and `p99`: seconds from asking
    for a connection to giving it back, None if they were not measured; `wait_share`: how much of that was waiting for
    one, unknown of one-shots; `processor_share`: how much of one processor core the client took;
    `processor_wait_share`: for what share of the time it could have worked and had none; 0 where the system does not
    tell.
    """

    size: int
    statements: int
    rates: tuple[float, ...]
    p50: float | None
    p99: float | None
    wait_share: float | None
    processor_share: float
    processor_wait_share: float = 0.0
    mean: float | None = None

    @property
    def rate(self) -> float:
        """Statements per second: the median of the passes, which one that was disturbed does not move."""
        return median(self.rates)

    @property
    def spread(self) -> float:
        """How far the passes are apart: half of their range, as a share of the rate."""
        return (max(self.rates) - min(self.rates)) / 2 / self.rate if self.rate else 0.0


def sizes_up_to(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, …, and `largest` itself at the end."""
    smaller: list[int] = []
    for size in _growing_sizes():
        if size >= largest:
            break
        smaller.append(size)
    return [*smaller, largest]


def _growing_sizes() -> Iterator[int]:
    yield 1
    for exponent in count(1):
        yield 2**exponent
        yield 3 * 2 ** (exponent - 1)


def is_flat(readings: Sequence[Reading]) -> bool:
    """Whether the last sizes did not raise the rate: each is compared with the last that did, so that one that creeps
    up in small steps is no flat one.
    """
    reference, flat = 0.0, 0
    for reading in readings:
        if reading.rate > reference * (1 + TOLERANCE):
            reference, flat = reading.rate, 0
        else:
            flat += 1
    return flat >= FLAT_SIZES


def noise(readings: Sequence[Reading]) -> float:
    """How far the passes of one size are apart, typically, as a share of its rate."""
    return median(reading.spread for reading in readings) if readings else 0.0


def tolerance(readings: Sequence[Reading]) -> float:
    """By what share rates must differ to be told apart: 5 %, or more where passes of the same size differ."""
    return max(TOLERANCE, ERROR_OF_A_DIFFERENCE * noise(readings))


def find_knee(readings: Sequence[Reading]) -> Reading:
    """The smallest size whose rate is within the tolerance of the best: what is larger costs the server sessions, and
    its callers time, without carrying more.
    """
    enough = max(reading.rate for reading in readings) * (1 - tolerance(readings))
    return min((reading for reading in readings if reading.rate >= enough), key=lambda reading: reading.size)


class Obstacle(Enum):
    """Why nothing is recommended."""

    ENDED_EARLY = "the sweep was cut short"
    TOO_FEW = "too few statements ended"
    STILL_RISING = "larger sizes may carry more"
    RESTLESS = "passes of the same size differ too much"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`max_size` is None if nothing can be told; where there is an obstacle, it is the best that was seen."""

    max_size: int | None
    reason: str
    obstacle: Obstacle | None = None
    client_limited: bool = False

    @property
    def conclusive(self) -> bool:
        """Whether that is the size to take."""
        return self.obstacle is None


def recommend(readings: Sequence[Reading], ending: Ending) -> Recommendation:
    """Which `max_size` the readings, by rising size, speak for, and why."""
    if not readings:
        return Recommendation(None, "No size was measured to its end.", Obstacle.ENDED_EARLY)
    if not any(reading.rate for reading in readings):
        return Recommendation(None, "Hardly a statement ended while it was measured.", Obstacle.TOO_FEW)
    knee = find_knee(readings)
    client_limited = knee.processor_share + knee.processor_wait_share >= SATURATED
    if found := _obstacle(readings, ending, knee):
        obstacle, reason = found
        return Recommendation(knee.size, reason, obstacle, client_limited)
    larger = [reading for reading in readings if reading.size > knee.size]
    return Recommendation(knee.size, _reason(knee, larger), None, client_limited)


def _obstacle(readings: Sequence[Reading], ending: Ending, knee: Reading) -> tuple[Obstacle, str] | None:
    """What stands against the recommendation, and in words."""
    thin = min(readings, key=lambda reading: reading.statements)
    if thin.statements < FEWEST_STATEMENTS:
        few = count_of(thin.statements, "statement")
        return Obstacle.TOO_FEW, f"{few} at size {thin.size} are too few to tell a rate from."
    if ending in (Ending.INTERRUPTED, Ending.TIME_IS_UP):
        return (
            Obstacle.ENDED_EARLY,
            f"It ended early, at {rate_of(knee)} with {knee.size}: larger sizes may carry more.",
        )
    if tolerance(readings) > MOST_TOLERANCE:
        apart = plus_minus(noise(readings))
        return Obstacle.RESTLESS, f"Passes of the same size were {apart} apart: too far to tell sizes from each other."
    if knee is readings[-1]:
        return (
            Obstacle.STILL_RISING,
            f"The rate was still rising at the largest size that was measured, {rate_of(knee)} with {knee.size}.",
        )
    return None


def _reason(knee: Reading, larger: Sequence[Reading]) -> str:
    best = max(larger, key=lambda reading: reading.rate)
    gain = best.rate / knee.rate - 1
    carried = f"{count_of(knee.size, 'connection')} {'carries' if knee.size == 1 else 'carry'} {rate_of(knee)}"
    if gain > 0.005:
        text = f"{carried}, and {best.size} only {percent(gain)} more"
        if gain > TOLERANCE / (1 - TOLERANCE):
            text += ", which is within what passes of the same size differ by"
    else:
        text = f"{carried}, and more do not carry more"
    known = [(reading.p99, reading.size) for reading in larger if reading.p99 is not None]
    worst, worst_size = max(known, default=(0.0, 0))
    if knee.p99 is not None and worst > knee.p99 * (1 + WORSE):
        text += f", while p99 rises from {milliseconds(knee.p99)} to {milliseconds(worst)} ms with {worst_size}"
    return text + "."


def rate_of(reading: Reading) -> str:
    """A rate, with as many digits as it deserves."""
    return f"{reading.rate:,.0f}/s" if reading.rate >= 100 else f"{reading.rate:,.1f}/s"


def milliseconds(seconds: float | None) -> str:
    """A duration, with as many digits as it deserves; `-` if it was not measured."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


def percent(share: float) -> str:
    """`12 %`."""
    return f"{100 * share:.0f} %"


def plus_minus(share: float) -> str:
    """`± 12 %`."""
    return f"± {percent(share)}"
