"""Advantages against the formulas of the papers, by loops and enumeration."""

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_sov.model.config import PolicyConfig
from megatron_sov.post.rl.publish import advantages as parts
from megatron_sov.post.rl.publish.advantages import compute_advantages, compute_step_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.0, 0.3, 0.5, 1.0, 1.0, 1.2]), min_size=2, max_size=7)
STEP = st.lists(REWARDS, min_size=1, max_size=4)
METHODS: list[dict[str, Any]] = [
    {"method": "grpo"}, {"method": "dr_grpo"}, {"method": "dapo"}, {"method": "agapo"},
    {"method": "agapo", "all_wrong": "keep", "all_wrong_reward": -0.25},
    {"method": "agapo_exaone4", "all_wrong_reward": -0.5}, {"method": "mgpo", "mgpo_lambda": 1.5},
    {"method": "pkpo", "pkpo_k": 1}, {"method": "pkpo", "pkpo_k": 2}, {"method": "pkpo", "pkpo_k": 4},
    {"method": "agapo", "advantage": "group_no_std", "overlong_buffer_tokens": 4, "mgpo_lambda": 0.5}]
MAX_TOKENS = 4096


def compute_step(rewards: list[list[float]], policy: PolicyConfig, lengths: list[list[int]] | None = None,
                 longest: int = 10) -> list[parts.GroupAdvantages]:
    """Return the advantages of one step: a group of rewards per prompt."""
    lengths = lengths or [[1] * len(group) for group in rewards]
    groups = compute_advantages([np.array(g) for g in rewards], [np.array(n) for n in lengths], policy,
                                longest)
    return compute_step_advantages(groups, policy)


def compute_by_loops(rewards: list[list[float]], lengths: list[list[int]], policy: PolicyConfig,
                     longest: int) -> list[list[float]]:
    """Return each group's advantages, computed one response at a time."""
    method = policy.parts
    results: list[list[float]] = []
    are_learned: list[bool] = []
    for group, counts in zip(rewards, lengths, strict=True):
        is_right = [reward >= 1.0 for reward in group]
        is_constant = len(set(group)) == 1
        is_dropped = is_constant and (method.all_right if is_right[0] else method.all_wrong) == "drop"
        if is_dropped or (method.advantage == "pass_at_k" and len(group) < method.pkpo_k):
            results.append([0.0] * len(group))
            are_learned.append(False)
            continue
        buffer = policy.overlong_buffer_tokens or (longest / 5 if policy.method == "dapo" else 0)
        penalties = [0.0] * len(group)
        if buffer:  # DAPO: linear from 0 to 1 over the last `buffer` tokens
            penalties = [min(1.0, max(0.0, (count - (longest - buffer)) / buffer)) for count in counts]
        penalized_rewards = [reward - penalty for reward, penalty in zip(group, penalties, strict=True)]
        share = sum(is_right) / len(group)
        kl_to_half = sum(q * math.log(2 * q) for q in (share, 1 - share) if q > 0)
        weight = math.exp(-method.mgpo_lambda * kl_to_half)
        offset = method.all_wrong_reward if is_constant and not is_right[0] else 0.0
        results.append([(compute_advantage(penalized_rewards, i, method) + offset) * weight
                        for i in range(len(group))])
        are_learned.append(True)
    learned_advantages = [a for group, is_learned in zip(results, are_learned, strict=True)
                          if is_learned for a in group]
    if not method.normalise_over_batch or not learned_advantages:
        return results
    mean, std = statistics.fmean(learned_advantages), statistics.stdev(learned_advantages)
    return [[(a - mean) / (std + 1e-4) for a in group] if is_learned else group
            for group, is_learned in zip(results, are_learned, strict=True)]


def compute_advantage(rewards: list[float], i: int, method: Any) -> float:
    """Return the advantage of response `i` in its group, before shifts and weights of the group."""
    others = rewards[:i] + rewards[i + 1:]
    if method.advantage == "pass_at_k" and method.pkpo_k > 1:
        # PKPO: mean gain of the best of k responses from having response i among them
        count, k = len(rewards), method.pkpo_k
        gain = 0.0
        for subset in itertools.combinations(range(count), k):
            if i in subset:
                gain += max(rewards[j] for j in subset) - max(rewards[j] for j in subset if j != i)
        return count / math.comb(count, k) * gain
    if method.advantage in ("leave_one_out", "pass_at_k"):
        return rewards[i] - statistics.fmean(others)
    difference = rewards[i] - statistics.fmean(rewards)
    return difference / (statistics.stdev(rewards) + 1e-4) if method.advantage == "group" else difference


@settings(max_examples=40)
@given(step=STEP, first_length=st.integers(1, 10))
def test_advantages_equal_the_papers(step: list[list[float]], first_length: int) -> None:
    lengths = [[1 + (first_length + 3 * i) % 10 for i in range(len(group))] for group in step]
    for settings_of_method in METHODS:
        policy = PolicyConfig(**settings_of_method)
        result = compute_step(step, policy, lengths)
        for group, expected in zip(result, compute_by_loops(step, lengths, policy, 10), strict=True):
            assert group.advantages.dtype == np.float64
            assert group.advantages.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9), (
                settings_of_method)


def test_reasons_for_excluding_a_group() -> None:
    step = [[1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0], []]
    assert [g.reason for g in compute_step(step, PolicyConfig("dapo"))] == [
        "all_right", "all_wrong", "all_wrong", "", "too_few", "too_few"]
    without_exclusion = compute_step(step, PolicyConfig("grpo"))
    assert [g.reason for g in without_exclusion] == ["", "", "", "", "too_few", "too_few"]
    assert not without_exclusion[0].advantages.any()
    lenient = compute_step([[0.0, 0.5], [0.5, 0.5]], PolicyConfig("dapo", right_from=0.5))
    assert [group.reason for group in lenient] == ["", "all_right"]
    # a teacher scores the tokens, so rewards do not matter
    distillation_groups = compute_step([[1.0], [0.0, 1.0], []], PolicyConfig("opd"))
    assert [group.reason for group in distillation_groups] == ["", "", "too_few"]
    assert [group.advantages.tolist() for group in distillation_groups] == [[0], [0, 0], []]
    assert compute_step([[0.0, 1.0, 1.0]], PolicyConfig("pkpo", pkpo_k=4))[0].reason == "too_few"
    [equal_up_to_rounding] = compute_step([[0.1 + 0.2, 0.3]], PolicyConfig("dapo"))
    assert equal_up_to_rounding.reason == "all_wrong"


METHODS_THAT_KEEP_GROUPS = ["grpo", "dr_grpo", "gspo", "cispo", "mgpo", "ink_grpo", "pkpo"]
METHOD_SETTINGS = {"mgpo": {"mgpo_lambda": 1.5}, "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
                   "pkpo": {"pkpo_k": 2}}


@pytest.mark.each("method", METHODS_THAT_KEEP_GROUPS)
@pytest.mark.each("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3, -2.3, 1e6 / 7])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(method: str, reward: float) -> None:
    """The float mean of n equal numbers differs from them for most n, a tiny difference that AdamW would turn
    into full steps."""
    policy = PolicyConfig(method, **{"all_right": "keep", "all_wrong": "keep", "all_wrong_reward": 0.0,
                                     **METHOD_SETTINGS.get(method, {})})
    for count in (3, 6, 7, 10):
        [group] = compute_step([[reward] * count], policy)
        assert group.reason == "" and group.advantages.tolist() == [0.0] * count
        assert not parts.has_advantage(group.advantages)
    difference = 1e-9 if reward < 10 else 0.0
    [almost_equal] = compute_step([[reward, reward + difference, reward]], policy)
    assert almost_equal.advantages.tolist() == [0.0] * 3
    [mixed] = compute_step([[reward, reward, reward + 1]], policy)
    assert parts.has_advantage(mixed.advantages)


@pytest.mark.each(("advantages", "is_learned"), [
    ([], False), ([0.0], False), ([0.0, -0.0], False), ([1e-8, -1e-8], False), ([0.0, 1.1e-8], True),
    ([0.0, -1.1e-8], True), ([-1.0, 1.0], True), ([float("inf")], True)])
def test_a_group_learns_by_any_advantage_beyond_the_tolerance(advantages: list[float],
                                                              is_learned: bool) -> None:
    assert parts.has_advantage(np.array(advantages)) is is_learned


def test_mgpo_prefers_groups_with_half_correct_responses() -> None:
    assert parts.compute_mgpo_weight(1 / 8, 1.0) == pytest.approx(0.7288, abs=1e-4)
    assert parts.compute_mgpo_weight(0.5, 3.0) == 1.0
    for share in (0.0, 1.0):
        assert parts.compute_mgpo_weight(share, 2.0) == pytest.approx(2.0 ** -2)
    step = [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    unweighted = compute_step(step, PolicyConfig("mgpo", mgpo_lambda=0.0))
    for group, expected in zip(unweighted, compute_step(step, PolicyConfig("grpo")), strict=True):
        assert group.advantages.tolist() == expected.advantages.tolist()


def test_long_responses_are_penalised_as_in_dapo() -> None:
    policy = PolicyConfig("dapo", overlong_buffer_tokens=4096)
    lengths = np.array([1, 16384, 17408, 20480, 30000])
    for penalized_policy in (policy, PolicyConfig("dapo")):  # the default buffer is a fifth of the limit
        penalties = parts.compute_overlong_penalty(lengths, penalized_policy, 20480)
        assert penalties.tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    for unpenalized_policy in (PolicyConfig("grpo"), PolicyConfig("dapo", overlong_buffer_tokens=0)):
        assert not parts.compute_overlong_penalty(lengths, unpenalized_policy, 20480).any()
    halved_policy = PolicyConfig("dapo", overlong_buffer_tokens=4096, overlong_penalty=0.5)
    assert parts.compute_overlong_penalty(lengths, halved_policy, 20480)[-1] == 0.5


def test_range_runs_from_worst_to_best() -> None:
    groups = [np.array([0.5, 2.0, 1.0]), np.ones(2)]
    lengths = [np.full(len(group), 9) for group in groups]
    first, second = compute_advantages(groups, lengths, PolicyConfig("preference"), MAX_TOKENS)
    assert first.advantages == pytest.approx([-1, 1, -1 / 3]) and second.reason == "all_right"
    constant = compute_advantages([np.zeros(2)], [np.full(2, 9)], PolicyConfig("gspo", advantage="range"),
                                  MAX_TOKENS)
    assert constant[0].advantages.tolist() == [0, 0]


@pytest.mark.each("rewards", [[0.1 + 0.2 + 0.3, 0.6, 0.6], [0.1 * 3, 0.3], [3e8, 1e9 * (0.1 + 0.2)]])
def test_float_rounding_gives_no_advantage(rewards: list[float]) -> None:
    policy = PolicyConfig(method="dapo", right_from=rewards[0] - 0.1)
    assert parts.find_exclusion(np.array(rewards), policy) == parts.ALL_RIGHT
    assert not parts.scale_to_range(np.array(rewards)).any()
    assert parts.find_exclusion(np.array([0.6, 0.60001]), policy) == parts.LEARNS
