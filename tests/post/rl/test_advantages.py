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
LONGEST = 4096


def of(rewards: list[list[float]], policy: PolicyConfig, lengths: list[list[int]] | None = None,
       longest: int = 10) -> list[parts.GroupAdvantages]:
    lengths = lengths or [[1] * len(group) for group in rewards]
    groups = compute_advantages([np.array(g) for g in rewards], [np.array(n) for n in lengths], policy,
                                longest)
    return compute_step_advantages(groups, policy)


def written_out(rewards: list[list[float]], lengths: list[list[int]], policy: PolicyConfig,
                longest: int) -> list[list[float]]:
    """Return each group's advantages, one response at a time."""
    asked, kept, found = policy.parts, [], []
    for group, counts in zip(rewards, lengths, strict=True):
        right = [r >= 1.0 for r in group]
        same = len(set(group)) == 1
        dropped = same and (asked.all_right if right[0] else asked.all_wrong) == "drop"
        if dropped or (asked.advantage == "pass_at_k" and len(group) < asked.pkpo_k):
            found.append([0.0] * len(group))
            kept.append(False)
            continue
        buffer = policy.overlong_buffer_tokens or (longest / 5 if policy.method == "dapo" else 0)
        r = [x - (min(1.0, max(0.0, (n - (longest - buffer)) / buffer)) if buffer else 0.0)
             for x, n in zip(group, counts, strict=True)]
        p = sum(right) / len(r)
        divergence = sum(q * math.log(2 * q) for q in (p, 1 - p) if q > 0)
        found.append([(_advantage(r, i, asked) + (asked.all_wrong_reward if same and not right[0] else 0.0))
                      * math.exp(-asked.mgpo_lambda * divergence) for i in range(len(r))])
        kept.append(True)
    everything = [a for group, k in zip(found, kept, strict=True) if k for a in group]
    if asked.normalise_over_batch and everything:
        mean, std = statistics.fmean(everything), statistics.stdev(everything)
        found = [[(a - mean) / (std + 1e-4) for a in group] if k else group
                 for group, k in zip(found, kept, strict=True)]
    return found


def _advantage(r: list[float], i: int, asked: Any) -> float:
    others = r[:i] + r[i + 1:]
    if asked.advantage == "pass_at_k" and asked.pkpo_k > 1:
        n, k = len(r), asked.pkpo_k
        sets = [s for s in itertools.combinations(range(n), k) if i in s]
        return n / math.comb(n, k) * sum(max(r[j] for j in s) - max(r[j] for j in s if j != i) for s in sets)
    if asked.advantage in ("leave_one_out", "pass_at_k"):
        return r[i] - statistics.fmean(others)
    apart = r[i] - statistics.fmean(r)
    return apart / (statistics.stdev(r) + 1e-4) if asked.advantage == "group" else apart


@settings(max_examples=40)
@given(step=STEP, first_length=st.integers(1, 10))
def test_advantages_are_the_papers(step: list[list[float]], first_length: int) -> None:
    lengths = [[1 + (first_length + 3 * i) % 10 for i in range(len(group))] for group in step]
    for asked in METHODS:
        policy = PolicyConfig(**asked)
        result = of(step, policy, lengths)
        for ours, theirs in zip(result, written_out(step, lengths, policy, 10), strict=True):
            assert ours.advantages.dtype == np.float64
            assert ours.advantages.tolist() == pytest.approx(theirs, rel=1e-9, abs=1e-9), asked


def test_reasons_for_excluding_a_group() -> None:
    step = [[1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0], []]
    assert [g.reason for g in of(step, PolicyConfig("dapo"))] == [
        "all_right", "all_wrong", "all_wrong", "", "too_few", "too_few"]
    kept = of(step, PolicyConfig("grpo"))
    assert [g.reason for g in kept] == ["", "", "", "", "too_few", "too_few"]
    assert not kept[0].advantages.any()
    assert [g.reason for g in of([[0.0, 0.5], [0.5, 0.5]], PolicyConfig("dapo", right_from=0.5))] == [
        "", "all_right"]
    taught = of([[1.0], [0.0, 1.0], []], PolicyConfig("opd"))  # by a teacher, whatever the reward
    assert [(g.reason, g.advantages.tolist()) for g in taught] == [("", [0]), ("", [0, 0]), ("too_few", [])]
    assert of([[0.0, 1.0, 1.0]], PolicyConfig("pkpo", pkpo_k=4))[0].reason == "too_few"
    assert of([[0.1 + 0.2, 0.3]], PolicyConfig("dapo"))[0].reason == "all_wrong"  # the same but for rounding


KEEPING = ["grpo", "dr_grpo", "gspo", "cispo", "mgpo", "ink_grpo", "pkpo"]
ASKED = {"mgpo": {"mgpo_lambda": 1.5}, "gspo": {"clip_low": 3e-4, "clip_high": 4e-4}, "pkpo": {"pkpo_k": 2}}


@pytest.mark.each("method", KEEPING)
@pytest.mark.each("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3, -2.3, 1e6 / 7])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(method: str, reward: float) -> None:
    """The mean of n equal numbers is another number for most n: AdamW would turn that into whole steps."""
    policy = PolicyConfig(method, **{"all_right": "keep", "all_wrong": "keep", "all_wrong_reward": 0.0,
                                     **ASKED.get(method, {})})
    for count in (3, 6, 7, 10):
        [group] = of([[reward] * count], policy)
        assert group.reason == "" and group.advantages.tolist() == [0.0] * count
        assert not parts.has_advantage(group.advantages)
    [nearly] = of([[reward, reward + 1e-9 * abs(reward < 10), reward]], policy)  # the same but for rounding
    assert nearly.advantages.tolist() == [0.0] * 3
    [mixed] = of([[reward, reward, reward + 1]], policy)
    assert parts.has_advantage(mixed.advantages)


@pytest.mark.each(("advantages", "learns"), [
    ([], False), ([0.0], False), ([0.0, -0.0], False), ([1e-8, -1e-8], False), ([0.0, 1.1e-8], True),
    ([0.0, -1.1e-8], True), ([-1.0, 1.0], True), ([float("inf")], True)])
def test_a_group_learns_by_any_advantage_beyond_the_tolerance(advantages: list[float], learns: bool) -> None:
    assert parts.has_advantage(np.array(advantages)) is learns


def test_mgpo_prefers_groups_of_which_half_is_right() -> None:
    assert parts.compute_mgpo_weight(1 / 8, 1.0) == pytest.approx(0.7288, abs=1e-4)
    assert parts.compute_mgpo_weight(0.5, 3.0) == 1.0
    assert parts.compute_mgpo_weight(0.0, 2.0) == parts.compute_mgpo_weight(1.0,
                                                                            2.0) == pytest.approx(2.0 ** -2)
    step = [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    without = of(step, PolicyConfig("mgpo", mgpo_lambda=0.0))
    for ours, theirs in zip(without, of(step, PolicyConfig("grpo")), strict=True):
        assert ours.advantages.tolist() == theirs.advantages.tolist()


def test_long_responses_are_penalised_as_in_dapo() -> None:
    policy = PolicyConfig("dapo", overlong_buffer_tokens=4096)
    lengths = np.array([1, 16384, 17408, 20480, 30000])
    assert parts.compute_overlong_penalty(lengths, policy, 20480).tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert parts.compute_overlong_penalty(lengths, PolicyConfig("dapo"), 20480).tolist() == [0.0, 0.0, 0.25,
                                                                                             1.0, 1.0]
    assert not parts.compute_overlong_penalty(lengths, PolicyConfig("grpo"), 20480).any()
    assert not parts.compute_overlong_penalty(lengths, PolicyConfig("dapo", overlong_buffer_tokens=0),
                                              20480).any()
    halved = PolicyConfig("dapo", overlong_buffer_tokens=4096, overlong_penalty=0.5)
    assert parts.compute_overlong_penalty(lengths, halved, 20480)[-1] == 0.5


def test_range_runs_from_worst_to_best() -> None:
    groups = [np.array([0.5, 2.0, 1.0]), np.ones(2)]
    first, second = compute_advantages(groups, [np.full(len(g), 9) for g in groups],
                                       PolicyConfig("preference"),
                               LONGEST)
    assert first.advantages == pytest.approx([-1, 1, -1 / 3]) and second.reason == "all_right"
    kept = compute_advantages([np.zeros(2)], [np.full(2, 9)], PolicyConfig("gspo", advantage="range"),
                              LONGEST)
    assert kept[0].advantages.tolist() == [0, 0]


@pytest.mark.each("rewards", [[0.1 + 0.2 + 0.3, 0.6, 0.6], [0.1 * 3, 0.3], [3e8, 1e9 * (0.1 + 0.2)]])
def test_the_rounding_of_floats_is_no_advantage(rewards: list[float]) -> None:
    policy = PolicyConfig(method="dapo", right_from=rewards[0] - 0.1)
    assert parts.find_exclusion(np.array(rewards), policy) == parts.ALL_RIGHT
    assert not parts.scale_to_range(np.array(rewards)).any()
    assert parts.find_exclusion(np.array([0.6, 0.60001]), policy) == parts.LEARNS
