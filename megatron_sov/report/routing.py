"""The report's section on expert routing: load over the run, by layer and by source,
and how selection biases drift."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from megatron_sov.obs import routing
from megatron_sov.pages.charts import Chart, chart, colour_bar, plain
from megatron_sov.pages.content import Section, Table
from megatron_sov.report.charts import expert_chart, scalar_charts
from megatron_sov.report.run_data import ExpertLoad, RoutingHistory, Run

MAX_COLUMNS = 400
"""Steps of one heat map at most."""
SHOWN = (("max_violation", "MaxVio", 0.0, "MaxVio of each layer: 0 is perfect balance."),
         ("entropy", "entropy", 1.0,
          "Entropy of each layer's expert load, as a share of that of an even load."),
         ("dead", "experts", 0.0, "Experts of each layer that got no token in the step."),
         ("bias_spread", "spread", 0.0,
          "Selection biases of each layer: the largest less the smallest. Scores lie in (0, 1)."))
"""Figure of a routing record, what its colours mean, its best value, and the caption."""


def expert_section(run: Run) -> Section:
    """Return the section; without charts for a dense model."""
    charts = [expert_chart(run.expert_load)] if run.expert_load else []
    charts += scalar_charts(run, [("max_violation", "MaxVio", "MaxVio of the worst layer over steps.")])
    if run.routing is not None:
        charts += [_history_chart(run.routing, *shown)
                   for shown in SHOWN if run.routing.values[shown[0]].any()]
    by_source = run.expert_load_by_source
    if len(by_source) > 1:
        charts += [expert_chart(load, name) for name, load in by_source.items()]
    return Section("Expert load", charts=charts, tables=_source_tables(by_source), side_by_side=True,
                   text="MaxVio is the load of the busiest expert over the fair load, less 1 (arXiv "
                        "2408.15664); 0 is perfect balance. What belongs to a source was counted on its "
                        "held-out documents.")


def _history_chart(history: RoutingHistory, name: str, title: str, best: float, caption: str) -> Chart:
    """Return the heat map layer x step of one figure; in a long run a column is the worst of some records."""
    every = -(-len(history.steps) // MAX_COLUMNS)
    worst_is_high = best == 0.0
    firsts = np.arange(0, len(history.steps), every)
    values = (np.maximum if worst_is_high else np.minimum).reduceat(history.values[name], firsts, axis=0).T
    steps = history.steps[firsts]
    figure = go.Figure(go.Heatmap(
        z=values.astype(np.float32), x=steps.astype(np.int32), y=[f"{layer}" for layer in history.layers],
        zmin=0 if worst_is_high else None, zmax=None if worst_is_high else 1, reversescale=not worst_is_high,
        colorscale=[[0, "var(--heat0)"], [1, "var(--heat1)"]], colorbar=colour_bar(title),
        hovertemplate="step %{x}, layer %{y}<br>%{z:.4g}<extra></extra>"))
    figure.update_layout(xaxis={"title": "optimizer step"},
                         yaxis={"title": "layer", "type": "category", "autorange": "reversed"})
    notes = [f"Each column is the worst of {every:,} records."] if every > 1 else []
    return chart(figure, caption, notes, height_px=min(640, 150 + 26 * len(history.layers)))


def _source_tables(loads: dict[str, ExpertLoad]) -> list[Table]:
    """Return for each source how its tokens spread over experts, and how far that is from the
    spread of all sources."""
    if not loads:
        return []
    rows = []
    common = np.mean([load.load for load in loads.values()], axis=0)
    for name, load in loads.items():
        own = np.abs(load.load - common).sum(axis=1) / 2
        rows.append([plain(name), f"{routing.max_violation(load.load).max():.3g}",
                     f"{routing.load_entropy(load.load).min():.3f}",
                     f"{int(routing.num_dead(load.load).sum()):,}", f"{own.mean():.1%}",
                     f"{load.layers[int(own.argmax())]}"])
    return [Table(["source", "MaxVio, worst layer", "entropy, worst layer",
                   "experts without a token, all layers", "tokens that other sources would send elsewhere",
                   "most so in layer"], rows)]
