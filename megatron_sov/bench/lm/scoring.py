"""From answers to figures: lm-eval's own evaluator over the answers, and the parts of its results to keep.

A figure that has no items, or divides by zero, is None and named; an item whose answers have no reward has
failed and gives the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.bench.lm.answers import Request, Write
from megatron_sov.bench.lm.harness import quiet
from megatron_sov.bench.lm.results import (
    DEFAULT, Metric, ResultItem, ResultSample, TaskSampling, TaskScores, score_name)
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.bench.lm.subject import EvaluatedLM
from megatron_sov.bench.lm.tasks import hash_of, sov_of
from megatron_sov.bench.suites.judging import AnswerJudge
from megatron_sov.eval.statistics import estimate_mean
from megatron_sov.infer.request import LENGTH

TEXT = "generate_until"


@dataclass(frozen=True)
class BuiltTask:
    """One task with its prompts and requests."""

    name: str
    task: Any
    """lm-eval's task."""
    judge: AnswerJudge | None
    """None: lm-eval's own metrics score the answers."""
    files: dict[str, str]
    """Name of each data file -> its SHA-256."""
    num_fewshot: int
    """Examples in front of each item."""
    requests: Sequence[Request] = ()
    prompt_hash: str = ""

    def aggregate(self, metric: str, values: Sequence[Any]) -> float | None:
        """Return the aggregate of a metric's values; None: it is no number."""
        value = float((self.task.aggregation().get(metric) or _mean)(list(values)))
        return value if math.isfinite(value) else None


def score(tasks: Sequence[BuiltTask], groups: Mapping[str, Any], lm: EvaluatedLM, settings: Settings
          ) -> tuple[dict[str, TaskScores], list[ResultItem], list[str]]:
    """Return the figures of tasks and groups, their items, and notes on figures and items without a value."""
    results = _evaluate(tasks, groups, lm, settings)
    scores: dict[str, TaskScores] = {}
    items: list[ResultItem] = []
    notes: list[str] = []
    for task in tasks:
        task_items = _items(task, results["samples"].get(task.name, []), lm)
        scores[task.name] = _task_scores(task, results["results"].get(task.name, {}), task_items, settings)
        items += task_items
        notes += [f"{task.name}: {note}" for note in scores[task.name].notes]
        if failed := [item.failed for item in task_items if item.failed]:
            notes.append(f"{task.name}: {len(failed)} of {len(task_items)} items have no score; the first: "
                         f"{failed[0]}")
    return scores | _group_scores(groups, results, scores), items, notes


def _evaluate(tasks: Sequence[BuiltTask], groups: Mapping[str, Any], lm: EvaluatedLM, settings: Settings
              ) -> dict[str, Any]:
    """Return lm-eval's results."""
    from lm_eval.evaluator import evaluate

    for task in tasks:
        task.task.build_all_requests = lambda **_: None  # its prompts are there already
        aggregates = task.task.aggregation()
        task.task.aggregation = lambda aggregates=aggregates: {
            metric: _or_nan(aggregate) for metric, aggregate in aggregates.items()}
    try:
        with quiet():
            results = evaluate(lm, {"tasks": {task.name: task.task for task in tasks}, "groups": groups},
                               limit=settings.num_items, bootstrap_iters=0, confirm_run_unsafe_code=True)
    except UserError:
        raise
    except Exception as e:  # of a metric or filter of a task
        raise UserError(f"tasks {', '.join(task.name for task in tasks)}: lm-eval cannot score the answers "
                        f"({format_error(e):.300}); mend the task's metric, or leave the task out: answers "
                        "are kept") from e
    assert results is not None
    return dict(results)


def _or_nan(aggregate: Callable[[Any], Any]) -> Callable[[Any], float]:
    """Return an aggregation that gives NaN where it divides by zero or is too large for a number."""
    def figure(values: Any) -> float:
        try:
            return float(aggregate(values))
        except ArithmeticError:
            return math.nan
    return figure


def _items(task: BuiltTask, samples: Sequence[Mapping[str, Any]], lm: EvaluatedLM) -> list[ResultItem]:
    """Return a task's items, in the order of their numbers."""
    items: dict[int, ResultItem] = {}
    # lm-eval goes through the items in the order of its instances, of which a text has one an item.
    instances = iter(task.task.instances)
    for sample in samples:
        number, filter_name = int(sample["doc_id"]), str(sample["filter"])
        scores = {score_name(metric, filter_name): task.aggregate(metric, [sample[metric]])
                  for metric in sample["metrics"]}
        if number in items:  # of another filter
            items[number].scores.update(scores)
            continue
        failed, rewards = None, ()
        if task.judge is not None:
            judged = sample["filtered_resps"][0]
            failed = task.judge.failure(judged)
            rewards = tuple(result.reward for result in next(iter(judged.values())))
            scores = {name: scores.get(name) for name in task.judge.judging.metric_names}
        answers = _answers(next(instances), rewards, lm) if task.task.OUTPUT_TYPE == TEXT else ()
        question, answer = question_and_answer(task.task, sample["doc"])
        cluster = sample["doc"].get(str(sov_of(task.task).get("cluster_field")))
        items[number] = ResultItem(task.name, str(number), doc_hash(sample["doc"]),
                                   None if cluster is None else str(cluster), question, answer, scores,
                                   answers, failed)
    return [items[number] for number in sorted(items)]


def _answers(instance: Any, rewards: Sequence[float | None], lm: EvaluatedLM) -> tuple[ResultSample, ...]:
    answers = [lm.sample(instance, number) for number in range(int(instance.repeats or 1))]
    return tuple(ResultSample(str(answer["text"]), str(answer["finish_reason"]),
                              rewards[i] if i < len(rewards) else None) for i, answer in enumerate(answers))


def _task_scores(task: BuiltTask, results: Mapping[str, Any], items: Sequence[ResultItem],
                 settings: Settings) -> TaskScores:
    keys = [tuple(key.rpartition(",")[::2]) for key in results if "," in key and "_stderr," not in key]
    names = dict.fromkeys(keys)
    judge = task.judge
    # A judged figure that no item has a value of is missing in lm-eval's results.
    for name in judge.judging.metric_names if judge else ():
        names.setdefault((name, "none"))
    metrics = []
    for name, filter_name in names:
        value = float(results.get(f"{name},{filter_name}", math.nan))
        better = bool(task.task.higher_is_better().get(name, True))
        metric = _metric(name, filter_name, value, items, better)
        if judge is not None:  # `pass@8` is the metric pass@k with k = 8
            base, _, k = name.rpartition("@")
            metric = replace(metric, name=f"{base}@k", k=int(k))
        metrics.append(metric)
    notes = [f"{score_name(metric.label, metric.filter)} is not known: it has no item with a score, divides "
             "by zero or is too large for a number" for metric in metrics if metric.value is None]
    return TaskScores(
        task_hash=hash_of(task.task, task.files), output_type=task.task.OUTPUT_TYPE, items=len(items),
        metrics=tuple(metrics), dataset={"files": task.files}, num_fewshot=task.num_fewshot,
        prompt_hash=task.prompt_hash, chat_template=settings.chat_template,
        mode=settings.mode or (judge.judging.mode if judge else DEFAULT), sampling=_sampling(task.requests),
        judge=", ".join(judge.judges.values()) if judge else None, limit=settings.num_items,
        failed=sum(item.failed is not None for item in items),
        at_limit=sum(sample.finish_reason == LENGTH for item in items for sample in item.samples),
        notes=tuple(notes))


def _metric(name: str, filter_name: str, value: float, items: Sequence[ResultItem], better: bool) -> Metric:
    """Return a figure; one that is the mean of its items with error and interval, clustered."""
    if not math.isfinite(value):
        return Metric(name, None, filter_name, higher_is_better=better)
    key = score_name(name, filter_name)
    there = [(number, item, single) for number, item in enumerate(items)
             if (single := item.scores.get(key)) is not None]
    values = [single for _, _, single in there]
    # an item without a cluster is one of its own; its number never equals a cluster's name
    clusters: list[Hashable] = [number if item.cluster is None else item.cluster
                                for number, item, _ in there]
    made = Metric(name, value, filter_name, clusters=len(set(clusters)), higher_is_better=better)
    try:
        if values and math.isclose(value, _mean(values), abs_tol=1e-12):
            found = estimate_mean(values, clusters)
            return replace(made, stderr=found.standard_error, interval=found.interval)
    except OverflowError:
        pass  # without an interval: it is too large for a number
    return made


def _group_scores(groups: Mapping[str, Any], results: Mapping[str, Any], scores: Mapping[str, TaskScores]
                  ) -> dict[str, TaskScores]:
    made: dict[str, TaskScores] = {}
    for name, group in groups.items():
        members = [scores[task.task_name] for task in group.get_all_tasks() if task.task_name in scores]
        if not group.has_aggregation or not members:
            continue
        better = {(m.name, m.filter): m.higher_is_better for member in members for m in member.metrics}
        metrics = tuple(
            Metric(metric, float(value) if math.isfinite(value) else None, filter_name,
                   higher_is_better=better.get((metric, filter_name), True))
            for key, value in results.get("groups", {}).get(name, {}).items()
            for metric, _, filter_name in [key.rpartition(",")] if metric and not metric.endswith("_stderr"))
        made[name] = replace(
            members[0], task_hash=_joined(s.task_hash for s in members), metrics=metrics,
            items=sum(s.items for s in members), failed=sum(s.failed for s in members),
            at_limit=sum(s.at_limit for s in members), notes=(),
            dataset={"files": {f: h for s in members for f, h in s.dataset["files"].items()}},
            prompt_hash=_joined(s.prompt_hash for s in members))
    return made


def _joined(hashes: Any) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sampling(requests: Sequence[Request]) -> TaskSampling:
    writes = [request for request in requests if isinstance(request, Write)]
    if not writes:
        return TaskSampling(max_tokens=0)
    first = writes[0]
    return TaskSampling(first.temperature, first.top_p, first.top_k, first.max_tokens, first.seed,
                        1 + max(request.sample for request in writes))


def _mean(values: Sequence[Any]) -> float:
    return math.fsum(map(float, values)) / len(values)


def doc_hash(doc: Any) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()


def question_and_answer(task: Any, doc: Any) -> tuple[str, str]:
    """Return what an item asks, alone, and its right answer; empty where the task has no such thing."""
    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception:  # a task's own functions; it is only told
            return ""

    question, target = attempt(lambda: task.doc_to_text(doc)), attempt(lambda: task.doc_to_target(doc))
    choices = attempt(lambda: task.doc_to_choice(doc)) if task.get_config("doc_to_choice") else None
    if isinstance(target, list) and target:
        target = target[0]
    if isinstance(choices, list) and isinstance(target, int) and 0 <= target < len(choices):
        target = choices[target]
    return str(question), str(target)


def hash_of_prompts(instances: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for instance in instances:
        digest.update(json.dumps([instance.request_type, *instance.args], default=str).encode() + b"\n")
    return digest.hexdigest()


def refuse_unscored(name: str, task: Any, allow_code: bool) -> None:
    """Raise `UserError` where a task shows media, or runs what the model writes outside the sandbox."""
    if shown := next((f for f in ("doc_to_image", "doc_to_audio") if task.get_config(f)), None):
        raise UserError(f"task {name}: shows images or sound ({shown}), which is not evaluated; leave it out")
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise UserError(f"task {name}: lm-eval runs the model's programs outside a sandbox; use a task with "
                        "the reward `code`, such as lcb-v6, or pass --allow-task-code")
