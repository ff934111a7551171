"""Charts and tables for RL runs: rounds, validations on held-out prompts, and sampled responses."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import Chart, PageTable, build_tables
from megatron_sov.publish.report.charts import draw_curves
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import Curve, build_curve
from megatron_sov.runs.obs.events import final_step_events
from megatron_sov.runs.obs.figures import NumberFormat, field_formatter, parse_number
from megatron_sov.runs.obs.validation import (
    RESPONSE_COLUMNS, VALIDATION, extract_curves, read_pass_at_k, response_rows)
from megatron_sov.runs.rounds import TRAINED_GROUPS

MAX_COMPONENTS, MAX_LINES = 12, 8
"""Curves in a chart of rounds, and of validations."""
MAX_ROUNDS, MAX_VALIDATIONS = 40, 50
"""Rows in the tables, the newest ones."""
REWARD, LENGTH, TRUNCATED, PASS, COMPONENT, DOMAIN = (
    "reward", "response_tokens", "truncated", "pass_at_", "component/", "domain/")
"""Names and prefixes of curves in `extract_curves`."""
Event = dict[str, Any]


def draw_round_charts(run: Run) -> list[Chart]:
    """Return charts over `Run.rounds`: `reward` with components, `response_tokens`, `truncated`, groups."""
    means = [content["means"] for content in run.rounds]
    groups = [content.get("groups") or {} for content in run.rounds]
    components = [mean.get("components") or {} for mean in means]
    counts = Counter(name for row in components for name in row)
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_COMPONENTS]
    rounds = np.array([int(parse_number(content["round"])) for content in run.rounds], np.int64)

    def draw(names: Iterable[str], rows: list[Event], unit: str, caption: str, default: float | None = None
             ) -> list[Chart]:
        # A round without the value has no point.
        curves = [Curve(name, rounds, np.array([parse_number(row.get(name, default)) for row in rows])
                        ).drop_nonfinite() for name in names]
        return draw_curves(curves, unit, caption, x_title="round")

    rewards = [{REWARD: mean.get(REWARD)} | row for mean, row in zip(means, components, strict=True)]
    lengths = [{"tokens": mean.get(LENGTH)} for mean in means]
    return [
        *draw(dict.fromkeys([REWARD, *frequent]), rewards, REWARD,
              "Mean reward of a round's responses, and the parts that it is made of."),
        *draw(["tokens"], lengths, "tokens", "Mean length of responses, in tokens that the policy wrote."),
        *draw([TRUNCATED], means, "share",
              "Share of responses that were as long as allowed and did not end."),
        *draw(sorted({reason for row in groups for reason in row}), groups, "groups",
              "What became of each group of responses.", default=0)]


def build_round_tables(run: Run) -> list[PageTable]:
    """Return a row per round, for the newest `MAX_ROUNDS`."""
    def format_counts(counts: Event | None) -> str:
        untrained = {name: count for name, count in (counts or {}).items() if name != TRAINED_GROUPS}
        return ", ".join(f"{name} {parse_number(untrained[name]):,.0f}" for name in sorted(untrained)) or "–"

    def format_mean(name: str, form: NumberFormat) -> Callable[[Event], str]:
        return lambda content: field_formatter(name, form, "–")(content["means"])

    def format_trained(content: Event) -> str:
        groups = content.get("groups") or {}
        return f"{parse_number(groups.get(TRAINED_GROUPS, 0)):,.0f}"

    return build_tables(run.rounds[-MAX_ROUNDS:], {
        "round": field_formatter("round", ",.0f"), "judged responses": format_mean("responses", ",.0f"),
        "mean reward": format_mean(REWARD, ".4f"), "pass rate": format_mean("pass_rate", format_share),
        "mean tokens": format_mean(LENGTH, ",.1f"), "did not end": format_mean(TRUNCATED, format_share),
        "groups that learn": format_trained,
        "groups that do not": lambda content: format_counts(content.get("groups")),
        "without a reward": lambda content: format_counts(content.get("unjudged"))})


def extract_validation_curves(run: Run) -> dict[str, Curve]:
    """Return name -> curve over steps for a run's validations, see `extract_curves`."""
    values: dict[str, dict[int, float]] = {}
    for event in final_step_events(run.get_events(VALIDATION), VALIDATION):
        for name, value in extract_curves(event).items():
            values.setdefault(name, {})[int(event["step"])] = value
    return {name: build_curve(name, by_step) for name, by_step in values.items()}


def draw_validation_charts(run: Run) -> list[Chart]:
    """Return charts over steps: `reward` with components, pass@k, domains, `response_tokens`, `truncated`."""
    curves = extract_validation_curves(run)

    def draw(names: Sequence[str], unit: str, caption: str) -> list[Chart]:
        drawn = [Curve(_format_curve_name(name), curves[name].steps, curves[name].values)
                 for name in names[:MAX_LINES] if name in curves]
        return draw_curves(drawn, unit, caption, run)

    def find_names(prefix: str, suffix: str = "") -> list[str]:
        return [name for name in curves if name.startswith(prefix) and name.endswith(suffix)]

    return [
        *draw([REWARD, *find_names(COMPONENT)], REWARD,
              "Mean reward on held-out prompts, and the parts that it is made of."),
        *draw(find_names(PASS), "share", "Unbiased estimate of pass@k: the share of held-out prompts with at "
                                         "least one correct response among k."),
        *draw(find_names(DOMAIN, f"/{REWARD}"), REWARD, "Mean reward on held-out prompts, by domain."),
        *draw([LENGTH], "tokens", "Mean length of responses to held-out prompts."),
        *draw([TRUNCATED], "share",
              "Share of responses to held-out prompts that were as long as allowed and did not end.")]


def _format_curve_name(name: str) -> str:
    if name.startswith(COMPONENT):
        return name.rpartition("/")[2]
    if name.startswith(PASS):
        return f"pass@{name.removeprefix(PASS)}"
    return name.removeprefix(DOMAIN).removesuffix(f"/{REWARD}").replace("_", " ")


def build_validation_tables(run: Run) -> list[PageTable]:
    """Return a row per `validation` event, for the newest `MAX_VALIDATIONS`."""
    events = final_step_events(run.get_events(VALIDATION), VALIDATION)
    return build_tables(events[-MAX_VALIDATIONS:], {
        "step": field_formatter("step", ",.0f"), "prompts": field_formatter("num_prompts", ",.0f"),
        "responses": field_formatter("num_samples", ",.0f"),
        "mean reward": field_formatter(REWARD, ".4f", "–"), "pass@k (95 %)": _format_pass_at_k,
        "mean tokens": field_formatter(LENGTH, ",.1f"),
        "did not end": field_formatter(TRUNCATED, format_share)})


def _format_pass_at_k(event: Event) -> str:
    intervals = {int(parse_number(row.get("k"))): row.get("interval") or [0, 0]
                 for row in event.get("pass_at_k") or []}
    parts = []
    for k, value in read_pass_at_k(event).items():
        share, low, high = (format_share(parse_number(end)) for end in (value, *intervals[k][:2]))
        parts.append(f"{k}: {share} ({low} to {high})")
    return "; ".join(parts) or "–"


def build_response_tables(run: Run) -> list[PageTable]:
    """Return sampled responses from `Run.responses`: the newest round and the newest validation."""
    tables = []
    for event in run.responses.values():
        first, *columns = RESPONSE_COLUMNS
        rows = [[_format_cell(cell) for cell in row] for row in response_rows(event)]
        tables.append(PageTable([f"{first} ({event['of']} at step {int(event['step']):,})", *columns], rows))
    return tables


def _format_cell(cell: Any) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
