"""Where psycopg keeps what a user may set on a connection; each test fails clearly when psycopg changes it.

These look at plain psycopg connections, not at the pool's.
"""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from functools import partial
from typing import Any

import psycopg
from psycopg import pq
from psycopg._preparing import PrepareManager
from psycopg.adapt import AdaptersMap
from psycopg.types import TypeInfo
from psycopg.types.string import StrDumper, TextLoader

from .leftovers import Connection

TEXT_OID = psycopg.adapters.types["text"].oid


async def test_the_settings_of_a_connection_are_these_attributes(plain: Connection) -> None:
    assert (plain._autocommit, plain._isolation_level, plain._read_only, plain._deferrable) == (False, None, None, None)
    await plain.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await plain.set_read_only(True)
    await plain.set_deferrable(True)
    await plain.set_autocommit(True)
    assert (plain._autocommit, plain._isolation_level, plain._read_only, plain._deferrable) == (
        True,
        psycopg.IsolationLevel.SERIALIZABLE,
        True,
        True,
    )
    plain._autocommit = False
    assert plain.autocommit is False


async def test_begin_is_kept_as_built_until_it_is_emptied(plain: Connection) -> None:
    await plain.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await plain.execute("select 1")
    assert b"SERIALIZABLE" in plain._begin_statement
    await plain.rollback()
    plain._isolation_level = None
    plain._begin_statement = b""
    cursor = await plain.execute("show transaction_isolation")
    assert await cursor.fetchone() == ("read committed",)


async def test_prepared_statements_are_kept_by_a_manager_that_counts_their_names(plain: Connection) -> None:
    assert isinstance(plain._prepared, PrepareManager)
    assert (plain._prepared.prepare_threshold, plain._prepared.prepared_max) == (5, 100)
    assert plain._prepared._prepared_idx == 0
    plain.prepare_threshold = 0
    plain.prepared_max = None
    assert plain._prepared.prepare_threshold == 0
    await plain.execute("select 1")
    assert plain._prepared._prepared_idx == 1
    anew = PrepareManager()
    anew._prepared_idx = plain._prepared._prepared_idx
    anew.prepare_threshold = 0
    plain._prepared = anew
    # prepared once more, under another name
    names = "select array_agg(name order by name) from pg_prepared_statements where statement = 'select 1'"
    await plain.execute("select 1")
    cursor = await plain.execute(names, prepare=False)
    assert await cursor.fetchone() == (["_pg3_0", "_pg3_1"],)


async def test_handlers_are_lists_and_what_nobody_handles_is_a_deque(plain: Connection) -> None:
    assert (plain._notice_handlers, plain._notify_handlers) == ([], [])
    assert plain._notifies_backlog == deque()
    heard: list[object] = []
    plain._notice_handlers = [heard.append]
    await plain.execute("do $$ begin raise notice 'heard'; end $$")
    assert len(heard) == 1
    await plain.execute("listen here")
    await plain.execute("notify here")
    await plain.commit()
    assert plain._notifies_backlog is not None
    assert len(plain._notifies_backlog) == 1
    plain._notifies_backlog = deque()
    plain._notify_handlers = [heard.append]
    await plain.execute("notify here")
    await plain.commit()
    assert len(heard) == 2


async def test_the_pgconn_hears_through_static_methods_and_a_weak_reference(plain: Connection) -> None:
    """So that another connection object can take over the PGconn, as with `debug`."""
    heard: list[object] = []

    class Other:
        def __init__(self) -> None:
            self._notice_handlers = self._notify_handlers = [heard.append]
            self.pgconn = plain.pgconn

    other: Any = Other()
    plain.pgconn.notice_handler = partial(psycopg.BaseConnection._notice_handler, weakref.ref(other))
    plain.pgconn.notify_handler = partial(psycopg.BaseConnection._notify_handler, weakref.ref(other))
    await plain.execute("do $$ begin raise notice 'heard'; end $$")
    await plain.execute("listen here")
    await plain.execute("notify here")
    await plain.commit()
    assert len(heard) == 2


def test_the_types_of_the_handlers_are_where_they_are_imported_from() -> None:
    assert {"NoticeHandler", "NotifyHandler"} <= vars(psycopg._connection_base).keys()


async def test_adapters_are_three_maps_and_a_registry_copied_on_write(plain: Connection) -> None:
    """A comparison of these by identity finds every change; a copy is not changed with its original."""
    original = plain.adapters
    assert plain._adapters is original
    copy = AdaptersMap(original)
    before = (original._dumpers, original._dumpers_by_oid, original._loaders, original.types._registry)
    assert (copy._dumpers, copy._dumpers_by_oid, copy._loaders, copy.types._registry) == before
    loader = copy.get_loader(TEXT_OID, pq.Format.TEXT)

    class Own(TextLoader):
        pass

    original.register_loader("text", Own)
    TypeInfo("own_type", 424242, 424243).register(original)
    original.register_dumper(Own, StrDumper)
    assert copy.get_loader(TEXT_OID, pq.Format.TEXT) is loader
    assert copy.types.get("own_type") is None
    assert copy._loaders != original._loaders
    assert copy._dumpers != original._dumpers
    assert copy.types._registry != original.types._registry


async def test_registering_goes_through_these_three_methods(plain: Connection) -> None:
    """Those by which the pool's own maps learn that somebody registers something."""
    parameters = {
        method: list(inspect.signature(method).parameters)
        for method in (AdaptersMap.register_dumper, AdaptersMap.register_loader, type(plain.adapters.types).add)
    }
    assert list(parameters.values()) == [["self", "cls", "dumper"], ["self", "oid", "loader"], ["self", "info"]]
