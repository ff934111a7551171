"""Charts and tables for scores from `eval lm` and for pass@k from `eval passk`."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.figures import format_share, format_value
from megatron_sov.base.pages.page import Chart, PageTable, build_tables
from megatron_sov.base.pages.plots import Axis, LinePlot, Series, series_colour
from megatron_sov.publish.report.run_data import Run
from megatron_sov.runs.obs.figures import field_formatter, parse_number, parse_whole_number

MAX_TASKS = 8
"""Tasks in a chart."""
MAX_CHARTS = 6
MAX_NAME_CHARACTERS = 40
"""Longer names are cut in the legend."""
Event = dict[str, Any]


@dataclass(frozen=True)
class ReportedScore:
    """A metric of a task at a checkpoint."""

    task: str
    metric: str
    """Metric name with k, and with filter and mode unless default."""
    step: int | None
    """Optimizer steps of the checkpoint; None if unknown."""
    value: float
    """NaN if unknown."""
    interval: tuple[float, float] | None
    """95 percent interval."""
    event: Event
    """The `eval_lm` event."""

    @property
    def is_share(self) -> bool:
        """Whether the value lies between 0 and 1 and is written in percent."""
        return not math.isfinite(self.value) or 0 <= self.value <= 1

    def format_number(self, value: float) -> str:
        if not math.isfinite(value):
            return "not known"
        return format_share(value) if self.is_share else format_value(value)


def read_scores(events: Iterable[Event]) -> list[ReportedScore]:
    """Return the scores in `eval_lm` events, sorted by task and metric (first occurrence), then step.

    A later event replaces an earlier event with the same task, metric and step.
    """
    scores: dict[tuple[str, str, int | None], ReportedScore] = {}
    for event in events:
        task, metric, step = str(event.get("task")), format_metric(event), event.get("step")
        scores[task, metric, step] = ReportedScore(
            task, metric, step, parse_number(event.get("value")), _read_interval(event), event)
    order = {name: i for i, name in enumerate(dict.fromkeys((task, metric) for task, metric, _ in scores))}
    return sorted(scores.values(), key=lambda score: (
        order[score.task, score.metric], -1 if score.step is None else score.step))


def format_metric(event: Event) -> str:
    """Return an event's metric name with k, and with filter and mode unless default."""
    name, k = str(event.get("metric")), event.get("k")
    if k is not None and name.endswith("@k"):
        name = f"{name[:-1]}{k}"
    notes = [str(event[field]) for field, default in (("filter", "none"), ("mode", "default"))
             if event.get(field) not in (None, default)]
    return f"{name} ({', '.join(notes)})" if notes else name


def _read_interval(event: Event) -> tuple[float, float] | None:
    ends = event.get("interval")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = parse_number(ends[0]), parse_number(ends[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def build_score_tables(run: Run) -> list[PageTable]:
    """Return the last checkpoint's score per task and metric."""
    def format_count(field: str) -> Callable[[ReportedScore], str]:
        return lambda score: field_formatter(field, ",.0f", "–")(score.event)

    newest = {(score.task, score.metric): score for score in read_scores(run.scores)}
    return build_tables(newest.values(), {
        "task": lambda score: score.task, "metric": lambda score: score.metric,
        "step": lambda score: "–" if score.step is None else f"{score.step:,}",
        "value": lambda score: score.format_number(score.value),
        "95 % interval": lambda score: " to ".join(map(score.format_number, score.interval or ())) or "–",
        "items": format_count("items"), "failed": format_count("failed"),
        "cut at the limit": format_count("at_limit")})


def draw_score_charts(run: Run) -> list[Chart]:
    """Return scores over steps, for tasks with at least two evaluated checkpoints."""
    lines: dict[tuple[str, str], list[ReportedScore]] = {}
    for score in read_scores(run.scores):
        if score.step is not None and math.isfinite(score.value):
            lines.setdefault((score.task, score.metric), []).append(score)
    lines = {name: scores for name, scores in lines.items() if len(scores) > 1}
    shares = [name for name, scores in lines.items() if all(score.is_share for score in scores)]
    groups = [shares[i:i + MAX_TASKS] for i in range(0, len(shares), MAX_TASKS)]
    # A chart each for other units: the largest would flatten the others.
    groups += [[name] for name in lines if name not in shares]
    note = f"{len(groups) - MAX_CHARTS:,} more charts are left out." if len(groups) > MAX_CHARTS else ""
    return [_draw_scores({name: lines[name] for name in group}, note) for group in groups[:MAX_CHARTS]]


def _draw_scores(lines: dict[tuple[str, str], list[ReportedScore]], note: str) -> Chart:
    series = []
    for i, ((task, metric), scores) in enumerate(lines.items()):
        name = f"{task}, {metric}"
        if len(name) > MAX_NAME_CHARACTERS:
            name = f"{name[:MAX_NAME_CHARACTERS]} …"
        steps = [score.step for score in scores if score.step is not None]
        intervals = [score.interval or (score.value, score.value) for score in scores]
        series.append(Series(name, steps, [score.value for score in scores], series_colour(i), intervals))
    is_share = all(score.is_share for scores in lines.values() for score in scores)
    return Chart(LinePlot(series, Axis("optimizer step"), Axis("score", is_share=is_share)),
                 "Scores of checkpoints, with 95 % intervals.", note)


def _list_passk_events(run: Run) -> list[tuple[str, Event]]:
    """Return (file and reward, event) pairs; a later `passk` event replaces an earlier event with the same
    prompt file, reward and step."""
    events = {(str(event.get("input")), str(event.get("reward")), event.get("step")): event
              for event in run.get_events("passk") if event.get("pass_at_k")}
    files = {file for file, _, _ in events}
    counts = Counter(file.rpartition("/")[2] for file in files)
    named = []
    for (file, reward, _), event in events.items():
        name = file.rpartition("/")[2]
        # Files with the same name are shown with their paths.
        named.append((f"{file if counts[name] > 1 else name}, {reward}", event))
    return named


def draw_passk_charts(run: Run) -> list[Chart]:
    """Return a chart over k per set of prompts."""
    return [_draw_passk(event, name) for name, event in _list_passk_events(run)]


def _draw_passk(event: Event, name: str) -> Chart:
    series: list[Series] = []
    for field, label in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
        rows = [row for row in event.get(field) or [] if len(row.get("interval") or ()) == 2]
        if rows:
            intervals = [(parse_number(row["interval"][0]), parse_number(row["interval"][1])) for row in rows]
            series.append(Series(label, [parse_number(row["k"]) for row in rows],
                                 [parse_number(row["value"]) for row in rows],
                                 series_colour(len(series)), intervals))
    return Chart(LinePlot(series, Axis("k", is_log=True), Axis("share of prompts", low=0.0, is_share=True)),
                 f"{name}, step {field_formatter('step', ',.0f', '–')(event)}: 95 % intervals over "
                 f"{parse_whole_number(event.get('num_prompts')):,} prompts.")


def build_passk_tables(run: Run) -> list[PageTable]:
    def format_estimate(event: Event, index: int) -> str:
        estimate = event["pass_at_k"][index]
        return f"{format_share(parse_number(estimate['value']))} (k = {estimate['k']})"

    def format_sampling(event: Event) -> str:
        if not event.get("sampling"):
            return "sampled elsewhere"
        return "temperature {temperature}, top-p {top_p}, seed {seed}".format_map(event["sampling"])

    columns: dict[str, Callable[[Event], str]] = {
        "step": field_formatter("step", ",.0f", "–"), "prompts": field_formatter("num_prompts", ",.0f"),
        "responses": field_formatter("num_samples", ",.0f"),
        "without a reward": field_formatter("num_unscored", ",.0f"),
        "pass@k": lambda event: format_estimate(event, 0),
        "at most": lambda event: format_estimate(event, -1),
        "mean reward": field_formatter("mean_reward", ".4f"), "sampling": format_sampling}
    rows = [[name, *(format_cell(event) for format_cell in columns.values())]
            for name, event in _list_passk_events(run)]
    return [PageTable(["prompts, reward", *columns], rows)] if rows else []
