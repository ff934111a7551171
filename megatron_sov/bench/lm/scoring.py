"""Compute scores with lm-eval's evaluator over the answers, and turn its results into `TaskScores`.

A metric without items, or that divides by zero, is None with a note. An item whose answers have no reward is
failed with the reason.
"""

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.evaluator import evaluate

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.bench.lm.answers import GenerationRequest, Request
from megatron_sov.bench.lm.evaluated_lm import EvaluatedLM
from megatron_sov.bench.lm.harness import suppress_output
from megatron_sov.bench.lm.results import (
    DEFAULT_MODE, Metric, ResultItem, ResultSample, TaskSampling, TaskScores, format_score_name)
from megatron_sov.bench.lm.settings import LmEvalSettings
from megatron_sov.bench.lm.task_files import get_sov_metadata
from megatron_sov.bench.lm.tasks import hash_task
from megatron_sov.bench.suites.judging import AnswerJudge
from megatron_sov.eval.statistics import estimate_mean
from megatron_sov.infer.request import LENGTH

GENERATION = "generate_until"


@dataclass(frozen=True)
class BuiltTask:
    """A task with its prompts and requests."""

    name: str
    task: Any
    """lm-eval's task."""
    judge: AnswerJudge | None
    """None: scored by lm-eval's own metrics."""
    files: dict[str, str]
    """Data file -> SHA-256."""
    num_fewshot: int
    """Examples before each item."""
    requests: Sequence[Request] = ()
    prompt_hash: str = ""

    def aggregate_metric(self, metric: str, values: Sequence[Any]) -> float | None:
        """Aggregate a metric's values; None if the result is not finite."""
        value = float((self.task.aggregation().get(metric) or _compute_mean)(list(values)))
        return value if math.isfinite(value) else None


def score_tasks(tasks: Sequence[BuiltTask], groups: Mapping[str, Any], lm: EvaluatedLM,
                settings: LmEvalSettings) -> tuple[dict[str, TaskScores], list[ResultItem], list[str]]:
    """Return the scores by task and group, the items, and notes about missing values."""
    results = _run_evaluator(tasks, groups, lm, settings)
    scores: dict[str, TaskScores] = {}
    items: list[ResultItem] = []
    notes: list[str] = []
    for task in tasks:
        task_items = _build_items(task, results["samples"].get(task.name, []), lm)
        scores[task.name] = _build_task_scores(task, results["results"].get(task.name, {}), task_items,
                                               settings)
        items += task_items
        notes += [f"{task.name}: {note}" for note in scores[task.name].notes]
        if failures := [item.failed for item in task_items if item.failed]:
            notes.append(f"{task.name}: {len(failures)} of {len(task_items)} items have no score; the first: "
                         f"{failures[0]}")
    return scores | _build_group_scores(groups, results, scores), items, notes


def _run_evaluator(tasks: Sequence[BuiltTask], groups: Mapping[str, Any], lm: EvaluatedLM,
                   settings: LmEvalSettings) -> dict[str, Any]:
    for task in tasks:
        task.task.build_all_requests = lambda **_: None  # the prompts exist already
        aggregates = {name: _catch_arithmetic_errors(aggregate)
                      for name, aggregate in task.task.aggregation().items()}
        task.task.aggregation = lambda aggregates=aggregates: aggregates
    try:
        with suppress_output():
            results = evaluate(lm, {"tasks": {task.name: task.task for task in tasks}, "groups": groups},
                               limit=settings.num_items, bootstrap_iters=0, confirm_run_unsafe_code=True)
    except UserError:
        raise
    except Exception as e:  # various errors from a task's metric or filter
        raise UserError(f"tasks {', '.join(task.name for task in tasks)}: lm-eval cannot score the answers "
                        f"({format_error(e):.300}); correct the task's metric, or leave the task out: the "
                        "answers are saved") from e
    assert results is not None
    return dict(results)


def _catch_arithmetic_errors(aggregate: Callable[[Any], Any]) -> Callable[[Any], float]:
    """Wrap an aggregation to return NaN instead of raising ArithmeticError."""
    def compute_aggregate(values: Any) -> float:
        try:
            return float(aggregate(values))
        except ArithmeticError:
            return math.nan
    return compute_aggregate


def _build_items(task: BuiltTask, samples: Sequence[Mapping[str, Any]], lm: EvaluatedLM) -> list[ResultItem]:
    """Return a task's items by number."""
    items: dict[int, ResultItem] = {}
    # lm-eval yields samples in the order of its instances; generation has an instance per item
    instances = iter(task.task.instances)
    for sample in samples:
        number, filter_name = int(sample["doc_id"]), str(sample["filter"])
        scores = {format_score_name(metric, filter_name): task.aggregate_metric(metric, [sample[metric]])
                  for metric in sample["metrics"]}
        if number in items:  # from a further filter
            items[number].scores.update(scores)
            continue
        failed, rewards = None, ()
        if task.judge is not None:
            judged = sample["filtered_resps"][0]
            failed = task.judge.describe_failure(judged)
            rewards = tuple(result.reward for result in next(iter(judged.values())))
            scores = {name: scores.get(name) for name in task.judge.judging.metric_names}
        answers: tuple[ResultSample, ...] = ()
        if task.task.OUTPUT_TYPE == GENERATION:
            answers = _build_samples(next(instances), rewards, lm)
        question, answer = format_question(task.task, sample["doc"])
        metadata = get_sov_metadata(task.task.get_config("metadata"))
        cluster = sample["doc"].get(str(metadata.get("cluster_field")))
        items[number] = ResultItem(task.name, str(number), doc_sha256=hash_document(sample["doc"]),
                                   cluster=None if cluster is None else str(cluster), question=question,
                                   answer=answer, scores=scores, samples=answers, failed=failed)
    return [items[number] for number in sorted(items)]


def _build_samples(instance: Any, rewards: Sequence[float | None], lm: EvaluatedLM
                   ) -> tuple[ResultSample, ...]:
    answers = [lm.get_sample(instance, number) for number in range(int(instance.repeats or 1))]
    return tuple(ResultSample(str(answer["text"]), str(answer["finish_reason"]),
                              rewards[i] if i < len(rewards) else None) for i, answer in enumerate(answers))


def _build_task_scores(task: BuiltTask, results: Mapping[str, Any], items: Sequence[ResultItem],
                       settings: LmEvalSettings) -> TaskScores:
    keys = [tuple(key.rpartition(",")[::2]) for key in results if "," in key and "_stderr," not in key]
    names = dict.fromkeys(keys)
    judge = task.judge
    # lm-eval leaves a judged metric out if no item has a value
    for name in judge.judging.metric_names if judge else ():
        names.setdefault((name, "none"))
    metrics = []
    for name, filter_name in names:
        value = float(results.get(f"{name},{filter_name}", math.nan))
        higher_is_better = bool(task.task.higher_is_better().get(name, True))
        metric = _build_metric(name, filter_name, value, items, higher_is_better)
        if judge is not None:  # `pass@8` becomes the metric pass@k with k = 8
            base, _, k = name.rpartition("@")
            metric = replace(metric, name=f"{base}@k", k=int(k))
        metrics.append(metric)
    notes = [f"{format_score_name(metric.label, metric.filter)} is not known: it has no item with a score, "
             "divides by zero or is too large for a number" for metric in metrics if metric.value is None]
    return TaskScores(
        task_hash=hash_task(task.task, task.files), output_type=task.task.OUTPUT_TYPE, items=len(items),
        metrics=tuple(metrics), dataset={"files": task.files}, num_fewshot=task.num_fewshot,
        prompt_hash=task.prompt_hash, chat_template=settings.chat_template,
        mode=settings.mode or (judge.judging.mode if judge else DEFAULT_MODE),
        sampling=_get_sampling(task.requests),
        judge=", ".join(judge.judges.values()) if judge else None, limit=settings.num_items,
        failed=sum(item.failed is not None for item in items),
        at_limit=sum(sample.finish_reason == LENGTH for item in items for sample in item.samples),
        notes=tuple(notes))


def _build_metric(name: str, filter_name: str, value: float, items: Sequence[ResultItem],
                  higher_is_better: bool) -> Metric:
    """Build a metric; the mean over items gets an error and an interval, clustered."""
    if not math.isfinite(value):
        return Metric(name, None, filter_name, higher_is_better=higher_is_better)
    key = format_score_name(name, filter_name)
    values: list[float] = []
    clusters: list[Hashable] = []
    for number, item in enumerate(items):
        score = item.scores.get(key)
        if score is not None:
            values.append(score)
            # an item without cluster is a cluster; its number never equals the name of a cluster
            clusters.append(number if item.cluster is None else item.cluster)
    metric = Metric(name, value, filter_name, clusters=len(set(clusters)), higher_is_better=higher_is_better)
    try:
        if values and math.isclose(value, _compute_mean(values), abs_tol=1e-12):
            estimate = estimate_mean(values, clusters)
            return replace(metric, stderr=estimate.standard_error, interval=estimate.interval)
    except OverflowError:
        pass  # no interval: the sum of squares is too large for a float
    return metric


def _build_group_scores(groups: Mapping[str, Any], results: Mapping[str, Any],
                        scores: Mapping[str, TaskScores]) -> dict[str, TaskScores]:
    group_scores: dict[str, TaskScores] = {}
    for name, group in groups.items():
        members = [scores[task.task_name] for task in group.get_all_tasks() if task.task_name in scores]
        if not group.has_aggregation or not members:
            continue
        directions = {(m.name, m.filter): m.higher_is_better for member in members for m in member.metrics}
        metrics = []
        for key, value in results.get("groups", {}).get(name, {}).items():
            metric, _, filter_name = key.rpartition(",")
            if metric and not metric.endswith("_stderr"):
                metrics.append(Metric(metric, float(value) if math.isfinite(value) else None, filter_name,
                                      higher_is_better=directions.get((metric, filter_name), True)))
        files = {file: digest for member in members for file, digest in member.dataset["files"].items()}
        group_scores[name] = replace(
            members[0], task_hash=_hash_texts(member.task_hash for member in members), metrics=tuple(metrics),
            items=sum(member.items for member in members), failed=sum(member.failed for member in members),
            at_limit=sum(member.at_limit for member in members), notes=(), dataset={"files": files},
            prompt_hash=_hash_texts(member.prompt_hash for member in members))
    return group_scores


def _hash_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _get_sampling(requests: Sequence[Request]) -> TaskSampling:
    generations = [request for request in requests if isinstance(request, GenerationRequest)]
    if not generations:
        return TaskSampling(max_tokens=0)
    first = generations[0]
    return TaskSampling(first.temperature, first.top_p, top_k=first.top_k, max_tokens=first.max_tokens,
                        seed=first.seed, samples=1 + max(request.sample for request in generations))


def _compute_mean(values: Sequence[Any]) -> float:
    return math.fsum(map(float, values)) / len(values)


def hash_document(doc: Any) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()


def format_question(task: Any, doc: Any) -> tuple[str, str]:
    """Return question and reference answer; "" if the task lacks them."""
    def call_safely(function: Callable[[Any], Any]) -> Any:
        try:
            return function(doc)
        except Exception:  # a task's own function; the texts are informative only
            return ""

    question, target = call_safely(task.doc_to_text), call_safely(task.doc_to_target)
    choices = call_safely(task.doc_to_choice) if task.get_config("doc_to_choice") else None
    if isinstance(target, list) and target:
        target = target[0]
    if isinstance(choices, list) and isinstance(target, int) and 0 <= target < len(choices):
        target = choices[target]
    return str(question), str(target)


def hash_prompts(instances: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for instance in instances:
        digest.update(json.dumps([instance.request_type, *instance.args], default=str).encode() + b"\n")
    return digest.hexdigest()


def check_scorable(name: str, task: Any, allow_code: bool) -> None:
    """Raise `UserError` if a task needs media, or runs generated programs outside of the sandbox."""
    for media in ("doc_to_image", "doc_to_audio"):
        if task.get_config(media):
            raise UserError(f"task {name}: needs images or audio ({media}), which `eval lm` does not "
                            "support; leave it out")
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise UserError(f"task {name}: lm-eval runs generated programs outside of a sandbox; use a task with "
                        "the reward `code`, such as lcb-v6, or pass --allow-task-code")
