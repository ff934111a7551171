"""Means over tokens, turns and samples, against loops over conversations in float64."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov import recipes  # noqa: E402
from megatron_sov.config import RunConfig, apply_settings  # noqa: E402
from megatron_sov.data.rows import Row, join_rows  # noqa: E402
from megatron_sov.mcore.parallel import collectives  # noqa: E402
from megatron_sov.post.sft import SupervisedFineTuning  # noqa: E402
from megatron_sov.train.microbatch import from_row  # noqa: E402
from megatron_sov.train.objective import GlobalBatch, total_loss  # noqa: E402

VOCAB, ROW = 13, 24
CHATS = ("PPRRRPPRRRRRRPR", "PRPRR", "PPP", "RRR", "PPPRRRRRRRRRRRR", "PRRPPRPRRR")
"""Types of the labels of conversations: prompt, response; one of which nothing is learned."""
ROWS = ((0, 1), (2, 3), (4,), (5, 1))


class Logits:
    """Stands for the output head: the hidden states are the logits."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = torch.nn.functional.cross_entropy(hidden, labels, reduction="none")
        return {term: (losses * w).sum() for term, w in weights.items()}, losses


def a_row(chats: tuple[int, ...], random: np.random.Generator) -> Row:
    """Return conversations and padding; the last token of each has no label."""
    kinds = "".join(CHATS[i] + "." for i in chats)
    types = np.array([{"P": 1, "R": 2, ".": 0}[k] for k in kinds.ljust(ROW, ".")], np.uint8)
    ends = np.cumsum([len(CHATS[i]) + 1 for i in chats])
    filled = int(ends[-1])
    return Row(tokens=random.integers(0, VOCAB, ROW), labels=random.integers(0, VOCAB, ROW),
               weights=(types == 2).astype(np.float32) * random.choice([0.5, 1.0], ROW).astype(np.float32),
               positions=np.arange(ROW), types=types, sources=np.zeros(ROW, np.int64),
               padding=np.arange(ROW) >= filled,
               bounds=np.array([0, *ends, *([ROW] if filled < ROW else [])], np.int32))


def config_of(loss_per: str) -> RunConfig:
    return apply_settings(recipes.get("tiny-solar-open"), [
        "objective.name=sft", f"objective.loss_per={loss_per}", "train.precision=fp64"])


def by_hand(rows: list[Row], logits: list[torch.Tensor], loss_per: str) -> torch.Tensor:
    """Return the mean over units of each unit's weighted mean loss."""
    means = []
    for row, scores in zip(rows, logits, strict=True):
        for first, end in pairwise(row.bounds.tolist()):
            turns: list[list[int]] = []
            for t in range(first, end):
                if row.weights[t] > 0:
                    if not (turns and turns[-1][-1] == t - 1):
                        turns.append([])
                    turns[-1].append(t)
            units = [[t for turn in turns for t in turn]] if loss_per == "sample" and turns else turns
            for unit in units:
                weights = [float(row.weights[t]) for t in unit]
                losses = [-scores[t].log_softmax(-1)[int(row.labels[t])] for t in unit]
                means.append(sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights))
    return sum(means) / len(means)  # type: ignore[return-value]


@pytest.mark.parametrize(("loss_per", "units"), [("turn", 12), ("sample", 6)])
def test_every_unit_counts_by_its_own_mean_however_the_batch_is_split(
        loss_per: str, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "all_reduce_dp", lambda values: values)
    random = np.random.default_rng(0)
    rows = [a_row(chats, random) for chats in ROWS]
    logits = [torch.randn(ROW, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(i),
                          requires_grad=True) for i in range(len(rows))]
    expected = by_hand(rows, logits, loss_per)
    gradients = torch.autograd.grad(expected, logits)
    context: Any = SimpleNamespace(config=config_of(loss_per), batches=SimpleNamespace(num_sources=1))
    objective = SupervisedFineTuning(context)
    for size in (1, 2, 4):
        split = [range(i, i + size) for i in range(0, len(rows), size)]
        batch = objective.prepare(GlobalBatch(
            tuple(from_row(join_rows([rows[i] for i in part])) for part in split), ROW, len(rows), "main"))
        assert batch.targets["response"] == pytest.approx(units, rel=1e-12)
        head: Any = Logits()
        loss = sum(total_loss(objective.loss([torch.cat([logits[i] for i in part])], head, m),
                              objective.coefficients, batch.targets)
                   for part, m in zip(split, batch.micro_batches, strict=True))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)  # type: ignore[union-attr]
        for ours, theirs in zip(torch.autograd.grad(loss, logits), gradients, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_what_is_sent_to_a_device_has_the_weights_that_were_counted() -> None:
    """As `tests/train/test_data_batches.py` does it: who sent a row keeps it on the host beside."""
    context: Any = SimpleNamespace(config=config_of("turn"), batches=SimpleNamespace(num_sources=1))
    host = from_row(a_row((0, 1), np.random.default_rng(1)))
    sent = SupervisedFineTuning(context)._weighted(dataclasses.replace(host, on_host=host))
    assert sent.on_host is not None and torch.equal(sent.weights, sent.on_host.weights)
    assert float(sent.host.weights.sum()) == pytest.approx(5)
