"""A pool as `asyncpool top` shows it: as wide and as high as the terminal is."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from asyncpool.cli.top.feed import Look, Snapshot
    from asyncpool.events import Holder
    from asyncpool.histogram import Histogram

# From this width on there is room for both, what is now and what was since the beginning.
WIDE = 80
# From this length of a bar on it can tell anything.
LONGEST_BAR = 60
# Lines of a message at most.
LONGEST_MESSAGE = 4

# The states in the bar's order: their words, colours and characters, which are told apart without colours too.
_STATES = (
    ("leased", "in use", "yellow", "█", "#"),
    ("recycling", "being cleaned", "magenta", "▓", "%"),
    ("checking", "being checked", "blue", "▓", "%"),
    ("closing", "closing", "red", "▒", "-"),
    ("connecting", "connecting", "cyan", "▒", "+"),
    ("idle", "idle", "green", "░", "="),
)
_FREE, _FREE_IN_ASCII = "·", "."

_IN = {"in a transaction": "transaction", "in a failed transaction": "failed"}

_HISTOGRAMS = (("wait", "acquires"), ("hold", None), ("connect", "connects"))
_COUNTS = (
    ("one-shots", "one_shots"),
    ("timeouts", "timeouts"),
    ("cancelled", "cancelled"),
    ("connect errors", "connect_errors"),
)
# Their widths: what is counted, three columns of the last second, and those of all.
_WIDE_COLUMNS = (14, 8, 9, 9, 13, 9, 9, 9)
_NARROW_COLUMNS = (14, 7, 9, 9, 11)
_BAD = {"timeouts", "connect_errors"}


class PoolView:
    """Rendered, a pool in so many columns, and so many lines if `height` is given.

    `trouble` says what is wrong if these are no news.
    """

    def __init__(self, look: Look, *, height: int | None = None, trouble: str | None = None) -> None:
        self._look = look
        self._height = height
        self._trouble = trouble

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich asks for."""
        yield self._group(options.max_width, in_ascii=options.ascii_only)

    def _group(self, width: int, *, in_ascii: bool) -> Group:
        """The parts, one below the other."""
        now = self._look.now
        head: list[RenderableType] = [_title(now, width)]
        lines = 6 + (width >= WIDE) + len(_HISTOGRAMS) + len(_COUNTS)
        if self._trouble is not None:
            head += (trouble := _wrapped(self._trouble, width, "bold red"))
            lines += len(trouble)
        head += [_bar(now, width, in_ascii=in_ascii), _sizes(now), _queue(now), Text(), _figures(self._look, width)]
        if now.connect_error is not None:
            text, age = now.connect_error
            error = _wrapped(f"last connect error, {duration(age)} ago: {text}", width, "red")
            head += [Text(), *error]
            lines += 1 + len(error)
        return Group(*head, *_holders(now, width, None if self._height is None else self._height - lines))


def _title(now: Snapshot, width: int) -> Text:
    sizes = f"{now.sizes['min']} to {now.sizes['max']} connections"
    state = f"{now.phase} for {duration(now.open_for)}" if now.phase == "open" else now.phase
    title = Text(now.pool, style="bold").append(f"  {sizes}, {state}, process {now.pid}", style="not bold")
    title.truncate(width, overflow="ellipsis")
    return title


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    """As many lines as a message is worth."""
    lines = [Text(line, style=style) for line in textwrap.wrap(text, width)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")  # of characters that are two columns wide
    return lines[:LONGEST_MESSAGE]


def _bar(now: Snapshot, width: int, *, in_ascii: bool) -> Text:
    """All places of the pool, each as many characters as there is room for."""
    places = max(now.sizes["max"], now.sizes["all"], 1)
    length = min(width, LONGEST_BAR)
    bar, drawn, counted = Text(no_wrap=True), 0, 0
    for state, _, style, character, ascii_character in _STATES:
        counted += now.sizes[state]
        # A few of many are one character at least: that they are there is what counts.
        end = max(round(counted * length / places), drawn + (now.sizes[state] > 0))
        bar.append((ascii_character if in_ascii else character) * (end - drawn), style=style)
        drawn = end
    bar.append((_FREE_IN_ASCII if in_ascii else _FREE) * (length - drawn), style="dim")
    bar.truncate(width)
    return bar


def _sizes(now: Snapshot) -> Text:
    sizes = Text(no_wrap=True, overflow="ellipsis")
    for state, words, style, _, _ in _STATES:
        if now.sizes[state] or state in ("leased", "idle"):
            sizes.append(", " if sizes else "").append(f"{now.sizes[state]} {words}", style=style)
    return sizes.append(f", of {now.sizes['max']}")


def _queue(now: Snapshot) -> Text:
    return Text(f"{now.waiting:,} waiting", style="bold yellow" if now.waiting else "")


def _figures(look: Look, width: int) -> Text:
    """The last second beside all since the beginning; in a narrow terminal of that only the totals."""
    wide = width >= WIDE
    widths = _WIDE_COLUMNS if wide else _NARROW_COLUMNS
    last, over_all = sum(widths[1:4]), sum(widths[4:])
    figures = Text(no_wrap=True)
    if wide:
        words = f"{'':{widths[0]}}{'last second':>{last}}{'since it was opened':>{over_all}}\n"
        figures.append(words, style="dim")
    headings = ("", "per s", "p50", "p99", "total", "p50", "p99", "max")
    figures.append(_row(headings, widths), style="dim")
    for which, total in _HISTOGRAMS:
        histogram: Histogram = getattr(look.now, which)
        rate = _rate_of(look, which) if total is None else look.rate(total)
        count = histogram.count if total is None else look.now.totals[total]
        longest = duration(histogram.max) if histogram.count else "-"
        cells = (which, _rate(rate), *_quantiles(look.since(which)), f"{count:,}", *_quantiles(histogram), longest)
        figures.append("\n" + _row(cells, widths))
    for words, total in _COUNTS:
        count, rate = look.now.totals[total], look.rate(total)
        style = "bold red" if total in _BAD and rate else ""
        figures.append("\n" + _row((words, _rate(rate), "", "", f"{count:,}"), widths), style=style)
    return figures


def _row(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    """The first to the left, the others to the right; no more of them than there are columns."""
    first, *others = zip(cells, widths, strict=False)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)


def _rate_of(look: Look, which: str) -> float | None:
    since = look.since(which)
    if since is None or look.before is None:
        return None
    return since.count / (look.now.open_for - look.before.open_for)


def _rate(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"


def _quantiles(histogram: Histogram | None) -> tuple[str, str]:
    if histogram is None or not histogram.count:
        return "-", "-"
    return duration(histogram.p50), duration(histogram.p99)


def _holders(now: Snapshot, width: int, room: int | None) -> list[RenderableType]:
    """Those who hold connections, the longest first; as many as there is room for."""
    if not now.holders:
        return []
    # A blank line, the headings, and perhaps the line that says how many more there are.
    shown = now.holders if room is None else now.holders[: max(0, room - 2)]
    more = now.sizes["leased"] - len(shown)
    if room is not None and more > 0:
        shown = shown[: max(0, room - 3)]
        more = now.sizes["leased"] - len(shown)
    if not shown:
        return []
    parts: list[RenderableType] = [Text(), _holders_table(shown, width)]
    if more > 0:
        parts.append(Text(f"and {more:,} more", style="dim"))
    return parts


def _holders_table(holders: list[Holder], width: int) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=False)
    wide = width >= WIDE
    columns = [("held for", 8), ("in", 11), ("session", 7), ("by", 18)] if wide else [("held for", 8)]
    for heading, least in columns:
        right = heading in ("held for", "session")
        table.add_column(justify="right" if right else "left", no_wrap=True, width=least, overflow="ellipsis")
    left = width - sum(least + 1 for _, least in columns)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row(*(Text(heading, style="dim") for heading, _ in columns), Text("acquired at", style="dim"))
    for holder in holders:
        state = _IN.get(holder.transaction, holder.transaction)
        cells = [Text(duration(holder.held_for))]
        if wide:
            style = "red" if state == "failed" else ""
            cells += [Text(state, style=style), Text(str(holder.backend_pid)), Text(_name(holder.owner))]
        table.add_row(*cells, Text(shortened(holder.site, left)))
    return table


def _name(owner: str) -> str:
    """Without the word for what it is: the column is narrow, and the name tells."""
    return owner.removeprefix("task ").removeprefix("thread ").strip("'\"")


def shortened(site: str, length: int) -> str:
    """In so many characters: without its directories if need be, as the file and the line are what counts."""
    if len(site) <= length:
        return site
    path, separator, where = site.partition(" in ")
    name = path.replace("\\", "/").rpartition("/")[2] + separator + where
    return name if len(name) <= length else name[: max(0, length - 1)] + "…"


def duration(seconds: float) -> str:
    """In three digits or so, and in eight characters at most."""
    if seconds <= 0.0001:
        return "<0.1 ms"
    for unit, size, until in (("ms", 0.001, 1.0), ("s", 1.0, 60.0), ("min", 60.0, 3600.0), ("h", 3600.0, 86400.0)):
        if seconds < until:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
