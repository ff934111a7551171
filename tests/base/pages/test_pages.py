"""HTML pages: self-contained files, escaped text, contents."""

import re

import pytest

from megatron_sov.base.pages.page import (
    MAX_CARDS, Chapter, Chart, Comparison, PageSection, PageTable, Panel, render_page)
from megatron_sov.base.pages.plots import Axis, LinePlot, Series

HOSTILE = "</script><script>window.hacked = 1</script>"


def test_page_escapes_text_and_allows_own_scripts_only() -> None:
    drawn = Chart(LinePlot([Series(HOSTILE, [1.0], [1.0], HOSTILE)], Axis(HOSTILE)), HOSTILE, HOSTILE)
    page = render_page("Report", HOSTILE, HOSTILE, [Chapter(HOSTILE, HOSTILE, [(HOSTILE,) * 3], [
        PageSection(HOSTILE, HOSTILE, [drawn], [PageTable([HOSTILE], [[HOSTILE]])],
                    comparisons=[Comparison(HOSTILE, [(HOSTILE, HOSTILE)], HOSTILE)])])], opening=[
                Panel(HOSTILE, 4, [(HOSTILE, HOSTILE)], [PageTable([HOSTILE], [[HOSTILE]])], [drawn],
                      [Comparison(HOSTILE, [(HOSTILE, HOSTILE)])])],
                       overview=(HOSTILE, PageTable([HOSTILE], [[HOSTILE]])))
    assert "<script>window" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'") and policy.count("sha256-") == 1


@pytest.mark.each(("cells", "is_figure"), [
    (["1", "2,048", "–"], True), (["12.5 %", "0.4 %", "100 %"], True), (["1.2 GiB", "–"], True),
    (["12 min 5 s", "3 d 4 h"], True), (["$4.21 M", "$12"], True), (["-0.05 %", "+1.24 %", "−3"], True),
    (["2 of 3", "1 to 250", "0.5 (0.4 to 0.6)"], True), (["1.2e-05 (document 3)"], True),
    (["0.5 → 0.7"], True), (["8.19 B (1.2 B active)", ""], True), (["500 tokens/s"], True),
    (["english", "code"], False), (["1", "complete"], False), (["–", ""], False),
    (["3 wishes and a lamp"], False), (["2.A", "step 3"], False), (["v1.2"], False)])
def test_number_columns_are_aligned_right(cells: list[str], is_figure: bool) -> None:
    table = PageTable(["name", "x"], [["a", cell] for cell in cells])
    assert table.figure_columns == [False, is_figure]
    page = render_page("Report", "t", "", [Chapter("a", "", [], [PageSection("One", tables=[table])])])
    assert page.count('<td class="num">') == len(cells) * is_figure


def test_table_rows_become_cards_with_labels() -> None:
    table = PageTable(["stage", "before", "<b>"], [["sft", "1", HOSTILE]])
    page = render_page("Report", "t", "", [], verdict="3 of 3 checks passed.", opening=[
        Panel("What", 12, tables=[table, PageTable(["a", "b"], [["1", "2"]]),
                                  PageTable(["a", "b", "c"], [["1", "2", "3"]] * (MAX_CARDS + 1))])])
    assert re.findall(r'data-head="([^"]*)"', page) == ["before", "&lt;b&gt;"]
    assert page.index("3 of 3 checks passed.") < page.index('id="overview"')


def test_control_characters_are_escaped() -> None:
    text = "\0\x1b[2J\u202e\ud800"
    page = render_page("Report", text, text, [Chapter(text, text, [(text,) * 3], [
        PageSection(text, text, tables=[PageTable([text], [[text]])],
                    comparisons=[Comparison(text, [(text, text)])])])],
                       opening=[Panel(text, 4, [(text, text)])])
    assert not set("\0\x1b\u202e\ud800") & set(page) and page.encode()
    assert r"\x00\x1b[2J\u202e\ud800" in page


def test_contents_link_sections_and_mark_empty_chapters() -> None:
    page = render_page("Report", "t", "",
                       [Chapter("a", "", [], [PageSection("One two", "x")]), Chapter("b", "", [], [])],
                       anchor="it", nothing="Nothing here.", now_s=0)
    assert re.findall(r'href="#([^"]*)"', page) == ["it-1", "it-1-one-two", "it-2"]
    assert all(f'id="{anchor}"' in page for anchor in ("it-1", "it-1-one-two", "it-2"))
    assert page.count("Nothing here.") == 1 and "1970-01-01 00:00 UTC" in page


def test_opening_precedes_chapters() -> None:
    page = render_page("Report", "t", "", [Chapter("a", "", [], [])], opening=[
        Panel("In short", 3, facts=[("Parameters", "2 M")]),
        Panel("In words", 9, comparisons=[Comparison("Why?", [("before", "x"), ("after", "y")])])])
    assert re.findall(r'href="#([^"]*)"', page) == ["overview", "part-1"]
    places = [page.index(text)
              for text in ('id="overview"', "In short", "2 M", "In words", "Why?", 'id="part-1"')]
    assert places == sorted(places)
