"""Options: a wrong one is found when the pool is made, before any connection, and the message says what to do."""

from __future__ import annotations

import math
import threading
from typing import Any, get_type_hints

import psycopg
import pytest

from asyncpool import Pool
from asyncpool.config import OPTION_NAMES
from asyncpool.conninfo import CONNECT_OPTIONS
from asyncpool.options import Options

COUNTS = ["min_size", "max_size", "max_waiting", "max_uses", "max_connecting"]
SECONDS = [
    "acquire_timeout",
    "max_lifetime",
    "max_idle",
    "connect_timeout",
    "backoff_initial",
    "backoff_max",
    "check_interval",
    "check_timeout",
    "cancel_timeout",
    "long_held_after",
]
MAY_BE_NONE = {
    "acquire_timeout",
    "max_waiting",
    "max_lifetime",
    "max_idle",
    "max_uses",
    "check_interval",
    "long_held_after",
}
MAY_BE_ZERO = {"min_size", "max_waiting", "acquire_timeout", "check_interval"}


def make(**options: Any) -> Pool[Any]:
    """Without an event loop, and with an address where nobody answers: whatever happens, it is no I/O."""
    return Pool("host=/nowhere", **options)


@pytest.mark.parametrize("option", COUNTS)
@pytest.mark.parametrize("value", [1.0, "1", True, False, float("nan")])
def test_what_counts_is_an_int_and_no_bool(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{option} must be an int, not"):
        make(**{option: value})


@pytest.mark.parametrize("option", SECONDS)
@pytest.mark.parametrize("value", ["1", True, False, [1]])
def test_a_time_is_a_number_of_seconds_and_no_bool(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{option} must be a number of seconds, not"):
        make(**{option: value})


@pytest.mark.parametrize("option", SECONDS)
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, -math.inf])
def test_a_time_is_finite_and_not_negative(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a finite number of seconds"):
        make(**{option: value})


@pytest.mark.parametrize("option", COUNTS)
def test_a_count_is_not_negative(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be [01] or more, not -1"):
        make(**{option: -1})


@pytest.mark.parametrize("option", COUNTS + SECONDS)
def test_zero_is_refused_where_it_makes_no_sense(option: str) -> None:
    if option in MAY_BE_ZERO:
        make(**{option: 0})
    else:
        with pytest.raises(ValueError, match=option):
            make(**{option: 0})


@pytest.mark.parametrize("option", COUNTS + SECONDS)
def test_none_is_refused_where_it_makes_no_sense(option: str) -> None:
    if option in MAY_BE_NONE:
        make(**{option: None})
    else:
        with pytest.raises(TypeError, match=option):
            make(**{option: None})


@pytest.mark.parametrize("option", sorted(MAY_BE_NONE - set(COUNTS)))
def test_who_wants_an_endless_time_is_told_of_none(option: str) -> None:
    with pytest.raises(ValueError, match="use None"):
        make(**{option: math.inf})


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="min_size=11 is greater than max_size=10"):
        make(min_size=11)
    with pytest.raises(ValueError, match="backoff_initial=2 is greater than backoff_max=1"):
        make(backoff_initial=2, backoff_max=1)


@pytest.mark.parametrize(("min_size", "max_size"), [(3, 2), (-1, 2), (0, 0), (True, 2), (0, 2.0), (None, 2)])
def test_a_resize_is_as_strict_and_changes_nothing_then(min_size: Any, max_size: Any) -> None:
    pool = make(min_size=1, max_size=4)
    with pytest.raises((TypeError, ValueError), match="_size"):
        pool.resize(min_size, max_size)
    assert (pool.stats().min_size, pool.stats().max_size) == (1, 4)


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("maxsize", "max_size"),
        ("max_lifetimes", "max_lifetime"),
        ("aquire_timeout", "acquire_timeout"),
        ("pasword", "password"),
        ("autocomit", "autocommit"),
        ("database", "dbname"),
        ("timeout", "acquire_timeout"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known(given: str, suggested: str) -> None:
    with pytest.raises(TypeError, match=f"'{given}': did you mean '{suggested}'"):
        make(**{given: "x"})


def test_an_option_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'xyzzy'$"):
        make(xyzzy=1)


@pytest.mark.parametrize(
    ("conninfo", "words"),
    [
        ("host", 'missing "="'),
        ("host=/nowhere port=no", "port"),
        ("colour=blue", "option"),
        ("postgresql://[::1", "matching"),
        ("host=/nowhere sslmode=perhaps", "sslmode"),
    ],
)
def test_a_malformed_conninfo_is_refused_in_libpqs_words(conninfo: str, words: str) -> None:
    with pytest.raises(psycopg.ProgrammingError, match=words):
        Pool(conninfo)


@pytest.mark.parametrize("conninfo", [None, 5, b"host=/nowhere", {"host": "/nowhere"}])
def test_a_conninfo_is_a_str_or_a_callable(conninfo: Any) -> None:
    with pytest.raises(TypeError, match="conninfo must be a str or a callable"):
        Pool(conninfo)


@pytest.mark.parametrize("option", ["configure", "check", "setup"])
def test_a_callback_is_callable(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be a callable"):
        make(**{option: "select 1"})


@pytest.mark.parametrize("reset", ["session ", "all", None, 1])
def test_reset_is_one_of_three_or_a_callable(reset: Any) -> None:
    with pytest.raises(ValueError, match="reset must be 'rollback', 'session', 'discard' or a callable"):
        make(reset=reset)


@pytest.mark.parametrize("connection_class", [psycopg.Connection, object, "AsyncConnection"])
def test_a_connection_class_is_psycopgs_asynchronous_one(connection_class: Any) -> None:
    with pytest.raises(TypeError, match=r"connection_class must be psycopg\.AsyncConnection"):
        make(connection_class=connection_class)


@pytest.mark.parametrize("name", ["", None, 1])
def test_a_name_is_a_str_that_says_something(name: Any) -> None:
    with pytest.raises(TypeError, match="name must be a non-empty str"):
        make(name=name)


def test_every_pool_has_a_name_of_its_own() -> None:
    assert make().name != make().name
    assert make(name="orders").name == "orders"


def test_making_a_pool_does_nothing_else() -> None:
    threads = threading.enumerate()
    pool = make(min_size=5)
    assert threading.enumerate() == threads
    assert pool.stats().size == 0
    assert "closed" in repr(pool)


def test_type_checkers_know_every_option_of_the_pool_and_none_that_it_refuses() -> None:
    typed = set(get_type_hints(Options))
    assert typed >= OPTION_NAMES
    assert typed <= OPTION_NAMES | CONNECT_OPTIONS
