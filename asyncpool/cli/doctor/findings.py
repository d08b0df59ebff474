"""What the facts mean for a pool: findings with a remedy each, and the options to give it. Pure: it asks nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from asyncpool.cli.capacity import Whose
from asyncpool.cli.doctor.facts import Facts, PoolMode, Prepared
from asyncpool.cli.words import count_of
from asyncpool.config import PoolConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncpool.cli.capacity import Capacity
    from asyncpool.cli.doctor.facts import Pooler

Options = dict[str, int | float | bool | None]

_DEFAULTS = PoolConfig(name="defaults")
MAX_SIZE = _DEFAULTS.max_size
MAX_IDLE = _DEFAULTS.max_idle or math.inf
CHECK_INTERVAL = _DEFAULTS.check_interval or math.inf

# Beyond this share of it a pool of the default size is no longer small beside what is free: others want some too.
SHARE_OF_FREE = 0.5

# In ms. Within a data centre a round trip takes well below 2; from 50 on the server is in another part of the world.
FAR = 2.0
VERY_FAR = 50.0

# A transaction may be silent for as long as its client computes, or waits for another service: in ms.
HASTY = 5_000

# In seconds: the least time after which the address translation of a cloud is known to forget a silent connection is
# some 240 s (Azure's load balancer, 4 min; AWS's, 350 s).
KEEPALIVES = {"keepalives_idle": 60, "keepalives_interval": 10, "keepalives_count": 6}

# A share of an idle timeout that leaves time for what comes late.
PRUDENCE = 0.8


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Whatever is not ok has a remedy."""

    level: Level
    topic: str
    text: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and what follows from them."""

    findings: tuple[Finding, ...]
    options: Options

    def count(self, level: Level) -> int:
        """How many findings are of this level."""
        return sum(finding.level is level for finding in self.findings)

    @property
    def is_fit(self) -> bool:
        """Whether nothing is worse than a note."""
        return not (self.count(Level.WARNING) or self.count(Level.PROBLEM))

    @property
    def verdict(self) -> str:
        """In a sentence."""
        problems, warnings = self.count(Level.PROBLEM), self.count(Level.WARNING)
        if problems:
            return f"not fit for a pool as it is: {count_of(problems, 'problem')}, {count_of(warnings, 'warning')}"
        if warnings:
            return f"fit for a pool, with {count_of(warnings, 'warning')} to see to"
        return "fit for a pool"

    @property
    def line(self) -> str:
        """The pool to make, as Python."""
        return f"Pool(conninfo, {', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def diagnose(facts: Facts) -> Diagnosis:
    """The findings, in the order in which they are read."""
    findings = (
        _server(facts),
        _round_trip(facts),
        *_connections(facts),
        _pooler(facts),
        _prepared(facts),
        _tls(facts),
        *_role(facts),
        *_idle_sessions(facts),
        *_idle_transactions(facts),
        *_statements(facts),
        *_silence(facts),
    )
    return Diagnosis(findings, recommended_options(facts))


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds:g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:g} s"


def _quoted(role: str) -> str:
    return '"' + role.replace('"', '""') + '"'


def _server(facts: Facts) -> Finding:
    if facts.product != "PostgreSQL":
        return Finding(
            Level.WARNING,
            "server",
            f"{facts.product}, which reports itself as {facts.server_version}: the pool is tested on PostgreSQL",
            "run your own tests against it; what could not be asked is left out here",
        )
    return Finding(Level.OK, "server", f"PostgreSQL {facts.server_version}")


def _round_trip(facts: Facts) -> Finding:
    text = f"{facts.round_trip_ms:.2f} ms, the median of several `select 1`"
    if facts.round_trip_ms >= VERY_FAR:
        fix = "run the program nearer to the server: every statement on a lease waits for at least one round trip"
        return Finding(Level.WARNING, "round trip", text, fix)
    if facts.round_trip_ms >= FAR:
        fix = "send single statements by pool.execute() and pool.fetch(), which share round trips, and use pipelines"
        return Finding(Level.NOTE, "round trip", text, fix)
    return Finding(Level.OK, "round trip", text)


# --- connections ---------------------------------------------------------------------------------------------


def _connections(facts: Facts) -> Iterator[Finding]:
    capacity = facts.capacity
    if capacity is None:
        words = facts.unanswered.get("capacity", "no answer")
        yield Finding(
            Level.NOTE,
            "connections",
            f"how many are free could not be asked: {words}",
            "ask the server's administrator, and keep the sum of all pools' max_size below it",
        )
        return
    sessions = f"{'' if capacity.used_is_exact else 'at most '}{capacity.used}"
    text = f"max_connections is {capacity.max_connections}, {sessions} in use, {capacity.free} free for you"
    limits = _limits(facts, capacity)
    text += f" ({'; '.join(limits)})" if limits else ""
    if facts.pooler is not None:
        text += "; the pooler's own limits come before these"
    yield Finding(_level_of_free(capacity.free), "connections", text, _fix_of_free(facts, capacity))
    if capacity.is_superuser:
        yield Finding(
            Level.NOTE,
            "superuser",
            "you connect as one: such a pool may take the last places, which are reserved for an administrator in need"
            " (they are not counted as free)",
            "connect as a role of the application's own: create role app login password '...'",
        )


def _limits(facts: Facts, capacity: Capacity) -> list[str]:
    limits = [f"{capacity.superuser_reserved} reserved for superusers"]
    if capacity.reserved:
        limits.append(f"{capacity.reserved} for members of pg_use_reserved_connections")
    if capacity.role_limit is not None:
        limits.append(f"role {facts.user}: {capacity.role_used} of its limit of {capacity.role_limit} in use")
    if capacity.database_limit is not None:
        limits.append(f"this database: {capacity.database_used} of its limit of {capacity.database_limit} in use")
    return limits


def _level_of_free(free: int) -> Level:
    if free == 0:
        return Level.PROBLEM
    if free < MAX_SIZE:
        return Level.WARNING
    return Level.OK if free * SHARE_OF_FREE >= MAX_SIZE else Level.NOTE


def _fix_of_free(facts: Facts, capacity: Capacity) -> str | None:
    if _level_of_free(capacity.free) is Level.OK:
        return None
    size = f"keep the sum of all pools' max_size within {max(capacity.free, 1)}"
    if capacity.whose is Whose.ROLE:
        more = (capacity.role_limit or 0) + 2 * MAX_SIZE
        return f"{size}, or: alter role {_quoted(facts.user)} connection limit {more}"
    if capacity.whose is Whose.DATABASE:
        return f"{size}, or raise the database's limit: alter database ... connection limit"
    more = capacity.max_connections + 2 * MAX_SIZE
    return f"{size}, end sessions that nobody needs, or: alter system set max_connections = {more}, and restart"


# --- what is in between --------------------------------------------------------------------------------------


def _pooler(facts: Facts) -> Finding:
    if facts.pooler is not None:
        return _pooler_in_mode(facts, facts.pooler)
    if facts.passed_on:
        return Finding(
            Level.NOTE,
            "pooler",
            "none, but connections are passed on, by a proxy or an address translation: each is a session of its own",
            f"its idle timeout must be longer than check_interval ({CHECK_INTERVAL:g} s), after which the pool pings",
        )
    return Finding(Level.OK, "pooler", "none: this connection is the server's own")


def _pooler_in_mode(facts: Facts, pooler: Pooler) -> Finding:
    name = " ".join(filter(None, (pooler.product or "one of unknown make", pooler.version)))
    size = pooler.settings.get("default_pool_size")
    of_size = f"default_pool_size ({size})" if size else "pool size"
    if pooler.mode is PoolMode.STATEMENT:
        return Finding(
            Level.PROBLEM,
            "pooler",
            f"{name}, in statement mode: it refuses transactions",
            "set pool_mode = transaction there; until then only one-shot statements and autocommit=True work",
        )
    if pooler.mode is PoolMode.TRANSACTION:
        return Finding(
            Level.NOTE,
            "pooler",
            f"{name}, in transaction mode: SET, LISTEN, session advisory locks and temporary tables do not stay with"
            " you beyond a transaction, but may reach others",
            "use SET LOCAL and pg_advisory_xact_lock(), connect directly for LISTEN, and leave reset= at 'rollback';"
            f" what is beyond its {of_size} waits there",
        )
    if pooler.mode is PoolMode.SESSION:
        return Finding(
            Level.NOTE,
            "pooler",
            f"{name}, in session mode: each of the pool's connections takes one of the server's while it is open",
            f"keep the sum of all pools' max_size within its {of_size}, or set pool_mode = transaction",
        )
    words = facts.unanswered.get("pooler", "no answer")
    return Finding(
        Level.WARNING,
        "pooler",
        f"{name}; its mode is not known, as a second connection came to nothing: {words}",
        f"raise its {of_size}, or connect to the server directly",
    )


def _prepared(facts: Facts) -> Finding:
    if facts.prepared is Prepared.USABLE:
        return Finding(Level.OK, "prepared statements", "usable")
    text = "not usable: what is prepared is gone with the next transaction"
    if facts.prepared is Prepared.UNKNOWN:
        text = "may be lost: whether this pooler keeps track of them could not be seen"
    fix = "give prepare_threshold=None, as below"
    if facts.pooler is not None and facts.pooler.product in (None, "PgBouncer"):
        fix += "; or use PgBouncer 1.21 or newer with max_prepared_statements = 200"
    return Finding(Level.WARNING, "prepared statements", text, fix)


def _tls(facts: Facts) -> Finding:
    tls = facts.tls
    peer = "" if facts.pooler is None else ", as far as the pooler"
    if not tls.in_use:
        if not facts.is_remote:
            return Finding(Level.OK, "TLS", f"not in use, and not needed: this is the same machine{peer}")
        return Finding(
            Level.WARNING,
            "TLS",
            f"not in use{peer}: what is sent can be read on the way, and changed",
            "switch ssl on in the server, and connect with sslmode=verify-full and sslrootcert=FILE or =system",
        )
    words = f"{', '.join(filter(None, (tls.protocol, tls.cipher))) or 'in use'}{peer}"
    if tls.is_verified or not facts.is_remote:
        return Finding(Level.OK, "TLS", words)
    return Finding(
        Level.NOTE,
        "TLS",
        f"{words}; with sslmode={tls.sslmode} the server need not prove who it is",
        "connect with sslmode=verify-full and sslrootcert=FILE or =system",
    )


def _role(facts: Facts) -> Iterator[Finding]:
    wants_standby = facts.target_session_attrs in ("standby", "prefer-standby", "read-only")
    if facts.is_standby and not wants_standby:
        yield Finding(
            Level.WARNING,
            "role",
            "a standby: it refuses every write",
            "name all hosts and target_session_attrs=read-write, which follows a failover; =standby, if you only read",
        )
        return
    if facts.is_standby is not None:
        yield Finding(Level.OK, "role", "a standby, as you asked for" if facts.is_standby else "primary")
    if facts.settings.get("default_transaction_read_only") == "on" and not facts.is_standby and not wants_standby:
        yield Finding(
            Level.WARNING,
            "default_transaction_read_only",
            "on: every write is refused that does not say READ WRITE",
            f"alter role {_quoted(facts.user)} set default_transaction_read_only = off, unless you only read",
        )


# --- settings that bite --------------------------------------------------------------------------------------


def _idle_sessions(facts: Facts) -> Iterator[Finding]:
    limit = facts.milliseconds("idle_session_timeout")
    topic = "idle_session_timeout"
    if _is_shared(facts):
        before = _pooler_number(facts, "server_idle_timeout")
        if limit and 0 < before < limit / 1000:
            yield Finding(
                Level.OK, topic, f"{_seconds(limit)}, more than the pooler's server_idle_timeout, {before:g} s"
            )
        elif limit:
            yield Finding(
                Level.NOTE,
                topic,
                f"{_seconds(limit)}: it ends the pooler's idle server connections",
                f"have the pooler close them before: server_idle_timeout = {max(1, int(PRUDENCE * limit / 1000))}",
            )
    elif limit and limit / 1000 < 1.5 * CHECK_INTERVAL:
        yield Finding(
            Level.WARNING,
            topic,
            f"{_seconds(limit)}: the server ends idle connections of the pool before they are pinged",
            f"give check_interval and max_idle, as below; or alter role {_quoted(facts.user)} set {topic} = 0",
        )
    elif limit and limit / 1000 < MAX_IDLE:
        yield Finding(
            Level.NOTE,
            topic,
            f"{_seconds(limit)}, less than max_idle ({MAX_IDLE:g} s): only the pool's pings keep connections alive",
            "give max_idle, as below, and leave check_interval on",
        )
    elif limit == 0:
        yield Finding(Level.OK, topic, "none")
    elif limit:
        yield Finding(Level.OK, topic, f"{_seconds(limit)}, more than max_idle ({MAX_IDLE:g} s)")
    client_limit = _pooler_number(facts, "client_idle_timeout")
    if client_limit and client_limit < 1.5 * CHECK_INTERVAL:
        yield Finding(
            Level.WARNING,
            "client_idle_timeout",
            f"{client_limit:g} s: the pooler ends idle connections of the pool before they are pinged",
            "give check_interval, as below, or set client_idle_timeout = 0 in the pooler",
        )


def _idle_transactions(facts: Facts) -> Iterator[Finding]:
    topic = "idle_in_transaction_session_timeout"
    limit = facts.milliseconds(topic)
    if limit == 0:
        yield Finding(
            Level.NOTE,
            topic,
            "none: a transaction that is forgotten open keeps its locks, and its place in the pool, for ever",
            f"alter role {_quoted(facts.user)} set {topic} = '60s'; long_held_after=30 names the line of code",
        )
    elif limit and limit < HASTY:
        yield Finding(
            Level.WARNING,
            topic,
            f"{_seconds(limit)}: a block that does something else for so long in a transaction loses its connection",
            f"alter role {_quoted(facts.user)} set {topic} = '60s'; or keep such blocks short",
        )
    elif limit:
        yield Finding(Level.OK, topic, f"{_seconds(limit)}")
    limit = facts.milliseconds("transaction_timeout")
    if limit:
        yield Finding(
            Level.NOTE,
            "transaction_timeout",
            f"{_seconds(limit)}: a transaction that lasts longer loses its connection",
            f"alter role {_quoted(facts.user)} set transaction_timeout = 0, where long transactions are meant",
        )


def _statements(facts: Facts) -> Iterator[Finding]:
    limit = facts.milliseconds("statement_timeout")
    if limit == 0:
        yield Finding(
            Level.NOTE,
            "statement_timeout",
            "none: a statement that hangs holds its place in the pool for ever",
            f"alter role {_quoted(facts.user)} set statement_timeout = '30s'; or asyncio.timeout() around it",
        )
    elif limit and limit < 1000:
        yield Finding(
            Level.NOTE,
            "statement_timeout",
            f"{_seconds(limit)}: statements that take longer fail with QueryCanceled",
            "raise it for those that are known to: set local statement_timeout = '10s' in their transaction",
        )
    elif limit:
        yield Finding(Level.OK, "statement_timeout", _seconds(limit))


def _silence(facts: Facts) -> Iterator[Finding]:
    """What cannot be seen from here: when a firewall or an address translation forgets a connection."""
    if not facts.is_remote:
        return
    idle = facts.settings.get("tcp_keepalives_idle", "0")
    server = f"the server's tcp_keepalives_idle is {idle} s" if idle != "0" else "the server sends no keepalives"
    yield Finding(
        Level.NOTE,
        "firewalls",
        f"what is in between may forget silent connections, and cannot be asked when; {server}, idle connections are"
        f" pinged every {CHECK_INTERVAL:g} s, and a long statement is silent",
        "give keepalives_idle, as below; if connections are cut at an age as well, max_lifetime= below that age",
    )


# --- the options that follow ---------------------------------------------------------------------------------


def recommended_options(facts: Facts) -> Options:
    """What to give the pool: `max_size`, and what must differ from its defaults here."""
    options: Options = {"max_size": _max_size(facts)}
    if facts.prepared is not Prepared.USABLE:
        options["prepare_threshold"] = None
    if facts.pooler is not None and facts.pooler.mode is PoolMode.STATEMENT:
        options["autocommit"] = True
    limits = [] if _is_shared(facts) else [(facts.milliseconds("idle_session_timeout") or 0) / 1000]
    limits.append(_pooler_number(facts, "client_idle_timeout"))
    if shortest := min(filter(None, limits), default=0):
        if shortest < MAX_IDLE:
            options["max_idle"] = _rounded(PRUDENCE * shortest)
        if shortest < 1.5 * CHECK_INTERVAL:
            options["check_interval"] = _rounded(shortest / 3)
    if facts.is_remote:
        options |= {name: value for name, value in KEEPALIVES.items() if name not in facts.given}
    return options


def _max_size(facts: Facts) -> int:
    limits = [MAX_SIZE]
    if facts.capacity is not None:
        limits.append(max(1, int(facts.capacity.free * SHARE_OF_FREE)))
    if size := int(_pooler_number(facts, "default_pool_size")):
        limits.append(size)
    return min(limits)


def _rounded(seconds: float) -> float:
    return int(seconds) if seconds >= 10 else round(seconds, 3)


def _is_shared(facts: Facts) -> bool:
    return facts.pooler is not None and facts.pooler.mode is not None and facts.pooler.mode.is_shared


def _pooler_number(facts: Facts, name: str) -> float:
    """A number of the pooler's settings; 0, which is no limit there, where it is not to be seen."""
    value = facts.pooler.settings.get(name, "") if facts.pooler is not None else ""
    try:
        return float(value)
    except ValueError:
        return 0.0
