"""Compare two results of `eval lm` task by task.

Two scores are comparable if task definition, data, examples, prompts, mode and sampling agree; model, chat
template and seed may differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.figures import align_columns
from megatron_sov.bench.lm.results import (
    Metric, ResultItem, Results, TaskScores, format_score_name, read_items, read_results)
from megatron_sov.eval.statistics import estimate_difference

TIED, BETTER, WORSE, UNKNOWN = "not told apart", "better", "worse", "not known"
"""Verdicts of a `Difference`."""
COMPARED_FIELDS = ("task_hash", "output_type", "num_fewshot", "mode", "judge", "limit")
"""Fields of `TaskScores` that must be equal."""
CLOSE = 1e-6
"""Largest relative or absolute error at which a metric counts as the mean over its items."""


@dataclass(frozen=True)
class ScoredResults:
    """Results of one `eval lm` run, with their items."""

    path: Path
    results: Results
    items: Mapping[str, Mapping[str, ResultItem]]
    """Task -> `ResultItem.item` -> item."""


@dataclass(frozen=True)
class Difference:
    """A metric of a task for two models."""

    task: str
    metric: str
    """Name with k and filter, from `format_metric_name`."""
    higher_is_better: bool
    before: float | None
    """First model, over the items that both models have a score for; None: unknown."""
    after: float | None
    """Second model."""
    value: float | None
    """`after` - `before`; None: unknown."""
    standard_error: float | None
    """Standard error for `value`, over clusters."""
    interval: tuple[float, float] | None
    """Interval for `value`; None if the items do not determine it."""
    items: int
    """Number of items with two scores."""
    clusters: int
    """Number of groups of related items; an item without a group counts as one."""
    left_out: int
    """Number of items without two scores."""
    note: str = ""
    """Reason for a missing interval."""

    @property
    def verdict(self) -> str:
        """Compare the second model with the first by the whole interval."""
        if self.interval is None:
            return UNKNOWN
        low, high = self.interval
        if low <= 0 <= high:
            return TIED
        return BETTER if (low > 0) == self.higher_is_better else WORSE

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def read_scored_results(path: Path) -> ScoredResults:
    """Read the results of `eval lm` with their items. Raises `UserError`: unreadable or damaged files, or an
    items file from another evaluation."""
    results = read_results(path)
    items: dict[str, dict[str, ResultItem]] = {name: {} for name in results.tasks}
    for item in read_items(path, results):
        task_items = items.setdefault(item.task, {})
        # a second item under the name would replace the first and change the mean
        if item.item in task_items:
            raise UserError(f"{path}: item {item.item} of task {item.task} occurs twice in the items file; "
                            "run `megatron-sov eval lm` again")
        task_items[item.item] = item
    return ScoredResults(path, results, items)


def compute_differences(before: ScoredResults, after: ScoredResults, tasks: Sequence[str] = ()
                        ) -> list[Difference]:
    """Compute the difference in each metric of `tasks`, or of every common task. Raises `UserError`: a
    missing task, no common task, or different measurements."""
    sides = (before, after)
    missing = [f"{side.path} has no task {name}" for name in tasks for side in sides
               if name not in side.results.tasks]
    if missing:
        raise UserError(f"--tasks: {'; '.join(missing)}; evaluate the task there too, or leave it out")
    common = [name for name in before.results.tasks if name in after.results.tasks]
    if not common:
        first, second = (", ".join(side.results.tasks) or "none" for side in sides)
        raise UserError(f"{before.path} and {after.path}: have no task in common ({first}; {second}); "
                        "evaluate both models on the same tasks")
    compared = list(tasks) or common
    problems = [problem for name in compared for problem in _find_problems(name, before, after)]
    if problems:
        raise UserError(format_problems(f"{before.path} and {after.path}", problems,
                                        "evaluate both models with the same settings, or name other --tasks"))
    return [_compute_difference(name, metric, before, after)
            for name in compared for metric in before.results.tasks[name].metrics]


def _find_problems(name: str, before: ScoredResults, after: ScoredResults) -> list[str]:
    """Return a sentence for each reason why task `name` cannot be compared."""
    problems = find_measure_differences(name, before.results.tasks[name], after.results.tasks[name])
    second = after.items[name]
    # compare hashes: reordered data give the same number to another question
    changed = [number for number, item in before.items[name].items()
               if number in second and second[number].doc_sha256 != item.doc_sha256]
    if changed:
        problems.append(f"task {name}: {len(changed):,} items have the same name and another content, e.g. "
                        f"{changed[0]} (doc_sha256)")
    return problems


def find_measure_differences(name: str, before: TaskScores, after: TaskScores) -> list[str]:
    """Return a sentence for each setting that makes two scores incomparable."""
    problems = [f"task {name}: {field} {getattr(before, field)!r} is not {getattr(after, field)!r}"
                for field in COMPARED_FIELDS if getattr(before, field) != getattr(after, field)]
    # chat templates differ between models, which changes prompts but not questions
    if not (before.chat_template or after.chat_template) and before.prompt_hash != after.prompt_hash:
        problems.append(f"task {name}: the prompts differ (prompt_hash {before.prompt_hash[:12]}, "
                        f"{after.prompt_hash[:12]})")
    if before.output_type == "generate_until" and not problems:
        first, second = asdict(before.sampling), asdict(after.sampling)
        # samples from two seeds have the same distribution
        problems += [f"task {name}: sampling.{key} {first[key]!r} is not {second[key]!r}"
                     for key in first if key != "seed" and first[key] != second[key]]
    return problems


def format_metric_name(metric: Metric) -> str:
    return format_score_name(metric.label, metric.filter)


def _compute_difference(task: str, metric: Metric, before: ScoredResults, after: ScoredResults) -> Difference:
    name = format_metric_name(metric)
    other = next((m for m in after.results.tasks[task].metrics if format_metric_name(m) == name), None)
    first, second = get_item_scores(before, task, metric), get_item_scores(after, task, metric)
    # paired: an item with a single score says nothing about the difference
    paired = [item for item in first if item in second]
    left_out = len({*before.items[task], *after.items[task]}) - len(paired)
    note = ""
    if other is None:
        note = "the second model lacks this metric"
    elif metric.value is None or other.value is None:
        note = "a value is missing"
    elif not paired:
        note = "no item has two scores"
    elif not is_mean_of_items(metric, first) or not is_mean_of_items(other, second):
        note = "is no mean of its items"  # e.g. the perplexity of a corpus
    if note:
        values = (metric.value, other.value if other else None)
        difference = None if values[0] is None or values[1] is None else values[1] - values[0]
        return Difference(task, name, metric.higher_is_better, *values, difference, None, None, len(paired),
                          0, left_out, note)
    clusters = [before.items[task][item].cluster for item in paired]
    # a tuple, because a cluster may have the name of an item
    keys = [item if cluster is None else ("cluster", cluster)
            for item, cluster in zip(paired, clusters, strict=True)]
    scores, other_scores = [first[item] for item in paired], [second[item] for item in paired]
    estimate = estimate_difference(scores, other_scores, keys)
    return Difference(task, name, metric.higher_is_better, math.fsum(scores) / len(paired),
                      math.fsum(other_scores) / len(paired), estimate.value, estimate.standard_error,
                      estimate.interval, estimate.num_items, estimate.num_clusters, left_out,
                      "" if estimate.interval else "only one cluster")


def get_item_scores(scored: ScoredResults, task: str, metric: Metric) -> dict[str, float]:
    """Return item -> finite score."""
    scores = {}
    for name, item in scored.items[task].items():
        score = item.scores.get(format_metric_name(metric))
        # a failed item is unknown rather than wrong: the reward could not judge it
        if score is not None and item.failed is None and math.isfinite(score):
            scores[name] = float(score)
    return scores


def is_mean_of_items(metric: Metric, scores: Mapping[str, float]) -> bool:
    if metric.value is None or not scores:
        return False
    return math.isclose(metric.value, math.fsum(scores.values()) / len(scores), rel_tol=CLOSE, abs_tol=CLOSE)


def format_differences(differences: Sequence[Difference]) -> str:
    """Format a table of differences with 95 % intervals; a missing interval shows its reason."""
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "first", "second", "difference", "95 % interval", "items", "left out",
         "second is")]
    for d in differences:
        interval = f"{d.interval[0]:+.4f} to {d.interval[1]:+.4f}" if d.interval else d.note
        values = ["not known" if value is None else f"{value:.4f}" for value in (d.before, d.after)]
        difference = "not known" if d.value is None else f"{d.value:+.4f}"
        rows.append((d.task, d.metric, *values, difference, interval, f"{d.items:,}", f"{d.left_out:,}",
                     d.verdict))
    return align_columns(rows, left=(0, 1, 8))
