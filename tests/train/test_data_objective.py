"""What objectives over the data order share: their batches, and the prediction term by brute
force over documents."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.data.rows import Row
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.train.data_objective import MTP, DataObjective  # noqa: E402
from megatron_sov.train.microbatch import from_row  # noqa: E402

BOUNDS, VOCAB = [0, 7, 8, 20, 24], 11


class Logits:
    """Stands for the output head: the hidden states are the logits."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = torch.nn.functional.cross_entropy(hidden, labels, reduction="none")
        return {term: (losses * w).sum() for term, w in weights.items()}, losses


def objective(depths: int) -> DataObjective:
    config = apply_settings(recipes.get("tiny-k-exaone"), ["model.mtp_loss_coeff=0.3"])
    # more than a recipe may have
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_mtp_layers=depths))
    batches: Any = SimpleNamespace(num_sources=1, next=lambda: "the next batch")
    context: Any = SimpleNamespace(config=config, batches=batches)
    return DataObjective(context)


@pytest.mark.parametrize("depths", [1, 2])
def test_every_depth_predicts_one_token_further_on_in_the_same_document(depths: int) -> None:
    random = np.random.default_rng(4)
    n = BOUNDS[-1]
    tokens, weights = random.integers(0, VOCAB, n), random.choice([0, 0.5, 1], n).astype(np.float32)
    labels = np.roll(tokens, -1)
    ends = np.array(BOUNDS[1:]) - 1
    labels[ends], weights[ends] = 0, 0
    batch = from_row(Row(tokens=tokens, labels=labels, weights=weights, types=np.zeros(n, np.uint8),
                         sources=np.zeros(n, np.int64),
                         positions=np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(BOUNDS)]),
                         padding=np.zeros(n, bool), bounds=np.array(BOUNDS, np.int32)))
    logits = [torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(depth))
              for depth in range(depths + 1)]
    expected = counted = 0.0
    for depth, (first, end) in itertools.product(range(1, depths + 1), itertools.pairwise(BOUNDS)):
        for place in range(first, end - 1 - depth):
            weight, wanted = weights[place + depth], tokens[place + 1 + depth]
            counted += weight
            expected -= weight * float(logits[depth][place].log_softmax(-1)[wanted])
    found = objective(depths)
    assert found._mtp_coefficient == {MTP: 0.3}
    assert found._mtp_targets([batch, batch]) == {MTP: pytest.approx(2 * counted)} and counted > 3
    assert (float(found._mtp_sum(logits, Logits(), batch)[MTP])  # type: ignore[arg-type]
            == pytest.approx(expected, rel=1e-5))


def test_without_prediction_layers_there_is_no_such_term() -> None:
    found = objective(0)
    batch: Any = SimpleNamespace(weights=torch.ones(1))
    assert found._mtp_coefficient == {} and found._mtp_targets([]) == {}
    assert found._mtp_sum([], None, batch) == {}  # type: ignore[arg-type]


def test_batches_come_from_the_order() -> None:
    assert objective(0).collect(None, 7) == "the next batch"  # type: ignore[comparison-overlap]
