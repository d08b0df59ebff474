"""What one-shot statements rely on in psycopg: queries converted, rows loaded, statements prepared. Each test fails
clearly when psycopg changes it.

These look at plain psycopg connections, not at the pool's.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import pq, rows, sql
from psycopg._preparing import Prepare, PrepareManager
from psycopg._queries import PostgresClientQuery, PostgresQuery, PostgresRawQuery
from psycopg.adapt import Transformer
from psycopg.types.string import StrDumper, TextLoader

from .leftovers import Connection

if TYPE_CHECKING:
    from psycopg.abc import Buffer
    from psycopg.pq.abc import PGresult

INT2 = psycopg.adapters.types["int2"].oid
INT4 = psycopg.adapters.types["int4"].oid
UNKNOWN = 0

TEXTUAL, BINARY = pq.Format.TEXT, pq.Format.BINARY


def converted(connection: Connection, query: Any, params: Any, query_class: Any = PostgresQuery) -> PostgresQuery:
    pgq: PostgresQuery = query_class(Transformer(connection))
    pgq.convert(query, params)
    return pgq


def values_of(pgq: PostgresQuery) -> list[bytes | None]:
    assert pgq.params is not None
    return [None if value is None else bytes(value) for value in pgq.params]


# --- queries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "params"),
    [
        ("select %s, %t, %b, 1 %% 2", ("a", 1, 2)),
        (b"select %s, %t, %b, 1 %% 2", ["a", 1, 2]),
        (sql.SQL("select {}, %t, %b, 1 %% 2").format(sql.Placeholder()), ("a", 1, 2)),
        ("select %(s)s, %(t)t, %(b)b, 1 %% 2", {"b": 2, "t": 1, "s": "a"}),
    ],
)
async def test_a_query_is_converted_to_what_the_server_takes(plain: Connection, query: Any, params: Any) -> None:
    pgq = converted(plain, query, params)
    assert pgq.query == b"select $1, $2, $3, 1 % 2"
    assert values_of(pgq) == [b"a", b"1", b"\x00\x02"]
    assert pgq.types == (UNKNOWN, INT2, INT2)
    assert list(pgq.formats or ()) == [TEXTUAL, TEXTUAL, BINARY]


async def test_none_is_a_parameter_of_no_bytes(plain: Connection) -> None:
    assert values_of(converted(plain, "select %s, %s", (None, ""))) == [None, b""]


@pytest.mark.parametrize("query", ["select 1 % 2", b"select 1 % 2", sql.SQL("select 1 % 2")])
async def test_a_query_without_parameters_is_left_as_it_is(plain: Connection, query: Any) -> None:
    """That is why one with an empty sequence is another query: `%%` is `%` in it."""
    pgq = converted(plain, query, None)
    assert (pgq.query, pgq.params, pgq.types, pgq.formats) == (b"select 1 % 2", None, (), None)
    assert converted(plain, "select 1 %% 2", ()).query == b"select 1 % 2"
    assert converted(plain, "select 1 %% 2", None).query == b"select 1 %% 2"


async def test_a_converted_query_takes_other_parameters_and_leaves_the_types_of_the_first_alone(
    plain: Connection,
) -> None:
    pgq = converted(plain, "select %t, %b", (1, 2))
    text, types = pgq.query, pgq.types
    pgq.dump((100_000, 3))
    assert values_of(pgq) == [b"100000", b"\x00\x03"]
    assert pgq.query is text
    assert (types, pgq.types) == ((INT2, INT2), (INT4, INT2))
    assert hash(types) != hash(pgq.types)


async def test_a_converted_query_without_parameters_is_dumped_without_any(plain: Connection) -> None:
    pgq = converted(plain, "select 1", None)
    pgq.dump(None)
    assert (pgq.query, pgq.params, pgq.types, pgq.formats) == (b"select 1", None, (), None)


@pytest.mark.parametrize("wrong", ["ab", ("a",), ["a", "b", "c"]], ids=["text", "few", "many"])
async def test_parameters_that_do_not_fit_are_refused_and_the_next_are_taken(plain: Connection, wrong: Any) -> None:
    pgq = converted(plain, "select %s, %s", ("a", "b"))
    with pytest.raises((TypeError, psycopg.ProgrammingError)):
        pgq.dump(wrong)
    pgq.dump(("c", "d"))
    assert values_of(pgq) == [b"c", b"d"]


async def test_parameters_by_name_that_do_not_fit_are_refused_and_the_next_are_taken(plain: Connection) -> None:
    pgq = converted(plain, "select %(a)s", {"a": "b"})
    for wrong in ({"b": "a"}, ("a",)):
        with pytest.raises((TypeError, psycopg.ProgrammingError)):
            pgq.dump(wrong)
    pgq.dump({"a": "c", "b": "d"})
    assert values_of(pgq) == [b"c"]


async def test_an_adapter_that_fails_does_so_before_anything_is_sent_and_the_next_parameters_are_taken(
    plain: Connection,
) -> None:
    class Odd:
        def __init__(self, is_good: bool) -> None:
            self.is_good = is_good

    class OddDumper(StrDumper):
        def dump(self, obj: Any) -> Buffer:
            if not obj.is_good:
                raise LookupError("odd")
            return b"good"

    plain.adapters.register_dumper(Odd, OddDumper)
    pgq = converted(plain, "select %s", (Odd(True),))
    with pytest.raises(LookupError, match="odd"):
        pgq.dump((Odd(False),))
    pgq.dump((Odd(True),))
    assert values_of(pgq) == [b"good"]


async def test_a_raw_query_has_the_servers_own_placeholders(plain: Connection) -> None:
    pgq = converted(plain, "select $1, $2, 1 % 2", ("a", 1), PostgresRawQuery)
    assert pgq.query == b"select $1, $2, 1 % 2"
    assert values_of(pgq) == [b"a", b"\x00\x01"]
    assert pgq.types == (UNKNOWN, INT2)
    pgq.dump(("b", 2))
    assert values_of(pgq) == [b"b", b"\x00\x02"]
    assert issubclass(PostgresRawQuery, PostgresQuery)


def test_cursor_classes_name_the_class_that_converts_their_queries() -> None:
    def query_class(cursor_class: Any) -> object:
        return cursor_class._query_cls

    class Own(psycopg.AsyncRawCursor[Any]):
        pass

    assert query_class(psycopg.AsyncCursor) is query_class(psycopg.Cursor) is PostgresQuery
    assert query_class(psycopg.AsyncRawCursor) is query_class(psycopg.RawCursor) is PostgresRawQuery
    assert query_class(Own) is query_class(psycopg.AsyncRawServerCursor) is PostgresRawQuery
    assert query_class(psycopg.AsyncClientCursor) is query_class(psycopg.ClientCursor) is PostgresClientQuery
    assert not issubclass(PostgresClientQuery, PostgresRawQuery)


# --- rows ---------------------------------------------------------------------------------------------------


def result_of(connection: Connection, query: bytes) -> PGresult:
    result = connection.pgconn.exec_(query)
    assert result.status == pq.ExecStatus.TUPLES_OK
    return result


async def test_rows_are_loaded_from_the_result_that_was_set_last(plain: Connection) -> None:
    transformer = Transformer(plain)
    for first in (1, 11):
        transformer.set_pgresult(
            result_of(plain, b"select n, n::text from generate_series(%d, %d) n" % (first, first + 2))
        )
        assert transformer.load_row(0, tuple) == (first, str(first))
        assert transformer.load_rows(1, 3, tuple) == [(first + 1, str(first + 1)), (first + 2, str(first + 2))]
    assert transformer.encoding == "utf-8"


async def test_a_transformer_of_another_one_has_its_adapters_and_a_result_of_its_own(plain: Connection) -> None:
    plain.adapters.register_loader("int4", TextLoader)
    transformer = Transformer(plain)
    another = Transformer(transformer)
    another.set_pgresult(result_of(plain, b"select 1"))
    transformer.set_pgresult(result_of(plain, b"select 2"))
    assert another.load_row(0, tuple) == ("1",)
    assert transformer.load_row(0, tuple) == ("2",)


async def test_a_row_factory_asks_its_cursor_for_the_result_that_it_was_given(plain: Connection) -> None:
    result = result_of(plain, b"select 1 as one, 2 as two")
    transformer = Transformer(plain)
    transformer.set_pgresult(result)
    cursor = psycopg.AsyncCursor(plain)
    cursor.pgresult = result
    assert transformer.load_row(0, rows.dict_row(cursor)) == {"one": 1, "two": 2}


# --- prepared statements ------------------------------------------------------------------------------------


def manager(threshold: int | None, most: int = 100) -> PrepareManager:
    prepared = PrepareManager()
    prepared.prepare_threshold = threshold
    prepared.prepared_max = most
    return prepared


def use(prepared: PrepareManager, pgq: PostgresQuery) -> tuple[Prepare, bytes]:
    """What a cursor does for a statement of which the server has not complained."""
    prepare, name = prepared.get(pgq)
    if prepared.maybe_add_to_cache(pgq, prepare, name) is not None or prepare is Prepare.SHOULD:
        prepared._rotate()
    return prepare, name


async def test_a_statement_is_to_be_prepared_at_the_threshold_and_has_that_name_from_then_on(plain: Connection) -> None:
    prepared = manager(2)
    pgq = converted(plain, "select %s", (1,))
    yes, should, no = Prepare.YES, Prepare.SHOULD, Prepare.NO
    assert [use(prepared, pgq) for _ in range(5)] == [
        (no, b""),
        (no, b""),
        (should, b"_pg3_0"),
        (yes, b"_pg3_0"),
        (yes, b"_pg3_0"),
    ]
    assert prepared._prepared_idx == 1


async def test_a_statement_is_known_as_prepared_as_soon_as_that_is_noted_and_not_when_it_was_answered(
    plain: Connection,
) -> None:
    prepared = manager(0)
    pgq = converted(plain, "select 1", None)
    prepare, name = prepared.get(pgq)
    assert prepared.maybe_add_to_cache(pgq, prepare, name) == (b"select 1", ())
    assert prepared.get(pgq) == (Prepare.YES, name)
    assert prepared.maybe_add_to_cache(pgq, Prepare.YES, name) is None


async def test_without_a_threshold_nothing_is_prepared_or_counted(plain: Connection) -> None:
    prepared = manager(None)
    pgq = converted(plain, "select 1", None)
    assert [use(prepared, pgq) for _ in range(10)] == [(Prepare.NO, b"")] * 10
    assert not prepared._names


async def test_names_are_kept_by_text_and_types_of_the_parameters(plain: Connection) -> None:
    prepared = manager(0)
    pgq = converted(plain, "select %s", (1,))
    use(prepared, pgq)
    first = pgq.query, pgq.types
    pgq.dump((100_000,))
    use(prepared, pgq)
    assert dict(prepared._names) == {first: b"_pg3_0", (pgq.query, pgq.types): b"_pg3_1"}


async def test_a_name_that_is_taken_out_is_not_given_again(plain: Connection) -> None:
    prepared = manager(0)
    pgq = converted(plain, "select 1", None)
    use(prepared, pgq)
    del prepared._names[pgq.query, pgq.types]
    assert use(prepared, pgq) == (Prepare.SHOULD, b"_pg3_1")
    assert not prepared._to_flush


async def test_the_one_that_was_not_used_for_longest_goes_when_there_are_too_many(plain: Connection) -> None:
    prepared = manager(0, most=2)
    assert prepared._to_flush == deque()
    first, second, third = (converted(plain, f"select {number}", None) for number in range(3))
    for pgq in (first, second, first, third):
        assert not prepared._to_flush
        use(prepared, pgq)
    assert list(prepared._names.values()) == [b"_pg3_0", b"_pg3_2"]
    assert prepared._to_flush == deque([b"_pg3_1"])


async def test_texts_that_are_counted_only_are_not_kept_for_ever_either(plain: Connection) -> None:
    prepared = manager(5, most=2)
    for number in range(10):
        use(prepared, converted(plain, f"select {number}", None))
    assert len(prepared._counts) == 2
    assert not prepared._to_flush


async def test_none_among_what_is_to_be_deallocated_stands_for_all(plain: Connection) -> None:
    """That is what is left there by what may have changed the result of any statement."""
    prepared = manager(0)
    use(prepared, converted(plain, "select 1", None))
    prepared.clear()
    assert not prepared._names
    assert prepared._to_flush == deque([None])


async def test_what_cursors_prepare_is_found_by_whoever_asks_their_connections_manager(plain: Connection) -> None:
    """And the other way round: one-shot statements and leases share the statements of a connection."""
    plain.prepare_threshold = 0
    await plain.set_autocommit(True)
    await plain.execute("select %s::int", (1,))
    pgq = converted(plain, "select %s::int", (2,))
    prepare, name = plain._prepared.get(pgq)
    assert prepare is Prepare.YES
    assert plain.pgconn.exec_prepared(name, [b"\x00\x02"], [BINARY]).get_value(0, 0) == b"2"

    another = converted(plain, "select %s::int + 1", (1,))
    prepare, name = plain._prepared.get(another)
    assert prepare is Prepare.SHOULD
    assert plain.pgconn.prepare(name, another.query, another.types).status == pq.ExecStatus.COMMAND_OK
    plain._prepared.maybe_add_to_cache(another, prepare, name)
    assert await (await plain.execute("select %s::int + 1", (2,))).fetchone() == (3,)
    cursor = await plain.execute("select count(*) from pg_prepared_statements", prepare=False)
    assert await cursor.fetchone() == (2,)
