"""How sure a score is, and a difference of two models' scores on the same items.

Items are drawn in clusters (questions about one text, one problem in several languages) and answered by both
models, so that errors are clustered and differences are paired, as Miller proposes ("Adding Error Bars to
Evals", arXiv 2411.00640, sections 2.2 and 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_sov.eval.intervals import CONFIDENCE, cluster_sums, mean_interval, student_quantile


@dataclass(frozen=True)
class Mean:
    """A mean over items, with what other items of the same kind could give."""

    value: float
    """The mean."""
    standard_error: float | None
    """Over clusters; None: there is only one, which tells nothing about others."""
    interval: tuple[float, float] | None
    """Holds the truth with the confidence asked for; None where that cannot be told."""
    num_items: int
    """Values in the mean."""
    num_clusters: int
    """Groups of items that were drawn together; as many as items where none were."""


def mean_of(values: Sequence[float], clusters: Sequence[Hashable] | None = None,
            confidence: float = CONFIDENCE) -> Mean:
    """Return the mean of items' scores.

    Scores that all lie from 0 to 1 get Wilson's interval for as many independent items as vary as much
    (`intervals.mean_interval`); others Student's t over clusters.

    Args:
        values: one finite score for each item.
        clusters: the cluster of each; None: each is one.
        confidence: of the interval.

    Raises:
        ValueError: there is no value, one is not finite, or clusters are not as many.
    """
    _check(values)
    error, count = _error(values, clusters)
    if all(0 <= value <= 1 for value in values):
        interval: tuple[float, float] | None = mean_interval(values, confidence, clusters)
    else:
        interval = _t_interval(fmean(values), error, count - 1, confidence)
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
    size = len(differences) / count
    middle = value * count / (count + 2)
    sums = [*cluster_sums(differences, clusters)]
    sizes = [1] * count if clusters is None else _sizes(clusters)
    # from the new middle, and with the two clusters
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
