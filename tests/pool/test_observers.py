"""`pool.observe()`: each kind of event, and observers that fail, hang, stop, flush, and are left alone."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually, eventually_blocking

from asyncpool import Pool, PoolTimeout, StatementOutcomeUnknown, SyncPool
from asyncpool._io import observation as observation_module
from asyncpool._io.observation import Observation, Observations
from asyncpool.events import (
    Acquired,
    CloseReason,
    Connected,
    ConnectError,
    Connecting,
    ConnectionClosed,
    Event,
    LaneClosed,
    LaneOpened,
    Queued,
    Released,
    TimedOut,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.servers import Admin

THREAD = "tell an observer"


class Record:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def kinds(self) -> list[type[Event]]:
        return [type(event) for event in self.events]

    def fields(self, *kinds: type[Event]) -> list[dict[str, Any]]:
        """What those of these kinds say besides their time."""
        return [
            {name: value for name, value in asdict(event).items() if name != "at"}
            for event in self.events
            if type(event) in kinds
        ]


def tellers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if THREAD in thread.name]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "asyncpool"]


def told(*answers: object) -> tuple[Observations, Observation, list[Event]]:
    """Observers of a pool that is none, one of whom does for each event what comes next: raises, or calls it."""
    events: list[Event] = []
    left = list(answers)

    def observe(event: Event) -> None:
        events.append(event)
        answer = left.pop(0) if left else None
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer()

    observations = Observations("some pool")
    return observations, observations.add(observe), events


async def use(pool: Pool) -> None:
    async with pool.acquire():
        pass


def is_plain(pool: Pool) -> bool:
    """Whether its leases take the shortest way."""
    assert pool._runner is not None
    return pool._runner.is_plain


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    """Those of a test's observers, when these are stopped; the tests of this process are not the only ones."""
    yield
    for observation in list(observation_module._all):
        observation.stop()
    eventually_blocking(lambda: not tellers())


# --- each event ---------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_lease_is_told_from_connecting_to_the_end(dsn: str) -> None:
    record = Record()
    pool = Pool(dsn, name="p", min_size=1, max_size=1)
    observation = pool.observe(record)
    before = time.monotonic()
    async with pool, pool.acquire():
        await asyncio.sleep(0.02)
    after = time.monotonic()
    observation.flush()
    assert record.kinds() == [Connecting, Connected, Acquired, Released, ConnectionClosed]
    assert {event.pool for event in record.events} == {"p"}
    times = [event.at for event in record.events]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= after
    _, connected, acquired, released, closed = record.events
    assert isinstance(connected, Connected)
    assert isinstance(acquired, Acquired)
    assert isinstance(released, Released)
    assert isinstance(closed, ConnectionClosed)
    assert 0 < connected.took <= after - before
    assert acquired.waited == 0.0
    assert 0.019 <= released.held <= after - before
    assert released.held >= 0.02
    assert closed.reason is CloseReason.POOL_CLOSED


async def test_who_waits_and_who_gives_up_is_told(dsn: str) -> None:
    record = Record()
    async with Pool(dsn, name="p", min_size=1, max_size=1) as pool:
        observation = pool.observe(record)
        connection = await pool.acquire()
        waiting = asyncio.create_task(use(pool))
        await eventually(lambda: pool.stats().waiting == 1)
        with pytest.raises(PoolTimeout) as refused:
            await pool.acquire(timeout=0.02)
        await pool.release(connection)
        await waiting
        observation.flush()
    assert record.fields(Queued) == [{"pool": "p", "waiting": 1}, {"pool": "p", "waiting": 2}]
    assert record.fields(TimedOut) == [{"pool": "p", "waited": refused.value.waited}]
    at_once, waited = record.fields(Acquired)
    assert at_once["waited"] == 0.0
    assert 0.02 <= waited["waited"] <= pool.stats().wait.max  # until it runs, and not until its grant
    assert len(record.fields(Released)) == 2


async def test_a_one_shot_statement_that_waits_stands_in_line_too(dsn: str) -> None:
    record = Record()
    async with Pool(dsn, name="p", min_size=1, max_size=1) as pool:
        observation = pool.observe(record)
        connection = await pool.acquire()
        waiting = asyncio.create_task(pool.fetchval("select 1"))
        await eventually(lambda: pool.stats().waiting == 1)
        await pool.release(connection)
        assert await waiting == 1
        await pool.fetchval("select 1")  # for which there is a connection
        observation.flush()
    assert record.fields(Queued) == [{"pool": "p", "waiting": 1}]


async def test_a_connect_that_fails_is_told_with_its_error() -> None:
    record = Record()
    pool = Pool("host=127.0.0.1 port=1 user=u", name="p", backoff_initial=10, connect_timeout=2)
    pool.observe(record)
    with pytest.raises(psycopg.OperationalError):
        await pool.open(timeout=0)
    await eventually(lambda: ConnectError in record.kinds())
    assert record.kinds() == [Connecting, ConnectError]
    [failed] = [event for event in record.events if isinstance(event, ConnectError)]
    assert "127.0.0.1" in str(failed.error)
    assert failed.took >= 0


@pytest.mark.parametrize("reason", [CloseReason.DISCONNECTED, CloseReason.DRAINED, CloseReason.SHRUNK])
async def test_the_end_of_a_connection_is_told_with_its_reason(dsn: str, admin: Admin, reason: CloseReason) -> None:
    record = Record()
    async with Pool(dsn, min_size=2, max_size=2, max_idle=100) as pool:
        observation = pool.observe(record)
        if reason is CloseReason.DISCONNECTED:
            async with pool.acquire() as connection:
                admin.terminate(connection.info.backend_pid)
        elif reason is CloseReason.DRAINED:
            pool.drain()
        else:
            pool.resize(1, 1)
        await eventually(lambda: reason in pool.stats().closes)
        observation.flush()
        closed = [event.reason for event in record.events if isinstance(event, ConnectionClosed)]
        assert closed == [reason] * pool.stats().closes[reason]


async def test_lanes_are_told_and_the_loss_of_one(dsn: str) -> None:
    record = Record()
    async with Pool(dsn, name="p", min_size=1, max_size=2) as pool:
        observation = pool.observe(record)
        assert await pool.fetchval("select 1") == 1
        await eventually(lambda: LaneClosed in record.kinds())
        with pytest.raises(StatementOutcomeUnknown):
            await pool.fetchval("select pg_terminate_backend(pg_backend_pid())")
        observation.flush()
    assert record.fields(LaneOpened) == [{"pool": "p"}, {"pool": "p"}]
    first, second = [event for event in record.events if isinstance(event, LaneClosed)]
    assert (first.is_lost, second.is_lost) == (False, True)
    assert first.served >= 0
    assert Acquired not in record.kinds()


async def test_a_one_shot_that_waits_too_long_for_a_connection_is_told(dsn: str) -> None:
    record = Record()
    async with Pool(dsn, name="p", min_size=1, max_size=1) as pool:
        observation = pool.observe(record)
        connection = await pool.acquire()
        with pytest.raises(PoolTimeout):
            await pool.fetchval("select 1", timeout=0.02)
        await pool.release(connection)
        observation.flush()
        assert pool.stats().timeouts == 1
    [timed_out] = record.fields(TimedOut)
    assert timed_out["waited"] >= 0.02


def test_a_blocking_pool_tells_the_same(dsn: str) -> None:
    record = Record()
    pool = SyncPool(dsn, name="p", min_size=1, max_size=1)
    observation = pool.observe(record)
    with pool:
        connection = pool.getconn()
        with pytest.raises(PoolTimeout) as refused:
            pool.getconn(timeout=0.02)
        pool.putconn(connection)
        with pool.acquire():
            pass
        assert pool.fetchval("select 1") == 1
        eventually_blocking(lambda: LaneClosed in record.kinds())
    observation.flush()
    assert record.kinds() == [
        Connecting,
        Connected,
        Acquired,
        Queued,
        TimedOut,
        Released,
        Acquired,
        Released,
        LaneOpened,
        LaneClosed,
        ConnectionClosed,
    ]
    assert record.fields(Queued) == [{"pool": "p", "waiting": 1}]
    assert record.fields(TimedOut) == [{"pool": "p", "waited": refused.value.waited}]
    assert record.fields(ConnectionClosed) == [{"pool": "p", "reason": CloseReason.POOL_CLOSED}]


def test_nothing_is_missed_of_what_many_threads_do(dsn: str) -> None:
    record = Record()
    with SyncPool(dsn, min_size=3, max_size=3) as pool:
        observation = pool.observe(record)

        def work() -> None:
            for _ in range(200):
                with pool.acquire():
                    pass

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        observation.flush()
        assert len(record.fields(Acquired)) == len(record.fields(Released)) == pool.stats().acquires == 1600
    assert observation.dropped == 0


# --- when they come and go ----------------------------------------------------------------------------------


async def test_an_observer_is_told_soon_without_being_asked(dsn: str) -> None:
    record = Record()
    async with Pool(dsn) as pool:
        pool.observe(record)
        async with pool.acquire():
            pass
        await eventually(lambda: record.kinds() == [Acquired, Released], timeout=5)


async def test_one_that_comes_in_the_midst_of_a_lease_hears_of_the_next(dsn: str) -> None:
    first, second = Record(), Record()
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire():
            observations = [pool.observe(first)]
        async with pool.acquire():
            observations.append(pool.observe(second))
        for observation in observations:
            observation.flush()
        assert first.kinds() == [Acquired, Released]
        assert second.kinds() == [Released]


async def test_what_happened_before_the_stop_is_told_and_nothing_after_it(dsn: str) -> None:
    stopped, other = Record(), Record()
    async with Pool(dsn) as pool:
        observation = pool.observe(stopped)
        lasting = pool.observe(other)
        async with pool.acquire():
            pass
        observation.stop()
        observation.stop()
        async with pool.acquire():
            pass
        lasting.flush()
        assert other.kinds() == [Acquired, Released] * 2
        await eventually(lambda: len(tellers()) == 1)
        assert stopped.kinds() == [Acquired, Released]
        assert "stopped" in repr(observation)


async def test_a_pool_whose_last_observer_has_stopped_is_as_quick_as_one_that_never_had_any(dsn: str) -> None:
    async with Pool(dsn) as pool:
        observation = pool.observe(Record())
        assert not is_plain(pool)
        observation.stop()
        await use(pool)
        assert is_plain(pool)
        pool.observe(Record())
        assert not is_plain(pool)


async def test_a_pool_does_not_keep_an_observer_that_was_stopped(dsn: str) -> None:
    class Owner:
        def __call__(self, event: Event) -> None:
            """Nothing to do."""

    owners = [Owner()]
    alive: list[bool] = [True]
    async with Pool(dsn) as pool:
        observation = pool.observe(owners[0])
        gone = weakref.ref(owners[0], lambda _: alive.clear())
        observation.stop()
        async with pool.acquire():
            pass
        owners.clear()
        del observation
        await eventually(lambda: gc.collect() >= 0 and not alive)
        assert gone() is None


async def test_the_thread_of_a_dropped_pool_ends(dsn: str) -> None:
    record = Record()
    pools = [Pool(dsn, min_size=1)]
    pools[0].observe(record)
    await pools[0].open()
    async with pools[0].acquire():
        pass
    assert len(tellers()) == 1
    with pytest.warns(ResourceWarning, match="dropped without being closed"):
        pools.clear()
    gc.collect()
    await eventually(lambda: not tellers())
    assert record.kinds()[:4] == [Connecting, Connected, Acquired, Released]


def test_the_thread_of_a_dropped_blocking_pool_ends(dsn: str) -> None:
    record = Record()
    pools = [SyncPool(dsn, min_size=1)]
    pools[0].observe(record)
    pools[0].open()
    with pools[0].acquire():
        pass
    assert len(tellers()) == 1
    with pytest.warns(ResourceWarning, match="dropped without being closed"):
        pools.clear()
    gc.collect()
    eventually_blocking(lambda: not tellers())
    assert record.kinds()[:4] == [Connecting, Connected, Acquired, Released]


def test_ctrl_c_while_an_event_is_noted_costs_no_other_event(monkeypatch: pytest.MonkeyPatch) -> None:
    observations, observation, events = told()

    class Struck:
        def put(self, _: None) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(observation, "_wakes", Struck())
        with pytest.raises(KeyboardInterrupt):
            observations.note(Connecting)
    observations.note(Connecting)
    eventually_blocking(lambda: len(events) == 2)


def test_ctrl_c_while_the_thread_is_started_leaves_one_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_and_be_struck(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_be_struck)
        with pytest.raises(KeyboardInterrupt):
            told()
    [observation] = [each for each in observation_module._all if not each.is_stopped]
    events: list[Event] = []
    observation._observer = events.append
    for _ in range(3):
        told_before = len(events)
        observation.note((Connecting, 0.0, ()))
        eventually_blocking(lambda: len(events) > told_before)  # noqa: B023 - it is called in this turn
    assert len(tellers()) == 1


async def test_a_pool_that_is_opened_again_goes_on_telling(dsn: str) -> None:
    record = Record()
    pool = Pool(dsn, min_size=1)
    observation = pool.observe(record)
    for _ in range(2):
        async with pool, pool.acquire():
            pass
    observation.flush()
    assert record.kinds() == [Connecting, Connected, Acquired, Released, ConnectionClosed] * 2
    observation.stop()


@pytest.mark.parametrize("observer", [None, "words", 7])
def test_what_cannot_be_called_is_refused(observer: Any) -> None:
    with pytest.raises(TypeError, match="observer must be a callable that takes an event, not "):
        Pool().observe(observer)


# --- those that misbehave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_an_observer_that_raises_is_told_of_what_comes_then(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    observations, observation, events = told(error, error)
    for _ in range(3):
        observations.note(Connecting)
    eventually_blocking(lambda: len(events) == 3)
    [line] = warnings_of(caplog)
    assert line == "some pool: an observer has failed on 1 events, and 0 were dropped; its last error"
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error
    observation.stop()


def test_errors_are_logged_once_a_minute_with_their_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observation_module, "TOLD_EVERY", 0.2)
    observations, observation, events = told(*[ValueError("no")] * 5)
    for _ in range(5):
        observations.note(Connecting)
    eventually_blocking(lambda: len(warnings_of(caplog)) == 2)  # the second without a further event
    assert warnings_of(caplog) == [
        "some pool: an observer has failed on 1 events, and 0 were dropped; its last error",
        "some pool: an observer has failed on 4 events, and 0 were dropped; since the last line about it",
    ]
    assert len(events) == 5
    observation.stop()


def test_a_log_handler_that_raises_harms_neither_the_pool_nor_the_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    monkeypatch.setattr(observation_module, "MAX_BEHIND", 1)
    monkeypatch.setattr(observation_module, "TOLD_EVERY", 0.0)
    logger, broken = logging.getLogger("asyncpool"), Broken()
    logger.addHandler(broken)
    try:
        observations, observation, events = told(ValueError("no"))
        with observation._telling:  # so that its thread is behind
            for _ in range(3):
                observations.note(Connecting)
        eventually_blocking(lambda: len(events) == 1)
        observations.note(Connecting)
        eventually_blocking(lambda: len(events) == 2)
    finally:
        logger.removeHandler(broken)
    assert observation.dropped == 2


async def test_an_observer_that_hangs_holds_up_nobody_and_what_it_misses_is_counted(
    dsn: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observation_module, "MAX_BEHIND", 10)
    hangs, goes_on = threading.Event(), threading.Event()
    record, other = Record(), Record()

    def hang(event: Event) -> None:
        hangs.set()
        goes_on.wait(20)
        record(event)

    async with Pool(dsn, name="p") as pool:
        observation, second = pool.observe(hang), pool.observe(other)
        async with pool.acquire():
            await eventually(hangs.is_set)
        for _ in range(20):
            async with pool.acquire():
                pass
            second.flush()
        assert len(other.fields(Released)) == 21
        assert observation.dropped == 42 - 1 - 10
        [line] = warnings_of(caplog)  # though it hangs
        assert line == "p: an observer has failed on 0 events, and 1 were dropped; it is too slow"
        assert repr(observation) == "<Observation of 'p': 10 to tell, 31 dropped>"
        goes_on.set()
        await eventually(lambda: len(record.events) == 11)
        async with pool.acquire():
            pass
        await eventually(lambda: len(record.events) == 13)


def test_an_observer_that_is_slow_is_told_all_in_order() -> None:
    observations, observation, events = told(*[lambda: time.sleep(0.001)] * 100)
    for number in range(100):
        observations.note(Queued, number)
    observation.flush()
    assert [event.waiting for event in events if isinstance(event, Queued)] == list(range(100))
    observation.stop()


def test_all_are_told_however_little_is_told_without_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation_module, "IN_A_ROW", -1.0)
    monkeypatch.setattr(observation_module, "FOR_EACH", -1.0)
    observations, _, events = told()
    for number in range(50):
        observations.note(Queued, number)
    eventually_blocking(lambda: len(events) == 50, timeout=5)
    assert [event.waiting for event in events if isinstance(event, Queued)] == list(range(50))


def test_one_that_flushes_itself_is_told_each_event_once_and_in_order() -> None:
    def flush() -> None:
        observation.flush()

    observations, observation, events = told(*[flush] * 50)
    for number in range(50):
        observations.note(Queued, number)
    eventually_blocking(lambda: len(events) == 50)
    assert [event.waiting for event in events if isinstance(event, Queued)] == list(range(50))
    observations.note(Connecting)  # its thread is there still
    eventually_blocking(lambda: len(events) == 51)


def test_one_that_stops_itself_hears_the_rest_of_what_had_happened() -> None:
    def stop() -> None:
        observation.stop()

    observations, observation, events = told(stop)
    for _ in range(3):
        observations.note(Connecting)
    eventually_blocking(lambda: len(events) == 3)
    eventually_blocking(lambda: not tellers())


def test_what_happens_while_one_is_told_and_then_stopped_is_told_too() -> None:
    is_told, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        is_told.set()
        goes_on.wait(20)

    observations, observation, events = told(hang)
    observations.note(Connecting)
    assert is_told.wait(20)
    observations.note(Connecting)
    observation.stop()
    goes_on.set()
    eventually_blocking(lambda: len(events) == 2)
    eventually_blocking(lambda: not tellers())


def test_ctrl_c_in_a_flush_is_raised_there_and_the_rest_is_told() -> None:
    observations, observation, events = told(KeyboardInterrupt())
    with observation._telling:  # so that its own thread does not come first
        observations.note(Connecting)
        with pytest.raises(KeyboardInterrupt):
            observation.flush()
        observations.note(Connecting)
        observation.flush()
    assert len(events) == 2


def test_a_finalizer_may_note_and_stop_in_the_midst_of_anything() -> None:
    """It runs in whatever thread allocates, also in the one that tells, at any instruction of that."""
    observations, observation, events = told()

    class Finalized:
        def __init__(self) -> None:
            self.itself = self  # so that the garbage collector ends it

        def __del__(self) -> None:
            observations.note(Connecting)

    made = 3000
    before = gc.get_threshold()
    gc.set_threshold(5)
    try:
        for _ in range(made):
            Finalized()
            observations.note(Connected, 0.1)
            if len(events) % 100 == 0:
                observation.flush()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    observation.flush()
    assert len(events) == 2 * made
