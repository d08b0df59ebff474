"""The fixtures that all tests share. With DATABASE_URL they use that server, and leave it running."""

from __future__ import annotations

import itertools
import logging
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from kit.loops import loop_factories
from kit.mortal_server import MortalServer
from kit.proxy import Proxy
from kit.servers import Admin, PasswordServer, Server, create_users_with_odd_passwords
from kit.tls import tls_settings
from kit.waiting import eventually_blocking
from psycopg.conninfo import make_conninfo

from asyncpool.cli.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kit.loops import LoopFactory

NEEDS_CONTROL = "needs a server to itself, and DATABASE_URL names one that belongs to somebody else"

test_numbers = itertools.count(1)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, LoopFactory]:
    """asyncio's own loop; on both for the tests that say `on_both_loops`."""
    factories = loop_factories()
    if any("loop_factories" in mark.kwargs for mark in item.iter_markers("asyncio")):
        return factories
    return {"asyncio": factories["asyncio"]}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server to share, in its default state: started once, or that of DATABASE_URL."""
    if url := os.environ.get("DATABASE_URL"):
        yield Server(url, None)
        return
    with EmbeddedServer(settings={"max_connections": 200}) as embedded:
        yield Server(embedded.dsn(), embedded)


@pytest.fixture
def application_name(shared_admin: Admin) -> Iterator[str]:
    """The name under which the server knows this test's sessions.

    What they still do on the shared server when the test is over is ended: a statement whose client was cut off may
    run on for minutes, and `create index concurrently` waits for every transaction of the database.
    """
    name = f"asyncpool-test-{next(test_numbers)}"
    yield name
    shared_admin.terminate_busy(name)


@pytest.fixture
def dsn(server: Server, application_name: str) -> str:
    """The shared server, as key=value, with this test's `application_name`."""
    return make_conninfo(server.dsn, application_name=application_name)


@pytest.fixture(scope="session")
def shared_admin(server: Server) -> Iterator[Admin]:
    admin = Admin(server.dsn)
    yield admin
    admin.close()


@pytest.fixture
def admin(shared_admin: Admin) -> Admin:
    """A session on the shared server past the pool: who is connected, end them, ask anything."""
    return shared_admin


@pytest.fixture(scope="session")
def breakable_server() -> Iterator[EmbeddedServer]:
    if "DATABASE_URL" in os.environ:
        pytest.skip(NEEDS_CONTROL)
    with EmbeddedServer(host_authentication="trust") as embedded:
        yield embedded


@pytest.fixture
def private_server(breakable_server: EmbeddedServer) -> EmbeddedServer:
    """A server that this test may stop, kill and restart, on Unix socket and TCP; up when the test begins."""
    breakable_server.start()
    return breakable_server


@pytest.fixture
def private_dsn(private_server: EmbeddedServer, application_name: str) -> str:
    """The private server's Unix socket, as key=value, with this test's `application_name`."""
    return make_conninfo(private_server.dsn(), application_name=application_name)


@pytest.fixture
def private_admin(private_server: EmbeddedServer) -> Iterator[Admin]:
    """A session on the private server; connects anew after a restart."""
    admin = Admin(private_server.dsn())
    yield admin
    admin.close()


@pytest.fixture(scope="session")
def lasting_mortal_server() -> Iterator[MortalServer]:
    if "DATABASE_URL" in os.environ:
        pytest.skip(NEEDS_CONTROL)
    server = MortalServer()
    yield server
    server.close()


@pytest.fixture
def mortal(lasting_mortal_server: MortalServer) -> MortalServer:
    """A server to stop, kill, freeze and reconfigure; up, and with nobody in it, when the test begins."""
    lasting_mortal_server.recover()
    eventually_blocking(lambda: lasting_mortal_server.strangers() == 0)
    return lasting_mortal_server


@pytest.fixture(scope="session")
def password_server() -> Iterator[PasswordServer]:
    """A server on TCP with a user for each of `ODD_PASSWORDS`."""
    if "DATABASE_URL" in os.environ:
        pytest.skip(NEEDS_CONTROL)
    with EmbeddedServer(host_authentication="scram-sha-256") as embedded:
        create_users_with_odd_passwords(embedded)
        yield PasswordServer(embedded)


@pytest.fixture(scope="session")
def tls_server() -> Iterator[EmbeddedServer]:
    """A server on TCP that takes TLS, with a certificate of its own making."""
    with ExitStack() as stack:
        installation, settings = stack.enter_context(tls_settings())
        server = EmbeddedServer(settings=settings, host_authentication="trust", installed_at=installation)
        yield stack.enter_context(server)


@pytest.fixture(scope="session")
def shared_tls_admin(tls_server: EmbeddedServer) -> Iterator[Admin]:
    admin = Admin(tls_server.dsn())
    yield admin
    admin.close()


@pytest.fixture
def tls_admin(shared_tls_admin: Admin) -> Admin:
    """A session on the server that takes TLS, past the pool and without TLS."""
    return shared_tls_admin


@pytest.fixture
def tls_proxy(tls_server: EmbeddedServer) -> Iterator[Proxy]:
    """A network of this test's own before the server that takes TLS; its `dsn` asks for TLS."""
    with Proxy(tls_server.host_dsn(sslmode="require")) as proxy:
        yield proxy


@pytest.fixture
def tls_dsn(tls_proxy: Proxy, application_name: str) -> str:
    """The server that takes TLS, through `tls_proxy`, with this test's `application_name`."""
    return make_conninfo(tls_proxy.dsn, application_name=application_name)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A network of this test's own before the shared server."""
    with Proxy(server.dsn) as proxy:
        yield proxy


@pytest.fixture
def proxied_dsn(proxy: Proxy, application_name: str) -> str:
    """The shared server through `proxy`, with this test's `application_name`."""
    return make_conninfo(proxy.dsn, application_name=application_name)


@pytest.fixture
def no_bug_reported(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Errors in the log are bugs of the pool, or exceptions in its callbacks and tasks that nobody else sees."""
    yield
    loggers = ("asyncpool", "asyncio")
    errors = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR and r.name in loggers]
    assert errors == []


@pytest.fixture
def table(admin: Admin, application_name: str) -> Iterator[str]:
    """The name of an empty table with one column, `id integer`, unique when the transaction ends."""
    name = application_name.replace("-", "_")
    admin.execute(f"drop table if exists {name}")
    admin.execute(f"create table {name} (id integer unique deferrable initially deferred)")
    yield name
    admin.terminate_busy(application_name)  # of a test that failed midway: they would keep the table
    admin.execute(f"drop table {name}")
