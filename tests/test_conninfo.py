"""Connection parameters: no message about them tells a password, and every other word stays."""

from __future__ import annotations

import select
import traceback
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit.servers import ODD_PASSWORDS
from psycopg import pq
from psycopg.conninfo import conninfo_attempts, make_conninfo

from asyncpool.conninfo import (
    CONNECT_OPTIONS,
    LIBPQ_OPTIONS,
    SECRET_OPTIONS,
    Redactor,
    check_option_names,
    describe,
    needs_lookup,
    parse,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kit.servers import PasswordServer

PATIENCE = 10.0

URL = "postgresql://app:{}@127.0.0.1:1/orders"

NASTY_PASSWORDS = [
    *ODD_PASSWORDS.values(),
    "a",
    "app",
    "orders",
    "server",
    "correct horse",
    "pass@word",
    "pa@ss/wo?rd#1",
    "sec/ret",
    "12345/secret",
    "1234/se:cret?user=x",
    "secret?host=elsewhere",
    "half?ssl",
    "trailing@",
    "@leading",
    "@@both@@",
    "50%off",
    "%41%42%43%44",
    "%zz",
    "%ff%fe",
    "%00null",
    "[::1]brackets",
    "com,ma@se,cond",
    "am&per=sand",
    'dou"ble"quoted',
    "sin'gle'quoted",
    "back\\slash\\",
    "' host 'elsewhere",
    "Grüße@日本語/пароль",
    "line\nbreak",
    "tab\tand space",
    "\ud800surrogate",
    "nul\0l",
    "x" * 100 + "@y",
    "x" * 70 + "/" + "y" * 70 + "@z",
    "postgresql://inner:url@secret/x",
]

# Where a password may stand: in its place, quoted or not, or misplaced.
SHAPES = {
    "url": URL,
    "url with options": URL + "?application_name=web&sslmode=disable",
    "url, host only": "postgresql://app:{}@127.0.0.1",
    "url, query": "postgresql://app@127.0.0.1:1/orders?password={}",
    "url, old scheme": "postgres://app:{}@127.0.0.1:1/orders",
    "url, other driver": "postgresql+driver://app:{}@127.0.0.1:1/orders",
    "key=value": "host=127.0.0.1 port=1 user=app password={} dbname=orders",
    "key=value, last": "host=127.0.0.1 port=1 user=app dbname=orders password={}",
    "key=value, quoted": "host=127.0.0.1 port=1 user=app password='{}' dbname=orders",
    "url in key=value": "host=127.0.0.1 port=1 dbname='postgresql://app:{}@db/orders'",
    "misspelt option": "host=127.0.0.1 port=1 pasword={} dbname=orders",
}


def steps_towards_a_connection(conninfo: str, overrides: Mapping[str, object]) -> list[str]:
    """All that a pool may show of these parameters: the refusal, or description and connect errors."""
    try:
        params = parse(conninfo, overrides)
    except psycopg.ProgrammingError as error:
        return [
            str(error),
            repr(error),
            repr(error.args),
            "".join(traceback.format_exception_only(error)),
            *chained(error),
        ]
    redactor = Redactor(conninfo, overrides)
    failures = [connect_error({**params, "hostaddr": ",".join(["127.0.0.1"] * places(params))})]
    failures += server_errors(params)
    return [describe(params, redactor), *map(redactor.redact, failures)]


def chained(error: BaseException) -> list[str]:
    return [repr(vars(each)) + repr(each) for each in (error.__cause__, error.__context__) if each is not None]


def places(params: Mapping[str, object]) -> int:
    return str(params.get("host", "")).count(",") + 1


def connect_error(params: Mapping[str, object]) -> str:
    """libpq's own words, from an address where nobody listens."""
    pgconn = pq.PGconn.connect_start(make_conninfo("", **params).encode())  # type: ignore[arg-type]
    try:
        while (status := pgconn.connect_poll()) != pq.PollingStatus.FAILED:
            if status == pq.PollingStatus.OK:
                return ""
            reading = status == pq.PollingStatus.READING
            select.select([pgconn.socket] * reading, [pgconn.socket] * (not reading), [], PATIENCE)
        return pgconn.get_error_message()
    finally:
        pgconn.finish()


def server_errors(params: Mapping[str, object]) -> list[str]:
    """What psycopg and a server answer, for the parameters as libpq took them."""
    host, port, user, dbname = (params.get(name) for name in ("host", "port", "user", "dbname"))
    return [
        f"failed to resolve host {host!r}: [Errno -2] Name or service not known",
        f"host: {host!r}, port: {port!r}, hostaddr: None",
        f'could not translate host name "{host}" to address: Name or service not known',
        f'connection to server on socket "{host}/.s.PGSQL.{port}" failed: No such file or directory',
        f'FATAL:  database "{str(dbname)[:63]}" does not exist',
        f'FATAL:  password authentication failed for user "{str(user)[:63]}"',
        f'FATAL:  no pg_hba.conf entry for host "::1", user "{user}", database "{dbname}", no encryption',
        f"FATAL:  Passwort-Authentifizierung für Benutzer »{user}« fehlgeschlagen, Datenbank »{dbname}«",
    ]


def harmless_words() -> str:
    """What would be shown whatever the password is."""
    texts = [shape.format("") for shape in SHAPES.values()]
    for shape in SHAPES.values():
        for neutral in ("0", "0@0", "0/0@0", "0 0", "%zz", "0?0"):
            texts += steps_towards_a_connection(shape.format(neutral), {})
    return " ".join(texts)


HARMLESS = harmless_words()


def leaks(password: str, texts: list[str]) -> list[tuple[str, str]]:
    parts = {password[start : start + 4] for start in range(len(password) - 3)}
    # Commas, colons and slashes stand in a description anyway.
    telling = {part for part in parts if part not in HARMLESS and any(map(str.isalnum, part))}
    return [(part, text) for part in telling for text in texts if part in text]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("password", NASTY_PASSWORDS)
def test_no_message_holds_a_part_of_an_odd_password(shape: str, password: str) -> None:
    assert not leaks(password, steps_towards_a_connection(SHAPES[shape].format(password), {}))


@pytest.mark.parametrize("password", NASTY_PASSWORDS)
def test_no_message_holds_a_part_of_a_password_given_by_keyword(password: str) -> None:
    overrides = {"password": password, "sslpassword": password, "host": "127.0.0.1", "port": 1}
    assert not leaks(password, steps_towards_a_connection("dbname=orders", overrides))


@pytest.mark.parametrize("password", NASTY_PASSWORDS)
@pytest.mark.parametrize("misplaced", ["dbname", "user", "host", "application_name", "service"])
def test_no_message_holds_a_part_of_a_password_in_a_url_given_for_something_else(misplaced: str, password: str) -> None:
    overrides: dict[str, object] = {"host": "127.0.0.1", "port": 1, "dbname": "orders", "user": "app"}
    overrides[misplaced] = f"postgresql://app:{password}@db/orders"
    assert not leaks(password, steps_towards_a_connection("", overrides))


ANY_PASSWORD = st.text(st.sampled_from("abcXYZ0189 @@%:/?#&=,;'\"\\[]()~-_.ßé日"), min_size=1, max_size=30)


@given(st.sampled_from(sorted(SHAPES)), ANY_PASSWORD)
@example("url", "1234/ab'cd@ef")
@example("url", '="0%"')
@example("url", '/0;00:"0')
@example("url", '@?user= "secretword@')
@example("url", '=" after secret%"')
@example("key=value", '=" after " a secret "')
@example("url", ": Zq9/")
@example("url", "99/Xab,cXYZ@aaaa")
def test_no_message_holds_a_part_of_any_password(shape: str, password: str) -> None:
    assert not leaks(password, steps_towards_a_connection(SHAPES[shape].format(password), {}))


@given(ANY_PASSWORD)
def test_a_well_escaped_password_arrives_and_the_names_stay(password: str) -> None:
    escaped = "'" + password.replace("\\", "\\\\").replace("'", "\\'") + "'"
    for conninfo in (URL.format(quote(password, safe="")), SHAPES["key=value"].format(escaped)):
        params = parse(conninfo, {})
        assert params["password"] == password
        assert describe(params, Redactor(conninfo, {})) == "app@127.0.0.1:1/orders"


@pytest.mark.parametrize("user", ODD_PASSWORDS)
@pytest.mark.parametrize("style", ["url", "key=value"])
def test_a_wrong_password_is_not_told_and_the_user_is(password_server: PasswordServer, user: str, style: str) -> None:
    wrong = ODD_PASSWORDS[user] + "!"
    conninfo = password_server.conninfo(user, "url" if style == "url" else "key=value", wrong)
    message = connect_error(parse(conninfo, {}))
    assert f'password authentication failed for user "{user}"' in message
    assert Redactor(conninfo, {}).redact(message) == message


@pytest.mark.parametrize("user", ODD_PASSWORDS)
@pytest.mark.parametrize("style", ["url", "key=value"])
def test_odd_passwords_open_a_real_server(password_server: PasswordServer, user: str, style: str) -> None:
    conninfo = password_server.conninfo(user, "url" if style == "url" else "key=value")
    with psycopg.connect(**parse(conninfo, {})) as conn:  # type: ignore[arg-type]
        assert conn.info.user == user


def test_an_unknown_host_is_told_unless_it_is_a_part_of_the_password() -> None:
    def redacted(conninfo: str) -> str:
        with pytest.raises(psycopg.OperationalError) as caught:
            conninfo_attempts(parse(conninfo, {}))
        return Redactor(conninfo, {}).redact(str(caught.value))

    told = redacted("postgresql://app:secret.invalid@nonexistent.invalid")
    assert told.startswith("failed to resolve host 'nonexistent.invalid': ")
    # libpq takes the password for two ports, a host and a database.
    told = redacted("postgresql://app.invalid:1,secret.invalid:2/word@db")
    assert told.startswith("failed to resolve host '***': ")


ORDINARY = [
    "postgresql://app:hunter2@db.example:5433/app",
    "postgresql://app:app@db/app",
    "postgresql://app:server@db/app",
    "postgresql://postgres:postgres@localhost/postgres",
    "host=db user=app password=db dbname=app",
    "host=db user=app password=a dbname=app",
    "host=db user=app password=prod dbname=prod-orders",
    "postgresql://app%40tenant:hunter2@db/app?password=p@ss",
    "postgresql://db/app?user=app&password=p@ss/w@rd",
]


@pytest.mark.parametrize("conninfo", ORDINARY)
def test_of_an_ordinary_conninfo_every_word_of_an_error_stays(conninfo: str) -> None:
    redactor = Redactor(conninfo, {})
    params = parse(conninfo, {})
    place = f'"{params["host"]}" (10.0.0.1), port {params.get("port", 5432)}'
    for message in [
        *server_errors(params),
        f"connection to server at {place} failed: timeout expired",
        "Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?",
        'root certificate file "/home/me/.postgresql/root.crt" does not exist',
    ]:
        assert redactor.redact(message) == message


def test_names_given_by_keyword_stay_whatever_the_conninfo_holds() -> None:
    given = {"user": "postgres", "dbname": "orders", "password": "postgres"}
    message = 'user "postgres", database "orders"'
    assert Redactor("host=db", given).redact(message) == message
    assert Redactor("postgresql://u:12/orders@h", given).redact(message) == message


@pytest.mark.parametrize(
    ("conninfo", "message", "expected"),
    [
        ("password=hunter2", "ldap says: hunter2 is wrong", "ldap says: *** is wrong"),
        ("password=hunter2", "xhunter2x", "x***x"),
        ("password=a", 'a "a" b', 'a "***" b'),
        ("user=u password=open", 'opened "reopen" open', 'opened "***" ***'),
        ("postgresql://u:p%40ss%2Fword@h", "p@ss/word p%40ss%2Fword", "*** ***"),
        ("sslpassword=hunter2", "key hunter2", "key ***"),
        ("postgresql://u:12/ab@h/db", 'at "u", port 12 failed, "ab@h/db"', 'at "u", port *** failed, "***"'),
        ("postgresql://u:p@ss@h/db", "no host 'ss@h' for u", "no host '***' for u"),
        # … decoded by libpq, repr()'d by psycopg, with a quote of its own
        ("postgresql://u:12/s%41cret?user=x@h/db", "no sAcret", "no ***"),
        ("postgresql://u:1,se\\cret/x@h", "host: 'se\\\\cret', port", "host: '***', port"),
        ('postgresql://u:12/"server@h/db', 'database ""server@h/db" is', 'database "***" is'),
        ("postgresql://u:server@x@h/db", "the server is »server@x«", "the server is »***«"),
    ],
)
def test_what_may_be_a_password_is_masked_and_nothing_else(conninfo: str, message: str, expected: str) -> None:
    assert Redactor(conninfo, {}).redact(message) == expected


def test_a_name_the_server_cut_short_is_masked_as_well() -> None:
    secret = "x1y2" * 20
    conninfo = f"postgresql://u:1/{secret}@h/db"
    cut = f"{secret}@h/db"[:63]
    assert Redactor(conninfo, {}).redact(f'database "{cut}" does not exist') == 'database "***" does not exist'


@pytest.mark.parametrize(
    ("conninfo", "message"),
    [
        ("port=pa", "port is not a number between 1 and 65535"),
        ("port=5432,70000 host=a,b", "port is not a number between 1 and 65535"),
        ("host=a,b port=1,2,3", "could not match 3 port numbers to 2 hosts"),
        ("host=a,b hostaddr=10.0.0.1", "could not match 2 host names to 1 hostaddr values"),
        ("host=db..example", "host is not a valid host name"),
        ("hostaddr=db.example", "hostaddr is not an IP address"),
        ("connect_timeout=soon", "connect_timeout is not a number"),
        ("connect_timeout=inf", "connect_timeout is not a number"),
        ("sslmode=always", 'invalid sslmode value: "***"'),
        ("target_session_attrs=best", 'invalid target_session_attrs value: "***"'),
        ("load_balance_hosts=maybe", 'invalid load_balance_hosts value: "***"'),
        ("require_auth=trust", 'invalid require_auth value: "***"'),
        ("host=db password=a b=c", 'invalid connection option "***"'),
        ("host=db password=a b c=d", 'missing "=" after "***" in connection info string'),
        ("password='abc", "unterminated quoted string in connection info string"),
        ("postgresql://u:50%off@db", 'invalid percent-encoded token: "***"'),
        ("postgresql://[::1", 'end of string reached when looking for matching "]" in IPv6 host address in URI: "***"'),
        ("postgresql://h/db?a=b=c", 'extra key/value separator "=" in URI query parameter: "***"'),
        ("postgresql://h/db?secret", 'missing key/value separator "=" in URI query parameter: "***"'),
        ("postgresql://u:%ff@db", "the connection parameters are not valid UTF-8 text"),
        ("host=db password=\ud800", "the connection parameters are not valid UTF-8 text"),
        ("host=db password=a\0b", "the connection parameters hold a null character"),
        ('host=db password=a b"c" d"=e', 'missing "=" after "***" in connection info string'),
    ],
)
def test_a_wrong_conninfo_is_found_at_once_and_in_libpqs_words(conninfo: str, message: str) -> None:
    with pytest.raises(psycopg.ProgrammingError) as caught:
        parse(conninfo, {})
    assert str(caught.value) == message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("conninfo", ["postgresql://u:p@ss@db", "postgresql://u:p/ss@db", "postgresql://u:p@h,s@h"])
def test_a_password_that_was_not_escaped_is_found_with_a_hint(conninfo: str) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="must be percent-encoded"):
        parse(conninfo, {})


def test_parameters_win_over_the_conninfo_and_none_is_as_if_not_given() -> None:
    params = parse("postgresql://app@db:1/orders", {"port": 2, "dbname": None, "user": "web"})
    assert params == {"host": "db", "port": 2, "user": "web", "dbname": "orders"}


def test_a_conninfo_that_is_not_a_str_is_refused() -> None:
    with pytest.raises(TypeError, match="conninfo must be a str, not bytes"):
        parse(b"password=hunter2", {})  # type: ignore[arg-type]


def test_a_service_is_left_to_libpq() -> None:
    assert parse("service=orders sslmode=always", {}) == {"service": "orders", "sslmode": "always"}


def test_a_redactor_shows_nothing_of_what_it_hides() -> None:
    redactor = Redactor("postgresql://app:hunter2@db", {"sslpassword": "swordfish"})
    assert "hunter2" not in repr(redactor) + str(redactor)
    assert "swordfish" not in repr(redactor) + str(redactor)


def test_parsing_connects_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    seen = []
    connect_start = pq.PGconn.connect_start

    class Watched:
        @staticmethod
        def connect_start(conninfo: bytes) -> pq.abc.PGconn:
            seen.append(pgconn := connect_start(conninfo))
            assert pgconn.status == pq.ConnStatus.BAD
            assert pgconn.get_error_message().endswith("is too long (maximum 107 bytes)")
            return pgconn

    monkeypatch.setattr(pq, "PGconn", Watched)
    assert parse("dbname=orders", {}) == {"dbname": "orders"}
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_sise", "Pool() got an unknown option 'max_sise': did you mean 'max_size'?"),
        ("database", "Pool() got an unknown option 'database': did you mean 'dbname'?"),
        ("autocomit", "Pool() got an unknown option 'autocomit': did you mean 'autocommit'?"),
        ("zzz", "Pool() got an unknown option 'zzz'"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known(name: str, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        check_option_names(["dbname", name], CONNECT_OPTIONS | {"max_size"})
    assert str(caught.value) == message


def test_known_options_pass() -> None:
    check_option_names(["host", "autocommit", "row_factory", "sslmode"], CONNECT_OPTIONS)


def test_every_option_that_libpq_hides_in_dialogs_counts_as_secret() -> None:
    hidden = {option.keyword.decode() for option in pq.Conninfo.get_defaults() if option.dispchar == b"*"}
    assert {"password", "sslpassword"} <= hidden <= SECRET_OPTIONS
    assert {"host", "dbname"} <= LIBPQ_OPTIONS - SECRET_OPTIONS


@pytest.mark.parametrize(
    ("conninfo", "expected"),
    [
        ("", "libpq's defaults"),
        ("host=db", "db"),
        ("postgresql://app:hunter2@db:5433/orders", "app@db:5433/orders"),
        ("postgresql://app@[::1]:5433/orders", "app@[::1]:5433/orders"),
        ("host=/run/postgresql dbname=orders", "/run/postgresql/orders"),
        ("hostaddr=10.0.0.1 user=app", "app@10.0.0.1"),
        ("host=a,b port=1", "a:1,b:1"),
        ("host=a,b port=1,2 dbname=orders", "a:1,b:2/orders"),
        ("port=5433", ":5433"),
        ("postgresql://u:12/secret@h/db", "u:***/***"),
        ("postgresql://u:12/x?user=secret@h/db", "***@u:***/***"),
    ],
)
def test_the_description_says_who_connects_where_to_what(conninfo: str, expected: str) -> None:
    assert describe(parse(conninfo, {}), Redactor(conninfo, {})) == expected


@pytest.mark.parametrize(
    ("conninfo", "environment", "expected"),
    [
        ("", {}, False),
        ("host=db", {}, True),
        ("host=localhost", {}, True),
        ("host=10.0.0.1", {}, False),
        ("host=::1", {}, False),
        ("host=/run/postgresql", {}, False),
        ("host=@abstract", {}, False),
        ("host=db hostaddr=10.0.0.1", {}, False),
        ("host=10.0.0.1,db", {}, True),
        ("host=a,b hostaddr=10.0.0.1,", {}, True),
        ("", {"PGHOST": "db"}, True),
        ("", {"PGHOST": "/run/postgresql"}, False),
        ("host=10.0.0.1", {"PGHOST": "db"}, False),
        ("host=db", {"PGHOSTADDR": "10.0.0.1"}, False),
    ],
)
def test_only_host_names_without_address_need_a_lookup(
    conninfo: str, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGHOST", "PGHOSTADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert needs_lookup(parse(conninfo, {})) is expected


@pytest.mark.parametrize("conninfo", ["postgresql://h/d?conect_timeout=3", "host=h conect_timeout=3"])
def test_a_parameter_that_there_is_none_of_is_answered_with_the_nearest(conninfo: str) -> None:
    with pytest.raises(psycopg.ProgrammingError, match=r"\(did you mean 'connect_timeout'\?\)") as error:
        parse(conninfo, {})
    assert "conect_timeout" not in str(error.value)


@pytest.mark.parametrize("name", ["dsn", "url", "uri"])
def test_a_connection_string_by_another_name_is_told_its_own(name: str) -> None:
    with pytest.raises(TypeError, match="did you mean 'conninfo', the first argument"):
        check_option_names([name], ["conninfo", "host"])


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@db/app", "postgresql+asyncpg://u:secret@db/app", "Postgres://db/app"]
)
def test_the_scheme_of_another_driver_is_named(url: str) -> None:
    with pytest.raises(psycopg.ProgrammingError) as error:
        parse(url, {})
    scheme = url.partition("://")[0]
    assert str(error.value).endswith(f"(a URL has to begin with postgresql://, not {scheme}://)")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("open", "open it by a block"), ("kwargs", "as options"), ("command_timeout", "timeout="), ("loop", "opened")],
)
def test_what_is_an_option_elsewhere_is_told_what_to_do_here(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option {name!r}: .*{words}"):
        check_option_names([name], ["max_size"])
