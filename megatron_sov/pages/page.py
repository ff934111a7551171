"""Chapters -> one HTML file that is complete in itself."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
import time
from collections.abc import Sequence

import jinja2
from plotly.offline import get_plotlyjs

from megatron_sov.pages.content import Chapter, Panel, Table
from megatron_sov.version import __version__


def render(kicker: str, title: str, subtitle: str, chapters: list[Chapter], *,
           opening: Sequence[Panel] = (), overview: tuple[str, Table] | None = None,
           anchor: str = "part", nothing: str = "There is nothing to show.",
           now_s: float | None = None) -> str:
    """Return the HTML of a page.

    Text is escaped by the template; a content security policy lets only the file's own two scripts run and
    forbids every load, so that hostile text from a model or a corpus stays text even for a reader's browser
    with a defect elsewhere.

    Args:
        kicker: what kind of page it is, above the title.
        title: the heading.
        subtitle: one line below it; may be empty.
        chapters: what the page tells of, in order.
        opening: what stands before all else, to be seen without scrolling on a wide screen.
        overview: a heading and a table before the chapters.
        anchor: how the chapters' addresses begin.
        nothing: said in a chapter without sections.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_resource("page.html.j2"))
    plotly_js, draw_js = get_plotlyjs(), _resource("draw.js")
    return template.render(
        kicker=kicker, title=title, subtitle=subtitle, nothing=nothing,
        chapters=[_anchored(chapter, f"{anchor}-{i}") for i, chapter in enumerate(chapters, 1)],
        opening=opening, overview=overview, overview_anchor=f"{anchor}s", css=_resource("page.css"),
        plotly_js=plotly_js, draw_js=draw_js, script_hashes=f"{_csp_hash(plotly_js)} {_csp_hash(draw_js)}",
        version=__version__, written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)),
    )


def _anchored(chapter: Chapter, anchor: str) -> dict[str, object]:
    parts = [{"section": s, "anchor": f"{anchor}-{re.sub('[^a-z]+', '-', s.title.lower())}"}
             for s in chapter.sections]
    return {"name": chapter.name, "detail": chapter.detail, "anchor": anchor, "figures": chapter.figures,
            "parts": parts}


def _resource(name: str) -> str:
    return importlib.resources.files("megatron_sov.pages").joinpath("templates", name).read_text(
        encoding="utf-8")


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
