"""Whether a pooler stands in between, in which mode, and whether prepared statements survive it: by trying.

A pooler does not say that it is there. What gives it away:

- The process id in its login is of its own making, as it is the key by which it is asked to cancel: it is not what
  `pg_backend_pid()` says.
- Two clients that take turns meet the same server process, or one client another one each time: the server connection
  is not theirs, but that of a transaction. With a pooler in session mode each keeps its own.
- BEGIN, which a pooler in statement mode refuses.
- A prepared statement is found where it was prepared only; or it is there under another name, given by a pooler that
  keeps track of them.

Nothing of this changes anything beyond these connections, but that a statement is prepared, which is removed again.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from psycopg import DatabaseError, Error

from asyncpool._io.connect_errors import ConnectFailed
from asyncpool.cli.doctor.asking import Client, connected
from asyncpool.cli.doctor.facts import Pooler, PoolMode, Prepared
from asyncpool.cli.refusals import NoAnswer, words_of

if TYPE_CHECKING:
    from collections.abc import Mapping

# How often two clients take turns. A pooler gives out the server connection that came back last, or goes around: once
# would do, if no others were there.
TURNS = 8

# How long, in seconds, a statement may wait for a server connection while the other client has one in a transaction.
# With a pooler that has no second one it would wait until then.
HELD = 0.5

# Of the pooler's own settings those that matter to a pool before it.
SETTINGS = (
    "client_idle_timeout",
    "default_pool_size",
    "max_client_conn",
    "max_prepared_statements",
    "query_wait_timeout",
    "server_idle_timeout",
)

# What poolers call the statements that they prepare in the client's stead, and their words.
_PREFIXES = {"PGBOUNCER_": "PgBouncer", "PGCAT_": "PgCat", "odyssey": "Odyssey", "supavisor": "Supavisor"}
_WORDS = {
    r"\bodyssey\b": "Odyssey",
    r"\bpgcat\b|no pool configured": "PgCat",
    r"tenant or user not found|supavisor": "Supavisor",
    r"\brds proxy\b": "RDS Proxy",
    r"\bpgpool\b": "Pgpool-II",
    r"pgbouncer|\A(?:fatal: +)?not allowed\Z|no such database|no such user": "PgBouncer",
}
# And where the hosted ones are to be found.
_HOSTS = {
    r"\.pooler\.supabase\.com\Z": "Supavisor",
    r"\.proxy-[a-z0-9-]+\.[a-z0-9-]+\.rds\.amazonaws\.com\Z": "RDS Proxy",
    r"-pooler\..*\bneon\.tech\Z": "PgBouncer",
}

_OWN_PROCESS = "select pg_catalog.pg_backend_pid()"


async def process_of(client: Client) -> str:
    """The server process that answers now."""
    [[process]] = await client.ask(_OWN_PROCESS, "ask for the server's process")
    return str(process)


async def is_between(client: Client) -> bool:
    """Whether what let this client in is not the process that answers it."""
    return await process_of(client) != str(client.pgconn.backend_pid)


async def find_mode(first: Client, second: Client) -> PoolMode:
    """The mode of the pooler behind which two clients are. May end the connection of the second one."""
    met_by_first: set[str] = set()
    met_by_second: set[str] = set()
    for _ in range(TURNS):
        # The first one twice: a pooler that goes around its server connections could keep step with two clients.
        met_by_first |= {await process_of(first), await process_of(first)}
        met_by_second.add(await process_of(second))
        if met_by_first & met_by_second or len(met_by_first) > 1 or len(met_by_second) > 1:
            break
    else:
        return PoolMode.SESSION
    try:
        await second.ask("begin", "begin a transaction")
        await second.ask("commit", "end a transaction")
    except Error:
        return PoolMode.STATEMENT
    return PoolMode.TRANSACTION


async def try_prepared_alone(client: Client) -> Prepared:
    """The same where nobody shares the connection: whether what was prepared is there after its transaction."""
    name = f"asyncpool_doctor_{secrets.token_hex(8)}"
    try:
        await client.prepare(name, _OWN_PROCESS)
        await client.execute_prepared(name)
        await client.ask(f"deallocate {name}", "remove what was prepared")
    except DatabaseError:
        return Prepared.LOST
    return Prepared.USABLE


async def try_prepared(first: Client, second: Client, mode: PoolMode | None) -> tuple[Prepared, str | None]:
    """Whether what the first client has prepared is still there when the second one has its server connection; and the
    pooler's name, if the prepared statement tells it.
    """
    name = f"asyncpool_doctor_{secrets.token_hex(8)}"
    try:
        if mode is PoolMode.STATEMENT:
            await first.prepare(name, _OWN_PROCESS)
            await first.execute_prepared(name)
            await first.ask(f"deallocate {name}", "remove what was prepared")
            return Prepared.LOST, None  # another client may have been there in between
        await first.ask("begin", "begin a transaction")
        await first.prepare(name, _OWN_PROCESS)
        names = await first.ask("select name from pg_catalog.pg_prepared_statements", "list what is prepared")
        [[prepared_at]] = await first.ask(f"{_OWN_PROCESS}; commit", "end a transaction")
    except DatabaseError:
        with suppress(Error):
            await first.ask("rollback", "end a transaction")
        return Prepared.LOST, None
    listed = {str(row[0]) for row in names}
    product = next((product for prefix, product in _PREFIXES.items() if _has_prefix(listed, prefix)), None)
    if mode is None or not mode.is_shared:
        # The first client's own server connection: it ends with it.
        return await _execute(first, name), product
    outcome = await _execute_elsewhere(first, second, name, str(prepared_at))
    if name in listed:
        # Under its own name it is prepared there and nowhere else, even if just that server connection came back.
        await _remove_wherever(first, name)
        return Prepared.LOST, product
    return outcome, product


def _has_prefix(names: set[str], prefix: str) -> bool:
    return any(name.lower().startswith(prefix.lower()) for name in names)


async def _execute(client: Client, name: str) -> Prepared:
    try:
        await client.execute_prepared(name)
    except DatabaseError:
        return Prepared.LOST
    return Prepared.USABLE


async def _execute_elsewhere(first: Client, second: Client, name: str, prepared_at: str) -> Prepared:
    """Execute it while the second client holds the server connection where it was prepared, if it gets hold of it."""
    await second.ask("begin", "begin a transaction")
    await process_of(second)
    execution = asyncio.create_task(first.execute_prepared(name), name="asyncpool doctor: execute what was prepared")
    try:
        await asyncio.wait((execution,), timeout=HELD)
        await _remove(second, name)
        await second.ask("commit", "end a transaction")
        [[executed_at]] = await execution
    except DatabaseError:
        return Prepared.LOST
    finally:
        execution.cancel()
        await asyncio.gather(execution, return_exceptions=True)
    return Prepared.UNKNOWN if executed_at == prepared_at else Prepared.USABLE


async def _remove_wherever(client: Client, name: str) -> None:
    """Where the second client did not get hold of the server connection: on those that this one gets."""
    for _ in range(TURNS):
        await client.ask("begin", "begin a transaction")
        removed = await _remove(client, name)
        await client.ask("commit", "end a transaction")
        if removed:
            return


async def _remove(client: Client, name: str) -> bool:
    """Within a transaction: the server connection lives on, and others get it."""
    listed = f"select 1 from pg_catalog.pg_prepared_statements where name = '{name}'"  # noqa: S608
    if not await client.ask(listed, "list what is prepared"):
        return False
    await client.ask(f"deallocate {name}", "remove what was prepared")
    return True


# --- which pooler it is --------------------------------------------------------------------------------------


def product_of_host(host: str) -> str | None:
    """The pooler that a provider is known to have at such an address."""
    return _first_match(_HOSTS, host)


def product_of_words(words: str) -> str | None:
    """The pooler that speaks so."""
    return _first_match(_WORDS, words)


def _first_match(patterns: Mapping[str, str], text: str) -> str | None:
    return next((product for pattern, product in patterns.items() if re.search(pattern, text, re.IGNORECASE)), None)


async def ask_console(conninfo: str, address: Mapping[str, str], timeout: float) -> tuple[str | None, dict[str, str]]:
    """What PgBouncer's console tells, and others that have one of its kind: product and version, settings.

    Most roles are not allowed to ask; but the refusal tells who it is that refuses.
    """
    try:
        async with connected(conninfo, {**address, "dbname": "pgbouncer"}, timeout) as console:
            [[version]] = await console.ask("show version", "ask for the pooler's version")
            config = await console.ask("show config", "ask for the pooler's settings")
    except ConnectFailed as failed:
        return product_of_words(_without_address(str(failed.error))), {}
    except (Error, NoAnswer, ValueError) as error:
        return product_of_words(words_of(error)), {}
    return version, {str(row[0]): str(row[1]) for row in config if row[0] in SETTINGS}


def _without_address(words: str) -> str:
    # The database that was asked for is called `pgbouncer`: that is no word of the pooler's.
    return words.rpartition("failed: ")[2].strip().replace('"pgbouncer"', "").replace("'pgbouncer'", "")


def make_pooler(version: str | None, settings: Mapping[str, str], product: str | None, mode: PoolMode | None) -> Pooler:
    """What is known of it, from all sources."""
    named = re.match(r"([A-Za-z-]+) ?v?([0-9][\w.]*)", version or "")
    if named is not None:
        return Pooler(product=named[1], version=named[2], mode=mode, settings=settings)
    return Pooler(product=version or product, mode=mode, settings=settings)
