"""Losses by type of label, against sums taken label by label."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.config import IdBlock
from megatron_sov.data.rows import Row
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.post.sft import SupervisedFineTuning  # noqa: E402
from megatron_sov.train.lm import LanguageModelling  # noqa: E402
from megatron_sov.train.microbatch import MicroBatch, from_row  # noqa: E402
from megatron_sov.train.objective import GlobalBatch  # noqa: E402

AUDIO, IMAGE = IdBlock(4, 3), IdBlock(7, 2)


def config(**objective: Any) -> Any:
    made = recipes.get("tiny-qwen3")
    return replace(made, model=replace(made.model, audio_tokens=AUDIO, image_tokens=IMAGE),
                   objective=replace(made.objective, **objective))


def batch(seed: int) -> MicroBatch:
    """24 random labels with random weights, some of them 0, and random types."""
    rng = np.random.default_rng(seed)
    return from_row(Row(
        tokens=rng.integers(0, 9, 24), labels=rng.integers(0, 9, 24),
        weights=rng.choice([0, 1, 0.5], 24).astype(np.float32), positions=np.arange(24),
        types=rng.integers(0, 3, 24).astype(np.uint8), sources=np.zeros(24, np.int64),
        padding=np.zeros(24, bool), bounds=np.array([0, 24], np.int32)))


class Logits:
    """Stands for the output head: the hidden states are the logits."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = torch.nn.functional.cross_entropy(hidden, labels, reduction="none")
        return {term: (losses * w).sum() for term, w in weights.items()}, losses


@pytest.mark.parametrize("kind", [LanguageModelling, SupervisedFineTuning])
def test_weights_enter_sums_and_the_count_over_the_whole_batch(kind: Any,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    # tests/layouts adds counts over processes
    monkeypatch.setattr(sys.modules[kind.__module__], "with_denominators",
                        lambda batch, targets: replace(batch, targets=targets))
    learner = kind(SimpleNamespace(config=config(audio_weight=0.25, image_weight=3.0),
                                   batches=SimpleNamespace(num_sources=1)))
    batches = [batch(seed) for seed in range(2)]
    logits = [torch.randn(24, 9, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    prepared = learner.prepare(GlobalBatch(tuple(batches), 24, 2, "p"))
    term = "lm" if kind is LanguageModelling else "response"
    total = count = 0.0
    by_type = {"text_loss": [0.0, 0], "audio_loss": [0.0, 0], "image_loss": [0.0, 0]}
    for one, scores in zip(batches, logits, strict=True):
        logprobs = scores.log_softmax(-1)
        for i in range(24):
            label, weight = int(one.labels[i]), float(one.weights[i])
            name, factor = ("text_loss", 1.0)
            if 4 <= label < 7:
                name, factor = "audio_loss", 0.25
            elif 7 <= label < 9:
                name, factor = "image_loss", 3.0
            loss = -float(logprobs[i, label])
            if weight:
                by_type[name][0] += loss
                by_type[name][1] += 1
            if term == "lm" or int(one.types[i]) == 2:
                total += weight * factor * loss
                count += weight * factor
    sums = [learner.loss([scores], Logits(), m)
            for scores, m in zip(logits, prepared.micro_batches, strict=True)]
    assert prepared.targets[term] == pytest.approx(count)
    assert sum(float(s.terms[term]) for s in sums) == pytest.approx(total, rel=1e-5)
    for name, (summed, number) in by_type.items():
        assert sum(float(s.meters[name][0]) for s in sums) == pytest.approx(summed, rel=1e-5)
        assert sum(int(s.meters[name][1]) for s in sums) == number


def test_without_blocks_nothing_is_measured_nor_copied() -> None:
    made = recipes.get("tiny-qwen3")
    learner = LanguageModelling(SimpleNamespace(config=made, batches=SimpleNamespace(num_sources=1)))  # type: ignore[arg-type]
    one = batch(0)
    assert learner.meters == () and learner._typed.weighted(one) is one
    assert learner._typed.measured(torch.zeros(24), one) == {}
