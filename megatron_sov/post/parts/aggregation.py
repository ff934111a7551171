"""What each token counts in the mean over a step, and what that mean is divided by."""

from __future__ import annotations

import torch

from megatron_sov.config.policy import Aggregation
from megatron_sov.post.parts.responses import Responses


def label_weights(responses: Responses, kind: Aggregation) -> torch.Tensor:
    """Return [T] float64 what each label's loss is multiplied by; 0 where it is not learned."""
    if kind == "sequence":
        return responses.spread(1 / responses.lengths.clamp(min=1))
    return responses.spread(torch.ones_like(responses.lengths))


def denominator(responses: Responses, kind: Aggregation, max_new_tokens: int) -> float:
    """Return what the sum over these responses' labels is divided by, as far as it is theirs.

    Args:
        responses: on the host.
        kind: token: all tokens of the step (arXiv 2503.14476, equation 8); sequence: its responses, of which
            each counts the mean over its tokens (arXiv 2402.03300, equation 3); constant: its responses, each
            as if it were the longest (arXiv 2503.20783, section 3.2).
        max_new_tokens: of the longest response.
    """
    if kind == "token":
        return float(responses.lengths.sum())
    count = float((responses.lengths > 0).sum())
    return count * max_new_tokens if kind == "constant" else count
