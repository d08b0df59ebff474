"""The options of a pool: their defaults, and the checks that find a wrong one at construction."""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from psycopg.adapt import AdaptersMap

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
    lanes: int = 8
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
    monitor: str | os.PathLike[str] | None = None
    debug: bool | None = None

    def __post_init__(self) -> None:
        name: object = self.name
        if not (isinstance(name, str) and name):
            raise TypeError(f"name must be a non-empty str, not {shown(name)}")
        if _NOT_FOR_LOGS.search(name):
            raise ValueError(f"name must hold no control character and no lone surrogate, as {shown(name)} does")
        check_sizes(self.min_size, self.max_size)
        self._check_numbers()
        if self.backoff_initial > self.backoff_max:
            initial, greatest = shown(self.backoff_initial), shown(self.backoff_max)
            raise ValueError(f"backoff_initial={initial} is greater than backoff_max={greatest}")
        reset: object = self.reset
        if not callable(reset) and not (isinstance(reset, str) and str(reset) in ("rollback", "session", "discard")):
            raise ValueError(f"reset must be 'rollback', 'session', 'discard' or a callable, not {shown(reset)}")
        for option in ("configure", "check", "setup"):
            if (value := getattr(self, option)) is not None and not callable(value):
                raise TypeError(f"{option} must be a callable that takes a connection, not {shown(value)}")
        if self.debug is not None:
            check_bool("debug", self.debug)
        if self.monitor is not None:
            # As text from here on: asked again, it might say something else.
            object.__setattr__(self, "monitor", check_socket_path("monitor", self.monitor))

    def _check_numbers(self) -> None:
        _check_int("max_connecting", self.max_connecting, at_least=1)
        _check_int("lanes", self.lanes, at_least=0)
        for option, least in (("max_waiting", 0), ("max_uses", 1)):
            if (value := getattr(self, option)) is not None:
                _check_int(option, value, at_least=least)
        for option, none_means in _NONE_MEANS.items():
            if (value := getattr(self, option)) is not None:
                _check_seconds(option, value, positive=option not in _MAY_BE_ZERO, none_means=none_means)
        for option in ("connect_timeout", "backoff_initial", "backoff_max", "check_timeout", "cancel_timeout"):
            _check_seconds(option, getattr(self, option), positive=True)


OPTION_NAMES = frozenset(f.name for f in fields(PoolConfig))

_GREATEST_FLOAT = sys.float_info.max

_MAY_BE_ZERO = ("acquire_timeout", "check_interval")
_NONE_MEANS = {
    "acquire_timeout": "to wait for ever",
    "check_interval": "to never ping",
    "max_lifetime": "for no limit",
    "max_idle": "for no limit",
    "long_held_after": "for no warning",
}


_NOT_FOR_LOGS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

_MAY_HOLD_A_PASSWORD = re.compile(r"://|\w\s*=|pass|pwd|secret", re.IGNORECASE)

# How much of a wrong value is shown: enough to recognize it.
_SHOWN_LENGTH = 100


def shown(value: object) -> str:
    """A wrong value as messages show it: its repr, if that is to be had, short and no place for a password."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # whatever it is, the error to raise is the one about this value
        text = ""
    if not text or _MAY_HOLD_A_PASSWORD.search(text):  # a connection string in the wrong place
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}… of type {type(value).__name__}"


def check_sizes(min_size: object, max_size: object) -> None:
    """Raise TypeError or ValueError unless these can be a pool's sizes."""
    _check_int("min_size", min_size, at_least=0)
    _check_int("max_size", max_size, at_least=1)
    if min_size > max_size:  # type: ignore[operator]  # both are ints, as _check_int has seen
        raise ValueError(
            f"min_size={shown(min_size)} is greater than max_size={shown(max_size)}: lower it or raise max_size"
        )


def check_timeout(option: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is None or a number of seconds, 0 or more."""
    if value is not None:
        _check_seconds(option, value, none_means="to wait for ever")


def check_one_shot(timeout: object, retry: object, binary: object, row_factory: object) -> None:
    """Raise TypeError or ValueError for a wrong keyword of a one-shot statement, before it is sent."""
    if timeout is not None:
        _check_seconds("timeout", timeout, positive=True, none_means="for no limit beyond acquire_timeout")
    if retry is not False:
        check_bool("retry", retry)
    if binary is not False:
        check_bool("binary", binary)
    if row_factory is not None and not callable(row_factory):
        raise TypeError(f"row_factory must be a callable, as psycopg's are, not {shown(row_factory)}")


# What a Unix socket's address has room for, in bytes, beside the zero at its end: 108 on Linux, 104 elsewhere.
SOCKET_PATH_LENGTH = 107 if sys.platform == "linux" else 103


def check_socket_path(option: str, value: object) -> str:
    """The path, as text. Raises TypeError or ValueError unless a Unix socket can be there, and be here at all."""
    try:
        path: object = os.fspath(value)  # type: ignore[call-overload]  # whatever it is
    except Exception:  # noqa: BLE001  # of whatever kind: it is no path
        path = None
    if not isinstance(path, str):
        raise TypeError(f"{option} must be the path of a socket, a str or os.PathLike, not {shown(value)}")
    if not hasattr(socket, "AF_UNIX"):
        raise ValueError(f"{option} needs Unix sockets, which Python does not have on this system: leave it out")
    if not path or "\0" in path:
        raise ValueError(f"{option} must be the path of a socket, not {shown(value)}")
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise ValueError(f"{option} must be a path that this system can encode, not {shown(value)}") from None
    if length > SOCKET_PATH_LENGTH:
        raise ValueError(
            f"{option} is a path of {length} bytes, and a Unix socket's may have {SOCKET_PATH_LENGTH} here: choose a"
            f" shorter one, such as /run/user/1000/app.sock"
        )
    return path


def _check_int(option: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{option} must be an int, not {shown(value)}")
    if value < at_least:
        raise ValueError(f"{option} must be {at_least} or more, not {shown(value)}")


def check_bool(option: str, value: object) -> None:
    """Raise TypeError unless it is True or False: the "false" of a configuration file would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{option} must be True or False, not {shown(value)}")


def is_true(option: str, value: object) -> bool:
    """Whether it counts as true, where any value is taken. Raises TypeError if it does not say so."""
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(f"{option} must be True or False, not {shown(value)}") from error


def _check_seconds(option: str, value: object, *, positive: bool = False, none_means: str | None = None) -> None:
    remedy = f"; use None {none_means}" if none_means else ""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{option} must be a number of seconds, not {shown(value)}{remedy}")
    # An int may be too great for the floats that clocks reckon in.
    if not 0 <= value <= _GREATEST_FLOAT or (positive and value == 0):
        bound = "greater than 0" if positive else "0 or more"
        raise ValueError(f"{option} must be a finite number of seconds, {bound}, not {shown(value)}{remedy}")


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pool's own options, and the rest, which is psycopg's and libpq's."""
    own = {name: value for name, value in given.items() if name in OPTION_NAMES}
    rest = {name: value for name, value in given.items() if name not in OPTION_NAMES}
    return own, rest


def check_connection_options(given: Mapping[str, Any], connection_class: type, cursor_class: type) -> None:
    """Raise TypeError or ValueError for a wrong one of psycopg's options, which else would fail with a lease or later.

    The classes are psycopg's, of which those given must be subclasses.
    """
    check_connection_class(given.get("connection_class", connection_class), connection_class)
    if given.get("autocommit") is not None:
        check_bool("autocommit", given["autocommit"])
    if given.get("prepare_threshold") is not None:
        _check_int("prepare_threshold", given["prepare_threshold"], at_least=0)
    for option in ("row_factory", "cursor_factory"):
        if (value := given.get(option)) is not None and not callable(value):
            raise TypeError(f"{option} must be a callable, as psycopg's are, not {shown(value)}")
    value = given.get("cursor_factory")
    if isinstance(value, type) and not issubclass(value, cursor_class):
        words = f"cursor_factory must be psycopg.{cursor_class.__name__}, a subclass of it or a function"
        raise TypeError(f"{words}, not {shown(value)}")
    if (context := given.get("context")) is not None and not _has_adapters(context):
        raise TypeError(
            f"context must be an object with psycopg's adapters, such as a connection, not {shown(context)}"
        )


def _has_adapters(context: Any) -> bool:
    try:
        return isinstance(context.adapters, AdaptersMap)
    except Exception:  # noqa: BLE001  # of whatever kind: it has none
        return False


def check_connection_class(connection_class: object, base: type) -> None:
    """Raise TypeError unless it is `base`, psycopg's class, or a subclass of it."""
    if not (isinstance(connection_class, type) and issubclass(connection_class, base)):
        raise TypeError(
            f"connection_class must be psycopg.{base.__name__} or a subclass of it, not {shown(connection_class)}"
        )
