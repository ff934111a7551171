"""Wilson's interval: its ends solve the score equation, and it holds the truth as often as it says."""

from __future__ import annotations

import math

import pytest

from megatron_sov.eval.intervals import wilson_interval


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
