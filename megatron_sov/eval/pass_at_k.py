"""Estimate pass@k and maj@k without bias from n samples per prompt, with intervals over prompts."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.eval.statistics import compute_mean_interval
from megatron_sov.infer.request import LENGTH
from megatron_sov.judge.rewards.answers import normalize_answer


@dataclass
class PromptCounts:
    """Sample outcomes for a prompt."""

    num_right: int = 0
    """Samples with a sufficient reward."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Wrong final answer -> sample count."""
    num_silent: int = 0
    """Wrong samples without a final answer; silent samples do not vote."""
    num_unscored: int = 0
    """Samples without a reward, left out of n."""
    reward_sum: float = 0.0

    @property
    def num_scored(self) -> int:
        """Samples with a reward, n in `compute_pass_at_k`."""
        return self.num_right + sum(self.wrong.values()) + self.num_silent


@dataclass(frozen=True)
class Estimate:
    """`Mean` over the prompts with enough samples."""

    k: int
    value: float
    interval: tuple[float, float]
    """95 % confidence interval over prompts."""
    num_prompts: int
    """Prompts with at least k scored samples."""


def compute_pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that k samples, drawn from n without replacement, contain a right sample
    (`pass@k`).

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. (arXiv 2107.03374, equation 1). Raises
    `ValueError`: there are fewer than k samples, or more right samples than samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples} samples has no meaning")
    # integers, because float factorials overflow at a few hundred samples
    num_draws = math.comb(num_samples, k)
    return (num_draws - math.comb(num_samples - num_right, k)) / num_draws


def compute_majority_at_k(num_right: int, wrong: Mapping[str, int], num_silent: int, k: int) -> float:
    """Return the probability that the most frequent final answer among k samples, drawn without replacement,
    is right (`maj@k`).

    A tie of m answers is broken uniformly. All draws are counted, as the coefficient of x^k in a product of
    one polynomial per answer: given a right samples among k, another answer may occur less than a times, or a
    times (a tie). Raises `ValueError`: there are fewer than k samples.
    """
    sizes = Counter(wrong.values())
    num_samples = num_right + num_silent + sum(wrong.values())
    if not 1 <= k <= num_samples:
        raise ValueError(f"maj@{k} of {num_samples} samples has no meaning")
    num_won = Fraction(0)
    # Sum over the number of right samples; the right answer wins if no wrong answer has more votes.
    for votes in range(1, min(num_right, k) + 1):
        draws = _count_draws(sizes, num_silent, votes, k - votes)
        num_won += math.comb(num_right, votes) * sum(Fraction(count, 1 + ties)
                                                     for ties, count in draws.items())
    return float(num_won / math.comb(num_samples, k))


def _count_draws(sizes: Mapping[int, int], num_silent: int, votes: int, draws: int) -> dict[int, int]:
    """Return tied answers -> number of draws of wrong and silent samples, an answer at most `votes` times.

    `sizes`: samples of a wrong answer -> number of answers with as many samples. Answers are added one by
    one, as factors of the polynomial product.
    """
    # answers too rare to tie count like silent samples
    num_free = num_silent + sum(size * count for size, count in sizes.items() if size < votes)
    # tied answers -> polynomial: for each number of drawn samples, the number of draws
    polynomials = {0: [math.comb(num_free, num_drawn) for num_drawn in range(draws + 1)]}
    for size in Counter(sizes).elements():
        if size < votes:
            continue
        products: dict[int, list[int]] = {}
        for ties, polynomial in polynomials.items():
            for num_added in range(min(votes, draws) + 1):
                num_ties = ties + 1 if num_added == votes else ties
                product = products.setdefault(num_ties, [0] * (draws + 1))
                choices = math.comb(size, num_added)
                # each tied answer has `votes` samples, so at least ties * votes samples are drawn
                for num_drawn in range(ties * votes, draws + 1 - num_added):
                    product[num_drawn + num_added] += choices * polynomial[num_drawn]
        polynomials = products
    return {ties: polynomial[draws] for ties, polynomial in polynomials.items()}


def estimate_pass_at_k(prompts: Sequence[PromptCounts], ks: Sequence[int]) -> list[Estimate]:
    return _estimate_all(prompts, ks, lambda p, k: compute_pass_at_k(p.num_scored, p.num_right, k))


def estimate_majority_at_k(prompts: Sequence[PromptCounts], ks: Sequence[int]) -> list[Estimate]:
    return _estimate_all(prompts, ks,
                         lambda p, k: compute_majority_at_k(p.num_right, p.wrong, p.num_silent, k))


def _estimate_all(prompts: Sequence[PromptCounts], ks: Sequence[int],
                  compute: Callable[[PromptCounts, int], float]) -> list[Estimate]:
    """Return the mean of `compute(prompt, k)` for each k, over the prompts with at least k samples."""
    estimates = []
    for k in ks:
        if shares := [compute(prompt, k) for prompt in prompts if prompt.num_scored >= k]:
            estimates.append(Estimate(k, fmean(shares), compute_mean_interval(shares), len(shares)))
    return estimates


def choose_default_ks(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... and the sample count."""
    return sorted({*(1 << i for i in range(num_samples.bit_length()) if 1 << i <= num_samples), num_samples})


EXTRACTED = "extracted"
"""Reward component with the final answer that a verifier extracted; maj@k counts these answers."""


@dataclass
class ScoredResponses:
    prompts: dict[str, PromptCounts] = field(default_factory=dict)
    """Prompt key -> counts, in file order."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Reward status -> response count."""
    has_answers: bool = False
    """The reward has extracted final answers."""
    reason: str = ""
    """Reason for the first response without a reward, if stated."""
    num_ended: int = 0
    """Responses with a finish reason."""
    num_at_limit: int = 0
    """Responses cut at the length limit."""

    def add(self, key: str, row: Mapping[str, Any], right_from: float) -> None:
        """Count a row written by `score`; a reward >= `right_from` is right."""
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
        # only rows with a reward vote: pass@k and maj@k use the same samples
        has_answer, answer = extract_final_answer(row["components"])
        self.has_answers |= has_answer
        if row["reward"] >= right_from:
            counts.num_right += 1
        elif answer:
            counts.wrong[answer] += 1
        else:
            counts.num_silent += 1

    def figures(self, ks: Sequence[int] = ()) -> dict[str, Any]:
        """Return `pass@k`, `maj@k` and the mean reward as JSON values.

        Args:
            ks: values of k; empty: 1, 2, 4, ... up to the smallest number of scored samples of a prompt.

        Raises:
            UserError: no response has a reward, or no prompt has enough samples for the largest k.
        """
        scored = [p for p in self.prompts.values() if p.num_scored]
        if not scored:
            raise UserError("no response has a reward, so there is nothing to estimate: "
                            + ", ".join(f"{count:,} {status}" for status, count in self.statuses.items())
                            + (f"; the first because {self.reason}" if self.reason else ""))
        fewest, most = min(p.num_scored for p in scored), max(p.num_scored for p in scored)
        if any(k > most for k in ks):
            raise UserError(f"--k {max(ks)}: no prompt has more than {most} scored samples; choose a smaller "
                            "k, or sample more")
        # up to the smallest sample count, so that every estimate covers every prompt
        ks = sorted(set(ks)) or choose_default_ks(fewest)
        prompts = list(self.prompts.values())
        result: dict[str, Any] = {
            "num_prompts": len(prompts), "num_samples": sum(self.statuses.values()),
            "statuses": dict(self.statuses), "num_unscored": sum(p.num_unscored for p in prompts),
            "num_right": sum(p.num_right for p in prompts),
            "mean_reward": fmean(p.reward_sum / p.num_scored for p in scored),
            "pass_at_k": _to_json(estimate_pass_at_k(prompts, ks))}
        if self.has_answers:
            result["maj_at_k"] = _to_json(estimate_majority_at_k(prompts, ks))
        if self.num_ended:
            result["share_at_limit"] = self.num_at_limit / self.num_ended
        return result


def _to_json(estimates: Iterable[Estimate]) -> list[dict[str, Any]]:
    return [{**asdict(e), "interval": list(e.interval)} for e in estimates]


def extract_final_answer(components: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether reward components (or a nested part) have an answer, and the normalized answer."""
    for values in (components, *(part for part in components.values() if isinstance(part, Mapping))):
        if EXTRACTED in values:
            return True, normalize_answer(str(values[EXTRACTED] or ""))
    return False, ""


def read_scored_responses(path: Path, group_by: str, right_from: float) -> ScoredResponses:
    """Count the rows in a file written by `score_file`. `path`: the file; `group_by`: field that identifies
    the prompt; `right_from`: smallest reward of a right response."""
    return read_scored_parts(path, None, group_by, right_from).get("", ScoredResponses())


def read_scored_parts(path: Path, part_by: str | None, group_by: str,
                      right_from: float) -> dict[str, ScoredResponses]:
    """Count rows per value in field `part_by`, in file order; None counts every row under ""."""
    parts: dict[str, ScoredResponses] = {}
    with open(path, "rb") as f:
        for line in f:
            row = json.loads(line)
            part = "" if part_by is None else str(row[part_by])
            parts.setdefault(part, ScoredResponses()).add(json.dumps(row[group_by], sort_keys=True), row,
                                                          right_from)
    return parts


def format_table(figures: Mapping[str, Any]) -> str:
    majority = {e["k"]: e for e in figures.get("maj_at_k", [])}
    head = f"{'k':>6}  {'pass@k':>8}  {'95 % interval':>17}"
    head += f"  {'maj@k':>8}  prompts" if majority else "  prompts"
    rows = []
    for e in figures["pass_at_k"]:
        low, high = e["interval"]
        row = f"{e['k']:>6}  {e['value']:>8.2%}  {low:>7.2%} - {high:>7.2%}"
        if majority:
            row += f"  {majority[e['k']]['value']:>8.2%}"
        rows.append(f"{row}  {e['num_prompts']:>7,}")
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(figures["statuses"].items()))
    ended = (f"; {figures['share_at_limit']:.1%} of the responses did not end by themselves"
             if figures.get("share_at_limit") else "")
    total = (f"{figures['num_prompts']:,} prompts, {counts} responses, mean reward "
             f"{figures['mean_reward']:.4f}{ended}")
    return "\n".join([head, *rows, total])
