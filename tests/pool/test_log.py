"""The log is no flood: of what repeats itself, one line a minute, with a count."""

from __future__ import annotations

import asyncio
import itertools
import logging
import weakref
from typing import TYPE_CHECKING

import psycopg
import pytest
from kit.virtual_time import VirtualLoop, run_virtually
from kit.waiting import eventually

from asyncpool import Pool
from asyncpool._io import log
from asyncpool._io.log import REPEATED_WITHIN, Log

if TYPE_CHECKING:
    from kit.servers import Admin

    from .leftovers import Connection


def lines(caplog: pytest.LogCaptureFixture, word: str = "") -> list[tuple[int, str]]:
    return [(each.levelno, each.getMessage()) for each in caplog.records if word in each.getMessage()]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, to be moved by hand."""
    clock = [100.0]
    monkeypatch.setattr(log, "monotonic", lambda: clock[0])
    return clock


async def tell_later(of: Log, kind: str) -> None:
    """What the timer does when the minute is over."""
    await asyncio.sleep(0)  # it is set in a turn of the loop
    repeated = of._kinds[kind]
    assert repeated.timer is not None
    repeated.timer.cancel()
    of._tell(repeated)


async def test_of_many_lines_of_a_kind_the_first_is_told_at_once_and_the_last_with_a_count_after_a_minute(
    caplog: pytest.LogCaptureFixture, now: list[float]
) -> None:
    told = Log("orders", asyncio.get_running_loop())
    caplog.set_level(logging.DEBUG, "asyncpool")
    for number in range(5):
        told.write(logging.WARNING, "kind", "number %d", number)
    assert lines(caplog) == [
        (logging.WARNING, "orders: number 0"),
        *((logging.DEBUG, f"orders: number {number}") for number in range(1, 5)),
    ]
    caplog.set_level(logging.INFO, "asyncpool")
    caplog.clear()
    now[0] += REPEATED_WITHIN
    await tell_later(told, "kind")
    assert lines(caplog) == [(logging.WARNING, "orders: number 4; the last of 4 like it within a minute")]
    told.write(logging.WARNING, "kind", "number %d", 5)  # it has just been told
    assert len(lines(caplog)) == 1
    now[0] += REPEATED_WITHIN
    await tell_later(told, "kind")
    assert lines(caplog)[1:] == [(logging.WARNING, "orders: number 5")]
    told.close()


async def test_after_a_quiet_minute_a_line_is_told_at_once(caplog: pytest.LogCaptureFixture, now: list[float]) -> None:
    told = Log("orders", asyncio.get_running_loop())
    told.write(logging.WARNING, "kind", "one")
    now[0] += REPEATED_WITHIN
    told.write(logging.WARNING, "kind", "two")
    assert lines(caplog) == [(logging.WARNING, "orders: one"), (logging.WARNING, "orders: two")]
    told.close()


async def test_kinds_are_counted_apart(caplog: pytest.LogCaptureFixture, now: list[float]) -> None:
    told = Log("orders", asyncio.get_running_loop())
    told.write(logging.WARNING, "kind", "one")
    told.write(logging.WARNING, "another", "other")
    assert [text for _, text in lines(caplog)] == ["orders: one", "orders: other"]
    told.close()


async def test_what_was_only_counted_is_told_when_the_pool_is_closed(
    caplog: pytest.LogCaptureFixture, now: list[float]
) -> None:
    told = Log("orders", asyncio.get_running_loop())
    for number in range(3):
        told.write(logging.WARNING, "kind", "number %d", number)
    await asyncio.sleep(0)
    (timer,) = [each.timer for each in told._kinds.values()]
    told.close()
    assert [text for _, text in lines(caplog)] == [
        "orders: number 0",
        "orders: number 2; the last of 2 like it within a minute",
    ]
    assert timer is not None
    assert timer.cancelled()


async def test_what_is_told_of_is_not_kept(now: list[float]) -> None:
    """The traceback of an error may hold a connection."""
    told = Log("orders", asyncio.get_running_loop())
    told.write(logging.INFO, "kind", "first")
    error = psycopg.OperationalError("second")
    gone = weakref.ref(error)
    told.write(logging.INFO, "kind", "%s", error)
    del error
    assert gone() is None
    told.close()


def test_the_timer_tells_what_was_counted_when_the_minute_is_over(caplog: pytest.LogCaptureFixture) -> None:
    async def write(loop: VirtualLoop) -> None:
        told = Log("orders", loop)
        for number in range(3):
            told.write(logging.WARNING, "kind", "number %d", number)
        await asyncio.sleep(REPEATED_WITHIN - 1)
        assert len(lines(caplog)) == 1
        await asyncio.sleep(2)
        assert len(lines(caplog)) == 2
        told.close()

    run_virtually(write)


async def test_connections_that_are_found_dead_together_are_one_line_and_a_count(
    dsn: str, admin: Admin, application_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncpool")

    async def refuse(conn: object) -> None:
        raise ValueError("not good enough")

    async with Pool(dsn, min_size=5, max_size=5, check=refuse) as pool:
        await pool.check()
    told = lines(caplog, "unusable")
    assert len(told) <= 3, told  # the first, at most the others with a count, for each of two levels
    assert any("like it within a minute" in text for _, text in told)


async def test_a_server_that_comes_and_goes_is_no_flood(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    fails = itertools.cycle([False, True])

    async def configure(conn: Connection) -> None:
        if next(fails):
            raise psycopg.OperationalError("not now")

    async with Pool(
        dsn, min_size=1, max_size=1, max_uses=1, configure=configure, acquire_timeout=20, backoff_initial=0.001
    ) as pool:
        for _ in range(5):
            async with pool.acquire():
                pass
            await eventually(lambda: pool.stats().idle == 1)
        assert pool.stats().connect_errors >= 4
        assert len(lines(caplog, "connecting failed")) == 1
    ((_, first), (level, last)) = lines(caplog, "connecting failed")
    assert level == logging.WARNING
    assert "like it within a minute" not in first
    assert "not now" in last
    assert "like it within a minute" in last


async def drop_one(pool: Pool[Connection]) -> None:
    await pool.acquire()
    async with pool.acquire(timeout=20):
        pass


async def test_a_lost_lease_is_told_by_the_log_as_well(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Pool(dsn, max_size=1) as pool:
        with pytest.warns(ResourceWarning, match="dropped without release"):
            await drop_one(pool)
    ((level, text),) = lines(caplog, "dropped without release")
    assert level == logging.WARNING
    assert f"acquired at {__file__}" in text


async def test_an_outage_is_a_line_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool("host=127.0.0.1 port=1", backoff_initial=0.001, backoff_max=0.002)
    await pool.open(wait=False)
    await eventually(lambda: pool.stats().connect_errors >= 5)
    assert len(lines(caplog, "connecting failed")) == 1
    await pool.close()
    told = [text for _, text in lines(caplog, "connecting failed")]
    assert len(told) == 2
    assert "like it within a minute" in told[1]


async def test_a_level_is_not_carried_over_from_one_minute_to_the_next(
    caplog: pytest.LogCaptureFixture, now: list[float]
) -> None:
    caplog.set_level(logging.INFO, "asyncpool")
    told = Log("orders", asyncio.get_running_loop())
    told.write(logging.INFO, "kind", "one")
    told.write(logging.WARNING, "kind", "two")
    await tell_later(told, "kind")
    told.write(logging.INFO, "kind", "three")
    await tell_later(told, "kind")
    assert [level for level, _ in lines(caplog)] == [logging.INFO, logging.WARNING, logging.INFO]
    told.close()
