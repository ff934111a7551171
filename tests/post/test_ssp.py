"""The best checkpoint of a domain by pass@k, and its confidence."""

from fractions import Fraction
from itertools import combinations

import pytest

from megatron_sov.eval.pass_at_k import ScoredResponses
from megatron_sov.post.ssp import MeasuredCheckpoint, choose_checkpoint, compare_with_expert

SAMPLES, K = 6, 3


def build_checkpoint(checkpoint: str, num_right: list[int]) -> MeasuredCheckpoint:
    """Return a checkpoint with this number of right answers of six to each problem."""
    responses = ScoredResponses()
    for problem, problem_right in enumerate(num_right):
        for sample in range(SAMPLES):
            row = {"status": "scored", "reward": float(sample < problem_right), "components": {}}
            responses.add(str(problem), row, right_from=1.0)
    return MeasuredCheckpoint.from_responses(checkpoint, "algebra", responses, [1, K])


def compute_pass_at_3(num_right: int) -> Fraction:
    """Compute pass@3 over all draws of three of six answers."""
    draws = list(combinations(range(SAMPLES), K))
    return Fraction(sum(min(draw) < num_right for draw in draws), len(draws))


def test_the_best_checkpoint_has_the_best_pass_at_k() -> None:
    more_right = build_checkpoint("step-100", [6, 6, 0, 0])
    more_problems = build_checkpoint("step-200", [2, 2, 2, 2])
    assert more_right.mean_pass_at_k(1) == 0.5 > more_problems.mean_pass_at_k(1)
    choice = choose_checkpoint([more_right, more_problems], K)
    assert choice.checkpoint == "step-200"
    assert choice.value == pytest.approx(float(compute_pass_at_3(2)))
    assert choose_checkpoint([more_right, more_problems], 1).checkpoint == "step-100"


def test_ties_go_to_the_earliest_checkpoint() -> None:
    choice = choose_checkpoint([build_checkpoint("step-100", [1, 2]), build_checkpoint("step-200", [2, 1])],
                               K)
    assert (choice.checkpoint, choice.as_good) == ("step-100", ("step-200",))


def test_a_choice_is_clear_if_problems_separate_the_best_checkpoint() -> None:
    # 30 problems
    worse = build_checkpoint("worse", [0] * 30)
    noisy = build_checkpoint("noisy", [6, 1, 6, 0, 3] * 6)
    best = build_checkpoint("best", [6, 6, 0, 3, 5] * 6)
    choice = choose_checkpoint([worse, noisy, best], K)
    assert (choice.checkpoint, choice.as_good) == ("best", ("noisy",))
    assert choose_checkpoint([worse, best], K).row()["is_clear"] is True


def test_the_gain_of_a_merged_checkpoint_is_a_mean_over_problems() -> None:
    result = compare_with_expert(build_checkpoint("merged", [2, 3]), build_checkpoint("expert", [1, 3]), K)
    expected = float((compute_pass_at_3(2) - compute_pass_at_3(1)) / 2)
    assert result["gain"] == pytest.approx(expected)
    assert result["interval"][0] < expected < result["interval"][1]
