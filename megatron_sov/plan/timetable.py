"""The schedule of a run before it runs: learning rate, batch size, tokens and blend,
as a table and as charts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import plotly.graph_objects as go

from megatron_sov.config import RunConfig
from megatron_sov.config.schedules import Schedule
from megatron_sov.pages.charts import Chart, chart, colour, plain
from megatron_sov.pages.content import Table

EVENLY = 12
"""Steps of the table that lie evenly over the run, beside those at which something changes."""
MAX_CHANGES = 24
"""Changes of the batch size that the table shows at most; a ramp may have hundreds."""
MAX_POINTS = 400
"""Points of a drawn curve, beside those at which something changes."""
BAR_CHARACTERS = 32


@dataclass(frozen=True)
class TimetableRow:
    """One step of the plan."""

    step: int
    """1-based, as in events."""
    tokens: int
    """Read up to its end, padding counted in."""
    phase: str
    samples: int
    seq_len: int
    lr: float
    lr_share: float
    """The rate beside the largest one of the table."""


def steps_to_show(schedule: Schedule, evenly: int) -> list[int]:
    """Return steps (0-based): the first, the last, where phase or batch size change,
    where the rate turns, and some between."""
    last = schedule.num_steps - 1
    changes = [s.first_step for s in schedule.stretches]
    every = -(-len(changes) // MAX_CHANGES)
    found = {0, last, *changes[::every], *(c - 1 for c in changes[::every] if c)}
    found |= {round(last * i / evenly) for i in range(evenly + 1)}
    return sorted(found | {s for turn in schedule.turns() for s in (turn - 1, turn) if 0 <= s <= last})


def rows(config: RunConfig, evenly: int = EVENLY) -> list[TimetableRow]:
    """Return the plan's table."""
    schedule = Schedule(config)
    steps = steps_to_show(schedule, evenly)
    rates = [schedule.learning_rate(step) for step in steps]
    found = []
    for step, lr in zip(steps, rates, strict=True):
        stretch = schedule.stretch(step)
        name = schedule.phases[stretch.phase].name
        found.append(TimetableRow(step + 1, schedule.tokens(step), name, stretch.batch_size, stretch.seq_len,
                                  lr, lr / max(rates)))
    return found


def as_text(config: RunConfig) -> str:
    """Return the plan for a terminal; the bars are the learning rate, from 0 to its peak."""
    found = rows(config)
    width = max(len("phase"), *(len(r.phase) for r in found))
    lines = [f"{'step':>12} {'tokens':>20}  {'phase':<{width}} {'samples':>8} {'length':>8} {'rate':>11}"]
    for r in found:
        bar = "#" * round(BAR_CHARACTERS * r.lr_share)
        line = (f"{r.step:>12,} {r.tokens:>20,}  {r.phase:<{width}} {r.samples:>8,} {r.seq_len:>8,} "
                f"{r.lr:>11.4g} {bar}")
        lines.append(line.rstrip())
    lines += ["", *(f"{phase.name}: {_blend(phase.blend)}" for phase in config.data.phases)]
    return "\n".join(lines)


def _blend(blend: dict[str, float]) -> str:
    total = sum(blend.values())
    return (", ".join(f"{name} {100 * weight / total:.3g} %" for name, weight in blend.items())
            or "every source by its tokens")


def as_json(config: RunConfig) -> dict[str, Any]:
    """Return the plan as plain values."""
    schedule = Schedule(config)
    return {"recipe": config.recipe, "steps": schedule.num_steps,
            "tokens": schedule.tokens(schedule.num_steps - 1),
            "phases": [{"name": p.name, "first_step": s + 1, "blend": p.blend}
                       for p, s in zip(config.data.phases, config.phase_starts(), strict=True)],
            "schedule": [asdict(row) for row in rows(config)]}


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
