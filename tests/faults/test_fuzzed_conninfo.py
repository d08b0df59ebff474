"""A password anywhere in a connection string, whole or broken: no error, log, repr or chain of a pool tells it, and
what is wrong with the string is told when the pool is made.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from unittest import mock
from urllib.parse import quote

import psycopg
from hypothesis import example, given
from hypothesis import strategies as st
from kit.nasty import fuzzing
from psycopg import OperationalError
from psycopg.conninfo import conninfo_attempts

from asyncpool import Pool, SyncPool
from asyncpool._io import driver
from asyncpool.psycopg2.pool import ThreadedConnectionPool

if TYPE_CHECKING:
    from collections.abc import Iterator

# No part of it is in any other text.
MARK = "Zq7xW9kPvJ4"

# What surrounds a password, or breaks what does.
JUNK = st.lists(
    st.sampled_from(
        [
            *"@:/?#&=,;%'\"\\[] \t\n",
            "%zz",
            "%40",
            "%00",
            "\ud800",
            "\0",
            "é",
            "a",
            "host=",
            "port=1",
            "user=u",
            "//",
            "''",
        ]
    ),
    max_size=5,
).map("".join)

# %(p)s is the password. Whatever is put at %(a)s and %(b)s, it stands in the place of one.
URLS = [
    "postgresql://app:%(p)s@127.0.0.1:1/orders%(a)s",
    "postgresql://app:%(a)s%(p)s%(b)s@127.0.0.1:1/orders",
    "postgres://app:%(p)s%(a)s@127.0.0.1:1,127.0.0.1:2/orders?sslmode=disable%(b)s",
    "postgresql://127.0.0.1:1/orders?password=%(p)s%(a)s",
    "postgresql://127.0.0.1:1/orders?user=app&password=%(p)s&%(a)s",
    "postgresql://127.0.0.1:1/orders?sslpassword=%(p)s&application_name=%(a)s",
    "postgresql+psycopg2://app:%(p)s%(a)s@db/orders",
    "jdbc:postgresql://app:%(p)s@db%(a)s",
]
KEYWORDS = [
    "host=127.0.0.1 port=1 password=%(p)s %(a)s",
    "host=127.0.0.1 port=1 password='%(p)s%(a)s' %(b)s",
    "%(a)s host=127.0.0.1 port=1 password = '%(p)s' %(b)s",
    "host=127.0.0.1 port=1 sslpassword=%(p)s sslmode=%(a)s",
    "host=127.0.0.1 port=1 password=%(p)s%(a)s",
    "host=127.0.0.1 port=1 password=%(p)s\\%(a)s dbname=x",
    "password=%(p)s",
    "host=127.0.0.1 port=1 user=app pasword=%(p)s",
    "host=127.0.0.1 port=1 dbname='postgresql://app:%(p)s@db/x%(a)s'",
]

PASSWORDS = st.tuples(JUNK, st.just(MARK), JUNK).map("".join)


def look_up(params: Any) -> Any:
    """As psycopg does it where no name is known; there is nobody to ask for junk."""
    host = str(params.get("host", ""))
    if not host.startswith(("/", "127.0.0.1")):
        raise OperationalError(f"failed to resolve host {host!r}: [Errno -2] Name or service not known")
    return conninfo_attempts(params)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    todo = [error]
    while todo:
        error = todo.pop()
        if error is not None and error not in seen:
            seen.append(error)
            todo += [error.__cause__, error.__context__]
            yield error


class Witness:
    def __init__(self) -> None:
        self.log = io.StringIO()
        self.texts: list[str] = []

    def sees(self, *things: object) -> None:
        for thing in things:
            for each in chain(thing) if isinstance(thing, BaseException) else [thing]:
                self.texts += [repr(each), str(each)]
                if isinstance(each, BaseException):
                    self.texts += [repr(vars(each)), repr(each.args), *traceback.format_exception_only(each)]

    def check(self) -> None:
        for text in [*self.texts, self.log.getvalue()]:
            for part in (MARK, MARK[:4], MARK[-4:]):
                assert part not in text, text


def try_it(make: Any, *, is_parsed_at_once: bool) -> None:
    """Make a pool, open it, and look at all that it shows."""
    witness = Witness()
    handler = logging.StreamHandler(witness.log)
    handler.setFormatter(logging.Formatter("%(message)s %(args)s"))
    loggers = [logging.getLogger("asyncpool"), logging.getLogger("asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        asyncio.run(go_through(make, witness, is_parsed_at_once))
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    witness.check()


async def go_through(make: Any, witness: Witness, is_parsed_at_once: bool) -> None:
    try:
        pool = make()
    except (TypeError, ValueError, psycopg.ProgrammingError) as error:
        witness.sees(error)
        return
    try:
        await pool.open(timeout=0)
    except psycopg.Error as error:
        witness.sees(error)
        assert not (is_parsed_at_once and isinstance(error, psycopg.ProgrammingError)), repr(error)
    await pool.open(wait=False)
    try:
        await pool.acquire(timeout=0.005)
    except psycopg.Error as error:
        witness.sees(error)
    witness.sees(pool, pool.stats(), pool._driver, pool._config, pool._runner, *pool._runner.machine.slots())
    await pool.close()
    witness.sees(pool)


conninfos = st.builds(
    lambda template, password, a, b: template % {"p": password, "a": a, "b": b},
    st.sampled_from(URLS + KEYWORDS),
    st.one_of(st.just(MARK), PASSWORDS, PASSWORDS.map(lambda text: quote(text, safe="", errors="replace"))),
    JUNK,
    JUNK,
)


@fuzzing(250)
@given(conninfo=conninfos)
@example("host=127.0.0.1 port=1 password=x sslmode='" + MARK + "\n'")
@example("postgresql://127.0.0.1:1/orders?sslmode=" + MARK + "%0a")
def test_no_password_in_a_conninfo_is_told(conninfo: str) -> None:
    with_patch(lambda: try_it(lambda: Pool(conninfo, connect_timeout=1), is_parsed_at_once=True))


@fuzzing(100)
@given(conninfo=conninfos)
def test_none_that_a_callable_returns_is_told(conninfo: str) -> None:
    with_patch(lambda: try_it(lambda: Pool(lambda: conninfo, connect_timeout=1), is_parsed_at_once=False))


@fuzzing(100)
@given(
    password=PASSWORDS,
    option=st.sampled_from(["password", "sslpassword", "pasword", "passwd"]),
    more=st.fixed_dictionaries({}, optional={"user": JUNK, "dbname": JUNK, "application_name": JUNK, "sslmode": JUNK}),
)
def test_none_that_is_a_keyword_is_told(password: str, option: str, more: dict[str, Any]) -> None:
    options: dict[str, Any] = {"host": "127.0.0.1", "port": 1, option: password, **more}
    with_patch(lambda: try_it(lambda: Pool(**options), is_parsed_at_once=True))


@fuzzing(60)
@given(conninfo=conninfos)
def test_none_is_told_by_the_blocking_pools(conninfo: str) -> None:
    def try_each() -> None:
        witness = Witness()
        for make in (
            lambda: SyncPool(conninfo).open(timeout=0),
            lambda: ThreadedConnectionPool(1, 2, conninfo),
            lambda: ThreadedConnectionPool(conninfo, 1, 2),  # a mistake
        ):
            try:
                make()
            except (TypeError, ValueError, psycopg.Error) as error:
                witness.sees(error)
        assert witness.texts
        witness.check()

    with_patch(try_each)


def with_patch(work: Any) -> None:
    """Without a question to a name server."""
    with mock.patch.object(driver, "conninfo_attempts", look_up):
        work()


def test_a_long_word_is_not_looked_through_again_and_again() -> None:
    began = time.monotonic()
    for conninfo in ("x" * 100_000, "host=/x password=" + "x" * 100_000, "postgresql:" + "x" * 100_000):
        with suppress(psycopg.ProgrammingError):
            Pool(conninfo)
    assert time.monotonic() - began < 10  # it was half a minute each


def test_what_libpq_repeats_of_a_value_with_several_lines_is_masked() -> None:
    for option in ("sslmode", "target_session_attrs", "ssl_min_protocol_version"):
        options: Any = {option: f"{MARK}\nx"}
        try:
            Pool("host=127.0.0.1", **options)
        except psycopg.ProgrammingError as error:
            assert MARK not in str(error)
            assert option in str(error)
        else:
            raise AssertionError
