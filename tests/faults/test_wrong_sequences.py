"""Any sequence of calls, in any order, right and wrong: each works or says why not, and the pool stays whole.

A `SyncPool` is called directly, a `Pool` in an event loop that runs only while a call of it is awaited.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from kit.nasty import fuzzing
from kit.waiting import eventually_blocking

from asyncpool import Pool, PoolError, SyncPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.servers import Admin

# What a call at the wrong time may raise. PoolError is an OperationalError, and ours are all that is expected of it.
Refused = (PoolError, psycopg.OperationalError, psycopg.InterfaceError)

picks = st.integers(0, 5)
SOON = 0.05


class Sequences(RuleBasedStateMachine):
    """The calls of a pool; the subclasses say how to make them."""

    dsn: ClassVar[str]
    admin: ClassVar[Admin]
    application_name: ClassVar[str]

    pool: Any

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False
        self.held: list[Any] = []
        self.former: list[Any] = []  # released, or of a pool that was closed since

    def do(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def try_(self, call: Callable[[], Any], *, may_fail: bool = True) -> Any:
        """What it returns; the refusal, if it may be refused."""
        try:
            return self.do(call)
        except Refused as refusal:
            assert may_fail, repr(refusal)
            assert str(refusal)
            return refusal

    def acquire(self, timeout: float) -> Any:
        raise NotImplementedError

    def release(self, conn: Any) -> Any:
        raise NotImplementedError

    def in_block(self, body: Callable[[Any], Any]) -> Any:
        raise NotImplementedError

    def take(self, candidates: list[Any], pick: int) -> Any:
        return candidates[pick % len(candidates)] if candidates else None

    def let_go(self, conn: Any) -> None:
        self.held = [each for each in self.held if each is not conn]
        self.former = [*self.former[-3:], conn]

    # --- life cycle -----------------------------------------------------------------------------------------

    @initialize(min_size=st.integers(0, 2), max_size=st.integers(2, 3), reset=st.sampled_from(["rollback", "discard"]))
    def make(self, **options: Any) -> None:
        self.pool = self.make_pool({"debug": False, "acquire_timeout": 10, **options})

    def make_pool(self, options: dict[str, Any]) -> Any:
        raise NotImplementedError

    @rule(wait=st.booleans())
    def open(self, wait: bool) -> None:
        self.try_(lambda: self.pool.open(wait=wait), may_fail=False)
        self.is_open = True

    @rule()
    def close_at_once(self) -> None:
        self.try_(lambda: self.pool.close(timeout=0), may_fail=False)
        self.is_open = False
        self.former = [*self.former[-2:], *self.held]
        self.held = []
        assert self.pool.stats().size == 0

    # --- connections ----------------------------------------------------------------------------------------

    @rule(timeout=st.sampled_from([0, SOON, 10]))
    def acquire_one(self, timeout: float) -> None:
        if timeout == 10 and len(self.held) >= self.pool.stats().max_size:
            timeout = SOON  # in vain
        answer = self.try_(lambda: self.acquire(timeout))
        if not isinstance(answer, BaseException):
            assert self.is_open
            assert all(answer is not each for each in self.held)
            self.held.append(answer)
        else:
            assert not self.is_open or timeout < 10, repr(answer)

    @rule(pick=picks)
    def release_one(self, pick: int) -> None:
        if conn := self.take(self.held, pick):
            self.try_(lambda: self.release(conn), may_fail=False)
            self.let_go(conn)

    @rule(pick=picks)
    def release_what_is_not_held(self, pick: int) -> None:
        conn = self.take([each for each in self.former if not self.is_held(each)], pick)
        if conn is not None:
            self.try_(lambda: self.release(conn))

    def is_held(self, conn: Any) -> bool:
        return any(conn is each for each in self.held)  # it has found a new owner

    @rule(pick=picks, statement=st.sampled_from(["select 1", "select 1/0", "nonsense", "begin", "rollback", ""]))
    def use(self, pick: int, statement: str) -> None:
        if conn := self.take(self.held, pick):
            try:
                self.do(lambda: conn.execute(statement))
            except psycopg.Error as error:
                assert not isinstance(error, (PoolError, psycopg.InterfaceError)), repr(error)

    @rule(pick=picks)
    def use_what_is_not_held(self, pick: int) -> None:
        conn = self.take([each for each in self.former if not self.is_held(each)], pick)
        if conn is not None:
            answer = self.try_(lambda: conn.execute("select 1"))
            assert isinstance(answer, BaseException)

    @rule(pick=picks, again=st.booleans())
    def close_a_connection(self, pick: int, again: bool) -> None:
        if conn := self.take(self.held, pick):
            self.do(conn.close)
            self.let_go(conn)
            if again:
                self.do(conn.close)

    @rule(pick=picks)
    def lose_a_connection(self, pick: int) -> None:
        if conn := self.take(self.held, pick):
            self.admin.terminate(conn.info.backend_pid)

    # --- blocks ---------------------------------------------------------------------------------------------

    @rule(
        what=st.sampled_from(["use", "fail", "release", "close", "close twice", "drain", "resize", "nest", "open"]),
    )
    def block(self, what: str) -> None:
        if len(self.held) >= self.pool.stats().max_size:
            return
        bodies: dict[str, Callable[[Any], Any]] = {
            "use": lambda conn: conn.execute("select 1"),
            "fail": lambda conn: conn.execute("select 1/0"),
            "release": self.release,
            "close": lambda conn: conn.close(),
            "close twice": lambda conn: [conn.close(), conn.close()],
            "drain": lambda conn: self.pool.drain(),
            "resize": lambda conn: self.pool.resize(0, 2),
            "nest": lambda conn: self.acquire_and_release(),
            "open": lambda conn: self.pool.open(),
        }
        try:
            self.in_block(bodies[what])
        except psycopg.errors.DivisionByZero:
            assert what == "fail"
        except PoolError as refusal:
            assert not self.is_open or what == "nest", repr(refusal)

    def acquire_and_release(self) -> Any:
        raise NotImplementedError

    # --- administration -------------------------------------------------------------------------------------

    @rule(min_size=st.integers(-1, 2), max_size=st.integers(0, 3))
    def resize(self, min_size: int, max_size: int) -> None:
        before = self.pool.stats()
        try:
            self.do(lambda: self.pool.resize(min_size, max_size))
        except ValueError:
            assert min_size < 0 or max_size < 1 or min_size > max_size
            min_size, max_size = before.min_size, before.max_size
        assert (self.pool.stats().min_size, self.pool.stats().max_size) == (min_size, max_size)

    @rule(method=st.sampled_from(["drain", "check"]))
    def administer(self, method: str) -> None:
        refusal = self.try_(getattr(self.pool, method))
        assert isinstance(refusal, PoolError) != self.is_open

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        stats = self.pool.stats()
        assert stats.leased == len(self.held) == len(self.pool.holders())
        assert stats.waiting == 0
        assert stats.size == stats.connecting + stats.idle + stats.leased + stats.checking + stats.recycling + (
            stats.closing
        )
        assert ("closed" in repr(self.pool)) != self.is_open

    def teardown(self) -> None:
        """However it went: all places can be taken, and nothing is left when the pool is closed."""
        if not hasattr(self, "pool"):
            return
        try:
            for conn in self.held:
                self.release(conn)
            self.held = []
            self.do(self.pool.open)
            conns = [self.do(lambda: self.acquire(10)) for _ in range(self.pool.stats().max_size)]
            for conn in conns:
                self.do(lambda: conn.execute("select 1"))  # noqa: B023
            eventually_blocking(lambda: self.settled(len(conns)))
            assert self.admin.sessions(self.application_name) == len(conns)
            for conn in conns:
                self.do(conn.rollback)
                self.release(conn)
            assert self.pool.stats().leased == 0
        finally:
            self.do(self.pool.close)
            self.finish()
        assert self.admin.sessions(self.application_name) == 0

    def settled(self, size: int) -> bool:
        return bool(self.pool.stats().size == size)

    def finish(self) -> None:
        """What there is to end besides the pool."""


class BlockingSequences(Sequences):
    def make_pool(self, options: dict[str, Any]) -> Any:
        return SyncPool(self.dsn, **options)

    def do(self, call: Callable[[], Any]) -> Any:
        return call()

    def acquire(self, timeout: float) -> Any:
        return self.pool.getconn(timeout=timeout)

    def release(self, conn: Any) -> Any:
        self.pool.putconn(conn)

    def acquire_and_release(self) -> Any:
        self.pool.putconn(self.pool.getconn(timeout=0))

    def in_block(self, body: Callable[[Any], Any]) -> Any:
        with self.pool.acquire(timeout=10) as conn:
            body(conn)

    @rule(key=st.sampled_from(["a", 1, ("b", None)]), close=st.booleans())
    def use_a_key(self, key: Any, close: bool) -> None:
        if len(self.held) < self.pool.stats().max_size and self.is_open:
            conn = self.pool.getconn(key, timeout=10)
            assert self.pool.getconn(key, timeout=10) is conn
            self.pool.putconn(conn, key, close)
            self.let_go(conn)


class AsyncSequences(Sequences):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()

    def make_pool(self, options: dict[str, Any]) -> Any:
        return Pool(self.dsn, **options)

    def do(self, call: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await finished(call())

        return self.runner.run(run())

    def acquire(self, timeout: float) -> Any:
        return self.pool.acquire(timeout)

    def release(self, conn: Any) -> Any:
        async def release() -> None:
            self.pool.release(conn)  # not awaited: it acts when it is called

        if asyncio._get_running_loop() is not None:
            self.pool.release(conn)
            return None
        return self.runner.run(release())

    def acquire_and_release(self) -> Any:
        async def work() -> None:
            self.pool.release(await self.pool.acquire(0))

        return work()

    def in_block(self, body: Callable[[Any], Any]) -> Any:
        async def run() -> None:
            async with self.pool.acquire(timeout=10) as conn:
                await finished(body(conn))

        self.runner.run(run())

    def settled(self, size: int) -> bool:
        self.runner.run(asyncio.sleep(0.001))
        return super().settled(size)

    def finish(self) -> None:
        self.runner.close()


async def finished(answer: Any) -> Any:
    """What it comes to, if it is to be awaited, or all of it are."""
    if isinstance(answer, list):
        return [await finished(each) for each in answer]
    return await answer if inspect.isawaitable(answer) else answer


@pytest.mark.parametrize("sequences", [AsyncSequences, BlockingSequences], ids=lambda kind: kind.__name__)
def test_no_sequence_of_calls_breaks_a_pool(
    dsn: str, admin: Admin, application_name: str, sequences: type[Sequences], no_bug_reported: None
) -> None:
    kind: Any = type("Sequences", (sequences,), {"dsn": dsn, "admin": admin, "application_name": application_name})
    run_state_machine_as_test(kind, settings=fuzzing(25, stateful_step_count=25))
