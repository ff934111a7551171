"""Bars and lines of numbers about tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from megatron_sov.pages.page import Chart, chart, colour, plain


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
