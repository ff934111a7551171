"""How sure a score is, and a difference of two models' scores on the same items.

Items are drawn in clusters (questions about one text, one problem in several languages) and answered by both
models, so that errors are clustered and differences are paired, as Miller proposes ("Adding Error Bars to
Evals", arXiv 2411.00640, sections 2.2 and 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean

CONFIDENCE = 0.95
MANY = 300
"""Degrees of freedom above which Student's t is a normal distribution."""


@dataclass(frozen=True)
class Mean:
    """A mean over items, with what other items of the same kind could give."""

    value: float
    standard_error: float | None
    """Over clusters; None: there is only one, which tells nothing about others."""
    interval: tuple[float, float] | None
    """Holds the truth in 95 % of cases, or in as many as are asked for; None where that cannot be told."""
    num_items: int
    num_clusters: int
    """Groups of items that were drawn together; as many as items where none were."""


def mean_of(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Mean:
    """Return the mean of items' scores.

    Scores that all lie from 0 to 1 get Wilson's interval for as many independent items as vary as much
    (`mean_interval`); others Student's t over clusters.

    Args:
        values: one finite score for each item.
        clusters: the cluster of each; None: each is one.

    Raises:
        ValueError: there is no value, one is not finite, or clusters are not as many.
    """
    _check(values)
    error, count = _error(values, clusters)
    if all(0 <= value <= 1 for value in values):
        interval: tuple[float, float] | None = mean_interval(values, clusters)
    else:
        interval = _t_interval(fmean(values), error, count - 1, CONFIDENCE)
    return Mean(fmean(values), error, interval, len(values), count)


def paired_difference(before: Sequence[float], after: Sequence[float],
                      clusters: Sequence[Hashable] | None = None, confidence: float = CONFIDENCE) -> Mean:
    """Return the mean of after - before over the same items.

    Where all scores lie from 0 to 1, the interval is that of Bonett and Price (J. Educ. Behav. Stat. 37,
    2012) with clusters and shares: two more clusters of the mean size, one that is won as a whole and one
    that is lost.  So models that agree on all of 30 items are not taken to agree on every other one.  Other
    scores get Student's t over clusters.

    Args:
        before: one finite score for each item.
        after: the same of the other model, in the same order.
        clusters: the cluster of each; None: each is one.
        confidence: of the interval.

    Raises:
        ValueError: there is no item, a score is not finite, or there are not as many of each.
    """
    _check(before)
    _check(after)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    value, (error, count) = fmean(differences), _error(differences, clusters)
    if not all(0 <= score <= 1 for scores in (before, after) for score in scores):
        interval = _t_interval(value, error, count - 1, confidence)
        return Mean(value, error, interval, len(differences), count)
    # The mean size of a cluster, which the two made-up clusters have.
    size = len(differences) / count
    middle = value * count / (count + 2)
    sums = [*cluster_sums(differences, clusters)]
    sizes = [1] * count if clusters is None else _sizes(clusters)
    # from the new middle, and with the two clusters
    # Sums of clusters were taken from the old middle, so each moves by its size times the shift.
    squares = math.fsum((found + held * (value - middle))**2 for found, held in zip(sums, sizes, strict=True))
    squares += (size * (1 - middle))**2 + (size * (-1 - middle))**2
    low, high = _around(middle, math.sqrt(squares) / (len(differences) + 2 * size), count + 1, confidence)
    return Mean(value, error, (max(-1.0, low), min(1.0, high)), len(differences), count)


def _check(values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError("a mean needs finite scores, at least one")


def _error(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[float | None, int]:
    """Return the standard error of a mean and the number of clusters.

    sqrt(G / (G - 1) sum_c (sum_i (x_ci - mean))^2) / n: Miller's equation 4, with the factor by which it
    becomes s / sqrt(n) where each item is a cluster.
    """
    sums = cluster_sums(values, clusters)
    count = len(sums)
    if count == 1:
        return None, 1
    return math.sqrt(count / (count - 1)) * math.hypot(*sums) / len(values), count


def _sizes(clusters: Sequence[Hashable]) -> list[int]:
    found: dict[Hashable, int] = {}
    for cluster in clusters:
        found[cluster] = found.get(cluster, 0) + 1
    return list(found.values())


def _t_interval(middle: float, error: float | None, freedom: int, confidence: float
                ) -> tuple[float, float] | None:
    return None if error is None else _around(middle, error, freedom, confidence)


def _around(middle: float, error: float, freedom: int, confidence: float) -> tuple[float, float]:
    half = error * student_quantile((1 + confidence) / 2, freedom)
    return middle - half, middle + half


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927):
    what `correct` of `samples` does not refute.

    Its ends solve |correct / samples - p| = z sqrt(p (1 - p) / samples).

    Raises:
        ValueError: there is no sample, or `correct` is no count of them.
    """
    if not 0 <= correct <= samples or samples < 1:
        raise ValueError(f"{correct} of {samples} is no share")
    return _score_interval(correct / samples, samples)


def mean_interval(shares: Sequence[float], clusters: Sequence[Hashable] | None = None
                  ) -> tuple[float, float]:
    """Return an interval of the mean that shares from 0 to 1 are drawn around, e.g. each prompt's pass@k.

    Wilson's interval with the effective sample size of Korn and Graubard (Survey Methodology 24, 1998): as
    many yes-or-no samples as would vary as much, fewer where the variance comes from few shares, or from few
    clusters of them.  Shares that are all 0 or 1, each a cluster, give Wilson's own; where all prompts are
    solved it does not shrink to a point, as a bootstrap over prompts would.

    Args:
        shares: one for each item.
        clusters: which items were drawn together, e.g. questions about one text; None: each alone.

    Raises:
        ValueError: there is none, one is no share, or clusters are not as many.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError("a mean needs shares from 0 to 1")
    share, sums = fmean(shares), cluster_sums(shares, clusters)
    most = share * (1 - share)  # the variance of a yes or no; that of shares is no larger
    # All right or all wrong, or one cluster: as many samples as there are clusters, and no more.
    if most <= 0 or len(sums) == 1:
        return _score_interval(share, len(sums))
    spread = math.fsum(residual**2 for residual in sums) / len(shares)
    # Plain yes or no, each alone: Wilson's own interval, without the correction below.
    if len(sums) == len(shares) and math.isclose(spread, most):
        return _score_interval(share, len(shares))
    # equal shares between 0 and 1 tell nothing about others: they count as no more than a thousand each
    effective = len(shares) * most / max(spread, most / 1000)
    middle = (1 + CONFIDENCE) / 2
    # Few clusters know their own variance badly: t instead of the normal quantile.
    doubt = NormalDist().inv_cdf(middle) / student_quantile(middle, len(sums) - 1)
    return _score_interval(share, effective * doubt**2)


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[float]:
    """Return for each cluster the sum of how far its values lie from the mean of all.

    Args:
        values: at least one.
        clusters: the cluster of each; None: each is one.

    Raises:
        ValueError: clusters are not as many as values.
    """
    mean = fmean(values)
    if clusters is None:
        return [value - mean for value in values]
    found: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        found.setdefault(cluster, []).append(value - mean)
    return [math.fsum(residuals) for residuals in found.values()]


def difference_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return an interval of the mean that differences of two shares are drawn around, each pair over the same
    prompt: `mean_interval` of (1 + d) / 2, which lies from 0 to 1.

    Raises:
        ValueError: there is none, or one is no difference of shares.
    """
    low, high = mean_interval([(1 + d) / 2 for d in differences])
    return 2 * low - 1, 2 * high - 1


@lru_cache
def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t above its middle.

    By bisection of the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if freedom > MANY:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    # 60 halvings leave less than a float's last bit.
    for _ in range(60):
        angle = (low + high) / 2
        if _between(angle, freedom) < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.tan(low) * math.sqrt(freedom)


def _between(angle: float, freedom: int) -> float:
    """Return the probability that |t| is less than sqrt(freedom) times the tangent of an angle."""
    is_odd = freedom % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for i in range(freedom // 2):
        total += term
        term *= math.cos(angle)**2 * (2 * i + 1 + is_odd) / (2 * i + 2 + is_odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def _score_interval(share: float, samples: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = math.sqrt(z2 * (share * (1 - share) / samples + z2 / (4 * samples**2))) / (1 + z2 / samples)
    # Exact ends: rounding must not put 0 or 1 outside.
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)
