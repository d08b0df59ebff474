"""The demo's outcome: a table to read, or JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpool.cli.rounds import RoundResult

HEADINGS = ("round", "payloads/s", "p50 ms", "p99 ms", "sessions", "refused", "resent")


def table(results: Sequence[RoundResult]) -> str:
    """The rounds side by side, in columns."""
    lines = [HEADINGS, *(_cells(result) for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(result: RoundResult) -> tuple[str, ...]:
    return (
        result.title,
        f"{result.rate:,.0f}",
        f"{1000 * result.latency(0.5):,.1f}",
        f"{1000 * result.latency(0.99):,.1f}",
        f"{result.connected:,}*" if result.sessions is None else f"{result.sessions:,}",
        f"{result.tally.refused:,}",
        f"{result.tally.sent_again:,}",
    )


def footnote(results: Sequence[RoundResult], *, shared_server: bool) -> str | None:
    """What one must know about the sessions column, if anything."""
    if any(result.sessions is None for result in results):
        return "* as this program counts them: the server's track_counts is off"
    if shared_server:
        return "Sessions are all that this database let in meanwhile, anybody else's included."
    return None


def verdicts(results: Sequence[RoundResult]) -> list[str]:
    """For every round whether the table has what was acknowledged."""
    return [
        f"{'ok' if result.nothing_lost else 'WRONG'}: {result.title}: {result.tally.acknowledged:,} of"
        f" {result.tally.expected:,} payloads acknowledged, {result.rows:,} rows in the table"
        for result in results
    ]


def as_json(results: Sequence[RoundResult], **setting: object) -> str:
    """Everything, for programs. Times are in the units that their names say."""
    return json.dumps(
        {
            **setting,
            "rounds": [_round_as_json(result) for result in results],
            "ok": all(result.nothing_lost for result in results),
        },
        indent=2,
    )


def _round_as_json(result: RoundResult) -> dict[str, Any]:
    return {
        "title": result.title,
        "seconds": round(result.seconds, 3),
        "payloads_per_second": round(result.rate, 1),
        "p50_ms": round(1000 * result.latency(0.5), 3),
        "p99_ms": round(1000 * result.latency(0.99), 3),
        "sessions_opened": result.connected if result.sessions is None else result.sessions,
        "sessions_counted_by": "client" if result.sessions is None else "server",
        "refused": result.tally.refused,
        "sent_again": result.tally.sent_again,
        "sessions_terminated": result.terminated,
        "acknowledged": result.tally.acknowledged,
        "rows": result.rows,
    }
