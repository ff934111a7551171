"""Intervals of shares and of their mean hold the truth as often as they say."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from megatron_sov.eval.statistics import (
    difference_interval,
    mean_interval,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "samples"), [(1, 20), (19, 20), (10, 20), (7, 100), (1, 2)])
def test_the_ends_solve_the_score_equation(correct: int, samples: int) -> None:
    share = correct / samples
    for end in wilson_interval(correct, samples):
        assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / samples),
                                                 rel=1e-9)


def test_nothing_and_everything_right_leave_one_end_open() -> None:
    low, high = wilson_interval(0, 20)
    assert low == 0 and high == pytest.approx(0.16113, abs=1e-5)
    assert wilson_interval(20, 20) == (pytest.approx(1 - 0.16113, abs=1e-5), 1.0)


def test_it_holds_the_truth_in_about_95_of_100_draws() -> None:
    held = []
    for truth in (k / 50 for k in range(3, 48)):
        held.append(sum(math.comb(20, k) * truth**k * (1 - truth)**(20 - k) for k in range(21)
                        if wilson_interval(k, 20)[0] <= truth <= wilson_interval(k, 20)[1]))
    assert 0.94 < sum(held) / len(held) < 0.97 and min(held) > 0.9


@pytest.mark.parametrize(("correct", "samples"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_share_is_refused(correct: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} of {samples} is no share"):
        wilson_interval(correct, samples)


def test_of_yes_and_no_the_mean_has_wilsons_interval() -> None:
    for correct in (0, 1, 7, 20):
        shares = [1.0] * correct + [0.0] * (20 - correct)
        assert mean_interval(shares) == pytest.approx(wilson_interval(correct, 20), rel=1e-12)


def test_the_interval_of_shares_agrees_with_a_bootstrap_over_prompts() -> None:
    draw = np.random.default_rng(0)
    shares = draw.beta(0.6, 0.9, 400)
    means = draw.choice(shares, (4000, 400)).mean(1)
    assert mean_interval(shares.tolist()) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.004)


def test_the_interval_of_a_mean_holds_the_truth_in_about_95_of_100_draws() -> None:
    draw = np.random.default_rng(1)
    shares = draw.binomial(8, draw.beta(0.5, 1.5, (1500, 40))) / 8  # pass@1 of 40 prompts with 8 samples each
    intervals = [mean_interval(row) for row in shares.tolist()]
    assert 0.93 < np.mean([low <= 0.25 <= high for low, high in intervals]) < 0.97


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (10, 2.22814),
                                                   (39, 2.02269), (120, 1.97993), (10_000, 1.95996)])
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-5)


def test_two_prompts_tell_little() -> None:
    low, high = mean_interval([0.5, 0.25])
    assert high - low > 0.5


def test_equal_shares_leave_some_doubt() -> None:
    low, high = mean_interval([0.5, 0.5])
    assert low < 0.5 < high


@pytest.mark.parametrize("shares", [[], [1.5], [-0.1, 0.5]])
def test_a_mean_of_what_is_no_share_is_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        mean_interval(shares)


def test_an_interval_of_differences_lies_around_their_mean_and_turns_with_their_sign() -> None:
    shares = [0.5, -0.25, 0.75, 0.0, 0.25]
    low, high = difference_interval(shares)
    assert -1 <= low < fmean(shares) < high <= 1
    assert difference_interval([-d for d in shares]) == pytest.approx((-high, -low))
    # all or nothing is Wilson's own: 8 of 10 problems, of which one model alone solves each
    assert difference_interval([1.0] * 8 + [-1.0] * 2) == pytest.approx(
        tuple(2 * end - 1 for end in wilson_interval(8, 10)))
    assert difference_interval([0.0] * 5)[0] < 0
