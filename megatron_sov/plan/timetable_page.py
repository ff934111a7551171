"""The schedule of a run on a page: its table and its charts."""

from __future__ import annotations

import plotly.graph_objects as go

from megatron_sov.config import RunConfig
from megatron_sov.config.schedules import Schedule
from megatron_sov.pages.page import Chart, Table, chart, colour, plain
from megatron_sov.plan.timetable import rows, steps_to_show

MAX_POINTS = 400
"""Points of a drawn curve, beside those at which something changes."""


def table(config: RunConfig) -> Table:
    """Return the plan for a page."""
    body = [[f"{r.step:,}", f"{r.tokens:,}", r.phase, f"{r.samples:,}", f"{r.seq_len:,}", f"{r.lr:.4g}"]
            for r in rows(config, 1)]
    return Table(["step", "tokens", "phase", "samples", "length", "learning rate"], body)


def charts(config: RunConfig) -> list[Chart]:
    """Return learning rate and tokens of a step over the run, and the blends where phases name them."""
    schedule = Schedule(config)
    steps = steps_to_show(schedule, MAX_POINTS)
    x = [step + 1 for step in steps]
    rate, size = go.Figure(), go.Figure()
    rate.add_trace(go.Scatter(x=x, y=[schedule.learning_rate(s) for s in steps], name="rate",
                              line={"color": colour(0)}))
    size.add_trace(go.Scatter(x=x, y=[schedule.stretch(s).tokens_per_step for s in steps], name="tokens",
                              line={"color": colour(0), "shape": "hv"}))
    for figure, title in ((rate, "learning rate"), (size, "tokens of a step")):
        figure.update_layout(xaxis={"title": "optimizer step"}, yaxis={"title": title, "rangemode": "tozero"})
        _mark_phases(figure, config, schedule.num_steps)
    found = [chart(rate, "Planned learning rate."),
             chart(size, "Planned tokens of a step: samples times their length.")]
    return found + ([_blend_chart(config)] if any(p.blend for p in config.data.phases) else [])


def _mark_phases(figure: go.Figure, config: RunConfig, num_steps: int) -> None:
    """Shade every second phase and write its name above."""
    starts = [*config.phase_starts(), num_steps]
    for i, phase in enumerate(config.data.phases if len(config.data.phases) > 1 else ()):
        if i % 2:
            figure.add_shape(type="rect", x0=starts[i], x1=starts[i + 1], y0=0, y1=1, yref="paper",
                             fillcolor="var(--band)", line={"width": 0}, layer="below")
        figure.add_annotation(x=(starts[i] + starts[i + 1]) / 2, y=1, yref="paper", yanchor="bottom",
                              text=plain(phase.name), showarrow=False,
                              font={"size": 11, "color": "var(--muted)"})


def _blend_chart(config: RunConfig) -> Chart:
    phases = [p for p in config.data.phases if p.blend]
    figure = go.Figure()
    for i, name in enumerate(dict.fromkeys(name for p in phases for name in p.blend)):
        shares = [100 * p.blend.get(name, 0.0) / sum(p.blend.values()) for p in phases]
        figure.add_trace(go.Bar(y=[plain(p.name) for p in phases], x=shares, name=plain(name),
                                orientation="h", marker={"color": colour(i)}))
    figure.update_layout(barmode="stack", xaxis={"title": "% of samples"},
                         yaxis={"autorange": "reversed", "type": "category"})
    return chart(figure, "Planned blend of each phase.", height_px=150 + 34 * len(phases))
