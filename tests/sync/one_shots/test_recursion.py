"""One-shot statements near the recursion limit."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import Any

from kit.threads import in_thread

from asyncpool import SyncPool


def fetch_at_depth(pool: SyncPool[Any], depth: int) -> Any:
    return fetch_at_depth(pool, depth - 1) if depth else pool.fetchval("select 1")


def test_a_statement_near_the_recursion_limit_leaves_the_way_open_for_others(dsn: str) -> None:
    with SyncPool(dsn) as pool:

        def attempt(depth: int) -> None:
            with suppress(RecursionError):
                fetch_at_depth(pool, depth)

        limit = sys.getrecursionlimit()
        for depth in range(limit - 120, limit):
            in_thread(partial(attempt, depth)).result(10)
            assert in_thread(partial(pool.fetchval, "select 2")).result(10) == 2
