"""Draw a run's curves over optimizer steps, and needle tests as heat maps."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import Chart
from megatron_sov.base.pages.plots import Axis, HeatMap, LinePlot, Series, series_colour
from megatron_sov.publish.report.evaluations import extract_needle_curves, extract_source_curves
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import Curve, compute_moving_mean, downsample
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.work.clusters.units import GIB

PER_TOKEN = "nats per token"
LOSS_UNITS = {"lm": PER_TOKEN, "sft": PER_TOKEN, "distill": "distillation loss",
              "preference": "preference loss", "policy": "policy loss"}
"""Built-in objective -> unit of its training loss."""
MAX_POINTS, MAX_LINE_POINTS = 200, 120
"""Maximum points of a curve: smoothed and alone in its chart, and in other charts (`downsample`)."""
MIN_SMOOTHED_STEPS = 50
"""Curves with fewer points get no moving mean."""
MIN_WINDOW_STEPS, MAX_WINDOW_STEPS, NUM_WINDOWS = 5, 500, 50
"""A moving mean covers a fiftieth of the steps, within limits: a wider mean hides events of a few hours."""
MAX_PHASES = 24
"""Maximum phases to mark: each RL round is a phase, and a run may have hundreds."""
NEEDLE_TITLES = {"before": "Before the extension", "after": "After the extension"}


@dataclass(frozen=True)
class StepField:
    """A field in `step` events with its own chart, listed in `steps.SCALAR_FIELDS`."""

    name: str
    unit: str
    """Axis title."""
    caption: str
    factor: float = 1.0
    """Converts the field to `unit`."""
    is_smoothed: bool = True


LEARNING = (StepField("lr", "learning rate", "Learning rate.", is_smoothed=False),
            StepField("grad_norm", "gradient norm", "Global gradient norm, before clipping."))
SPEED = (
    StepField("tokens_per_s", "tokens per second", "Tokens per second, all processes together."),
    StepField("mfu", "share", "Model FLOPs utilisation: the share of the GPU's peak."),
    StepField("peak_memory_bytes", "GiB", "Most memory that process 0 has had, on its GPU or the host.",
              1 / GIB, is_smoothed=False))


def draw_curves(curves: Iterable[Curve], unit: str, caption: str, run: Run | None = None, *,
                x_title: str = "optimizer step", smooth: bool = False) -> list[Chart]:
    """Draw curves in a `Chart`; without finite values return [].

    Args:
        curves: a curve per colour.
        unit: title of the y axis; "share" writes percentages.
        caption: sentence below the chart.
        run: adds `phases` and restarts in the background; None: no background.
        x_title: title of the x axis.
        smooth: draw moving means.
    """
    curves = [curve for curve in curves if len(curve.drop_nonfinite().steps)]
    if not curves:
        return []
    series: list[Series] = []
    notes: list[str] = []
    for i, curve in enumerate(curves):
        curve_series, curve_notes = _draw_curve(curve, series_colour(i), alone=len(curves) == 1,
                                                smooth=smooth)
        series += curve_series
        notes += curve_notes
    y_axis = Axis(unit)
    if unit == "share":
        maximum = max(max(line.y) for line in series)
        y_axis = Axis(unit, low=0.0, high=1.0 if 0.5 <= maximum <= 1 else None, is_share=True)
    plot = LinePlot(series, Axis(x_title), y_axis)
    if run is not None:
        restarts = [("restart", attempt.last_step) for attempt in run.attempts[:-1]
                    if attempt.last_step is not None]
        plot = replace(plot, bands=_list_phase_bands(run.phases), rules=restarts)
    return [Chart(plot, caption, " ".join(dict.fromkeys(notes)))]


def _draw_curve(curve: Curve, colour: str, *, alone: bool, smooth: bool) -> tuple[list[Series], list[str]]:
    """Return a curve as series, and notes about omitted points.

    A smoothed curve has its values and its moving mean if it is alone, otherwise only the mean.
    """
    finite = curve.drop_nonfinite()
    max_points = MAX_POINTS if alone and smooth else MAX_LINE_POINTS
    notes = []
    if num_missing := len(curve.steps) - len(finite.steps):
        first = int(curve.steps[~np.isfinite(curve.values)][0])
        owner = "" if alone else f" of {curve.name}"
        notes.append(f"{num_missing:,} values{owner} are not finite and not drawn (first at step {first:,}).")
    if not smooth or len(finite.steps) < MIN_SMOOTHED_STEPS:
        return [build_series(finite, colour, max_points)], [*notes, *_describe_omission(finite, max_points)]
    window = min(MAX_WINDOW_STEPS, max(MIN_WINDOW_STEPS, len(finite.steps) // NUM_WINDOWS))
    mean = compute_moving_mean(finite, window)
    if not alone:
        notes.append(f"Each line is a moving mean over {window:,} steps.")
        return [build_series(mean, colour, max_points)], [*notes, *_describe_omission(mean, max_points)]
    values = replace(build_series(replace(finite, name="each step"), colour, max_points), is_faint=True)
    means = build_series(replace(mean, name=f"mean of {window:,} steps"), colour, max_points // 2)
    return [values, means], [*notes, *_describe_omission(finite, max_points)]


def build_series(curve: Curve, colour: str, max_points: int = MAX_LINE_POINTS) -> Series:
    drawn = downsample(curve, max_points)
    return Series(curve.name, drawn.steps.tolist(), drawn.values.tolist(), colour)


def _describe_omission(curve: Curve, max_points: int) -> list[str]:
    num_drawn, num_points = len(downsample(curve, max_points).steps), len(curve.steps)
    if num_drawn == num_points:
        return []
    return [f"{num_drawn:,} of {num_points:,} points: the lowest and highest of each stretch."]


def _list_phase_bands(phases: list[tuple[str, int, int]]) -> list[tuple[str, float, float]]:
    """Return (name, first step, end) per phase; nothing for a single phase or more than `MAX_PHASES`."""
    if not 2 <= len(phases) <= MAX_PHASES:
        return []
    ends = [first for _, first, _ in phases[1:]] + [phases[-1][2]]
    return [(name, first, end) for (name, first, _), end in zip(phases, ends, strict=True)]


def get_loss_unit(run: Run) -> str:
    """Return the training loss's unit by `objective.name`; `PER_TOKEN` for cross-entropy."""
    objective = str(run.get_setting("objective", "name") or "lm")
    return LOSS_UNITS.get(objective, f"loss of {objective}")


def draw_field_charts(run: Run, fields: Sequence[StepField]) -> list[Chart]:
    """Return a chart per field that the run's `step` events have."""
    charts = []
    for declared in fields:
        if (curve := run.get_curve(declared.name)) is not None:
            scaled = Curve(run.name, curve.steps, curve.values * declared.factor)
            charts += draw_curves([scaled], declared.unit, declared.caption, run, smooth=declared.is_smoothed)
    return charts


def draw_loss_charts(run: Run) -> list[Chart]:
    """Return charts for `loss`, and for `losses` and `losses_by_source` with several terms or sources."""
    total, terms, sources = run.get_curve("loss"), run.curves["losses"], run.curves["losses_by_source"]
    unit = f"loss ({get_loss_unit(run)})"
    charts = draw_curves([total] if total else [], unit,
                         "Training loss. Phases are shaded; a dotted line marks a restart.", run, smooth=True)
    if len(terms) > 1:
        charts += draw_curves(terms.values(), "loss", "The terms of the training loss.", run, smooth=True)
    if len(sources) > 1:
        charts += draw_curves(sources.values(), unit, "Training loss of each source.", run, smooth=True)
    return charts


def draw_meter_charts(run: Run) -> list[Chart]:
    return [chart for name, curve in run.curves["meters"].items() for chart in draw_curves(
        [curve], name, f"{name}, mean of each step's batch.", run, smooth=True)]


def draw_heldout_charts(run: Run) -> list[Chart]:
    """Return a chart with `bits_per_byte` per held-out source, or with `loss` if bytes are unknown."""
    bits = [source.bits_per_byte for source in run.heldout.values()]
    if len(bits) > 1 and run.overall_bits_per_byte:
        bits.append(run.overall_bits_per_byte)
    return draw_curves(
        bits, "bits per byte", "Bits per byte on held-out documents, which training never sees; "
        "comparable between tokenizers.", run) or draw_curves(
        [source.loss for source in run.heldout.values()], "loss (nats per token)",
        "Loss on held-out documents, which training never sees.", run)


def draw_evaluation_charts(run: Run) -> list[Chart]:
    """Return charts for `Run.evaluations`: `ppl`, `needle` and `pairs`."""
    return [*draw_curves(extract_source_curves(run.evaluations, "ppl", "bits_per_byte"), "bits per byte",
                         "Bits per byte of the exports.", run),
            *draw_curves(extract_needle_curves(run.evaluations), "% right",
                         "Needles found by the exports, over all lengths and depths.", run),
            *draw_curves(extract_source_curves(run.evaluations, "pairs", "chosen_likelier", 100), "% right",
                         "Held-out pairs whose better response the exports would rather write.", run)]


def draw_needle_charts(needle: dict[str, Any]) -> list[Chart]:
    """Return a heat map (depth x length) per kind and language in a `needle` event; a cell shows the fraction
    of correct answers and, under the pointer, counts and interval."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in needle["cells"]:
        groups.setdefault((str(cell["kind"]), str(cell["language"])), []).append(cell)
    title = NEEDLE_TITLES.get(str(needle.get("when")), "Needle retrieval")
    charts = []
    for (kind, language), cells in groups.items():
        num_samples = int(min(parse_number(cell["samples"]) for cell in cells))
        score = float(np.mean([parse_number(cell["correct"]) / parse_number(cell["samples"])
                               for cell in cells]))
        charts.append(Chart(_draw_needle_map(cells), (
            f"{title}, step {int(needle.get('step') or 0):,}: {kind}, {language}, {num_samples:,} samples a "
            f"cell; {format_share(score)} right.")))
    return charts


def _draw_needle_map(cells: list[dict[str, Any]]) -> HeatMap:
    lengths = sorted({int(cell["length_tokens"]) for cell in cells})
    depths = sorted({float(cell["depth"]) for cell in cells})
    shares = [[math.nan] * len(lengths) for _ in depths]
    texts = [[""] * len(lengths) for _ in depths]
    notes = [[""] * len(lengths) for _ in depths]
    for cell in cells:
        row, column = depths.index(float(cell["depth"])), lengths.index(int(cell["length_tokens"]))
        correct, samples = parse_number(cell["correct"]), parse_number(cell["samples"])
        low, high = (format_share(parse_number(end)) for end in cell["interval"])
        shares[row][column] = correct / samples
        texts[row][column] = format_share(correct / samples)
        notes[row][column] = (f"{correct:.0f} of {samples:.0f} right, 95 % interval {low} to {high}; "
                              f"{parse_number(cell['distractors']):,.0f} other needles")
    return HeatMap([format_share(depth) for depth in depths], [f"{length:,}" for length in lengths], shares,
                   0.0, 1.0, "depth of the needle", "context (tokens)", shown=texts, notes=notes)
