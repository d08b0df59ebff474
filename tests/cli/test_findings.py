"""From facts to findings, a verdict and options: without a server."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from asyncpool import Pool
from asyncpool.cli.capacity import Capacity
from asyncpool.cli.doctor.facts import Facts, Pooler, PoolMode, Prepared, Tls
from asyncpool.cli.doctor.findings import Diagnosis, Finding, Level, diagnose

ROOMY = Capacity(
    max_connections=100,
    superuser_reserved=3,
    reserved=0,
    is_superuser=False,
    may_use_reserved=False,
    used=7,
    used_is_exact=True,
    role_limit=None,
    role_used=2,
    database_limit=None,
    database_used=3,
)

CALM = {
    "default_transaction_read_only": "off",
    "idle_in_transaction_session_timeout": "60000",
    "idle_session_timeout": "0",
    "lock_timeout": "0",
    "statement_timeout": "30000",
    "tcp_keepalives_idle": "7200",
    "transaction_timeout": "0",
}

HEALTHY = Facts(
    place="app@db/app",
    user="app",
    is_remote=False,
    given=frozenset({"host"}),
    target_session_attrs="any",
    server_version="18.1",
    product="PostgreSQL",
    round_trip_ms=0.2,
    capacity=ROOMY,
    pooler=None,
    passed_on=False,
    prepared=Prepared.USABLE,
    tls=Tls(in_use=False),
    is_standby=False,
    settings=CALM,
)


def pooler(mode: PoolMode | None, **settings: str) -> Pooler:
    return Pooler(product="PgBouncer", version="1.18.0", mode=mode, settings=settings)


def with_settings(**settings: str) -> Facts:
    return replace(HEALTHY, settings=CALM | settings)


def with_capacity(**changes: Any) -> Facts:
    return replace(HEALTHY, capacity=replace(ROOMY, **changes))


def about(topic: str, facts: Facts) -> Finding:
    """The one finding of that topic."""
    [found] = [finding for finding in diagnose(facts).findings if finding.topic == topic]
    return found


def pool_of(diagnosis: Diagnosis) -> Pool[Any]:
    """The line, as it would be pasted into a program."""
    pool = eval(diagnosis.line, {"Pool": Pool, "conninfo": "host=db"})
    assert isinstance(pool, Pool)
    return pool


def test_a_healthy_server_is_fit_and_needs_no_options() -> None:
    diagnosis = diagnose(HEALTHY)
    assert {finding.level for finding in diagnosis.findings} == {Level.OK}
    assert (diagnosis.is_fit, diagnosis.verdict) == (True, "fit for a pool")
    assert diagnosis.line == "Pool(conninfo, max_size=10)"


VARIETIES: dict[str, list[dict[str, Any]]] = {
    "pooler": [
        {},
        {"passed_on": True},
        {"pooler": pooler(None)},
        {"pooler": Pooler(product=None, mode=PoolMode.TRANSACTION)},
        *({"pooler": pooler(mode, client_idle_timeout="20", default_pool_size="4")} for mode in PoolMode),
    ],
    "prepared": [{"prepared": outcome} for outcome in Prepared],
    "capacity": [
        {},
        {"capacity": None},
        {"capacity": replace(ROOMY, used=97)},
        {"capacity": replace(ROOMY, is_superuser=True)},
        {"capacity": replace(ROOMY, role_limit=5)},
    ],
    "place": [{}, {"is_remote": True}, {"is_remote": True, "tls": Tls(in_use=True, sslmode="require")}],
    "settings": [
        {},
        {"settings": {}, "is_standby": None},
        {"settings": dict.fromkeys(CALM, "0")},
        {"settings": {**dict.fromkeys(CALM, "500"), "default_transaction_read_only": "on"}},
        {"is_standby": True, "product": "CockroachDB", "round_trip_ms": 80.0},
    ],
}


@pytest.mark.parametrize("changes", list(itertools.product(*VARIETIES.values()))[::7])
def test_whatever_is_not_ok_names_its_remedy_and_the_line_makes_a_pool(changes: tuple[dict[str, Any], ...]) -> None:
    facts = HEALTHY
    for change in changes:
        facts = replace(facts, **change)
    diagnosis = diagnose(facts)
    for finding in diagnosis.findings:
        assert (finding.fix is None) == (finding.level is Level.OK), finding
        assert (finding.text + (finding.fix or "")).isascii()
    topics = [finding.topic for finding in diagnosis.findings]
    assert len(topics) == len(set(topics))
    stats = pool_of(diagnosis).stats()
    assert stats.min_size <= stats.max_size == diagnosis.options["max_size"]


# --- connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, 90),
        ({"reserved": 5}, 85),
        ({"reserved": 5, "may_use_reserved": True}, 85),
        ({"reserved": 5, "is_superuser": True}, 85),
        ({"role_limit": 10}, 8),
        ({"role_limit": 0}, 0),
        ({"database_limit": 10}, 7),
        ({"database_limit": 10, "role_limit": 10, "is_superuser": True}, 90),
        ({"used": 99}, 0),
    ],
)
def test_free_for_you_is_what_all_limits_leave(changes: dict[str, Any], free: int) -> None:
    assert replace(ROOMY, **changes).free == free
    assert f"{free} free for you" in about("connections", with_capacity(**changes)).text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"role_limit": 3}, 'alter role "app" connection limit 23'),
        ({"role_limit": 0}, 'alter role "app" connection limit 20'),
        ({"database_limit": 4}, "raise the database's limit"),
        ({"used": 96}, "max_connections = 120"),
        ({"used": 96, "role_limit": 3, "is_superuser": True}, "max_connections = 120"),
    ],
)
def test_the_fix_is_that_of_the_tightest_limit(changes: dict[str, Any], words: str) -> None:
    assert words in (about("connections", with_capacity(**changes)).fix or "")


@pytest.mark.parametrize(
    ("used", "level", "max_size"),
    [
        (7, Level.OK, 10),
        (77, Level.OK, 10),
        (78, Level.NOTE, 9),
        (87, Level.NOTE, 5),
        (88, Level.WARNING, 4),
        (96, Level.WARNING, 1),
        (97, Level.PROBLEM, 1),
    ],
)
def test_the_fewer_are_free_the_smaller_the_pool(used: int, level: Level, max_size: int) -> None:
    facts = with_capacity(used=used)
    assert about("connections", facts).level is level
    assert diagnose(facts).options["max_size"] == max_size


def test_a_fix_names_the_limit_that_is_the_tightest() -> None:
    assert 'alter role "app" connection limit' in (about("connections", with_capacity(role_limit=4)).fix or "")
    assert "alter database" in (about("connections", with_capacity(database_limit=5)).fix or "")
    assert "max_connections = 120" in (about("connections", with_capacity(used=95)).fix or "")


def test_a_count_that_may_be_too_great_says_so() -> None:
    assert "at most 7 in use" in about("connections", with_capacity(used_is_exact=False)).text


def test_a_name_is_quoted_as_sql_wants_it() -> None:
    facts = replace(with_capacity(role_limit=4), user='o"brien')
    assert 'alter role "o""brien" connection limit' in (about("connections", facts).fix or "")


# --- what is in between --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "level"),
    [
        (PoolMode.SESSION, Level.NOTE),
        (PoolMode.TRANSACTION, Level.NOTE),
        (PoolMode.STATEMENT, Level.PROBLEM),
        (None, Level.WARNING),
    ],
)
def test_a_pooler_is_named_with_its_mode(mode: PoolMode | None, level: Level) -> None:
    found = about("pooler", replace(HEALTHY, pooler=pooler(mode)))
    assert found.level is level
    assert found.text.startswith("PgBouncer 1.18.0")
    assert (f"in {mode.value} mode" if mode is not None else "its mode is not known") in found.text


@pytest.mark.parametrize("prepared", [Prepared.LOST, Prepared.UNKNOWN])
def test_statements_are_not_prepared_where_they_may_be_lost(prepared: Prepared) -> None:
    facts = replace(HEALTHY, pooler=pooler(PoolMode.TRANSACTION), prepared=prepared)
    assert about("prepared statements", facts).level is Level.WARNING
    assert diagnose(facts).line == "Pool(conninfo, max_size=10, prepare_threshold=None)"


def test_a_pooler_that_keeps_track_of_prepared_statements_needs_no_option() -> None:
    facts = replace(HEALTHY, pooler=pooler(PoolMode.TRANSACTION))
    assert about("prepared statements", facts).level is Level.OK
    assert diagnose(facts).line == "Pool(conninfo, max_size=10)"


def test_statement_mode_leaves_autocommit_only() -> None:
    facts = replace(HEALTHY, pooler=pooler(PoolMode.STATEMENT), prepared=Prepared.LOST)
    assert diagnose(facts).options == {"max_size": 10, "prepare_threshold": None, "autocommit": True}
    assert diagnose(facts).verdict == "not fit for a pool as it is: 1 problem, 1 warning"


def test_the_poolers_own_size_is_the_limit_where_it_is_to_be_seen() -> None:
    facts = replace(HEALTHY, pooler=pooler(PoolMode.SESSION, default_pool_size="4"))
    assert diagnose(facts).options["max_size"] == 4
    assert "default_pool_size (4)" in (about("pooler", facts).fix or "")


# --- TLS, role, settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tls", "is_remote", "level"),
    [
        (Tls(in_use=False), False, Level.OK),
        (Tls(in_use=False), True, Level.WARNING),
        (Tls(in_use=True, protocol="TLSv1.3", sslmode="require"), False, Level.OK),
        (Tls(in_use=True, protocol="TLSv1.3", sslmode="require"), True, Level.NOTE),
        (Tls(in_use=True, protocol="TLSv1.3", sslmode="verify-full"), True, Level.OK),
    ],
)
def test_tls_matters_beyond_this_machine(tls: Tls, is_remote: bool, level: Level) -> None:
    assert about("TLS", replace(HEALTHY, tls=tls, is_remote=is_remote)).level is level


@pytest.mark.parametrize(
    ("is_standby", "wanted", "level"),
    [
        (False, "any", Level.OK),
        (True, "any", Level.WARNING),
        (True, "read-write", Level.WARNING),
        (True, "standby", Level.OK),
        (True, "prefer-standby", Level.OK),
    ],
)
def test_a_standby_is_a_warning_unless_it_was_asked_for(is_standby: bool, wanted: str, level: Level) -> None:
    assert about("role", replace(HEALTHY, is_standby=is_standby, target_session_attrs=wanted)).level is level


def test_a_primary_that_refuses_writes_is_a_warning() -> None:
    facts = with_settings(default_transaction_read_only="on")
    assert about("default_transaction_read_only", facts).level is Level.WARNING


@pytest.mark.parametrize(
    ("milliseconds", "level", "options"),
    [
        ("0", Level.OK, {}),
        ("900000", Level.OK, {}),
        ("300000", Level.NOTE, {"max_idle": 240}),
        ("44000", Level.WARNING, {"max_idle": 35, "check_interval": 14}),
        ("1000", Level.WARNING, {"max_idle": 0.8, "check_interval": 0.333}),
    ],
)
def test_idle_connections_are_closed_before_the_server_does_and_pinged_in_time(
    milliseconds: str, level: Level, options: dict[str, float]
) -> None:
    facts = with_settings(idle_session_timeout=milliseconds)
    assert about("idle_session_timeout", facts).level is level
    assert diagnose(facts).options == {"max_size": 10, **options}


def test_behind_a_shared_connection_an_idle_session_is_the_poolers() -> None:
    facts = replace(with_settings(idle_session_timeout="10000"), pooler=pooler(PoolMode.TRANSACTION))
    assert "server_idle_timeout = 8" in (about("idle_session_timeout", facts).fix or "")
    assert diagnose(facts).options == {"max_size": 10}


def test_a_pooler_that_closes_them_before_needs_nothing() -> None:
    between = pooler(PoolMode.TRANSACTION, server_idle_timeout="5")
    facts = replace(with_settings(idle_session_timeout="10000"), pooler=between)
    assert about("idle_session_timeout", facts).level is Level.OK


def test_a_pooler_that_ends_idle_clients_is_pinged_in_time() -> None:
    facts = replace(HEALTHY, pooler=pooler(PoolMode.TRANSACTION, client_idle_timeout="15"))
    assert about("client_idle_timeout", facts).level is Level.WARNING
    assert diagnose(facts).options == {"max_size": 10, "max_idle": 12, "check_interval": 5.0}


@pytest.mark.parametrize(
    ("setting", "milliseconds", "level"),
    [
        ("idle_in_transaction_session_timeout", "0", Level.NOTE),
        ("idle_in_transaction_session_timeout", "1000", Level.WARNING),
        ("idle_in_transaction_session_timeout", "60000", Level.OK),
        ("statement_timeout", "0", Level.NOTE),
        ("statement_timeout", "200", Level.NOTE),
        ("statement_timeout", "30000", Level.OK),
        ("transaction_timeout", "60000", Level.NOTE),
    ],
)
def test_other_limits_of_time(setting: str, milliseconds: str, level: Level) -> None:
    assert about(setting, with_settings(**{setting: milliseconds})).level is level


def test_a_server_elsewhere_gets_keepalives_unless_they_were_given() -> None:
    facts = replace(HEALTHY, is_remote=True, tls=Tls(in_use=True, sslmode="verify-full"))
    assert about("firewalls", facts).level is Level.NOTE
    assert diagnose(facts).options == {
        "max_size": 10,
        "keepalives_idle": 60,
        "keepalives_interval": 10,
        "keepalives_count": 6,
    }
    given = frozenset({"keepalives_idle", "keepalives_interval", "keepalives_count"})
    assert diagnose(replace(facts, given=given)).options == {"max_size": 10}


@pytest.mark.parametrize(("milliseconds", "level"), [(0.3, Level.OK), (5.0, Level.NOTE), (120.0, Level.WARNING)])
def test_a_long_way_is_told(milliseconds: float, level: Level) -> None:
    assert about("round trip", replace(HEALTHY, round_trip_ms=milliseconds)).level is level


def test_what_could_not_be_asked_is_said_in_the_servers_words() -> None:
    facts = replace(HEALTHY, capacity=None, unanswered={"capacity": "relation does not exist"})
    assert "relation does not exist" in about("connections", facts).text
