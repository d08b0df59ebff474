"""Values that nobody should give to anything, and how many of them to try."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any

import psycopg
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable

# `nox -s fuzz` sets it: so many times as many examples, and others each time.
FACTOR = int(os.environ.get("ASYNCPOOL_FUZZ_FACTOR", "1"))


def fuzzing(examples: int, **more: Any) -> settings:
    """The same examples in every run of the suite; more and random ones in a longer run, which prints its seed."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        **more,
    )


class BadRepr:
    def __repr__(self) -> str:
        raise LookupError("repr")

    __str__ = __repr__


class BadEquality:
    def __eq__(self, other: object) -> bool:
        raise LookupError("eq")

    def __hash__(self) -> int:
        return 1


class BadHash:
    def __hash__(self) -> int:
        raise LookupError("hash")


class BadTruth:
    def __bool__(self) -> bool:
        raise LookupError("bool")


class BadAttributes:
    def __getattr__(self, name: str) -> object:
        raise LookupError(name)


class BadText(str):
    """Equal to nothing, not even to be asked."""

    def __eq__(self, other: object) -> bool:
        raise LookupError("eq")

    __hash__ = str.__hash__


def nested(depth: int) -> list[Any]:
    """Lists in lists, deeper than repr() goes."""
    innermost: list[Any] = []
    for _ in range(depth):
        innermost = [innermost]
    return innermost


NASTY: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "-0.5": -0.5,
    "0": 0,
    "a float": 2.5,
    "the greatest float": 1.7e308,
    "more than a lock can wait": 1e12,
    "an int of 100 bits": 2**100,
    "an int beyond floats": 10**400,
    "an int beyond texts": 10**5000,
    "as much below": -(10**5000),
    "a complex number": 1j,
    "empty text": "",
    "text": "x",
    "text with NUL": "a\0b",
    "text with a lone surrogate": "\ud800",
    "text with a line break": "a\nb",
    "long text": "x" * 100_000,
    "text with an equality of its own": BadText("x"),
    "bytes": b"x",
    "bytes that are no text": b"\xff\0",
    "list": [1],
    "tuple": (),
    "dict": {},
    "a nest of lists": nested(5000),
    "object": object(),
    "repr raises": BadRepr(),
    "eq raises": BadEquality(),
    "hash raises": BadHash(),
    "bool raises": BadTruth(),
    "attributes raise": BadAttributes(),
    "an exception": ValueError("x"),
    "a class": int,
    "a function": len,
    "Ellipsis": ...,
    "NotImplemented": NotImplemented,
}

# Functions, so that a type checker draws no conclusion about what is to be given all the same.


def is_time(value: object) -> bool:
    """Whether it does for a timeout."""
    return value is None or (type(value) in (int, float) and 0 <= value <= sys.float_info.max)  # type: ignore[operator]


def is_bool(value: object) -> bool:
    return isinstance(value, bool)


def is_size(value: object, least: int, greatest: float = math.inf) -> bool:
    """Whether it is an int within these."""
    return type(value) is int and least <= value <= greatest


def is_none(value: object) -> bool:
    return value is None


Clear = (TypeError, ValueError, psycopg.ProgrammingError)


def refusal(call: Callable[[], object], *names: str) -> Exception | None:
    """How a call refuses its arguments: clearly, in words that have one of the names; None if it does not."""
    try:
        call()
    except Clear as error:
        check_clear(error, *names)
        return error
    return None


def check_clear(error: BaseException, *names: str) -> None:
    """Fail unless the error is one that helps."""
    assert isinstance(error, Clear), repr(error)
    assert not isinstance(error, UnicodeError), repr(error)
    assert any(name in str(error) for name in names), f"{names} not in {error!s}"
    assert len(str(error)) < 400
