"""Divergence of the policy from a reference, estimated at the tokens that were drawn.

Each value is KL(policy || reference) in expectation over the policy's responses; the derivatives differ
(arXiv 2506.09477).  That of k1, taken plainly, is 0 in expectation and would teach nothing; so it, and that
of whole responses, is the value times the derivative of log p: in expectation the derivative of the
divergence, of each token behind what stands before it, or of responses.  k3 is differentiated as it stands,
as GRPO's authors do: in expectation the derivative of KL(reference || policy) of each token.
"""

from __future__ import annotations

import torch

from megatron_sov.post.parts.responses import Responses


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 the difference of log-probabilities.

    Args:
        logprobs: [T] of the policy, differentiable, and finite.
        reference: [T].
    """
    return _by_score(logprobs.double() - reference.double())


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 ``q / p - log(q / p) - 1``, never negative (arXiv 2402.03300, equation 4)."""
    apart = reference.double() - logprobs.double()
    return apart.exp() - apart - 1


def of_sequences(logprobs: torch.Tensor, reference: torch.Tensor, responses: Responses) -> torch.Tensor:
    """Return [R] float64 the differences of log-probabilities of whole responses."""
    return _by_score(responses.sums(logprobs) - responses.sums(reference))


def _by_score(apart: torch.Tensor) -> torch.Tensor:
    """Return the difference, with its own size times its derivative as derivative."""
    value = apart.detach()
    return value + value * (apart - value)
