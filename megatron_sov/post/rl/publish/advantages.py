"""Advantages of responses: rewards relative to a prompt's group, with length penalties.

Arrays have shape [n], n responses to a prompt, and dtype float64. `lengths`: generated tokens.
"""

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


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of the responses to a prompt, before groups are compared."""

    advantages: np.ndarray
    """[n] float64; 0 if the group does not learn."""
    reason: str
    """Why the group does not learn, or `LEARNS`."""


def compute_advantages(rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], policy: PolicyConfig,
                       max_new_tokens: int) -> list[GroupAdvantages]:
    """Compute advantages group by group, before `compute_step_advantages` compares the groups in a step.

    Args:
        rewards: [n] per group, without unjudged responses.
        lengths: [n] per group: tokens that the policy generated.
        policy: `policy.parts` selects the baseline.
        max_new_tokens: `rollout.max_new_tokens`.
    """
    groups = []
    for group, num_tokens in zip(rewards, lengths, strict=True):
        values = np.asarray(group, np.float64)
        reason = find_exclusion(values, policy)
        advantages = np.zeros(len(group))
        if reason == LEARNS:
            advantages = _compare_responses(values, np.asarray(num_tokens), policy, max_new_tokens)
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


def _compare_responses(rewards: np.ndarray, lengths: np.ndarray, policy: PolicyConfig, max_new_tokens: int
                       ) -> np.ndarray:
    """Return the advantages in a group, [n] float64."""
    parts = policy.parts
    if parts.advantage == "none":
        return np.zeros(len(rewards))
    # Subtracted before the baseline, so that the comparison within the group includes the penalty.
    shaped = rewards - compute_overlong_penalty(lengths, policy, max_new_tokens)
    compare = {"group": compute_group_relative, "group_no_std": center_rewards,
               "leave_one_out": subtract_leave_out_mean, "range": scale_to_range,
               "pass_at_k": lambda r: compute_pass_at_k_advantages(r, parts.pkpo_k)}[parts.advantage]
    # The mean of equal rewards may differ from the rewards by rounding, which AdamW scales to full updates.
    advantages = np.zeros(len(shaped)) if are_equal(shaped.tolist()) else compare(shaped)
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
