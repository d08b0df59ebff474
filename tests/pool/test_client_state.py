"""What a user sets on a connection object never reaches the next one, in any mode of `reset`."""

from __future__ import annotations

from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.waiting import eventually
from psycopg.adapt import AdaptersMap
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

from asyncpool import Pool

from .client_state import (
    SETTINGS,
    Connection,
    OwnCursor,
    Setting,
    Shouting,
    first_value,
    set_row_factory,
    text_as_loaded,
)

if TYPE_CHECKING:
    from kit.servers import Admin

each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


async def do_nothing(_: Connection) -> None:
    pass


async def look_at(pool: Pool[Connection], setting: Setting) -> object:
    """What the next user sees."""
    async with pool.acquire() as conn:
        return await setting.look(conn)


async def assert_kept_from_the_next(pool: Pool[Connection], setting: Setting) -> None:
    before = await look_at(pool, setting)
    for _ in range(2):
        async with pool.acquire() as conn:
            await setting.change(conn)
            assert await setting.look(conn) != before, "the change itself"
        assert await look_at(pool, setting) == before
    assert pool.stats().connects == 1


@each_setting
async def test_a_setting_ends_with_the_block(dsn: str, setting: Setting) -> None:
    async with Pool(dsn, max_size=1) as pool:
        await assert_kept_from_the_next(pool, setting)


@each_setting
async def test_a_setting_ends_with_the_block_in_debug_mode(dsn: str, setting: Setting) -> None:
    async with Pool(dsn, max_size=1, debug=True) as pool:
        await assert_kept_from_the_next(pool, setting)


@each_setting
@pytest.mark.parametrize("reset", ["session", "discard", do_nothing], ids=["session", "discard", "callable"])
async def test_a_setting_ends_with_the_block_in_every_mode_of_reset(dsn: str, setting: Setting, reset: Any) -> None:
    async with Pool(dsn, max_size=1, reset=reset) as pool:
        await assert_kept_from_the_next(pool, setting)


@each_setting
async def test_a_setting_that_nothing_followed_ends_with_the_lease(dsn: str, setting: Setting) -> None:
    """No statement, no look: the change alone, and a release."""
    async with Pool(dsn, max_size=1) as pool:
        before = await look_at(pool, setting)
        conn = await pool.acquire()
        await setting.change(conn)
        await pool.release(conn)
        assert await look_at(pool, setting) == before


@each_setting
async def test_a_setting_ends_with_a_block_that_failed(dsn: str, setting: Setting) -> None:
    async with Pool(dsn, max_size=1) as pool:
        before = await look_at(pool, setting)
        with suppress(LookupError):
            async with pool.acquire() as conn:
                await setting.change(conn)
                await conn.execute("select 1")
                raise LookupError
        assert await look_at(pool, setting) == before


@each_setting
async def test_what_configure_set_is_there_for_every_user(dsn: str, setting: Setting) -> None:
    async with Pool(dsn, max_size=1) as plain:
        without = await look_at(plain, setting)

    async def configure(conn: Connection) -> None:
        await setting.change(conn)

    async with Pool(dsn, max_size=1, configure=configure) as pool:
        configured = await look_at(pool, setting)
        assert configured != without
        async with pool.acquire() as conn:
            for other in SETTINGS:
                await other.change(conn)
        assert await look_at(pool, setting) == configured


async def test_all_settings_at_once_end_with_the_block(dsn: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        before = [await look_at(pool, setting) for setting in SETTINGS]
        async with pool.acquire() as conn:
            for setting in SETTINGS:
                await setting.change(conn)
        assert [await look_at(pool, setting) for setting in SETTINGS] == before


async def test_a_handler_that_configure_added_and_a_user_removed_is_there_again(dsn: str) -> None:
    heard: list[str] = []

    def listen(notice: psycopg.errors.Diagnostic) -> None:
        heard.append(str(notice.message_primary))

    async def configure(conn: Connection) -> None:
        conn.add_notice_handler(listen)

    async with Pool(dsn, max_size=1, configure=configure) as pool:
        async with pool.acquire() as conn:
            conn.remove_notice_handler(listen)
        async with pool.acquire() as conn:
            await conn.execute("do $$ begin raise notice 'again'; end $$")
        assert heard == ["again"]


async def test_a_loader_that_configure_registered_and_a_user_replaced_is_there_again(dsn: str) -> None:
    async def configure(conn: Connection) -> None:
        conn.adapters.register_loader("text", Shouting)

    async with Pool(dsn, max_size=1, configure=configure) as pool:
        async with pool.acquire() as conn:
            conn.adapters.register_loader("text", TextLoader)
            assert await text_as_loaded(conn) == "loud"
        async with pool.acquire() as conn:
            assert await text_as_loaded(conn) == "LOUD"


async def test_what_was_given_to_the_pool_is_there_for_every_user(dsn: str) -> None:
    context = AdaptersMap(psycopg.adapters)
    context.register_loader("text", Shouting)

    class Context:
        adapters = context
        connection = None

    pool = Pool(
        dsn,
        max_size=1,
        row_factory=dict_row,
        autocommit=True,
        cursor_factory=OwnCursor,
        prepare_threshold=1,
        context=Context(),
    )
    async with pool:
        for _ in range(3):
            async with pool.acquire() as conn:
                assert conn.autocommit
                assert conn.prepare_threshold == 1
                assert isinstance(conn.cursor(), OwnCursor)
                assert await (await conn.execute("select 'loud'::text as v")).fetchone() == {"v": "LOUD"}
                for setting in SETTINGS:
                    await setting.change(conn)


async def test_adapters_of_one_connection_are_no_other_connections(dsn: str) -> None:
    async with Pool(dsn, max_size=2) as pool, pool.acquire() as one, pool.acquire() as two:
        one.adapters.register_loader("text", Shouting)
        assert await text_as_loaded(one) == "LOUD"
        assert await text_as_loaded(two) == "loud"
        assert psycopg.adapters.get_loader(psycopg.adapters.types["text"].oid, psycopg.pq.Format.TEXT) is not Shouting


@pytest.mark.parametrize("reset", ["rollback", "session", "discard", do_nothing])
async def test_notifications_that_nobody_read_do_not_reach_the_next_user(dsn: str, admin: Admin, reset: Any) -> None:
    async with Pool(dsn, max_size=1, autocommit=True, reset=reset) as pool:
        async with pool.acquire() as conn:
            await conn.execute("listen here")
            admin.execute("notify here, 'for the first user'")

            async def arrived() -> bool:
                await conn.execute("select 1")
                return bool(conn._notifies_backlog)

            await eventually(arrived)
            await conn.execute("unlisten *")
        async with pool.acquire() as conn, aclosing(conn.notifies(timeout=0)) as received:
            assert [notification async for notification in received] == []


async def test_a_connection_that_nobody_changed_is_handed_on_without_a_word_to_the_server(
    dsn: str, admin: Admin
) -> None:
    state = "select state_change, query from pg_stat_activity where pid = %s"
    async with Pool(dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pid = conn.info.backend_pid
            assert await first_value(conn, "select 1") == 1
            await conn.commit()
        before = admin.execute(state, [pid])
        for _ in range(3):
            async with pool.acquire() as conn:
                await set_row_factory(conn)
                await conn.set_autocommit(True)
        assert admin.execute(state, [pid]) == before


async def test_settings_are_kept_from_the_next_user_after_a_rollback_in_the_background(dsn: str, table: str) -> None:
    async with Pool(dsn, max_size=1) as pool:
        conn = await pool.acquire()
        await set_row_factory(conn)
        await conn.execute(f"lock table {table}".encode())
        await pool.release(conn)
        async with pool.acquire() as conn:
            assert await (await conn.execute("select 1")).fetchone() == (1,)
