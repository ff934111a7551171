"""Losses of pairs and groups, as functions of their responses' log-probabilities; all in float64.

P: pairs, chosen and rejected; a margin is what the chosen response has before the rejected one, of the
logarithm of policy over reference.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def dpo(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return [P] losses of direct preference optimisation (arXiv 2305.18290, eq. 7; smoothing: eq. 3 of
    "A note on DPO with noisy preferences", Mitchell 2023).

    Args:
        margins: [P], of sums over responses, or of means (Tülu 3, arXiv 2411.15124, eq. 6).
        beta: strength of the reference.
        label_smoothing: share of pairs that are the wrong way round.
    """
    return (-(1 - label_smoothing) * logsigmoid(beta * margins)
            - label_smoothing * logsigmoid(-beta * margins))


def ipo(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """Return [P] losses of identity preference optimisation (arXiv 2310.12036, eq. 17).

    Args:
        margins: [P] of means over responses, as the paper's authors have it in their code.
        beta: the paper's tau.
    """
    return (margins - 1 / (2 * beta)) ** 2


def simper(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return [P] losses of SimPER (arXiv 2502.00883, eq. 6): inverse perplexities, those of the chosen
    responses up, those of the rejected ones down.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
    """
    return rejected.exp() - chosen.exp()


def grouper(means: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return [R] losses of GrouPER (K-EXAONE's technical report): SimPER over groups.

    Args:
        means: [R] means of log-probabilities over the responses.
        advantages: [R] from -1, the worst of a group, to 1, the best.
    """
    return -advantages * means.exp()

