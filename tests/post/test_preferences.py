"""Losses of pairs and groups against their papers' formulas, written out for one pair at a time."""

from __future__ import annotations

import math

import pytest

MARGINS = (-30.0, -1.5, 0.0, 0.25, 4.0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_papers(beta: float, smoothing: float) -> None:
    import torch

    from megatron_sov.post.preference import dpo

    margins = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    losses = dpo(margins, beta, smoothing)
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    for x, loss, slope in zip(MARGINS, losses.tolist(), slopes.tolist(), strict=True):
        right = 1 / (1 + math.exp(-beta * x))  # sigma(beta x): how likely the pair is the right way round
        assert loss == pytest.approx(-(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right),
                                     abs=1e-12)
        assert slope == pytest.approx(beta * (right - (1 - smoothing)), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_asks_for_a_lead(smoothing: float) -> None:
    import torch

    from megatron_sov.post.preference import simpo

    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    # r = beta * mean log p; the chosen one has to lead by gamma
    right = [1 / (1 + math.exp(-(2.5 * lead - 1.5))) for lead in (2.0, -1.5)]
    assert simpo(chosen, rejected, 2.5, 1.5, smoothing).tolist() == pytest.approx(
        [-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) for p in right], abs=1e-12)


def test_orpo_weighs_odds_and_stays_finite_where_a_response_is_certain() -> None:
    import torch

    from megatron_sov.post.preference import orpo

    chosen, rejected = torch.tensor([-0.1, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    odds = [(math.exp(c) / (1 - math.exp(c)), math.exp(r) / (1 - math.exp(r)))
            for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert orpo(chosen, rejected).tolist() == pytest.approx(
        [-math.log((c / r) / (1 + c / r)) for c, r in odds], abs=1e-12)
    certain = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = orpo(certain, rejected) + orpo(rejected, certain)
    (slopes,) = torch.autograd.grad(losses.sum(), certain)
    assert losses.isfinite().all() and slopes.isfinite().all()


def test_simper_and_grouper_weigh_inverse_perplexities() -> None:
    import torch

    from megatron_sov.post.preference import grouper, simper

    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    expected = [math.exp(-3) - math.exp(-1), math.exp(-0.5) - math.exp(-2)]
    assert simper(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-12)
    both = torch.stack([chosen, rejected], dim=1).flatten()
    assert grouper(both, torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist() == pytest.approx(
        [-math.exp(-1), math.exp(-3), -math.exp(-2), math.exp(-0.5)], abs=1e-12)
