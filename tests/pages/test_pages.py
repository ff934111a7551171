"""A page: complete in itself, its text escaped, its chapters in the contents."""

from __future__ import annotations

import re

import plotly.graph_objects as go

from megatron_sov.pages.charts import chart
from megatron_sov.pages.content import Chapter, Comparison, Panel, Section, Table
from megatron_sov.pages.page import render

HOSTILE = "</script><script>window.hacked = 1</script>"


def test_text_is_escaped_and_only_the_files_own_scripts_are_allowed() -> None:
    drawn = chart(go.Figure(go.Bar(x=[HOSTILE], y=[1])), HOSTILE)
    page = render("Report", HOSTILE, HOSTILE, [Chapter(HOSTILE, HOSTILE, [(HOSTILE,) * 3], [
        Section(HOSTILE, HOSTILE, [drawn], [Table([HOSTILE], [[HOSTILE]])],
                comparisons=[Comparison(HOSTILE, [(HOSTILE, HOSTILE)], HOSTILE)])])], opening=[
            Panel(HOSTILE, 4, [(HOSTILE, HOSTILE)], [Table([HOSTILE], [[HOSTILE]])], [drawn],
                  [Comparison(HOSTILE, [(HOSTILE, HOSTILE)])])],
                  overview=(HOSTILE, Table([HOSTILE], [[HOSTILE]])))
    assert "<script>window" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'") and policy.count("sha256-") == 2


def test_every_section_can_be_reached_and_an_empty_chapter_says_so() -> None:
    page = render("Report", "t", "",
                  [Chapter("a", "", [], [Section("One two", "x")]), Chapter("b", "", [], [])],
                  anchor="it", nothing="Nothing here.", now_s=0)
    assert re.findall(r'href="#([^"]*)"', page) == ["it-1", "it-1-one-two", "it-2"]
    assert all(f'id="{anchor}"' in page for anchor in ("it-1", "it-1-one-two", "it-2"))
    assert page.count("Nothing here.") == 1 and "1970-01-01 00:00 UTC" in page


def test_what_stands_first_comes_before_all_chapters_and_can_be_reached() -> None:
    page = render("Report", "t", "", [Chapter("a", "", [], [])], opening=[
        Panel("In short", 3, facts=[("Parameters", "2 M")]),
        Panel("In words", 9, comparisons=[Comparison("Why?", [("before", "x"), ("after", "y")])])])
    assert re.findall(r'href="#([^"]*)"', page) == ["overview", "part-1"]
    places = [page.index(text)
              for text in ('id="overview"', "In short", "2 M", "In words", "Why?", 'id="part-1"')]
    assert places == sorted(places)
