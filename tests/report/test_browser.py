"""The report in a real browser: every chart is drawn, no script complains, hostile text runs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_sov.report.page import render
from megatron_sov.report.run_data import read_run

OpenPage = Callable[[Path], tuple[str, list[str]]]


def write(page: str, folder: Path) -> Path:
    (file := folder / "report.html").write_text(page, encoding="utf-8")
    return file


def test_every_chart_is_drawn_and_nothing_complains(runs: list[Path], tmp_path: Path,
                                                    open_page: OpenPage) -> None:
    page = render([read_run(path) for path in runs])
    dom, console = open_page(write(page, tmp_path))
    assert console == []
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    plots = body.split('<div class="plot js-plotly-plot"')[1:]
    assert len(plots) == page.count('<div class="plot"') > 20
    for plot in plots:
        caption = re.search(r"<figcaption>(.*?)</figcaption>", plot, flags=re.DOTALL).group(1)
        assert 'class="main-svg"' in plot, caption
        assert re.search(r'class="(js-line|point|hm)|<image|class="points"', plot), caption
    assert "<img" not in body  # the hostile sample


def test_a_script_that_hostile_text_smuggles_in_is_refused(runs: list[Path], tmp_path: Path,
                                                           open_page: OpenPage) -> None:
    """Even if escaping failed somewhere: the page's policy stops the script and the load,
    and the console says so."""
    page = render([read_run(runs[0])])
    broken = page.replace("</footer>", "<script>document.title = 'hacked'</script><img "
                                       "src='https://evil.example/x.png'></footer>")
    dom, console = open_page(write(broken, tmp_path))
    assert "<title>hacked</title>" not in dom
    assert len([line for line in console if "Content Security Policy" in line]) == 2
