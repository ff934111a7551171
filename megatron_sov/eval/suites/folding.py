"""From samples to scores: each response is judged, and an item's samples give avg@k, pass@k and cons@k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from statistics import fmean
from typing import Any, Self

from megatron_sov.errors import UserError
from megatron_sov.eval.pass_at_k import PromptCounts, majority_at_k, pass_at_k
from megatron_sov.eval.suites.items import AT_LIMIT, Folded, Item, ItemScores, Response
from megatron_sov.eval.suites.own_scorers import OWN_SCORERS
from megatron_sov.eval.suites.protocol import Protocol
from megatron_sov.eval.suites.rows import row_of
from megatron_sov.rewards import registry
from megatron_sov.rewards.answers import normalized
from megatron_sov.rewards.reward import Refused, Result, Row, Score, checked, judged
from megatron_sov.rewards.running import runner
from megatron_sov.rewards.version import operational, version_of
from megatron_sov.settings import num_cores

BATCH_ROWS = 32
"""Responses that are judged together; a row may carry megabytes of tests."""
WRONG = checked(Score(0.0, {"extracted": None}))
"""Of a response without a final answer."""


def fold(protocol: Protocol, items: Sequence[Item], workers: int = 0) -> Folded:
    """Return the scores of items.

    Args:
        protocol: of their task.
        items: with their responses.
        workers: processes that judge; 0: one for each core.

    Raises:
        UserError: the reward cannot be made: a setting is wrong, a judge has no address, a library is
            missing. Or the answers are to something else than the task asks.
    """
    _refuse_other_prompts(protocol, items)
    by_variant: dict[str, list[list[Result]]] = {}
    judge: dict[str, Any] = {}
    for name, settings in (protocol.variants or {"": {}}).items():
        every = {**protocol.reward_settings, **settings}
        with Judge(protocol, every, workers or num_cores()) as judging:
            by_variant[name] = _judged(judging, protocol, items)
            judge[name or "reward"] = judging.identity
    return folded_results(protocol, items, by_variant, judge)


def folded_results(protocol: Protocol, items: Sequence[Item],
                   by_variant: Mapping[str, Sequence[Sequence[Result]]], judge: Mapping[str, Any]) -> Folded:
    """Return the scores of items whose responses have been judged.

    Args:
        protocol: of their task.
        items: with their responses.
        by_variant: variant (or "") -> the results of each item's responses.
        judge: what judged, for the record.
    """
    scores = [_item(protocol, item, {name: found[i] for name, found in by_variant.items()})
              for i, item in enumerate(items)]
    return Folded(scores, protocol.metric_names, judge)


def _refuse_other_prompts(protocol: Protocol, items: Sequence[Item]) -> None:
    """Refuse answers to something else than what the task asks."""
    if protocol.environment and not protocol.reward:
        raise UserError(f"task {protocol.task}: is played with tools (environment {protocol.environment}); "
                        "one answer to its question has no score")
    for item in items:
        conversation = item.doc.get(protocol.messages_field) if protocol.messages_field else None
        if not isinstance(item.prompt, str) or not isinstance(conversation, str):
            continue
        # an endpoint is given messages as JSON of their own
        if conversation in item.prompt and not item.prompt.startswith('{"messages":'):
            raise UserError(f"task {protocol.task}: its prompt is a conversation (field "
                            f"{protocol.messages_field}), and was asked as the text of its JSON; use a "
                            "model with a chat template")


class Judge(AbstractContextManager["Judge"]):
    """A reward that is ready to judge, whichever room it comes from."""

    def __init__(self, protocol: Protocol, settings: Mapping[str, Any], workers: int) -> None:
        self._own: Any = None
        if protocol.reward in OWN_SCORERS:
            try:
                self._own = OWN_SCORERS[protocol.reward](**settings)
            except TypeError:
                raise UserError(f"task {protocol.task}: reward {protocol.reward} takes no settings, but "
                                f"{', '.join(settings)} are given; leave them out") from None
            version, hidden = version_of(self._own, settings), set()
        else:
            try:
                order = registry.order(protocol.reward, settings)
                made = registry.make(order)
            except (UserError, TypeError) as e:
                hint = (" (the judge's address and model are yours to give: --judge endpoint=URL model=NAME)"
                        if protocol.reward == "judge" and "endpoint" not in settings else "")
                raise UserError(f"task {protocol.task}: {e}{hint}") from None
            self._runner = runner(order, made, workers)
            version = made.version
            hidden = operational(type(made.reward))
        self.identity = {"name": protocol.reward, "version": version,
                         "settings": {name: value for name, value in settings.items() if name not in hidden}}

    def __enter__(self) -> Self:
        if self._own is None:
            self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._own is None:
            self._runner.__exit__(*error)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of rows, in their order."""
        return [judged(self._own, row) for row in rows] if self._own is not None else self._runner.score(rows)


def _judged(judging: Judge, protocol: Protocol, items: Sequence[Item]) -> list[list[Result]]:
    """Return the results of each item's responses."""
    flat = ((item, response) for item in items for response in item.responses)
    results: list[Result] = []
    while batch := list(islice(flat, BATCH_ROWS)):
        made = [_row(protocol, item, response) for item, response in batch]
        given = iter(judging.score([row for row in made if not isinstance(row, Result)]))
        results += [row if isinstance(row, Result) else next(given) for row in made]
    in_order = iter(results)
    return [list(islice(in_order, len(item.responses))) for item in items]


def _row(protocol: Protocol, item: Item, response: Response) -> Row | Result:
    try:
        row = row_of(protocol, item, response)
    except Refused as e:
        return Result(None, "refused", {}, str(e))
    except TimeoutError as e:
        return Result(None, "timeout", {}, str(e))
    return WRONG if row is None else row


def _item(protocol: Protocol, item: Item, results: Mapping[str, Sequence[Result]]) -> ItemScores:
    scores: dict[str, float] = {}
    for variant, found in results.items():
        made = metrics_of(protocol, found)
        scores |= {f"{variant}:{name}" if variant else name: value for name, value in made.items()}
    first = next(iter(results.values()))
    without = [result for found in results.values() for result in found if result.reward is None]
    failed = None
    if without:
        failed = f"{len(without)} of {sum(map(len, results.values()))} have no reward: {without[0].reason}"
    elif len(first) < protocol.samples:
        failed = f"{len(first)} of {protocol.samples} samples are there"
    at_limit = sum(response.finish_reason in AT_LIMIT for response in item.responses)
    return ItemScores(scores, [result.reward for result in first], [_answer(result) for result in first],
                      failed, at_limit)


def metrics_of(protocol: Protocol, results: Sequence[Result]) -> dict[str, float]:
    """Return metric -> value of one item; a metric without enough scored samples is left out."""
    rewards = [result.reward for result in results if result.reward is not None]
    right = [reward >= protocol.right_from for reward in rewards]
    found: dict[str, float] = {}
    if "avg" in protocol.metrics and len(rewards) >= protocol.samples:
        found[f"avg@{protocol.samples}"] = fmean(right if protocol.counts == "right" else rewards)
    counts = _counts(protocol, [result for result in results if result.reward is not None])
    for k in protocol.ks:
        if k <= len(rewards):
            if "pass" in protocol.metrics:
                found[f"pass@{k}"] = pass_at_k(len(rewards), sum(right), k)
            if "cons" in protocol.metrics:
                found[f"cons@{k}"] = consensus(counts, k)
    return {name: float(value) for name, value in found.items()}


def consensus(counts: PromptCounts, k: int) -> float:
    """Return the probability that the most frequent answer of k samples is right; of all samples there is one
    draw alone, and nothing to count."""
    if k < counts.num_scored:
        return majority_at_k(counts.num_right, counts.wrong, counts.num_silent, k)
    most = max(counts.wrong.values(), default=0)
    if not counts.num_right or counts.num_right < most:
        return 0.0
    return 1 / (1 + sum(count == counts.num_right for count in counts.wrong.values()))


def _counts(protocol: Protocol, results: Sequence[Result]) -> PromptCounts:
    """Return how the final answers vote: right ones together, wrong ones by what they say."""
    counts = PromptCounts()
    for result in results:
        answer = _answer(result)
        if (result.reward or 0.0) >= protocol.right_from:
            counts.num_right += 1
        elif answer is None:
            counts.num_silent += 1
        else:
            counts.wrong[normalized(answer)] += 1
    return counts


def _answer(result: Result) -> str | None:
    answer = result.components.get("extracted")
    return answer if isinstance(answer, str) and answer.strip() else None
