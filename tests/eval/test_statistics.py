"""Standard errors and intervals agree with numpy, scipy, a regression, and exhaustive counts."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_sov.eval.pass_at_k import (
    PromptCounts, choose_default_ks, compute_pass_at_k, estimate_majority_at_k, estimate_pass_at_k)
from megatron_sov.eval.statistics import (
    compute_difference_interval, compute_mean_interval, compute_student_quantile, compute_wilson_interval,
    estimate_difference, estimate_mean)


def test_standard_error_without_clusters() -> None:
    values = np.random.default_rng(0).normal(3, 2, 40)
    result = estimate_mean(values.tolist())
    assert result.standard_error == pytest.approx(stats.sem(values), rel=1e-12)
    expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert result.interval == pytest.approx(expected, rel=1e-6)
    assert (result.num_items, result.num_clusters) == (40, 40)


def test_clustered_error_equals_robust_regression() -> None:
    """(X'X)^-1 sum_c X_c' r_c r_c' X_c (X'X)^-1 with G / (G - 1), as statsmodels has it for one column."""
    draw = np.random.default_rng(1)
    clusters = draw.integers(0, 12, 60)
    values = draw.normal(0, 1, 60) + draw.normal(0, 1, 12)[clusters]
    column = np.ones((60, 1))
    residual = values - values.mean()
    meat = sum(np.outer(score, score) for c in range(12)
                 if (score := column[clusters == c].T @ residual[clusters == c]).size)
    bread = np.linalg.inv(column.T @ column)
    expected = float(np.sqrt(12 / 11 * (bread @ meat @ bread)[0, 0]))
    result = estimate_mean(values.tolist(), clusters.tolist())
    assert result.num_clusters == 12
    assert result.standard_error == pytest.approx(expected, rel=1e-12)
    assert result.standard_error > 1.3 * stats.sem(values)  # the part that a naive error omits


def test_single_cluster_has_no_standard_error() -> None:
    assert estimate_mean([-3.0, 5.0], ["a", "a"]).interval is None
    assert estimate_mean([2.5]).standard_error is None
    assert estimate_difference([4.0], [2.0]).interval is None
    assert estimate_mean([1.0, 0.0], ["a", "a"]).interval == pytest.approx((0.05462, 0.94538), abs=1e-5)


def test_paired_interval_equals_bonett_and_price() -> None:
    """Their equation, from the counts of a 2 x 2 table."""
    won, lost, both, neither = 9, 3, 20, 8
    old_scores = [0.0] * won + [1.0] * lost + [1.0] * both + [0.0] * neither
    new_scores = [1.0] * won + [0.0] * lost + [1.0] * both + [0.0] * neither
    n = len(old_scores)
    p12, p21 = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half_width = stats.t.ppf(0.975, n + 1) * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    result = estimate_difference(old_scores, new_scores)
    assert result.value == pytest.approx((won - lost) / n)
    assert result.interval == pytest.approx((p12 - p21 - half_width, p12 - p21 + half_width), rel=1e-5)


def test_paired_intervals_have_coverage_at_every_rate() -> None:
    """Counted over all tables of 20 items."""
    n = 20
    tables = [(won, lost) for won in range(n + 1) for lost in range(n + 1 - won)]
    intervals = {}
    for won, lost in tables:
        old_scores = [0.0] * won + [1.0] * (n - won)
        new_scores = [1.0] * won + [0.0] * lost + [1.0] * (n - won - lost)
        intervals[won, lost] = estimate_difference(old_scores, new_scores).interval
    for p_won, p_lost in ((0.02, 0.02), (0.1, 0.1), (0.05, 0.2), (0.3, 0.1), (0.0, 0.15), (0.4, 0.4)):
        probabilities = stats.multinomial(n, [p_won, p_lost, 1 - p_won - p_lost]).pmf(
            np.array([(won, lost, n - won - lost) for won, lost in tables]))
        coverage = sum(p for p, (low, high) in zip(probabilities, intervals.values(), strict=True)
                   if low <= p_won - p_lost <= high)
        assert coverage > 0.93, (p_won, p_lost)


@pytest.mark.each(("correct", "samples"), [(1, 20), (19, 20), (10, 20), (7, 100), (1, 2)])
def test_wilson_ends_solve_the_score_equation(correct: int, samples: int) -> None:
    share = correct / samples
    for end in compute_wilson_interval(correct, samples):
        assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / samples),
                                                 rel=1e-9)


def test_wilson_interval_of_zero_and_all() -> None:
    low, high = compute_wilson_interval(0, 20)
    assert low == 0 and high == pytest.approx(0.16113, abs=1e-5)
    assert compute_wilson_interval(20, 20) == (pytest.approx(1 - 0.16113, abs=1e-5), 1.0)


def test_wilson_interval_has_nominal_coverage() -> None:
    coverage = []
    for truth in (k / 50 for k in range(3, 48)):
        coverage.append(sum(math.comb(20, k) * truth**k * (1 - truth)**(20 - k) for k in range(21)
                        if compute_wilson_interval(k, 20)[0] <= truth <= compute_wilson_interval(k, 20)[1]))
    assert 0.94 < sum(coverage) / len(coverage) < 0.97 and min(coverage) > 0.9


@pytest.mark.each(("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (10, 2.22814),
                                                   (39, 2.02269), (120, 1.97993), (10_000, 1.95996)])
def test_student_quantiles_equal_tables(freedom: int, quantile: float) -> None:
    assert compute_student_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-5)


def test_difference_interval_is_centered_and_antisymmetric() -> None:
    shares = [0.5, -0.25, 0.75, 0.0, 0.25]
    low, high = compute_difference_interval(shares)
    assert -1 <= low < fmean(shares) < high <= 1
    assert compute_difference_interval([-d for d in shares]) == pytest.approx((-high, -low))
    # all-or-nothing problems give Wilson's interval: 8 of 10 problems, each solved by one model only
    assert compute_difference_interval([1.0] * 8 + [-1.0] * 2) == pytest.approx(
        tuple(2 * end - 1 for end in compute_wilson_interval(8, 10)))
    assert compute_difference_interval([0.0] * 5)[0] < 0


def test_estimates_are_exact_for_many_samples() -> None:
    assert compute_pass_at_k(10_000, 1, 1) == 1e-4
    assert compute_pass_at_k(10_000, 1, 10_000) == 1.0
    assert compute_pass_at_k(2, 1, 1) == 0.5


def test_prompts_with_too_few_samples_are_skipped() -> None:
    prompts = [PromptCounts(num_right=2, num_silent=2), PromptCounts(num_right=1, num_unscored=3)]
    result = estimate_pass_at_k(prompts, [1, 4])
    assert [(e.k, e.value, e.num_prompts) for e in result] == [(1, 0.75, 2), (4, 1.0, 1)]
    assert [(e.k, e.num_prompts) for e in estimate_majority_at_k(prompts, [1, 8])] == [(1, 2)]


def test_default_ks_are_powers_of_two() -> None:
    assert [choose_default_ks(n) for n in (1, 8, 10)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


@pytest.mark.each(("function", "arguments", "message"), [
    (estimate_mean, ([],), "finite scores"), (estimate_mean, ([1.0, math.nan],), "finite scores"),
    (estimate_difference, ([1.0, 0.0], [1.0]), "shorter"),
    *((compute_wilson_interval, counts, "{} of {} is not a share".format(*counts))
      for counts in ((0, 0), (3, 2), (-1, 5))),
    *((compute_mean_interval, (shares,), "shares from 0 to 1") for shares in ([], [1.5], [-0.1, 0.5])),
    *((compute_pass_at_k, counts, "has no meaning") for counts in ((4, 5, 1), (4, 1, 5), (4, 1, 0)))])
def test_invalid_values_raise_value_error(function: Callable[..., object], arguments: tuple[Any, ...],
                                          message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)
