"""No password, whole or in part, in anything that a pool raises, logs, names or shows."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import psycopg
import pytest
from kit.servers import ODD_PASSWORDS
from kit.waiting import eventually
from psycopg.conninfo import make_conninfo

from asyncpool import Pool, PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import PasswordServer

Style = Literal["url", "key=value"]

# Parts of the odd passwords that are also words of the messages or of the conninfo itself.
INNOCENT = {"127.0.0.1", "postgres", "password", "user", "open", "now"}

each_password = pytest.mark.parametrize("user", ODD_PASSWORDS)
each_style = pytest.mark.parametrize("style", ["url", "key=value"])


def traces(password: str) -> set[str]:
    """What would give the password away: itself, its escaped form, and its longer parts."""
    pieces = {piece for piece in re.split(r"[@:/?#&=\s]", password) if len(piece) > 2}
    return {password, quote(password, safe=""), *pieces} - INNOCENT


class Witness:
    """Gathers all that a pool lets be seen."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._log = io.StringIO()
        self.handler = logging.StreamHandler(self._log)
        self.handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))

    def sees_error(self, error: BaseException | None) -> None:
        """The error and all that is chained to it, as a user or a debugger would print them."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            self.texts += [str(error), repr(error), repr(error.args), repr(vars(error))]
            self.texts += traceback.format_exception(error)
            if error.__cause__ is not None:
                self.texts.append(repr(error.__cause__))
            error = error.__context__ or error.__cause__

    def sees_pool(self, pool: Pool[Any]) -> None:
        self.texts += [repr(each) for each in (pool, pool._config, pool._driver, pool._driver._options)]
        self.texts += [repr(each) for each in (pool.stats(), pool.holders(), pool._runner)]
        for task in asyncio.all_tasks():
            self.texts += [task.get_name(), repr(task)]
        if pool._runner is not None:
            for slot in pool._runner.machine.slots():
                self.texts += [repr(slot), repr(slot.resource)]

    def saw(self, password: str) -> list[str]:
        """What it saw of the password."""
        texts = [*self.texts, self._log.getvalue()]
        return sorted(trace for trace in traces(password) if any(trace in text for text in texts))


@contextmanager
def watching(caplog: pytest.LogCaptureFixture) -> Iterator[Witness]:
    witness = Witness()
    caplog.set_level(logging.DEBUG)  # of all loggers
    logging.getLogger().addHandler(witness.handler)
    try:
        yield witness
    finally:
        logging.getLogger().removeHandler(witness.handler)


async def try_everything(make: Any, witness: Witness) -> None:
    """Open it in each way, ask it for a connection, and look at it all the time."""
    try:
        pool = make()
    except (psycopg.Error, TypeError, ValueError) as error:
        witness.sees_error(error)
        return
    for timeout in (0, 0.1):
        opening = asyncio.create_task(pool.open(timeout=timeout))
        while not opening.done():
            witness.sees_pool(pool)
            await asyncio.sleep(0.002)
        witness.sees_error(opening.exception())
        if opening.exception() is None:
            await pool.close()
    await pool.open(wait=False)
    try:
        async with pool.acquire(timeout=0.3) as connection:
            witness.texts += [repr(connection), repr(connection.info), repr(connection.pgconn)]
            witness.sees_pool(pool)
    except PoolError as error:
        witness.sees_error(error)
    witness.sees_pool(pool)
    await pool.close()
    witness.sees_pool(pool)


def misquoted(server: PasswordServer, user: str, style: Style) -> str:
    """The conninfo as somebody writes it who knows nothing of escapes."""
    password = ODD_PASSWORDS[user]
    port = server.embedded.port
    if style == "url":
        return f"postgresql://{user}:{password}@127.0.0.1:{port}/postgres"
    return f"host=127.0.0.1 port={port} user={user} password={password} dbname=postgres"


@each_style
@each_password
async def test_a_pool_that_connects_tells_nothing(
    password_server: PasswordServer, user: str, style: Style, caplog: pytest.LogCaptureFixture
) -> None:
    conninfo = password_server.conninfo(user, style)
    with watching(caplog) as witness:
        await try_everything(lambda: Pool(conninfo, debug=True), witness)
        async with Pool(conninfo) as pool:  # it does connect
            assert pool.stats().idle == 1
            witness.sees_pool(pool)
    assert witness.saw(ODD_PASSWORDS[user]) == []


@each_style
@each_password
async def test_a_password_that_is_refused_is_not_told(
    password_server: PasswordServer, user: str, style: Style, caplog: pytest.LogCaptureFixture
) -> None:
    secret = ODD_PASSWORDS[user] + "-outdated"
    conninfo = password_server.conninfo(user, style, secret)
    with watching(caplog) as witness:
        await try_everything(lambda: Pool(conninfo), witness)
    assert witness.saw(secret) == []
    assert any("password authentication failed" in text for text in witness.texts)


@each_password
async def test_a_password_given_by_keyword_is_not_told(
    password_server: PasswordServer, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    parameters: dict[str, Any] = {**password_server.parameters(user), "dbname": "nowhere"}
    with watching(caplog) as witness:
        await try_everything(lambda: Pool(**parameters), witness)
    assert witness.saw(ODD_PASSWORDS[user]) == []
    assert any('database "nowhere" does not exist' in text for text in witness.texts)


@each_style
@each_password
async def test_a_password_that_was_not_quoted_is_not_told(
    password_server: PasswordServer, user: str, style: Style, caplog: pytest.LogCaptureFixture
) -> None:
    conninfo = misquoted(password_server, user, style)
    with watching(caplog) as witness:
        await try_everything(lambda: Pool(conninfo, connect_timeout=1), witness)
        await try_everything(lambda: Pool(lambda: conninfo, connect_timeout=1), witness)
    assert witness.texts
    assert witness.saw(ODD_PASSWORDS[user]) == []


@pytest.mark.parametrize("password", ["sesame@treasure.invalid/cave", "sesame@treasure.invalid:1/cave?x=cave"])
async def test_a_part_of_a_password_that_passes_for_a_host_name_is_not_told(
    password: str, caplog: pytest.LogCaptureFixture
) -> None:
    conninfo = f"postgresql://app:{password}@127.0.0.1/orders"
    with watching(caplog) as witness:
        await try_everything(lambda: Pool(conninfo, backoff_initial=0.01), witness)
        await try_everything(lambda: Pool(lambda: conninfo, backoff_initial=0.01), witness)
    assert any("***" in text for text in witness.texts)
    assert witness.saw(password) == []


@each_password
async def test_a_password_in_an_option_that_is_misspelt_is_not_told(
    user: str, caplog: pytest.LogCaptureFixture
) -> None:
    password = ODD_PASSWORDS[user]
    misspelt: list[dict[str, Any]] = [{"pasword": password}, {"passwd": password}]
    with watching(caplog) as witness:
        for options in misspelt:
            await try_everything(lambda: Pool("host=127.0.0.1", **options), witness)  # noqa: B023
    assert len(witness.texts) > 1
    assert witness.saw(password) == []


@each_style
@each_password
async def test_where_nobody_answers_nothing_is_told(user: str, style: Style, caplog: pytest.LogCaptureFixture) -> None:
    password = ODD_PASSWORDS[user]
    for host in ("127.0.0.1", "nobody.invalid"):
        if style == "url":
            conninfo = f"postgresql://{user}:{quote(password, safe='')}@{host}:1/postgres"
        else:
            conninfo = make_conninfo(host=host, port=1, user=user, password=password)
        with watching(caplog) as witness:
            await try_everything(lambda: Pool(conninfo, connect_timeout=1), witness)  # noqa: B023
        assert witness.saw(password) == []
        assert any(host in text for text in witness.texts)


async def test_the_loops_debug_mode_tells_nothing(
    password_server: PasswordServer, caplog: pytest.LogCaptureFixture
) -> None:
    user = "with_space"
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0  # it logs every callback and every step of every task
    with watching(caplog) as witness:
        async with Pool(password_server.conninfo(user, "url"), min_size=2) as pool:
            pool.drain()
            await eventually(lambda: pool.stats().idle == 2)
            async with pool.acquire() as connection:
                await connection.execute("select 1")
    loop.set_debug(False)
    assert "asyncpool" in caplog.text
    assert witness.saw(ODD_PASSWORDS[user]) == []
