"""Advantages of the responses of one optimizer step: how much better each is than what its prompt's group
was expected to reach, and what its length adds to its reward; all in float64, without torch, since whoever
publishes a round computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sov.base.documents.groups import REWARD_TOLERANCE, are_equal, places_in_group
from megatron_sov.model.config.post_training import PolicyConfig

EPSILON = 1e-4
"""Beside standard deviations that are divided by, as in TRL."""
LEARNS, TOO_FEW, ALL_RIGHT, ALL_WRONG = "", "too_few", "all_right", "all_wrong"
"""Why a group is left out, and "" of one that is not: fewer responses than its advantages need; the same
reward of all, which is right; or which is not."""
LOW_PERCENT, HIGH_PERCENT = 30, 70
"""Percentiles of the lengths of right responses between which a length is as it should be (LAPO, arXiv
2507.15758; here and below by its authors' code, ZJU-REAL/LAPO on GitHub)."""


@dataclass(frozen=True)
class Group:
    """What is learned of the responses to one prompt."""

    advantages: np.ndarray
    """[n] float64; 0 where the group is left out."""
    reason: str
    """Why it is left out; `LEARNS`."""


def group_advantages(rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], policy: PolicyConfig,
                     max_new_tokens: int, budgets: Sequence[np.ndarray] | None = None) -> list[Group]:
    """Return each group's advantages before those of the other groups of its step are seen.

    Args:
        rewards: [n] of each group, of its responses that have one.
        lengths: [n] of each: tokens of these responses that the policy wrote.
        policy: the settings.
        max_new_tokens: longest response (`rollout.max_new_tokens`).
        budgets: [n] of each: tokens that they were asked to have, NaN where nobody asked; None: nobody did.
    """
    if budgets is None:
        budgets = [np.full(len(group), np.nan) for group in rewards]
    reasons = [left_out(np.asarray(group, np.float64), policy) for group in rewards]
    found = [_of_group(np.asarray(group, np.float64), np.asarray(n), np.asarray(asked, np.float64), policy,
                       max_new_tokens) if reason == LEARNS else np.zeros(len(group))
             for group, n, asked, reason in zip(rewards, lengths, budgets, reasons, strict=True)]
    return [Group(*pair) for pair in zip(found, reasons, strict=True)]


def has_advantage(advantages: np.ndarray) -> bool:
    """Return whether any of the advantages [n] differs from 0, so that the policy loss has a gradient."""
    return bool(np.abs(advantages).max(initial=0.0) > REWARD_TOLERANCE)


def step_advantages(groups: Sequence[Group], policy: PolicyConfig) -> list[Group]:
    """Return the groups of a step as they are learned together."""
    if not policy.parts.normalise_over_batch:
        return list(groups)
    found = _normalise([group.advantages for group in groups], [group.reason == LEARNS for group in groups])
    return [Group(values, group.reason) for values, group in zip(found, groups, strict=True)]


def left_out(rewards: np.ndarray, policy: PolicyConfig) -> str:
    """Return why a group of rewards [n] is left out; `LEARNS`."""
    parts = policy.parts
    if parts.advantage == "none":
        return LEARNS if len(rewards) else TOO_FEW
    # One response has nothing to be compared with.
    if len(rewards) < max(2, parts.pkpo_k if parts.advantage == "pass_at_k" else 0):
        return TOO_FEW
    if not are_equal(rewards.tolist()):
        return LEARNS
    # All rewards are the same, so the first one speaks for all.
    kind, kept = ((ALL_RIGHT, parts.all_right) if rewards[0] >= policy.right_from
                  else (ALL_WRONG, parts.all_wrong))
    return LEARNS if kept == "keep" else kind


def overlong_penalty(lengths: np.ndarray, policy: PolicyConfig, max_new_tokens: int) -> np.ndarray:
    """Return [n] what is taken from rewards of responses [n] for their length: DAPO's soft overlong
    punishment (arXiv 2503.14476, equation 13), times `policy.overlong_penalty`."""
    buffer = policy.overlong_buffer(max_new_tokens)
    if not buffer:
        return np.zeros(len(lengths))
    return policy.overlong_penalty * np.clip((lengths - (max_new_tokens - buffer)) / buffer, 0.0, 1.0)


def group_relative(rewards: np.ndarray) -> np.ndarray:
    """Return GRPO's advantages (arXiv 2402.03300, section 4.1.2)."""
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def centred(rewards: np.ndarray) -> np.ndarray:
    """Return Dr. GRPO's advantages (arXiv 2503.20783, section 3.2)."""
    found: np.ndarray = rewards - rewards.mean()
    return found


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Return rewards before the mean of the group's others (RLOO, arXiv 2402.14740)."""
    found: np.ndarray = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
    return found


def pass_at_k(rewards: np.ndarray, k: int) -> np.ndarray:
    """Return PKPO's advantages (arXiv 2505.15201, equation 33, times n): what a response adds to the largest
    reward of `k` responses of the group, in the mean over all sets of `k` with it, times k.

    Of one response that is its reward; there a baseline is the mean of the others, as in `leave_one_out`.
    """
    n = len(rewards)
    if k == 1:
        return leave_one_out(rewards)
    # how likely the best of k - 1 of the n - 1 others is the one of each rank, from the worst
    odds = np.array([math.comb(rank, k - 2) / math.comb(n - 1, k - 1) for rank in range(n - 1)])
    # The best of a random set of k - 1 others is the one of a rank with `odds`: no set is drawn.
    order = np.argsort(rewards, kind="stable")
    ranked, found = rewards[order], np.empty(n)
    for place, index in enumerate(order):
        found[index] = k * odds @ np.maximum(rewards[index] - np.delete(ranked, place), 0.0)
    return found


def in_range(rewards: np.ndarray) -> np.ndarray:
    """Return GrouPER's advantages (`places_in_group`); 0 where all rewards are the same."""
    values = rewards.tolist()
    return np.array([0.0] * len(values) if are_equal(values) else places_in_group(values))


def mgpo_weight(share_right: float, strength: float) -> float:
    """Return what MGPO multiplies a group's advantages by (arXiv 2511.06221): exp(-lambda D),
    D the Kullback-Leibler divergence of the share of right responses from one half."""
    shares = (share_right, 1.0 - share_right)
    return math.exp(-strength * sum(p * math.log(p / 0.5) for p in shares if p > 0))


def _with_length(rewards: np.ndarray, lengths: np.ndarray, budgets: np.ndarray, policy: PolicyConfig,
                 max_new_tokens: int) -> np.ndarray:
    """Return [n] rewards with what the lengths of right responses count."""
    parts, right = policy.parts, rewards >= policy.right_from
    if parts.length_reward == "budget":
        return within_budget(lengths, right, budgets, max_new_tokens, parts.length_reward_coeff)
    if parts.length_reward == "around_right":
        return rewards + parts.length_reward_coeff * around_right(lengths, right, parts.length_width_tokens)
    if parts.length_reward == "target":
        return rewards + parts.length_reward_coeff * near_target(lengths, right, budgets,
                                                                 parts.length_width_tokens)
    return rewards


def _of_group(rewards: np.ndarray, lengths: np.ndarray, budgets: np.ndarray, policy: PolicyConfig,
              max_new_tokens: int) -> np.ndarray:
    """Return a group's advantages before those of the batch are seen."""
    parts = policy.parts
    if parts.advantage == "none":
        return np.zeros(len(rewards))
    counted = _with_length(rewards, lengths, budgets, policy, max_new_tokens)
    # The penalty of length joins before the baseline, so it is compared inside of the group too.
    shaped = counted - overlong_penalty(lengths, policy, max_new_tokens)
    compare = {"group": group_relative, "group_no_std": centred, "leave_one_out": leave_one_out,
               "pass_at_k": lambda r: pass_at_k(r, parts.pkpo_k), "range": in_range}[parts.advantage]
    # The mean of equal rewards may differ from them by rounding: AdamW would make whole updates of that.
    found = np.zeros(len(shaped)) if are_equal(shaped.tolist()) else compare(shaped)
    if parts.length_reward == "budget":
        found = found + against_budget(counted, budgets, max_new_tokens, parts.length_reward_coeff)
    if are_equal(rewards.tolist()) and rewards[0] < policy.right_from:
        # Rewards as judged, not as shaped: a length must not make a wrong group look mixed.
        found = found + parts.all_wrong_reward
    share_right = float((rewards >= policy.right_from).mean())
    return found * mgpo_weight(share_right, parts.mgpo_lambda)


def _normalise(found: list[np.ndarray], learns: list[bool]) -> list[np.ndarray]:
    """Return the advantages of groups that learn with mean 0 and standard deviation 1 over all of them."""
    # Groups that are left out stay at 0: shifted by the mean they would learn.
    together = np.concatenate([a for a, kept in zip(found, learns, strict=True) if kept] or [np.zeros(0)])
    if len(together) < 2:
        return found
    mean, std = together.mean(), together.std(ddof=1)
    return [(a - mean) / (std + EPSILON) if kept else a for a, kept in zip(found, learns, strict=True)]


def around_right(lengths: np.ndarray, right: np.ndarray, width_tokens: float) -> np.ndarray:
    """Return [n] LAPO's reward of lengths in its first stage (reward_func_stage1.py): of right responses
    1 between two percentiles of their lengths, falling evenly to 0 over `width_tokens` outside.

    Args:
        lengths: [n] tokens of the responses to one prompt.
        right: [n] bool.
        width_tokens: 100 in its code.
    """
    if not right.any():
        return np.zeros(len(lengths))
    low, high = np.percentile(lengths[right], (LOW_PERCENT, HIGH_PERCENT))
    # Tokens outside of the window, 0 inside.
    away = np.maximum(np.maximum(low - lengths, lengths - high), 0.0)
    return np.where(right, np.maximum(0.0, 1.0 - away / width_tokens), 0.0)


def near_target(lengths: np.ndarray, right: np.ndarray, targets: np.ndarray, width_tokens: float
                ) -> np.ndarray:
    """Return [n] LAPO's reward of lengths in its second stage (reward_func_stage2.py): of right responses
    exp(-(length - target)^2 / (2 width^2)).

    Args:
        lengths: [n] tokens of the responses to one prompt.
        right: [n] bool.
        targets: [n]; NaN: the median length of the right ones.
        width_tokens: the standard deviation; 120 in its code.
    """
    if not right.any():
        return np.zeros(len(lengths))
    away = lengths - np.where(np.isnan(targets), np.median(lengths[right]), targets)
    return np.where(right, np.exp(-away ** 2 / (2.0 * width_tokens ** 2)), 0.0)


def of_budget(budgets: np.ndarray, longest: int, scale: float) -> np.ndarray:
    """Return [n] what HBPO gives a right response that keeps its budget (arXiv 2507.15844, f_2 of section
    3.2): scale cos(pi budget / (2 longest))."""
    found: np.ndarray = scale * np.cos(np.pi * budgets / (2.0 * longest))
    return found


def within_budget(lengths: np.ndarray, right: np.ndarray, budgets: np.ndarray, longest: int, scale: float
                  ) -> np.ndarray:
    """Return [n] HBPO's rewards (arXiv 2507.15844, R of section 3.2), in the place of the verifier's: of
    right responses `of_budget` within it, and beyond it f_1: what a budget of their length would have, less
    |length - budget| / longest.

    Args:
        lengths: [n] tokens of the responses to one prompt.
        right: [n] bool.
        budgets: [n] tokens that each was told.
        longest: response (L_max; its inverse is alpha, as in the authors' code).
        scale: beta; 4 in their code.
    """
    # Just beyond its budget a response gets what a budget of its own length would give, less the excess.
    beyond = of_budget(lengths, longest, scale) - np.abs(lengths - budgets) / longest
    kept = np.where(lengths > budgets, beyond, of_budget(budgets, longest, scale))
    return np.where(right & (lengths <= longest), kept, 0.0)


def against_budget(rewards: np.ndarray, budgets: np.ndarray, longest: int, scale: float) -> np.ndarray:
    """Return [n] HBPO's advantage inside of the responses of one budget (arXiv 2507.15844, section 3.3): the
    mean of their rewards, less what keeping the budget gives.

    Args:
        rewards: [n] of `within_budget`.
        budgets: [n].
        longest: as there.
        scale: as there.
    """
    means = {budget: rewards[budgets == budget].mean() for budget in np.unique(budgets)}
    return np.array([means[budget] for budget in budgets]) - of_budget(budgets, longest, scale)
