"""Scores of `eval lm` in the report: by checkpoint over training, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.figures import format_share, format_value
from megatron_sov.base.pages.page import Chart, PageTable, tables
from megatron_sov.base.pages.plots import Axis, LinePlot, Series, colour
from megatron_sov.publish.report.run_data import Run
from megatron_sov.runs.obs.figures import number

MAX_LINES = 8
"""Tasks of one chart."""
MAX_CHARTS = 6
MAX_NAME_CHARACTERS = 40
"""Of a line, in a chart's legend."""


@dataclass(frozen=True)
class ReportedScore:
    """One figure of one checkpoint."""

    task: str
    """Name of the task."""
    metric: str
    """Its name with k, and filter and mode where they are not the usual ones."""
    step: int | None
    """Optimizer steps of the checkpoint; None where nobody knows."""
    value: float
    """NaN: not known."""
    interval: tuple[float, float] | None
    """95 percent."""
    event: dict[str, Any]
    """All that was recorded."""

    @property
    def is_share(self) -> bool:
        """Whether it lies from 0 to 1, and is shown in percent."""
        return not math.isfinite(self.value) or 0 <= self.value <= 1

    def shown(self, value: float) -> str:
        """Return a value in the figure's unit."""
        if not math.isfinite(value):
            return "not known"
        return format_share(value) if self.is_share else format_value(value)


def scores_of(events: Iterable[dict[str, Any]]) -> list[ReportedScore]:
    """Return the scores of `eval_lm` events; of one task, metric, mode, data and checkpoint the newest one
    counts.  They stand in the order of tasks, metrics, steps."""
    found: dict[tuple[Any, ...], ReportedScore] = {}
    for event in events:
        metric = metric_of(event)
        step = event.get("step")
        key = (str(event.get("task")), metric, step, str(event.get("task_hash")),
               str(event.get("model_hash")))
        # taken out first: among scores of one step the newest then stands last
        found.pop(key, None)
        found[key] = ReportedScore(key[0], metric, step, number(event.get("value")),
                                   _interval(event.get("interval")), event)
    order = {name: i for i, name in enumerate(dict.fromkeys((s.task, s.metric) for s in found.values()))}
    return sorted(found.values(), key=lambda s: (order[s.task, s.metric], -1 if s.step is None else s.step))


def metric_of(event: dict[str, Any]) -> str:
    """Return the name of an event's metric: with k, and filter and mode where they are not the usual ones."""
    name, k = str(event.get("metric")), event.get("k")
    if k is not None and name.endswith("@k"):
        name = f"{name[:-1]}{k}"
    notes = [str(event[field]) for field, usual in (("filter", "none"), ("mode", "default"))
             if event.get(field) not in (None, usual)]
    return f"{name} ({', '.join(notes)})" if notes else name


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def score_tables(run: Run) -> list[PageTable]:
    """Return the score of the last checkpoint for each task and metric."""
    def count(name: str) -> Callable[[ReportedScore], str]:
        return lambda s: "–" if math.isnan(n := number(s.event.get(name))) else f"{n:,.0f}"

    newest = {(s.task, s.metric): s for s in scores_of(run.scores)}
    return tables(newest.values(), {
        "task": lambda s: s.task, "metric": lambda s: s.metric,
        "step": lambda s: "–" if s.step is None else f"{s.step:,}", "value": lambda s: s.shown(s.value),
        "95 % interval": lambda s: " to ".join(map(s.shown, s.interval)) if s.interval else "–",
        "items": count("items"), "failed": count("failed"), "cut at the limit": count("at_limit")})


def checkpoint_score_charts(run: Run) -> list[Chart]:
    """Return scores over steps, of tasks that several checkpoints were judged by."""
    scores = scores_of(run.scores)
    lines: dict[tuple[str, str], list[ReportedScore]] = {}
    for s in scores:
        if s.step is not None and math.isfinite(s.value):
            lines.setdefault((s.task, s.metric), []).append(s)
    drawn = {name: points for name, points in lines.items() if len({s.step for s in points}) > 1}
    shares = [n for n, points in drawn.items() if all(s.is_share for s in points)]
    groups = [shares[i:i + MAX_LINES] for i in range(0, len(shares), MAX_LINES)]
    # a chart each: their units differ, and the largest would flatten the others
    groups += [[name] for name in drawn if name not in shares]
    notes = [f"{len(groups) - MAX_CHARTS:,} more charts are left out."] if len(groups) > MAX_CHARTS else []
    return [score_chart({f"{task}, {metric}": drawn[task, metric] for task, metric in group},
                        "Scores of checkpoints, with 95 % intervals.", notes)
            for group in groups[:MAX_CHARTS]]


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:MAX_NAME_CHARACTERS]} …"


def score_chart(lines: dict[str, list[ReportedScore]], caption: str, notes: Iterable[str] = ()) -> Chart:
    """Return lines of scores over steps with their intervals."""
    series = []
    for i, (name, points) in enumerate(lines.items()):
        by_step = {s.step: s for s in points if s.step is not None}  # the newest of a step
        newest = list(by_step.values())
        series.append(Series(_short(name), list(by_step), [s.value for s in newest], colour(i), intervals=[
            s.interval or (s.value, s.value) for s in newest]))
    shares = all(s.is_share for points in lines.values() for s in points)
    return Chart(LinePlot(series, Axis("optimizer step"), Axis("score", is_share=shares)), caption,
                 " ".join(notes))
