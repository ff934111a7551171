"""Language modelling: the terms' denominators and sums, against cross-entropy written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.data.rows import Row
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.train.lm import LanguageModelling  # noqa: E402
from megatron_sov.train.microbatch import MicroBatch, from_row  # noqa: E402


class Logits:
    """Stands for the output head: the hidden states are the logits."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = torch.nn.functional.cross_entropy(hidden, labels, reduction="none")
        return {term: (losses * w).sum() for term, w in weights.items()}, losses


@pytest.fixture
def batch() -> MicroBatch:
    """Documents of 3 and 4 tokens and one of padding; the last token of a document has no label."""
    import numpy as np

    return from_row(Row(
        tokens=np.array([1, 2, 3, 4, 5, 6, 7, 0]), labels=np.array([2, 3, 0, 5, 6, 7, 0, 0]),
        weights=np.array([1, 1, 0, 1, 1, 0.5, 0, 0], np.float32),
        positions=np.array([0, 1, 2, 0, 1, 2, 3, 0]), types=np.zeros(8, np.uint8),
        sources=np.array([0] * 3 + [1] * 5), padding=np.array([False] * 7 + [True]),
        bounds=np.array([0, 3, 7, 8], np.int32)))


def objective(recipe: str) -> LanguageModelling:
    batches: Any = SimpleNamespace(num_sources=2, next=lambda: "the next batch")
    context: Any = SimpleNamespace(config=recipes.get(recipe), batches=batches)
    return LanguageModelling(context)


def test_each_label_counts_with_its_weight(batch: MicroBatch) -> None:
    logits = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    sums = objective("tiny-solar-open").loss([logits], Logits(), batch)  # type: ignore[arg-type]
    losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    assert set(sums.terms) == {"lm"}
    assert float(sums.terms["lm"]) == pytest.approx(float((losses * batch.weights).sum()))
    first = losses[:2].double().sum()
    assert sums.by_source[0].tolist() == pytest.approx([float(first), 2.0])
    assert float(sums.by_source[1, 1]) == 2.5


def test_the_token_after_the_next_counts_inside_a_document_only(batch: MicroBatch) -> None:
    """Position 0 predicts 3, position 3 predicts 6 and position 4 predicts 7,
    with the weights of those labels."""
    logits = [torch.randn(8, 9, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    found = objective("tiny-k-exaone")
    sums = found.loss(logits, Logits(), batch)  # type: ignore[arg-type]
    logprobs = logits[1].log_softmax(-1)
    assert float(sums.terms["mtp"]) == pytest.approx(
        -float(logprobs[0, 3] + logprobs[3, 6] + 0.5 * logprobs[4, 7]))
    assert found.coefficients == {"lm": 1.0, "mtp": 0.05}
