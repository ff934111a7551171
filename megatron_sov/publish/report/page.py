"""Render the report on a model's training runs as a single HTML file without external resources."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import Chapter, Chart, Comparison, PageTable, Panel, render_page
from megatron_sov.base.pages.plots import Axis, LinePlot, series_colour
from megatron_sov.publish.report.charts import build_series
from megatron_sov.publish.report.outcomes import (
    build_gain_tables, build_verdict_sentence, build_verdict_tables)
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.sections import MAX_SAMPLES, build_sections, cut_lines, list_key_figures
from megatron_sov.publish.report.steps import Curve, get_last_value

MAX_CHARACTERS = 600
"""Longer prompts and responses are cut."""
NUM_OPEN_SAMPLES = 5
"""Samples visible without a click."""
HELDOUT_HEIGHT_PX = 180


def render_report(runs: list[Run], now_s: float | None = None) -> str:
    """Return the HTML report on the model in `runs[0]`.

    Args:
        runs: results from `read_run`, in reading order; of runs of other models only the names are shown.
        now_s: Unix time shown as the creation time; None: now.
    """
    stages, excluded = split_by_model(runs)
    recipe = next((run.recipe_name for run in stages if run.recipe_name), "")
    names = " + ".join(run.name for run in stages)
    subtitle = f"{_build_subtitle(stages)} {_describe_excluded(excluded)}".strip()
    return render_page("Training report", f"{recipe}: {names}" if recipe else names, subtitle,
                       [_build_chapter(run, stages) for run in stages],
                       verdict=build_verdict_sentence(stages), opening=build_opening(stages),
                       overview=("All stages", _build_overview(stages)) if len(stages) > 1 else None,
                       anchor="run", nothing="This run has recorded nothing yet.", now_s=now_s)


def split_by_model(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Split runs into stages of the first run's model, and runs of different models.

    `run_start` records no parent run, so compare what no stage changes: family and number of parameters.
    Unrecorded values match any value.
    """
    identities = [(run.get_setting("model", "family"), run.get_start_field("num_params")) for run in runs]
    stages: list[Run] = []
    excluded: list[Run] = []
    for run, identity in zip(runs, identities, strict=True):
        pairs = zip(identity, identities[0], strict=True)
        is_same = all(value == first or value is None or first is None for value, first in pairs)
        (stages if is_same else excluded).append(run)
    return stages, excluded


def _describe_excluded(runs: list[Run]) -> str:
    if not runs:
        return ""
    names = ", ".join(f"{run.name} ({run.recipe_name or 'unknown recipe'})" for run in runs)
    return f"Not in this report, because another model was trained: {names}; report such runs alone."


def _build_chapter(run: Run, stages: list[Run]) -> Chapter:
    # The first screen shows the samples of the last stage that has any.
    last = next((stage for stage in reversed(stages) if stage.samples), None)
    excluded = ("Samples",) if run is last else ()
    return Chapter(run.name, run.recipe_name, list_key_figures(run), build_sections(run, excluded))


def _build_subtitle(runs: list[Run]) -> str:
    params, active = (_find_start_field(runs, name) for name in ("num_params", "num_active_params"))
    tokens = _count_tokens(runs)
    parts = []
    if params:
        parts.append(f"A model of {format_count(params)} parameters")
        if active:
            parts[0] += f", {format_count(active)} of them active for each token"
        if tokens:
            parts[0] += f", trained on {format_count(tokens)} tokens"
    last_s = max((attempt.last_time_s for run in runs for attempt in run.attempts), default=0.0)
    if last_s > 0:
        parts.append(f"last event {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(last_s))}")
    return "; ".join(parts) + "." if parts else ""


def _find_start_field(runs: list[Run], name: str) -> Any:
    """Return a `run_start` field from the last run that has it, or None."""
    values = [run.get_start_field(name) for run in runs]
    return next((value for value in reversed(values) if value), None)


def _count_tokens(runs: list[Run]) -> float:
    """Sum the last `tokens` in `step` events over runs; runs without `tokens` add nothing."""
    counts = [get_last_value(run.get_curve("tokens")) for run in runs]
    return sum(count for count in counts if not np.isnan(count))


def _build_overview(runs: list[Run]) -> PageTable:
    """Return a row per run: `objective.name`, size, time, results and `Attempt.outcome`."""
    rows = []
    for run in runs:
        loss, tokens = run.get_curve("loss"), _count_tokens([run])
        rows.append([run.name, str(run.get_setting("objective", "name") or "–"),
                     f"{int(loss.steps[-1]):,}" if loss else "–", format_count(tokens) if tokens else "–",
                     format_duration(run.wall_time_s), format_value(get_last_value(loss)),
                     format_value(get_last_value(run.overall_bits_per_byte)),
                     run.attempts[-1].outcome if run.attempts else "–"])
    return PageTable(["run", "objective", "steps", "tokens", "wall time", "last loss",
                      "held-out bits per byte", "outcome"], rows)


# The first screen.


def build_opening(runs: list[Run]) -> list[Panel]:
    """Return the first screen's `Panel`s, without empty panels."""
    samples = _list_samples(runs)
    panels = [
        Panel("Held-out quality", 12, charts=_draw_heldout(runs)),
        Panel("What it writes", 12, comparisons=samples[:NUM_OPEN_SAMPLES], more=samples[NUM_OPEN_SAMPLES:]),
        Panel("Gain of each stage" if len(runs) > 1 else "Gain", 12, tables=build_gain_tables(runs)),
        Panel("Verdicts", 12, tables=build_verdict_tables(runs))]
    return [panel for panel in panels if not panel.is_empty]


def _draw_heldout(runs: list[Run]) -> list[Chart]:
    """Draw `bits_per_byte` over all stages, a line per held-out source and a band per stage.

    The x axis counts tokens, or optimizer steps if a run has no `tokens`.
    """
    has_tokens = all(run.get_curve("tokens") for run in runs)
    parts: dict[str, list[Curve]] = {}
    bands: list[tuple[str, float, float]] = []
    start = 0.0
    for run in runs:
        tokens, loss = run.get_curve("tokens") if has_tokens else None, run.get_curve("loss")
        for source, heldout in run.heldout.items():
            curve = heldout.bits_per_byte.drop_nonfinite()
            if len(curve.steps):
                x = start + _convert_steps(curve.steps, tokens)
                parts.setdefault(source, []).append(Curve(source, x, curve.values))
        if loss is not None and len(loss.steps):
            low = bands[-1][2] if bands else 0.0
            bands.append((run.name, low, start + float(_convert_steps(loss.steps, tokens)[-1])))
        if tokens:
            start += float(tokens.values[-1])
        elif loss:
            start += float(loss.steps[-1])
    if not parts:
        return []
    curves = []
    for source, run_curves in parts.items():
        curves.append(Curve(source, np.concatenate([curve.steps for curve in run_curves]),
                            np.concatenate([curve.values for curve in run_curves])))
    plot = LinePlot([build_series(curve, series_colour(i)) for i, curve in enumerate(curves)],
                    Axis("tokens" if has_tokens else "optimizer steps"), Axis(), HELDOUT_HEIGHT_PX,
                    bands if len(bands) > 1 else ())
    return [Chart(plot, "Held-out bits per byte of each source over all stages; lower is better.")]


def _convert_steps(steps: npt.NDArray[np.int64], tokens: Curve | None) -> npt.NDArray[Any]:
    """Return the trained tokens at each step; without a token curve, the steps themselves."""
    if tokens is None:
        return steps
    # An evaluation before the first step is at the beginning.
    return np.interp(steps, np.append(0, tokens.steps), np.append(0.0, tokens.values))


def _list_samples(runs: list[Run]) -> list[Comparison]:
    """Return the last stage's `sample` events; prompts from the first stage come first, with both texts."""
    sampled = [run for run in runs if run.samples]
    if not sampled:
        return []
    first, last = sampled[0], sampled[-1]
    previous = {str(sample.get("prompt")): sample for sample in first.samples} if first is not last else {}
    ranked = sorted(last.samples, key=lambda sample: str(sample.get("prompt")) not in previous)
    comparisons = []
    for sample in ranked[:MAX_SAMPLES]:
        label = _format_origin(last)
        texts = [(f"After: {label}" if previous else label, _cut_text(sample.get("text")))]
        if earlier := previous.get(str(sample.get("prompt"))):
            texts.insert(0, (f"Before: {_format_origin(first)}", _cut_text(earlier.get("text"))))
        if sample.get("target"):
            texts.append(("Expected", _cut_text(sample.get("target"))))
        comparisons.append(Comparison(_cut_text(sample.get("prompt")), texts))
    return comparisons


def _format_origin(run: Run) -> str:
    return f"{run.name}, step {int(run.samples[0].get('step') or 0):,}"


def _cut_text(text: Any) -> str:
    return cut_lines("" if text is None else str(text).strip(), MAX_CHARACTERS)
