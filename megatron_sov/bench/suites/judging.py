"""Score the answers of an lm-eval task with a reward, configured by the task's `metadata.sov`.

`AnswerJudge.config` adds to the task: a filter that passes all answers to the reward, `process_results` that
counts avg@k, pass@k and cons@k per item, and a metric for each. lm-eval generates as often as `repeats` says,
with `generation_kwargs`.
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
from megatron_sov.chat.marks import BEGIN_THOUGHTS, END_THOUGHTS, to_hermes_form
from megatron_sov.eval.pass_at_k import PromptCounts, compute_majority_at_k, compute_pass_at_k
from megatron_sov.judge.rewards import patterns, registry
from megatron_sov.judge.rewards.answers import extract_last_box, normalize_answer
from megatron_sov.judge.rewards.reward import Refused, Result, Row, Score, run_reward, to_result
from megatron_sov.judge.rewards.scoring import create_runner
from megatron_sov.judge.rewards.version import compute_version

KEY = "sov"
"""Our key in a task's `metadata`."""
BOXED = "boxed"
"""Replaces a pattern in `extract`: a pattern cannot match nested braces."""
BATCH_ROWS = 32
"""Answers per reward call; a row may contain megabytes of tests."""
WRONG = to_result(Score(0.0, {"extracted": None}))
"""Result for an answer without a final answer."""
DESCRIPTIONS = frozenset(("suite", "source", "licence", "release", "items", "prompt_source", "remarks",
                          "fields", "aliases", "group_field", "cluster_field", "shots_file",
                          "shots_per_group", "kind"))
"""Keys in `metadata.sov` about the task and its data."""


def _find_pattern_violation(text: str) -> Violation | None:
    if text in ("", BOXED):
        return None
    if problem := patterns.find_pattern_problem(text):
        return ProblemCode.BOUND, f"is no regular expression ({problem})", ""
    return None if regex.compile(text).groups else (ProblemCode.BOUND, "must have a group, the answer", "")


_REWARD_NAMES = choice_from(lambda: {*registry.BUILT_IN, *SCORERS})


@dataclass(frozen=True)
class Judging:
    """How a reward's results become metrics."""

    task: str
    """Name for messages."""
    reward: Annotated[str, Bound(
        lambda name: None if is_reference(name) else _REWARD_NAMES.find_violation(name))]
    """Reward in `judge.rewards`, FILE.py:NAME, or key of `SCORERS`."""
    reward_settings: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> further reward settings, for metrics named NAME:avg@k."""
    samples: AtLeastOne = 1
    """Answers per item: the task's `repeats`."""
    k: tuple[AtLeastOne, ...] = ()
    """For pass@k and cons@k; empty for 1 and `samples`."""
    metrics: Annotated[tuple[Literal["avg", "pass", "cons"], ...], MinLen(1)] = ("avg",)
    """Mean reward; at least one right answer in k; a right majority in k."""
    mode: Literal["default", "thinking", "no-thinking"] = "default"
    """Mode of a reasoning model: `enable_thinking` in its chat template."""
    right_from: Finite = 1.0
    """Smallest reward for a right answer, for pass@k and cons@k."""
    extract: Annotated[str, Bound(_find_pattern_violation)] = ""
    """Pattern; the first group in its last match is the final answer, and no match is a wrong answer.
    `boxed`: the last \\boxed{...}. Empty: the reward extracts."""
    row: Mapping[str, str] = field(default_factory=dict)
    """Reward's field -> field in the task's data."""
    row_maker: str = ""
    """Key of `ROW_MAKERS`, for fields that are no copies."""
    messages_field: str = ""
    """Field with a conversation as JSON, which replaces the prompt."""

    @property
    def effective_k(self) -> tuple[int, ...]:
        return tuple(k for k in self.k if k <= self.samples) or tuple(sorted({1, self.samples}))

    @property
    def metric_names(self) -> list[str]:
        """Names such as `avg@64`, `pass@8` or `loose:avg@1`."""
        names = []
        for metric in self.metrics:
            sizes = (self.samples,) if metric == "avg" else self.effective_k
            names += [f"{metric}@{k}" for k in sizes]
        return [f"{variant}:{name}" for variant in self.variants for name in names] or names


def parse_judging(config: Mapping[str, Any], *, allow_code: bool, samples: int | None = None,
                  changes: Mapping[str, Any] | None = None) -> Judging | None:
    """Parse a task's `metadata.sov`; None for a task without a reward.

    Args:
        config: the task's settings.
        allow_code: whether the file may name code and addresses.
        samples: overrides `repeats`.
        changes: further reward settings.

    Raises:
        UserError: unknown keys, wrong types or values; names all of them.
    """
    metadata = config.get("metadata")
    sov = metadata.get(KEY) if isinstance(metadata, Mapping) else None
    subject = f"task {config.get('task')}: metadata.{KEY}"
    if sov is not None and not isinstance(sov, Mapping):
        raise UserError(f"{subject} must be an object of settings")
    if sov is None or "reward" not in sov:
        return None
    settings = {str(name): value for name, value in sov.items() if name not in DESCRIPTIONS}
    repeats = samples or config.get("repeats") or 1
    judging = parse_settings(Judging, {**settings, "task": str(config.get("task")), "samples": repeats},
                             subject)
    if not allow_code and (problems := _find_untrusted_settings(judging)):
        raise UserError(format_problems(subject, problems, "pass --allow-task-code if you trust the file"))
    if config.get("output_type") != "generate_until":
        raise UserError(f"{subject}: judges answers, and output_type is {config.get('output_type')}; write "
                        "generate_until")
    if repeats > 1 and not (config.get("generation_kwargs") or {}).get("do_sample"):
        raise UserError(f"task {judging.task}: repeats = {repeats}: greedy answers are all the same; write "
                        "do_sample: true and a temperature into generation_kwargs")
    return replace(judging, reward_settings={**judging.reward_settings, **(changes or {})})


def _find_untrusted_settings(judging: Judging) -> list[str]:
    """Return a sentence for each setting that runs code, or sends data or keys to an address."""
    problems = []
    if is_reference(judging.reward):
        problems.append(f"reward = {judging.reward!r} names code to run")
    if judging.reward == "composed":
        problems.append(f"reward = {judging.reward!r} loads rewards named by its settings")
    operation: set[str] = set()
    if judging.reward in registry.BUILT_IN:
        module, name = registry.BUILT_IN[judging.reward]
        reward_class = getattr(importlib.import_module(module), name)
        operation = {f.name for f in fields(reward_class) if f.metadata.get("operation")} | {"endpoint"}
    for settings in (judging.reward_settings, *judging.variants.values()):
        problems += [f"reward_settings.{name} says how or where the reward runs; give it on the command line"
                     for name in settings if name in operation]
    return problems


Judged = Mapping[str, Sequence[Result]]
"""Variant -> results for an item's answers."""


class AnswerJudge:
    """Filter, `process_results` and metrics for an lm-eval task with a reward.

    Args:
        judging: from `parse_judging`.
        workers: processes for the reward; 0 for one per core.
    """

    def __init__(self, judging: Judging, workers: int = 0) -> None:
        self.judging, self.workers = judging, workers
        self.judges: dict[str, Any] = {}
        """Variant -> name and version of the reward."""

    def __deepcopy__(self, memo: object) -> AnswerJudge:
        return self  # lm-eval copies configurations, and `judges` must be filled here

    @property
    def config(self) -> dict[str, Any]:
        """Settings for the task file."""
        judge_filter = {"function": "custom", "filter_fn": self.judge_answers}
        return {"repeats": self.judging.samples, "process_results": self.count_metrics,
                "filter_list": [{"name": "none", "filter": [judge_filter]}],
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                                for name in self.judging.metric_names]}

    def judge_answers(self, answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
                      ) -> list[Judged]:
        """Score each item's answers (lm-eval's filter). Raises `UserError`: an invalid reward setting, or no
        address for a judge."""
        rows = [build_reward_row(self.judging, doc, answer)
                for doc, texts in zip(docs, answers, strict=True) for answer in texts]
        results = {name: iter(self._score_rows(name, {**self.judging.reward_settings, **settings}, rows))
                   for name, settings in (self.judging.variants or {"": {}}).items()}
        judged_items: list[Judged] = []
        for texts in answers:
            judged_items.append({name: list(islice(scored, len(texts))) for name, scored in results.items()})
        return judged_items

    def _score_rows(self, variant: str, settings: Mapping[str, Any], rows: Sequence[Row | Result]
                    ) -> list[Result]:
        name = self.judging.reward
        try:
            if name in SCORERS:
                scorer = SCORERS[name](**settings)
                self.judges[variant] = f"{name} {compute_version(scorer, settings)}"
                return [row if isinstance(row, Result) else run_reward(scorer, row) for row in rows]
            request = registry.request_reward(name, settings)
            reward = registry.build_versioned_reward(request)
        except (UserError, TypeError) as e:
            hint = ""
            if name == "judge" and "endpoint" not in settings:
                hint = " (pass the judge's address and model: --judge endpoint=URL --judge model=NAME)"
            raise UserError(f"task {self.judging.task}: {e}{hint}") from None
        self.judges[variant] = f"{name} {reward.version}"
        results: list[Result] = []
        with create_runner(request, reward, self.workers or count_cores()) as judge_runner:
            for begin in range(0, len(rows), BATCH_ROWS):
                batch = rows[begin:begin + BATCH_ROWS]
                # rows with a `Result` keep their place
                scored = iter(judge_runner.score([row for row in batch if not isinstance(row, Result)]))
                results += [row if isinstance(row, Result) else next(scored) for row in batch]
        return results

    def count_metrics(self, doc: Mapping[str, Any], results: Sequence[Judged]) -> dict[str, float]:
        """Compute an item's metrics (lm-eval's `process_results`), leaving out those with too few results."""
        metrics: dict[str, float] = {}
        for variant, variant_results in results[0].items():
            prefix = f"{variant}:" if variant else ""
            metrics |= {f"{prefix}{name}": value
                        for name, value in compute_metrics(self.judging, variant_results).items()}
        return metrics

    def describe_failure(self, judged_item: Judged) -> str | None:
        """Return the reason for a missing reward; None if every answer has a reward."""
        missing = [result for results in judged_item.values() for result in results if result.reward is None]
        total = sum(map(len, judged_item.values()))
        return f"{len(missing)} of {total} have no reward: {missing[0].reason}" if missing else None


def compute_metrics(judging: Judging, results: Sequence[Result]) -> dict[str, float]:
    """Compute an item's metrics by name."""
    scored = [result for result in results if result.reward is not None]
    rewards = [float(result.reward or 0.0) for result in scored]
    is_right = [reward >= judging.right_from for reward in rewards]
    metrics: dict[str, float] = {}
    # a mean over fewer answers would have another name
    if "avg" in judging.metrics and len(rewards) >= judging.samples:
        metrics[f"avg@{judging.samples}"] = fmean(rewards)
    votes = PromptCounts()
    for result, right in zip(scored, is_right, strict=True):
        answer = result.components.get("extracted")
        if right:
            votes.num_right += 1
        elif isinstance(answer, str) and answer.strip():
            votes.wrong[normalize_answer(answer)] += 1
        else:
            votes.num_silent += 1
    for k in judging.effective_k:
        if k > len(rewards):
            continue
        if "pass" in judging.metrics:
            metrics[f"pass@{k}"] = float(compute_pass_at_k(len(rewards), sum(is_right), k))
        if "cons" in judging.metrics:
            metrics[f"cons@{k}"] = compute_majority_at_k(votes.num_right, votes.wrong, votes.num_silent, k)
    return metrics


def build_reward_row(judging: Judging, doc: Mapping[str, Any], answer: str) -> Row | Result:
    """Build the reward's row for an answer, or a result for an answer that cannot be judged."""
    response = strip_thoughts(answer, judging.mode)
    row: dict[str, Any] = {}
    try:
        if judging.extract:
            extracted = extract_answer(judging.extract, response)
            if extracted is None:
                return WRONG
            response = extracted
        for name, source in judging.row.items():
            if source not in doc:
                raise Refused(f"the data have no {source!r}")
            value = doc[source]
            is_row_value = value is None or isinstance(value, (str, list, dict))
            row[name] = value if is_row_value else json.dumps(value)
        if judging.row_maker:
            row |= ROW_MAKERS[judging.row_maker](doc)
    except Refused as e:
        return Result(None, "refused", {}, str(e))
    except TimeoutError as e:
        return Result(None, "timeout", {}, str(e))
    return {**row, "response": response}


def strip_thoughts(text: str, mode: str) -> str:
    """Return the text after the thoughts; "" if the thoughts do not end."""
    text = to_hermes_form(text)
    _, mark, response = text.rpartition(END_THOUGHTS)
    if mark:
        return response.strip()
    return "" if mode == "thinking" or text.lstrip().startswith(BEGIN_THOUGHTS) else text


def extract_answer(pattern: str, text: str) -> str | None:
    """Return the first group in a pattern's last match; None without a match.

    `BOXED` returns the last box, or a text without boxes unchanged: math-verify in the reward `math` reads
    the boxes 20 and 204 in one response as 20204. Raises `TimeoutError`: the pattern takes too long.
    """
    if pattern == BOXED:
        box = extract_last_box(text)
        return text if box is None else f"\\boxed{{{box}}}"
    matches = patterns.findall(pattern, text)
    if not matches:
        return None
    last = matches[-1]
    return next((group for group in last if group), "") if isinstance(last, tuple) else last
