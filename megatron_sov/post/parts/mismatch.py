"""What an engine that computes other log-probabilities than the trainer costs, and the correction for it: the
ratio of the trainer's policy to the engine's, both as they were when a response was written."""

from __future__ import annotations

import torch

from megatron_sov.config.policy import PolicyConfig
from megatron_sov.post.parts.responses import Responses


def importance(old: torch.Tensor, behaviour: torch.Tensor, responses: Responses,
               policy: PolicyConfig) -> torch.Tensor:
    """Return [T] float64 what each label's loss is multiplied by; 0 of labels that are masked out.

    Args:
        old: [T] log-probabilities by the trainer.
        behaviour: [T] by the engine, whose tokens they are.
        responses: which labels are learned.
        policy: `correction` and its bounds: truncated at the larger bound ("Your efficient RL framework
            secretly brings you off-policy RL training", Yao et al. 2025), or masked outside of both (IcePop);
            the ratio of whole responses is the product of their tokens'.
    """
    learned = responses.index < len(responses)
    apart = torch.where(learned, old.double() - behaviour.double(), 0.0)
    if policy.correction == "none":
        return torch.ones_like(apart)
    level, _, kind = policy.correction.partition("_")
    ratio = (responses.spread(responses.sums(apart)) if level == "sequence" else apart).exp()
    low, high = policy.correction_low, policy.correction_bound
    if kind == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def k3(logprobs: torch.Tensor, behaviour: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 estimates of KL(engine || trainer), at tokens that the engine drew."""
    apart = logprobs.double() - behaviour.double()
    return apart.exp() - apart - 1
