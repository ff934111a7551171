"""pass@k and maj@k from n samples of each prompt, without bias, with intervals over prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean

from megatron_sov.eval.intervals import mean_interval


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
    """Over the scored ones."""

    @property
    def num_scored(self) -> int:
        """The n of the estimators."""
        return self.num_right + sum(self.wrong.values()) + self.num_silent


@dataclass(frozen=True)
class Estimate:
    """One figure over all prompts that have enough samples for it."""

    k: int
    value: float
    """Mean over prompts."""
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
                row = grown.setdefault(ties + (taken == votes), [0] * (draws + 1))
                choices = math.comb(size, taken)
                for drawn in range(ties * votes, draws + 1 - taken):
                    row[drawn + taken] += choices * ways[drawn]
        found = grown
    return {ties: ways[draws] for ties, ways in found.items()}


def pass_estimates(prompts: Sequence[PromptCounts], ks: Sequence[int]) -> list[Estimate]:
    """Return pass@k for each k that a prompt has enough samples for."""
    return _estimates(ks, [{k: pass_at_k(p.num_scored, p.num_right, k) for k in ks if k <= p.num_scored}
                           for p in prompts])


def majority_estimates(prompts: Sequence[PromptCounts], ks: Sequence[int]) -> list[Estimate]:
    """Return maj@k for each k that a prompt has enough samples for."""
    return _estimates(ks, [{k: majority_at_k(p.num_right, p.wrong, p.num_silent, k)
                            for k in ks if k <= p.num_scored} for p in prompts])


def _estimates(ks: Sequence[int], by_prompt: Sequence[Mapping[int, float]]) -> list[Estimate]:
    values = {k: [found[k] for found in by_prompt if k in found] for k in ks}
    return [Estimate(k, fmean(shares), mean_interval(shares), len(shares))
            for k, shares in values.items() if shares]


def default_ks(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to the number of samples, which is the last."""
    return sorted({*(1 << i for i in range(num_samples.bit_length()) if 1 << i <= num_samples), num_samples})
