"""Quantile balancing: biases against numpy's quantiles, equal loads, and equal biases at every layout."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.engine.quantile_bias import QUANTILE_BINS, count_required_biases, solve_biases
from megatron_sov.train.loop import train_step
from tests.tiny import tiny_trainer

EXPERTS, TOP_K, TOKENS = 8, 2, 4000


def draw_scores() -> tuple[Any, Any]:
    """Return scores [tokens, experts] that prefer the last experts, and which tokens are not padding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator) + torch.linspace(-1, 1, EXPERTS)
    return logits.sigmoid(), torch.rand(TOKENS, generator=generator) > 0.1


def compute_required_biases(scores: Any, bias: Any) -> Any:
    """Return the best rejected biased score minus each score, token by token."""
    required = []
    for row in scores.double().numpy():
        rejected = sorted(row + bias.double().numpy())[-TOP_K - 1]
        required.append(rejected - row)
    return np.array(required)


def test_biases_are_the_quantiles_of_all_micro_batches_tokens() -> None:
    scores, valid = draw_scores()
    bias = torch.linspace(0.2, -0.2, EXPERTS)
    counts = sum(count_required_biases(part, bias, TOP_K, mask)
                 for part, mask in zip(scores.split(700), valid.split(700), strict=True))
    assert torch.equal(counts, count_required_biases(scores, bias, TOP_K, valid))
    expected = np.quantile(compute_required_biases(scores[valid], bias), TOP_K / EXPERTS, axis=0)
    bin_width = (bias.max() - bias.min() + 2) / QUANTILE_BINS
    found = solve_biases(counts, bias, TOP_K)
    assert np.abs(found.numpy() - (expected - expected.mean())).max() < bin_width
    assert float(found.mean()) == pytest.approx(0, abs=1e-7)


def test_repeated_updates_give_each_expert_the_mean_load() -> None:
    scores, _ = draw_scores()
    bias, imbalances = torch.zeros(EXPERTS), []
    for _ in range(12):
        load = torch.bincount((scores + bias).topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        imbalances.append(float(load.max() / (TOKENS * TOP_K / EXPERTS)))
        bias = solve_biases(count_required_biases(scores, bias, TOP_K, None), bias, TOP_K)
    assert imbalances[0] > 1.7 and imbalances[1] < 1.3 and imbalances[-1] < 1.02


def train_biases(data: str, settings: list[str]) -> list[list[float]]:
    """Return the selection biases [layers, experts] after two steps."""
    trainer = tiny_trainer(
        data, "model.num_layers=2", "train.global_batch_size=8", "train.steps=9", "guards.hang_timeout_s=0",
        "train.precision=fp64", "model.router_bias_update=quantile", *settings)
    for _ in range(2):
        train_step(trainer)
    biases: list[list[float]] = trainer.expert_load.biases().tolist()
    trainer.close()
    return biases


@pytest.mark.distributed
def test_every_layout_computes_the_same_biases(ranks: Any, job: Any, packed_data: Any) -> None:
    layouts = [[], ["train.micro_batch_size=4"], ["parallel.ep=2"], ["parallel.cp=2"],
               ["parallel.tp=2", "parallel.sp=true"], ["parallel.pp=2", "train.micro_batch_size=2"]]
    results = ranks(*(job(__file__, "train_biases", 2 if any("parallel" in s for s in settings) else 1,
                          {"data": str(packed_data.text), "settings": settings}) for settings in layouts))
    (expected,) = results[0]
    assert np.abs(expected).max() > 0.01  # ten steps by sign
    for result in results[1:]:
        for biases in result:
            assert np.abs(np.array(biases) - expected).max() < 1e-6
