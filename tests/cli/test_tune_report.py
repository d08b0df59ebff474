"""The picture and the words of `asyncpool tune`, of made-up figures: whatever was measured, it can be shown."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from asyncpool.cli.tune.chart import draw
from asyncpool.cli.tune.knee import Ending, Reading, recommend, sizes_up_to
from asyncpool.cli.tune.report import Report, notes, show
from asyncpool.cli.tune.statement import Statement
from asyncpool.cli.tune.sweep import Plan

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def reading(size: int, rate: float, p99: float) -> Reading:
    return Reading(
        size=size,
        statements=1000,
        rates=(0.97 * rate, rate, 1.02 * rate),
        p50=p99 / 2,
        p99=p99,
        wait_share=0.5,
        processor_share=0.4,
    )


def report(*rates: float, one_shots: float | None = None, query: str = "select 1") -> Report:
    """Of so many sizes, by 64 tasks."""
    readings = [reading(size, rate, 64 / max(rate, 1)) for size, rate in zip(sizes_up_to(1000), rates, strict=False)]
    sizes = tuple(one.size for one in readings)
    return Report(
        server_version="18.0",
        statement=Statement(query, None, commit=False),
        plan=Plan(sizes, tasks=64, seconds=2.0, passes=3, warm_up=0.25, at_most=60.0, one_shots=True),
        readings=readings,
        one_shots=reading(4, one_shots, 0.004) if one_shots else None,
        without_one_shots=None,
        ending=Ending.FLAT,
        recommendation=recommend(readings, Ending.FLAT),
        free=90,
        limit="max_connections 100",
    )


@dataclass
class Drawn:
    """What is written in a picture, panel by panel."""

    figure: Figure

    def texts(self) -> list[str]:
        found: list[str] = []
        for axes in self.figure.axes:
            found += [*(text.get_text() for text in axes.texts), axes.get_title(loc="left"), axes.get_ylabel()]
        return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    found: list[Drawn] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: object, **options: object) -> None:
        found.append(Drawn(figure))
        save(figure, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


CURVE = (900, 1700, 2400, 3000, 3900, 4600, 4700, 4650)


@pytest.mark.parametrize(
    "shape",
    [
        report(*CURVE, one_shots=9000),
        report(*CURVE, one_shots=90000),
        report(*CURVE),
        report(1000, 990, 1005, 1002),
        report(1000),
        report(0.0, 0.0),
        report(0.3, 0.6, 0.9, 0.9, 0.9),
        report(*CURVE, query="select '$x^{' || chr(37), '漢字', 'a\tb'\n" + "from table_of_a_long_name " * 20),
    ],
    ids=["rising", "one-shots out of view", "no one-shots", "flat", "one size", "nothing", "slow", "odd query"],
)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_shape_of_a_curve_can_be_drawn(shape: Report, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    draw(shape, path)
    content = path.read_bytes()
    if suffix == ".svg":
        assert ET.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    else:
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        # What was drawn over the edge would have made it wider.
        assert struct.unpack(">II", content[16:24]) == (1200, 960)
    assert len(content) < 150_000


def test_the_knee_and_the_one_shots_are_named_and_both_panels_marked(tmp_path: Path, drawn: list[Drawn]) -> None:
    shape = report(*CURVE, one_shots=9000, query="select 7")
    draw(shape, tmp_path / "picture.png")
    [picture] = drawn
    texts = picture.texts()
    assert any("max_size = 8" in text for text in texts)
    assert any("the knee: 8\n4,600/s" in text for text in texts)
    assert "one-shots on 4 connections: 9,000/s" in texts
    assert any(text.startswith("select 7\nrolled back, 64 tasks") for text in texts)
    assert {"p50", "p99", "statements per second", "latency, ms"} <= set(texts)
    for axes in picture.figure.axes:
        assert any(list(line.get_xdata()) == [8, 8] for line in axes.lines)  # type: ignore[arg-type]


def test_what_is_not_conclusive_marks_no_knee(tmp_path: Path, drawn: list[Drawn]) -> None:
    shape = report(100, 200, 300)
    draw(replace(shape, recommendation=recommend(shape.readings, Ending.LARGEST_SIZE)), tmp_path / "picture.png")
    [picture] = drawn
    assert not any("knee" in text for text in picture.texts())
    assert any("Not told yet" in text for text in picture.texts())


def test_the_same_figures_give_the_same_svg(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(report(*CURVE, one_shots=9000), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(
    ("took", "waited", "words"),
    [
        (0.97, 0.0, "The client is what limits here, not the pool: this process took 97 % of a processor core. More"),
        (
            0.6,
            0.35,
            "The client is what limits here, not the pool: this process took 60 % of a processor core and",
        ),
        (0.3, 0.65, "This machine is what limits here, not the pool: this process took 30 % of a processor core and"),
    ],
)
def test_what_limits_is_told(took: float, waited: float, words: str) -> None:
    shape = report(1000, 990, 1005, 1002)
    busy = [replace(one, processor_share=took, processor_wait_share=waited) for one in shape.readings]
    told = notes(replace(shape, readings=busy, recommendation=recommend(busy, Ending.FLAT)))
    assert any(note.startswith(words) for note in told)
    assert not any("what limits" in note for note in notes(shape))


@pytest.mark.parametrize(
    ("at_most", "words"),
    [
        (5, "The time was up: give a larger --max-seconds (19 would do for all sizes)"),
        (60, "The 60 s that were planned for were over: statements, or connecting, took longer under load than alone."),
    ],
)
def test_more_time_is_advised_only_where_it_was_short(at_most: float, words: str) -> None:
    found = report(100, 200, 210, 205)
    ended = replace(
        found,
        plan=replace(found.plan, at_most=at_most),
        ending=Ending.TIME_IS_UP,
        recommendation=recommend(found.readings, Ending.TIME_IS_UP),
    )
    assert notes(ended)[0].startswith(words)


def test_the_band_is_explained_in_the_picture(drawn: list[Drawn], tmp_path: Path) -> None:
    draw(report(100, 200, 210, 205), tmp_path / "picture.png")
    assert "the band: from the slowest to the fastest pass" in "\n".join(drawn[0].texts())


def test_latencies_that_were_not_measured_are_gaps(drawn: list[Drawn], tmp_path: Path) -> None:
    found = report(100, 200, 210, 205, one_shots=300)
    unknown = [replace(one, p50=None, p99=None, wait_share=None) for one in found.readings]
    partly = replace(found, readings=[*unknown[:1], *found.readings[1:]])
    none = replace(found, readings=unknown, recommendation=recommend(unknown, Ending.FLAT))
    for shown in (partly, none):
        draw(shown, tmp_path / "picture.png")
        assert any("Latencies were not measured where there is a `-` (1" in note for note in notes(shown))


@pytest.mark.parametrize(("ending", "is_marked"), [(Ending.FLAT, True), (Ending.TIME_IS_UP, False)])
def test_a_size_is_marked_in_the_table_only_if_it_is_recommended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ending: Ending, is_marked: bool
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80", "NO_COLOR": ""}.items():
        monkeypatch.setenv(name, value)
    found = report(100, 200, 205, 203)
    show(replace(found, ending=ending, recommendation=recommend(found.readings, ending)))
    assert ("\x1b[1;32m" in capsys.readouterr().out) is is_marked


def test_a_bar_that_is_cut_off_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show(report(100, 200, 205, 203, one_shots=5000))
    assert "▶ this bar is longer than there is room for" in capsys.readouterr().out
    show(report(100, 200, 205, 203, one_shots=300))
    assert "▶" not in capsys.readouterr().out
