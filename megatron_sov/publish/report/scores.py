"""Scores of `eval lm` in the report: by checkpoint over training, with intervals and what was found of each
task in the training data, and published figures of other models beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import plotly.graph_objects as go
from annotated_types import Ge, Le

from megatron_sov.base.figures import format_value
from megatron_sov.base.pages.page import Chart, PageTable, chart, line_with_intervals, plain, tables
from megatron_sov.base.settings import ProblemCode, SettingsProblem, read_file
from megatron_sov.publish.report.run_data import Run
from megatron_sov.runs.obs.figures import number

NOT_TOLD = "not told"
MAX_LINES = 8
"""Tasks of one chart."""
MAX_CHARTS = 6
MAX_NAME_CHARACTERS = 40
"""Of a line, in a chart's legend."""


# Published figures of other models, to stand beside a run's own scores: `published/*.yaml`, one file for
# each table of a document.


@dataclass(frozen=True)
class ScoreFigure:
    """One published figure."""

    name: str
    """What the document calls the benchmark."""
    value: Annotated[float, Ge(0), Le(100)]
    """In percent."""
    metric: str = NOT_TOLD
    """E.g. `avg@64`."""
    protocol: str = ""
    """Which of the table's protocols; empty: not told."""


@dataclass(frozen=True)
class PublishedTable:
    """A model's figures from one document."""

    model: str
    """As its authors call it."""
    document: str
    """Where the figures stand."""
    verified: bool
    """Whether they were seen there, and not told by others."""
    figures: dict[str, ScoreFigure]
    """Benchmark, as `metadata.sov.published_as` of a task names it -> figure."""
    protocols: dict[str, str] = field(default_factory=dict)
    """Name -> how figures were measured, as far as the document tells."""

    def protocol(self, figure: ScoreFigure) -> str:
        """Return how a figure was measured, in words."""
        return self.protocols.get(figure.protocol, NOT_TOLD)

    def problems(self) -> list[SettingsProblem]:
        """Return every figure whose protocol is not told."""
        return [SettingsProblem(ProblemCode.RULE, f"figures.{key}.protocol", "must be one of protocols",
                                figure.protocol)
                for key, figure in self.figures.items()
                if figure.protocol and figure.protocol not in self.protocols]


@lru_cache(maxsize=1)
def published_tables() -> tuple[PublishedTable, ...]:
    """Return all tables, by file name."""
    with resources.as_file(resources.files("megatron_sov.publish.report") / "published") as folder:
        return tuple(read_table(file) for file in sorted(folder.glob("*.yaml")))


def read_table(file: Path) -> PublishedTable:
    """Return the table of a file.

    Raises:
        UserError: it is no YAML, or a figure breaks a rule.
    """
    return read_file(PublishedTable, file, file.name)


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
        return f"{value:.1%}" if self.is_share else format_value(value)


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


def newest_scores(scores: list[ReportedScore]) -> list[ReportedScore]:
    """Return of each task and metric the score of the last checkpoint."""
    return list({(s.task, s.metric): s for s in scores}.values())


def score_tables(run: Run) -> list[PageTable]:
    """Return the newest scores, published figures of the same benchmarks, and how all were measured."""
    newest = newest_scores(scores_of(run.scores))
    if not newest:
        return []
    return [*_table(newest, run.of("eval_contamination")), *_published(newest), *_protocols(newest)]


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _table(newest: list[ReportedScore], checks: list[dict[str, Any]]) -> list[PageTable]:
    def count(name: str) -> Callable[[ReportedScore], str]:
        return lambda s: "–" if math.isnan(n := number(s.event.get(name))) else f"{n:,.0f}"

    return tables(newest, {
        "task": lambda s: s.task, "metric": lambda s: s.metric,
        "step": lambda s: "–" if s.step is None else f"{s.step:,}", "value": lambda s: s.shown(s.value),
        "95 % interval": lambda s: " to ".join(map(s.shown, s.interval)) if s.interval else "–",
        "items": count("items"), "failed": count("failed"), "cut at the limit": count("at_limit"),
        "found in training data": lambda s: _contamination(s, checks)})


def _contamination(score: ReportedScore, checks: list[dict[str, Any]]) -> str:
    """Return what the newest check of the same task, data and model found."""
    same = ("task", "task_hash", "model_hash")
    found = [c for c in checks if all(c.get(name) == score.event.get(name) for name in same)]
    check = found[-1] if found else score.event.get("contamination")
    if not isinstance(check, dict):
        return "not checked"
    hit, items = number(check.get("items_hit")), number(score.event.get("items"))
    said = f"{hit:,.0f} of {items:,.0f} items" if math.isfinite(items) else f"{hit:,.0f} items"
    without = number(check.get("value_without"))
    if hit > 0 and str(check.get("metric", score.metric)) == score.metric:
        said += f"; {score.shown(without)} without them"
    return said


def _published(newest: list[ReportedScore]) -> list[PageTable]:
    """Return figures of other models beside each task's first figure: pass@8 is no mean of answers."""
    rows = []
    for s in {s.task: s for s in reversed(newest)}.values():
        key = str(s.event.get("published_as") or s.task)
        for table in published_tables():
            # published figures are in percent: one of another unit cannot stand beside them
            if key in table.figures and s.is_share:
                f = table.figures[key]
                rows.append([f.name, s.task, f"{s.shown(s.value)} ({s.metric})", table.model,
                             f"{f.value:g} %", f.metric, table.protocol(f),
                             table.document if table.verified else f"{table.document} (not verified)"])
    rows.sort(key=lambda row: [s.task for s in newest].index(row[1]))
    head = ["benchmark", "task", "this model", "published for", "published", "its metric", "its protocol",
            "source"]
    return [PageTable(head, rows)] if rows else []


def _protocols(newest: list[ReportedScore]) -> list[PageTable]:
    """Return how scores were measured, one row for each way."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for s in newest:
        sampling = s.event.get("sampling")
        # where likelihoods are compared nothing was sampled
        words = ", ".join(f"{name} {value}" for name, value in sampling.items()) if isinstance(
            sampling, dict) and s.event.get("output_type", "generate_until") == "generate_until" else "–"
        way = (words, str(s.event.get("mode") or "default"), str(s.event.get("judge") or "–"))
        tasks = ways.setdefault(way, [])
        if s.task not in tasks:
            tasks.append(s.task)
    return [PageTable(["measured with", "mode", "judge", "tasks"],
                      [[*way, ", ".join(tasks)] for way, tasks in ways.items()])]


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
    drawn = go.Figure()
    for i, (name, points) in enumerate(lines.items()):
        by_step = {s.step: s for s in points}  # the newest of a step
        value = np.array([s.value for s in by_step.values()])
        low, high = np.array([s.interval or (s.value, s.value) for s in by_step.values()]).T
        drawn.add_trace(line_with_intervals(plain(_short(name)), i, np.array(list(by_step), dtype=np.float64),
                                            value, low, high))
    shares = all(s.is_share for points in lines.values() for s in points)
    drawn.update_layout(xaxis={"title": "optimizer step"},
                        yaxis={"title": "score", **({"tickformat": ".0%"} if shares else {})})
    return chart(drawn, caption, notes)
