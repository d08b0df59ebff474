"""What one-shot statements are given wrongly, and what they do not heed: told at once, with the remedy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from asyncpool import Pool, PoolDeadlock, StatementOutcomeUnknown
from asyncpool._core.lanes import Pace

if TYPE_CHECKING:
    from kit.servers import Admin

pytestmark = pytest.mark.usefixtures("no_bug_reported")

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"timeout": 0}, ValueError, "timeout must be .* greater than 0"),
    ({"timeout": "5"}, TypeError, "timeout must be a number of seconds"),
    ({"retry": "yes"}, TypeError, "retry must be True or False"),
    ({"binary": 1}, TypeError, "binary must be True or False"),
    ({"row_factory": 5}, TypeError, "row_factory must be a callable"),
    ({"params": 5}, TypeError, r"params must be a sequence or a mapping, such as \(1,\)"),
    ({"query": 5}, TypeError, "query must be a str"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG)
@pytest.mark.parametrize("lanes", [0, 2])
async def test_a_wrong_argument_is_named(
    dsn: str, lanes: int, wrong: dict[str, Any], error: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {"query": "select %s", "params": (1,), **wrong}
    async with Pool(dsn, lanes=lanes) as pool:
        with pytest.raises(error, match=words):
            await pool.fetch(**given)
        assert await pool.fetchval("select 1") == 1


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize(
    ("query", "params", "note"),
    [("select $1::int", (1,), "the placeholders are psycopg's"), ("select 1; select 2", None, "one command")],
)
async def test_what_other_drivers_take_gets_a_note(
    dsn: str, lanes: int, query: str, params: tuple[int, ...] | None, note: str
) -> None:
    async with Pool(dsn, lanes=lanes) as pool:
        with pytest.raises(psycopg.ProgrammingError) as told:
            await pool.fetch(query.encode(), params)
        assert any(note in each for each in told.value.__notes__)


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("setting", ["read_only", "deferrable", "isolation_level"])
async def test_what_holds_for_psycopgs_transactions_only_is_not_passed_over_in_silence(
    dsn: str, lanes: int, setting: str
) -> None:
    async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        value: Any = psycopg.IsolationLevel.SERIALIZABLE if setting == "isolation_level" else True
        await getattr(conn, f"set_{setting}")(value)

    async with Pool(dsn, lanes=lanes, configure=configure) as pool:
        with pytest.raises(psycopg.ProgrammingError, match=rf"{setting}, as configure has set it.*pool\.acquire\(\)"):
            await pool.execute("select 1")
    async with Pool(dsn, lanes=lanes, configure=configure, autocommit=True) as pool:
        assert await pool.fetchval("select 1") == 1  # where psycopg passes it over as well


async def test_what_the_server_knows_of_transactions_holds_for_one_shot_statements(dsn: str, table: str) -> None:
    async with Pool(dsn, options="-c default_transaction_read_only=on") as pool:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await pool.execute(f"insert into {table} values (1)".encode())


@pytest.mark.parametrize("lanes", [0, 1, 2, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_circle_of_statements_and_leases_costs_one_of_them(
    dsn: str, admin: Admin, application_name: str, lanes: int, size: int
) -> None:
    all_hold_one = asyncio.Barrier(size)

    async def hold_and_ask() -> int:
        async with pool.acquire():
            await all_hold_one.wait()
            return int(await pool.fetchval("select 1"))

    async with Pool(dsn, max_size=size, lanes=lanes) as pool:
        outcomes = await asyncio.gather(*(hold_and_ask() for _ in range(size)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes if outcome != 1] == [PoolDeadlock]
        assert admin.sessions(application_name) <= size


# --- what comes from elsewhere ------------------------------------------------------------------------------


async def test_a_transaction_that_slipped_in_is_noticed_before_anything_is_acknowledged_in_it(
    dsn: str, admin: Admin, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncpool._io.statement.needs_session", lambda query: None)
    insert = f"insert into {table} values (%s)".encode()
    async with Pool(dsn, lanes=1) as pool:
        for number in range(3):
            assert await pool.execute(insert, (number,)) == "INSERT 0 1"
        # A text whose time is known: others are sent behind it.
        pool._runner.multiplexer.paces.add("begin", Pace())  # type: ignore[union-attr]
        pool._runner.multiplexer.paces.find("begin").note(0.0)  # type: ignore[union-attr]
        outcomes = await asyncio.gather(
            pool.execute("begin"), *(pool.execute(insert, (number,)) for number in range(3, 9)), return_exceptions=True
        )
        assert isinstance(outcomes[0], StatementOutcomeUnknown)
        acknowledged = [number for number, outcome in enumerate(outcomes[1:], 3) if outcome == "INSERT 0 1"]
        assert [
            number for (number,) in admin.execute(f"select id from {table} where id > 2 order by id")
        ] == acknowledged
        assert await pool.fetchval("select 1") == 1


async def test_a_notify_handler_that_fails_is_nobodys_error(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: psycopg.Notify) -> None:
        raise LookupError("mine")

    async def listen(conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute("listen readings")
        await conn.commit()
        conn.add_notify_handler(fail)

    async with Pool(dsn, min_size=1, max_size=1, configure=listen) as pool:
        for _ in range(3):
            await pool.execute("notify readings")
            assert await pool.fetchval("select 1") == 1
        assert pool.stats().connects == 1
    assert [record for record in caplog.records if "a notify handler has failed" in record.getMessage()]
    caplog.clear()


async def test_what_failed_as_a_one_shot_is_not_prepared_for_a_lease(dsn: str) -> None:
    async with Pool(dsn, min_size=1, max_size=1) as pool:
        for _ in range(7):  # more often than psycopg's prepare_threshold
            with pytest.raises(psycopg.errors.SyntaxError):
                await pool.execute("select 1; select 2")
        async with pool.acquire() as conn:
            cursor = await conn.execute("select 1; select 2")
            assert await cursor.fetchall() == [(1,)]


@pytest.mark.parametrize("lanes", [0, 1])
async def test_a_stream_that_a_lease_has_read_leaves_nothing_to_one_shots(dsn: str, lanes: int) -> None:
    async with Pool(dsn, min_size=1, max_size=1, lanes=lanes, autocommit=True) as pool:
        for _ in range(3):
            assert await pool.fetch("select generate_series(1, 3)") == [(1,), (2,), (3,)]
            async with pool.acquire() as conn:
                assert [row async for row in conn.cursor().stream("select generate_series(1, 3)")] == [(1,), (2,), (3,)]
