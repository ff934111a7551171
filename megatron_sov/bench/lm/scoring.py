"""From answers to figures: lm-eval's own evaluator over the answered items, and what the results keep of it.

A figure that has no items, or divides by zero, is None and named; an item whose score cannot be computed has
failed and says why.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.bench.lm.answers import Request, Write
from megatron_sov.bench.lm.harness import quiet
from megatron_sov.bench.lm.results import (
    DEFAULT, Metric, ResultItem, ResultSample, TaskSampling, TaskScores, score_name)
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.bench.lm.subject import Bridge, NotAnswered
from megatron_sov.bench.lm.tasks import hash_of, sov_of
from megatron_sov.bench.suites.judging import AnswerJudge
from megatron_sov.eval.statistics import mean_of
from megatron_sov.infer.request import LENGTH

TEXT = "generate_until"


@dataclass
class BuiltTask:
    """One task with all that is asked of the model for it."""

    name: str
    task: Any
    """lm-eval's."""
    judge: AnswerJudge | None
    """None: lm-eval's own metrics judge."""
    files: dict[str, str]
    """Name of each data file -> its SHA-256."""
    num_fewshot: int
    """Examples in front of each item."""
    requests: list[Request] = field(default_factory=list)
    prompt_hash: str = ""
    warnings: list[str] = field(default_factory=list)
    """Warnings of lm-eval about the task."""
    unanswered: dict[int, tuple[Any, str]] = field(default_factory=dict)
    """Number of an item without an answer -> its document, and why."""
    errors: dict[str, str] = field(default_factory=dict)
    """Hash of a document whose metric fails -> why."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Metric whose aggregation fails -> why."""

    def aggregate(self, metric: str, values: Sequence[Any]) -> float | None:
        """Return what values of a metric come to; None: it cannot be told."""
        found = float((self.task.aggregation().get(metric) or _mean)(list(values)))
        return found if math.isfinite(found) else None


def score(tasks: Sequence[BuiltTask], groups: Mapping[str, Any], bridge: Bridge, settings: Settings
          ) -> tuple[dict[str, TaskScores], list[ResultItem], list[str]]:
    """Return the figures of tasks and groups, the items behind them, and what could not be computed."""
    found = _evaluated(tasks, groups, bridge)
    scores: dict[str, TaskScores] = {}
    items: list[ResultItem] = []
    notes: list[str] = []
    for task in tasks:
        of_task = _items(task, found["samples"].get(task.name, []), bridge)
        scores[task.name], remarks = _task_scores(task, found, of_task, settings)
        items += of_task
        notes += [f"{task.name}: {remark}" for remark in remarks]
        if failed := [item.failed for item in of_task if item.failed]:
            notes.append(f"{task.name}: {len(failed)} of {len(of_task)} items have no score; of the first: "
                         f"{failed[0]}")
    return scores | _group_scores(groups, found, scores), items, notes


def _evaluated(tasks: Sequence[BuiltTask], groups: Mapping[str, Any], bridge: Bridge) -> dict[str, Any]:
    """Return lm-eval's results of all items that have answers."""
    from lm_eval.evaluator import evaluate

    places = {}
    for task in tasks:
        if numbers := _keep_answered(task, bridge):
            places[task.name] = numbers
            _guard(task)
    scored = {task.name: task.task for task in tasks if task.name in places}
    if not scored:
        return {"results": {}, "samples": {}}
    whole = {name: group for name, group in groups.items()
             if all(member.task_name in scored for member in group.get_all_tasks())}
    with quiet() as warnings:
        found = evaluate(bridge, {"tasks": scored, "groups": whole}, samples=places, bootstrap_iters=0,
                         confirm_run_unsafe_code=True)
    for task in tasks:
        task.warnings += [text for text in warnings if len(tasks) == 1 or task.name in text]
    assert found is not None
    return dict(found)


class _Numbers(list[int]):
    """Numbers of items, which lm-eval looks up one by one: each at the cost of a set's."""

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__(numbers)
        self._known = set(self)

    def __contains__(self, number: object) -> bool:
        return number in self._known


def _keep_answered(task: BuiltTask, bridge: Bridge) -> _Numbers:
    """Leave the instances of answered items in a task, numbered anew; returns the items' numbers."""
    documents: dict[int, list[Any]] = {}
    for instance in task.task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    kept: dict[int, list[Any]] = {}
    for number, instances in documents.items():
        try:
            for instance in instances:
                for sample in range(int(instance.repeats or 1)):
                    for request in bridge.requests_of(instance, sample):
                        bridge.answer(request)
            kept[number] = instances
        except NotAnswered as e:
            task.unanswered[number] = (instances[0].doc, str(e))
    for place, instances in enumerate(kept.values()):
        for instance in instances:
            instance.doc_id = place  # lm-eval counts the items that it is to evaluate
    task.task._instances = [instance for instances in kept.values() for instance in instances]
    if task.judge is not None:
        task.judge.prompts = [str(instance.args[0]) for instance in task.task._instances]
    return _Numbers(kept)


def _guard(task: BuiltTask) -> None:
    """Keep lm-eval from building a task's prompts again, and from ending where a metric fails."""
    theirs = task.task
    process, aggregations = theirs.process_results, theirs.aggregation

    def processed(doc: Any, results: Any) -> dict[str, Any]:
        try:
            return dict(process(doc, results))
        except Exception as e:  # whatever a metric meets in an answer
            task.errors[doc_hash(doc)] = f"its metric fails ({told_in_a_line(e):.200})"
            return {}

    def guarded(metric: str, aggregate: Callable[[Any], Any]) -> Callable[[Any], float]:
        def figure(values: Any) -> float:
            try:
                found = float(aggregate(values))
                why = "" if math.isfinite(found) else f"it is {found}, which is no number"
            except ZeroDivisionError:
                found, why = math.nan, "it divides by zero"
            except OverflowError:
                found, why = math.nan, "it is too large for a number"
            except Exception as e:  # a metric of anybody's
                found, why = math.nan, f"its metric fails ({told_in_a_line(e):.200})"
            if why:
                task.unknown[metric] = why
            return found
        return figure

    theirs.process_results = processed
    theirs.aggregation = lambda: {metric: guarded(metric, made) for metric, made in aggregations().items()}
    theirs.build_all_requests = lambda **_: None


def _items(task: BuiltTask, samples: Sequence[Mapping[str, Any]], bridge: Bridge) -> list[ResultItem]:
    """Return a task's items, in the order of their numbers."""
    items: dict[int, ResultItem] = {
        number: _item(task, number, doc, {}, why) for number, (doc, why) in task.unanswered.items()}
    instances = iter(task.task.instances)
    for sample in samples:
        number, filter_name = int(sample["doc_id"]), str(sample["filter"])
        scores = {score_name(metric, filter_name): task.aggregate(metric, [sample[metric]])
                  for metric in sample["metrics"]}
        if number in items:  # of another filter
            items[number].scores.update(scores)
            continue
        failed = task.errors.get(doc_hash(sample["doc"]))
        rewards: Sequence[float | None] = ()
        if task.judge is not None and failed is None:
            judged = sample["filtered_resps"][0]
            failed = task.judge.failure(judged)
            rewards = [result.reward for result in next(iter(judged.values()))]
            scores = {name: scores.get(name) for name in task.judge.judging.metric_names}
        # lm-eval goes through the items in the order of its instances, of which a text has one an item
        answers = _answers(next(instances), rewards, bridge) if task.task.OUTPUT_TYPE == TEXT else ()
        items[number] = replace(_item(task, number, sample["doc"], scores, failed), samples=answers)
    return [items[number] for number in sorted(items)]


def _item(task: BuiltTask, number: int, doc: Any, scores: dict[str, float | None], failed: str | None
          ) -> ResultItem:
    question, answer = question_and_answer(task.task, doc)
    cluster_field = sov_of(task.task).get("cluster_field")
    cluster = doc.get(cluster_field) if cluster_field else None
    return ResultItem(task.name, str(number), doc_hash(doc), None if cluster is None else str(cluster),
                      question, answer, scores, failed=failed)


def _answers(instance: Any, rewards: Sequence[float | None], bridge: Bridge) -> tuple[ResultSample, ...]:
    found = [bridge.answer(bridge.requests_of(instance, sample)[0])
             for sample in range(int(instance.repeats or 1))]
    return tuple(ResultSample(str(answer["text"]), str(answer["finish_reason"]),
                              rewards[i] if i < len(rewards) else None) for i, answer in enumerate(found))


def _task_scores(task: BuiltTask, found: Mapping[str, Any], items: Sequence[ResultItem], settings: Settings
                 ) -> tuple[TaskScores, list[str]]:
    results = found["results"].get(task.name, {})
    keys = [tuple(key.rpartition(",")[::2]) for key in results if "," in key and "_stderr," not in key]
    known = dict.fromkeys(keys)
    expected = task.judge.judging.metric_names if task.judge else [] if keys else task.task.aggregation()
    for metric in expected:
        known.setdefault((str(metric), "none"))  # without an answer the figure is not known
    notes: list[str] = []
    metrics, judge = [], task.judge
    for metric, filter_name in known:
        value = results.get(f"{metric},{filter_name}", math.nan)
        better = bool(task.task.higher_is_better().get(metric, True))
        told = _metric(metric, filter_name, float(value), items, better)
        if judge is not None:  # `pass@8` is the metric pass@k with k = 8
            base, _, k = metric.rpartition("@")
            told = replace(told, name=f"{base}@k", k=int(k))
        if told.value is None:
            why = task.unknown.get(metric, "there is no item with a score")
            notes.append(f"{score_name(metric, filter_name)} is not known: {why}")
        metrics.append(told)
    remarks = list(dict.fromkeys([*notes, *(f"lm-eval warns: {text}" for text in task.warnings)]))
    return TaskScores(
        task_hash=hash_of(task.task, task.files), output_type=task.task.OUTPUT_TYPE, items=len(items),
        metrics=tuple(metrics), dataset={"files": task.files}, num_fewshot=task.num_fewshot,
        prompt_hash=task.prompt_hash, chat_template=settings.chat_template,
        mode=settings.mode or (judge.judging.mode if judge else DEFAULT), sampling=_sampling(task.requests),
        judge=", ".join(judge.judges.values()) if judge else None, limit=settings.num_items,
        failed=sum(item.failed is not None for item in items),
        at_limit=sum(sample.finish_reason == LENGTH for item in items for sample in item.samples),
        notes=tuple(remarks)), remarks


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
            found = mean_of(values, clusters)
            return replace(made, stderr=found.standard_error, interval=found.interval)
    except OverflowError:
        pass  # without an interval: it is too large for a number
    return made


def _group_scores(groups: Mapping[str, Any], found: Mapping[str, Any], scores: Mapping[str, TaskScores]
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
            for key, value in found.get("groups", {}).get(name, {}).items()
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
