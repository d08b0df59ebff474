"""The picture of `asyncpool tune`: the rate and the latencies over the size, the knee marked."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from asyncpool.cli.extras import MissingExtra
from asyncpool.cli.knee import milliseconds, rate_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from asyncpool.cli.tune_report import Report

# Told apart by those who see no red or green, too.
BLUE, ORANGE, GREEN, GREY, INK = "#1f6fb4", "#d95f02", "#1b8a5a", "#9aa0a6", "#2b2f33"

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
QUERY_LENGTH = 88

# One-shots beyond this many times the best rate of a lease would press that curve flat.
HIGHEST_IN_VIEW = 2.5


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

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        rates, latencies = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_rates(rates, report)
        _draw_latencies(latencies, report)
        _draw_sizes(latencies, report)
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=15, fontweight="bold")
        rates.set_title(_subtitle(report), loc="left", fontsize=9.5, color="#5f6368", pad=10, parse_math=False)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=metadata)


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
    return f"{query}\n{how}, {report.plan.tasks} tasks without a pause, PostgreSQL {report.server_version}"


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
    axes.plot(sizes, rates, color=BLUE, marker="o", markersize=6, linewidth=2.2, label="a lease for each")
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
    connections = f"{report.one_shots.size} connection" + ("" if report.one_shots.size == 1 else "s")
    label = f"one-shots, {connections}: {rate_of(report.one_shots)}"
    if rate <= top * HIGHEST_IN_VIEW:
        axes.axhline(rate, color=GREEN, linewidth=2, linestyle=(0, (5, 3)))
        place, above = rate, True
        axes.annotate(
            label,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 5 if above else -5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=GREEN,
            fontweight="bold",
        )
        return max(top, rate)
    axes.annotate(
        f"{label}  ↑",
        (1, 1),
        xycoords="axes fraction",
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=GREEN,
        fontweight="bold",
    )
    return top * 1.1


def _mark_knee(axes: Axes, report: Report) -> None:
    knee = next((r for r in report.readings if r.size == report.recommendation.max_size), None)
    if knee is None or not report.recommendation.conclusive:
        return
    axes.plot([knee.size], [knee.rate], "o", markersize=14, markerfacecolor="none", markeredgecolor=ORANGE, mew=2.4)
    # Below the curve there is always room: it rises to the knee, and stays up there behind it.
    axes.annotate(
        f"the knee: {knee.size}\n{rate_of(knee)}, p99 {milliseconds(knee.p99)} ms",
        (knee.size, knee.rate),
        xytext=(22, -62),
        textcoords="offset points",
        color=ORANGE,
        fontweight="bold",
        arrowprops={"arrowstyle": "-", "color": ORANGE, "linewidth": 1.4, "shrinkB": 8},
    )


def _draw_latencies(axes: Axes, report: Report) -> None:
    sizes = [reading.size for reading in report.readings]
    for name, color, values in (
        ("p99", INK, [1000 * reading.p99 for reading in report.readings]),
        ("p50", GREY, [1000 * reading.p50 for reading in report.readings]),
    ):
        axes.plot(sizes, values, color=color, marker="o", markersize=4.5, linewidth=1.8, label=name)
        axes.annotate(
            name,
            (sizes[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
    axes.set_ylabel("milliseconds, waiting included")


def _draw_sizes(axes: Axes, report: Report) -> None:
    sizes = [reading.size for reading in report.readings]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off() if len(sizes) > 1 else None
    axes.set_xlabel("size of the pool")
