"""Judge the answers of an lm-eval task by a reward, as its `metadata.sov` says.

A task with a reward there gets three of lm-eval's own parts: a filter that judges all answers together,
`process_results` that counts avg@k, pass@k and cons@k of an item's answers, and a metric for each of these.
lm-eval asks the model as often as the task's `repeats` says, with its `generation_kwargs`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from statistics import fmean
from typing import Annotated, Any, Literal

import regex
from annotated_types import MinLen

from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import (
    AtLeastOne, Bound, Finite, ProblemCode, Violation, choice_from, count_cores, parse_settings)
from megatron_sov.bench.suites.scorers import ROW_MAKERS, SCORERS
from megatron_sov.chat.marks import to_hermes_form
from megatron_sov.eval.pass_at_k import PromptCounts, compute_majority_at_k, compute_pass_at_k
from megatron_sov.judge.rewards import patterns, registry
from megatron_sov.judge.rewards.answers import extract_last_box, normalize_answer
from megatron_sov.judge.rewards.reward import Refused, Result, Row, Score, run_reward, to_result
from megatron_sov.judge.rewards.scoring import create_runner
from megatron_sov.judge.rewards.version import compute_version

KEY = "sov"
"""Of a task's metadata."""
BOXED = "boxed"
"""A name in place of a pattern: braces in braces are no matter of patterns."""
BATCH_ROWS = 32
"""Answers that are judged together; a row may carry megabytes of tests."""
THINKING_BEGIN, THINKING_END = "<think>", "</think>"
WRONG = to_result(Score(0.0, {"extracted": None}))
"""Of an answer without a final answer."""
DESCRIBING = frozenset(("suite", "source", "licence", "release", "items", "prompt_source", "remarks",
                        "fields", "aliases", "group_field", "cluster_field", "shots_file",
                        "shots_per_group", "kind"))
"""Keys of `metadata.sov` that describe the task and its data."""

def _no_pattern(text: str) -> Violation | None:
    if text in ("", BOXED):
        return None
    if wrong := patterns.find_pattern_problem(text):
        return ProblemCode.BOUND, f"is no regular expression ({wrong})", ""
    return None if regex.compile(text).groups else (ProblemCode.BOUND, "must have a group, the answer", "")


_IS_REWARD = choice_from(lambda: {*registry.BUILT_IN, *SCORERS})


@dataclass(frozen=True)
class Judging:
    """How answers become figures."""

    task: str
    """Name of the task, for messages."""
    reward: Annotated[str, Bound(
        lambda name: None if is_reference(name) else _IS_REWARD.find_violation(name))]
    """A reward of `judge.rewards`, FILE.py:NAME, or one of `SCORERS`."""
    reward_settings: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> further settings of the reward; the figures are called NAME:avg@k."""
    samples: AtLeastOne = 1
    """Answers to each item: the task's `repeats`."""
    k: tuple[AtLeastOne, ...] = ()
    """Sizes of the draws of pass@k and cons@k; empty: 1 and all samples."""
    metrics: Annotated[tuple[Literal["avg", "pass", "cons"], ...], MinLen(1)] = ("avg",)
    """Mean reward of the samples; at least one right of k; the majority of k right."""
    mode: Literal["default", "thinking", "no-thinking"] = "default"
    """Of a reasoning model: `enable_thinking` of its chat template."""
    right_from: Finite = 1.0
    """Least reward of a right answer, for pass@k and cons@k."""
    extract: Annotated[str, Bound(_no_pattern)] = ""
    """Pattern whose last match's first group is the final answer; an answer without a match is wrong.
    `boxed`: the last \\boxed{...}.  Empty: the reward reads the answer itself."""
    row: Mapping[str, str] = field(default_factory=dict)
    """Field that the reward needs -> field of the task's data."""
    row_maker: str = ""
    """Key of `ROW_MAKERS`, which makes such fields where copying is not enough."""
    messages_field: str = ""
    """Field with a whole conversation as JSON, which is the prompt, framed by the chat template."""

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(k for k in self.k if k <= self.samples) or tuple(sorted({1, self.samples}))

    @property
    def metric_names(self) -> list[str]:
        """Return the names of all figures, as `avg@64`, `pass@8`, or with variants `loose:avg@1`."""
        names = [f"{metric}@{k}" for metric in self.metrics
                 for k in ((self.samples,) if metric == "avg" else self.ks)]
        return [f"{variant}:{name}" for variant in self.variants for name in names] or names


def judging_of(config: Mapping[str, Any], *, allow_code: bool, samples: int | None = None,
               changes: Mapping[str, Any] | None = None) -> Judging | None:
    """Return how a task's answers are judged; None: by lm-eval's own metrics.

    Args:
        config: of the task.
        allow_code: whether the file may name code to run and addresses to send to.
        samples: answers to each item, in place of the task's `repeats`.
        changes: settings of the reward that are added to the task's.

    Raises:
        UserError: a key is not known, has the wrong type or breaks a rule; all of them are named.
    """
    metadata = config.get("metadata")
    given = metadata.get(KEY) if isinstance(metadata, Mapping) else None
    where = f"task {config.get('task')}: metadata.{KEY}"
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where} must be an object of settings")
    if "reward" not in (given or {}):
        return None
    settings = {str(name): value for name, value in (given or {}).items() if name not in DESCRIBING}
    repeats = samples or config.get("repeats") or 1
    judging = parse_settings(Judging, {**settings, "task": str(config.get("task")), "samples": repeats},
                             where)
    if not allow_code and (problems := _untrusted(judging)):
        raise UserError(format_problems(where, problems, "pass --allow-task-code if you trust the file"))
    if config.get("output_type") != "generate_until":
        raise UserError(f"{where}: judges answers, and output_type is {config.get('output_type')}; write "
                        "generate_until")
    if repeats > 1 and not (config.get("generation_kwargs") or {}).get("do_sample"):
        raise UserError(f"task {judging.task}: repeats = {repeats}: greedy answers are the same again and "
                        "again; write do_sample: true and a temperature into generation_kwargs")
    return replace(judging, reward_settings={**judging.reward_settings, **(changes or {})})


def _untrusted(judging: Judging) -> list[str]:
    """Return one sentence for all by which a task file would run code, or send data or a key away."""
    p = [f"reward = {judging.reward!r} names code to run"] if is_reference(judging.reward) else []
    if judging.reward == "composed":
        p.append(f"reward = {judging.reward!r} loads what its settings name")
    hidden: set[str] = set()
    if judging.reward in registry.BUILT_IN:
        module, name = registry.BUILT_IN[judging.reward]
        made = getattr(importlib.import_module(module), name)
        hidden = {f.name for f in fields(made) if f.metadata.get("operation")} | {"endpoint"}
    for settings in (judging.reward_settings, *judging.variants.values()):
        p += [f"reward_settings.{name} says how or where the reward runs; give it on the command line"
              for name in settings if name in hidden]
    return p


Judged = Mapping[str, Sequence[Result]]
"""Variant -> results of an item's answers."""


class AnswerJudge:
    """The parts of an lm-eval task whose answers a reward judges.

    Args:
        judging: of the task.
        workers: processes that judge; 0: one for each core.
    """

    def __init__(self, judging: Judging, workers: int = 0) -> None:
        self.judging, self.workers = judging, workers
        self.judges: dict[str, Any] = {}
        """Variant -> name and version of the reward."""

    def __deepcopy__(self, memo: object) -> AnswerJudge:
        return self  # lm-eval copies configurations, and the task keeps the judge that is asked here

    @property
    def config(self) -> dict[str, Any]:
        """Keys of the task's configuration."""
        judge = {"function": "custom", "filter_fn": self.judge}
        return {"repeats": self.judging.samples, "process_results": self.count,
                "filter_list": [{"name": "none", "filter": [judge]}],
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                                for name in self.judging.metric_names]}

    def judge(self, answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[Judged]:
        """Return the judged answers of each item (lm-eval's filter).

        Raises:
            UserError: the reward cannot be made: a setting is wrong, a judge has no address.
        """
        rows = [make_row(self.judging, doc, answer)
                for doc, texts in zip(docs, answers, strict=True) for answer in texts]
        by_variant = {name: iter(self._results(name, {**self.judging.reward_settings, **settings}, rows))
                      for name, settings in (self.judging.variants or {"": {}}).items()}
        return [{name: list(islice(results, len(texts))) for name, results in by_variant.items()}
                for texts in answers]

    def _results(self, variant: str, settings: Mapping[str, Any], rows: Sequence[Row | Result]
                 ) -> list[Result]:
        name = self.judging.reward
        try:
            if name in SCORERS:
                scorer = SCORERS[name](**settings)
                self.judges[variant] = f"{name} {compute_version(scorer, settings)}"
                return [row if isinstance(row, Result) else run_reward(scorer, row) for row in rows]
            order = registry.request_reward(name, settings)
            made = registry.build_versioned_reward(order)
        except (UserError, TypeError) as e:
            hint = ""
            if name == "judge" and "endpoint" not in settings:
                hint = " (pass the judge's address and model: --judge endpoint=URL --judge model=NAME)"
            raise UserError(f"task {self.judging.task}: {e}{hint}") from None
        self.judges[variant] = f"{name} {made.version}"
        results: list[Result] = []
        with create_runner(order, made, self.workers or count_cores()) as judging:
            for begin in range(0, len(rows), BATCH_ROWS):
                batch = rows[begin:begin + BATCH_ROWS]
                # Rows that cannot be judged have a result already, and keep their place.
                scored = iter(judging.score([row for row in batch if not isinstance(row, Result)]))
                results += [row if isinstance(row, Result) else next(scored) for row in batch]
        return results

    def count(self, doc: Mapping[str, Any], results: Sequence[Judged]) -> dict[str, float]:
        """Return the figures of one item (lm-eval's `process_results`), without those that too few judged
        answers are there for."""
        return {f"{variant}:{name}" if variant else name: value for variant, found in results[0].items()
                for name, value in metrics_of(self.judging, found).items()}

    def failure(self, found: Judged) -> str | None:
        """Return why an item has no score; None: all its answers are judged."""
        without = [result for results in found.values() for result in results if result.reward is None]
        total = sum(map(len, found.values()))
        return f"{len(without)} of {total} have no reward: {without[0].reason}" if without else None


def metrics_of(judging: Judging, results: Sequence[Result]) -> dict[str, float]:
    """Return metric -> value of one item."""
    scored = [result for result in results if result.reward is not None]
    rewards = [float(result.reward or 0.0) for result in scored]
    right = [reward >= judging.right_from for reward in rewards]
    found: dict[str, float] = {}
    # a mean over fewer answers than asked for would have another name
    if "avg" in judging.metrics and len(rewards) >= judging.samples:
        found[f"avg@{judging.samples}"] = fmean(rewards)
    votes = PromptCounts()
    for result, is_right in zip(scored, right, strict=True):
        answer = result.components.get("extracted")
        if is_right:
            votes.num_right += 1
        elif isinstance(answer, str) and answer.strip():
            votes.wrong[normalize_answer(answer)] += 1
        else:
            votes.num_silent += 1
    for k in judging.ks:
        if k <= len(rewards):
            if "pass" in judging.metrics:
                found[f"pass@{k}"] = float(compute_pass_at_k(len(rewards), sum(right), k))
            if "cons" in judging.metrics:
                found[f"cons@{k}"] = compute_majority_at_k(votes.num_right, votes.wrong, votes.num_silent, k)
    return found


def make_row(judging: Judging, doc: Mapping[str, Any], answer: str) -> Row | Result:
    """Return the row that the reward reads for an answer, or its result where nothing can be judged."""
    response = without_thoughts(answer, judging.mode)
    row: dict[str, Any] = {}
    try:
        if judging.extract:
            final = extract_answer(judging.extract, response)
            if final is None:
                return WRONG
            response = final
        for name, source in judging.row.items():
            if source not in doc:
                raise Refused(f"the data have no {source!r}")
            value = doc[source]
            row[name] = value if value is None or isinstance(value, (str, list, dict)) else json.dumps(value)
        if judging.row_maker:
            row |= ROW_MAKERS[judging.row_maker](doc)
    except Refused as e:
        return Result(None, "refused", {}, str(e))
    except TimeoutError as e:
        return Result(None, "timeout", {}, str(e))
    return {**row, "response": response}


def without_thoughts(text: str, mode: str) -> str:
    """Return what a model says behind its thoughts; nothing where they do not end."""
    text = to_hermes_form(text)
    _, mark, said = text.rpartition(THINKING_END)
    if mark:
        return said.strip()
    return "" if mode == "thinking" or text.lstrip().startswith(THINKING_BEGIN) else text


def extract_answer(pattern: str, text: str) -> str | None:
    """Return the first group of a pattern's last match; None: there is no match.

    With `BOXED` for a pattern it is the last box, and a text without one as it is: math-verify, which the
    reward `math` asks, reads the boxes 20 and 204 of one response as 20204.

    Raises:
        TimeoutError: the pattern takes too long over this text.
    """
    if pattern == BOXED:
        box = extract_last_box(text)
        return text if box is None else f"\\boxed{{{box}}}"
    found = patterns.findall(pattern, text)
    if not found:
        return None
    return next((group for group in found[-1] if group), "") if isinstance(found[-1], tuple) else found[-1]
