"""What a ladder's runs gave, the law through it and its predictions: RUN/ladder.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import (
    Chapter, Chart, PageSection, PageTable, chart, colour, plain, render as render_page)
from megatron_sov.publish.ladder.family import Member, size_of
from megatron_sov.publish.ladder.laws import CONFIDENCE, ParametricLaw, PowerLaw, Prediction
from megatron_sov.runs.folder import COMPLETION
from megatron_sov.runs.obs.events import EVENTS, final_steps, read_events
from megatron_sov.runs.obs.figures import large, number

FILE = "ladder.json"
FORMAT_VERSION = 1
Law = PowerLaw | ParametricLaw


@dataclass(frozen=True)
class Point:
    name: str
    num_params: int
    num_tokens: int
    loss: float
    """Held-out loss at its end, in nats per token, over all held-out tokens."""


@dataclass(frozen=True)
class LadderText:
    """A prediction beside what came of it."""

    name: str
    num_params: int
    num_tokens: int
    predicted: Prediction
    made_s: float
    """Unix time at which it was first written: before its run began, unless that stood there already."""
    measured: float | None = None
    """Held-out loss of its run; None: there is none."""

    @property
    def error(self) -> float | None:
        return None if self.measured is None else self.predicted.loss / self.measured - 1

    @property
    def inside(self) -> bool | None:
        return (None if self.measured is None
                else self.predicted.low <= self.measured <= self.predicted.high)


def is_complete(run: Path) -> bool:
    return (run / COMPLETION).is_file()


def final_loss(run: Path) -> float:
    """Return a complete run's held-out loss at its end: the mean over the held-out tokens of all sources.

    Raises:
        UserError: nothing was held out, or the loss is no number.
    """
    evals = final_steps(list(read_events(run / EVENTS)), "eval")
    rows = evals[-1].get("heldout", {}).values() if evals else []
    tokens = sum(number(row.get("tokens")) for row in rows)
    if not tokens > 0:
        raise UserError(f"{run}: has no held-out loss; pack the data with --heldout, and begin the ladder "
                        "anew")
    loss = sum(number(row.get("loss")) * number(row.get("tokens")) for row in rows) / tokens
    if not math.isfinite(loss):
        raise UserError(f"{run}: ended with a held-out loss of {loss}; look at its report, lower --set "
                        "optim.lr, and begin the ladder anew")
    return loss


def points(folder: Path, members: Sequence[Member]) -> list[Point]:
    """Return the runs that are complete.

    Raises:
        UserError: as `final_loss`.
    """
    return [Point(m.name, m.num_params, m.num_tokens, final_loss(folder / m.name))
            for m in members if is_complete(folder / m.name)]


def fitted(found: Sequence[Point]) -> Law:
    """Return the law through runs: that of size alone where all saw as many tokens per parameter.

    Raises:
        UserError: they are too few, or have no such law.
    """
    params, tokens, losses = ([getattr(p, name) for p in found]
                              for name in ("num_params", "num_tokens", "loss"))
    ratios = {round(p.num_tokens / p.num_params, 3) for p in found}
    return ParametricLaw(params, tokens, losses) if len(ratios) > 1 else PowerLaw(params, losses)


def tell(law: Law, member: Member, folder: Path) -> LadderText:
    """Return the prediction for a model, with what its run gave where it is complete; one that was written
    before and is the same keeps its time."""
    predicted = law.predict(member.num_params, member.num_tokens)
    made_s = time.time()
    for earlier in read(folder).get("predictions", []):
        if earlier["name"] == member.name and earlier["predicted"] == asdict(predicted):
            made_s = earlier["made_s"]
    run = folder / member.name
    return LadderText(member.name, member.num_params, member.num_tokens, predicted, made_s,
                      final_loss(run) if is_complete(run) else None)


def read(folder: Path) -> dict[str, Any]:
    """Return what the folder's file holds; nothing where there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = int(found["format_version"])
        for told in found.get("predictions", []):
            if not {"name", "predicted", "made_s"} <= set(told) or not math.isfinite(told["made_s"]):
                raise ValueError(f"a prediction in it is {str(told)[:80]}")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); delete it, it is written anew from the runs") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{file}: has format version {version}, and this version reads {FORMAT_VERSION}; "
                        "use the newer megatron-sov")
    return dict(found)


def write(folder: Path, recipe: str, rates: str, found: Sequence[Point], law: Law,
          told: Sequence[LadderText]) -> None:
    atomic_write(folder / FILE, to_json({
        "format_version": FORMAT_VERSION, "kind": "ladder", "recipe": recipe, "rates": rates,
        "points": list(found),
        "law": {"form": law.name, "parameters": law.parameters()},
        "predictions": [{**asdict(t), "error": t.error, "inside": t.inside} for t in told]}))


# The page of a ladder: its losses, the law through them, and predictions beside what came of them.


NUM_POINTS = 60
"""Sizes at which the law is drawn."""


def page(recipe: str, rates: str, members: Sequence[Member], found: Sequence[Point], law: Law,
         told: Sequence[LadderText]) -> str:
    sections = [
        PageSection("Loss over size", charts=[_chart(found, law, told)], tables=law_tables(law),
                    text=f"Held-out loss at the end of each run. The band is where the law lies with "
                         f"probability {CONFIDENCE:.0%}; a prediction's bar is where one run's loss lies."),
        PageSection("Predictions", tables=[prediction_table(told)],
                    text="Each was written before its run began, unless the run was there already."),
        PageSection("Models", tables=[member_table(members, found)],
                    text=f"Sizes count the parameters of the trunk that one token meets; rates: {rates}.")]
    return render_page("Scaling ladder", recipe, "",
                       [Chapter(recipe, f"{len(members)} runs", [], sections)])


def member_table(members: Sequence[Member], found: Sequence[Point]) -> PageTable:
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
    return PageTable(["run", "parameters", "width x layers", "heads", "inner width", "tokens",
                      "steps of samples", "rate", "rate of matrices", "held-out loss"], rows)


def prediction_table(told: Sequence[LadderText]) -> PageTable:
    rows = [[t.name, large(t.num_params), large(t.num_tokens), spelled(t.predicted),
             time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(t.made_s)),
             "–" if t.measured is None else f"{t.measured:.4f}",
             "–" if t.error is None else f"{t.error:+.2%}",
             {None: "–", True: "inside", False: "outside"}[t.inside]] for t in told]
    return PageTable(["run", "parameters", "tokens", f"predicted loss ({CONFIDENCE:.0%} interval)", "written",
                      "measured", "error", "interval"], rows)


def law_tables(law: Law) -> list[PageTable]:
    """Return the law's parameters, each with its own interval."""
    rows = [[name, spelled(value)] for name, value in law.parameters().items()]
    return [PageTable([law.name, f"median ({CONFIDENCE:.0%} interval)"], rows)]


def spelled(value: Prediction) -> str:
    return f"{value.loss:.4g} ({value.low:.4g} to {value.high:.4g})"


def _chart(found: Sequence[Point], law: Law, told: Sequence[LadderText]) -> Chart:
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
