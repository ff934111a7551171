"""pass@k and maj@k against every draw, counted one by one."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from megatron_sov.eval.pass_at_k import (
    PromptCounts,
    default_ks,
    majority_at_k,
    majority_estimates,
    pass_at_k,
    pass_estimates,
)

RIGHT, SILENT = "right", ""


def drawn_majority(samples: list[str], k: int) -> float:
    """Return maj@k of all draws of k samples: of the most frequent answers each counts alike."""
    won = []
    for draw in combinations(samples, k):
        votes = Counter(answer for answer in draw if answer != SILENT)
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        won.append((RIGHT in most) / len(most) if most else 0.0)
    return sum(won) / len(won)


@pytest.mark.parametrize("num_right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(num_right: int, k: int) -> None:
    draws = list(combinations([True] * num_right + [False] * (6 - num_right), k))
    assert pass_at_k(6, num_right, k) == pytest.approx(sum(map(any, draws)) / len(draws), rel=1e-14)


def test_of_many_samples_nothing_is_lost_in_rounding() -> None:
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10_000, 1, 10_000) == 1.0
    assert pass_at_k(2, 1, 1) == 0.5


@pytest.mark.parametrize(("num_right", "wrong", "num_silent"), [
    (3, {"a": 3}, 1), (1, {"a": 1, "b": 1, "c": 1}, 3), (2, {"a": 4, "b": 2}, 0), (0, {"a": 2}, 2),
    (4, {}, 3), (3, {"a": 1, "b": 2, "c": 2}, 0), (0, {}, 3)])
def test_maj_at_k_is_the_share_of_draws_that_the_right_answer_wins(num_right: int, wrong: dict[str, int],
                                                                   num_silent: int) -> None:
    samples = [RIGHT] * num_right + [SILENT] * num_silent + list(Counter(wrong).elements())
    for k in range(1, len(samples) + 1):
        assert majority_at_k(num_right, wrong, num_silent, k) \
            == pytest.approx(drawn_majority(samples, k), rel=1e-12, abs=1e-15)


def test_a_prompt_with_too_few_scored_samples_is_left_out() -> None:
    prompts = [PromptCounts(num_right=2, num_silent=2), PromptCounts(num_right=1, num_unscored=3)]
    found = pass_estimates(prompts, [1, 4])
    assert [(e.k, e.value, e.num_prompts) for e in found] == [(1, 0.75, 2), (4, 1.0, 1)]
    assert [(e.k, e.num_prompts) for e in majority_estimates(prompts, [1, 8])] == [(1, 2)]


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0)])
def test_what_has_no_meaning_is_refused(num_samples: int, num_right: int, k: int) -> None:
    with pytest.raises(ValueError, match="has no meaning"):
        pass_at_k(num_samples, num_right, k)


def test_draws_double_up_to_all_samples() -> None:
    assert [default_ks(n) for n in (1, 8, 10)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 10]]
