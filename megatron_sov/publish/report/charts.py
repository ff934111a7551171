"""Plotly figures of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_sov.base.pages.page import Chart, chart, colour, colour_bar, plain
from megatron_sov.publish.report.run_data import Phase, ReportedExpertLoad, Run
from megatron_sov.publish.report.steps import (
    Curve, curves, downsample, moving_mean, needle_curves, pair_curves)
from megatron_sov.runs.obs.figures import number

MAX_POINTS = 2000
"""Points of one drawn curve at most."""
SMOOTH_FROM_STEPS = 50
"""Shorter curves are drawn as they are; longer ones also as a moving mean over a fiftieth of the steps."""
MARKS = {"skip": ("step not learned", "x"), "rollback": ("weights taken back", "triangle-left"),
         "alarm": ("alarm", "diamond"), "sdc": ("silent corruption", "star")}
"""Incidents that are marked on the loss: event -> name and symbol."""
MAX_PHASES = 24
"""Phases that are marked; rounds of reinforcement learning are phases too, and may be hundreds."""
MAX_MARKS = 500
"""Marks of one kind at most, the newest ones."""
MAX_WINDOW_STEPS = 500
"""Longest moving mean; a wider one would smooth away what happens in a morning."""


def _line(curve: Curve, name: str, stroke: str, width: float = 1.8,
          opacity: float = 1.0) -> tuple[go.Scatter, list[str]]:
    """Return a drawable line and notes about what it leaves out."""
    finite = curve.finite()
    drawn = downsample(finite, MAX_POINTS)
    notes = []
    if len(finite.steps) < len(curve.steps):
        bad = curve.steps[~np.isfinite(curve.values)]
        notes.append(f"{len(bad):,} values are not finite and not drawn (first at step {int(bad[0]):,}).")
    if len(drawn.steps) < len(finite.steps):
        notes.append(f"Of {len(finite.steps):,} points at most {MAX_POINTS:,} are drawn; "
                     "the lowest and highest value of every stretch are kept.")
    # Integers and single precision halve the file; hover text shows no more digits than that.
    trace = go.Scatter(x=drawn.steps.astype(np.int32), y=drawn.values.astype(np.float32), name=plain(name),
                       opacity=opacity, mode="lines+markers" if len(drawn.steps) <= 20 else "lines",
                       line={"color": stroke, "width": width})
    return trace, notes


def _curves(curves: list[Curve], title: str, caption: str, run: Run, *, smooth: bool = False,
            incidents: bool = False) -> Chart | None:
    """Draw curves over steps with the run's phases behind them; None where there is nothing to draw."""
    curves = [c for c in curves if len(c.finite().steps)]
    if not curves:
        return None
    figure, notes = go.Figure(), []
    for i, curve in enumerate(curves):
        name, stroke = curve.name, colour(i)
        if smooth and len(curve.finite().steps) >= SMOOTH_FROM_STEPS:
            raw, window = curve, min(MAX_WINDOW_STEPS, max(5, len(curve.finite().steps) // 50))
            curve = moving_mean(curve.finite(), window)
            if len(curves) == 1:
                name = f"mean of {window:,} steps"
                trace, found = _line(raw, "each step", stroke, width=1, opacity=0.5)
                figure.add_trace(trace)
                notes += found
            else:
                notes.append(f"Each line is a moving mean over {window:,} steps.")
        trace, found = _line(curve, name, stroke)
        figure.add_trace(trace)
        notes += found
    figure.update_layout(xaxis={"title": "optimizer step"}, yaxis={
        "title": title, "exponentformat": "power", "minexponent": 5, "separatethousands": True})
    _mark_phases(figure, run.phases)
    _mark_restarts(figure, run)
    if incidents:
        _mark_incidents(figure, run, curves[0].finite())
    return chart(figure, caption, notes)


def _mark_phases(figure: go.Figure, phases: list[Phase]) -> None:
    """Shade every second phase and write its name above."""
    if not 2 <= len(phases) <= MAX_PHASES:
        return
    for i, phase in enumerate(phases):
        end = phases[i + 1].first_step if i + 1 < len(phases) else phase.last_step
        if i % 2:
            figure.add_shape(type="rect", x0=phase.first_step, x1=end, y0=0, y1=1, yref="paper",
                             fillcolor="var(--band)", line={"width": 0}, layer="below")
        figure.add_annotation(x=(phase.first_step + end) / 2, y=1, yref="paper", yanchor="bottom",
                              text=plain(phase.name), showarrow=False,
                              font={"size": 11, "color": "var(--muted)"})


def _mark_restarts(figure: go.Figure, run: Run) -> None:
    """Draw a dotted line where an attempt ended and another one followed."""
    for attempt in run.attempts[:-1]:
        if attempt.last_step is not None:
            figure.add_shape(type="line", x0=attempt.last_step, x1=attempt.last_step, y0=0, y1=1,
                             yref="paper", line={"color": "var(--muted)", "width": 1, "dash": "dot"})


def _mark_incidents(figure: go.Figure, run: Run, curve: Curve) -> None:
    """Draw a mark on the curve for each incident of the kinds that concern learning."""
    for i, (kind, (name, symbol)) in enumerate(MARKS.items()):
        events = [e for e in run.incidents if e["event"] == kind and e.get("step")][-MAX_MARKS:]
        if not events:
            continue
        steps = np.array([int(e["step"]) for e in events], dtype=np.int32)
        # a step that was refused has no point of its own
        nearest = np.clip(np.searchsorted(curve.steps, steps), 0, len(curve.steps) - 1)
        words = [plain(str(e.get("text") or e.get("reason") or "")) for e in events]
        figure.add_trace(go.Scatter(x=steps, y=curve.values[nearest].astype(np.float32), mode="markers",
                                    name=name, marker={"symbol": symbol, "size": 9, "color": colour(i + 3)},
                                    customdata=words,
                                    hovertemplate="step %{x}<br>%{customdata}<extra>" + name + "</extra>"))


def loss_charts(run: Run) -> list[Chart]:
    """Return the training loss, its terms where there are several, and the loss of each source."""
    total, terms, sources = run.curve("loss"), run.curves["losses"], run.curves["losses_by_source"]
    charts = [_curves([total] if total else [], "loss (nats per token)",
                      "Training loss. Phases are shaded; a dotted line marks a restart.", run, smooth=True,
                      incidents=True)]
    if len(terms) > 1:
        charts.append(_curves(list(terms.values()), "loss", "The terms of the training loss.", run,
                              smooth=True))
    if len(sources) > 1:
        charts.append(_curves(list(sources.values()), "loss (nats per token)",
                              "Training loss of each source.", run, smooth=True))
    return [c for c in charts if c]


def meter_charts(run: Run) -> list[Chart]:
    charts = [_curves([curve], plain(name), f"{name}, mean of each step's batch.", run, smooth=True)
              for name, curve in run.curves["meters"].items()]
    return [c for c in charts if c]


def heldout_charts(run: Run) -> list[Chart]:
    """Return held-out loss and bits per byte of each source over the run."""
    loss = [h.loss for h in run.heldout.values()]
    bits = [h.bits_per_byte for h in run.heldout.values()]
    if len(bits) > 1 and run.overall_bits_per_byte:
        bits.append(run.overall_bits_per_byte)
    charts = [_curves(loss, "loss (nats per token)",
                      "Loss on held-out documents, which training never sees.", run),
              _curves(bits, "bits per byte",
                      "Bits per byte on held-out documents; comparable between tokenizers.", run)]
    return [c for c in charts if c]


def beside_charts(run: Run) -> list[Chart]:
    """Return what judges beside training found over the run."""
    charts = [_curves(curves(run.evaluations, "bits_per_byte"), "bits per byte",
                      "Bits per byte of the exports.", run),
              _curves(needle_curves(run.evaluations), "% right",
                      "Needles found by the exports, over all lengths and depths.", run),
              _curves(pair_curves(run.evaluations), "% right",
                      "Held-out pairs whose better response the exports would rather write.", run)]
    return [c for c in charts if c]


def scalar_charts(run: Run, wanted: list[tuple[str, str, str]]) -> list[Chart]:
    """Return a chart for each (step field, axis title, caption) that the run has."""
    found = [(run.curve(name), title, caption) for name, title, caption in wanted]
    charts = [_curves([curve], title, caption, run, smooth=curve.name != "lr")
              for curve, title, caption in found if curve]
    return [c for c in charts if c]


def expert_chart(load: ReportedExpertLoad, source: str = "") -> Chart:
    """Return the heat map layer x expert of the share of tokens, in multiples of the fair
    share 1 / experts."""
    num_layers, num_experts = load.load.shape
    relative = load.load * num_experts
    figure = go.Figure(go.Heatmap(
        z=relative.astype(np.float32), x=np.arange(num_experts, dtype=np.int32),
        y=[f"{layer}" for layer in load.layers], customdata=(100 * load.load).astype(np.float32), zmid=1,
        # 2 at least, or an even load would show its noise in full colour
        zmin=0, zmax=max(2.0, float(np.nanmax(relative))),
        colorscale=[[0, "var(--low)"], [0.5, "var(--mid)"], [1, "var(--high)"]],
        colorbar=colour_bar("x fair"),
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata:.2f} % of tokens<br>%{z:.2f} x its fair "
                      "share<extra></extra>"))
    figure.update_layout(xaxis={"title": "expert"},
                         yaxis={"title": "layer", "type": "category", "autorange": "reversed"})
    fair = f"{100 / num_experts:.3g} % of the tokens"
    whose = f" by documents of {source}" if source else ""
    return chart(figure, f"Load of each expert{whose} at step {load.step:,}: 1 is the fair share, {fair}.",
                 height_px=min(640, 150 + 26 * num_layers))


def needle_charts(needle: dict[str, Any]) -> list[Chart]:
    """Return a heat map depth x length of the share of right answers, for each kind and
    language of a needle test."""
    maps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in needle["cells"]:
        maps.setdefault((str(cell["kind"]), str(cell["language"])), []).append(cell)
    when = {"before": "Before the extension", "after": "After the extension"}.get(
        str(needle.get("when")), "Needle retrieval")
    by = f" by {needle['by']}" if needle.get("by") else ""
    return [_needle_chart(cells, f"{when}, step {int(needle.get('step') or 0):,}: {kind}, {language}{by}")
            for (kind, language), cells in maps.items()]


def _needle_chart(cells: list[dict[str, Any]], caption: str) -> Chart:
    fewest = int(min(number(c["samples"]) for c in cells))
    score = float(np.mean([number(c["correct"]) / number(c["samples"]) for c in cells]))
    return chart(needle_map(cells), f"{caption}, {fewest:,} samples a cell; {score:.1%} right.",
                 height_px=150 + 34 * len({c["depth"] for c in cells}))


def needle_map(cells: list[dict[str, Any]]) -> go.Figure:
    """Return the map of one kind and language; a cell shows its share of right answers and, on hover,
    counts and interval."""
    lengths = sorted({int(c["length_tokens"]) for c in cells})
    depths = sorted({float(c["depth"]) for c in cells})
    shares = np.full((len(depths), len(lengths)), np.nan, np.float32)
    notes = [["" for _ in lengths] for _ in depths]
    for cell in cells:
        row, column = depths.index(float(cell["depth"])), lengths.index(int(cell["length_tokens"]))
        correct, samples = number(cell["correct"]), number(cell["samples"])
        low, high = (number(end) for end in cell["interval"])
        shares[row, column] = correct / samples
        notes[row][column] = (f"{correct:.0f} of {samples:.0f} right, 95 % interval {low:.0%} to "
                              f"{high:.0%}<br>{number(cell['distractors']):,.0f} other needles")
    figure = go.Figure(go.Heatmap(
        z=shares, x=[f"{n:,}" for n in lengths], y=[f"{d:.0%}" for d in depths], zmin=0, zmax=1, xgap=2,
        ygap=2, customdata=notes, texttemplate="%{z:.0%}",
        colorscale=[[0, "var(--heat0)"], [1, "var(--heat1)"]], showscale=False,
        hovertemplate="%{x} tokens, depth %{y}<br>%{customdata}<extra></extra>"))
    figure.update_layout(xaxis={"title": "context (tokens)", "type": "category"},
                         yaxis={"title": "depth of the needle", "type": "category", "autorange": "reversed"})
    return figure


def plan_chart(consumed: dict[str, Any]) -> Chart | None:
    """Return each source's share of the tokens beside its share in the plan."""
    tokens, plan = consumed.get("tokens") or {}, consumed.get("plan") or {}
    names = list(dict.fromkeys([*plan, *tokens]))
    if not names:
        return None
    figure = go.Figure()
    for i, (label, counts) in enumerate((("plan", plan), ("consumed", tokens))):
        total = sum(number(v) for v in counts.values())
        if total > 0:
            figure.add_trace(
                go.Bar(y=[plain(n) for n in names], x=[100 * number(counts.get(n, 0)) / total for n in names],
                       orientation="h", name=label, marker={"color": ["var(--muted)", colour(0)][i]},
                       hovertemplate="%{y}: %{x:.2f} % (" + label + ")<extra></extra>"))
    figure.update_layout(barmode="group", xaxis={"title": "% of all tokens"},
                         yaxis={"autorange": "reversed", "type": "category"})
    return chart(figure,
                 f"Tokens of each source up to step {int(consumed.get('step') or 0):,}, against the plan.",
                 height_px=130 + 44 * len(names))
