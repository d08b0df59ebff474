"""The options of a pool: their defaults, and the checks that find a wrong one at construction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

# Async for `Pool`, blocking for `SyncPool`.
ConnectionCallback: TypeAlias = Callable[[Any], object]
Reset: TypeAlias = Literal["rollback", "session", "discard"] | ConnectionCallback

_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Every option of a pool, checked. Times are seconds.

    Raises TypeError for a value of the wrong type and ValueError for one out of range, naming the option.
    """

    name: str = field(default_factory=lambda: f"pool-{next(_numbers)}")
    min_size: int = 1
    max_size: int = 10
    acquire_timeout: float | None = 30.0
    max_waiting: int | None = None
    max_lifetime: float | None = 3600.0
    max_idle: float | None = 600.0
    max_uses: int | None = None
    connect_timeout: float = 10.0
    max_connecting: int = 4
    backoff_initial: float = 0.1
    backoff_max: float = 10.0
    check_interval: float | None = 30.0
    check_timeout: float = 5.0
    cancel_timeout: float = 1.0
    reset: Reset = "rollback"
    configure: ConnectionCallback | None = None
    check: ConnectionCallback | None = None
    setup: ConnectionCallback | None = None
    long_held_after: float | None = None
    debug: bool | None = None

    def __post_init__(self) -> None:
        name: object = self.name
        if not (isinstance(name, str) and name):
            raise TypeError(f"name must be a non-empty str, not {name!r}")
        check_sizes(self.min_size, self.max_size)
        self._check_numbers()
        if self.backoff_initial > self.backoff_max:
            raise ValueError(f"backoff_initial={self.backoff_initial} is greater than backoff_max={self.backoff_max}")
        if not callable(self.reset) and self.reset not in ("rollback", "session", "discard"):
            raise ValueError(f"reset must be 'rollback', 'session', 'discard' or a callable, not {self.reset!r}")
        for option in ("configure", "check", "setup"):
            if (value := getattr(self, option)) is not None and not callable(value):
                raise TypeError(f"{option} must be a callable that takes a connection, not {value!r}")

    def _check_numbers(self) -> None:
        _check_int("max_connecting", self.max_connecting, at_least=1)
        for option, least in (("max_waiting", 0), ("max_uses", 1)):
            if (value := getattr(self, option)) is not None:
                _check_int(option, value, at_least=least)
        for option, none_means in _NONE_MEANS.items():
            if (value := getattr(self, option)) is not None:
                _check_seconds(option, value, positive=option not in _MAY_BE_ZERO, none_means=none_means)
        for option in ("connect_timeout", "backoff_initial", "backoff_max", "check_timeout", "cancel_timeout"):
            _check_seconds(option, getattr(self, option), positive=True)


OPTION_NAMES = frozenset(f.name for f in fields(PoolConfig))

_MAY_BE_ZERO = ("acquire_timeout", "check_interval")
_NONE_MEANS = {
    "acquire_timeout": "to wait for ever",
    "check_interval": "to never ping",
    "max_lifetime": "for no limit",
    "max_idle": "for no limit",
    "long_held_after": "for no warning",
}


def check_sizes(min_size: object, max_size: object) -> None:
    """Raise TypeError or ValueError unless these can be a pool's sizes."""
    _check_int("min_size", min_size, at_least=0)
    _check_int("max_size", max_size, at_least=1)
    if min_size > max_size:  # type: ignore[operator]  # both are ints, as _check_int has seen
        raise ValueError(f"min_size={min_size} is greater than max_size={max_size}: lower it or raise max_size")


def check_timeout(option: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is None or a number of seconds, 0 or more."""
    if value is not None:
        _check_seconds(option, value, none_means="to wait for ever")


def _check_int(option: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{option} must be an int, not {value!r}")
    if value < at_least:
        raise ValueError(f"{option} must be {at_least} or more, not {value}")


def _check_seconds(option: str, value: object, *, positive: bool = False, none_means: str | None = None) -> None:
    remedy = f"; use None {none_means}" if none_means else ""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{option} must be a number of seconds, not {value!r}{remedy}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "greater than 0" if positive else "0 or more"
        raise ValueError(f"{option} must be a finite number of seconds, {bound}, not {value}{remedy}")


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pool's own options, and the rest, which is psycopg's and libpq's."""
    own = {name: value for name, value in given.items() if name in OPTION_NAMES}
    rest = {name: value for name, value in given.items() if name not in OPTION_NAMES}
    return own, rest


def check_connection_class(connection_class: object, base: type) -> None:
    """Raise TypeError unless it is `base`, psycopg's class, or a subclass of it."""
    if not (isinstance(connection_class, type) and issubclass(connection_class, base)):
        raise TypeError(
            f"connection_class must be psycopg.{base.__name__} or a subclass of it, not {connection_class!r}"
        )
