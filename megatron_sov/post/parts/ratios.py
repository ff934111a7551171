"""Ratios of the policy to the one that wrote a response, of each token or of the whole response.

Shapes: T labels of a row, R responses.
"""

from __future__ import annotations

import torch

from megatron_sov.config.policy import Ratio
from megatron_sov.post.parts.responses import Responses


def ratios(logprobs: torch.Tensor, old: torch.Tensor, responses: Responses, kind: Ratio) -> torch.Tensor:
    """Return [T] float64 the ratio that weighs each label; 1 of labels that are not learned.

    Args:
        logprobs: [T] of the policy, differentiable.
        old: [T] of the policy that wrote them.
        responses: which labels are learned.
        kind: token: of each label (arXiv 2402.03300, equation 3); sequence: the geometric mean over its
            response (arXiv 2507.18071, equation 7).
    """
    learned = responses.index < len(responses)
    # not a product: what is not learned may be impossible
    apart = torch.where(learned, logprobs.double() - old.double(), 0.0)
    if kind == "sequence":
        apart = responses.spread(responses.means(apart))
    return apart.exp()
