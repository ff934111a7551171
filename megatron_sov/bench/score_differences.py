"""Differences of two results of `eval lm`, item by item, task by task, and the verdict of a forgetting gate:
whether training has cost a model what it could do before.

A score is compared with one that was measured in the same way alone: the task's definition and data, number
of examples, prompts, mode and sampling must agree; the model, the template of its chats and the seed may
differ.  No torch here.

The gate's rule, for the first figure of each task: the model has forgotten where the whole 90 % interval of
the paired difference lies below -tolerance, a one-sided test of 5 % that the loss is no larger than
tolerated. What the items cannot tell is not held against the model, but it is said: "not proven".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.bench.lm.results import (
    Metric, ResultItem, Results, TaskScores, aligned, read_items, read_results, score_name)
from megatron_sov.eval.statistics import CONFIDENCE, estimate_difference

TIED, BETTER, WORSE, UNKNOWN = "not told apart", "better", "worse", "not known"
SAME = ("task_hash", "output_type", "num_fewshot", "mode", "judge", "limit")
"""What must agree of two scores of a task."""
SEED = "seed"
CLOSE = 1e-6
"""Relative error within which a figure is the mean of its items."""


@dataclass(frozen=True)
class ScoredItem:
    path: Path
    results: Results
    items: Mapping[str, Mapping[str, ResultItem]]
    """Task -> item -> what was found."""


@dataclass(frozen=True)
class Difference:
    """One figure of one task, of two models."""

    task: str
    metric: str
    """Its name, with k and filter."""
    higher_is_better: bool
    """Whether a greater value is a better one."""
    before: float | None
    """Of the first model, over the items that both have; None: not known."""
    after: float | None
    """Of the second one."""
    value: float | None
    standard_error: float | None
    """Of `value`, over clusters of items."""
    interval: tuple[float, float] | None
    """Of `value`; None where items do not tell it."""
    items: int
    """Items that both models have a score for."""
    clusters: int
    """Groups of items that were drawn together."""
    left_out: int
    """Items that one of them has no score for."""
    note: str = ""
    """Why there is no interval."""

    @property
    def verdict(self) -> str:
        """Whether the second model is better, by the whole interval."""
        if self.interval is None:
            return UNKNOWN
        # turned round where less is better: from here on more is better
        low, high = self.interval if self.higher_is_better else (-self.interval[1], -self.interval[0])
        if low > 0:
            return BETTER
        return WORSE if high < 0 else TIED

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def read_scored(path: Path) -> ScoredItem:
    """Return what `eval lm` wrote, with its items.

    Raises:
        UserError: it cannot be read, is damaged, or its items are not those that it was computed from.
    """
    results = read_results(path)
    items: dict[str, dict[str, ResultItem]] = {name: {} for name in results.tasks}
    for item in read_items(path, results):
        of_task = items.setdefault(item.task, {})
        # a second one would replace the first, and the mean would be of other items than the figure
        if item.item in of_task:
            raise UserError(f"{path}: item {item.item} of task {item.task} stands in its items twice; run "
                            "`megatron-sov eval lm` again")
        of_task[item.item] = item
    return ScoredItem(path, results, items)


def differences(before: ScoredItem, after: ScoredItem, tasks: Sequence[str] = (),
                confidence: float = CONFIDENCE
                ) -> list[Difference]:
    """Return the difference of every figure that both have.

    Args:
        before: of the first model.
        after: of the second one.
        tasks: which; empty: all that both have.
        confidence: of the intervals.

    Raises:
        UserError: they have no task in common, lack one that is asked for, or measured one in another way.
    """
    common = [name for name in before.results.tasks if name in after.results.tasks]
    if lacking := [f"{side.path} has no task {name}" for name in tasks for side in (before, after)
                   if name not in side.results.tasks]:
        raise UserError(f"--tasks: {'; '.join(lacking)}; evaluate it too, or leave it out")
    if not common:
        raise UserError(f"{before.path} and {after.path}: have no task in common "
                        f"({', '.join(before.results.tasks) or 'none'}; "
                        f"{', '.join(after.results.tasks) or 'none'}); evaluate both on the same tasks")
    chosen = list(tasks) or common
    problems = [problem for name in chosen for problem in (
        *find_other_measures(name, before.results.tasks[name], after.results.tasks[name]),
        *_other_items(name, before, after))]
    if problems:
        raise UserError(format_problems(f"{before.path} and {after.path}", problems,
                                        "evaluate both in the same way, or name other --tasks"))
    return [_difference(name, metric, before, after, confidence)
            for name in chosen for metric in before.results.tasks[name].metrics]


def find_other_measures(name: str, before: TaskScores, after: TaskScores) -> list[str]:
    """Return one sentence for everything by which two scores of a task cannot be compared."""
    found = [f"task {name}: {field} {getattr(before, field)!r} is not {getattr(after, field)!r}"
             for field in SAME if getattr(before, field) != getattr(after, field)]
    # each model has a chat template of its own: framed prompts differ without being other questions
    if not (before.chat_template or after.chat_template) and before.prompt_hash != after.prompt_hash:
        found.append(f"task {name}: its prompts are not the same (prompt_hash {before.prompt_hash[:12]}, "
                     f"{after.prompt_hash[:12]})")
    if before.output_type == "generate_until" and not found:
        # samples of two seeds are draws of one distribution, so seeds need not agree
        was, now = ({k: v for k, v in asdict(side.sampling).items() if k != SEED} for side in (before, after))
        found += [f"task {name}: sampling.{key} {was[key]!r} is not {now[key]!r}"
                  for key in was if was[key] != now[key]]
    return found


def _other_items(task: str, before: ScoredItem, after: ScoredItem) -> list[str]:
    now = after.items[task]
    # by content: by its number alone an item of reordered data would be paired with another question
    found = [name for name, item in before.items[task].items()
             if name in now and now[name].doc_sha256 != item.doc_sha256]
    return [f"task {task}: {len(found):,} items are others than of the same name, e.g. {found[0]} "
            "(doc_sha256)"] if found else []


def said(metric: Metric) -> str:
    return score_name(metric.label, metric.filter)


def _difference(task: str, metric: Metric, before: ScoredItem, after: ScoredItem,
                confidence: float) -> Difference:
    key = said(metric)
    other = next((m for m in after.results.tasks[task].metrics if said(m) == key), None)
    was, now = values_of(before, task, metric), values_of(after, task, metric)
    # Paired: an item that one model has no score for says nothing about the difference.
    both = [item for item in was if item in now]
    left_out = len({*before.items[task], *after.items[task]}) - len(both)
    note = ""
    if other is None:
        note = "the second has no such figure"
    elif metric.value is None or other.value is None:
        note = "a figure is missing"
    elif not both:
        note = "no item has both"
    elif not is_mean(metric, was) or not is_mean(other, now):
        note = "is no mean of its items"  # such as a perplexity of a corpus
    if note:
        first, second = metric.value, other.value if other else None
        return Difference(task, key, metric.higher_is_better, first, second,
                          None if first is None or second is None else second - first,
                          None, None, len(both), 0, left_out, note)
    clusters = [before.items[task][item].cluster for item in both]
    found = estimate_difference([was[item] for item in both], [now[item] for item in both],
                                # A tuple, so that a cluster's name never equals an item's.
                                [item if cluster is None else ("cluster", cluster)
                                 for item, cluster in zip(both, clusters, strict=True)], confidence)
    return Difference(task, key, metric.higher_is_better, math.fsum(was[i] for i in both) / len(both),
                      math.fsum(now[i] for i in both) / len(both), found.value, found.standard_error,
                      found.interval, found.num_items, found.num_clusters, left_out,
                      "" if found.interval else "one cluster alone")


def values_of(scored: ScoredItem, task: str, metric: Metric) -> dict[str, float]:
    """Return the items' finite scores by a metric."""
    found = {}
    for name, item in scored.items[task].items():
        score = item.scores.get(said(metric))
        # a failed item is no fault of the model, and no wrong answer
        if score is not None and item.failed is None and math.isfinite(score):
            found[name] = float(score)
    return found


def is_mean(metric: Metric, values: Mapping[str, float]) -> bool:
    """Return whether a figure is the mean of these scores of its items."""
    if metric.value is None or not values:
        return False
    return math.isclose(metric.value, math.fsum(values.values()) / len(values), rel_tol=CLOSE, abs_tol=CLOSE)


def table(found: Sequence[Difference]) -> str:
    """Return differences as text; what is not known says why."""
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "first", "second", "difference", "95 % interval", "items", "left out",
         "second is")]
    for d in found:
        interval = f"{d.interval[0]:+.4f} to {d.interval[1]:+.4f}" if d.interval else d.note
        rows.append((d.task, d.metric, *(_cell(v) for v in (d.before, d.after)),
                     "not known" if d.value is None else f"{d.value:+.4f}", interval, f"{d.items:,}",
                     f"{d.left_out:,}", d.verdict))
    return aligned(rows, left=(0, 1, 8))


def _cell(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


GATE_CONFIDENCE = 0.90
"""Of the two-sided interval; 5 % lie on either side."""
KEPT, NOT_PROVEN, FORGOTTEN, NOT_KNOWN = "kept", "not proven", "forgotten", "not known"


@dataclass(frozen=True)
class TaskVerdict:
    difference: Difference
    """Of its first figure."""
    tolerance: float
    """How much worse it may be, in the figure's own unit."""

    @property
    def word(self) -> str:
        """`kept`: the loss is below the tolerance for sure; `forgotten`: above it for sure; `not proven`:
        items do not tell; `not known`: there is no figure, which does not pass."""
        interval = self.difference.interval
        if interval is None:
            return NOT_KNOWN
        # From here on more is better.
        low, high = interval if self.difference.higher_is_better else (-interval[1], -interval[0])
        if high < -self.tolerance:
            return FORGOTTEN
        return KEPT if low >= -self.tolerance else NOT_PROVEN

    def line(self) -> str:
        d = self.difference
        figures = (f"{d.before:.4f} to {d.after:.4f}" if d.before is not None and d.after is not None
                   else "a figure is missing")
        interval = f"no interval: {d.note}"
        if d.interval is not None and d.value is not None:
            interval = (f"difference {d.value:+.4f}, 90 % interval {d.interval[0]:+.4f} to "
                        f"{d.interval[1]:+.4f} over {d.items:,} items"
                        + (f" ({d.left_out:,} left out)" if d.left_out else ""))
        return f"{d.task}, {d.metric}: {self.word}; {figures}, {interval}; tolerance {self.tolerance:g}"

    def fields(self) -> dict[str, Any]:
        return {**self.difference.fields(), "verdict": self.word}


@dataclass(frozen=True)
class Forgetting:
    tasks: tuple[TaskVerdict, ...]
    """In the order in which they were named."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether no task is forgotten, and each has a figure."""
        return all(task.word in (KEPT, NOT_PROVEN) for task in self.tasks)

    def lines(self, *words: str) -> list[str]:
        """Return the lines of the tasks whose verdict is one of `words`; of all without words."""
        return [task.line() for task in self.tasks if not words or task.word in words]

    def fields(self) -> dict[str, Any]:
        return {"passed": self.passed, "tolerance": self.tolerance, "confidence": GATE_CONFIDENCE,
                "tasks": [task.fields() for task in self.tasks]}


def judge(start: ScoredItem, last: ScoredItem, tolerance: float) -> Forgetting:
    """Return whether the last model has forgotten what the start could do.

    Args:
        start: results of the model that training began with.
        last: of the one that it made.
        tolerance: how much worse a task's first figure may be.

    Raises:
        UserError: the two cannot be compared.
    """
    # a group's figure has no items of its own, and its tasks are judged
    judged = [name for name, task in start.results.tasks.items()
              if not task.items or start.items[name] or last.items.get(name)]
    found = differences(start, last, judged, GATE_CONFIDENCE)
    # Reversed, so that a task's first figure is the one that stays.
    firsts = {d.task: d for d in reversed(found)}
    names = dict.fromkeys(d.task for d in found)
    return Forgetting(tuple(TaskVerdict(firsts[name], tolerance) for name in names), tolerance)
