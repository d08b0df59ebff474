"""The picture of `asyncpool tune`: the rate and the latencies over the size, the knee marked."""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import TYPE_CHECKING, Any

from asyncpool.cli.extras import MissingExtra
from asyncpool.cli.tune.knee import milliseconds, rate_of
from asyncpool.cli.tune.report import HIGHEST_IN_VIEW
from asyncpool.cli.words import count_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from asyncpool.cli.tune.knee import Reading
    from asyncpool.cli.tune.report import Report

# Told apart by those who see no red or green, too.
BLUE, ORANGE, GREEN, GREY, INK = "#1f6fb4", "#d95f02", "#1b8a5a", "#9aa0a6", "#2b2f33"
MUTED = "#5f6368"

# matplotlib's names, which its types spell out one by one.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ea",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    # The ids in an SVG, so that the same figures give the same file.
    "svg.hashsalt": "asyncpool",
}
DOTS_PER_INCH = 150
INCHES = (8.0, 6.4)
MARGINS: Any = {"w_pad": 0.14, "h_pad": 0.14}
QUERY_LENGTH = 88

DASHES = (0, (5, 3))


def check_can_draw() -> None:
    """Raises MissingExtra if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "plot")


def draw(report: Report, path: Path) -> None:
    """Write the picture, as SVG or PNG by the name of the file. Raises OSError."""
    # Not pyplot, which would keep the figure, and look for a screen.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A character of the query that the font does not have becomes a box.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, facecolor="white", layout=ConstrainedLayoutEngine(**MARGINS))
        FigureCanvasAgg(figure)
        rates, latencies = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_rates(rates, report)
        _draw_latencies(latencies, report)
        _draw_sizes(latencies, report)
        if knee := _knee(report):
            for axes in (rates, latencies):
                axes.axvline(knee.size, color=ORANGE, linewidth=1.4, linestyle=":", zorder=1)
        _draw_heading(rates, report)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=metadata)


def _draw_heading(axes: Axes, report: Report) -> None:
    axes.set_title(_subtitle(report), loc="left", fontsize=9.5, color=MUTED, pad=10, parse_math=False)
    axes.annotate(
        _title(report),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 44),
        textcoords="offset points",
        fontsize=15,
        fontweight="bold",
    )


def _title(report: Report) -> str:
    recommendation = report.recommendation
    if recommendation.conclusive:
        return f"How large should the pool be?  max_size = {recommendation.max_size}"
    return "How large should the pool be?  Not told yet"


def _subtitle(report: Report) -> str:
    query = " ".join(report.statement.query.split())
    if len(query) > QUERY_LENGTH:
        query = query[: QUERY_LENGTH - 1] + "…"
    how = "committed" if report.statement.commit else "rolled back"
    return (
        f"{query}\n{how}, {report.plan.tasks} tasks without a pause, PostgreSQL {report.server_version};"
        " the band: from the slowest to the fastest pass"
    )


def _draw_rates(axes: Axes, report: Report) -> None:
    sizes = [reading.size for reading in report.readings]
    rates = [reading.rate for reading in report.readings]
    axes.fill_between(
        sizes,
        [min(reading.rates) for reading in report.readings],
        [max(reading.rates) for reading in report.readings],
        color=BLUE,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(sizes, rates, color=BLUE, marker="o", markersize=6, linewidth=2.2)
    axes.set_ylabel("statements per second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:g}")
    top = max([max(reading.rates) for reading in report.readings])
    if report.one_shots:
        top = _draw_one_shots(axes, report, top)
    axes.set_ylim(0, top * 1.12 or 1)
    _mark_knee(axes, report)


def _draw_one_shots(axes: Axes, report: Report, top: float) -> float:
    """A line across, as they have no size of their own. Returns how high the picture has to be."""
    assert report.one_shots
    rate = report.one_shots.rate
    label = f"one-shots on {count_of(report.one_shots.size, 'connection')}: {rate_of(report.one_shots)}"
    in_view = rate <= top * HIGHEST_IN_VIEW
    # On the left, where the curve begins low; but on the right, below it, if the line is as low.
    first_half = report.readings[: (len(report.readings) + 1) // 2]
    is_low = rate < 1.1 * max(max(reading.rates) for reading in first_half)
    if in_view:
        axes.axhline(rate, color=GREEN, linewidth=2, linestyle=DASHES)
    axes.annotate(
        label if in_view else f"{label} \N{UPWARDS ARROW}",
        (1 if is_low else 0, rate if in_view else 1),
        xycoords=("axes fraction", "data" if in_view else "axes fraction"),
        xytext=(-6 if is_low else 6, 5 if in_view else -4),
        textcoords="offset points",
        ha="right" if is_low else "left",
        va="bottom" if in_view else "top",
        color=GREEN,
        fontweight="bold",
    )
    return max(top, rate) if in_view else top * 1.15


def _mark_knee(axes: Axes, report: Report) -> None:
    knee = _knee(report)
    if knee is None:
        return
    axes.plot([knee.size], [knee.rate], "o", markersize=14, markerfacecolor="none", markeredgecolor=ORANGE, mew=2.4)
    # On the right, below the curve, which stays up there behind the knee; but not over the edge.
    is_on_the_left = math.log(knee.size) <= 0.8 * math.log(report.readings[-1].size)
    axes.annotate(
        f"the knee: {knee.size}\n{rate_of(knee)}\np99 {milliseconds(knee.p99)} ms",
        (knee.size, 0),
        xytext=(8 if is_on_the_left else -8, 10),
        textcoords="offset points",
        ha="left" if is_on_the_left else "right",
        va="bottom",
        color=ORANGE,
        fontweight="bold",
        linespacing=1.4,
    )


def _knee(report: Report) -> Reading | None:
    if not report.recommendation.conclusive:
        return None
    return next(reading for reading in report.readings if reading.size == report.recommendation.max_size)


def _draw_latencies(axes: Axes, report: Report) -> None:
    sizes = [reading.size for reading in report.readings]
    slow = [_in_ms(reading.p99) for reading in report.readings]
    typical = [_in_ms(reading.p50) for reading in report.readings]
    # Names that would touch each other move apart.
    are_close = slow[-1] - typical[-1] < max(slow) / 8
    for name, color, values, away in (("p99", INK, slow, "bottom"), ("p50", GREY, typical, "top")):
        axes.plot(sizes, values, color=color, marker="o", markersize=5, linewidth=1.8)
        # What was not measured is a gap in the curve.
        if not math.isnan(values[-1]):
            _name_at_the_end(axes, name, values[-1], color, away if are_close else "center")
    if report.one_shots and report.one_shots.p99 is not None:
        p99 = 1000 * report.one_shots.p99
        axes.axhline(p99, color=GREEN, linewidth=1.4, linestyle=DASHES, label="one-shots, p99")
        axes.legend(loc="best", frameon=False, fontsize=9.5, labelcolor=GREEN)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("latency, ms")


def _in_ms(seconds: float | None) -> float:
    return math.nan if seconds is None else 1000 * seconds


def _name_at_the_end(axes: Axes, name: str, value: float, color: str, alignment: str) -> None:
    axes.annotate(
        name,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va=alignment,
        color=color,
        fontweight="bold",
        annotation_clip=False,
    )


def _draw_sizes(axes: Axes, report: Report) -> None:
    sizes = [reading.size for reading in report.readings]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size of the pool, connections")
