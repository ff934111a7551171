"""The pictures of a report's first screen: one line through all stages of a model, over the tokens that it
has seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from megatron_sov.pages.charts import Chart, chart, colour, plain
from megatron_sov.report.charts import MAX_WINDOW_STEPS, needle_map
from megatron_sov.report.run_data import Run
from megatron_sov.report.steps import Curve, downsample, moving_mean

HEIGHT_PX = 190
MAX_POINTS = 300
"""Points of one stage's line at most."""
Place = Callable[[Curve], npt.NDArray[np.float64]]
"""Where the points of a run's curve lie on the axis of all stages."""


def pictures(runs: list[Run]) -> list[Chart]:
    """Return at most three charts of a model's stages: the loss, the held-out figures, and the needles found
    last or, without any, the speed."""
    places = _places(runs)
    seen = "tokens" if all(run.curve("tokens") for run in runs) else "optimizer steps"
    needles = [(run.name, n) for run in runs for n in run.needles if n.get("cells")]
    third = (_needles(*needles[-1]) if needles
             else _by_stage(runs, places, "tokens_per_s", "Tokens per second.", seen))
    found = [_by_stage(runs, places, "loss", "Training loss, nats per token.", seen),
             _heldout(runs, places, seen), third]
    return [one for one in found if one]


def _places(runs: list[Run]) -> list[Place]:
    """Return one function for each run: a curve -> the tokens of all stages up to each of its points.

    Steps stand for tokens where a run has not recorded any.
    """
    by_tokens = all(run.curve("tokens") for run in runs)
    found: list[Place] = []
    before = 0.0
    for run in runs:
        counted = run.curve("tokens" if by_tokens else "loss")
        at = counted.steps if counted else np.zeros(1, np.int64)
        seen = counted.values if by_tokens and counted else at.astype(np.float64)
        # A measurement before the first step lies at the stage's beginning.
        found.append(partial(_place, np.append(0, at), before + np.append(0.0, seen)))
        before += float(seen[-1])
    return found


def _place(at: npt.NDArray[np.int64], seen: npt.NDArray[np.float64],
           curve: Curve) -> npt.NDArray[np.float64]:
    return np.interp(curve.steps, at, seen)


def _by_stage(runs: list[Run], places: list[Place], name: str, caption: str, seen: str) -> Chart | None:
    """Return the moving mean of one figure of the steps, each stage in its own colour."""
    figure = go.Figure()
    for i, (run, place) in enumerate(zip(runs, places, strict=True)):
        curve = run.curve(name)
        if curve is None or not len(curve.finite().steps):
            continue
        curve = curve.finite()
        window = min(MAX_WINDOW_STEPS, max(1, len(curve.steps) // 20))
        drawn = downsample(moving_mean(curve, window), MAX_POINTS)
        figure.add_trace(_line(place(drawn), drawn.values, run.name, i))
    return _small(figure, caption, seen)


def _heldout(runs: list[Run], places: list[Place], seen: str) -> Chart | None:
    """Return bits per byte of each source; a line goes on from stage to stage."""
    points: dict[str, list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]] = {}
    for run, place in zip(runs, places, strict=True):
        for source, heldout in run.heldout.items():
            curve = heldout.bits_per_byte.finite()
            if len(curve.steps):
                points.setdefault(source, []).append((place(curve), curve.values))
    figure = go.Figure()
    for i, (source, parts) in enumerate(points.items()):
        figure.add_trace(_line(np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]),
                               source, i))
    return _small(figure, "Held-out bits per byte of each source.", seen)


def _needles(stage: str, needle: dict[str, Any]) -> Chart:
    """Return the map of the test's first kind and language."""
    kind, language = (needle["cells"][0][name] for name in ("kind", "language"))
    figure = needle_map([c for c in needle["cells"] if (c["kind"], c["language"]) == (kind, language)])
    figure.update_layout(xaxis={"title": {"text": "context (tokens)", "standoff": 4}},
                         yaxis={"title": {"text": "depth", "standoff": 10}})
    return chart(figure, f"Needles found by {stage}: {kind}, {language}.", height_px=HEIGHT_PX, small=True)


def _line(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], name: str, i: int) -> go.Scatter:
    return go.Scatter(x=x.astype(np.float32), y=y.astype(np.float32), name=plain(name),
                      mode="lines+markers" if len(x) <= 20 else "lines", marker={"size": 5},
                      line={"color": colour(i), "width": 1.8})


def _small(figure: go.Figure, caption: str, seen: str) -> Chart | None:
    """Return the chart; its caption names what goes upwards, so that no title stands beside the axis."""
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": {"text": seen, "standoff": 4}, "nticks": 6})
    return chart(figure, caption, height_px=HEIGHT_PX, small=True)
