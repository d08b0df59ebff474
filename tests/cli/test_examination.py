"""What an examination finds out, on real servers and through a real PgBouncer."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from kit.pgbouncer import PgBouncer
from kit.proxy import Proxy
from kit.waiting import eventually
from psycopg.conninfo import conninfo_to_dict

from asyncpool import Pool
from asyncpool.cli.doctor.examination import Examination
from asyncpool.cli.doctor.facts import PoolMode, Prepared
from asyncpool.cli.doctor.findings import diagnose
from asyncpool.cli.embedded import EmbeddedServer
from asyncpool.events import CloseReason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kit.mortal_server import MortalServer
    from kit.servers import Admin, Server

    from asyncpool.cli.doctor.facts import Facts

TIMEOUT = 5.0


async def examine(dsn: str, timeout: float = TIMEOUT) -> Facts:
    return await Examination(dsn, timeout).run()


def pool_of(facts: Facts, conninfo: str) -> Pool[Any]:
    """The recommended one, as it would be pasted into a program."""
    pool = eval(diagnose(facts).line, {"Pool": Pool, "conninfo": conninfo})
    assert isinstance(pool, Pool)
    return pool


# --- directly ------------------------------------------------------------------------------------------------


async def test_a_server_that_is_reached_directly(dsn: str, admin: Admin, application_name: str) -> None:
    facts = await examine(dsn)
    version = admin.value("show server_version")
    assert (facts.product, facts.server_version) == ("PostgreSQL", version.partition(" ")[0])
    assert 0 < facts.round_trip_ms < 5000
    assert (facts.pooler, facts.passed_on, facts.prepared) == (None, False, Prepared.USABLE)
    assert facts.is_standby is False
    assert facts.unanswered == {}
    assert facts.settings["statement_timeout"] == admin.value(
        "select setting from pg_settings where name = 'statement_timeout'"
    )
    assert admin.sessions(application_name) == 0


@pytest.mark.parametrize("way", ["tcp", "unix"])
async def test_both_ways_to_a_server_on_this_machine_are_direct(mortal: MortalServer, way: Any) -> None:
    facts = await examine(mortal.dsn("doctor", way))
    assert (facts.pooler, facts.passed_on, facts.is_remote) == (None, False, False)


async def test_connections_that_are_passed_on_one_by_one_are_no_pooler(mortal: MortalServer) -> None:
    with Proxy(mortal.embedded.host_dsn()) as proxy:
        facts = await examine(proxy.dsn)
        assert (facts.pooler, facts.passed_on, facts.prepared) == (None, True, Prepared.USABLE)
        assert len(proxy.links) == 2


async def test_what_is_free_is_counted_for_this_role(mortal: MortalServer) -> None:
    async def capacity(user: str) -> Any:
        return (await examine(mortal.dsn("doctor", user=user))).capacity

    with psycopg.connect(mortal.dsn("another"), autocommit=True):
        of_superuser, of_application = await capacity("postgres"), await capacity("app")
        # Two are there: the admin's session and this one. Another one may be about to end.
        assert of_superuser.used >= 2
        assert of_superuser.used_is_exact
        # Reserved places are for an administrator in need, not for a pool, whoever it connects as.
        assert of_superuser.withheld == 3
        assert of_superuser.free == of_superuser.max_connections - 3 - of_superuser.used
        assert not of_application.used_is_exact
        assert of_application.withheld == of_application.superuser_reserved == 3
        mortal.admin.execute("alter role app connection limit 7")
        try:
            assert (await capacity("app")).free == 7
        finally:
            mortal.admin.execute("alter role app connection limit -1")


async def test_the_line_keeps_idle_connections_from_a_server_that_ends_them(mortal: MortalServer) -> None:
    with mortal.settings(idle_session_timeout="600ms"):
        facts = await examine(mortal.dsn("doctor"))
        assert diagnose(facts).options.keys() == {"max_size", "max_idle", "check_interval"}
        async with pool_of(facts, mortal.dsn("pool")) as pool:
            [pid] = mortal.admin.pids("pool")
            old = "select clock_timestamp() - backend_start > '1.5 s' from pg_stat_activity where pid = %s"
            # Else it is ended meanwhile, and there is no row.
            await eventually(lambda: mortal.admin.value(old, [pid]))
            assert not pool.stats().closes.get(CloseReason.DISCONNECTED)
            assert await pool.fetchval("select pg_backend_pid()") == pid


async def test_settings_of_a_role_are_those_that_the_pool_will_have(mortal: MortalServer) -> None:
    mortal.admin.execute("alter role app set statement_timeout = '1234ms'")
    try:
        assert (await examine(mortal.dsn("doctor", user="app"))).settings["statement_timeout"] == "1234"
    finally:
        mortal.admin.execute("alter role app reset statement_timeout")


async def test_tls_is_told_with_its_protocol_and_cipher(tls_server: EmbeddedServer, tls_admin: Admin) -> None:
    facts = await examine(tls_server.host_dsn(sslmode="require"))
    assert facts.tls.in_use
    assert facts.tls.protocol in ("TLSv1.2", "TLSv1.3")
    assert facts.tls.cipher
    assert facts.tls.sslmode == "require"
    assert not facts.tls.is_verified
    assert not (await examine(tls_server.host_dsn(sslmode="disable"))).tls.in_use


async def test_a_standby_is_told_from_a_primary() -> None:
    with (
        EmbeddedServer(host_authentication="trust") as primary,
        EmbeddedServer(host_authentication="trust", standby_of=primary.dsn()) as standby,
    ):
        assert (await examine(primary.host_dsn())).is_standby is False
        facts = await examine(standby.host_dsn())
        assert facts.is_standby is True
        assert facts.prepared is Prepared.USABLE
        hosts = f"host=127.0.0.1,127.0.0.1 port={primary.port},{standby.port} user=postgres dbname=postgres"
        assert (await examine(f"{hosts} target_session_attrs=standby")).is_standby is True


# --- through a pooler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "prepared", "size"),
    [
        # With one server connection there would be none for a second client: that is another test's subject.
        *((PoolMode.SESSION, Prepared.USABLE, size) for size in (2, 20)),
        *((PoolMode.TRANSACTION, Prepared.LOST, size) for size in (1, 2, 20)),
        *((PoolMode.STATEMENT, Prepared.LOST, size) for size in (1, 2, 20)),
    ],
)
async def test_pgbouncer_is_recognized_with_its_mode(
    server: Server, mode: PoolMode, prepared: Prepared, size: int
) -> None:
    with PgBouncer(server.dsn, mode.value, settings={"default_pool_size": size}) as bouncer:
        facts = await examine(bouncer.dsn())
        assert facts.pooler is not None
        assert (facts.pooler.product, facts.pooler.mode, facts.prepared) == ("PgBouncer", mode, prepared)
        assert facts.unanswered == {}
        async with pool_of(facts, bouncer.dsn()) as pool:
            numbers = await asyncio.gather(*(pool.fetchval("select %s::int", [number]) for number in range(50)))
            assert numbers == list(range(50))
            async with pool.acquire() as conn:
                await conn.execute("select 1")


@asynccontextmanager
async def others_at_work(dsn: str) -> AsyncIterator[None]:
    """Clients that keep the pooler's server connections changing hands."""

    async def work() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
            while True:
                await conn.execute("select pg_sleep(0.001)")

    workers = [asyncio.create_task(work()) for _ in range(6)]
    try:
        yield
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)


@pytest.mark.parametrize(
    ("mode", "round_robin"), [(PoolMode.SESSION, 0), (PoolMode.TRANSACTION, 0), (PoolMode.TRANSACTION, 1)]
)
async def test_the_mode_is_recognized_while_others_are_at_work(
    server: Server, mode: PoolMode, round_robin: int
) -> None:
    settings = {"default_pool_size": 10, "server_round_robin": round_robin}
    with PgBouncer(server.dsn, mode.value, settings=settings) as bouncer:
        async with others_at_work(bouncer.dsn()):
            facts = await examine(bouncer.dsn())
            assert facts.pooler is not None
            assert facts.pooler.mode is mode
            expected = Prepared.USABLE if mode is PoolMode.SESSION else Prepared.LOST
            assert facts.prepared is expected


async def test_its_version_and_settings_are_told_to_a_role_that_may_see_them(server: Server) -> None:
    user = conninfo_to_dict(server.dsn).get("user", "postgres")
    settings: dict[str, str | int] = {"stats_users": str(user), "default_pool_size": 4, "client_idle_timeout": 20}
    with PgBouncer(server.dsn, "transaction", settings=settings) as bouncer:
        facts = await examine(bouncer.dsn())
    assert facts.pooler is not None
    assert facts.pooler.product == "PgBouncer"
    assert facts.pooler.version
    assert facts.pooler.settings.keys() >= {"default_pool_size", "client_idle_timeout", "server_idle_timeout"}
    assert facts.pooler.settings["default_pool_size"] == "4"
    assert diagnose(facts).options == {
        "max_size": 4,
        "prepare_threshold": None,
        "max_idle": 16,
        "check_interval": 6.667,
    }


async def test_of_several_hosts_the_one_that_was_reached_is_examined(server: Server) -> None:
    with PgBouncer(server.dsn, "transaction") as bouncer:
        facts = await examine(bouncer.dsn(host="127.0.0.1,127.0.0.1", port=f"1,{bouncer.port}"))
    assert facts.pooler is not None
    assert (facts.pooler.product, facts.pooler.mode) == ("PgBouncer", PoolMode.TRANSACTION)
    assert f"@127.0.0.1:{bouncer.port}/" in facts.place


async def test_a_pooler_without_a_second_server_connection_is_told_in_bounded_time(server: Server) -> None:
    with PgBouncer(server.dsn, "session", settings={"default_pool_size": 1}) as bouncer:
        facts = await examine(bouncer.dsn(), timeout=0.5)
    assert facts.pooler is not None
    assert (facts.pooler.product, facts.pooler.mode) == ("PgBouncer", None)
    assert "no answer within 0.5 s" in facts.unanswered["pooler"]


async def test_no_more_than_three_connections_are_made_and_all_are_closed(server: Server) -> None:
    with PgBouncer(server.dsn, "transaction") as bouncer, Proxy(bouncer.dsn()) as proxy:
        facts = await examine(proxy.dsn)
        assert facts.pooler is not None
        assert len(proxy.links) == 3
        await eventually(lambda: not any(link.is_open for link in proxy.links))


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("size", [1, 2])
async def test_nothing_stays_prepared_on_the_poolers_server_connections(
    server: Server, admin: Admin, mode: Any, size: int
) -> None:
    with PgBouncer(server.dsn, mode, settings={"default_pool_size": size}) as bouncer:
        await examine(bouncer.dsn())
        listed = "select name from pg_prepared_statements, pg_sleep(0.05) where name like 'asyncpool%%'"
        async with Pool(bouncer.dsn(), max_size=size, prepare_threshold=None, autocommit=True) as pool:
            # As many at a time as there are: each is looked at.
            assert await asyncio.gather(*(pool.fetch(listed) for _ in range(2 * size))) == [[]] * 2 * size
