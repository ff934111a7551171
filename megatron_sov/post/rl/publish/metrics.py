"""Figures of a round: means over responses, headline meters, and a warning if few groups learn."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.policy import GROUPS_LEARNING, RESPONSE_TOKENS, REWARD
from megatron_sov.post.rl.publish.groups import JudgedRound
from megatron_sov.runs.rounds import TRAINED_GROUPS

PASS_RATE = "pass_rate"
"""Name of a mean: share of responses with a reward of at least `policy.right_from`."""
MIN_LEARNING, MIN_LEARNING_EXTREME = 0.1, 0.5
"""Shares of learning groups below which a round warns; `MIN_LEARNING_EXTREME` is for a first round with an
extreme pass rate."""
EXTREME_RATES = (0.05, 0.95)
"""Pass rates outside these bounds mean that most groups have equal rewards."""


def compute_means(gathered: JudgedRound, rollout: RolloutConfig, right_from: float | None) -> dict[str, Any]:
    """Return the manifest field `means` over the judged responses in a round, trained or not.

    Args:
        gathered: the round.
        rollout: `steps_per_round` gives the optimizer step before the round.
        right_from: smallest reward of a right response; None: no reward judges the run.
    """
    rows, has_reward = gathered.rows, right_from is not None
    if not len(rows):
        return {"responses": 0}
    num_written = int(rows["written"].sum())
    trained_steps = (gathered.number - 1) * rollout.steps_per_round
    # Optimizer steps from a token's policy to the start of the round, summed over generated tokens.
    stale_steps = trained_steps * num_written - int(rows["versions"].sum())
    rewards = defaultdict[str, list[float]](list)
    for domain, reward in zip(gathered.row_domains, rows["reward"].tolist(), strict=True):
        rewards[domain].append(reward)
    domains: dict[str, dict[str, float]] = {}
    for name, values in sorted(rewards.items()):
        if name:
            domains[name] = {"responses": len(values)}
            if has_reward:
                domains[name]["reward"] = _compute_mean(values)
    means: dict[str, Any] = {"responses": len(rows)}
    if right_from is not None:
        means |= {"reward": _compute_mean(rows["reward"]),
                  PASS_RATE: _compute_mean(rows["reward"] >= right_from)}
    return means | {
        "components": {name: _compute_mean(values) for name, values in gathered.components.items()},
        "response_tokens": _compute_mean(rows["written"]), "truncated": _compute_mean(rows["is_cut"]),
        "staleness_steps": stale_steps / max(1, num_written), "domains": domains}


def _compute_mean(values: np.ndarray | Sequence[float]) -> float:
    # A contiguous copy: numpy sums strided values in another order, with other bits.
    return float(np.array(values, np.float64).mean())


def compute_round_meters(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the headline meters `REWARD`, `RESPONSE_TOKENS`, `GROUPS_LEARNING` from the manifest content."""
    means, groups = content.get("means") or {}, content.get("groups") or {}
    meters = {REWARD: means.get("reward"), RESPONSE_TOKENS: means.get("response_tokens")}
    count = sum(groups.values())
    if count:
        meters[GROUPS_LEARNING] = groups.get(TRAINED_GROUPS, 0) / count
    return {name: float(value) for name, value in meters.items() if value is not None}


def describe_groups(groups: Mapping[str, int]) -> str:
    """Format the groups in a round: "3 learns, 2 no advantage"."""
    return ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in groups.items())


def find_round_problem(content: Mapping[str, Any], *, is_first: bool) -> str:
    """Return a warning with a fix if fewer groups learn than `MIN_LEARNING`, otherwise "".

    Args:
        content: content of the manifest of the round.
        is_first: whether the initial model generated the round: then a pass rate outside of `EXTREME_RATES`
            warns below `MIN_LEARNING_EXTREME`.
    """
    groups, rate = content.get("groups") or {}, (content.get("means") or {}).get(PASS_RATE)
    count = sum(groups.values())
    share = groups.get(TRAINED_GROUPS, 0) / count if count else 1.0
    is_extreme = rate is not None and not EXTREME_RATES[0] < rate < EXTREME_RATES[1]
    if share >= (MIN_LEARNING_EXTREME if is_first and is_extreme else MIN_LEARNING):
        return ""
    summary = f"{groups.get(TRAINED_GROUPS, 0):,} of {count:,} groups learn ({describe_groups(groups)})"
    if rate is None:
        return f"{summary}; the others have responses of equal worth, or too few"
    measured = "`sov-data difficulty` measures pass rates and selects by them"
    if not is_extreme:
        return (f"{summary}, and {rate:.1%} of the responses are right: each prompt is solved always or "
                f"never; take prompts in between ({measured})")
    if rate < 0.5:
        return (f"{summary}, and only {rate:.1%} of the responses are right: take easier prompts "
                f"({measured}), or fine-tune on right answers first (`megatron-sov sft`)")
    return (f"{summary}, and {rate:.1%} of the responses are right already: take harder prompts "
            f"({measured}), or end the run")
