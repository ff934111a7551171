"""Losses of pairs and groups, as functions of their responses' log-probabilities; all in float64.

P: pairs, chosen and rejected; a margin is what the chosen response has before the rejected one, of the
logarithm of policy over reference.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

PREFERENCE, CHOSEN = "preference", "chosen"
"""Parts of a loss: of preferences, and cross-entropy of responses that were chosen."""


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


def kto(ratios: torch.Tensor, desirable: torch.Tensor, distance: float, beta: float,
        desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> torch.Tensor:
    """Return [N] losses of Kahneman-Tversky optimisation (arXiv 2402.01306, eq. 8), without the constant
    weight of each response.

    Args:
        ratios: [N] logarithm of policy over reference of each response.
        desirable: [N] bool: which of them were judged good.
        distance: z_0, how far the policy has gone from the reference in all.
        beta: strength of the reference.
        desirable_weight: of good ones.
        undesirable_weight: of bad ones.
    """
    ahead = beta * (ratios - distance)
    return torch.where(desirable, desirable_weight * (1 - ahead.sigmoid()),
                       undesirable_weight * (1 - (-ahead).sigmoid()))


def simper(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return [P] losses of SimPER (arXiv 2502.00883, eq. 6): inverse perplexities, those of the chosen
    responses up, those of the rejected ones down.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
    """
    return rejected.exp() - chosen.exp()


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float,
          label_smoothing: float = 0.0) -> torch.Tensor:
    """Return [P] losses of SimPO (arXiv 2405.14734, eq. 6): `dpo` without a reference, over means, with a
    margin that the chosen response has to have.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
        beta: how steeply the loss falls with the difference of the means.
        gamma: the margin, in units of beta times log-probability, as in the paper.
        label_smoothing: as of `dpo`.
    """
    return dpo(chosen - rejected - gamma / beta, beta, label_smoothing)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return [P] odds ratio losses of ORPO (arXiv 2403.07691, eq. 7), without the weight and the
    cross-entropy that stand beside them in its eq. 6.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(means: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of p = exp(means), finite where p rounds to 1."""
    certain = means.clamp(max=-2.0**-40)
    return certain - torch.where(certain > -math.log(2), (-certain.expm1()).log(), (-certain.exp()).log1p())


def grouper(means: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return [R] losses of GrouPER (K-EXAONE's technical report): SimPER over groups.

    Args:
        means: [R] means of log-probabilities over the responses.
        advantages: [R] from -1, the worst of a group, to 1, the best.
    """
    return -advantages * means.exp()

