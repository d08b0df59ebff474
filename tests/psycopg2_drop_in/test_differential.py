"""The same small scripts on the real psycopg2 and on the drop-in: what they observe is equal.

A script takes the module and a DSN, and returns what it has observed.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import asyncpool.psycopg2

psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
pytest.importorskip("psycopg2.pool")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def connection(module: Any, dsn: str) -> Iterator[Any]:
    """A connection of no pool, and a cursor."""
    conn = module.connect(dsn)
    try:
        yield conn
    finally:
        conn.close()


@contextmanager
def pool_of(module: Any, dsn: str, minconn: int = 1, maxconn: int = 2) -> Iterator[Any]:
    pool = module.pool.ThreadedConnectionPool(minconn, maxconn, dsn)
    try:
        yield pool
    finally:
        if not pool.closed:
            pool.closeall()


def outcome_of(function: Callable[[], object], module: Any = None) -> object:
    """The name of what it raises, or None. With the module, that of the first of PEP 249's classes that it is."""
    try:
        function()
    except Exception as error:  # noqa: BLE001  # which one it is, is what is compared
        names = [name for name in PEP_249 if module is not None and isinstance(error, getattr(module, name))]
        return names[0] if names else type(error).__name__
    return None


PEP_249 = ("DataError", "IntegrityError", "InternalError", "ProgrammingError", "NotSupportedError", "OperationalError")


def comparable(observed: Any) -> Any:
    """With the types, as 1 == True and a list is no tuple; with the contents of what compares by identity."""
    if isinstance(observed, (list, tuple)):
        return type(observed).__name__, [comparable(each) for each in observed]
    if isinstance(observed, memoryview):
        return "memoryview", bytes(observed)
    if isinstance(observed, decimal.Decimal):
        return "Decimal", str(observed)
    if isinstance(observed, float):
        return "float", repr(observed)
    if isinstance(observed, dt.datetime):
        return "datetime", observed.isoformat()
    if isinstance(observed, int) and not isinstance(observed, bool):
        return "int", int(observed)  # psycopg 3's enums are ints with a name
    return type(observed).__name__, observed


def observations(script: Callable[[Any, str], Any], dsn: str) -> tuple[Any, Any]:
    """What the script observes on the real one, and on ours."""
    return comparable(script(psycopg2, dsn)), comparable(script(asyncpool.psycopg2, dsn))


# --- values -------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A tuple with a name."""

    x: int
    y: int


class Colour(str, enum.Enum):  # noqa: UP042  # another kind than StrEnum
    """A str with a name."""

    RED = "red"


QUERIES: list[tuple[str, Any]] = [
    ("select 1, 1::smallint, 1::bigint, 1.5, 1.5::float8, 'NaN'::numeric, 1::oid, true, null", None),
    ("select 'x', 'x'::varchar(5), 'x'::char(5), 'x'::name, 'x'::\"char\", ''", None),
    ("select '2024-01-01'::date, '2024-01-01 10:00:00.5'::timestamp, '10:00'::time, '10:00+02'::timetz", None),
    ("select '1 day'::interval, '-1 day +02:00'::interval, '1 year 2 mons 3 days'::interval, '100:00'::interval", None),
    ("select '\\x00ff'::bytea, ''::bytea, array['\\x00'::bytea]", None),
    ("select 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid", None),
    ("select '127.0.0.1'::inet, '127.0.0.0/8'::cidr, '08:00:2b:01:02:03'::macaddr, array['127.0.0.1'::inet]", None),
    ("select '{\"a\": [1, 1.5, null]}'::json, '{\"a\": 1}'::jsonb, 'null'::jsonb, array['{}'::jsonb]", None),
    ("select row(1, 'x'), (1, 2)", None),
    ("select array[1, null], array[[1, 2], [3, 4]], array['a,b', '{}', null], '{}'::int[], array[true, false]", None),
    ("select array['2024-01-01'::date], array['1 day'::interval], array[1.5]", None),
    ("select '1.5'::money, B'101', '(1,2)'::point, 'pg_class'::regclass, ''::tsvector", None),
    ("select int4range(1, 3) = '[1,2]'::int4range", None),
    ("select 1 as a, 2 as a", None),
    ("select 100 % 7, 'a%b', '%s', '%%'", None),
    ("select 100 %% 7, 'a%%b', %s", (1,)),
    ("select %(a)s, %(b)s, %(a)s", {"a": 1, "b": "x", "c": 3}),
    ("select %s, %s", [1, 2]),
    ("select '$1', %s", (1,)),
    ("select - %s, -%s, 1 - %s, 1-%s", (-1, -1, -1, -1)),
    ("select 1 in %s, 'a' in %s, 'it''s' in %s", ((1, 2), ("b",), ("it's", "b"))),
    ("select '2024-01-01'::date in %s, null in %s", ((dt.date(2024, 1, 1),), (None, 1))),
    ("select (1, 2) in %s", (((1, 2), (3, 4)),)),
    ("select * from (values %s, %s) v", ((1, "a"), (2, "b"))),
    ("select * from (values %s) v", (Point(1, 2),)),
    ("select 1 = any(%s), 'a' = any(%s), 1 = any(%s)", ([1, 2], ["b"], [])),
    ("select * from unnest(%s) with ordinality", (["a", "b,c", 'q"u\\o', "it's", None],)),
    ("select %s || %s, array_length(%s, 1), to_json(%s)", ([1], [100000], ["a"], ["a"])),
    ("select interval %s, date %s, %s::date", ("1 day", "2024-01-01", "2024-01-01")),
    ("select 1 where 1 is %s or %s is null", (None, None)),
    ("select date_trunc('day', %s), %s::timestamptz", (dt.datetime(2024, 1, 1, 5), dt.datetime.max)),
    ("select round(%s, 1), json_build_object('a', %s), coalesce(%s, 'x')", (decimal.Decimal("1.25"), "b", None)),
]

PARAMETERS = [
    *(1, -1, 2**31, 2**63, 10**20, 1.5, -0.0, 1e20, 1e-7, float("nan"), float("inf"), True, None),
    *("", " ", "x", "it's", "back\\slash", "%s", "é", "\n", Colour.RED, b"", b"\x00\xff\\'", bytearray(b"x")),
    *(decimal.Decimal("1.50"), decimal.Decimal("NaN"), dt.date(2024, 1, 1), dt.date.max),
    *(dt.datetime(2024, 1, 1, 10, 0, 0, 5), dt.datetime(2024, 7, 1, tzinfo=dt.UTC)),
    *(dt.time(10, 0), dt.timedelta(days=-1, hours=5), dt.timedelta(microseconds=1)),
    *([1, 2], [-1, 2**40], [1.5, 1], [None], [None, 1], ["a", "b,c", None], [[1, 2], [3, 4]], [b"x"], [True]),
    *([dt.date(2024, 1, 1)], [decimal.Decimal(1)], []),
]


@pytest.mark.parametrize(("query", "parameters"), QUERIES, ids=[query for query, _ in QUERIES])
def test_rows_are_equal(dsn: str, query: str, parameters: Any) -> None:
    def rows(module: Any, dsn: str) -> Any:
        with connection(module, dsn) as conn:
            cursor = conn.cursor()
            cursor.execute(query, parameters)
            return [column[0] for column in cursor.description], cursor.rowcount, cursor.fetchall()

    real, ours = observations(rows, dsn)
    assert ours == real


@pytest.mark.parametrize("parameter", PARAMETERS, ids=repr)
def test_a_parameter_comes_back_as_the_same_value_of_the_same_type_on_the_server(dsn: str, parameter: Any) -> None:
    def returned(module: Any, dsn: str) -> Any:
        with connection(module, dsn) as conn:
            cursor = conn.cursor()
            cursor.execute("select %s, pg_typeof(%s)::text", (parameter, parameter))
            return cursor.fetchone()

    real, ours = observations(returned, dsn)
    assert ours == real


# --- scripts ------------------------------------------------------------------------------------------------


def last_of_several_results(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        cursor.execute("select 1; select 2 as b where %s = 1", (1,))
        observed = [cursor.fetchall(), cursor.description[0][0]]
        cursor.execute("select 1; create temp table t (i int)")
        observed += [cursor.description, cursor.rowcount, outcome_of(cursor.fetchall, module)]
        cursor.execute("create temp table u (i int); insert into u values (1), (2)")
        return [*observed, cursor.rowcount, cursor.statusmessage]


def counts_and_messages(module: Any, dsn: str) -> Any:
    observed = []
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        for statement in (
            "create temp table t (id serial, i int)",
            "insert into t (i) values (1), (2) returning id",
            "select * from t",
            "update t set i = 3",
            "delete from t",
            "select * from t",
            "set timezone = 'UTC'",
        ):
            cursor.execute(statement)
            observed.append((cursor.rowcount, cursor.statusmessage, cursor.description is None))
    return observed


def rows_one_by_one(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        cursor.execute("select * from generate_series(1, 9)")
        observed = [cursor.fetchone(), cursor.fetchmany(), cursor.fetchmany(2), cursor.rownumber]
        cursor.arraysize = 2
        observed += [cursor.fetchmany(), next(cursor), cursor.fetchmany(size=1), list(cursor), cursor.fetchone()]
        cursor.scroll(-2)
        observed += [cursor.fetchone()]
        cursor.scroll(1, mode="absolute")
        conn.commit()
        return [*observed, cursor.fetchall(), cursor.fetchall(), cursor.fetchmany()]


def blocks(module: Any, dsn: str) -> Any:
    observed: list[Any] = []
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        for autocommit in (False, True):
            conn.autocommit = autocommit
            cursor.execute("create temp table if not exists t (i int unique deferrable initially deferred)")
            if not autocommit:
                conn.commit()

            def fill(*numbers: int, then: Callable[[], object] = lambda: None) -> None:
                with conn as entered, conn.cursor() as inner:
                    observed.append((entered is conn, conn.info.transaction_status))
                    for number in numbers:
                        inner.execute("insert into t values (%s)", (number,))
                    observed.append(conn.info.transaction_status)
                    then()

            observed.append(outcome_of(lambda: fill(1), module))
            observed.append(outcome_of(lambda: fill(2, then=lambda: int("three")), module))
            observed.append(outcome_of(lambda: fill(1), module))
            observed.append(outcome_of(lambda: fill(3, then=conn.commit), module))
            observed.append(outcome_of(lambda: fill(4, then=conn.rollback), module))
            cursor.execute("delete from t returning i")
            observed.append((cursor.fetchall(), conn.autocommit, conn.closed == 0, conn.info.transaction_status))
            if not autocommit:
                conn.commit()
    return observed


def executing_many(module: Any, dsn: str) -> Any:
    observed: list[Any] = []
    with connection(module, dsn) as conn:
        conn.autocommit = True
        cursor, other = conn.cursor(), conn.cursor()
        cursor.execute("create temp table t (i int, at timestamptz default now())")
        bad = [(1,), (2,), ("three",), (4,)]
        observed.append(outcome_of(lambda: cursor.executemany("insert into t values (%s)", bad), module))
        cursor.execute("select i from t")
        observed.append(cursor.fetchall())

        def numbers() -> Iterator[Any]:
            for number in range(3):
                other.execute("select %s", (number,))
                yield other.fetchone()

        cursor.executemany("insert into t values (%s)", numbers())
        observed.append(cursor.rowcount)
        cursor.execute("select count(*), count(distinct at) from t")
        observed.append(cursor.fetchall())
        cursor.executemany("delete from t where i in %s", [((0, 1),), ((2,),)])
        observed.append(cursor.rowcount)
        cursor.executemany("insert into t values (%(i)s); insert into t values (0)", [{"i": 1}, {"i": 2}])
        cursor.execute("select count(*) from t")
        observed.append((cursor.fetchall(), cursor.rowcount))
        cursor.executemany("insert into t values (%s)", [])
        cursor.executemany("vacuum pg_class", [(), ()])
    return observed


def named_cursors(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor("numbers")
        cursor.itersize = 2
        cursor.execute("select i, 'a%%' from generate_series(1, %s) i where i in %s", (9, (1, 2, 3, 4, 5, 6, 9)))
        observed = [cursor.fetchone(), cursor.fetchmany(), cursor.fetchmany(2), next(iter(cursor)), cursor.fetchall()]
        observed += [cursor.fetchone(), cursor.fetchmany(3), cursor.name, cursor.closed]
        cursor.close()
        with conn.cursor('My "n"', scrollable=True) as cursor:
            cursor.execute("select * from generate_series(1, 5)")
            cursor.scroll(3)
            observed.append(cursor.fetchone())
            cursor.scroll(0, mode="absolute")
            observed.append(cursor.fetchone())
        with conn.cursor(name="held", withhold=True) as cursor:
            cursor.execute("select 5 % 3, 'a%'")
            conn.commit()
            observed.append(cursor.fetchall())
        cursor = conn.cursor("lost")
        cursor.execute("select 1")
        conn.commit()
        observed.append(outcome_of(cursor.fetchone, module))
        outcome_of(cursor.close)  # psycopg2 raises here too
        return observed


def isolation_levels(module: Any, dsn: str) -> Any:
    observed: list[Any] = []
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        for level in (1, 2, 3, 4, None, 3, 0):
            observed.append(conn.set_isolation_level(level))
            cursor.execute("show transaction_isolation")
            observed.append((cursor.fetchone(), conn.autocommit, conn.info.transaction_status))
            conn.rollback()
        conn.autocommit = False
        cursor.execute("show transaction_isolation")
        observed.append(cursor.fetchone())
        conn.rollback()
        names: list[Any] = [1, 2, 3, 4, "serializable", "READ COMMITTED", None]
        for level in names:
            conn.isolation_level = level
            cursor.execute("show transaction_isolation")
            observed.append(cursor.fetchone())
            conn.rollback()
        former = conn.isolation_level
        conn.set_isolation_level(0)
        conn.set_isolation_level(former)
        observed.append((former, conn.autocommit))
        return [*observed, *(outcome_of(lambda: conn.set_isolation_level(level)) for level in (5, -1))]  # noqa: B023


def read_only_and_deferrable(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        observed = [conn.readonly, conn.deferrable]
        conn.readonly = True
        conn.deferrable = True
        conn.isolation_level = 3
        for setting in ("read_only", "deferrable"):
            cursor.execute(f"show transaction_{setting}")
            observed.append(cursor.fetchone())
        observed.append(outcome_of(lambda: cursor.execute("create table never (i int)"), module))
        return observed


def transactions(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        observed = [conn.info.transaction_status]
        cursor.execute("select 1")
        observed.append(conn.info.transaction_status)
        observed.append(outcome_of(lambda: setattr(conn, "autocommit", True), module))
        observed.append(outcome_of(lambda: cursor.execute("nonsense"), module))
        observed.append(conn.info.transaction_status)
        observed.append(outcome_of(lambda: cursor.execute("select 1"), module))
        conn.commit()  # a rollback
        observed.append(conn.info.transaction_status)
        cursor.execute("savepoint a; select 1; rollback to a")
        cursor.execute("commit")
        observed.append(conn.info.transaction_status)
        conn.rollback()  # psycopg2 does not see that it was committed
        conn.autocommit = True
        cursor.execute("vacuum pg_class")
        cursor.execute("begin")
        observed.append(conn.info.transaction_status)
        cursor.execute("rollback")
        return [*observed, conn.info.transaction_status]


def errors(module: Any, dsn: str) -> Any:
    observed: list[Any] = []
    with connection(module, dsn) as conn:
        conn.autocommit = True
        cursor = conn.cursor()
        cursor.execute("create temp table t (i int unique not null)")
        for statement in (
            "insert into t values (1), (1)",
            "insert into t values (null)",
            "select * from nowhere",
            "select 1/0",
            "nonsense",
            "select 'x'::int",
            "insert into t values (10000000000)",
        ):
            try:
                cursor.execute(statement)
            except module.Error as error:
                observed.append((type(error).__name__, error.diag.sqlstate, error.diag.constraint_name))
                observed.append(str(error).strip())
                observed.append([isinstance(error, getattr(module, name)) for name in (*PEP_249, "DatabaseError")])
    return observed


def what_is_closed(module: Any, dsn: str) -> Any:
    conn = module.connect(dsn)
    cursor = conn.cursor()
    observed = [conn.closed == 0, bool(conn.closed), cursor.closed]
    cursor.close()
    observed += [cursor.closed, outcome_of(lambda: cursor.execute("select 1")), outcome_of(cursor.fetchone)]
    conn.close()
    conn.close()
    observed += [conn.closed == 0, bool(conn.closed)]
    return [*observed, *(outcome_of(f, module) is not None for f in (conn.cursor, conn.commit, conn.rollback))]


def moments_with_time_zone(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        cursor.execute("set timezone = 'Europe/Berlin'")
        # Summer time begins, and ends, between these.
        cursor.execute(
            "select '2024-03-30 12:00'::timestamptz, '2024-03-31 12:00'::timestamptz,"
            " '2024-10-27 02:30+02'::timestamptz, '2024-10-27 02:30+01'::timestamptz"
        )
        saturday, sunday, before, after = cursor.fetchone()
        day = dt.timedelta(days=1)
        return [
            saturday,
            sunday,
            sunday - saturday,
            saturday + day,
            after - before,
            after > before,
            after.fold,
            sunday.tzname(),
        ]


def where_it_connects(module: Any, dsn: str) -> Any:
    observed: list[Any] = []
    for arguments, keywords in (
        ((dsn,), {"application_name": "own"}),
        ((), {"dsn": dsn, "connect_timeout": 3, "password": None, "application_name": "own"}),
        ((dsn,), {"async_": 0, "connection_factory": None, "cursor_factory": None}),
    ):
        conn = module.connect(*arguments, **keywords)
        cursor = conn.cursor()
        cursor.execute("show application_name")
        observed.append((conn.info.dbname, conn.info.user, cursor.fetchone()[0] == "own"))
        conn.close()
    contradiction: dict[str, Any] = {"database": "a", "dbname": "b"}
    observed.append(outcome_of(lambda: module.connect(dsn, **contradiction)))
    return [*observed, outcome_of(lambda: module.connect(host="127.0.0.1", port="1"), module)]


def values_of_pep_249(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        moments = (module.Date(2024, 1, 2), module.Time(3, 4, 5), module.Timestamp(2024, 1, 2, 3, 4, 5))
        cursor.execute("select %s, %s, %s, %s", (*moments, module.Binary(b"\x00\x01")))
        observed = [cursor.fetchone(), module.apilevel, module.paramstyle, module.threadsafety]
        cursor.execute("select 1, 'a'::text, 'a'::bytea")
        types = (module.NUMBER, module.STRING, module.BINARY)
        return [*observed, [[column[1] == each for each in types] for column in cursor.description]]


def pools(module: Any, dsn: str) -> Any:
    with pool_of(module, dsn) as pool:
        first, second = pool.getconn(), pool.getconn("key")
        observed = [pool.getconn("key") is second, first is second, pool.minconn, pool.maxconn, pool.closed]
        impossible: list[Callable[[], object]] = [pool.getconn, lambda: pool.putconn(None), lambda: pool.putconn(dsn)]
        observed += [words_of(function, module) for function in impossible]
        cursor = first.cursor()
        cursor.execute("create temp table t (i int)")
        pool.putconn(first)
        again = pool.getconn()
        cursor = again.cursor()
        cursor.execute("select to_regclass('pg_temp.t')")
        observed += [cursor.fetchone(), again.info.transaction_status]
        pool.putconn(second, "key", close=True)
        observed.append(words_of(lambda: pool.putconn(second), module))
        again.close()
        pool.putconn(again)
        last = pool.getconn(0)
        observed += [pool.getconn(0) is last, last.closed == 0]
        pool.closeall()
        observed += [bool(last.closed), bool(pool.closed)]
        refused = (pool.getconn, lambda: pool.putconn(last), pool.closeall)
        return [*observed, *(words_of(function, module) for function in refused)]


def words_of(function: Callable[[], object], module: Any) -> Any:
    try:
        function()
    except module.pool.PoolError as error:
        return str(error), isinstance(error, module.Error)
    return "nothing was raised"


SCRIPTS = [
    last_of_several_results,
    counts_and_messages,
    rows_one_by_one,
    blocks,
    executing_many,
    named_cursors,
    isolation_levels,
    read_only_and_deferrable,
    transactions,
    errors,
    what_is_closed,
    moments_with_time_zone,
    where_it_connects,
    values_of_pep_249,
    pools,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_observes_the_same(dsn: str, script: Callable[[Any, str], Any]) -> None:
    real, ours = observations(script, dsn)
    assert ours == real


# --- what differs on purpose --------------------------------------------------------------------------------


def rollback_of_a_begin_with_autocommit(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        conn.autocommit = True
        cursor = conn.cursor()
        cursor.execute("begin")
        conn.rollback()
        return int(conn.info.transaction_status)


def an_isolation_level_that_was_set(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        conn.set_isolation_level(3)
        return int(conn.isolation_level)


def an_array_of_uuids(module: Any, dsn: str) -> Any:
    return first_value(module, dsn, "select array['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid]")


def a_date_without_end(module: Any, dsn: str) -> Any:
    return outcome_of(lambda: first_value(module, dsn, "select 'infinity'::date"), module)


def a_range(module: Any, dsn: str) -> Any:
    found = first_value(module, dsn, "select int4range(1, 3)")
    return type(found).__name__, found.lower, found.upper, found.lower_inc, found.upper_inc


def an_empty_query(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        return outcome_of(lambda: conn.cursor().execute(""), module)


def a_parameter_too_many(module: Any, dsn: str) -> Any:
    with connection(module, dsn) as conn:
        return outcome_of(lambda: conn.cursor().execute("select 1", (1,)), module)


def a_query_on_a_closed_connection(module: Any, dsn: str) -> Any:
    conn = module.connect(dsn)
    cursor = conn.cursor()
    conn.close()
    return outcome_of(lambda: cursor.execute("select 1"))


def connections_above_minconn(module: Any, dsn: str) -> Any:
    with pool_of(module, dsn, 1, 2) as pool:
        conns = [pool.getconn(), pool.getconn()]
        pids = [conn.info.backend_pid for conn in conns]
        for conn in conns:
            pool.putconn(conn)
        again = [pool.getconn(), pool.getconn()]
        return len({*pids, *(conn.info.backend_pid for conn in again)})


def first_value(module: Any, dsn: str, query: str) -> Any:
    with connection(module, dsn) as conn:
        cursor = conn.cursor()
        cursor.execute(query)
        return cursor.fetchone()[0]


DIFFERENCES: list[tuple[Callable[[Any, str], Any], Any, Any]] = [
    # It believes its own bookkeeping, we ask the server.
    (rollback_of_a_begin_with_autocommit, 2, 0),
    # psycopg 3's enum, which `set_isolation_level` takes back.
    (an_isolation_level_that_was_set, 3, 4),
    # It parses arrays only of types that were registered.
    (an_array_of_uuids, "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}", ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]),
    # It says the year 9999.
    (a_date_without_end, None, "DataError"),
    (a_range, ("NumericRange", 1, 3, True, False), ("Range", 1, 3, True, False)),
    (an_empty_query, "ProgrammingError", None),
    (a_parameter_too_many, None, "ProgrammingError"),
    (a_query_on_a_closed_connection, "InterfaceError", "OperationalError"),
    # It closes what comes back beyond minconn, we keep it for max_idle.
    (connections_above_minconn, 3, 2),
]


@pytest.mark.parametrize(
    ("script", "of_the_real_one", "of_ours"), DIFFERENCES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_script_observes_what_differs_on_purpose(
    dsn: str, script: Callable[[Any, str], Any], of_the_real_one: Any, of_ours: Any
) -> None:
    real, ours = observations(script, dsn)
    assert (real, ours) == (comparable(of_the_real_one), comparable(of_ours))
