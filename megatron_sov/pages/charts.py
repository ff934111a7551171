"""Plotly figures on a page.  Colours are names of CSS variables, so that the page's light and dark themes
reach into charts."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

import plotly.graph_objects as go

NUM_COLOURS = 8
MARGINS = {"l": 64, "r": 16, "t": 28}
SMALL_MARGINS = {"l": 8, "r": 12, "t": 10, "b": 60}
"""Pixels; labels of the axes widen them where they need to."""


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page."""

    figure_json: str
    """Plotly's figure; safe inside a <script> element."""
    caption: str
    note: str
    """What was left out or changed for drawing; may be empty."""
    height_px: int = 300


def chart(figure: go.Figure, caption: str, notes: Iterable[str] = (), height_px: int = 300, *,
          small: bool = False) -> Chart:
    """Return a figure as a `Chart`; its margins, fonts and colours are the page's.

    Args:
        figure: what is drawn.
        caption: one sentence below it.
        notes: what was left out or changed for drawing.
        height_px: with axis titles and legend.
        small: for a `Panel`, where the curve needs the room that margins take.
    """
    has_legend = len(figure.data) > 1
    margins = SMALL_MARGINS if small else {**MARGINS, "b": 76 if has_legend else 56}
    # The legend may take the whole width, not only that of the curves: names are long and phones are narrow.
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "xref": "container",
              "x": 0}
    axis = {"gridcolor": "var(--grid)", "linecolor": "var(--rule)", "zeroline": False, "automargin": True}
    figure.update_layout(template="none", height=height_px, showlegend=has_legend, hovermode="closest",
                         margin=margins, legend=legend, paper_bgcolor="rgba(0,0,0,0)",
                         plot_bgcolor="rgba(0,0,0,0)", font={"color": "var(--ink)", "size": 12}, xaxis=axis,
                         yaxis=axis)
    # "<" could close the script element that carries the figure, "&" and U+2028 trip other readers.
    text = figure.to_json()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Chart(text, caption, " ".join(dict.fromkeys(n for n in notes if n)), height_px)


def colour_bar(title: str) -> dict[str, object]:
    """Return what a heat map's colours mean; the title stands behind the bar's numbers, not above them, where
    it would lie over the highest one."""
    # Spaces that do not break keep the title off the numbers.
    return {"title": {"text": title, "side": "right"}, "thickness": 12, "ticksuffix": "\u00a0\u00a0"}


def plain(text: object) -> str:
    """Return a text for a figure; plotly reads HTML in labels, and names from data must not become markup."""
    return html.escape(str(text))


def colour(i: int) -> str:
    """Return the CSS variable of the i-th colour."""
    return f"var(--c{i % NUM_COLOURS + 1})"
