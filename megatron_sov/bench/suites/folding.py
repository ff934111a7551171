"""From samples to scores: each response becomes a row that a reward judges, and an item's samples give avg@k,
pass@k and cons@k.

LiveCodeBench's hidden tests are base64 of zlib of a pickled text that is JSON.  Nothing is unpickled here:
the pickle is read opcode by opcode, and one that holds anything but a single text is refused.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from statistics import fmean
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import num_cores
from megatron_sov.bench.suites.protocol import (
    AT_LIMIT, BOXED, OWN_SCORERS, Folded, ItemScores, Protocol, SuiteResponse, TaskItem)
from megatron_sov.chat.marks import plain_form
from megatron_sov.eval.pass_at_k import PromptCounts, majority_at_k, pass_at_k
from megatron_sov.judge.rewards import patterns, registry
from megatron_sov.judge.rewards.answers import last_boxed, normalized
from megatron_sov.judge.rewards.reward import Refused, Result, Row, Score, checked, judged, told_short
from megatron_sov.judge.rewards.scoring import runner
from megatron_sov.judge.rewards.version import operational, version_of

BATCH_ROWS = 32
"""Responses that are judged together; a row may carry megabytes of tests."""
WRONG = checked(Score(0.0, {"extracted": None}))
"""Of a response without a final answer."""


def fold(protocol: Protocol, items: Sequence[TaskItem], workers: int = 0) -> Folded:
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
        judging, judge[name or "reward"] = _judge_of(protocol, {**protocol.reward_settings, **settings},
                                                     workers or num_cores())
        with judging:
            by_variant[name] = _judge_items(judging, protocol, items)
    return folded_results(protocol, items, by_variant, judge)


def folded_results(protocol: Protocol, items: Sequence[TaskItem],
                   by_variant: Mapping[str, Sequence[Sequence[Result]]], judge: Mapping[str, Any]) -> Folded:
    """Return the scores of items whose responses have been judged."""
    scores = [_item(protocol, item, {name: found[i] for name, found in by_variant.items()})
              for i, item in enumerate(items)]
    return Folded(scores, protocol.metric_names, judge)


def _refuse_other_prompts(protocol: Protocol, items: Sequence[TaskItem]) -> None:
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


class _OwnScorer(AbstractContextManager["_OwnScorer"]):
    """A scorer of a suite, in the place of a reward's runner."""

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer

    def __exit__(self, *error: object) -> None:
        return

    def score(self, rows: Sequence[Row]) -> list[Result]:
        return [judged(self._scorer, row) for row in rows]


def _judge_of(protocol: Protocol, settings: Mapping[str, Any], workers: int) -> tuple[Any, dict[str, Any]]:
    if protocol.reward in OWN_SCORERS:
        try:
            own = OWN_SCORERS[protocol.reward](**settings)
        except TypeError:
            raise UserError(f"task {protocol.task}: reward {protocol.reward} takes no settings, but "
                            f"{', '.join(settings)} are given; leave them out") from None
        return _OwnScorer(own), {"name": protocol.reward, "version": version_of(own, settings),
                                 "settings": dict(settings)}
    try:
        order = registry.order(protocol.reward, settings)
        made = registry.make(order)
    except (UserError, TypeError) as e:
        hint = (" (the judge's address and model are yours to give: --judge endpoint=URL model=NAME)"
                if protocol.reward == "judge" and "endpoint" not in settings else "")
        raise UserError(f"task {protocol.task}: {e}{hint}") from None
    hidden = operational(type(made.reward))
    return runner(order, made, workers), {
        "name": protocol.reward, "version": made.version,
        "settings": {name: value for name, value in settings.items() if name not in hidden}}


def _judge_items(judging: Any, protocol: Protocol, items: Sequence[TaskItem]) -> list[list[Result]]:
    flat = ((item, response) for item in items for response in item.responses)
    results: list[Result] = []
    while batch := list(islice(flat, BATCH_ROWS)):
        made = [_row(protocol, item, response) for item, response in batch]
        # Rows that cannot be judged have a result already, and keep their place.
        given = iter(judging.score([row for row in made if not isinstance(row, Result)]))
        results += [row if isinstance(row, Result) else next(given) for row in made]
    # Results come in the order of responses, so each item takes as many as it has.
    in_order = iter(results)
    return [list(islice(in_order, len(item.responses))) for item in items]


def _row(protocol: Protocol, item: TaskItem, response: SuiteResponse) -> Row | Result:
    try:
        row = row_of(protocol, item, response)
    except Refused as e:
        return Result(None, "refused", {}, str(e))
    except TimeoutError as e:
        return Result(None, "timeout", {}, str(e))
    return WRONG if row is None else row


def _item(protocol: Protocol, item: TaskItem, results: Mapping[str, Sequence[Result]]) -> ItemScores:
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
    return ItemScores(scores, [result.reward for result in first], failed, at_limit)


def metrics_of(protocol: Protocol, results: Sequence[Result]) -> dict[str, float]:
    """Return metric -> value of one item; a metric without enough scored samples is left out."""
    rewards = [result.reward for result in results if result.reward is not None]
    right = [reward >= protocol.right_from for reward in rewards]
    found: dict[str, float] = {}
    # A mean over fewer samples than the protocol asks would have another name.
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
    # Right answers vote together; another answer with more votes wins.
    if not counts.num_right or counts.num_right < most:
        return 0.0
    # A tie is broken by lot.
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


TURN = "turn"
"""Field of a conversation's item with the number of its question, from 0."""
THINKING_BEGIN, THINKING_END = "<think>", "</think>"


def without_thoughts(text: str, mode: str) -> str:
    """Return what a model says behind its thoughts; nothing where they do not end."""
    text = plain_form(text)
    _, mark, said = text.rpartition(THINKING_END)
    if mark:
        return said.strip()
    return "" if mode == "thinking" or text.lstrip().startswith(THINKING_BEGIN) else text


def extracted(pattern: str, text: str) -> str | None:
    """Return the first group of a pattern's last match; None: there is no match.

    With `BOXED` for a pattern it is the last box, and a text without one as it is: math-verify, which the
    reward `math` asks, reads the boxes 20 and 204 of one response as 20204.

    Raises:
        TimeoutError: the pattern takes too long over this text.
    """
    if pattern == BOXED:
        box = last_boxed(text)
        return text if box is None else f"\\boxed{{{box}}}"
    found = patterns.findall(pattern, text)
    if not found:
        return None
    return next((group for group in found[-1] if group), "") if isinstance(found[-1], tuple) else found[-1]


def row_of(protocol: Protocol, item: TaskItem, response: SuiteResponse) -> Row | None:
    """Return the row that a reward judges; None: the response has no final answer, so it is wrong.

    Raises:
        Refused: the item's data do not hold what the reward needs.
        TimeoutError: the pattern takes too long over this response.
    """
    # an episode's answer is told apart from thoughts where it is read
    said = response.text if protocol.environment else without_thoughts(response.text, protocol.mode)
    if protocol.extract:
        answer = extracted(protocol.extract, said)
        if answer is None:
            return None
        said = answer
    made: dict[str, Any] = {"prompt": item.prompt}
    for name, source in protocol.row.items():
        if source not in item.doc:
            raise Refused(f"the data have no {source!r}")
        value = item.doc[source]
        made[name] = value
    if protocol.row_maker:
        made |= ROW_MAKERS[protocol.row_maker](item.doc)
    return {**made, "response": said}


def _instructions(doc: Mapping[str, Any]) -> dict[str, Any]:
    """IFEval's and IFBench's columns; a table has every argument of any instruction, empty for most."""
    return {name: json.loads(value) if isinstance(value := doc[name], str) else value
            for name in ("instruction_id_list", "kwargs") if name in doc}


def _turn(doc: Mapping[str, Any]) -> dict[str, Any]:
    known = doc.get("reference") or []
    return {"answer": known[doc[TURN]]} if doc[TURN] < len(known) else {}


MAX_BYTES = 1 << 30
"""Of the tests of one problem, unpacked."""
_TEXTS = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"))
_AROUND = frozenset(("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"))


def code_row(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `tests` of a problem, as the reward `code` reads it.

    Raises:
        Refused: the tests cannot be read.
    """
    tests = [*_tests(doc, "public_test_cases"), *_tests(doc, "private_test_cases")]
    if not tests:
        raise Refused("the problem has no tests")
    metadata = _json(doc.get("metadata") or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise Refused("metadata must be a JSON object")
    return {"tests": [_test(test, metadata.get("func_name")) for test in tests]}


def _tests(doc: Mapping[str, Any], field: str) -> list[Any]:
    value = doc.get(field) or "[]"
    if not isinstance(value, str):
        raise Refused(f"{field} must be text that is JSON, as the publisher has it")
    found = _json(value if value.lstrip().startswith("[") else unpacked(value, field), field)
    if not isinstance(found, list):
        raise Refused(f"{field} must be a list of tests")
    return found


def unpacked(value: str, field: str) -> str:
    """Return the text that is packed in base64, zlib and a pickle.

    Raises:
        Refused: it is packed otherwise, larger than `MAX_BYTES`, or the pickle is more than a text.
    """
    try:
        stream = zlib.decompressobj()
        # Bounded: a small text may unpack to more than there is memory.
        raw = stream.decompress(base64.b64decode(value, validate=True), MAX_BYTES)
    except (binascii.Error, ValueError, zlib.error) as e:
        raise Refused(f"{field} is neither JSON nor packed as the publisher packs it ({e})") from None
    if stream.unconsumed_tail or not stream.eof:
        raise Refused(f"{field} is cut off, or larger than {MAX_BYTES >> 20} MiB unpacked")
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            # Read opcode by opcode, and never executed: a pickle is a program.
            if opcode.name in _TEXTS:
                texts.append(argument)
            elif opcode.name not in _AROUND:
                raise Refused(f"{field} holds a pickle with {opcode.name}; one of a single text is read, and "
                              "nothing is ever unpickled")
    except (ValueError, IndexError, KeyError) as e:
        raise Refused(f"{field} holds no whole pickle ({e})") from None
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise Refused(f"{field} holds a pickle of {len(texts)} texts; it must be one")
    return texts[0]


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError) as e:
        raise Refused(f"{field} is no JSON ({str(e)[:120]})") from None


def _test(test: Any, name: Any) -> dict[str, Any]:
    """Return a test as an input with what has to be printed, or as a call of the solution's method."""
    if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
        raise Refused(f"test {told_short(test)} must have the texts input and output")
    kind = test.get("testtype", "functional" if name else "stdin")
    if kind == "stdin":
        return {"stdin": test["input"], "stdout": test["output"]}
    if kind != "functional" or not isinstance(name, str):
        raise Refused(f"testtype = {told_short(kind)} with func_name = {told_short(name)}; it must be stdin, "
                      "or functional with a name")
    # each line is one argument, as the publisher's runner reads them
    arguments = [_value(line) for line in test["input"].split("\n") if line.strip()]
    return {"function": f"Solution().{name}", "arguments": arguments, "expected": _value(test["output"])}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise Refused(f"{told_short(text)} is no value that a test can be called with") from None


ROW_MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "instructions": _instructions, "livecodebench": code_row, "turn": _turn}
"""Name -> what makes fields of a row from an item's data."""
