"""pass@k and maj@k at their limits; tests/bench/suites/test_folding.py counts every draw."""

from __future__ import annotations

import pytest

from megatron_sov.eval.pass_at_k import (
    PromptCounts, default_ks, majority_estimates, pass_at_k, pass_estimates)


def test_estimates_are_exact_for_many_samples() -> None:
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10_000, 1, 10_000) == 1.0
    assert pass_at_k(2, 1, 1) == 0.5


def test_prompts_with_too_few_samples_are_skipped() -> None:
    prompts = [PromptCounts(num_right=2, num_silent=2), PromptCounts(num_right=1, num_unscored=3)]
    found = pass_estimates(prompts, [1, 4])
    assert [(e.k, e.value, e.num_prompts) for e in found] == [(1, 0.75, 2), (4, 1.0, 1)]
    assert [(e.k, e.num_prompts) for e in majority_estimates(prompts, [1, 8])] == [(1, 2)]


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0)])
def test_invalid_counts_raise_value_error(num_samples: int, num_right: int, k: int) -> None:
    with pytest.raises(ValueError, match="has no meaning"):
        pass_at_k(num_samples, num_right, k)


def test_default_ks_are_powers_of_two() -> None:
    assert [default_ks(n) for n in (1, 8, 10)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 10]]
