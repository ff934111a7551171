"""Surrogates of a policy's advantage, which bound how far one step goes on responses of an older policy."""

from __future__ import annotations

import torch

from megatron_sov.config.policy import PolicyParts


def surrogate(ratios: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor,
              parts: PolicyParts) -> torch.Tensor:
    """Return [T] float64 what each label adds to the objective, to be maximised.

    Where every ratio is 1 each kind's derivative is REINFORCE's: advantage times that of log p.

    Args:
        ratios: [T] of policy to writer, differentiable.
        logprobs: [T] of the policy, differentiable, and finite.
        advantages: [T].
        parts: two_sided: PPO's (arXiv 1707.06347, equation 7) with bounds of their own (arXiv 2503.14476,
            equation 8); cispo: the ratio is a weight, bounded above (arXiv 2506.13585, equations 4 and 5,
            without the lower bound, which its authors do not use); none: importance sampling as it is.
    """
    advantages = advantages.double()
    if parts.clip == "cispo":
        return ratios.clamp(max=1 + parts.clip_high).detach() * advantages * logprobs.double()
    if parts.clip == "none":
        return ratios * advantages
    return torch.min(ratios * advantages,
                     ratios.clamp(1 - parts.clip_low, 1 + parts.clip_high) * advantages)


def is_clipped(ratios: torch.Tensor, advantages: torch.Tensor, parts: PolicyParts) -> torch.Tensor:
    """Return [T] bool: labels of which the bound has a say, so that they teach nothing (two_sided), or less
    (cispo)."""
    above = ratios > 1 + parts.clip_high
    if parts.clip == "cispo":
        return above
    if parts.clip == "none":
        return torch.zeros_like(above)
    return (above & (advantages > 0)) | ((ratios < 1 - parts.clip_low) & (advantages < 0))
