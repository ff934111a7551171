"""pass@k and maj@k at their limits; tests/bench/suites/test_folding.py counts every draw."""

from __future__ import annotations

import pytest

from megatron_sov.eval.pass_at_k import (
    PromptCounts, choose_default_ks, compute_pass_at_k, estimate_majority_at_k, estimate_pass_at_k)


def test_estimates_are_exact_for_many_samples() -> None:
    assert compute_pass_at_k(10_000, 1, 1) == 1e-4
    assert compute_pass_at_k(10_000, 1, 10_000) == 1.0
    assert compute_pass_at_k(2, 1, 1) == 0.5


def test_prompts_with_too_few_samples_are_skipped() -> None:
    prompts = [PromptCounts(num_right=2, num_silent=2), PromptCounts(num_right=1, num_unscored=3)]
    found = estimate_pass_at_k(prompts, [1, 4])
    assert [(e.k, e.value, e.num_prompts) for e in found] == [(1, 0.75, 2), (4, 1.0, 1)]
    assert [(e.k, e.num_prompts) for e in estimate_majority_at_k(prompts, [1, 8])] == [(1, 2)]


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0)])
def test_invalid_counts_raise_value_error(num_samples: int, num_right: int, k: int) -> None:
    with pytest.raises(ValueError, match="has no meaning"):
        compute_pass_at_k(num_samples, num_right, k)


def test_default_ks_are_powers_of_two() -> None:
    assert [choose_default_ks(n) for n in (1, 8, 10)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 10]]
