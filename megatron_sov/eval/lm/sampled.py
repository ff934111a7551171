"""Tasks of which several answers to each item are sampled and judged by a reward (`metadata.sov`):
what is asked, and what the answers come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_sov.errors import UserError
from megatron_sov.eval.lm.answers import Request
from megatron_sov.eval.lm.bridge import Bridge, NotAnswered
from megatron_sov.eval.lm.results import Item, Sample, TaskSampling, judged_by, metric_of_items
from megatron_sov.eval.lm.scoring import Scored, doc_hash, documents_of, question_and_answer
from megatron_sov.eval.suites.items import Folded
from megatron_sov.eval.suites.rows import TURN

if TYPE_CHECKING:
    from megatron_sov.eval.lm.dialogues import Dialogues


def generation_of(protocol: Any, task: Any, bridge: Bridge) -> dict[str, Any]:
    """Return how a task's answers are written, in lm-eval's words."""
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
    """Return how a task's answers were written."""
    generation = generation_of(protocol, task, bridge)
    return TaskSampling(protocol.temperature, protocol.top_p, protocol.top_k, generation["max_gen_toks"],
                        protocol.seed, protocol.samples)


def score_dialogues(protocol: Any, task: Any, dialogues: Dialogues, workers: int) -> tuple[Scored, str]:
    """Return what the turns of conversations come to, see `score_sampled`; the turns of one are a cluster."""
    from megatron_sov.eval.suites.folding import fold

    asked = dialogues.items()
    folded = fold(protocol, [item for _, item, _ in asked], workers)
    items = []
    for (name, made, lacking), scores in zip(asked, folded.items, strict=True):
        samples = tuple(Sample(response.text, response.finish_reason, score) for response, score in
                        zip(made.responses, scores.sample_scores, strict=True))
        known = made.doc.get("reference") or []
        turn = made.doc[TURN]
        values = {metric: scores.scores.get(metric) for metric in folded.metric_names}
        items.append(Item(task.task_name, name, doc_hash(made.doc),
                          protocol.cluster(made.doc) or name.partition("/")[0],
                          made.doc[protocol.turns_field][turn], known[turn] if turn < len(known) else "",
                          values, samples, lacking or scores.failed))
    return _scored(items, folded)


def _scored(items: list[Item], folded: Folded) -> tuple[Scored, str]:
    notes: list[str] = []
    metrics = tuple(metric_of_items(name, items, notes) for name in folded.metric_names)
    at_limit = sum(scores.num_at_limit for scores in folded.items)
    return Scored(items, metrics, at_limit, notes), judged_by(folded.judge)


def score_sampled(protocol: Any, task: Any, bridge: Bridge, workers: int) -> tuple[Scored, str]:
    """Return what a task's answers come to, and the name and version of what judged them.

    Args:
        protocol: of `eval.suites.protocol`.
        task: lm-eval's, with its requests built.
        bridge: which has all answers.
        workers: processes that judge.
    """
    from megatron_sov.eval.suites.folding import fold
    from megatron_sov.eval.suites.items import Item as Asked
    from megatron_sov.eval.suites.items import Response

    generation = generation_of(protocol, task, bridge)
    asked, lacking = [], {}
    for number, instances in documents_of(task).items():
        instance = instances[0]
        responses = []
        try:
            for sample in range(protocol.samples):
                found = bridge.answer(bridge.requests_of(instance, sample, generation)[0])
                responses.append(Response(str(found["text"]), str(found["finish_reason"])))
        except NotAnswered as e:
            lacking[number] = str(e)
        asked.append(Asked(instance.doc, str(instance.args[0]), responses))
    folded = fold(protocol, asked, workers)
    items = []
    for number, (made, scores) in enumerate(zip(asked, folded.items, strict=True)):
        question, answer = question_and_answer(task, made.doc)
        samples = tuple(Sample(response.text, response.finish_reason, score) for response, score in
                        zip(made.responses, scores.sample_scores, strict=False))
        values = {name: scores.scores.get(name) for name in folded.metric_names}
        items.append(Item(task.task_name, str(number), doc_hash(made.doc), protocol.cluster(made.doc),
                          question, answer, values, samples, lacking.get(number, scores.failed)))
    return _scored(items, folded)
