"""Charts of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import Chart
from megatron_sov.base.pages.plots import Axis, HeatMap, LinePlot, Series, series_colour
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import (
    Curve, curves, downsample, moving_mean, needle_curves, pair_curves)
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.work.clusters.units import GIB

PER_TOKEN = "nats per token"
LOSSES = {"lm": PER_TOKEN, "sft": PER_TOKEN, "distill": "distillation loss", "preference": "preference loss",
          "policy": "policy loss"}
"""Built-in objective -> what its training loss is measured in."""
MAX_POINTS, MAX_POINTS_OF_SEVERAL = 200, 120
"""Points of a curve that is alone in its chart, and of one of several curves, at most."""
SMOOTH_FROM_STEPS = 50
"""Shorter curves are drawn as they are; longer ones also as a moving mean over a fiftieth of the steps."""
MAX_PHASES = 24
"""Phases that are marked; rounds of reinforcement learning are phases too, and may be hundreds."""
MAX_WINDOW_STEPS = 500
"""Longest moving mean; a wider one would smooth away what happens in a morning."""


OVERVIEW_PART, OVERVIEW_HEIGHT_PX = 20, 150
"""Of a small chart: the part of its steps that a moving mean is over, and its height."""
PART = 50
"""The part of a line's steps that a moving mean is over in a chart of full size."""
STEP = "optimizer step"
Place = Callable[[Curve], npt.NDArray[Any]]
"""Where the points of a curve are on a chart's axis."""


# Columns of the step events that have a chart: declared once for the report and comparisons.


@dataclass(frozen=True)
class StepLine:
    """A column of the step events, as pages draw it."""

    column: str
    unit: str
    """Title of the axis."""
    caption: str
    scale: float = 1.0
    """What the column's values are multiplied with to be in the unit."""
    smooth: bool = True
    """Whether a moving mean is drawn."""


LEARNING = (StepLine("lr", "learning rate", "Learning rate.", smooth=False),
            StepLine("grad_norm", "gradient norm", "Global gradient norm, before clipping."))
SPEED = (
    StepLine("tokens_per_s", "tokens per second", "Tokens per second, all processes together."),
    StepLine("mfu", "share", "Model FLOPs utilisation: the share of the GPU's peak."),
    StepLine("peak_memory_bytes", "GiB", "Most memory that process 0 has had, on its GPU or the host.",
             1 / GIB, smooth=False))


@dataclass(frozen=True)
class DrawnLine:
    """One line of a chart."""

    name: str
    curve: Curve
    place: Place = field(default=lambda curve: curve.steps)


def step_charts(run: Run, declared: Sequence[StepLine]) -> list[Chart]:
    """Return a chart for each declared column that a run has, with its phases and restarts."""
    charts = [draw_lines([DrawnLine(run.name, curve.times(one.scale))], one.unit, one.caption,
                         smooth=one.smooth, run=run)
              for one in declared if (curve := run.curve(one.column)) is not None]
    return [c for c in charts if c]


def by_tokens(run: Run, before: float = 0.0) -> Place:
    """Return what places a run's points over the tokens that it has seen, behind those of earlier stages."""
    tokens = run.curve("tokens")
    # a measurement before the first step is at the beginning
    steps = np.append(0, tokens.steps) if tokens else np.zeros(1)
    seen = before + np.append(0.0, tokens.values if tokens else np.empty(0))
    return lambda curve: np.interp(curve.steps, steps, seen)


def loss_unit(run: Run) -> str:
    """Return what a run's training loss is measured in: nats per token if it learns by cross-entropy."""
    name = str(run.setting("objective", "name") or "lm")
    return LOSSES.get(name, f"loss of {name}")


def _window(num_steps: int, part: int) -> int:
    return min(MAX_WINDOW_STEPS, max(5, num_steps // part))


def _series(curve: Curve, name: str, stroke: str, place: Place, most: int, *, is_faint: bool = False
            ) -> tuple[Series, list[str]]:
    """Return a line of at most `most` points and notes about the points that it leaves out."""
    drawn, notes = downsample(curve, most), []
    if len(drawn.steps) < len(curve.steps):
        notes.append(f"{len(drawn.steps):,} of {len(curve.steps):,} points: the lowest and highest of each "
                     "stretch.")
    return Series(name, place(drawn).tolist(), drawn.values.tolist(), stroke, is_faint=is_faint), notes


def _line_series(line: DrawnLine, stroke: str, *, alone: bool, smooth: bool, small: bool
                 ) -> tuple[list[Series], list[str]]:
    """Return a line's values, their moving mean, or both where there is no other line; and notes."""
    finite = line.curve.finite()
    most = MAX_POINTS if alone and smooth and not small else MAX_POINTS_OF_SEVERAL
    notes: list[str] = []
    if (missing := len(line.curve.steps) - len(finite.steps)) and not small:
        first = int(line.curve.steps[~np.isfinite(line.curve.values)][0])
        whose = "" if alone else f" of {line.name}"
        notes.append(f"{missing:,} values{whose} are not finite and not drawn (first at step {first:,}).")
    if not smooth or len(finite.steps) < SMOOTH_FROM_STEPS:
        series, found = _series(finite, line.name, stroke, line.place, most)
        return [series], notes + found
    window = _window(len(finite.steps), OVERVIEW_PART if small else PART)
    mean = moving_mean(finite, window)
    if not alone or small:
        series, found = _series(mean, line.name, stroke, line.place, most)
        return [series], [*notes, *([] if small else [f"Each line is a moving mean over {window:,} steps."]),
                          *found]
    raw, found = _series(finite, "each step", stroke, line.place, most, is_faint=True)
    series, _ = _series(mean, f"mean of {window:,} steps", stroke, line.place, most // 2)
    return [raw, series], [*notes, *found]


def draw_lines(lines: Sequence[DrawnLine], unit: str, caption: str, *, axis: str = STEP,
               smooth: bool = False, run: Run | None = None,
               small: bool = False, height_px: int = OVERVIEW_HEIGHT_PX,
               bands: Sequence[tuple[str, float, float]] = ()) -> Chart | None:
    """Return a chart of lines; None where there is nothing to draw.

    Args:
        lines: one for each colour.
        unit: title of the upward axis; a small chart's caption names it.
        caption: one sentence below the chart.
        axis: title of the other one.
        smooth: draw moving means.
        run: whose phases and restarts are behind the lines; None: of no run.
        small: for a page's first screen.
        height_px: height of a small chart.
        bands: name, first and last value of stretches of the axis; those of `run` by default.
    """
    lines = [line for line in lines if len(line.curve.finite().steps)]
    if not lines:
        return None
    series: list[Series] = []
    notes: list[str] = []
    for i, line in enumerate(lines):
        drawn, found = _line_series(line, series_colour(i), alone=len(lines) == 1, smooth=smooth, small=small)
        series += drawn
        notes += found
    up = _share_axis(unit, series) if unit == "share" else Axis("" if small else unit)
    if small:
        return Chart(LinePlot(series, Axis(axis), up, height_px, bands), caption)
    rules: list[tuple[str, float]] = []
    if run is not None:
        bands, rules = _phase_bands(run.phases), _restart_rules(run)
    return Chart(LinePlot(series, Axis(axis), up, bands=bands, rules=rules), caption,
                 " ".join(dict.fromkeys(notes)))


def _share_axis(title: str, series: Sequence[Series]) -> Axis:
    most = max(max(one.y) for one in series)
    return Axis(title, low=0.0, high=1.0 if 0.5 <= most <= 1 else None, is_share=True)


def _curves(curves: Sequence[Curve], unit: str, caption: str, run: Run, *, smooth: bool = False
            ) -> Chart | None:
    """Return a chart of one run's curves over its steps; None where there is nothing to draw."""
    return draw_lines([DrawnLine(curve.name, curve) for curve in curves], unit, caption, smooth=smooth,
                      run=run)


def _phase_bands(phases: list[tuple[str, int, int]]) -> list[tuple[str, float, float]]:
    """Return name, first step and end of each phase; nothing for one phase or too many."""
    if not 2 <= len(phases) <= MAX_PHASES:
        return []
    ends = [first for _, first, _ in phases[1:]] + [phases[-1][2]]
    return [(name, first, end) for (name, first, _), end in zip(phases, ends, strict=True)]


def _restart_rules(run: Run) -> list[tuple[str, float]]:
    """Return the last step of each attempt that another one followed."""
    return [("restart", attempt.last_step) for attempt in run.attempts[:-1] if attempt.last_step is not None]


def loss_charts(run: Run) -> list[Chart]:
    """Return the training loss, its terms where there are several, and the loss of each source."""
    total, terms, sources = run.curve("loss"), run.curves["losses"], run.curves["losses_by_source"]
    unit = f"loss ({loss_unit(run)})"
    charts = [_curves([total] if total else [], unit,
                      "Training loss. Phases are shaded; a dotted line marks a restart.", run, smooth=True)]
    if len(terms) > 1:
        charts.append(_curves(list(terms.values()), "loss", "The terms of the training loss.", run,
                              smooth=True))
    if len(sources) > 1:
        charts.append(_curves(list(sources.values()), unit, "Training loss of each source.", run,
                              smooth=True))
    return [c for c in charts if c]


def meter_charts(run: Run) -> list[Chart]:
    charts = [_curves([curve], name, f"{name}, mean of each step's batch.", run, smooth=True)
              for name, curve in run.curves["meters"].items()]
    return [c for c in charts if c]


def heldout_charts(run: Run) -> list[Chart]:
    """Return the held-out bits per byte of each source, or their loss if bytes are unknown."""
    bits = [h.bits_per_byte for h in run.heldout.values()]
    if len(bits) > 1 and run.overall_bits_per_byte:
        bits.append(run.overall_bits_per_byte)
    drawn = _curves(bits, "bits per byte", "Bits per byte on held-out documents, which training never sees; "
                    "comparable between tokenizers.", run)
    drawn = drawn or _curves([h.loss for h in run.heldout.values()], "loss (nats per token)",
                             "Loss on held-out documents, which training never sees.", run)
    return [drawn] if drawn else []


def beside_charts(run: Run) -> list[Chart]:
    """Return what judges beside training found over the run."""
    charts = [_curves(curves(run.evaluations, "bits_per_byte"), "bits per byte",
                      "Bits per byte of the exports.", run),
              _curves(needle_curves(run.evaluations), "% right",
                      "Needles found by the exports, over all lengths and depths.", run),
              _curves(pair_curves(run.evaluations), "% right",
                      "Held-out pairs whose better response the exports would rather write.", run)]
    return [c for c in charts if c]


def needle_charts(needle: dict[str, Any]) -> list[Chart]:
    """Return a heat map depth x length of the share of right answers, for each kind and
    language of a needle test."""
    maps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in needle["cells"]:
        maps.setdefault((str(cell["kind"]), str(cell["language"])), []).append(cell)
    when = {"before": "Before the extension", "after": "After the extension"}.get(
        str(needle.get("when")), "Needle retrieval")
    return [_needle_chart(cells, f"{when}, step {int(needle.get('step') or 0):,}: {kind}, {language}")
            for (kind, language), cells in maps.items()]


def _needle_chart(cells: list[dict[str, Any]], caption: str) -> Chart:
    fewest = int(min(parse_number(c["samples"]) for c in cells))
    score = float(np.mean([parse_number(c["correct"]) / parse_number(c["samples"]) for c in cells]))
    return Chart(needle_map(cells), f"{caption}, {fewest:,} samples a cell; {format_share(score)} right.")


def needle_map(cells: list[dict[str, Any]]) -> HeatMap:
    """Return the map of one kind and language; a cell shows its share of right answers and, under the
    pointer, counts and interval."""
    lengths = sorted({int(c["length_tokens"]) for c in cells})
    depths = sorted({float(c["depth"]) for c in cells})
    shares = [[math.nan] * len(lengths) for _ in depths]
    shown, notes = ([[""] * len(lengths) for _ in depths] for _ in range(2))
    for cell in cells:
        row, column = depths.index(float(cell["depth"])), lengths.index(int(cell["length_tokens"]))
        correct, samples = parse_number(cell["correct"]), parse_number(cell["samples"])
        low, high = (parse_number(end) for end in cell["interval"])
        shares[row][column] = correct / samples
        shown[row][column] = format_share(correct / samples)
        notes[row][column] = (f"{correct:.0f} of {samples:.0f} right, 95 % interval {format_share(low)} to "
                              f"{format_share(high)}; {parse_number(cell['distractors']):,.0f} other needles")
    return HeatMap([format_share(depth) for depth in depths], [f"{n:,}" for n in lengths], shares, 0.0, 1.0,
                   "depth of the needle", "context (tokens)", shown=shown, notes=notes)
