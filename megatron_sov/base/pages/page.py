"""Pages that are complete in themselves: charts, tables, chapters as data, and what writes them as HTML."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import visible
from megatron_sov.base.pages.plots import HeatMap, LinePlot
from megatron_sov.version import __version__

if TYPE_CHECKING:
    import jinja2

@dataclass(frozen=True)
class Chart:
    """A chart with its caption."""

    plot: LinePlot | HeatMap
    caption: str
    """One sentence below the chart."""
    note: str = ""
    """Points or bars that are left out or changed for drawing; may be empty."""


# What a page holds: chapters of sections of text, charts and tables.

MAX_OPEN_ROWS = 12
"""Of a table that may be folded."""
MAX_CARDS = 16
"""Rows of a table that becomes cards on a phone."""
_NUMBER = r"[-+−]?\$?\d[\d.,]*(e[-+]?\d+)?( ?%| ?[A-Za-zµ°][A-Za-z/]{0,8})?( \d[\d.,]* ?[a-z]{1,3})?"
_FIGURE = re.compile(rf"[≈<>]?\s?{_NUMBER}((/| of | to | → ){_NUMBER})?( \([^()]*\))?")
_FIGURE_OR_NOTHING = re.compile(rf"{_FIGURE.pattern}|[–-]|")


@dataclass(frozen=True)
class PageTable:
    """A table; cells are text and are escaped, unless they are `Markup`."""

    head: list[str]
    rows: list[list[str]]
    fold: str = ""
    """What its rows are; many of them are folded under their number.  Empty: they are never folded."""

    @property
    def is_folded(self) -> bool:
        return bool(self.fold) and len(self.rows) > MAX_OPEN_ROWS

    @property
    def figure_columns(self) -> list[bool]:
        """Return for each column whether its cells are figures, which are aligned right."""
        columns = [[str(row[i]) for row in self.rows if i < len(row)] for i in range(len(self.head))]
        return [any(map(_FIGURE.fullmatch, cells)) and all(map(_FIGURE_OR_NOTHING.fullmatch, cells))
                for cells in columns]

    @property
    def becomes_cards(self) -> bool:
        """Return whether each row becomes a card on a phone; longer tables scroll."""
        return len(self.head) > 2 and len(self.rows) <= MAX_CARDS


def tables(things: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> list[PageTable]:
    """Return the table of some things, a row for each; of nothing there is none.

    Args:
        things: events, or whatever the columns look at.
        columns: heading -> what gives the cell of one thing.
    """
    rows = [[cell(thing) for cell in columns.values()] for thing in things]
    return [PageTable(list(columns), rows)] if rows else []


@dataclass(frozen=True)
class Comparison:
    """Texts side by side: what several wrote to one prompt, or one document before and after a change."""

    prompt: str
    texts: list[tuple[str, str]]
    """(who or when, text), in the order of reading."""
    label: str = "Prompt"
    """What the prompt is; stands above it."""


@dataclass(frozen=True)
class PageSection:
    """One part of a chapter."""

    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(who, what was said), in order."""
    comparisons: list[Comparison] = field(default_factory=list)
    json: str = ""
    """Collapsible details, as JSON."""
    side_by_side: bool = False
    """Charts stand beside one another where there is room."""


@dataclass(frozen=True)
class Panel:
    """A small part of a page's first screen; panels stand beside one another where there is room."""

    title: str
    columns: int
    """Width on a wide screen, of twelve columns."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(label, value)."""
    tables: list[PageTable] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    more: list[Comparison] = field(default_factory=list)
    """Comparisons that are folded under their number."""
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    """(label, value, detail), as large cards."""
    text: str = ""
    share: float = -1.0
    """How much is done, from 0 to 1, as a bar; below 0: there is no bar."""
    is_wide: bool = False
    """Its charts are wide: two stand beside one another."""

    @property
    def is_empty(self) -> bool:
        return not (self.facts or self.tables or self.charts or self.comparisons or self.figures or self.text)


@dataclass(frozen=True)
class Chapter:
    """One thing that the page tells of, e.g. a run."""

    name: str
    detail: str
    """Stands behind the name in small type; may be empty."""
    figures: list[tuple[str, str, str]]
    """(label, value, detail) of what a reader asks first."""
    sections: list[PageSection]
    """In reading order; none: the chapter says that there is nothing yet."""


def render(kicker: str, title: str, subtitle: str, chapters: list[Chapter], *, verdict: str = "",
           opening: Sequence[Panel] = (), overview: tuple[str, PageTable] | None = None,
           anchor: str = "part", nothing: str = "There is nothing to show.",
           now_s: float | None = None) -> str:
    """Return the HTML of a page.

    Text is escaped by the template; a content security policy lets only the file's own scripts run and
    forbids every load, so that hostile text from a model or a corpus stays text even for a reader's browser
    with a defect elsewhere.

    Args:
        kicker: what kind of page it is, above the title.
        title: the heading.
        subtitle: one line below it; may be empty.
        chapters: what the page tells of, in order.
        verdict: the result in one sentence, before all else; may be empty.
        opening: what stands before all else, to be seen without scrolling on a wide screen.
        overview: a heading and a table before the chapters.
        anchor: how the chapters' addresses begin.
        nothing: said in a chapter without sections.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    page_js = _resource("page.js")
    return _templates().get_template("page.html.j2").render(
        kicker=kicker, title=title, subtitle=subtitle, verdict=verdict, nothing=nothing,
        chapters=[_anchored(chapter, f"{anchor}-{i}") for i, chapter in enumerate(chapters, 1)],
        opening=opening, overview=overview, overview_anchor=f"{anchor}s",
        css=_resource("colours.css") + _resource("page.css"), page_js=page_js,
        script_hashes=_csp_hash(page_js),
        version=__version__, written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)),
    )


def render_chat() -> str:
    """Return the HTML of the page that talks to the models of the server that it comes from.

    Its policy lets its own script and style work and its own server be asked; what a model writes is inserted
    as text.
    """
    css, js = _resource("colours.css") + _resource("chat.css"), _resource("chat.js")
    return _templates().get_template("chat.html.j2").render(
        css=css, js=js, style_hash=_csp_hash(css), script_hash=_csp_hash(js),
        version=__version__)


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    import jinja2

    # StrictUndefined: a misspelt name in the template is an error and not an empty place
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                              finalize=_shown, loader=jinja2.FunctionLoader(_resource))


def _shown(value: object) -> object:
    """Return what the template is given with its control characters escaped; `Markup` is our own."""
    return value if hasattr(value, "__html__") else visible(str(value))


def _anchored(chapter: Chapter, anchor: str) -> dict[str, object]:
    parts = [{"section": s, "anchor": f"{anchor}-{re.sub('[^a-z]+', '-', s.title.lower())}"}
             for s in chapter.sections]
    return {"name": chapter.name, "detail": chapter.detail, "anchor": anchor, "figures": chapter.figures,
            "parts": parts}


def _resource(name: str) -> str:
    return importlib.resources.files("megatron_sov.base.pages").joinpath("templates", name).read_text(
        encoding="utf-8")


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
