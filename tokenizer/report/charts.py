"""Bars and lines of numbers about tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from megatron_sov.base.pages.page import (
    Chapter, Chart, PageSection, PageTable, chart, colour, plain, render as render_page)
from tokenizer.formats.loaders import Opened
from tokenizer.report.check import TokenizerCheck

# Checks as a page.

VERDICTS = {"good": Markup('<span class="good">good</span>'), "note": "note",
            "bad": Markup('<span class="bad">BAD</span>')}


def render(tokenizer: Opened, checks: list[TokenizerCheck]) -> str:
    """Return the HTML of a report on one tokenizer."""
    overview = PageTable(["check", "verdict", "what was found"],
                         [[c.title, VERDICTS[c.verdict], c.summary] for c in checks])
    bad = sum(c.verdict == "bad" for c in checks)
    subtitle = f"{tokenizer.vocab_size:,} ids, opened by {tokenizer.library}; {len(checks)} checks, " + (
        f"{bad} of them bad." if bad else "none of them bad.")
    sections = [PageSection(c.title, f"{c.summary[0].upper()}{c.summary[1:]}.", c.charts, c.tables)
                for c in checks]
    chapter = Chapter(tokenizer.name, "", _figures(tokenizer, checks), sections)
    return render_page("Tokenizer report", tokenizer.name, subtitle, [chapter],
                       overview=("All checks", overview), anchor="tokenizer")


def _figures(tokenizer: Opened, checks: list[TokenizerCheck]) -> list[tuple[str, str, str]]:
    """Return the figures that stand at the top."""
    by_name = {c.name: c for c in checks}
    figures = [("Vocabulary", f"{tokenizer.vocab_size:,}", f"{len(tokenizer.special):,} special")]
    if "texts" in by_name:
        figures += [(name, f"{found['bytes_per_token']:.3f}", "bytes per token")
                    for name, found in list(by_name["texts"].numbers["texts"].items())[:8]]
    if "used" in by_name:
        figures.append(("Never used", f"{by_name['used'].numbers['share_never_used']:.1%}",
                        "of all tokens, on these texts"))
    if "superwords" in by_name:
        figures.append(("Superwords", f"{by_name['superwords'].numbers['share']:.1%}", "of the vocabulary"))
    if "reach" in by_name:
        figures.append(("Unreachable", f"{by_name['reach'].numbers['num_unreachable']:,}", "tokens"))
    return figures


def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]], axis: str, caption: str) -> Chart:
    """Return horizontal bars: one group for each label, one colour for each series."""
    figure = go.Figure()
    for i, (name, values) in enumerate(series.items()):
        figure.add_trace(go.Bar(y=[plain(label) for label in labels], x=list(values), orientation="h",
                                name=plain(name), marker={"color": colour(i)},
                                hovertemplate="%{y}: %{x:.4g}<extra>" + plain(name) + "</extra>"))
    figure.update_layout(barmode="group", xaxis={"title": plain(axis)},
                         yaxis={"autorange": "reversed", "type": "category"})
    return chart(figure, caption, height_px=130 + len(labels) * (20 + 12 * len(series)))


def lines(x: Sequence[float], series: Mapping[str, Sequence[float]], axes: tuple[str, str], caption: str,
          log: bool = False) -> Chart:
    """Return lines over x, on logarithmic axes where `log`."""
    figure = go.Figure()
    for i, (name, values) in enumerate(series.items()):
        figure.add_trace(go.Scatter(x=list(x)[:len(values)], y=list(values), name=plain(name),
                                    mode="lines+markers", line={"color": colour(i), "width": 1.8}))
    kind = "log" if log else "linear"
    figure.update_layout(xaxis={"title": plain(axes[0]), "type": kind},
                         yaxis={"title": plain(axes[1]), "type": kind})
    return chart(figure, caption)
