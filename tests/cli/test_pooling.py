"""Poolers that a machine of the tests may not have: played by a few lines that share server connections as they do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from psycopg import errors as e

from asyncpool.cli.doctor.facts import PoolMode, Prepared
from asyncpool.cli.doctor.pooling import find_mode, make_pooler, product_of_host, product_of_words, try_prepared

if TYPE_CHECKING:
    from asyncpool.cli.doctor.asking import Client


class Backend:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.prepared: set[str] = set()


class PretendedPooler:
    """Its server connections are given for a transaction: that which came back last first, or each in its turn.

    With a `prefix` it keeps track of prepared statements, and names them itself.
    """

    def __init__(self, size: int, *, round_robin: bool = False, prefix: str = "") -> None:
        self.free = [Backend(pid) for pid in range(100, 100 + size)]
        self.everybody = list(self.free)
        self.round_robin = round_robin
        self.prefix = prefix

    def take(self) -> Backend:
        return self.free.pop(0)

    def give_back(self, backend: Backend) -> None:
        self.free.insert(len(self.free) if self.round_robin else 0, backend)


class PretendedClient:
    """As much of a Client, and of SQL, as is asked for."""

    pgconn = SimpleNamespace(backend_pid=-7)

    def __init__(self, pooler: PretendedPooler) -> None:
        self.pooler = pooler
        self.held: Backend | None = None
        self.names: dict[str, str] = {}

    async def ask(self, statement: str, step: str) -> list[tuple[str | None, ...]]:
        if statement == "begin":
            self.held = self.pooler.take()
            return []
        backend = self.held or self.pooler.take()
        answer = self.answer(statement, backend)
        if self.held is None or statement.endswith("commit"):
            self.pooler.give_back(backend)
            self.held = None
        return answer

    def answer(self, statement: str, backend: Backend) -> list[tuple[str | None, ...]]:
        if statement.startswith("select pg_catalog.pg_backend_pid()"):
            return [(str(backend.pid),)]
        if statement.startswith("select name"):
            return [(name,) for name in backend.prepared]
        if statement.startswith("select 1"):
            return [("1",) for name in backend.prepared if name in statement]
        if statement.startswith("deallocate"):
            backend.prepared.remove(statement.split()[1])
        return []

    async def prepare(self, name: str, statement: str) -> None:
        assert self.held is not None
        self.names[name] = f"{self.pooler.prefix}1" if self.pooler.prefix else name
        self.held.prepared.add(self.names[name])

    async def execute_prepared(self, name: str) -> list[tuple[str | None, ...]]:
        backend = self.held or self.pooler.take()
        if self.pooler.prefix:
            backend.prepared.add(self.names[name])
        if self.held is None:
            self.pooler.give_back(backend)
        if self.names[name] not in backend.prepared:
            raise e.InvalidSqlStatementName(f'prepared statement "{name}" does not exist')
        return [(str(backend.pid),)]


def two_clients(pooler: PretendedPooler) -> tuple[Client, Client]:
    first, second = (cast("Any", PretendedClient(pooler)) for _ in range(2))
    return first, second


@pytest.mark.parametrize("size", [2, 3, 40])
@pytest.mark.parametrize("round_robin", [False, True])
async def test_a_shared_server_connection_is_recognized(size: int, round_robin: bool) -> None:
    assert await find_mode(*two_clients(PretendedPooler(size, round_robin=round_robin))) is PoolMode.TRANSACTION


@pytest.mark.parametrize(
    ("prefix", "product"), [("PGBOUNCER_", "PgBouncer"), ("PGCAT_", "PgCat"), ("supavisor_", "Supavisor")]
)
async def test_a_pooler_that_keeps_track_of_prepared_statements_is_recognized(prefix: str, product: str) -> None:
    clients = two_clients(PretendedPooler(3, prefix=prefix))
    assert await try_prepared(*clients, PoolMode.TRANSACTION) == (Prepared.USABLE, product)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("round_robin", [False, True])
async def test_what_was_prepared_is_lost_and_removed(size: int, round_robin: bool) -> None:
    pooler = PretendedPooler(size, round_robin=round_robin)
    outcome, _ = await try_prepared(*two_clients(pooler), PoolMode.TRANSACTION)
    assert outcome is Prepared.LOST
    assert [backend.prepared for backend in pooler.everybody] == [set()] * size
    assert len(pooler.free) == size


@pytest.mark.parametrize(
    ("words", "product"),
    [
        ("FATAL:  not allowed", "PgBouncer"),
        ("FATAL:  no such database: ", "PgBouncer"),
        ("odyssey: c1e3: route for '.app' is not found", "Odyssey"),
        ("No pool configured for database: , user: app", "PgCat"),
        ("Tenant or user not found", "Supavisor"),
        ("This RDS Proxy has no credentials for the role app", "RDS Proxy"),
        ("FATAL:  database  does not exist", None),
        ('FATAL:  password authentication failed for user "app"', None),
    ],
)
def test_a_pooler_is_known_by_its_words(words: str, product: str | None) -> None:
    assert product_of_words(words) == product


@pytest.mark.parametrize(
    ("host", "product"),
    [
        ("aws-0-eu-west-1.pooler.supabase.com", "Supavisor"),
        ("mine.proxy-abc123.eu-west-1.rds.amazonaws.com", "RDS Proxy"),
        ("ep-cool-name-123-pooler.eu-central-1.aws.neon.tech", "PgBouncer"),
        ("mine.abc123.eu-west-1.rds.amazonaws.com", None),
        ("127.0.0.1", None),
    ],
)
def test_a_hosted_pooler_is_known_by_its_address(host: str, product: str | None) -> None:
    assert product_of_host(host) == product


@pytest.mark.parametrize(
    ("version", "name", "number"),
    [("PgBouncer 1.18.0", "PgBouncer", "1.18.0"), ("PgCat v1.1.1", "PgCat", "1.1.1"), (None, "Odyssey", None)],
)
def test_the_console_tells_product_and_version(version: str | None, name: str, number: str | None) -> None:
    pooler = make_pooler(version, {}, "Odyssey", PoolMode.SESSION)
    assert (pooler.product, pooler.version) == (name, number)
