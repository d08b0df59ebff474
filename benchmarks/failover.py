"""A primary goes away and its standby is promoted: how soon each pool works again.

    python benchmarks/failover.py [--rounds N] [--seconds S] [--size N] [--only NAME] [--json]

Every round has, for each contender, a new primary and standby. The pool is given both hosts and asks for a server
that takes writes (`target_session_attrs=read-write`); as many clients as connections never stop asking. The primary is
stopped (`immediate`), and S seconds later the standby is promoted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import sys
import time
from collections import defaultdict

import harness
import outage
import psycopg
from harness import Table

from asyncpool.cli.embedded import EmbeddedServer

GIVE_UP_AFTER = 45.0


def promote(standby: EmbeddedServer) -> float:
    """Promote it. Returns when it says that this is done, on the clock of `perf_counter`."""
    with psycopg.connect(standby.dsn(), autocommit=True) as conn:
        conn.execute("select pg_promote()")
    return time.perf_counter()


def change_over(primary: EmbeddedServer, standby: EmbeddedServer, seconds: float) -> float:
    primary.stop("immediate")
    time.sleep(seconds)
    return promote(standby)


async def measure_one(entrant: outage.Entrant, size: int, seconds: float) -> float | None:
    """Seconds from the end of the promotion to the first request that was served; 0 if that was within it."""
    primary = EmbeddedServer(host_authentication="trust")
    await asyncio.to_thread(primary.start)
    standby = EmbeddedServer(host_authentication="trust", standby_of=primary.dsn())
    await asyncio.to_thread(standby.start)
    url = (
        f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/postgres"
        "?target_session_attrs=read-write"
    )
    successes: list[float] = []
    try:
        async with entrant.opened(url, size) as request:

            async def client() -> None:
                while True:
                    try:
                        await request()
                        successes.append(time.perf_counter())
                    except Exception:  # noqa: BLE001 - whatever a pool raises, its client asks again
                        await asyncio.sleep(outage.PAUSE)

            clients = [asyncio.create_task(client()) for _ in range(size)]
            await asyncio.sleep(0.5)
            promoted = await asyncio.to_thread(change_over, primary, standby, seconds)
            while not (after := [moment for moment in successes if moment > promoted - seconds / 2]):
                if time.perf_counter() > promoted + GIVE_UP_AFTER:
                    break
                await asyncio.sleep(outage.LOOK_EVERY)
            for task in clients:
                task.cancel()
            await asyncio.wait(clients, timeout=5)
            return max(0.0, after[0] - promoted) if after else None
    finally:
        await asyncio.to_thread(standby.close)
        await asyncio.to_thread(primary.close)


async def measure(
    entrants: list[outage.Entrant], size: int, seconds: float, rounds: int
) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = defaultdict(list)
    for number in range(1, rounds + 1):
        for entrant in random.sample(entrants, len(entrants)):
            print(f"round {number}: {entrant.name}", file=sys.stderr)
            found[entrant.name].append(await measure_one(entrant, size, seconds))
    return {entrant.name: found[entrant.name] for entrant in entrants}


def main() -> None:
    parser = argparse.ArgumentParser(description="how soon a pool works again after a failover")
    parser.add_argument("--rounds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="without a primary (default: %(default)s)")
    parser.add_argument("--size", type=int, default=4, help="connections of the pool (default: %(default)s)")
    parser.add_argument("--only", action="append", help="this contender; may be given again")
    parser.add_argument("--json", action="store_true", help="print JSON, every round included, and no table")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what the pools say of each failed attempt
    able = harness.installed([one.contender for one in outage.ENTRANTS])
    chosen = [one for one in outage.ENTRANTS if one.contender in able and one.name in (arguments.only or [one.name])]
    found = harness.run(measure(chosen, arguments.size, arguments.seconds, arguments.rounds), "asyncio")
    if arguments.json:
        harness.show_json({"size": arguments.size, "seconds": arguments.seconds, "first_success": found})
        return
    rows = []
    for name, times in found.items():
        reached = [moment * 1e3 for moment in times if moment is not None]
        late = len(times) - len(reached)
        worst = "never" if late else f"{max(reached):,.0f}"
        rows.append([name, f"{statistics.median(reached):,.0f}" if reached else "never", worst])
    print(
        f"ms from the end of the promotion to the first request that is served; never: not within {GIVE_UP_AFTER:g} s"
    )
    harness.show(
        [Table(["", "median", "worst"], rows, f"{arguments.rounds} rounds, {arguments.seconds:g} s without a primary")]
    )


if __name__ == "__main__":
    main()
