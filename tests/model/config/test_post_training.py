"""Settings of post-training methods: methods are combinations of named parts, and every broken rule is
reported."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.model.config import PolicyConfig, RolloutConfig
from megatron_sov.model.config.post_training import METHODS

ROUNDS = RolloutConfig(rounds=2, samples_per_prompt=8, max_new_tokens=1024)
UNPUBLISHED: dict[str, dict[str, Any]] = {
    "cispo": {"clip_high": 4.0}, "agapo": {"clip_high": 4.0}, "pkpo": {"pkpo_k": 4},
    "agapo_exaone4": {"kl_coeff": 0.01, "all_wrong_reward": -0.1},
    "mgpo": {"clip_low": 0.2, "clip_high": 0.2, "mgpo_lambda": 1.0}}
"""Method -> settings that its authors did not publish and a run must set."""


@pytest.mark.each("method", METHODS)
def test_a_method_requires_exactly_its_unpublished_settings(method: Any) -> None:
    missing = UNPUBLISHED.get(method, {})
    assert sorted(problem.key for problem in PolicyConfig(method).problems(ROUNDS)) == [
        f"policy.{name}" for name in sorted(missing)]
    assert PolicyConfig(method, **missing).problems(ROUNDS) == []


@pytest.mark.each(("settings", "key"), [
    ({"clip_low": 1.5}, "clip_low"),
    ({"method": "dapo", "kl": "k1"}, "kl_coeff"),
    ({"method": "dapo", "clip": "cispo"}, "clip_high"),
    ({"method": "dapo", "ratio": "sequence", "clip_high": 4e-4}, "clip_low"),
    ({"method": "gspo", "ratio": "token", "clip_low": 0.2}, "clip_high"),
    ({"method": "grpo", "kl": "sequence"}, "kl_coeff"),
    ({"method": "agapo", "clip_high": 4.0, "all_wrong": "keep"}, "all_wrong_reward"),
    ({"overlong_buffer_tokens": 2000}, "overlong_buffer_tokens"),
    ({"method": "pkpo", "pkpo_k": 9}, "pkpo_k"), ({"method": "pkpo", "pkpo_k": 0}, "pkpo_k"),
    ({"correction": "token_mask"}, "correction_high"),
    ({"correction": "token_mask", "correction_low": 3.0, "correction_high": 2.0}, "correction_low"),
    ({"knowledge_coeff": 0.1, "knowledge_batch_size": 8}, "knowledge_share"),
    ({"method": "ink_grpo", "knowledge_batch_size": 0}, "knowledge_batch_size"),
])
def test_a_broken_rule_is_named(settings: dict[str, Any], key: str) -> None:
    """Values of one part are never used for another part."""
    assert [problem.key for problem in PolicyConfig(**settings).problems(ROUNDS)] == [f"policy.{key}"]


def test_problems_of_rounds_name_their_settings() -> None:
    few = RolloutConfig(rounds=2, samples_per_prompt=1, max_new_tokens=1024)
    assert [problem.key for problem in PolicyConfig("grpo").problems(few)] == ["rollout.samples_per_prompt"]


def test_a_set_part_overrides_the_method() -> None:
    parts = PolicyConfig("dapo", clip_high=0.3, aggregation="constant", all_right="keep").parts
    assert (parts.clip_low, parts.clip_high, parts.aggregation) == (0.2, 0.3, "constant")
    assert (parts.all_right, parts.all_wrong) == ("keep", "drop")


def test_the_page_lists_every_part_of_each_method() -> None:
    text = (Path(__file__).parents[3] / "docs/policy_methods.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \| [^|]* \|$", text, re.MULTILINE))
    for method in METHODS:
        policy: Any = PolicyConfig(method)
        parts = policy.parts
        missing = {p.key.removeprefix("policy.") for p in policy.problems(ROUNDS)}
        used = {"two_sided": ("clip_low", "clip_high"), "cispo": ("clip_high",), "none": ()}[parts.clip]
        bounds = []
        for name in ("clip_low", "clip_high"):
            bound = f"{getattr(parts, name):.4g}" if name in used else "-"
            bounds.append("?" if name in missing else bound)
        coeff = "?" if "kl_coeff" in missing else f"{parts.kl_coeff:g}"
        assert rows[method].split(" | ") == [
            parts.ratio, parts.clip, ", ".join(bounds), parts.advantage,
            "yes" if parts.normalise_over_batch else "no", parts.aggregation,
            parts.kl if parts.kl == "none" else f"{parts.kl}, {coeff}",
            f"{parts.all_wrong}, {parts.all_right}"], method


def test_text_steps_have_their_share_and_are_equal_on_all_processes() -> None:
    policy = PolicyConfig("ink_grpo")
    drawn = [policy.has_text_at(7, step) for step in range(1, 5001)]
    assert sum(drawn) / 5000 == pytest.approx(0.6, abs=0.02)
    assert drawn[:8] == [PolicyConfig("ink_grpo").has_text_at(7, step) for step in range(1, 9)]
    assert drawn[:64] != [policy.has_text_at(8, step) for step in range(1, 65)]
    assert not any(PolicyConfig("dapo").has_text_at(7, step) for step in range(1, 9))
    assert all(PolicyConfig("ink_grpo", knowledge_share=1.0).has_text_at(7, step) for step in range(1, 9))
