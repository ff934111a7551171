"""The report in a real browser: all charts are drawn, no script fails, and hostile text is not executed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.publish.report.page import render_report
from megatron_sov.publish.report.run_data import read_run

OpenPage = Callable[[Path], tuple[str, list[str]]]
Screen = tuple[str, int, int]
MeasurePage = Callable[[Path, tuple[Screen, ...]], dict[tuple[str, int], dict[str, Any]]]
PHONE, TABLET, NOTEBOOK = ("dark", 390, 844), ("light", 820, 1180), ("light", 1440, 900)
"""Colour scheme, width and height in pixels of three screens, as `measure_page` takes them."""
FIRST_SCREEN = ["Held-out quality", "What it writes"]
BELOW = ["Gain of each stage", "Verdicts"]
"""Titles of the opening panels, on the first screen and below it."""


def write_page(page: str, folder: Path) -> Path:
    (file := folder / "report.html").write_text(page, encoding="utf-8")
    return file


def test_every_chart_is_drawn_without_errors(runs: list[Path], tmp_path: Path, open_page: OpenPage) -> None:
    """The run has every kind of chart. The layout test has several runs on one page."""
    page = render_report([read_run(runs[1])])
    dom, console = open_page(write_page(page, tmp_path))
    assert console == []
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    plots = body.split('<div class="drawing"')[1:]
    assert len(plots) > 10
    for plot in plots:
        caption = re.search(r"<figcaption>(.*?)</figcaption>", plot, flags=re.DOTALL).group(1)
        assert re.search(r'<path (class="(stroke|dots)|d=)', plot.partition("</svg>")[0]), caption
    assert "<img" not in body  # the hostile sample


def test_a_script_that_hostile_text_smuggles_in_is_refused(toy: Path, tmp_path: Path,
                                                           open_page: OpenPage) -> None:
    """If escaping failed, the page's content security policy would block the script and the picture."""
    page = render_report([read_run(toy)])
    broken = page.replace("</footer>", "<script>document.title = 'hacked'</script><img "
                                       "src='https://evil.example/x.png'></footer>")
    dom, console = open_page(write_page(broken, tmp_path))
    assert "<title>hacked</title>" not in dom
    assert len([line for line in console if "Content Security Policy" in line]) == 2


@pytest.mark.parametrize("screens", [
    (PHONE, NOTEBOOK), pytest.param((PHONE, TABLET, NOTEBOOK), marks=pytest.mark.deep)])
def test_the_layout_holds_on_every_screen_in_light_and_dark(runs: list[Path], toy: Path, tmp_path: Path,
                                                            measure_page: MeasurePage,
                                                            screens: tuple[Screen, ...]) -> None:
    """Compares measures of the layout, as screenshots differ between versions of a font."""
    first, second, other = (read_run(path) for path in (*runs, toy))
    # The second run has every kind of chart. Fewer charts of the first save time: each is drawn six times.
    first.curves = {group: {name: curve for name, curve in curves.items() if name in ("loss", "tokens")}
                    for group, curves in first.curves.items()}
    layouts = measure_page(write_page(render_report([first, second, other]), tmp_path), screens)
    assert sorted(layouts) == [(scheme, width) for scheme, width, _ in screens]
    for (scheme, width), layout in layouts.items():
        assert layout["dark"] == (scheme == "dark")
        assert layout["paper"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 22, 29)"}[scheme]
        assert layout["scroll_width"] <= width  # wide tables scroll in their frames, the page never does
        assert layout["num_charts"] > 10 and layout["collisions"] == []
        assert list(layout["panels"]) == FIRST_SCREEN + BELOW
        contents_px = layout["contents"]["bottom"] - layout["contents"]["top"]
        if width == 1440:
            assert max(layout["panels"][name]["bottom"] for name in FIRST_SCREEN) <= layout["height"]
            assert contents_px > 250  # expanded, next to the text
        else:
            assert contents_px < 60  # folded
            assert layout["panels"]["Held-out quality"]["bottom"] <= layout["height"]
