"""Settings of learning from one's own responses: methods are parts by name, and each rule is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.config import PolicyConfig, RolloutConfig
from megatron_sov.config.policy import METHODS

ROUNDS = RolloutConfig(rounds=2, samples_per_prompt=8, max_new_tokens=1024, budgets_tokens=(256, 1024))
UNPUBLISHED: dict[str, dict[str, Any]] = {
    "cispo": {"clip_high": 4.0}, "agapo": {"clip_high": 4.0}, "pkpo": {"pkpo_k": 4},
    "agapo_exaone4": {"kl_coeff": 0.01, "all_wrong_reward": -0.1},
    "mgpo": {"clip_low": 0.2, "clip_high": 0.2, "mgpo_lambda": 1.0}}
"""Method -> what its authors left open, and a run has to say."""


@pytest.mark.parametrize("method", METHODS)
def test_a_method_asks_for_what_was_not_published_and_for_nothing_else(method: Any) -> None:
    missing = UNPUBLISHED.get(method, {})
    assert sorted(problem.split(" is missing")[0] for problem in PolicyConfig(method).problems(ROUNDS)) == [
        f"policy.{name}" for name in sorted(missing)]
    assert PolicyConfig(method, **missing).problems(ROUNDS) == []


@pytest.mark.parametrize(("settings", "said"), [
    ({"clip_high": -0.1}, "policy.clip_high = -0.1 must be a number that is not negative"),
    ({"clip_low": 1.5}, "policy.clip_low = 1.5 must be at most 1"),
    ({"kl_coeff": float("nan")}, "policy.kl_coeff = nan"),
    ({"method": "dapo", "kl": "k1"}, "policy.kl_coeff is missing: policy.kl = k1 needs it"),
    ({"method": "agapo", "clip_high": 4.0, "all_wrong": "keep"}, "policy.all_wrong_reward is missing"),
    ({"all_wrong_reward": 0.1}, "policy.all_wrong_reward = 0.1 must be 0 or a negative number"),
    ({"right_from": float("inf")}, "policy.right_from = inf"),
    ({"missing_share": 1.0}, "policy.missing_share = 1.0 must lie in [0, 1)"),
    ({"overlong_buffer_tokens": 2000}, "must lie between 0 and rollout.max_new_tokens = 1024"),
    ({"overlong_penalty": -1.0}, "policy.overlong_penalty = -1.0"),
    ({"method": "pkpo", "pkpo_k": 9}, "policy.pkpo_k = 9 must lie between 1 and rollout.samples"),
    ({"method": "pkpo", "pkpo_k": 0}, "policy.pkpo_k = 0 must lie between 1 and rollout.samples"),
    ({"correction": "token_mask"}, "policy.correction_high is missing"),
    ({"correction": "token_mask", "correction_low": 3.0, "correction_high": 2.0}, "0 <= low < high"),
    ({"correction": "none", "correction_high": 2.0}, "belong to a policy.correction"),
    ({"knowledge_coeff": 0.1, "knowledge_batch_size": 8}, "policy.knowledge_share = 0.0 must lie in (0, 1]"),
    ({"length_reward": "target", "length_reward_coeff": 1.0}, "policy.length_width_tokens is missing"),
    ({"method": "lapo_d", "length_width_tokens": 0.0}, "policy.length_width_tokens = 0.0 must"),
    ({"method": "ink_grpo", "knowledge_batch_size": 0}, "policy.knowledge_batch_size = 0 must be at least 1"),
])
def test_a_rule_that_is_broken_is_named(settings: dict[str, Any], said: str) -> None:
    (problem,) = PolicyConfig(**settings).problems(ROUNDS)
    assert said in problem


def test_budgets_are_asked_for_by_what_is_made_of_them() -> None:
    none = RolloutConfig(rounds=2, samples_per_prompt=8, max_new_tokens=1024)
    (problem,) = PolicyConfig("hbpo").problems(none)
    assert problem.startswith("rollout.budgets_tokens is missing: policy.length_reward = budget")


def test_a_part_that_is_set_goes_before_the_methods() -> None:
    parts = PolicyConfig("dapo", clip_high=0.3, aggregation="constant", all_right="keep").parts
    assert (parts.clip_low, parts.clip_high, parts.aggregation) == (0.2, 0.3, "constant")
    assert (parts.all_right, parts.all_wrong) == ("keep", "drop")


def test_the_page_of_methods_has_every_part_of_each() -> None:
    text = (Path(__file__).parents[2] / "docs/policy_methods.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \| [^|]* \|$", text, re.MULTILINE))
    for method in METHODS:
        policy: Any = PolicyConfig(method)
        parts = policy.parts
        missing = {p.split(" is missing")[0].removeprefix("policy.") for p in policy.problems(ROUNDS)}
        bounds = ["?" if name in missing else "-" if name not in used else f"{getattr(parts, name):.4g}"
                  for used in [{"two_sided": ("clip_low", "clip_high"), "cispo": ("clip_high",),
                                "none": ()}[parts.clip]] for name in ("clip_low", "clip_high")]
        coeff = "?" if "kl_coeff" in missing else f"{parts.kl_coeff:g}"
        assert rows[method].split(" | ") == [
            parts.ratio, parts.clip, ", ".join(bounds), parts.advantage,
            "yes" if parts.normalise_over_batch else "no", parts.aggregation,
            parts.kl if parts.kl == "none" else f"{parts.kl}, {coeff}",
            f"{parts.all_wrong}, {parts.all_right}"], method


def test_a_group_has_two_responses_at_least() -> None:
    (problem,) = PolicyConfig().problems(RolloutConfig(rounds=1, samples_per_prompt=1))
    assert problem.startswith("rollout.samples_per_prompt = 1 must be at least 2")


def test_text_comes_in_its_share_of_the_steps_and_in_the_same_ones_everywhere() -> None:
    policy = PolicyConfig("ink_grpo")
    drawn = [policy.has_text_at(7, step) for step in range(1, 5001)]
    assert sum(drawn) / 5000 == pytest.approx(0.6, abs=0.02)
    assert drawn[:8] == [PolicyConfig("ink_grpo").has_text_at(7, step) for step in range(1, 9)]
    assert drawn[:64] != [policy.has_text_at(8, step) for step in range(1, 65)]
    assert not any(PolicyConfig("dapo").has_text_at(7, step) for step in range(1, 9))
    assert all(PolicyConfig("ink_grpo", knowledge_share=1.0).has_text_at(7, step) for step in range(1, 9))


@pytest.mark.parametrize(("settings", "problem"), [
    ({"method": "dapo", "clip": "cispo"}, "policy.clip_high is missing: policy.clip = cispo"),
    ({"method": "dapo", "ratio": "sequence", "clip_high": 4e-4}, "policy.clip_low is missing"),
    ({"method": "gspo", "ratio": "token", "clip_low": 0.2}, "policy.clip_high is missing"),
    ({"method": "grpo", "kl": "sequence"}, "policy.kl_coeff is missing: policy.kl = sequence"),
    ({"method": "lapo_d", "length_reward": "target", "length_width_tokens": 9.0}, "length_reward_coeff is"),
])
def test_a_number_of_one_part_is_not_taken_for_anothers(settings: dict[str, Any], problem: str) -> None:
    (said,) = PolicyConfig(**settings).problems(ROUNDS)
    assert problem in said
    assert "brings none for it; set it" in said
