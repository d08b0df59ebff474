"""The SQLSTATE of a refused login: from real servers, and from what libpq writes in other languages."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.waiting import eventually_blocking
from psycopg import pq
from psycopg.conninfo import make_conninfo
from psycopg.pq.misc import find_libpq_full_path

from asyncpool._io import libpq
from asyncpool._io.libpq import set_verbose_errors, split_sqlstate
from asyncpool.cli.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.pq.abc import PGconn

PATIENCE = 10.0

ROLES = """
    create role app login password 'right';
    create role sleeper nologin password 'right';
    create role crowd login password 'right' connection limit 0;
"""


@pytest.fixture(scope="module")
def refusing_server() -> Iterator[EmbeddedServer]:
    """On TCP with passwords, with few places."""
    if "DATABASE_URL" in os.environ:
        pytest.skip("needs a server to itself, and DATABASE_URL names one that belongs to somebody else")
    settings = {"max_connections": 8, "superuser_reserved_connections": 1, "reserved_connections": 0}
    with EmbeddedServer(settings=settings, host_authentication="scram-sha-256") as embedded:
        with psycopg.connect(embedded.dsn(), autocommit=True) as conn:
            conn.execute(ROLES)
        yield embedded


def login(server: EmbeddedServer, **parameters: str) -> str:
    return make_conninfo(server.host_dsn(user="app", password="right"), **parameters)


def connect(conninfo: str, *, verbose: bool) -> PGconn:
    """Connect, or fail, as the driver does: libpq's own steps, with the verbosity set after the first."""
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    if verbose:
        assert set_verbose_errors(pgconn, True)
    while (status := pgconn.connect_poll()) in (pq.PollingStatus.READING, pq.PollingStatus.WRITING):
        reading = status == pq.PollingStatus.READING
        ready = select.select([pgconn.socket] * reading, [pgconn.socket] * (not reading), [], PATIENCE)
        assert any(ready), "the server said nothing"
    return pgconn


def connect_error(conninfo: str, *, verbose: bool) -> str:
    pgconn = connect(conninfo, verbose=verbose)
    assert pgconn.status == pq.ConnStatus.BAD
    message = pgconn.get_error_message()
    pgconn.finish()
    return message


@contextmanager
def connected(conninfo: str, *, verbose: bool) -> Iterator[PGconn]:
    pgconn = connect(conninfo, verbose=verbose)
    assert pgconn.status == pq.ConnStatus.OK, pgconn.get_error_message()
    yield pgconn
    pgconn.finish()


@contextmanager
def every_place_taken(server: EmbeddedServer) -> Iterator[None]:
    held = []
    while (pgconn := connect(login(server), verbose=False)).status == pq.ConnStatus.OK:
        held.append(pgconn)
    yield
    for pgconn in held:
        pgconn.finish()


@pytest.mark.parametrize(
    ("parameters", "sqlstate"),
    [
        ({"password": "wrong"}, "28P01"),
        ({"user": "nobody"}, "28P01"),
        ({"user": "sleeper"}, "28000"),
        ({"dbname": "nowhere"}, "3D000"),
        ({"user": "crowd"}, "53300"),
        ({"options": "-c nonsense"}, "42601"),
        ({"sslmode": "require"}, None),
    ],
)
def test_a_refusal_tells_its_sqlstate_and_reads_as_ever(
    refusing_server: EmbeddedServer, parameters: dict[str, str], sqlstate: str | None
) -> None:
    conninfo = login(refusing_server, **parameters)
    verbose, plain = connect_error(conninfo, verbose=True), connect_error(conninfo, verbose=False)
    assert split_sqlstate(verbose) == (sqlstate, plain)


def test_a_full_server_tells_53300(refusing_server: EmbeddedServer) -> None:
    with every_place_taken(refusing_server):
        sqlstate, message = split_sqlstate(connect_error(login(refusing_server), verbose=True))
    assert sqlstate == "53300"
    assert message.endswith("remaining connection slots are reserved for roles with the SUPERUSER attribute")


def test_a_server_that_is_shutting_down_tells_57p03(private_server: EmbeddedServer) -> None:
    conninfo = private_server.host_dsn()
    with connected(conninfo, verbose=False):
        # A smart shutdown waits for that session, and lets nobody in.
        assert private_server.postmaster_pid is not None
        os.kill(private_server.postmaster_pid, signal.SIGTERM)

        def refused() -> str | None:
            pgconn = connect(conninfo, verbose=True)
            message = pgconn.get_error_message() if pgconn.status == pq.ConnStatus.BAD else None
            pgconn.finish()
            return message

        answer = eventually_blocking(refused)
    private_server.stop()
    assert answer is not None
    sqlstate, message = split_sqlstate(answer)
    assert sqlstate == "57P03"
    assert message.endswith("FATAL:  the database system is shutting down")


def test_an_address_where_nobody_listens_tells_no_sqlstate(refusing_server: EmbeddedServer) -> None:
    message = connect_error("host=127.0.0.1 port=1 dbname=app user=app", verbose=True)
    assert split_sqlstate(message) == (None, message)


def test_a_second_attempt_that_gets_no_answer_does_not_hide_the_first_ones(
    refusing_server: EmbeddedServer,
) -> None:
    conninfo = login(refusing_server, password="wrong", sslmode="allow")
    message = connect_error(conninfo, verbose=True)
    assert message.count(libpq.ATTEMPT) == 2
    assert split_sqlstate(message) == ("28P01", connect_error(conninfo, verbose=False))


def test_statement_errors_are_as_ever_once_verbosity_is_off_again(refusing_server: EmbeddedServer) -> None:
    with connected(login(refusing_server), verbose=True) as pgconn:
        assert "LOCATION:" in pgconn.exec_(b"select 1/0").get_error_message()
        assert set_verbose_errors(pgconn, False)
        assert pgconn.exec_(b"select 1/0").get_error_message() == "division by zero"


def test_a_finished_connection_is_left_alone(refusing_server: EmbeddedServer) -> None:
    with connected(login(refusing_server), verbose=False) as pgconn:
        pass
    assert not set_verbose_errors(pgconn, True)


def test_the_libpq_that_is_asked_is_the_one_that_psycopg_loaded() -> None:
    # If psycopg keeps its libpq elsewhere in a later version, all connect errors would count as transient.
    assert libpq._find_set_error_verbosity() is not None
    assert libpq._loaded_libpq().PQlibVersion() == pq.version()


def test_where_libpq_cannot_be_reached_nothing_happens(
    refusing_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> None:
        raise OSError("no such library")

    with connected(login(refusing_server), verbose=False) as pgconn, monkeypatch.context() as patched:
        patched.setattr(libpq, "_loaded_libpq", nowhere)
        patched.setattr(libpq, "_find_set_error_verbosity", libpq._find_set_error_verbosity.__wrapped__)
        assert not set_verbose_errors(pgconn, True)
        assert pgconn.exec_(b"select 1/0").get_error_message() == "division by zero"


SCRIPT = """
import sys
from psycopg import pq
from asyncpool._io.libpq import set_verbose_errors
assert pq.__impl__ == "python"
pgconn = pq.PGconn.connect(sys.argv[1].encode())
assert set_verbose_errors(pgconn, True)
print(pgconn.exec_(b"select 1/0").get_error_message())
"""


@pytest.mark.skipif(find_libpq_full_path() is None, reason="pure-Python psycopg needs a libpq of the system")
def test_it_works_with_pure_python_psycopg(refusing_server: EmbeddedServer) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, login(refusing_server)],
        env={**os.environ, "PSYCOPG_IMPL": "python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.startswith("22012: division by zero"), ran.stderr


# Recorded with a server that offers TLS, whose pg_hba.conf has entries with TLS, without, or both.
SERVER = 'connection to server at "db" (10.0.0.1), port 5432 failed: '
WRONG = SERVER + 'FATAL:  28P01: password authentication failed for user "app"\nLOCATION:  auth_failed, auth.c:334'
NO_ENTRY = (
    SERVER + 'FATAL:  28000: no pg_hba.conf entry for host "10.0.0.2", user "app", database "app", no encryption\n'
    "LOCATION:  ClientAuthentication, auth.c:544"
)
FULL = SERVER + "FATAL:  53300: sorry, too many clients already\nLOCATION:  ProcessStartupPacket, postmaster.c:2404"
LOST = (
    SERVER + "server closed the connection unexpectedly\n"
    "\tThis probably means the server terminated abnormally\n"
    "\tbefore or while processing the request."
)


@pytest.mark.parametrize(
    ("attempts", "sqlstate"),
    [
        ([WRONG, WRONG], "28P01"),
        ([WRONG, NO_ENTRY], "28P01"),
        ([NO_ENTRY, WRONG], "28P01"),
        ([FULL, NO_ENTRY], "53300"),
        ([NO_ENTRY, FULL], "53300"),
        ([NO_ENTRY, NO_ENTRY], "28000"),
        ([LOST, NO_ENTRY], None),
        ([NO_ENTRY, LOST], None),
        ([LOST, WRONG], "28P01"),
        ([LOST, LOST], None),
    ],
)
def test_of_several_attempts_the_one_that_got_furthest_counts(attempts: list[str], sqlstate: str | None) -> None:
    found, message = split_sqlstate("\n".join(attempts))
    assert found == sqlstate
    assert message.count(SERVER) == len(attempts)
    for trace in ("LOCATION", "28P01", "28000", "53300", "auth.c", "postmaster.c"):
        assert trace not in message


# libpq's and the server's own translations of the words around the SQLSTATE.
LANGUAGES = {
    "cs": ('connection to server at "db", port 5432 failed: ', "FATAL", "UMÍSTĚNÍ:  auth_failed, auth.c:334"),
    "de": (
        "Verbindung zum Server auf »db«, Port 5432 fehlgeschlagen: ",
        "FATAL",
        "ORT:  auth_failed, auth.c:334",
    ),
    "es": (
        "falló la conexión al servidor en «db», puerto 5432: ",
        "FATAL",
        "UBICACIÓN:  auth_failed, auth.c:334",
    ),
    "fr": (
        "la connexion au serveur sur « db », port 5432 a échoué : ",
        "FATAL",
        "EMPLACEMENT : auth_failed, auth.c : 334",
    ),
    "it": (
        'connessione al server su "db", porta 5432 non riuscita: ',
        "FATALE",
        "POSIZIONE:  auth_failed, auth.c:334",
    ),
    "ja": (
        '"db"、ポート5432のサーバーへの接続に失敗しました: ',
        "FATAL",
        "LOCATION:  auth_failed, auth.c:334",
    ),
    "ko": ('"db" 포트 5432 서버에 접속 할 수 없음: ', "치명적오류", "위치:  auth_failed, auth.c:334"),
    "ru": (
        'подключиться к серверу "db", порту 5432 не удалось: ',
        "ВАЖНО",
        "ПОЛОЖЕНИЕ:  auth_failed, auth.c:334",
    ),
    "tr": ("", "ÖLÜMCÜL (FATAL)", "YER:  auth_failed, auth.c:334"),
    "zh_CN": ('连接到"db"上的服务器，端口5432失败：', "致命错误", "位置:  auth_failed, auth.c:334"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_languages_of_server_and_libpq_do_not_matter(language: str) -> None:
    words, severity, location = LANGUAGES[language]
    first = f'{words}{severity}:  28000: role "app" is not permitted to log in\n{location}'
    second = f'{words}{severity}:  28P01: password authentication failed for user "app"\n{location}'
    plain_first = f'{words}{severity}:  role "app" is not permitted to log in'
    plain_second = f'{words}{severity}:  password authentication failed for user "app"'
    assert split_sqlstate(f"{first}\n{second}") == ("28P01", f"{plain_first}\n{plain_second}")
    if words:
        assert split_sqlstate(f"{first}\n{words}timeout expired")[0] is None


def test_an_old_libpq_gives_the_bare_sqlstate() -> None:
    message = 'password authentication failed for user "app"'
    assert split_sqlstate(f"28P01: {message}\nLOCATION:  auth_failed, auth.c:334") == ("28P01", message)


def test_a_pooler_in_between_gives_no_location() -> None:
    message = f"{SERVER}FATAL:  08P01: server login has been failing, try again later (server_login_retry)"
    assert split_sqlstate(message) == ("08P01", message.replace("08P01: ", ""))


def test_a_detail_or_hint_that_looks_like_an_error_stays() -> None:
    rest = "\nDETAIL:  42P01: not this one\nHINT:  see pg_hba.conf:12"
    message = f"{SERVER}FATAL:  28000: you may not{rest}\nLOCATION:  ClientAuthentication, auth.c:544"
    assert split_sqlstate(message) == ("28000", f"{SERVER}FATAL:  you may not{rest}")


def test_what_a_login_trigger_adds_to_a_verbose_message_goes() -> None:
    message = (
        f"{SERVER}FATAL:  P0001: not at night\n"
        "CONTEXT:  PL/pgSQL function night_watch() line 3 at RAISE\n"
        "SCHEMA NAME:  guard\nTABLE NAME:  hours\nLOCATION:  exec_stmt_raise, pl_exec.c:3923"
    )
    plain = f"{SERVER}FATAL:  not at night\nCONTEXT:  PL/pgSQL function night_watch() line 3 at RAISE"
    assert split_sqlstate(message) == ("P0001", plain)


@given(st.text())
def test_a_text_without_sqlstate_comes_back_as_it_is(text: str) -> None:
    message = SERVER + text.replace("0", "")
    sqlstate, plain = split_sqlstate(message)
    assert plain == message or sqlstate is not None


SQLSTATES = st.sampled_from(["28000", "28P01", "3D000", "53300", "57P03", "XX000", "P0001"])


@given(st.lists(st.tuples(SQLSTATES, st.text(st.characters(codec="utf-8"))), min_size=1, max_size=3))
def test_whatever_the_server_says_is_given_back(refusals: list[tuple[str, str]]) -> None:
    # What stands behind a line's end could be a location line by itself.
    lines = [(sqlstate, said.replace("\n", " ")) for sqlstate, said in refusals]
    verbose = "\n".join(f"{SERVER}FATAL:  {code}: {said}\nLOCATION:  f, f.c:1" for code, said in lines)
    sqlstate, plain = split_sqlstate(verbose)
    assert plain == "\n".join(f"{SERVER}FATAL:  {said}" for _, said in lines)
    assert sqlstate in {code for code, _ in lines}
