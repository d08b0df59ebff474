"""Numbers and times the machine decides by: when a connection retires, when the next connect may be tried."""

from __future__ import annotations

from enum import IntEnum

NEVER = float("inf")

# Share of `max_lifetime` over which the retirements of connections born together are spread. HikariCP varies by
# up to 2.5 %, r2d2 not at all; with 10 % a hundred connections of one hour retire 3.6 s apart on average.
RETIREMENT_SPREAD = 0.1

# Share of the outage so far after which a refusing server is tried again: the success then comes at most this
# share of the outage late. After 10 s that is 0.1 s, which leaves as much for connecting where 0.2 s is the aim.
PROBE_SHARE = 0.01


class ConnectFailure(IntEnum):
    """What a failed connect says about the next one."""

    FINAL = 0
    """The answer will be the same again: wrong password, unknown database, a `configure` that raises."""
    REFUSED = 1
    """The server is down, silent, starting, or not of the role that was asked for: one try at a time costs it little,
    and it may be back, or promoted, at any moment."""
    TRANSIENT = 2


def retirement(born: float, max_lifetime: float | None, draw: float) -> float:
    """When to replace a connection; `draw`, in [0, 1), is drawn once, at its birth."""
    if max_lifetime is None:
        return NEVER
    return born + max_lifetime * (1.0 - RETIREMENT_SPREAD * draw)


class Backoff:
    """The pause between failed connects. While it is failing, one connect at a time probes."""

    __slots__ = ("_failures", "_initial", "_max", "_outage_began", "not_before")

    def __init__(self, initial: float, maximum: float) -> None:
        self._initial = initial
        self._max = maximum
        self.succeeded()

    def succeeded(self) -> None:
        """Forget all failures."""
        self._failures = 0  # without those that were refused, which come often and say nothing about load
        self._outage_began = NEVER
        self.not_before = -NEVER

    @property
    def failing(self) -> bool:
        """Whether the last connect failed."""
        return self._outage_began < NEVER

    def failed(self, failure: ConnectFailure, now: float, draw: float) -> None:
        """Set `not_before`: full jitter over a doubling bound; a fixed share of the outage while refused."""
        self._outage_began = min(self._outage_began, now)
        if failure is ConnectFailure.REFUSED:
            pause = min(self._max, max(self._initial, PROBE_SHARE * (now - self._outage_began)))
        else:
            if now >= self.not_before or not self._failures:  # of connects that ran side by side one counts
                self._failures += 1
            # The exponent is capped where the float would overflow; backoff_max has cut in long before. The draw comes
            # last: else all the pauses of a long outage would be backoff_max, and those of many pools in step.
            pause = draw * min(self._max, self._initial * 2.0 ** min(self._failures - 1, 60))
        self.not_before = now + pause
