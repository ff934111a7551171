"""Losses over pairs of responses, chosen and rejected, one number per pair.

The first three measure both against a reference policy: their arguments are log-ratios, the policy's
log-probability of a response less the reference's.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def dpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Return direct preference optimisation's losses [pairs] (arXiv 2305.18290, equation 7).

    Args:
        chosen: [pairs] log-ratio of the whole response.
        rejected: likewise.
        beta: how strongly the policy is held to the reference.
    """
    return -logsigmoid(beta * (chosen - rejected))


def dpo_norm(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Return length-normalised DPO's losses [pairs] (arXiv 2411.15124, section 5; TRL's `sigmoid_norm`).

    Args:
        chosen: [pairs] log-ratio per token of the response.
        rejected: likewise.
        beta: larger than DPO's by about a response's number of tokens.
    """
    return dpo(chosen, rejected, beta)


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Return identity preference optimisation's losses [pairs] (arXiv 2310.12036, equation 17).

    Args:
        chosen: [pairs] log-ratio per token of the response, as its authors computed it (so TRL says).
        rejected: likewise.
        beta: its tau: the margin that is aimed at is ``1 / (2 tau)``.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simper(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return SimPER's losses [pairs] (arXiv 2502.00883, equation 4), without reference and without a number
    to choose.

    Args:
        chosen: [pairs] the policy's log-probability per token of the response, whose exponential is the
            inverse of its perplexity.
        rejected: likewise.
    """
    return rejected.exp() - chosen.exp()
