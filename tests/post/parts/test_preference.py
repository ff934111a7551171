"""Losses over pairs and their derivatives, against the papers' formulas in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_sov.post.parts.preference import dpo, dpo_norm, ipo, simper

CHOSEN, REJECTED, BETA = [0.3, -2.0, 5.0, -0.7], [-1.1, 0.4, -30.0, -0.7], 0.3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def of_dpo(c: float, r: float) -> tuple[float, float, float]:
    margin = BETA * (c - r)
    return math.log1p(math.exp(-margin)), -BETA * sigmoid(-margin), BETA * sigmoid(-margin)


def of_ipo(c: float, r: float) -> tuple[float, float, float]:
    miss = c - r - 1 / (2 * BETA)
    return miss * miss, 2 * miss, -2 * miss


def of_simper(c: float, r: float) -> tuple[float, float, float]:
    return -math.exp(c) + math.exp(r), -math.exp(c), math.exp(r)


@pytest.mark.parametrize(("loss", "formula"), [
    (lambda c, r: dpo(c, r, BETA), of_dpo), (lambda c, r: dpo_norm(c, r, BETA), of_dpo),
    (lambda c, r: ipo(c, r, BETA), of_ipo), (simper, of_simper)], ids=["dpo", "dpo-norm", "ipo", "simper"])
def test_value_and_derivatives_are_the_papers(
        loss: Callable[..., torch.Tensor], formula: Callable[..., tuple[float, float, float]]) -> None:
    """Each formula gives the loss and its derivatives by chosen and rejected."""
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED))
    found = loss(chosen, rejected)
    found.sum().backward()
    for values, expected in zip((found.detach(), chosen.grad, rejected.grad),
                                zip(*map(formula, CHOSEN, REJECTED), strict=True), strict=True):
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12,
                                   atol=1e-15)


def test_a_hopeless_pair_keeps_its_gradient() -> None:
    """A margin of -3,000 nats, where exp(-margin) is no number."""
    chosen = torch.tensor([-3000.0], requires_grad=True)
    dpo(chosen, torch.zeros(1), 1.0).sum().backward()
    assert chosen.grad is not None and chosen.grad.item() == -1
