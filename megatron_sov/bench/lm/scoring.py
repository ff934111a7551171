"""From answers to figures: each item's scores by lm-eval's own filters and metrics, or by the reward that
judges sampled answers and turns of conversations (`metadata.sov`), and what they come to.

A metric that has no items, or divides by zero, is None and named; an item whose score cannot be computed has
failed and says why.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.bench.lm.answers import Request
from megatron_sov.bench.lm.results import (
    Metric, ResultItem, ResultSample, TaskSampling, judged_by, metric_of_items, score_name)
from megatron_sov.bench.lm.subject import Bridge, NotAnswered
from megatron_sov.bench.suites.folding import TURN, fold, without_thoughts
from megatron_sov.bench.suites.protocol import Folded, SuiteResponse, TaskItem, cluster_of
from megatron_sov.chat.marks import as_written
from megatron_sov.eval.statistics import mean_of, student_quantile
from megatron_sov.infer.request import LENGTH

MAX_GROUPS = 50
"""Groups of clusters that a figure which is no mean is computed without, one by one."""
TEXT = "generate_until"


@dataclass
class ScoredTask:
    items: list[ResultItem]
    metrics: tuple[Metric, ...]
    at_limit: int = 0
    notes: list[str] = field(default_factory=list)
    """What could not be computed, and why."""


@dataclass
class _Document:
    doc: Any
    instances: list[Any]
    failed: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)


def documents_of(task: Any) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    # choices are compared by their places, whatever order the instances come in
    return {number: sorted(instances, key=lambda i: int(i.idx)) for number, instances in found.items()}


def score_task(task: Any, bridge: Bridge, cluster_field: str | None) -> ScoredTask:
    """Return what a task's answers come to, as lm-eval computes it."""
    documents = {number: _Document(instances[0].doc, instances)
                 for number, instances in documents_of(task).items()}
    for document in documents.values():
        _fill(document, bridge)
    answered = [d for d in documents.values() if d.failed is None]
    # Filters run over all instances of a task, so those without an answer must be gone.
    task._instances = [instance for d in answered for instance in d.instances]
    raw: dict[tuple[str, str], list[tuple[_Document, Any]]] = {}
    if answered:
        task.apply_filters()
        for name in answered[0].instances[0].filtered_resps:
            _judge(task, answered, name, raw)
    aggregations, better = task.aggregation(), task.higher_is_better()
    notes: list[str] = []
    metrics = []
    clusters = {id(d): cluster_of(d.doc, cluster_field) for d in documents.values()}
    if not raw:
        # Nothing was answered: every figure is there, and not known.
        raw = {(str(metric), "none"): [] for metric in aggregations}
    for (metric, name), values in raw.items():
        aggregate = aggregations.get(metric) or _mean
        for document, value in values:
            # An item alone gets the same aggregation, so its score has the figure's unit.
            document.scores[score_name(metric, name)] = _figure(aggregate, [value])[0]
        groups = [clusters[id(document)] for document, _ in values]
        told = _metric(metric, name, [value for _, value in values], groups, aggregate,
                       bool(better.get(metric, True)), notes)
        metrics.append(told)
    items = [_item(task, number, d, bridge, clusters[id(d)]) for number, d in documents.items()]
    at_limit = sum(s.finish_reason == LENGTH for item in items for s in item.samples)
    return ScoredTask(items, tuple(metrics), at_limit, notes)


def doc_hash(doc: Any) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()


def _fill(document: _Document, bridge: Bridge) -> None:
    try:
        for instance in document.instances:
            # one object several times: by its id `generate_until` counts which sample comes next
            repeated = [instance] * int(instance.repeats or 1)
            instance.resps = list(getattr(bridge, instance.request_type)(repeated))
            instance.filtered_resps = {}
    except NotAnswered as e:
        document.failed = str(e)


def _judge(task: Any, documents: Sequence[_Document], name: str,
           raw: dict[tuple[str, str], list[tuple[_Document, Any]]]) -> None:
    """Have the task judge its items' answers behind a filter; values join `raw`."""
    for document in documents:
        try:
            found = task.process_results(document.doc, [i.filtered_resps[name] for i in document.instances])
        except Exception as e:  # whatever a metric meets in an answer
            document.failed = f"its metric fails ({told_in_a_line(e):.200})"
            continue
        for metric, value in found.items():
            raw.setdefault((metric, name), []).append((document, value))


def _metric(name: str, filter_name: str, values: Sequence[Any], clusters: Sequence[str | None],
            aggregate: Callable[[Any], Any], higher_is_better: bool, notes: list[str]) -> Metric:
    """Return a figure with its error; what it lacks joins `notes`."""
    value, why = _figure(aggregate, values)
    if value is None:
        notes.append(f"{score_name(name, filter_name)} is not known: {why}")
    # an item without a cluster is one of its own; its number never equals a cluster's name
    groups: list[Hashable] = [number if c is None else c for number, c in enumerate(clusters)]
    count = len(set(groups))
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    try:
        # Only a mean has the errors of a mean; corpus figures get a jackknife.
        if value is not None and _are_numbers(values) and math.isclose(value, _mean(values), abs_tol=1e-12):
            found = mean_of([float(v) for v in values], groups)
            stderr, interval = found.standard_error, found.interval
        elif value is not None:
            stderr, interval = _jackknife(aggregate, values, groups, value)
    except OverflowError:
        notes.append(f"{score_name(name, filter_name)} has no interval: it is too large for a number")
    return Metric(name, value, filter_name, None, stderr, interval, count, higher_is_better)


def _figure(aggregate: Callable[[Any], Any], values: Sequence[Any]) -> tuple[float | None, str]:
    """Return what values come to, or why that cannot be told."""
    if not values:
        return None, "there is no item with a score"
    try:
        found = float(aggregate(list(values)))
    except ZeroDivisionError:
        return None, "it divides by zero"
    except OverflowError:
        return None, "it is too large for a number"
    except Exception as e:  # a metric of anybody's
        return None, f"its metric fails ({told_in_a_line(e):.200})"
    return (found, "") if math.isfinite(found) else (None, f"it is {found}, which is no number")


def _mean(values: Sequence[Any]) -> float:
    return math.fsum(map(float, values)) / len(values)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _jackknife(aggregate: Callable[[Any], Any], values: Sequence[Any], clusters: Sequence[Hashable],
               value: float) -> tuple[float | None, tuple[float, float] | None]:
    """Return error and interval of a figure that is no mean, such as a perplexity over all words.

    The delete-a-group jackknife (Kott, J. Off. Stat. 17, 2001): it is computed without each of up to 50
    groups of clusters; the interval is Student's, around the logarithm where all of them are positive.
    """
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    size = min(MAX_GROUPS, len(numbers))
    if size < 2:
        return None, None
    without = []
    for group in range(size):
        # Whole clusters are left out, since their items depend on one another.
        kept = [v for v, cluster in zip(values, clusters, strict=True) if numbers[cluster] % size != group]
        found, _ = _figure(aggregate, kept)
        if found is None:
            return None, None
        without.append(found)
    error, quantile = _spread(without), student_quantile(0.975, size - 1)
    low, high = value - quantile * error, value + quantile * error
    if min(value, *without) > 0:  # a perplexity and its kind, which no interval takes below 0
        factor = math.exp(min(quantile * _spread([math.log(found) for found in without]), 700.0))
        low, high = value / factor, value * factor
    # what is known of a figure near the largest number may be beyond it
    return (error, (low, high)) if math.isfinite(error + low + high) else (None, None)


def _spread(without: Sequence[float]) -> float:
    size = len(without)
    middle = math.fsum(found / size for found in without)
    # a sum of squares would be beyond the largest number from 1e154 on
    return math.sqrt((size - 1) / size) * math.hypot(*(found - middle for found in without))


def _item(task: Any, number: int, document: _Document, bridge: Bridge, cluster: str | None) -> ResultItem:
    samples: tuple[ResultSample, ...] = ()
    if task.OUTPUT_TYPE == TEXT and document.failed is None:
        samples = tuple(_sample(bridge, instance, n) for instance in document.instances
                        for n in range(int(instance.repeats or 1)))
    question, answer = question_and_answer(task, document.doc)
    return ResultItem(task.task_name, str(number), doc_hash(document.doc), cluster, question, answer,
                      document.scores, samples, document.failed)


def _sample(bridge: Bridge, instance: Any, number: int) -> ResultSample:
    found = bridge.answer(bridge.requests_of(instance, number)[0])
    return ResultSample(str(found["text"]), str(found["finish_reason"]))


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


def group_metrics(group: Any, metrics: Mapping[str, Sequence[Metric]], sizes: Mapping[str, int]
                  ) -> tuple[Metric, ...]:
    """Return a group's own figures, means of its members' as its definition weighs them; without one of
    these it is None."""
    flat: dict[str, Any] = {}
    unknown: set[str] = set()
    better: dict[str, bool] = {}
    for task, found in metrics.items():
        values: dict[str, Any] = {"alias": task, "name": task, "sample_len": sizes[task]}
        for metric in found:
            name = f"{metric.name},{metric.filter}"
            better[name] = metric.higher_is_better
            if metric.value is None:
                unknown.add(name)
            # lm-eval's aggregation needs a number; `unknown` takes the result back.
            values[name] = 0.0 if metric.value is None else metric.value
            values[f"{metric.name}_stderr,{metric.filter}"] = metric.stderr or 0.0
        flat[task] = values
    told = []
    for name, value in group.aggregate(flat).items():
        metric, comma, filter_name = name.rpartition(",")
        if comma and not metric.endswith("_stderr"):
            told.append(Metric(metric, None if name in unknown else float(value), filter_name,
                               higher_is_better=better.get(name, True)))
    return tuple(told)


def generation_of(protocol: Any, task: Any, bridge: Bridge) -> dict[str, Any]:
    until = (task.get_config("generation_kwargs") or {}).get("until") or []
    most = bridge.max_gen_tokens or protocol.max_tokens
    return {"until": until, "do_sample": protocol.temperature > 0, "temperature": protocol.temperature,
            "top_p": protocol.top_p, "top_k": protocol.top_k, "seed": protocol.seed,
            "max_gen_toks": min(protocol.max_tokens, most)}


def requests_of(protocol: Any, task: Any, bridge: Bridge) -> list[Request]:
    """Return all that is asked of a model for a task.

    Raises:
        UserError: the task is none of answers in text.
    """
    generation = generation_of(protocol, task, bridge)
    if any(instance.request_type != "generate_until" for instance in task.instances):
        raise UserError(f"task {task.task_name}: metadata.sov samples answers, and its output_type is "
                        f"{task.OUTPUT_TYPE}; write generate_until")
    return [request for instance in task.instances for sample in range(protocol.samples)
            for request in bridge.requests_of(instance, sample, generation)]


def sampling_of(protocol: Any, task: Any, bridge: Bridge) -> TaskSampling:
    generation = generation_of(protocol, task, bridge)
    return TaskSampling(protocol.temperature, protocol.top_p, protocol.top_k, generation["max_gen_toks"],
                        protocol.seed, protocol.samples)


def score_dialogues(protocol: Any, task: Any, dialogues: Dialogues, workers: int) -> tuple[ScoredTask, str]:
    """Return what the turns of conversations come to, see `score_sampled`; the turns of one are a cluster."""
    asked = dialogues.items()
    folded = fold(protocol, [item for _, item, _ in asked], workers)
    items = []
    for (name, made, lacking), scores in zip(asked, folded.items, strict=True):
        samples = tuple(ResultSample(response.text, response.finish_reason, score) for response, score in
                        zip(made.responses, scores.sample_scores, strict=True))
        known = made.doc.get("reference") or []
        turn = made.doc[TURN]
        values = {metric: scores.scores.get(metric) for metric in folded.metric_names}
        items.append(ResultItem(task.task_name, name, doc_hash(made.doc),
                                # turns build on one another: without a field the conversation is the cluster
                                protocol.cluster(made.doc) or name.partition("/")[0],
                                made.doc[protocol.turns_field][turn],
                                known[turn] if turn < len(known) else "",
                                values, samples, lacking or scores.failed))
    return _sum_up(items, folded)


def _sum_up(items: list[ResultItem], folded: Folded) -> tuple[ScoredTask, str]:
    notes: list[str] = []
    metrics = tuple(metric_of_items(name, items, notes) for name in folded.metric_names)
    at_limit = sum(scores.num_at_limit for scores in folded.items)
    return ScoredTask(items, metrics, at_limit, notes), judged_by(folded.judge)


def score_sampled(protocol: Any, task: Any, bridge: Bridge, workers: int) -> tuple[ScoredTask, str]:
    """Return what a task's answers come to, and the name and version of what judged them."""
    generation = generation_of(protocol, task, bridge)
    asked, lacking = [], {}
    for number, instances in documents_of(task).items():
        instance = instances[0]
        responses = []
        try:
            for sample in range(protocol.samples):
                found = bridge.answer(bridge.requests_of(instance, sample, generation)[0])
                responses.append(SuiteResponse(str(found["text"]), str(found["finish_reason"])))
        except NotAnswered as e:
            lacking[number] = str(e)
        asked.append(TaskItem(instance.doc, str(instance.args[0]), responses))
    folded = fold(protocol, asked, workers)
    items = []
    for number, (made, scores) in enumerate(zip(asked, folded.items, strict=True)):
        question, answer = question_and_answer(task, made.doc)
        samples = tuple(ResultSample(response.text, response.finish_reason, score) for response, score in
                        zip(made.responses, scores.sample_scores, strict=False))
        values = {name: scores.scores.get(name) for name in folded.metric_names}
        items.append(ResultItem(task.task_name, str(number), doc_hash(made.doc), protocol.cluster(made.doc),
                                question, answer, values, samples, lacking.get(number, scores.failed)))
    return _sum_up(items, folded)


Messages = list[dict[str, str]]


@dataclass
class _Dialogue:
    """One conversation as far as it has come."""

    doc: Mapping[str, Any]
    messages: Messages
    """Up to the last question."""
    instances: list[Any]
    """lm-eval's, one for each turn that was asked; they live as long as this, for answers are found by
    them."""
    items: list[TaskItem] = field(default_factory=list)
    failed: str = ""
    """Why a turn has no answer."""


class Dialogues:
    """The conversations of one task."""

    def __init__(self, protocol: Any, task: Any, bridge: Bridge, generation: Mapping[str, Any]) -> None:
        self._protocol, self._bridge, self._generation = protocol, bridge, generation
        self._template_kwargs = dict(bridge.template_kwargs)
        self.dialogues: dict[int, _Dialogue] = {}
        """Number of the item -> its conversation."""
        for number, instances in documents_of(task).items():
            doc = instances[0].doc
            self.dialogues[number] = self._dialogue(doc, instances[0])

    def _dialogue(self, doc: Mapping[str, Any], instance: Any) -> _Dialogue:
        messages: Messages = [{"role": "user", "content": doc[self._protocol.turns_field][0]}]
        return _Dialogue(doc, messages, [self._asking(instance, messages)])

    def _asking(self, instance: Any, messages: Messages) -> Any:
        # set at every turn: the bridge is shared, and another task leaves its own mode there
        self._bridge.template_kwargs = self._template_kwargs
        prompt = self._bridge.apply_chat_template(messages)
        return replace(instance, arguments=(prompt, instance.args[1]))

    def requests(self) -> list[Request]:
        """Return what has to be asked now: the last question of each conversation."""
        return [self._request(dialogue) for dialogue in self.dialogues.values() if not dialogue.failed]

    def _request(self, dialogue: _Dialogue) -> Request:
        return self._bridge.requests_of(dialogue.instances[-1], 0, self._generation)[0]

    def go_on(self) -> list[Request]:
        """Take the answers to what was asked, and return what has to be asked behind them; nothing at the
        end."""
        asked: list[Request] = []
        for dialogue in self.dialogues.values():
            questions, turn = dialogue.doc[self._protocol.turns_field], len(dialogue.items)
            if dialogue.failed or turn == len(questions):
                continue
            try:
                found = self._bridge.answer(self._request(dialogue))
            except NotAnswered as e:
                # A conversation ends at a turn without an answer: later questions build on it.
                dialogue.failed = str(e)
                continue
            text = str(found["text"])
            dialogue.items.append(TaskItem({**dialogue.doc, TURN: turn}, list(dialogue.messages),
                                       [SuiteResponse(text, str(found["finish_reason"]))]))
            if turn + 1 < len(questions):
                # as chat templates do: thoughts of earlier turns are not shown to the model again
                dialogue.messages += [
                    {"role": "assistant", "content": as_written(without_thoughts(text, self._protocol.mode))},
                    {"role": "user", "content": questions[turn + 1]}]
                dialogue.instances.append(self._asking(dialogue.instances[0], dialogue.messages))
                asked.append(self._request(dialogue))
        return asked

    def items(self) -> list[tuple[str, TaskItem, str | None]]:
        """Return (number and turn, item, why it has no answer) of every turn, asked or not."""
        found: list[tuple[str, TaskItem, str | None]] = []
        for number, dialogue in self.dialogues.items():
            for turn in range(len(dialogue.doc[self._protocol.turns_field])):
                is_there = turn < len(dialogue.items)
                item = dialogue.items[turn] if is_there else TaskItem({**dialogue.doc, TURN: turn},
                                                                  list(dialogue.messages), [])
                found.append((f"{number}/{turn + 1}", item, None if is_there else dialogue.failed))
        return found
