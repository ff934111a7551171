"""pass@k and maj@k from n samples of each prompt, without bias, with intervals over prompts; and judged
responses, gathered by prompt into these figures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.eval.statistics import mean_interval
from megatron_sov.infer.request import LENGTH
from megatron_sov.judge.rewards.answers import normalized


@dataclass
class PromptCounts:
    """What became of the samples of one prompt."""

    num_right: int = 0
    """Samples that the reward calls right."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Final answer -> samples that give it, all wrong."""
    num_silent: int = 0
    """Wrong samples without a final answer: they vote for nothing."""
    num_unscored: int = 0
    """Samples without a reward; they are none of the n."""
    reward_sum: float = 0.0

    @property
    def num_scored(self) -> int:
        """The n of the estimators."""
        return self.num_right + sum(self.wrong.values()) + self.num_silent


@dataclass(frozen=True)
class Estimate:
    """One figure over all prompts that have enough samples for it."""

    k: int
    value: float
    interval: tuple[float, float]
    """95 %, over prompts: what other prompts of the same kind could give."""
    num_prompts: int
    """Prompts with k scored samples or more."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that of k samples, drawn from n without putting back, one at least is right.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of Chen et al. (arXiv 2107.03374, equation 1), in whole
    numbers up to the last division.

    Raises:
        ValueError: there are fewer than k samples, or more right ones than samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples} samples has no meaning")
    # Whole numbers: quotients of factorials as floats would overflow at a few hundred samples.
    drawn = math.comb(num_samples, k)
    return (drawn - math.comb(num_samples - num_right, k)) / drawn


def majority_at_k(num_right: int, wrong: Mapping[str, int], num_silent: int, k: int) -> float:
    """Return the probability that the most frequent final answer of k samples, drawn from all without putting
    back, is right; of m answers that are equally frequent each is taken with probability 1 / m.

    All draws are counted, as the coefficient of x^k of a product of one polynomial for each answer.  For a
    right answers among the k, another answer may come up less than a times, or a times: then it ties.

    Raises:
        ValueError: there are fewer than k samples.
    """
    sizes = Counter(wrong.values())
    num_samples = num_right + num_silent + sum(wrong.values())
    if not 1 <= k <= num_samples:
        raise ValueError(f"maj@{k} of {num_samples} samples has no meaning")
    won = Fraction(0)
    # By how many of the k are right: the right answer wins where no wrong one has more votes.
    for votes in range(1, min(num_right, k) + 1):
        ways = _ways(sizes, num_silent, votes, k - votes)
        won += math.comb(num_right, votes) * sum(Fraction(count, 1 + ties) for ties, count in ways.items())
    return float(won / math.comb(num_samples, k))


def _ways(sizes: Mapping[int, int], num_silent: int, votes: int, draws: int) -> dict[int, int]:
    """Return number of answers that tie -> ways to draw so many samples of wrong and silent ones of which no
    answer has more than `votes`."""
    # answers that are too rare to tie are drawn as silent ones are
    free = num_silent + sum(size * count for size, count in sizes.items() if size < votes)
    # [ties][drawn so far] -> ways
    found = {0: [math.comb(free, drawn) for drawn in range(draws + 1)]}
    for size in (size for size, count in sizes.items() if size >= votes for _ in range(count)):
        grown: dict[int, list[int]] = {}
        for ties, ways in found.items():
            for taken in range(min(votes, draws) + 1):
                now_tied = ties + 1 if taken == votes else ties
                row = grown.setdefault(now_tied, [0] * (draws + 1))
                choices = math.comb(size, taken)
                # Answers that tie have taken `votes` each, so fewer cannot have been drawn.
                for drawn in range(ties * votes, draws + 1 - taken):
                    row[drawn + taken] += choices * ways[drawn]
        found = grown
    return {ties: ways[draws] for ties, ways in found.items()}


def pass_estimates(prompts: Sequence[PromptCounts], ks: Sequence[int]) -> list[Estimate]:
    return _estimates(ks, [{k: pass_at_k(p.num_scored, p.num_right, k) for k in ks if k <= p.num_scored}
                           for p in prompts])


def majority_estimates(prompts: Sequence[PromptCounts], ks: Sequence[int]) -> list[Estimate]:
    return _estimates(ks, [{k: majority_at_k(p.num_right, p.wrong, p.num_silent, k)
                            for k in ks if k <= p.num_scored} for p in prompts])


def _estimates(ks: Sequence[int], by_prompt: Sequence[Mapping[int, float]]) -> list[Estimate]:
    values = {k: [found[k] for found in by_prompt if k in found] for k in ks}
    return [Estimate(k, fmean(shares), mean_interval(shares), len(shares))
            for k, shares in values.items() if shares]


def default_ks(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to the number of samples, which is the last."""
    return sorted({*(1 << i for i in range(num_samples.bit_length()) if 1 << i <= num_samples), num_samples})


EXTRACTED = "extracted"
"""Component under which verifiers tell the final answer that they read; maj@k counts these."""


@dataclass
class JudgedItem:
    prompts: dict[str, PromptCounts] = field(default_factory=dict)
    """What tells a prompt from others -> its counts, in the order of the file."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Status of the reward -> responses."""
    tells_answers: bool = False
    """Whether the reward has told final answers."""
    reason: str = ""
    """Why the first response without a reward has none, where it says."""
    num_ended: int = 0
    """Responses that say why they ended."""
    num_at_limit: int = 0
    """Those of them that did not end by themselves."""

    def add(self, key: str, row: Mapping[str, Any], right_from: float) -> None:
        """Count a row that `score` has written; rewards from `right_from` are right."""
        counts = self.prompts.setdefault(key, PromptCounts())
        self.statuses[row["status"]] += 1
        if isinstance(row.get("finish_reason"), str):
            self.num_ended += 1
            self.num_at_limit += row["finish_reason"] == LENGTH
        if row["reward"] is None:
            counts.num_unscored += 1
            self.reason = self.reason or str(row.get("reason") or "")
            return
        counts.reward_sum += row["reward"]
        # Only rows with a reward vote: pass@k and maj@k are over the same samples.
        told, answer = final_answer(row["components"])
        self.tells_answers |= told
        if row["reward"] >= right_from:
            counts.num_right += 1
        elif answer:
            counts.wrong[answer] += 1
        else:
            counts.num_silent += 1

    def figures(self, ks: Sequence[int] = ()) -> dict[str, Any]:
        """Return pass@k, maj@k and the mean reward as JSON values.

        Args:
            ks: sizes of the draws; none: 1, 2, 4, ... up to the fewest scored samples of a prompt.

        Raises:
            UserError: no response has a reward, or no prompt has enough samples for one of the sizes.
        """
        scored = [p for p in self.prompts.values() if p.num_scored]
        if not scored:
            raise UserError("no response has a reward, so there is nothing to estimate: "
                            + ", ".join(f"{count:,} {status}" for status, count in self.statuses.items())
                            + (f"; the first because {self.reason}" if self.reason else ""))
        fewest, most = min(p.num_scored for p in scored), max(p.num_scored for p in scored)
        if any(k > most for k in ks):
            raise UserError(f"--k {max(ks)}: no prompt has more than {most} scored samples; ask for fewer, "
                            "or sample more")
        # Up to the prompt with the fewest samples, so every figure is over all prompts.
        ks = sorted(set(ks)) or default_ks(fewest)
        prompts = list(self.prompts.values())
        found: dict[str, Any] = {
            "num_prompts": len(prompts), "num_samples": sum(self.statuses.values()),
            "statuses": dict(self.statuses), "num_unscored": sum(p.num_unscored for p in prompts),
            "num_right": sum(p.num_right for p in prompts),
            "mean_reward": fmean(p.reward_sum / p.num_scored for p in scored),
            "pass_at_k": _plain(pass_estimates(prompts, ks))}
        if self.tells_answers:
            found["maj_at_k"] = _plain(majority_estimates(prompts, ks))
        if self.num_ended:
            found["share_at_limit"] = self.num_at_limit / self.num_ended
        return found


def _plain(estimates: Iterable[Estimate]) -> list[dict[str, Any]]:
    return [{**asdict(e), "interval": list(e.interval)} for e in estimates]


def final_answer(components: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether a reward's components tell the final answer, its own or that of one of its parts, and
    the answer without what tells no two answers apart; empty: the response has none."""
    for told in (components, *(part for part in components.values() if isinstance(part, Mapping))):
        if EXTRACTED in told:
            return True, normalized(str(told[EXTRACTED] or ""))
    return False, ""


def read_judged(path: Path, group_by: str, right_from: float) -> JudgedItem:
    """Return what became of the rows of a file that `score_file` has written.

    Args:
        path: the file.
        group_by: field that the responses to one prompt have in common.
        right_from: least reward of a right response.
    """
    return read_judged_parts(path, None, group_by, right_from).get("", JudgedItem())


def read_judged_parts(path: Path, part_by: str | None, group_by: str, right_from: float) -> dict[str,
                                                                                                 JudgedItem]:
    """Return the same for each value of the field `part_by`, in the order of the file; None: all are "", one
    part."""
    parts: dict[str, JudgedItem] = {}
    with open(path, "rb") as f:
        for line in f:
            row = json.loads(line)
            part = "" if part_by is None else str(row[part_by])
            parts.setdefault(part, JudgedItem()).add(json.dumps(row[group_by], sort_keys=True), row,
                                                     right_from)
    return parts


def table(figures: Mapping[str, Any]) -> str:
    majority = {e["k"]: e for e in figures.get("maj_at_k", [])}
    head = f"{'k':>6}  {'pass@k':>8}  {'95 % interval':>17}"
    head += f"  {'maj@k':>8}  prompts" if majority else "  prompts"
    rows = [f"{e['k']:>6}  {e['value']:>8.2%}  {e['interval'][0]:>7.2%} - {e['interval'][1]:>7.2%}"
            + (f"  {majority[e['k']]['value']:>8.2%}" if majority else "") + f"  {e['num_prompts']:>7,}"
            for e in figures["pass_at_k"]]
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(figures["statuses"].items()))
    ended = (f"; {figures['share_at_limit']:.1%} of the responses did not end by themselves"
             if figures.get("share_at_limit") else "")
    total = (f"{figures['num_prompts']:,} prompts, {counts} responses, mean reward "
             f"{figures['mean_reward']:.4f}{ended}")
    return "\n".join([head, *rows, total])
