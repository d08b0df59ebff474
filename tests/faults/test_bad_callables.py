"""`configure`, `check`, `setup`, `reset` and `conninfo` that raise or return what nobody expects: told whose it is, and
the pool goes on.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.nasty import NASTY, BadRepr
from kit.waiting import eventually, eventually_blocking

from asyncpool import CloseReason, Pool, PoolError, SyncPool

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise LookupError("str")


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


RAISED: dict[str, BaseException] = {
    "CancelledError": asyncio.CancelledError(),
    "GeneratorExit": GeneratorExit(),
    "StopIteration": StopIteration(1),
    "StopAsyncIteration": StopAsyncIteration(),
    "BaseException": BaseException("mine"),
    "ExceptionGroup": ExceptionGroup("mine", [ValueError(), psycopg.OperationalError()]),
    "BaseExceptionGroup": BaseExceptionGroup("mine", [GeneratorExit()]),
    "TimeoutError": TimeoutError("mine"),
    "RecursionError": RecursionError(),
    "InterfaceError": psycopg.InterfaceError("the connection is closed"),
    "an error of the pool": PoolError("mine"),
    "Unprintable": Unprintable(),
    "Frozen": Frozen("mine"),
    "an error with an odd argument": ValueError(BadRepr()),
}
FOR_THE_PROCESS: dict[str, BaseException] = {"SystemExit": SystemExit(3), "KeyboardInterrupt": KeyboardInterrupt()}

OPTIONS = ["configure", "check", "setup", "reset", "conninfo"]
each_option = pytest.mark.parametrize("option", OPTIONS)
each_error = pytest.mark.parametrize("raised", RAISED)


class Misdeed:
    """Raises the first time, if it is armed; returns what is well from then on."""

    def __init__(self, error: BaseException, answer: Any = None) -> None:
        self.error: BaseException | None = error
        self.answer = answer
        self.calls = 0

    def __call__(self, *_: object) -> Any:
        self.calls += 1
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.answer


class AsyncMisdeed(Misdeed):
    async def __call__(self, *_: object) -> Any:
        return super().__call__()


def options_for(option: str, misdeed: Misdeed, dsn: str) -> dict[str, Any]:
    if option == "conninfo":
        misdeed.answer = dsn
    conninfo = misdeed if option == "conninfo" else dsn
    common = {"conninfo": conninfo, "min_size": 0, "max_size": 1, "check_interval": 0, "backoff_initial": 0.01}
    return common | ({option: misdeed} if option != "conninfo" else {})


def says_whose(error: BaseException, option: str) -> bool:
    """In its words, or in a note on an error of the user's own."""
    texts = [*getattr(error, "__notes__", ())]
    with suppress(LookupError):
        texts.append(str(error))
    return any(option in text for text in texts)


@each_option
@each_error
async def test_whatever_a_callable_raises_the_pool_goes_on(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture, option: str, raised: str
) -> None:
    caplog.set_level(logging.DEBUG, "asyncpool")
    misdeed = AsyncMisdeed(RAISED[raised])
    async with Pool(**options_for(option, misdeed, dsn)) as pool:
        for attempt in range(2):
            try:
                async with pool.acquire(timeout=10) as conn:
                    await conn.execute("select 1")
            except Exception as error:  # noqa: BLE001  # whatever it is, it says whose it is
                assert attempt == 0
                assert option in ("configure", "setup")
                assert raised == "Frozen" or says_whose(error, option)
        await eventually(lambda: pool.stats().idle == 1)
        assert misdeed.calls >= (1 if option == "check" else 2)  # a fresh connection is not checked
        assert admin.sessions(application_name) == pool.stats().size == 1
        assert (pool.stats().leased, pool.stats().waiting) == (0, 0)
        if option != "setup":
            assert option in caplog.text or raised == "Frozen"


@each_option
@each_error
def test_whatever_a_blocking_callable_raises_the_pool_goes_on(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture, option: str, raised: str
) -> None:
    caplog.set_level(logging.DEBUG, "asyncpool")
    misdeed = Misdeed(RAISED[raised])
    with SyncPool(**options_for(option, misdeed, dsn)) as pool:
        for attempt in range(2):
            try:
                with pool.acquire(timeout=10) as conn:
                    conn.execute("select 1")
            except Exception as error:  # noqa: BLE001  # as above
                assert attempt == 0
                assert option in ("configure", "setup")
                assert raised == "Frozen" or says_whose(error, option)
        eventually_blocking(lambda: pool.stats().idle == 1)
        assert misdeed.calls >= (1 if option == "check" else 2)  # a fresh connection is not checked
        assert admin.sessions(application_name) == pool.stats().size == 1
        assert (pool.stats().leased, pool.stats().waiting) == (0, 0)
        if option != "setup":
            assert option in caplog.text or raised == "Frozen"


@pytest.mark.parametrize("option", ["configure", "conninfo"])
@each_error
@pytest.mark.parametrize("timeout", [0, 5])
async def test_open_tells_what_was_raised_and_does_not_hang(dsn: str, option: str, raised: str, timeout: int) -> None:
    misdeed = AsyncMisdeed(RAISED[raised])
    options: Any = options_for(option, misdeed, dsn) | {"min_size": 1}
    pool = Pool(**options)
    if option == "conninfo" and timeout:  # worth another try
        await asyncio.wait_for(pool.open(timeout=timeout), 10)
    else:
        with pytest.raises(Exception) as caught:  # the user's own
            await asyncio.wait_for(pool.open(timeout=timeout), 10)
        assert not isinstance(caught.value, asyncio.TimeoutError) or raised == "TimeoutError"
        assert raised == "Frozen" or says_whose(caught.value, option)
        assert pool.stats().size == 0
        await asyncio.wait_for(pool.open(), 10)
    assert pool.stats().idle == 1
    await pool.close()


async def test_open_that_is_to_try_once_tells_that_its_task_was_cancelled(dsn: str) -> None:
    connecting: list[asyncio.Task[Any]] = []

    async def conninfo() -> str:
        task = asyncio.current_task()
        assert task is not None
        connecting.append(task)
        await asyncio.Event().wait()
        return dsn

    pool = Pool(conninfo)
    opening = asyncio.create_task(pool.open(timeout=0))
    await eventually(lambda: connecting)
    connecting[0].cancel()
    with pytest.raises(psycopg.OperationalError, match="the pool's task that connects was cancelled"):
        await asyncio.wait_for(opening, 10)


@pytest.mark.parametrize("option", ["configure", "check", "setup", "reset"])
@pytest.mark.parametrize("raised", FOR_THE_PROCESS)
def test_what_is_meant_for_the_process_ends_the_event_loop_and_leaves_nothing(
    dsn: str, admin: Admin, application_name: str, option: str, raised: str
) -> None:
    misdeed = AsyncMisdeed(FOR_THE_PROCESS[raised])

    async def work() -> None:
        async with Pool(**options_for(option, misdeed, dsn)) as pool:
            for _ in range(2):
                async with pool.acquire(timeout=10) as conn:
                    await conn.execute("select 1")

    with pytest.raises(type(FOR_THE_PROCESS[raised])):
        asyncio.run(work())
    eventually_blocking(lambda: admin.sessions(application_name) == 0)


async def test_what_a_conninfo_callable_returns_is_checked(dsn: str) -> None:
    answer: Any = None
    pool = Pool(lambda: answer, acquire_timeout=5)
    blocking = SyncPool(lambda: answer, acquire_timeout=5)
    for name, value in NASTY.items():
        if name == "empty text":  # that is libpq's defaults
            continue
        answer = value
        with pytest.raises((TypeError, psycopg.ProgrammingError), match=r"conninfo|connection info|connection param"):
            await asyncio.wait_for(pool.open(timeout=0), 10)
        with pytest.raises((TypeError, psycopg.ProgrammingError), match=r"conninfo|connection info|connection param"):
            blocking.open(timeout=0)
        assert pool.stats().size == blocking.stats().size == 0


async def test_what_else_a_callable_returns_is_refused_unless_it_can_be_awaited(dsn: str) -> None:
    answer: Any = None
    pool = Pool(dsn, configure=lambda conn: answer)
    blocking = SyncPool(dsn, configure=lambda conn: answer)
    for value in NASTY.values():
        answer = value
        with pytest.raises(TypeError, match="must be async") as caught:
            await pool.open(timeout=0)
        assert says_whose(caught.value, "configure")
        with blocking:  # nobody looks at it there
            blocking.putconn(blocking.getconn())


class OddAwaitable:
    """Fails when it is awaited, in one way or another."""

    def __init__(self, way: object) -> None:
        self.way = way

    def __await__(self) -> Any:
        return self.way


@pytest.mark.parametrize("way", [None, 1, "text", iter([1]), iter([object()])], ids=lambda way: type(way).__name__)
async def test_an_awaitable_that_is_none_is_an_error_as_any(dsn: str, way: object) -> None:
    pool = Pool(dsn, configure=lambda conn: OddAwaitable(way))
    with pytest.raises((TypeError, RuntimeError)) as caught:
        await asyncio.wait_for(pool.open(timeout=0), 10)
    assert inspect.isawaitable(OddAwaitable(way))
    assert says_whose(caught.value, "configure") or "Task got bad yield" in str(caught.value)
    assert pool.stats().size == 0


async def test_a_callable_that_is_cancelled_from_outside_is_cancelled(dsn: str) -> None:
    entered = asyncio.Event()

    async def setup(_: object) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with Pool(dsn, max_size=1, setup=setup) as pool:
        task = asyncio.ensure_future(pool.acquire())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.stats().leased == 0
        await eventually(lambda: pool.stats().idle == 1)
        assert pool.stats().closes.get(CloseReason.SETUP_FAILED) is None
