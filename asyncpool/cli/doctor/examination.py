"""What `asyncpool doctor` asks of a server, on three connections at most; all that it says is read from the answers.

Everything that is asked only reads. What is refused, as by a server that is no PostgreSQL, is left out of the facts.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from psycopg import Error

from asyncpool._io.connect_errors import ConnectFailed
from asyncpool._io.tls import tls_attribute
from asyncpool.cli.capacity import QUESTION, capacity_of
from asyncpool.cli.doctor import pooling
from asyncpool.cli.doctor.asking import Client, connected
from asyncpool.cli.doctor.facts import Facts, Pooler, Prepared, Tls
from asyncpool.cli.refusals import NoAnswer, asked, words_of
from asyncpool.conninfo import Redactor, describe, parse

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from psycopg.pq.abc import PGconn

    from asyncpool.cli.capacity import Capacity

T = TypeVar("T")

ROUND_TRIPS = 11

SETTINGS = (
    "default_transaction_read_only",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "statement_timeout",
    "tcp_keepalives_idle",
    "transaction_timeout",
)

_NAMES = ", ".join(f"'{name}'" for name in SETTINGS)
_SETTINGS = f"select name, setting from pg_catalog.pg_settings where name in ({_NAMES}) order by name"  # noqa: S608

_WHO = (
    "select pg_catalog.version(), pg_catalog.current_setting('server_version'), session_user,"
    " pg_catalog.inet_client_port()"
)


@dataclass(frozen=True, kw_only=True)
class _Pooling:
    """What trying has shown."""

    pooler: Pooler | None
    prepared: Prepared


class Examination:
    """Of the server at `conninfo`; `timeout`, in seconds, is for each address and for each question."""

    def __init__(self, conninfo: str, timeout: float) -> None:
        self._conninfo = conninfo
        self._timeout = timeout
        self._given = parse(conninfo, {})
        self._redactor = Redactor(conninfo, {})
        self._unanswered: dict[str, str] = {}

    async def run(self) -> Facts:
        """Connect, and ask. Raises ConnectFailed, the server's error or NoAnswer where there is nothing to tell."""
        async with connected(self._conninfo, {}, self._timeout) as client:
            [[words, version, user, port]] = await client.ask(_WHO, "ask for the version")
            round_trip_ms = await self._measure(client)
            capacity = await self._or_none("capacity", self._ask_capacity(client))
            settings = await self._or_none("settings", client.ask(_SETTINGS, "ask for settings")) or []
            standby = await self._or_none(
                "role", client.ask("select pg_catalog.pg_is_in_recovery()", "ask whether it is a standby")
            )
            passed_on = client.local_port is not None and str(client.local_port) != port
            pooling_found = await self._examine_pooling(client, passed_on=passed_on)
            return Facts(
                place=describe(_place_of(client.pgconn), self._redactor),
                user=str(user),
                is_remote=client.is_remote,
                given=frozenset(self._given),
                target_session_attrs=self._asked("target_session_attrs", "any"),
                server_version=_brief_version(str(version)),
                product=_product(str(words)),
                round_trip_ms=round_trip_ms,
                capacity=capacity,
                pooler=pooling_found.pooler,
                passed_on=passed_on and pooling_found.pooler is None,
                prepared=pooling_found.prepared,
                tls=self._tls_of(client.pgconn),
                is_standby=standby[0][0] == "t" if standby else None,
                settings={str(name): str(value) for name, value in settings},
                unanswered=dict(self._unanswered),
            )

    async def _or_none(self, topic: str, answer: Awaitable[T]) -> T | None:
        """The answer, or None and a note of the server's words. What got no answer at all leaves no use in going on."""
        try:
            return await answer
        except Error as error:
            self._unanswered[topic] = self._redactor.redact(words_of(error))
            return None

    async def _measure(self, client: Client) -> float:
        """The median round trip, in ms."""
        times = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            await client.ask("select 1", "measure the round trip")
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times)

    async def _ask_capacity(self, client: Client) -> Capacity | None:
        rows = await client.ask(QUESTION, "count the sessions")
        return capacity_of(rows[0]) if rows else None

    async def _examine_pooling(self, client: Client, *, passed_on: bool) -> _Pooling:
        is_between = await pooling.is_between(client)
        if not is_between and not passed_on:
            return _Pooling(pooler=None, prepared=await pooling.try_prepared_alone(client))
        address = _address_of(client.pgconn)
        product = pooling.product_of_host(client.pgconn.host.decode())
        mode, prepared = None, Prepared.UNKNOWN
        try:
            async with connected(self._conninfo, address, self._timeout) as second:
                mode = await pooling.find_mode(client, second)
                prepared, named = await pooling.try_prepared(client, second, mode)
                product = named or product
        except (ConnectFailed, Error, NoAnswer) as error:
            self._unanswered["pooler"] = self._redactor.redact(words_of(error))
        if not is_between and (mode is None or not mode.is_shared):
            # The session is one of the server's own, and only its address is not ours.
            return _Pooling(pooler=None, prepared=prepared)
        version, settings = await pooling.ask_console(self._conninfo, address, self._timeout)
        return _Pooling(pooler=pooling.make_pooler(version, settings, product, mode), prepared=prepared)

    def _tls_of(self, pgconn: PGconn) -> Tls:
        if not pgconn.ssl_in_use:
            return Tls(in_use=False, sslmode=self._asked("sslmode", "prefer"))
        # With the system's certificates libpq takes no other mode.
        default = "verify-full" if self._asked("sslrootcert", "") == "system" else "prefer"
        return Tls(
            in_use=True,
            protocol=tls_attribute(pgconn, "protocol"),
            cipher=tls_attribute(pgconn, "cipher"),
            sslmode=self._asked("sslmode", default),
        )

    def _asked(self, name: str, default: str) -> str:
        return asked(self._given, name, default)


def _address_of(pgconn: PGconn) -> dict[str, str]:
    """Of several hosts the one that was reached, for the further connections."""
    address = {"host": pgconn.host, "hostaddr": pgconn.hostaddr, "port": pgconn.port}
    named = {name: value.decode() for name, value in address.items() if value}
    if named.get("host", "").startswith(("/", "@")):
        named.pop("hostaddr", None)
    return named


def _place_of(pgconn: PGconn) -> dict[str, str]:
    names = {"user": pgconn.user, "host": pgconn.host, "port": pgconn.port, "dbname": pgconn.db}
    return {name: value.decode() for name, value in names.items() if value}


def _brief_version(version: str) -> str:
    """Without the words that packagers add: `15.14 (Debian 15.14-0+deb12u1)`."""
    return version.partition(" ")[0]


def _product(words: str) -> str:
    """What `version()` calls it: products that are derived from PostgreSQL name themselves somewhere in it."""
    derived = re.search(r"CockroachDB|Redshift|Greenplum|Yugabyte|-YB-|CrateDB|Materialize|EnterpriseDB", words)
    if derived is not None:
        return "YugabyteDB" if derived[0] in ("-YB-", "Yugabyte") else derived[0]
    return words.split(" ", maxsplit=1)[0].rstrip(",")
