"""Where a run's wall time went: one bar and its figures."""

from __future__ import annotations

import plotly.graph_objects as go

from megatron_sov.obs.figures import duration
from megatron_sov.obs.wall_time import CATEGORIES, WallTime
from megatron_sov.pages.charts import Chart, chart, colour
from megatron_sov.pages.content import Section, Table

MEANINGS = {
    "productive": "optimizer steps that are part of the model",
    "lost": "steps done again after a restart, taken back or refused",
    "evaluation": "held-out loss, needles, gates",
    "saving": "training stood still for a checkpoint",
    "startup": "from the start of the processes to their first step",
    "waiting": "from the last sign of life of one attempt to the start of the next",
}


def time_section(time: WallTime | None) -> Section:
    """Return the section; without a start it has no content, and is left out."""
    if time is None or time.total_s <= 0:
        return Section("Where the time went")
    rows = [[label, duration(time.spent_s[name]), f"{time.spent_s[name] / time.total_s:.1%}", MEANINGS[name]]
            for name, label in CATEGORIES.items()]
    return Section("Where the time went", charts=[_bar(time)],
                   tables=[Table(["", "time", "share", "what it is"], rows)])


def _bar(time: WallTime) -> Chart:
    figure = go.Figure()
    for i, (name, label) in enumerate(CATEGORIES.items()):
        share = 100 * time.spent_s[name] / time.total_s
        figure.add_trace(go.Bar(x=[share], y=[""], orientation="h", name=label, marker={"color": colour(i)},
                                hovertemplate=f"{label}: {share:.1f} %, "
                                              f"{duration(time.spent_s[name])}<extra></extra>"))
    figure.update_layout(barmode="stack", xaxis={"title": "% of the wall time", "range": [0, 100]},
                         yaxis={"showticklabels": False})
    caption = (f"Of {duration(time.total_s)} since the first start, "
               f"{time.goodput:.1%} moved the model forward.")
    return chart(figure, caption, height_px=240)  # on a phone the legend has three rows
