"""What a user gets to see when the pool cannot connect: the right error, at the right time, in the server's words."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually
from psycopg import sql
from psycopg.conninfo import make_conninfo

from asyncpool import Pool, PoolClosed, PoolError, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from kit.servers import Admin, PasswordServer
    from psycopg import AsyncConnection

    from asyncpool.cli.embedded import EmbeddedServer

LONG = 300.0
PATIENCE = 15.0  # what was given LONG and is over before then was over "at once"
UNKNOWN_HOST = "nobody.invalid"  # RFC 2606: no such name, ever


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses: bound, so that nobody else gets it, but nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def rotating(password_server: PasswordServer, application_name: str) -> Iterator[Rotating]:
    with psycopg.connect(password_server.embedded.dsn(), autocommit=True) as admin:
        yield Rotating(password_server, admin, application_name)


class Rotating:
    """A role whose password changes."""

    def __init__(self, server: PasswordServer, admin: psycopg.Connection[Any], application_name: str) -> None:
        self._admin = admin
        self._role = application_name
        self._parameters = {
            **server.parameters("with_space"),
            "user": self._role,
            "application_name": application_name,
        }
        self.asked = 0
        self.password = "first"
        admin.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(self._role)))
        admin.execute(sql.SQL("create role {} login password 'first'").format(sql.Identifier(self._role)))

    def rotate(self, password: str) -> None:
        statement = sql.SQL("alter role {} password {}")
        self._admin.execute(statement.format(sql.Identifier(self._role), sql.Literal(password)))

    def conninfo(self) -> str:
        self.asked += 1
        return make_conninfo("", **{**self._parameters, "password": self.password})


async def fails_to_open(pool: Pool[Any], error: type[BaseException], words: str, **options: Any) -> BaseException:
    """What `open()` raises; after it the pool is closed."""
    with pytest.raises(error, match=words) as caught:
        async with asyncio.timeout(PATIENCE):
            await pool.open(**options)
    assert "closed" in repr(pool)
    with pytest.raises(PoolClosed):
        await pool.acquire()
    return caught.value


# --- final errors -------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_wrong_password_is_told_at_once(password_server: PasswordServer) -> None:
    parameters: dict[str, Any] = {**password_server.parameters("with_space"), "password": "wrong"}
    pool = Pool(**parameters, min_size=3, acquire_timeout=LONG)
    words = 'password authentication failed for user "with_space"'
    await fails_to_open(pool, psycopg.errors.InvalidPassword, words)


@on_both_loops
async def test_an_unknown_database_is_told_at_once(dsn: str) -> None:
    pool = Pool(dsn, dbname="nowhere", acquire_timeout=LONG)
    await fails_to_open(pool, psycopg.OperationalError, 'database "nowhere" does not exist')


async def test_an_unknown_role_is_told_at_once(dsn: str) -> None:
    pool = Pool(dsn, user="nobody_at_all", acquire_timeout=LONG)
    await fails_to_open(pool, psycopg.OperationalError, 'role "nobody_at_all" does not exist|authentication failed')


async def test_without_waiting_a_final_error_is_told_to_who_asks_for_a_connection(dsn: str) -> None:
    pool = Pool(dsn, dbname="nowhere", acquire_timeout=LONG)
    await pool.open(wait=False)
    with pytest.raises(PoolError, match='database "nowhere" does not exist') as error:
        await pool.acquire()
    assert not isinstance(error.value, TimeoutError)
    assert isinstance(error.value.__cause__, psycopg.OperationalError)
    await pool.close()


async def test_a_final_error_fails_who_waits_only_if_there_is_no_connection(rotating: Rotating) -> None:
    async with Pool(rotating.conninfo, min_size=1, max_size=2, acquire_timeout=LONG) as pool:
        rotating.rotate("second")
        leased = await pool.acquire()
        waiting = asyncio.ensure_future(pool.acquire())
        await eventually(lambda: pool.stats().connect_errors > 0)
        assert not waiting.done()  # there is one that will come back
        await pool.release(leased)
        await pool.release(await waiting)
        pool.drain()
        with pytest.raises(PoolError, match="password authentication failed"):
            await pool.acquire()


@on_both_loops
async def test_the_event_loop_that_psycopg_cannot_use_is_refused_with_advice(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "ProactorEventLoop", type(asyncio.get_running_loop()), raising=False)
    with pytest.raises(psycopg.InterfaceError, match=r"ProactorEventLoop.*SelectorEventLoop"):
        await Pool(dsn).open()


# --- errors that may pass -----------------------------------------------------------------------------------


@on_both_loops
async def test_a_refused_port_is_tried_again_until_the_timeout(closed_port: int) -> None:
    pool = Pool(host="127.0.0.1", port=closed_port, backoff_initial=0.01)
    error = await fails_to_open(pool, PoolTimeout, "1 s.*refused", timeout=1)
    assert isinstance(error.__cause__, psycopg.OperationalError)
    assert "refused" in str(error.__cause__)
    assert pool.stats().connect_errors > 1


async def test_acquire_timeout_is_what_open_waits_if_nothing_else_is_said(closed_port: int) -> None:
    pool = Pool(host="127.0.0.1", port=closed_port, acquire_timeout=0.7)
    await fails_to_open(pool, PoolTimeout, "0.7 s.*refused")


@on_both_loops
async def test_a_refused_port_without_waiting_is_its_own_error_after_one_try(closed_port: int) -> None:
    pool = Pool(host="127.0.0.1", port=closed_port)
    error = await fails_to_open(pool, psycopg.OperationalError, "refused", timeout=0)
    assert not isinstance(error, PoolError)
    assert pool.stats().connect_errors == 1


async def test_an_unknown_host_is_tried_again_until_the_timeout() -> None:
    pool = Pool(host=UNKNOWN_HOST, backoff_initial=0.01, backoff_max=0.01)
    error = await fails_to_open(pool, PoolTimeout, UNKNOWN_HOST, timeout=1)
    assert isinstance(error.__cause__, psycopg.OperationalError)


async def test_an_unknown_host_without_waiting_is_its_own_error() -> None:
    error = await fails_to_open(Pool(host=UNKNOWN_HOST), psycopg.OperationalError, UNKNOWN_HOST, timeout=0)
    assert not isinstance(error, PoolError)


@on_both_loops
async def test_a_look_up_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, proceed = threading.Event(), threading.Event()

    def hang(*args: Any, **options: Any) -> Any:
        begun.set()
        proceed.wait(LONG)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        await fails_to_open(Pool(host="slow.example"), PoolTimeout, "0.7 s", timeout=0.7)
        assert begun.is_set()
        lookups = [thread for thread in threading.enumerate() if "look up" in thread.name]
        assert lookups
        assert all(thread.daemon for thread in lookups)  # the interpreter's exit does not wait for them
    finally:
        proceed.set()
    await eventually(lambda: not any("look up" in thread.name for thread in threading.enumerate()))


@on_both_loops
async def test_a_server_that_does_not_answer_is_given_up_after_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pool = Pool(host="127.0.0.1", port=silent.getsockname()[1], connect_timeout=0.1, check_timeout=0.1)
        await fails_to_open(pool, psycopg.errors.ConnectionTimeout, "timeout expired after 0.1 s", timeout=0)


@on_both_loops
async def test_open_waits_for_ever_for_a_server_that_is_down_and_can_be_cancelled(
    private_server: EmbeddedServer, private_dsn: str
) -> None:
    pool = Pool(private_dsn, min_size=2, acquire_timeout=0.01, backoff_initial=0.01)
    await asyncio.to_thread(private_server.stop)
    opening = asyncio.create_task(pool.open(timeout=None))
    await eventually(lambda: pool.stats().connect_errors > 2)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert "closed" in repr(pool)
    opening = asyncio.create_task(pool.open(timeout=None))
    await eventually(lambda: pool.stats().connect_errors > 2)
    assert not opening.done()
    await asyncio.to_thread(private_server.start)
    await opening
    assert pool.stats().idle == 2
    await pool.close()


async def test_too_many_connections_for_the_role_may_pass(password_server: PasswordServer, rotating: Rotating) -> None:
    with psycopg.connect(password_server.embedded.dsn(), autocommit=True) as admin:
        role = rotating._role
        admin.execute(sql.SQL("alter role {} connection limit 2").format(sql.Identifier(role)))
        pool = Pool(rotating.conninfo, min_size=3, backoff_initial=0.01)
        error = await fails_to_open(pool, PoolTimeout, "too many connections for role", timeout=1.5)
        assert isinstance(error.__cause__, psycopg.OperationalError)
        admin.execute(sql.SQL("alter role {} connection limit 3").format(sql.Identifier(role)))
        async with pool:
            assert pool.stats().idle == 3


# --- conninfo from a callable -------------------------------------------------------------------------------


def asking(answer: Callable[[], str], style: str) -> Callable[[], str | Awaitable[str]]:
    async def asynchronous() -> str:
        await asyncio.sleep(0)
        return answer()

    return asynchronous if style == "async" else answer


@pytest.mark.parametrize("style", ["sync", "async"])
async def test_a_password_that_rotates_is_asked_for_at_every_connect(rotating: Rotating, style: str) -> None:
    async with Pool(asking(rotating.conninfo, style), min_size=2) as pool:
        assert rotating.asked == 2
        rotating.rotate("second")
        rotating.password = "second"
        pool.drain()
        await eventually(lambda: pool.stats().idle == 2)
        assert rotating.asked == 4
        assert pool.stats().connect_errors == 0


async def test_a_password_that_was_late_to_rotate_heals_by_itself(rotating: Rotating) -> None:
    async with Pool(rotating.conninfo, min_size=1, backoff_initial=0.01) as pool:
        rotating.rotate("second")
        pool.drain()
        await eventually(lambda: pool.stats().connect_errors > 0)
        rotating.password = "second"
        await eventually(lambda: pool.stats().idle == 1)


@asynccontextmanager
async def failing_then(answer: str, failure: BaseException) -> AsyncIterator[Callable[[], str]]:
    failures = 2

    def conninfo() -> str:
        nonlocal failures
        if failures:
            failures -= 1
            raise failure
        return answer

    yield conninfo
    assert failures == 0


async def test_a_callable_that_raises_is_asked_again(dsn: str) -> None:
    async with failing_then(dsn, ConnectionError("vault is sealed")) as conninfo:
        pool = Pool(conninfo, backoff_initial=0.01)
        # Its words are not repeated: they may hold the password that it was about to return.
        await fails_to_open(pool, psycopg.OperationalError, "callable raised ConnectionError$", timeout=0)
        async with pool:
            assert pool.stats().idle == 1


async def test_a_callable_that_hangs_is_given_up_after_connect_timeout() -> None:
    async def conninfo() -> str:
        await asyncio.sleep(LONG)
        raise AssertionError

    await fails_to_open(Pool(conninfo, connect_timeout=0.1), psycopg.OperationalError, "conninfo", timeout=0)


async def test_what_a_callable_returns_is_checked_like_a_string() -> None:
    pool = Pool(lambda: "host", acquire_timeout=LONG)
    await fails_to_open(pool, psycopg.ProgrammingError, 'missing "="')


@pytest.mark.parametrize("answer", [None, b"host=localhost", 1])
async def test_a_callable_that_returns_something_else_is_told_so_at_once(answer: Any) -> None:
    pool = Pool(lambda: answer, acquire_timeout=LONG)
    await fails_to_open(pool, TypeError, f"conninfo.*str.*{type(answer).__name__}")


# --- nothing is left ----------------------------------------------------------------------------------------


async def test_an_open_that_fails_leaves_no_session(dsn: str, admin: Admin, application_name: str) -> None:
    configured = 0

    async def configure(connection: AsyncConnection[Any]) -> None:
        nonlocal configured
        configured += 1
        if configured == 3:
            raise ValueError("enough")

    pool = Pool(dsn, min_size=5, configure=configure)
    await fails_to_open(pool, ValueError, "enough")
    assert admin.sessions(application_name) == 0
    with suppress(PoolClosed):
        await pool.close()
