"""The page of a ladder: its losses, the law through them, and predictions beside what came of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from megatron_sov.ladder.family import size_of
from megatron_sov.ladder.laws import CONFIDENCE, PowerLaw, Prediction
from megatron_sov.ladder.members import Member
from megatron_sov.ladder.results import Law, Point, Told
from megatron_sov.obs.figures import large
from megatron_sov.pages.page import Chapter, Chart, Section, Table, chart, colour, plain
from megatron_sov.pages.page import render as render_page

NUM_POINTS = 60
"""Sizes at which the law is drawn."""


def page(recipe: str, rates: str, members: Sequence[Member], found: Sequence[Point], law: Law,
         told: Sequence[Told]) -> str:
    sections = [
        Section("Loss over size", charts=[_chart(found, law, told)], tables=law_tables(law),
                text=f"Held-out loss at the end of each run. The band is where the law lies with probability "
                     f"{CONFIDENCE:.0%}; a prediction's bar is where one run's loss lies."),
        Section("Predictions", tables=[prediction_table(told)],
                text="Each was written before its run began, unless the run was there already."),
        Section("Models", tables=[member_table(members, found)],
                text=f"Sizes count the parameters of the trunk that one token meets; rates: {rates}.")]
    return render_page("Scaling ladder", recipe, "",
                       [Chapter(recipe, f"{len(members)} runs", [], sections)])


def member_table(members: Sequence[Member], found: Sequence[Point]) -> Table:
    losses = {p.name: f"{p.loss:.4f}" for p in found}
    rows = []
    for m in members:
        c, o, t = m.config.model, m.config.optim, m.config.train
        ffn = f"{c.num_experts} x {c.expert_ffn_dim}" if c.num_experts else f"{c.dense_ffn_dim}"
        scale = o.groups[0].lr_scale if o.groups else 1.0
        rows.append([m.name, large(size_of(c)), f"{c.hidden_size} x {c.num_layers}",
                     f"{c.num_heads}/{c.num_kv_heads} of {c.head_dim}", ffn, large(m.num_tokens),
                     f"{m.config.num_steps():,} of {t.global_batch_size}", f"{o.lr:.3g}",
                     f"{o.lr * scale:.3g}", losses.get(m.name, "–")])
    return Table(["run", "parameters", "width x layers", "heads", "inner width", "tokens",
                  "steps of samples", "rate", "rate of matrices", "held-out loss"], rows)


def prediction_table(told: Sequence[Told]) -> Table:
    rows = [[t.name, large(t.num_params), large(t.num_tokens), spelled(t.predicted),
             time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(t.made_s)),
             "–" if t.measured is None else f"{t.measured:.4f}",
             "–" if t.error is None else f"{t.error:+.2%}",
             {None: "–", True: "inside", False: "outside"}[t.inside]] for t in told]
    return Table(["run", "parameters", "tokens", f"predicted loss ({CONFIDENCE:.0%} interval)", "written",
                  "measured", "error", "interval"], rows)


def law_tables(law: Law) -> list[Table]:
    """Return the law's parameters, each with its own interval."""
    rows = [[name, spelled(value)] for name, value in law.parameters().items()]
    return [Table([law.name, f"median ({CONFIDENCE:.0%} interval)"], rows)]


def spelled(value: Prediction) -> str:
    return f"{value.loss:.4g} ({value.low:.4g} to {value.high:.4g})"


def _chart(found: Sequence[Point], law: Law, told: Sequence[Told]) -> Chart:
    figure = go.Figure()
    sizes = [p.num_params for p in found] + [t.num_params for t in told]
    if isinstance(law, PowerLaw):
        x = np.geomspace(min(sizes), max(sizes), NUM_POINTS)
        band = [law.curve(float(n)) for n in x]
        figure.add_trace(go.Scatter(
            x=np.concatenate([x, x[::-1]]), y=[b.low for b in band] + [b.high for b in band][::-1],
            fill="toself", line={"width": 0}, fillcolor="var(--band)", name="interval of the law",
            hoverinfo="skip"))
        figure.add_trace(go.Scatter(x=x, y=[b.loss for b in band], mode="lines", name=law.name,
                                    line={"color": colour(0), "width": 1.6}))
    figure.add_trace(go.Scatter(x=[p.num_params for p in found], y=[p.loss for p in found], mode="markers",
                                name="runs", marker={"color": colour(0), "size": 8},
                                text=[plain(p.name) for p in found]))
    figure.add_trace(go.Scatter(
        x=[t.num_params for t in told], y=[t.predicted.loss for t in told], mode="markers",
        name="predicted", marker={"color": colour(1), "size": 8, "symbol": "diamond"},
        error_y={"type": "data", "symmetric": False, "color": colour(1),
                 "array": [t.predicted.high - t.predicted.loss for t in told],
                 "arrayminus": [t.predicted.loss - t.predicted.low for t in told]}))
    measured = [t for t in told if t.measured is not None]
    if measured:
        figure.add_trace(go.Scatter(
            x=[t.num_params for t in measured], y=[t.measured for t in measured], mode="markers",
            name="measured", marker={"color": colour(2), "size": 9, "symbol": "x"}))
    figure.update_layout(xaxis={"title": "parameters", "type": "log"},
                         yaxis={"title": "held-out loss (nats per token)"})
    return chart(figure, "Held-out loss over the parameters of the trunk that one token meets.",
                 height_px=380)
