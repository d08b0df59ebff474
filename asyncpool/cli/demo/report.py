"""The demo's outcome: a table to read, or JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpool import PoolStats
    from asyncpool.cli.demo.rounds import RoundResult
    from asyncpool.histogram import Histogram

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


def queues(results: Sequence[RoundResult], *, in_ascii: bool = False) -> str:
    """How long the pools' connections were waited for and held. One-shot statements do neither."""
    lines = [QUEUE_HEADING]
    for result in results:
        if result.stats is not None and result.stats.acquires:
            queue = f"  {result.longest_queue:,} in line at most"
            lines += queue_lines(result.title, queue, result.stats, in_ascii=in_ascii)
    return "\n".join(lines)


def queue_lines(title: str, queue: str, stats: PoolStats, *, in_ascii: bool) -> list[str]:
    """Two lines of 80 characters at most: what was waited, and what was held."""
    return [
        _queue_line(label, which, _in_milliseconds(histogram), spark(histogram, in_ascii=in_ascii))
        for label, which, histogram in ((title, "wait", stats.wait), (queue, "hold", stats.hold))
    ]


def _queue_line(label: str, which: str, cells: Sequence[str], drawn: str) -> str:
    return f"{label:<24}{which:<4}{''.join(f'{cell:>9}' for cell in cells)}  {drawn}".rstrip()


def _in_milliseconds(histogram: Histogram) -> list[str]:
    return [f"{1000 * each:,.1f}" for each in (histogram.p50, histogram.p90, histogram.p99, histogram.max)]


QUEUE_HEADING = _queue_line("callers of the pools", "", ("p50 ms", "p90 ms", "p99 ms", "max ms"), "short to long")
SPARK_LENGTH = 13


def spark(histogram: Histogram, *, in_ascii: bool = False) -> str:
    """The shape of a histogram, from the shortest duration that there was to the longest, on a logarithmic axis."""
    used = [bucket for bucket, count in enumerate(histogram.counts) if count]
    if not used:
        return ""
    levels = ".:-=+*#@" if in_ascii else "▁▂▃▄▅▆▇█"
    first, buckets = used[0], used[-1] - used[0] + 1
    length = min(buckets, SPARK_LENGTH)
    heights = [0] * length
    for bucket in used:
        heights[(bucket - first) * length // buckets] += histogram.counts[bucket]
    # One of a thousand is to be seen: what is there at all has a height.
    return "".join(levels[-(-height * (len(levels) - 1) // max(heights))] for height in heights)


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
        "longest_queue": result.longest_queue if result.stats is not None else None,
        "wait_ms": _histogram_as_json(result.stats.wait) if result.stats is not None else None,
        "hold_ms": _histogram_as_json(result.stats.hold) if result.stats is not None else None,
    }


def _histogram_as_json(histogram: Histogram) -> dict[str, float]:
    return {
        "count": histogram.count,
        **{name: round(1000 * getattr(histogram, name), 3) for name in ("p50", "p90", "p99", "max")},
    }
