"""What a user can change on a connection without the server knowing: each as a change, and as a look at it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.adapt import Dumper, Loader
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg.types.enum import EnumInfo, register_enum

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg.abc import Buffer

Connection = psycopg.AsyncConnection[Any]


class Shouting(Loader):
    """A loader that returns text in capitals."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode().upper()


class DateAsNumber(Dumper):
    """A dumper that sends a date as its ordinal number."""

    oid = psycopg.adapters.types["int4"].oid

    def dump(self, obj: date) -> bytes:
        return str(obj.toordinal()).encode()


class Money:
    """A type that psycopg knows nothing of."""


class MoneyDumper(Dumper):
    """Sends every sum of it as 42."""

    oid = psycopg.adapters.types["int4"].oid

    def dump(self, obj: Money) -> bytes:
        return b"42"


class OwnCursor(psycopg.AsyncCursor[Any]):
    """Somebody's own cursor class."""


class OwnServerCursor(psycopg.AsyncServerCursor[Any]):
    """Somebody's own named cursor class."""


async def first_value(conn: Connection, query: str, parameters: tuple[Any, ...] = ()) -> Any:
    """The first column of the first row, as rows of any kind give it."""
    cursor = await conn.execute(query.encode(), parameters)
    row: Any = await cursor.fetchone()
    return next(iter(row.values())) if isinstance(row, dict) else row[0]


async def set_isolation_level(conn: Connection) -> None:
    await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await conn.execute("select 1")  # psycopg keeps the BEGIN that it built for it
    await conn.commit()


async def transaction_settings(conn: Connection) -> tuple[Any, ...]:
    names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
    return tuple([await first_value(conn, f"show {name}") for name in names])


async def set_read_only(conn: Connection) -> None:
    await conn.set_read_only(True)
    await conn.execute("select 1")
    await conn.commit()


async def set_deferrable(conn: Connection) -> None:
    await conn.set_deferrable(True)
    await conn.execute("select 1")
    await conn.commit()


async def set_autocommit(conn: Connection) -> None:
    await conn.set_autocommit(True)


async def autocommit(conn: Connection) -> tuple[bool, psycopg.pq.TransactionStatus]:
    await conn.execute("select 1")
    return conn.autocommit, conn.info.transaction_status


async def set_row_factory(conn: Connection) -> None:
    conn.row_factory = dict_row


async def row_type(conn: Connection) -> type:
    return type(await (await conn.execute("select 1 as one")).fetchone())


async def set_cursor_factory(conn: Connection) -> None:
    conn.cursor_factory = OwnCursor


async def set_server_cursor_factory(conn: Connection) -> None:
    conn.server_cursor_factory = OwnServerCursor


async def server_cursor_type(conn: Connection) -> type:
    async with conn.cursor("named") as cursor:
        return type(cursor)


async def set_prepare_threshold(conn: Connection) -> None:
    conn.prepare_threshold = 0


async def switch_preparing_off(conn: Connection) -> None:
    conn.prepare_threshold = None


async def prepare_threshold(conn: Connection) -> int | None:
    return conn.prepare_threshold


async def set_prepared_max(conn: Connection) -> None:
    conn.prepared_max = 3


async def set_no_prepared_max(conn: Connection) -> None:
    conn.prepared_max = None


async def prepared_max(conn: Connection) -> int | None:
    return conn.prepared_max


notices: list[str] = []
notifications: list[str] = []


async def add_notice_handler(conn: Connection) -> None:
    conn.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))


async def notices_heard(conn: Connection) -> list[str]:
    notices.clear()
    await conn.execute("do $$ begin raise notice 'listen'; end $$")
    return list(notices)


async def add_notify_handler(conn: Connection) -> None:
    conn.add_notify_handler(lambda notification: notifications.append(notification.payload))


async def notifications_heard(conn: Connection) -> list[str]:
    notifications.clear()
    await conn.execute("listen here")
    await conn.execute("notify here, 'something'")
    await conn.commit()
    await conn.execute("unlisten *")
    await conn.commit()
    return list(notifications)


async def register_dumper(conn: Connection) -> None:
    conn.adapters.register_dumper(date, DateAsNumber)


async def register_dumper_by_name(conn: Connection) -> None:
    conn.adapters.register_dumper(f"{Money.__module__}.{Money.__qualname__}", MoneyDumper)


async def date_as_sent(conn: Connection) -> str:
    return str(await first_value(conn, "select pg_typeof(%s)::text", (date(2020, 1, 2),)))


async def register_dumper_of_own_type(conn: Connection) -> None:
    conn.adapters.register_dumper(Money, MoneyDumper)


async def knows_own_type(conn: Connection) -> bool:
    try:
        return bool(await first_value(conn, "select %s = 42", (Money(),)))
    except psycopg.ProgrammingError:
        return False


async def register_loader(conn: Connection) -> None:
    conn.adapters.register_loader("text", Shouting)


async def text_as_loaded(conn: Connection) -> Any:
    return await first_value(conn, "select 'loud'::text")


async def register_type(conn: Connection) -> None:
    TypeInfo("own_type", 424242, 424243).register(conn)


async def knows_type(conn: Connection) -> bool:
    return conn.adapters.types.get("own_type") is not None


async def add_type(conn: Connection) -> None:
    conn.adapters.types.add(TypeInfo("own_type", 424242, 424243))


async def register_own_enum(conn: Connection) -> None:
    info = EnumInfo("own_enum", 434343, 434344, labels=["yes", "no"])
    register_enum(info, conn)


async def knows_enum(conn: Connection) -> bool:
    return conn.adapters.types.get("own_enum") is not None


@dataclass(frozen=True)
class Setting:
    """A change, which needs no statement unless it says so, and a look at what it changes."""

    change: Callable[[Connection], Awaitable[None]]
    look: Callable[[Connection], Awaitable[object]]

    def __str__(self) -> str:
        return getattr(self.change, "__name__", "?")


async def cursor_type(conn: Connection) -> type:
    return type(conn.cursor())


SETTINGS = [
    Setting(set_autocommit, autocommit),
    Setting(set_isolation_level, transaction_settings),
    Setting(set_read_only, transaction_settings),
    Setting(set_deferrable, transaction_settings),
    Setting(set_row_factory, row_type),
    Setting(set_cursor_factory, cursor_type),
    Setting(set_server_cursor_factory, server_cursor_type),
    Setting(set_prepare_threshold, prepare_threshold),
    Setting(switch_preparing_off, prepare_threshold),
    Setting(set_prepared_max, prepared_max),
    Setting(set_no_prepared_max, prepared_max),
    Setting(add_notice_handler, notices_heard),
    Setting(add_notify_handler, notifications_heard),
    Setting(register_dumper, date_as_sent),
    Setting(register_dumper_by_name, knows_own_type),
    Setting(register_dumper_of_own_type, knows_own_type),
    Setting(register_loader, text_as_loaded),
    Setting(register_type, knows_type),
    Setting(add_type, knows_type),
    Setting(register_own_enum, knows_enum),
]
