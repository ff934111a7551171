"""Divergence of the policy from a reference, estimated at the tokens that were drawn.

Each function's derivative is, in expectation over responses of the policy, that of KL(policy || reference).
The plain derivative of k1 would be 0 in expectation, and teach nothing; so it, and that of sequences, is made
of the value times the derivative of log p (arXiv 2506.09477).
"""

from __future__ import annotations

import torch

from megatron_sov.post.parts.responses import Responses


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 the difference of log-probabilities, unbiased.

    Args:
        logprobs: [T] of the policy, differentiable, and finite.
        reference: [T].
    """
    return _by_score(logprobs.double() - reference.double())


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 ``q / p - log(q / p) - 1``, unbiased and never negative, differentiated as it
    stands (arXiv 2402.03300, equation 4)."""
    apart = reference.double() - logprobs.double()
    return apart.exp() - apart - 1


def of_sequences(logprobs: torch.Tensor, reference: torch.Tensor, responses: Responses) -> torch.Tensor:
    """Return [R] float64 the differences of log-probabilities of whole responses."""
    return _by_score(responses.sums(logprobs) - responses.sums(reference))


def _by_score(apart: torch.Tensor) -> torch.Tensor:
    """Return the difference, with its own size times its derivative as derivative."""
    value = apart.detach()
    return value + value * (apart - value)
