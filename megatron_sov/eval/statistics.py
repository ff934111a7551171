"""Confidence intervals for scores, and for score differences between two models on the same items.

Items may be drawn in clusters (questions about one text, translations of one problem), so standard errors are
clustered, and differences are paired, as proposed by Miller, "Adding Error Bars to Evals" (arXiv 2411.00640,
sections 2.2 and 4.2).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean

CONFIDENCE = 0.95
MAX_T_FREEDOM = 300
"""Degrees of freedom above which the normal distribution replaces Student's t."""


@dataclass(frozen=True)
class Mean:
    """Mean over `num_items` items, with confidence interval."""

    value: float
    standard_error: float | None
    """Standard error over clusters; None for a single cluster."""
    interval: tuple[float, float] | None
    """Confidence interval (`CONFIDENCE`); None if undefined."""
    num_items: int
    num_clusters: int
    """Cluster count; equal to `num_items` without clusters."""


def estimate_mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Mean:
    """Return the mean item score with a confidence interval as `Mean`.

    Scores between 0 and 1 get the interval of `compute_mean_interval`, other scores Student's t over
    clusters.

    Args:
        values: one finite score per item.
        clusters: cluster of each item; None: each item is a cluster.

    Raises:
        ValueError: there is no value, a value is not finite, or the lengths differ.
    """
    _check_scores(values)
    error, count = _compute_standard_error(values, clusters)
    if all(0 <= value <= 1 for value in values):
        interval: tuple[float, float] | None = compute_mean_interval(values, clusters)
    else:
        interval = _build_t_interval(fmean(values), error, count - 1)
    return Mean(fmean(values), error, interval, len(values), count)


def estimate_difference(before: Sequence[float], after: Sequence[float],
                        clusters: Sequence[Hashable] | None = None) -> Mean:
    """Return the mean of `after` - `before` over the same items.

    For scores between 0 and 1, the interval is that of Bonett and Price (J. Educ. Behav. Stat. 37, 2012),
    extended to clusters and shares. It adds two clusters of mean size, with differences +1 and -1: without
    them, equal scores on 30 items would give an interval of width 0, as if the models agreed on every other
    item too. Other scores get Student's t over clusters.

    Args:
        before: one finite score per item.
        after: scores of the other model, in the same order.
        clusters: cluster of each item; None: each item is a cluster.

    Raises:
        ValueError: there is no item, a score is not finite, or the lengths differ.
    """
    _check_scores(before)
    _check_scores(after)
    differences = [new - old for old, new in zip(before, after, strict=True)]
    value = fmean(differences)
    error, count = _compute_standard_error(differences, clusters)
    if not all(0 <= score <= 1 for score in (*before, *after)):
        interval = _build_t_interval(value, error, count - 1)
        return Mean(value, error, interval, len(differences), count)
    mean_size = len(differences) / count  # items in each of the two added clusters
    adjusted_mean = value * count / (count + 2)
    shift = value - adjusted_mean
    # both lists have the clusters in order of first occurrence; the deviations are from `value`, and those
    # from the adjusted mean are larger by `shift` per item
    deviations = compute_cluster_sums(differences, clusters)
    sizes = [1] * count if clusters is None else _count_cluster_sizes(clusters)
    squares = math.fsum((deviation + size * shift)**2
                        for deviation, size in zip(deviations, sizes, strict=True))
    squares += (mean_size * (1 - adjusted_mean))**2 + (mean_size * (-1 - adjusted_mean))**2
    adjusted_error = math.sqrt(squares) / (len(differences) + 2 * mean_size)
    low, high = _build_interval(adjusted_mean, adjusted_error, count + 1)
    return Mean(value, error, (max(-1.0, low), min(1.0, high)), len(differences), count)


def _check_scores(values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError("a mean needs finite scores, at least one")


def _compute_standard_error(values: Sequence[float],
                            clusters: Sequence[Hashable] | None) -> tuple[float | None, int]:
    """Return the standard error for a mean, and the cluster count.

    sqrt(G / (G - 1) sum_c (sum_i (x_ci - mean))^2) / n: Miller's equation 4, with a factor that makes it s /
    sqrt(n) if each item is a cluster.
    """
    sums = compute_cluster_sums(values, clusters)
    count = len(sums)
    if count == 1:
        return None, 1
    return math.sqrt(count / (count - 1)) * math.hypot(*sums) / len(values), count


def _count_cluster_sizes(clusters: Sequence[Hashable]) -> list[int]:
    sizes: dict[Hashable, int] = {}
    for cluster in clusters:
        sizes[cluster] = sizes.get(cluster, 0) + 1
    return list(sizes.values())


def _build_t_interval(mean: float, error: float | None, degrees: int) -> tuple[float, float] | None:
    """Return `_build_interval`; None if a single cluster gives no standard error."""
    return None if error is None else _build_interval(mean, error, degrees)


def _build_interval(mean: float, error: float, degrees: int) -> tuple[float, float]:
    """Return Student's interval at `CONFIDENCE` with `degrees` degrees of freedom around a mean."""
    half = error * compute_student_quantile((1 + CONFIDENCE) / 2, degrees)
    return mean - half, mean + half


def compute_wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """Return Wilson's score interval for a share (J. Am. Stat. Assoc. 22, 1927).

    Its ends solve |correct / samples - p| = z sqrt(p (1 - p) / samples). Raises `ValueError`: there is no
    sample, or `correct` is not between 0 and `samples`.
    """
    if not 0 <= correct <= samples or samples < 1:
        raise ValueError(f"{correct} of {samples} is not a share")
    return _compute_score_interval(correct / samples, samples)


def compute_mean_interval(shares: Sequence[float],
                          clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Return a confidence interval for the mean of shares between 0 and 1, e.g. each prompt's pass@k.

    Wilson's interval with the effective sample size of Korn and Graubard (Survey Methodology 24, 1998): the
    number of binary samples with the same variance, reduced if the variance comes from few shares or
    clusters. Shares that are all 0 or 1, without clusters, give Wilson's interval. If all prompts are solved,
    it does not shrink to a point, as a bootstrap over prompts would.

    Args:
        shares: one per item.
        clusters: cluster of each item; None: each item is a cluster.

    Raises:
        ValueError: there is no share, a value is not between 0 and 1, or the lengths differ.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError("a mean needs shares from 0 to 1")
    share, sums = fmean(shares), compute_cluster_sums(shares, clusters)
    max_variance = share * (1 - share)  # variance of a binary sample, the largest possible
    # All right, all wrong, or a single cluster: each cluster counts as one binary sample.
    if max_variance <= 0 or len(sums) == 1:
        return _compute_score_interval(share, len(sums))
    variance = math.fsum(residual**2 for residual in sums) / len(shares)  # per share, over clusters
    # Binary samples without clusters: Wilson's interval, without the corrections below.
    if len(sums) == len(shares) and math.isclose(variance, max_variance):
        return _compute_score_interval(share, len(shares))
    # equal shares between 0 and 1 have variance 0, and the quotient would be infinite: a share counts as at
    # most 1000 samples (our choice)
    effective = len(shares) * max_variance / max(variance, max_variance / 1000)
    probability = (1 + CONFIDENCE) / 2
    # With few clusters the variance is uncertain: use t instead of the normal quantile.
    correction = NormalDist().inv_cdf(probability) / compute_student_quantile(probability, len(sums) - 1)
    return _compute_score_interval(share, effective * correction**2)


def compute_cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[float]:
    """Return, per cluster, the sum of deviations from the overall mean.

    Args:
        values: at least one.
        clusters: cluster of each value; None: each value is a cluster.

    Raises:
        ValueError: the lengths differ.
    """
    mean = fmean(values)
    if clusters is None:
        return [value - mean for value in values]
    by_cluster: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        by_cluster.setdefault(cluster, []).append(value - mean)
    return [math.fsum(residuals) for residuals in by_cluster.values()]


def compute_difference_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return a confidence interval for the mean of paired differences d between shares:
    `compute_mean_interval` of (1 + d) / 2. Raises `ValueError`: `differences` is empty, or has a number
    outside -1 to 1."""
    low, high = compute_mean_interval([(1 + d) / 2 for d in differences])
    return 2 * low - 1, 2 * high - 1


@lru_cache
def compute_student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t with `degrees` degrees of freedom for `probability` above 0.5.

    Bisection of the finite sums for integer degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if degrees > MAX_T_FREEDOM:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2  # angle whose tangent is t / sqrt(degrees)
    # 60 halvings reach float precision.
    for _ in range(60):
        angle = (low + high) / 2
        if _compute_central_probability(angle, degrees) < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.tan(low) * math.sqrt(degrees)


def _compute_central_probability(angle: float, degrees: int) -> float:
    """Return the probability that |t| < sqrt(degrees) * tan(angle)."""
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for i in range(degrees // 2):
        total += term
        term *= math.cos(angle)**2 * (2 * i + 1 + is_odd) / (2 * i + 2 + is_odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def _compute_score_interval(share: float, samples: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    center = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = math.sqrt(z2 * (share * (1 - share) / samples + z2 / (4 * samples**2))) / (1 + z2 / samples)
    # Rounding must not move the ends beyond 0 and 1.
    return (0.0 if share == 0 else center - half), (1.0 if share == 1 else center + half)
