"""Which commands may run as one-shot statements: what the rules say of a text, and what the server makes of it."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit.nasty import fuzzing
from psycopg import pq, sql
from psycopg.conninfo import make_conninfo

from asyncpool._io import one_shot_rules
from asyncpool._io.one_shot_rules import needs_session, remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 1 << 19

# What opens a transaction, in all its forms.
BEGINS = {
    "begin": "BEGIN",
    "begin work": "BEGIN",
    "begin transaction isolation level serializable , read only": "BEGIN",
    "start transaction": "START TRANSACTION",
}

# What leaves something else behind.
LEAVES_SOMETHING = {
    "set work_mem = '1MB'": "SET",
    "set session statement_timeout to 1000": "SET",
    "set time zone 'UTC'": "SET",
    "declare c cursor with hold for select 1": "DECLARE",
    "prepare p as select 1": "PREPARE",
    "listen channel": "LISTEN",
    "listen prepared": "LISTEN",
    "copy ( select 1 ) to stdout": "COPY",
    "copy temp from stdin": "COPY",
    "create temp table t ( a int )": "CREATE TEMPORARY TABLE",
    "create temporary table t as select 1": "CREATE TEMPORARY TABLE",
    "create local temp table if not exists t ( )": "CREATE TEMPORARY TABLE",
    "create global temporary table t ( )": "CREATE TEMPORARY TABLE",
    "create temp sequence s": "CREATE TEMPORARY SEQUENCE",
    "create temp view v as select 1": "CREATE TEMPORARY VIEW",
    "create or replace temporary view v as select 1": "CREATE TEMPORARY VIEW",
    "create or replace local temp recursive view v ( a ) as select 1": "CREATE TEMPORARY VIEW",
    "create table pg_temp . t ( a int )": "CREATE in pg_temp",
    'create table if not exists "pg_temp" . t ( )': "CREATE in pg_temp",
    r'create table U&"pg_t\0065\+00006D\0070" . t ( )': "CREATE in pg_temp",
    """create table u&"!0070g!005Ftemp" uescape '!' . t ( )""": "CREATE in pg_temp",
    "create function pg_temp . f ( ) returns int language sql as 'select 1'": "CREATE in pg_temp",
    "create type pg_temp . e as enum ( 'a' )": "CREATE in pg_temp",
    "create domain pg_temp . d as int": "CREATE in pg_temp",
    "select 1 into temp t": "SELECT INTO TEMPORARY",
    "select into temporary table t": "SELECT INTO TEMPORARY",
    "select temp . temp into local temp t from temp where temp = 1": "SELECT INTO TEMPORARY",
    "select 1 into global temporary t": "SELECT INTO TEMPORARY",
    "select 1 into temp t union select 2": "SELECT INTO TEMPORARY",
    "( select 1 into temp t )": "SELECT INTO TEMPORARY",
    "( ( select 1 into temp t ) union select 2 ) union select 3": "SELECT INTO TEMPORARY",
    "select ( select 1 ) into temp t": "SELECT INTO TEMPORARY",
    "with q as ( select 1 ) select * into temp t from q": "SELECT INTO TEMPORARY",
    "with q as ( insert into temp values ( 1 ) returning * ) select * into temp t from q": "SELECT INTO TEMPORARY",
    "with insert as ( select 1 ) select * into temp t from insert": "SELECT INTO TEMPORARY",
    "select insert into temp t from ( select 1 as insert ) q": "SELECT INTO TEMPORARY",
    "select 1 as into into temp t": "SELECT INTO TEMPORARY",
    "select q . select into temp t from ( select 1 as select ) q": "SELECT INTO TEMPORARY",
    "select 1. into temp t": "SELECT INTO TEMPORARY",
    "select 'a'into temp t": "SELECT INTO TEMPORARY",
    "select e'\\\\' into temp t": "SELECT INTO TEMPORARY",
    "select e'a'\n  -- b\n '\\'' into temp t -- '": "SELECT INTO TEMPORARY",
    "select e'a''\\'' into temp t -- '": "SELECT INTO TEMPORARY",
    "select e'\\\n' into temp t": "SELECT INTO TEMPORARY",
    "select $$a$$into temp t": "SELECT INTO TEMPORARY",
    "select $a$ $$ $b$a$ into temp t": "SELECT INTO TEMPORARY",
    "select 1 as a$b$ into temp t": "SELECT INTO TEMPORARY",
    'select 1 as "a""" into temp t': "SELECT INTO TEMPORARY",
    "select 1 into pg_temp . t": "SELECT INTO TEMPORARY",
    'select 1 into table "pg_temp" . t': "SELECT INTO TEMPORARY",
    r'select 1 into U&"pg_t\0065mp" . t': "SELECT INTO TEMPORARY",
    "explain analyze create temp table t as select 1": "CREATE TEMPORARY TABLE",
    "explain ( analyze , format json ) create temp table t as select 1": "CREATE TEMPORARY TABLE",
    'explain ( "analyze" ) create table pg_temp . t as select 1': "CREATE in pg_temp",
    "explain analyze verbose create temp table t as select 1": "CREATE TEMPORARY TABLE",
    "explain analyse verbose select 1 into temp t": "SELECT INTO TEMPORARY",
    "explain analyze ( select 1 into temp t ) union select 2": "SELECT INTO TEMPORARY",
    "explain ( analyze ) ( select 1 into temp t )": "SELECT INTO TEMPORARY",
}

# What presumes a session, or what another command left there; alone it fails or does nothing.
WANTS_A_SESSION = {
    "commit": "COMMIT",
    "commit work": "COMMIT",
    "end": "END",
    "rollback": "ROLLBACK",
    "rollback to savepoint x": "ROLLBACK",
    "abort": "ABORT",
    "savepoint x": "SAVEPOINT",
    "release x": "RELEASE",
    "release savepoint prepared": "RELEASE",
    "prepare transaction 'x'": "PREPARE",
    "lock table temp": "LOCK",
    "set local work_mem = '1MB'": "SET",
    "set transaction read only": "SET",
    "set constraints all deferred": "SET",
    "set role none": "SET",
    "set session authorization default": "SET",
    "reset all": "RESET",
    "reset role": "RESET",
    "discard all": "DISCARD",
    "discard temp": "DISCARD",
    "load 'plpgsql'": "LOAD",
    "unlisten *": "UNLISTEN",
    "fetch next from c": "FETCH",
    "move c": "MOVE",
    "close c": "CLOSE",
    "close all": "CLOSE",
    "execute p ( 1 )": "EXECUTE",
    "deallocate all": "DEALLOCATE",
    "create table t as execute p": "CREATE TABLE AS EXECUTE",
    "create table t ( a ) with ( fillfactor = 50 ) as execute p ( 1 )": "CREATE TABLE AS EXECUTE",
    "explain execute p": "EXECUTE",
    "explain ( analyze , verbose ) execute p ( 1 )": "EXECUTE",
    "explain analyze declare c cursor for select 1": "DECLARE",
    "import foreign schema public from server s into pg_temp": "IMPORT FOREIGN SCHEMA INTO pg_temp",
    # The database has to be that of the session, and the number its own.
    "select 1 into table postgres . pg_temp . t": "SELECT INTO TEMPORARY",
    "create table postgres . pg_temp . t ( )": "CREATE in pg_temp",
    "create table pg_temp_3 . t ( )": "CREATE in pg_temp",
    'create table "pg_temp_3" . t ( )': "CREATE in pg_temp",
}

REFUSED = {**BEGINS, **LEAVES_SOMETHING, **WANTS_A_SESSION}

# What succeeds as a one-shot statement. The test's schema has a table `temp (temp int, "into" text)`.
ALLOWED = [
    "",
    ";",
    "select 1",
    "select temp from temp",
    "select temp . temp , temp . into temp , 1 from temp",
    'select temp as into , "into" temp , 1 as select , 2 as begin from temp',
    "select 'begin' , 'into temp t' , e'\\' into temp t' , $$ into temp t $$ , $x$ $$ into temp t $x$ from temp",
    "select e'a'\n'\\' into temp t'",
    'select 1 " into temp t" , 2 as "begin"',
    "select 'it''s into temp t' , N'into temp t' , U&'into temp t' , 1 as insert",
    "select $1 :: int as into",
    "select * from temp for update",
    "select count ( * ) from temp limit 1",
    "( select 1 ) union ( select 2 )",
    "( select temp from temp ) order by temp",
    "table temp",
    "values ( 1 ) , ( 2 )",
    "with begin as ( select 1 ) select * from begin",
    "with recursive q as ( select 1 ) select * from q",
    "insert into temp values ( 1 , 'into temp t' )",
    "insert into temp select 1",
    "insert into temp ( temp ) select temp from temp returning temp",
    "with q as ( insert into temp select 1 returning * ) select * from q",
    "with q as ( select 1 as temp ) insert into temp select temp from q",
    "with q as ( select 1 as temp ) insert into temp as t table q",
    "with insert as ( select 1 as temp ) insert into temp table insert",
    "merge into temp t using ( select 1 as a ) s on t . temp = s . a when matched then do nothing",
    "with q as ( select 1 as a ) merge into temp t using q on t . temp = a when matched then do nothing",
    "update temp set temp = 2",
    "delete from temp",
    "truncate temp",
    "select 1 into kept",
    "select 1 into table kept",
    "select 1 into temp_readings from temp",
    "select 1 into temporary",
    "select 1 into temporary ;",
    "( select 1 into temporary )",
    "select temp into temporary from temp where true",
    "create table t ( temp int , begin int )",
    "create table temporary as select temp from temp",
    "create table t as select 1 as execute",
    "create unlogged table t ( )",
    'create table "begin" ( )',
    "create table pg_temper ( )",
    "create view v as select temp from temp",
    "create or replace view v as select 1 as execute",
    "create recursive view v ( a ) as select 1",
    "create materialized view v as select temp from temp",
    "create sequence temp_s",
    "create index on temp ( temp )",
    "create function f ( ) returns int language sql set search_path = public , pg_temp as 'select 1'",
    "create function f ( ) returns int language plpgsql as $$ begin create temp table t ( ) ; return 1 ; end $$",
    "create function f ( ) returns int begin atomic select 1 ; end",
    "create procedure p ( ) language sql as $$ set work_mem = '1MB' $$",
    "create rule r as on update to temp do also insert into temp values ( 1 )",
    "create type temp_t as enum ( 'begin' )",
    "alter table temp add column begin int",
    "alter table temp rename to temporary",
    "comment on table temp is 'begin'",
    "grant select on temp to public",
    "drop table temp",
    "do $$ begin perform 1 ; commit ; end $$",
    "do ' begin rollback ; end '",
    "notify channel , 'begin'",
    "vacuum temp",
    "analyze temp",
    "reindex table temp",
    "show work_mem",
    "explain select temp from temp",
    "explain ( select 1 )",
    "explain ( verbose , costs off ) ( select 1 ) union select 2",
    "explain analyze insert into temp values ( 1 )",
    "explain ( analyze ) with q as ( select 1 as temp ) insert into temp table q",
    "explain ( analyze , costs off ) create table t as select 1",
    "explain verbose update temp set temp = 1",
]

# Those need what a test server may not have.
ALLOWED_BUT_FAIL = [
    "commit prepared 'x'",
    "rollback prepared 'x'",
    "call begin ( )",
    "refresh materialized view begin",
    "import foreign schema public from server s into temp",
    "create extension begin",
    "select 1 into temp . t",
    'create table "a""pg_temp" . t ( )',
    # The server knows no such keywords.
    '"begin"',
    'U&"begin"',
    "begin$",
    "begin1",
    "_begin",
    "be gin",
    "bégin",
    "begın",
    "\N{NO-BREAK SPACE}begin",
    "\N{ZERO WIDTH NO-BREAK SPACE}begin",
    "(begin)",
    "'begin'",
    "$$begin$$",
    "$1 begin",
    "/* begin",
    "/* /* */ begin",
    "-- begin",
    "select 1 ; begin",
]

# Not `\v`, which is white space since version 16 only.
SPACES = [" ", "\t", "\n", "\r", "\f", "\r\n"]
COMMENTS = [
    "/**/",
    "/***/",
    "/*/**/*/",
    "/* /* */ select 1 /*/* */*/ */",
    "/* ' */",
    '/* " */',
    "/* $$ */",
    "/*-- */",
    "/* é表 */",
    "/* select 1; */",
    "--\n",
    "-- begin\r",
    "--/*\n",
    "-- '\r\n",
    "-----\n",
]
gaps = st.lists(st.sampled_from(SPACES + COMMENTS), min_size=1, max_size=3).map("".join)
beginnings = st.lists(st.sampled_from([*SPACES, *COMMENTS, ";"]), max_size=4).map("".join)
ends = st.lists(st.sampled_from([*SPACES, *COMMENTS, ";", "--", "-- '", "--/*"]), max_size=1).map("".join)

QUOTES = "'\"$\\"


@st.composite
def disguised(draw: st.DrawFn, texts: list[str]) -> tuple[str, str]:
    """One of `texts`, and the same in other white space, with comments, in other letters, between empty statements.

    Where it has quotes its end is left as it is: from there on anything may be quoted.
    """
    text = draw(st.sampled_from(texts))
    plain_length = min((text.index(quote) for quote in QUOTES if quote in text), default=len(text))
    *words, last = text[:plain_length].split(" ")
    cases = st.sampled_from([str.lower, str.upper, str.title, str.swapcase])
    in_disguise = "".join(draw(cases)(word) + draw(gaps) for word in words)
    return text, draw(beginnings) + in_disguise + last + text[plain_length:] + draw(ends)


# Pieces of everything, to be put together without sense: some of it the server takes.
PIECES = [
    *("begin", "start transaction", "commit", "select", "1", "into", "temp", "t", "x", ",", "(", ")", ";", ".", "as"),
    *("explain", "analyze", "create", "table", "insert", "with q as (", "union", "prepared", "set", "work_mem = '1MB'"),
    *("/*", "*/", "--", "\n", "\r", "\f", "\v", " ", "/", "*", "-", "'", '"', "\\", "e'", "$$", "$a$", "$1", "\\'"),
    *("select 1 into temp t", "create temp table t ()", "/**/", "'a'", '"a"', "e'\\\\'", "é", "U&", "1.", "pg_temp."),
]


class Tryout:
    """A session on the server with a schema of its own, that tells what a text leaves behind in it."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._schema = sql.Identifier(schema)
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(sql.SQL("create schema {}").format(self._schema))
        # Nothing is to be prepared but by the texts.
        self.conn: psycopg.Connection[Any] = psycopg.connect(
            make_conninfo(dsn, options=f"-c search_path={schema} -c statement_timeout=20s"),
            autocommit=True,
            prepare_threshold=None,
        )
        self.renew()

    def renew(self) -> None:
        """Make session and schema as they were."""
        self.conn.rollback()
        self.conn.execute("discard all")
        self.conn.execute("set client_min_messages = error")
        self.conn.execute(sql.SQL("drop schema {} cascade").format(self._schema))
        self.conn.execute(sql.SQL("create schema {}").format(self._schema))
        self.conn.execute('create table temp (temp int, "into" text)')
        self.conn.execute("reset all")

    def run(self, text: bytes) -> str:
        """Run it in the extended protocol. Returns the server's error, or nothing."""
        params = [b"1"] if b"$1 ::" in text else None
        result = self.conn.pgconn.exec_params(text, params)
        if result.status in (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT):
            return ""
        return result.error_message.decode(errors="replace")

    def transaction_status(self) -> pq.TransactionStatus:
        return pq.TransactionStatus(self.conn.pgconn.transaction_status)

    def left_behind(self) -> list[str]:
        """What the session has that a new one has not."""
        if self.transaction_status() != pq.TransactionStatus.IDLE:
            return [self.transaction_status().name]
        found = self.conn.execute(
            """
            select 'cursor ' || name from pg_cursors where name <> ''
            union all select 'prepared ' || name from pg_prepared_statements
            union all select 'channel ' || name from pg_listening_channels() name
            union all select 'setting ' || name from pg_settings where source = 'session'
            union all select 'relation ' || relname from pg_class where relnamespace = pg_my_temp_schema()
            union all select 'type ' || typname from pg_type where typnamespace = pg_my_temp_schema()
            union all select 'function ' || proname from pg_proc where pronamespace = pg_my_temp_schema()
            """
        )
        return [name for (name,) in found]

    def close(self) -> None:
        # A COPY that was begun ends with its connection.
        dsn = self.conn.info.dsn
        self.conn.close()
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("set client_min_messages = error")
            conn.execute(sql.SQL("drop schema {} cascade").format(self._schema))


@pytest.fixture
def tryout(dsn: str, application_name: str) -> Iterator[Tryout]:
    tryout = Tryout(dsn, application_name)
    yield tryout
    tryout.close()


# --- what the rules say -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", REFUSED)
def test_a_command_that_needs_a_session_is_named(text: str) -> None:
    assert needs_session(text.encode()) == REFUSED[text]


@pytest.mark.parametrize("text", ALLOWED + ALLOWED_BUT_FAIL)
def test_other_commands_are_not_mistaken_for_one(text: str) -> None:
    assert needs_session(text.encode()) is None


@given(disguised(list(REFUSED)))
@fuzzing(500)
def test_no_disguise_hides_a_command(case: tuple[str, str]) -> None:
    text, in_disguise = case
    assert needs_session(in_disguise.encode()) == REFUSED[text]


@given(disguised(ALLOWED))
@fuzzing(500)
def test_no_disguise_makes_a_command_look_like_another(case: tuple[str, str]) -> None:
    _, in_disguise = case
    assert needs_session(in_disguise.encode()) is None


@given(st.lists(st.sampled_from(PIECES)).map("".join).map(str.encode) | st.binary())
@example(b"select ) into temp t")
@fuzzing(500)
def test_any_bytes_get_an_answer(text: bytes) -> None:
    answer = needs_session(text)
    assert answer is None or answer.isprintable()


def test_what_comes_after_a_null_is_not_sent_and_does_not_count() -> None:
    assert needs_session(b"begin\0") == "BEGIN"
    assert needs_session(b"commit --\0\n prepared 'x'") == "COMMIT"
    assert needs_session(b"select 1 \0 into temp t") is None


def test_the_message_names_the_pool_the_command_and_the_way_out() -> None:
    message = remedy("orders", "BEGIN")
    assert message.startswith("orders: BEGIN ")
    assert "pool.acquire()" in message


# --- long texts: what took more than linear time would not end before the test's time limit ----------------


@pytest.mark.parametrize(
    ("piece", "beginning", "end", "answer"),
    [
        (" ", "", "begin", "BEGIN"),
        (";", "", "begin", "BEGIN"),
        ("/**/", "", "begin", "BEGIN"),
        ("--\n", "", "begin", "BEGIN"),
        ("/*", "", "begin", None),
        ("(1, 'into temp t'),", "insert into temp values ", "(2, '')", None),
        ("1,", "select a into temp t from b where c in (", "2)", "SELECT INTO TEMPORARY"),
        ("(1, 'a'),", "with v as (values ", "(2, '')) insert into temp select * from v", None),
        ("(1, 'a'),", "with v as (values ", "(2, '')) select * into temp t from v", "SELECT INTO TEMPORARY"),
        ("(", "select ", ")" * LONG + " into temp t", "SELECT INTO TEMPORARY"),
        ("''", "select ", " into temp t", "SELECT INTO TEMPORARY"),
        ("\\\\", "select e'", "' into temp t", "SELECT INTO TEMPORARY"),
        ("e''--\n", "select ", ", 1 into temp t", "SELECT INTO TEMPORARY"),
        ("$", "select ", " into temp t", "SELECT INTO TEMPORARY"),
        ("$a$ $b$ ", "select ", " into temp t", None),
        ("into ", "select ", "temp t", None),
        ("into--\n", "select ", "temp t", None),
        ("a", "begin", "", None),
    ],
)
def test_a_long_text_is_read_once(piece: str, beginning: str, end: str, answer: str | None) -> None:
    text = beginning + piece * (LONG // len(piece)) + end
    assert needs_session(text.encode()) == answer


@pytest.mark.parametrize(
    "text",
    [
        "insert into temp values (1, 'into temp t'), (2, 'b')",
        "select * from a where b in (1, 2, 3, 4)",
        "with v as (values (1, 2), (3, 4)) insert into temperatures select * from v",
        "create view v as select a, b, c, d, e, f from x where y = 1",
    ],
)
def test_no_more_of_a_text_is_read_than_it_takes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    read_all = one_shot_rules._tokens

    def tokens(query: bytes) -> Iterator[bytes]:
        for token in read_all(query):
            read.append(token)
            yield token

    monkeypatch.setattr(one_shot_rules, "_tokens", tokens)
    assert needs_session(text.encode()) is None
    assert len(read) < len(list(read_all(text.encode()))) * 0.8


# --- client encodings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["shift_jis", "cp932", "shift_jis_2004", "big5", "gbk", "cp949", "johab", "gb18030"])
def test_no_character_of_another_encoding_holds_a_byte_that_ends_comments_or_quotes(codec: str) -> None:
    structural = set(b" \t\n\r\f\v'\"$*/-()")
    encode = codecs.getencoder(codec)
    for number in range(0x80, 0x11_0000):
        assert structural.isdisjoint(encode(chr(number), "ignore")[0]), hex(number)


@pytest.mark.parametrize("encoding", ["SJIS", "BIG5", "GBK", "UHC", "GB18030"])
def test_characters_with_ascii_in_their_second_byte_hide_no_command(encoding: str, tryout: Tryout) -> None:
    tryout.conn.execute(sql.SQL("set client_encoding = {}").format(encoding))
    codec = tryout.conn.info.encoding
    odd = "".join(c for c in map(chr, range(0x3000, 0xFFFF)) if 0x40 <= (c.encode(codec, "ignore") or b" ")[-1] < 0x7F)
    assert len(odd) > 100
    for character in odd[:: len(odd) // 50]:
        for comment in (f"/* {character}*/", f"--{character}\n"):
            text = f"{comment}begin{comment}".encode(codec)
            assert tryout.run(text) == ""
            assert tryout.left_behind() == ["INTRANS"]
            assert needs_session(text) == "BEGIN"
            tryout.conn.rollback()


# --- what the server makes of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ALLOWED)
def test_what_is_allowed_runs_and_leaves_nothing_in_the_session(text: str, tryout: Tryout) -> None:
    assert tryout.run(text.encode()) == ""
    assert tryout.left_behind() == []


def test_what_is_allowed_and_fails_leaves_nothing_in_the_session(tryout: Tryout) -> None:
    for text in ALLOWED_BUT_FAIL:
        tryout.run(text.encode())
        assert tryout.left_behind() == [], text


@pytest.mark.parametrize("text", [*BEGINS, *LEAVES_SOMETHING])
def test_what_is_refused_would_leave_something_in_the_session(text: str, tryout: Tryout) -> None:
    assert tryout.run(text.encode()) == ""
    assert tryout.left_behind() != []


@given(case=disguised(list(BEGINS)))
@fuzzing(100)
def test_the_server_takes_each_disguise_for_a_begin(case: tuple[str, str], tryout: Tryout) -> None:
    """Or the tests of disguises above would show little."""
    assert tryout.run(case[1].encode()) == ""
    assert tryout.left_behind() == ["INTRANS"]
    tryout.conn.rollback()


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
@example(pieces=["\v", "begin"])
@example(pieces=[";", "/*", "'", "*/", "begin", "--"])
@example(pieces=["/*", "/", "*/", "begin"])
@example(pieces=["select", " ", "1.", "into", " ", "temp", " ", "t"])
@fuzzing(1000)
def test_of_any_text_that_is_allowed_the_server_keeps_nothing_in_the_session(pieces: list[str], tryout: Tryout) -> None:
    text = "".join(pieces).encode()
    refused = needs_session(text) is not None
    tryout.run(text)
    left = tryout.left_behind()
    assert refused or left == []
    if refused:
        tryout.renew()
