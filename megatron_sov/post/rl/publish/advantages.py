"""Advantages of responses: rewards relative to a prompt's group, with length rewards and penalties.

Arrays have shape [n], n responses to a prompt, and dtype float64. `lengths`: generated tokens; `right`, bool:
the reward is at least `policy.right_from`; `budgets`: requested tokens; `longest`: `rollout.max_new_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sov.base.documents.groups import REWARD_TOLERANCE, are_equal, compute_group_advantages
from megatron_sov.model.config.post_training import PolicyConfig

EPSILON = 1e-4
"""Added to standard deviations in denominators, as in TRL."""
LEARNS, TOO_FEW, ALL_RIGHT, ALL_WRONG = "", "too_few", "all_right", "all_wrong"
"""Why a group does not learn, or `LEARNS`: too few responses; equal rewards, all right or all wrong."""
LOW_PERCENT, HIGH_PERCENT = 30, 70
"""Percentiles of the lengths of right responses, between which the length reward is 1 (LAPO, arXiv
2507.15758; code: ZJU-REAL/LAPO on GitHub)."""


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of the responses to a prompt, before groups are compared."""

    advantages: np.ndarray
    """[n] float64; 0 if the group does not learn."""
    reason: str
    """Why the group does not learn, or `LEARNS`."""


def compute_advantages(rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], policy: PolicyConfig,
                       max_new_tokens: int, budgets: Sequence[np.ndarray] | None = None
                       ) -> list[GroupAdvantages]:
    """Compute advantages group by group, before `compute_step_advantages` compares the groups in a step.

    Args:
        rewards: [n] per group, without unjudged responses.
        lengths: [n] per group: tokens that the policy generated.
        policy: `policy.parts` selects the baseline and the length rewards.
        max_new_tokens: `rollout.max_new_tokens`.
        budgets: [n] per group: requested length in tokens, NaN without a request; None: no requests.
    """
    if budgets is None:
        budgets = [np.full(len(group), np.nan) for group in rewards]
    groups = []
    for group, num_tokens, requested in zip(rewards, lengths, budgets, strict=True):
        values = np.asarray(group, np.float64)
        reason = find_exclusion(values, policy)
        advantages = np.zeros(len(group))
        if reason == LEARNS:
            advantages = _compare_responses(values, np.asarray(num_tokens), np.asarray(requested, np.float64),
                                            policy, max_new_tokens)
        groups.append(GroupAdvantages(advantages, reason))
    return groups


def has_advantage(advantages: np.ndarray) -> bool:
    """Return whether an advantage [n] differs from 0, so that the policy loss has a gradient."""
    return bool(np.abs(advantages).max(initial=0.0) > REWARD_TOLERANCE)


def compute_step_advantages(groups: Sequence[GroupAdvantages], policy: PolicyConfig) -> list[GroupAdvantages]:
    """Return the groups in an optimizer step, with `normalise_over_batch` normalized together."""
    if not policy.parts.normalise_over_batch:
        return list(groups)
    normalized = _normalize_advantages([group.advantages for group in groups],
                                       [group.reason == LEARNS for group in groups])
    return [GroupAdvantages(values, group.reason) for values, group in zip(normalized, groups, strict=True)]


def find_exclusion(rewards: np.ndarray, policy: PolicyConfig) -> str:
    """Return why a group with `rewards` [n] does not learn, or `LEARNS`."""
    parts = policy.parts
    if parts.advantage == "none":
        return LEARNS if len(rewards) else TOO_FEW
    # Advantages compare at least two responses.
    min_responses = max(2, parts.pkpo_k) if parts.advantage == "pass_at_k" else 2
    if len(rewards) < min_responses:
        return TOO_FEW
    if not are_equal(rewards.tolist()):
        return LEARNS
    # All rewards are equal: the first reward decides.
    if rewards[0] >= policy.right_from:
        return LEARNS if parts.all_right == "keep" else ALL_RIGHT
    return LEARNS if parts.all_wrong == "keep" else ALL_WRONG


def compute_overlong_penalty(lengths: np.ndarray, policy: PolicyConfig, max_new_tokens: int) -> np.ndarray:
    """Return the penalty per length [n] in tokens: soft overlong punishment (DAPO, arXiv 2503.14476, equation
    13), times `policy.overlong_penalty`."""
    buffer = policy.overlong_buffer(max_new_tokens)
    if not buffer:
        return np.zeros(len(lengths))
    return policy.overlong_penalty * np.clip((lengths - (max_new_tokens - buffer)) / buffer, 0.0, 1.0)


def compute_group_relative(rewards: np.ndarray) -> np.ndarray:
    """Return ``(reward - mean) / std``, [n] (GRPO, arXiv 2402.03300, section 4.1.2)."""
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def center_rewards(rewards: np.ndarray) -> np.ndarray:
    """Return ``reward - mean``, [n] (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    advantages: np.ndarray = rewards - rewards.mean()
    return advantages


def subtract_leave_out_mean(rewards: np.ndarray) -> np.ndarray:
    """Return rewards minus the mean reward over the other responses, [n] (RLOO, arXiv 2402.14740)."""
    advantages: np.ndarray = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
    return advantages


def compute_pass_at_k_advantages(rewards: np.ndarray, k: int) -> np.ndarray:
    """Return k times the increase that a response brings to the maximum reward, [n], averaged over all sets
    with `k` responses that contain it (PKPO, arXiv 2505.15201, equation 33, times n).

    For k = 1 the increase is the reward itself, with the baseline of `subtract_leave_out_mean`.
    """
    n = len(rewards)
    if k == 1:
        return subtract_leave_out_mean(rewards)
    # Probability of a rank, from the worst, for the best of k - 1 responses drawn from n - 1.
    odds = np.array([math.comb(rank, k - 2) / math.comb(n - 1, k - 1) for rank in range(n - 1)])
    order = np.argsort(rewards, kind="stable")
    ranked, advantages = rewards[order], np.empty(n)
    for rank, index in enumerate(order):
        advantages[index] = k * odds @ np.maximum(rewards[index] - np.delete(ranked, rank), 0.0)
    return advantages


def scale_to_range(rewards: np.ndarray) -> np.ndarray:
    """Return rewards scaled to [-1, 1], [n], by `compute_group_advantages` (GrouPER); 0 for equal rewards."""
    values = rewards.tolist()
    if are_equal(values):
        return np.zeros(len(values))
    return np.array(compute_group_advantages(values))


def compute_mgpo_weight(share_right: float, strength: float) -> float:
    """Return the factor ``exp(-strength * KL(share_right || 1/2))`` for the advantages in a group (MGPO,
    arXiv 2511.06221)."""
    shares = (share_right, 1.0 - share_right)
    return math.exp(-strength * sum(p * math.log(p / 0.5) for p in shares if p > 0))


def _add_length_reward(rewards: np.ndarray, lengths: np.ndarray, budgets: np.ndarray, policy: PolicyConfig,
                       max_new_tokens: int) -> np.ndarray:
    """Add the length reward `policy.parts.length_reward` for right responses to `rewards`, [n]."""
    parts, right = policy.parts, rewards >= policy.right_from
    if parts.length_reward == "budget":
        return reward_length_budget(lengths, right, budgets, max_new_tokens, parts.length_reward_coeff)
    if parts.length_reward == "around_right":
        return rewards + parts.length_reward_coeff * center_on_threshold(lengths, right,
                                                                         parts.length_width_tokens)
    if parts.length_reward == "target":
        return rewards + parts.length_reward_coeff * reward_target_length(lengths, right, budgets,
                                                                          parts.length_width_tokens)
    return rewards


def _compare_responses(rewards: np.ndarray, lengths: np.ndarray, budgets: np.ndarray, policy: PolicyConfig,
                       max_new_tokens: int) -> np.ndarray:
    """Return the advantages in a group, [n] float64."""
    parts = policy.parts
    if parts.advantage == "none":
        return np.zeros(len(rewards))
    length_rewards = _add_length_reward(rewards, lengths, budgets, policy, max_new_tokens)
    # Subtracted before the baseline, so that the comparison within the group includes the penalty.
    shaped = length_rewards - compute_overlong_penalty(lengths, policy, max_new_tokens)
    compare = {"group": compute_group_relative, "group_no_std": center_rewards,
               "leave_one_out": subtract_leave_out_mean, "range": scale_to_range,
               "pass_at_k": lambda r: compute_pass_at_k_advantages(r, parts.pkpo_k)}[parts.advantage]
    # The mean of equal rewards may differ from the rewards by rounding, which AdamW scales to full updates.
    advantages = np.zeros(len(shaped)) if are_equal(shaped.tolist()) else compare(shaped)
    if parts.length_reward == "budget":
        advantages = advantages + compute_budget_advantages(length_rewards, budgets, max_new_tokens,
                                                            parts.length_reward_coeff)
    if are_equal(rewards.tolist()) and rewards[0] < policy.right_from:
        # Judged rewards instead of shaped rewards: lengths must not make a wrong group look mixed.
        advantages = advantages + parts.all_wrong_reward
    share_right = float((rewards >= policy.right_from).mean())
    return advantages * compute_mgpo_weight(share_right, parts.mgpo_lambda)


def _normalize_advantages(advantages: list[np.ndarray], learns: list[bool]) -> list[np.ndarray]:
    """Scale the advantages in learning groups to mean 0 and standard deviation 1 over all groups."""
    # Excluded groups stay at 0, because a shift by the mean would make excluded groups learn.
    learning = [values for values, is_learning in zip(advantages, learns, strict=True) if is_learning]
    joined = np.concatenate(learning or [np.zeros(0)])
    if len(joined) < 2:
        return advantages
    mean, std = joined.mean(), joined.std(ddof=1)
    return [(values - mean) / (std + EPSILON) if is_learning else values
            for values, is_learning in zip(advantages, learns, strict=True)]


def center_on_threshold(lengths: np.ndarray, right: np.ndarray, width_tokens: float) -> np.ndarray:
    """Return the length reward for right responses, [n]: 1 between the `LOW_PERCENT` and `HIGH_PERCENT`
    percentiles of their lengths, falling linearly to 0 over `width_tokens` outside (LAPO, stage 1,
    reward_func_stage1.py, width 100)."""
    if not right.any():
        return np.zeros(len(lengths))
    low, high = np.percentile(lengths[right], (LOW_PERCENT, HIGH_PERCENT))
    # Distance to the interval, 0 inside.
    distances = np.maximum(np.maximum(low - lengths, lengths - high), 0.0)
    return np.where(right, np.maximum(0.0, 1.0 - distances / width_tokens), 0.0)


def reward_target_length(lengths: np.ndarray, right: np.ndarray, targets: np.ndarray, width_tokens: float
                         ) -> np.ndarray:
    """Return the length reward ``exp(-(length - target)^2 / (2 width_tokens^2))`` for right responses, [n]
    (LAPO, stage 2, reward_func_stage2.py, width 120). NaN targets become the right responses' median
    length."""
    if not right.any():
        return np.zeros(len(lengths))
    distances = lengths - np.where(np.isnan(targets), np.median(lengths[right]), targets)
    return np.where(right, np.exp(-distances ** 2 / (2.0 * width_tokens ** 2)), 0.0)


def compute_budget_reward(budgets: np.ndarray, longest: int, scale: float) -> np.ndarray:
    """Return ``scale cos(pi budget / (2 longest))``, [n], the reward for right responses within the budget
    (HBPO, arXiv 2507.15844, f_2 in section 3.2)."""
    rewards: np.ndarray = scale * np.cos(np.pi * budgets / (2.0 * longest))
    return rewards


def reward_length_budget(lengths: np.ndarray, right: np.ndarray, budgets: np.ndarray, longest: int,
                         scale: float) -> np.ndarray:
    """Return the rewards that replace the verifier's rewards, [n] (HBPO, arXiv 2507.15844, R in section 3.2).

    Right responses get `compute_budget_reward` within the budget. Beyond the budget they get f_1: the reward
    for a budget equal to the length, minus |length - budget| / longest. In the code of the authors, L_max is
    `longest`, alpha is 1 / longest, and beta is `scale`, 4.
    """
    beyond = compute_budget_reward(lengths, longest, scale) - np.abs(lengths - budgets) / longest
    rewards = np.where(lengths > budgets, beyond, compute_budget_reward(budgets, longest, scale))
    return np.where(right & (lengths <= longest), rewards, 0.0)


def compute_budget_advantages(rewards: np.ndarray, budgets: np.ndarray, longest: int, scale: float
                              ) -> np.ndarray:
    """Return the mean over `rewards` from `reward_length_budget` over responses with the same budget, minus
    `compute_budget_reward`, [n] (HBPO, arXiv 2507.15844, section 3.3)."""
    means = {budget: rewards[budgets == budget].mean() for budget in np.unique(budgets)}
    return np.array([means[budget] for budget in budgets]) - compute_budget_reward(budgets, longest, scale)
