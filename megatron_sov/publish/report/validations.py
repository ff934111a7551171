"""What a run of reinforcement learning was asked beside its training, and how its policy answers: validations
on held-out prompts, and samples of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import Chart, PageTable, build_tables
from megatron_sov.publish.report.charts import DrawnLine, draw_lines
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import Curve, sorted_curve
from megatron_sov.runs.obs.events import final_step_events
from megatron_sov.runs.obs.figures import field_formatter, parse_number
from megatron_sov.runs.obs.validation import (
    RESPONSE_COLUMNS, VALIDATION, extract_curves, read_pass_at_k, response_rows)

MAX_LINES = 8
"""Of a chart."""
MAX_VALIDATIONS = 50
"""Rows of the table, the newest."""
REWARD, LENGTH, TRUNCATED, PASS, COMPONENT, DOMAIN = (
    "reward", "response_tokens", "truncated", "pass_at_", "component/", "domain/")
"""Names, or beginnings of names, of curves."""


def validation_curves(run: Run) -> dict[str, Curve]:
    """Return the curves of a run's validations over its steps."""
    found: dict[str, dict[int, float]] = {}
    for event in final_step_events(run.of(VALIDATION), VALIDATION):
        for name, value in extract_curves(event).items():
            found.setdefault(name, {})[int(event["step"])] = value
    return {name: sorted_curve(name, by_step) for name, by_step in found.items()}


def validation_charts(run: Run) -> list[Chart]:
    """Return reward and its components, pass@k, domains and lengths of a run's validations."""
    curves = validation_curves(run)

    def drawn(names: Sequence[str], unit: str, caption: str) -> Chart | None:
        lines = [DrawnLine(name.rpartition("/")[2] if name.startswith(COMPONENT) else _title(name),
                           curves[name]) for name in names[:MAX_LINES] if name in curves]
        return draw_lines(lines, unit, caption, run=run)

    def named(begin: str, end: str = "") -> list[str]:
        return [name for name in curves if name.startswith(begin) and name.endswith(end)]

    found = [
        drawn([REWARD, *named(COMPONENT)], REWARD,
              "Mean reward on held-out prompts, and the parts that it is made of."),
        drawn(named(PASS), "share", "The share of held-out prompts of which one at least of k responses is "
                                    "right, without bias."),
        drawn(named(DOMAIN, f"/{REWARD}"), REWARD, "Mean reward on held-out prompts, by domain."),
        drawn([LENGTH], "tokens", "Mean length of responses to held-out prompts."),
        drawn([TRUNCATED], "share", "Share of these that were as long as allowed and did not end.")]
    return [one for one in found if one is not None]


def _title(name: str) -> str:
    if name.startswith(PASS):
        return f"pass@{name.removeprefix(PASS)}"
    return name.removeprefix(DOMAIN).removesuffix(f"/{REWARD}").replace("_", " ")


def validation_tables(run: Run) -> list[PageTable]:
    """Return a row for each of the newest validations, and one for each domain of the last."""
    events = final_step_events(run.of(VALIDATION), VALIDATION)
    if not events:
        return []
    return build_tables(events[-MAX_VALIDATIONS:], {
        "step": field_formatter("step", ",.0f"), "prompts": field_formatter("num_prompts", ",.0f"),
        "responses": field_formatter("num_samples", ",.0f"),
        "mean reward": field_formatter("reward", ".4f", "–"),
        "pass@k (95 %)": _told_passes, "mean tokens": field_formatter("response_tokens", ",.1f"),
        "did not end": field_formatter("truncated", format_share)})


def _told_passes(figures: dict[str, Any]) -> str:
    ends = {int(parse_number(one.get("k"))): one.get("interval") or [0, 0]
            for one in figures.get("pass_at_k") or []}
    shown = {k: [format_share(parse_number(one)) for one in (value, *ends[k][:2])]
             for k, value in read_pass_at_k(figures).items()}
    return "; ".join(f"{k}: {value} ({low} to {high})" for k, (value, low, high) in shown.items()) or "–"


def sample_tables(run: Run) -> list[PageTable]:
    """Return samples of the newest round, and of the newest validation."""
    return [PageTable([f"{name} ({event['of']} at step {int(event['step']):,})" if not i else name
                       for i, name in enumerate(RESPONSE_COLUMNS)],
                      [["–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
                        for cell in row] for row in response_rows(event)])
            for event in run.responses.values()]
