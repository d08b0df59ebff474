"""Why nobody was let in, by the SQLSTATE or the words of the connect error, and what helps against it."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from psycopg import DatabaseError, Error, ProgrammingError
from psycopg import errors as e

from asyncpool._io.connect_errors import ConnectFailed
from asyncpool.conninfo import Redactor, parse

if TYPE_CHECKING:
    from collections.abc import Mapping


class NoAnswer(Exception):
    """A step took longer than it may: which one, and how long, in seconds, it was waited for."""

    def __init__(self, step: str, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:g} s: {step}")


@dataclass(frozen=True)
class Refusal:
    """What kind of failure it was, a stable word, and the remedy."""

    kind: str
    fix: str

    @property
    def is_known(self) -> bool:
        """Whether the words were understood."""
        return self.kind != _OTHER.kind


_STATES = {
    "28P01": Refusal(
        "password",
        "check user and password; in a URL these characters of them must be percent-encoded: % @ : / ? # & =",
    ),
    "3D000": Refusal(
        "no such database", "check the name of the database at the end of the URL, or: create database NAME"
    ),
    "53300": Refusal(
        "too many clients",
        "end sessions that nobody needs (select pid, usename, application_name, state from pg_stat_activity), lower the"
        " pools' max_size, raise max_connections or the CONNECTION LIMIT of the role or database, or use a pooler",
    ),
    "57P03": Refusal("starting", "the server starts, stops or recovers: wait, and look into its log if that lasts"),
    "42501": Refusal(
        "no permission",
        "grant connect on database NAME to ROLE; for the demo, which makes a schema, grant create as well",
    ),
    "55000": Refusal("not accepting", "alter database NAME allow_connections true; or connect to another database"),
}

_TLS_REQUIRED = Refusal(
    "TLS required",
    "connect with sslmode=require, or verify-full; if that is refused as well, add a line for this database, user and"
    " address to the server's pg_hba.conf",
)

# Of class 28 and where there is no SQLSTATE: libpq's words, the server's, poolers'. The first that matches counts.
_WORDS: tuple[tuple[str, Refusal], ...] = (
    (
        r"no pg_hba\.conf entry",
        Refusal(
            "no pg_hba.conf entry",
            "add a line for this database, user and address to the server's pg_hba.conf, such as `host DATABASE USER"
            " ADDRESS/32 scram-sha-256`, and: select pg_reload_conf()",
        ),
    ),
    (r"SSL (?:connection )?is required|SSL required|requires SSL", _TLS_REQUIRED),
    (
        r"pg_hba\.conf rejects",
        Refusal("rejected by pg_hba.conf", "a `reject` line of the server's pg_hba.conf is meant"),
    ),
    (
        r'role ".*" does not exist|no such user',
        Refusal("no such role", "check the user in the URL, or: create role NAME login password '...'"),
    ),
    (r"not permitted to log in", Refusal("no login", "alter role NAME login")),
    (
        r"(?:Peer|Ident) authentication failed",
        Refusal(
            "peer",
            "on a Unix socket you must be the system user of the role's name: run it as that user, connect by TCP"
            " (host=127.0.0.1) with a password, or change the `peer` line of pg_hba.conf",
        ),
    ),
    (
        r"no password supplied",
        Refusal("no password", "give a password: in the URL, in PGPASSWORD, or in the file ~/.pgpass"),
    ),
    (r"authentication failed|password", _STATES["28P01"]),
    (
        r"failed to resolve|could not translate host name|not resolved within|Name or service not known",
        Refusal("DNS", "check the spelling of the host, and that this machine can resolve it: getent hosts HOST"),
    ),
    (
        r"does not support SSL",
        Refusal(
            "no TLS", "switch ssl on in the server; or, where the way is safe, connect with sslmode=prefer or disable"
        ),
    ),
    (
        r"certificate verify failed|root certificate|server certificate|does not match host name",
        Refusal(
            "certificate",
            "give the certificate of the authority by sslrootcert=FILE, or =system for a public one, and connect by the"
            " host name that is in the server's certificate",
        ),
    ),
    (
        r"session is (?:not )?read-only|server is (?:not )?in hot standby mode",
        Refusal("wrong role", "name all hosts of the cluster, or ask for another role by target_session_attrs"),
    ),
    (
        r"unsupported startup parameter",
        Refusal(
            "startup parameter",
            "PgBouncer refuses this parameter: leave it out, or add it to ignore_startup_parameters in pgbouncer.ini",
        ),
    ),
    (r'no such database|database ".*" does not exist', _STATES["3D000"]),
    (r"permission denied for database", _STATES["42501"]),
    (r"not currently accepting connections", _STATES["55000"]),
    (r"too many (?:clients|connections)|no more connections allowed|remaining connection slots", _STATES["53300"]),
    (
        r"closed the connection unexpectedly|Connection reset|invalid response|SSL error",
        Refusal("closed", "what listens there may be no PostgreSQL, or want TLS: check host and port, and its log"),
    ),
)

# For the command that has such an option.
LONGER = "; --timeout gives it longer"

_TIMEOUT = Refusal(
    "timeout",
    "check host and port, and that no firewall or security group drops what is sent there" + LONGER,
)
_NO_ANSWER = Refusal(
    "no answer",
    "it let us in and does not answer: a pooler may have no server connection free, or the server is overloaded"
    + LONGER,
)
_SYSTEM = {
    errno.ECONNREFUSED: Refusal(
        "refused", "nobody listens there: check host and port, that the server runs, and its listen_addresses"
    ),
    errno.ENOENT: Refusal(
        "no socket",
        "no such Unix socket: check that the server runs, and its unix_socket_directories; by TCP, give a host",
    ),
    errno.EHOSTUNREACH: Refusal("unreachable", "there is no way to this host: check the address, the network, the VPN"),
    errno.ENETUNREACH: Refusal("unreachable", "there is no way to this host: check the address, the network, the VPN"),
    errno.EACCES: Refusal("socket permission", "this system user may not use the server's Unix socket: connect by TCP"),
}
_CONNINFO = Refusal(
    "connection string", "give a URL, postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or key=value pairs"
)
_OTHER = Refusal("other", "the server's log says more")


def refusal_of(error: Exception, words: str, sslmode: str = "prefer") -> Refusal:
    """What it was. `words` are the error's, as they are shown; `sslmode` is what was asked for."""
    if isinstance(error, NoAnswer):
        return _NO_ANSWER
    if isinstance(error, ProgrammingError) and error.sqlstate is None:
        return _CONNINFO
    if isinstance(error, e.ConnectionTimeout):
        return _TIMEOUT if "not resolved" not in words else _by_words(words)
    if "no encryption" in words and "SSL encryption" not in words and sslmode in ("disable", "allow"):
        return _TLS_REQUIRED  # with TLS nobody has tried
    sqlstate = error.sqlstate if isinstance(error, Error) else None
    return _STATES.get(sqlstate or "") or _by_words(words)


def _by_words(words: str) -> Refusal:
    for pattern, refusal in _WORDS:
        if re.search(pattern, words, re.DOTALL | re.IGNORECASE):
            return refusal
    return next((refusal for number, refusal in _SYSTEM.items() if os.strerror(number) in words), _OTHER)


def explain(failed: Exception, url: str, *, has_timeout_option: bool = False) -> tuple[str, Refusal]:
    """The words of a failed connect to the server at `url`, without a password, and what helps."""
    error = failed.error if isinstance(failed, ConnectFailed) else failed
    # All of them, where there are several hosts; each was redacted already, and once more does no harm.
    message = Redactor(url, {}).redact(str(error).strip() or words_of(error))
    refusal = refusal_of(error, message, _sslmode(url))
    if not has_timeout_option:
        refusal = replace(refusal, fix=refusal.fix.removesuffix(LONGER))
    return message, refusal


def _sslmode(url: str) -> str:
    try:
        return asked(parse(url, {}), "sslmode", "prefer")
    except Error:  # then that is the failure
        return "prefer"


def asked(given: Mapping[str, object], name: str, default: str) -> str:
    """A connection parameter as it was given, or as libpq's environment has it."""
    return str(given.get(name) or os.environ.get(f"PG{name.upper().replace('_', '')}") or default)


def words_of(error: Exception) -> str:
    """The server's words, in one line."""
    primary = error.diag.message_primary if isinstance(error, DatabaseError) else None
    return " ".join((primary or str(error)).split())
