"""Build self-contained HTML pages from chapters, tables and charts."""

import base64
import hashlib
import importlib.resources
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2

from megatron_sov.base.errors import escape_controls
from megatron_sov.base.pages.plots import HeatMap, LinePlot
from megatron_sov.version import __version__

MAX_OPEN_ROWS = 12
"""Rows up to which a foldable table stays open."""
MAX_CARDS = 16
"""Rows up to which a table becomes cards on a phone."""
_NUMBER = r"[-+−]?\$?\d[\d.,]*(e[-+]?\d+)?( ?%| ?[A-Za-zµ°][A-Za-z/]{0,8})?( \d[\d.,]* ?[a-z]{1,3})?"
_FIGURE = re.compile(rf"[≈<>]?\s?{_NUMBER}((/| of | to | → ){_NUMBER})?( \([^()]*\))?")
_FIGURE_OR_NOTHING = re.compile(rf"{_FIGURE.pattern}|[–-]|")


@dataclass(frozen=True)
class Chart:
    """A chart with caption."""

    plot: LinePlot | HeatMap
    caption: str
    """A sentence below the chart."""
    note: str = ""
    """Remark about omitted or changed points; may be empty."""


@dataclass(frozen=True)
class PageTable:
    """A table; cells are text, which is escaped, or `Markup`."""

    head: list[str]
    rows: list[list[str]]
    fold: str = ""
    """Noun for the rows; a long table is folded under the number of rows. "": never folded."""

    @property
    def is_folded(self) -> bool:
        return bool(self.fold) and len(self.rows) > MAX_OPEN_ROWS

    @property
    def figure_columns(self) -> list[bool]:
        """Per column, whether the cells are numbers, aligned right."""
        is_figure = []
        for i in range(len(self.head)):
            cells = [str(row[i]) for row in self.rows if i < len(row)]
            is_figure.append(any(map(_FIGURE.fullmatch, cells))
                             and all(map(_FIGURE_OR_NOTHING.fullmatch, cells)))
        return is_figure

    @property
    def becomes_cards(self) -> bool:
        """Whether each row becomes a card on a phone; longer tables scroll."""
        return len(self.head) > 2 and len(self.rows) <= MAX_CARDS


def build_tables(items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> list[PageTable]:
    """Build a table with a row per item; without items return no table. `items`: events or other items;
    `columns`: heading -> function that returns an item's cell."""
    rows = [[format_cell(item) for format_cell in columns.values()] for item in items]
    return [PageTable(list(columns), rows)] if rows else []


@dataclass(frozen=True)
class Comparison:
    """Texts side by side: several responses to a prompt, or a document before and after a change."""

    prompt: str
    texts: list[tuple[str, str]]
    """(author or time, text), in reading order."""
    label: str = "Prompt"
    """Heading above the prompt."""


@dataclass(frozen=True)
class PageSection:
    """A section in a chapter."""

    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(speaker, text), in order."""
    comparisons: list[Comparison] = field(default_factory=list)
    json: str = ""
    """Details as JSON, folded."""
    side_by_side: bool = False
    """Whether charts stand side by side on wide screens."""


@dataclass(frozen=True)
class Panel:
    """A small box on a page's first screen; on wide screens, panels share a row."""

    title: str
    columns: int
    """Width on a wide screen, in twelfths."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(label, value)."""
    tables: list[PageTable] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    more: list[Comparison] = field(default_factory=list)
    """Comparisons, folded under the number of comparisons."""
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    """(label, value, detail), as large cards."""
    text: str = ""
    share: float = -1.0
    """Progress bar from 0 to 1; negative: no bar."""
    is_wide: bool = False
    """Whether charts are wide: at most two fit side by side."""

    @property
    def is_empty(self) -> bool:
        return not (self.facts or self.tables or self.charts or self.comparisons or self.figures or self.text)


@dataclass(frozen=True)
class Chapter:
    """A page chapter, for example about a run."""

    name: str
    detail: str
    """Small text after the name; may be empty."""
    figures: list[tuple[str, str, str]]
    """(label, value, detail) for the most important numbers."""
    sections: list[PageSection]
    """Sections in reading order; empty: the chapter shows a placeholder."""


def render_page(kicker: str, title: str, subtitle: str, chapters: list[Chapter], *, verdict: str = "",
                opening: Sequence[Panel] = (), overview: tuple[str, PageTable] | None = None,
                anchor: str = "part", nothing: str = "There is nothing to show.",
                now_s: float | None = None) -> str:
    """Render a page as HTML.

    The template escapes text. A content security policy allows only the page's own scripts and forbids
    loading anything, so untrusted text from a model or a corpus stays text even if a template had a defect.

    Args:
        kicker: kind of page, above the title.
        title: heading.
        subtitle: line below the title; may be empty.
        chapters: chapters in order.
        verdict: result in one sentence at the top; may be empty.
        opening: panels at the top, visible without scrolling on a wide screen.
        overview: heading and table before the chapters.
        anchor: prefix of the chapters' anchors.
        nothing: placeholder in a chapter without sections.
        now_s: Unix time shown as the creation time; None: now.
    """
    page_js = _read_resource("page.js")
    return _load_templates().get_template("page.html.j2").render(
        kicker=kicker, title=title, subtitle=subtitle, verdict=verdict, nothing=nothing,
        chapters=[_add_anchors(chapter, f"{anchor}-{i}") for i, chapter in enumerate(chapters, 1)],
        opening=opening, overview=overview, overview_anchor=f"{anchor}s",
        css=_read_resource("colours.css") + _read_resource("page.css"), page_js=page_js,
        script_hashes=_hash_for_csp(page_js),
        version=__version__, written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)))


def render_chat() -> str:
    """Render the server's chat page as HTML.

    Its content security policy allows its own script and style, and requests to its own server. Model output
    is inserted as text.
    """
    css, js = _read_resource("colours.css") + _read_resource("chat.css"), _read_resource("chat.js")
    return _load_templates().get_template("chat.html.j2").render(
        css=css, js=js, style_hash=_hash_for_csp(css), script_hash=_hash_for_csp(js), version=__version__)


@lru_cache(maxsize=1)
def _load_templates() -> jinja2.Environment:
    # StrictUndefined: a misspelt name in a template raises an error instead of leaving a gap
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                              finalize=_escape_value, loader=jinja2.FunctionLoader(_read_resource))


def _escape_value(value: object) -> object:
    """Escape control characters in a template's values, except in our own `Markup`."""
    return value if hasattr(value, "__html__") else escape_controls(str(value))


def _add_anchors(chapter: Chapter, anchor: str) -> dict[str, object]:
    parts = [{"section": s, "anchor": f"{anchor}-{re.sub('[^a-z]+', '-', s.title.lower())}"}
             for s in chapter.sections]
    return {"name": chapter.name, "detail": chapter.detail, "anchor": anchor, "figures": chapter.figures,
            "parts": parts}


def _read_resource(name: str) -> str:
    return importlib.resources.files("megatron_sov.base.pages").joinpath("templates", name).read_text(
        encoding="utf-8")


def _hash_for_csp(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
