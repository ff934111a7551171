"""Pretraining losses: sums, denominators and terms against explicit cross-entropy."""

import dataclasses
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import IdBlock, apply_settings
from megatron_sov.post.sft import SupervisedFineTuning
from megatron_sov.train.data.rows import PackedRow
from megatron_sov.train.objectives.data_objective import MTP, DataObjective, LanguageModelling
from megatron_sov.train.objectives.microbatch import MicroBatch, build_micro_batch
from megatron_sov.train.objectives.objective import (
    GlobalBatch, LossSums, check_has_targets, compute_total_loss, get_checkpoint_parts, per_source)
from tests.head_config import Logits

# The loss term of multi-token prediction (MTP) against loops over documents.


BOUNDS, VOCAB = [0, 7, 8, 20, 24], 11


def build_objective(depths: int) -> DataObjective:
    config = apply_settings(recipes.get("tiny-k-exaone"), ["model.mtp_loss_coeff=0.3"])
    # `replace` skips the validation, which allows this recipe one depth.
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
    positions = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(BOUNDS)])
    batch = build_micro_batch(PackedRow(
        tokens=tokens, labels=labels, weights=weights, types=np.zeros(n, np.uint8),
        sources=np.zeros(n, np.int64), positions=positions, padding=np.zeros(n, bool),
        bounds=np.array(BOUNDS, np.int32)))
    logits = [torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(depth))
              for depth in range(depths + 1)]
    expected = num_targets = 0.0
    for depth, (first, end) in itertools.product(range(1, depths + 1), itertools.pairwise(BOUNDS)):
        # At position p, depth d predicts token p + 1 + d, if the document has that token.
        for position in range(first, end - 1 - depth):
            weight, target = weights[position + depth], tokens[position + 1 + depth]
            num_targets += weight
            expected -= weight * float(logits[depth][position].log_softmax(-1)[target])
    objective = build_objective(depths)
    assert objective._mtp_coefficient == {MTP: 0.3}
    assert objective._count_mtp_targets([batch, batch]) == {MTP: pytest.approx(2 * num_targets)}
    assert num_targets > 3
    sums = objective._compute_mtp_sum(logits, Logits(), batch)  # type: ignore[arg-type]
    assert float(sums[MTP]) == pytest.approx(expected, rel=1e-5)


def test_without_prediction_layers_there_is_no_mtp_term() -> None:
    result = build_objective(0)
    batch: Any = SimpleNamespace(weights=torch.ones(1))
    assert result._mtp_coefficient == {} and result._count_mtp_targets([]) == {}
    assert result._compute_mtp_sum([], None, batch) == {}  # type: ignore[arg-type]


# Losses by label type (text, audio, image), against sums over single labels.


AUDIO, IMAGE = IdBlock(4, 3), IdBlock(7, 2)


def build_config(**objective: Any) -> Any:
    base = recipes.get("tiny-qwen3")
    return replace(base, model=replace(base.model, audio_tokens=AUDIO, image_tokens=IMAGE),
                   objective=replace(base.objective, **objective))


def random_batch(seed: int) -> MicroBatch:
    """Return a batch of 24 random labels with random types and weights, some of them 0."""
    rng = np.random.default_rng(seed)
    return build_micro_batch(PackedRow(
        tokens=rng.integers(0, 9, 24), labels=rng.integers(0, 9, 24),
        weights=rng.choice([0, 1, 0.5], 24).astype(np.float32), positions=np.arange(24),
        types=rng.integers(0, 3, 24).astype(np.uint8), sources=np.zeros(24, np.int64),
        padding=np.zeros(24, bool), bounds=np.array([0, 24], np.int32)))


@pytest.mark.parametrize("kind", [LanguageModelling, SupervisedFineTuning])
def test_weights_enter_sums_and_the_count_over_the_whole_batch(kind: Any,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the sum of counts over processes, which tests/layouts tests.
    monkeypatch.setattr(sys.modules[kind.__module__], "with_denominators",
                        lambda batch, targets: replace(batch, targets=targets))
    objective = kind(SimpleNamespace(config=build_config(audio_weight=0.25, image_weight=3.0),
                                     batches=SimpleNamespace(num_sources=1)))
    batches = [random_batch(seed) for seed in range(2)]
    logits = [torch.randn(24, 9, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    prepared = objective.prepare(GlobalBatch(tuple(batches), 24, 2, "p"))
    term = "lm" if kind is LanguageModelling else "response"
    total = count = 0.0
    by_type = {"text_loss": [0.0, 0], "audio_loss": [0.0, 0], "image_loss": [0.0, 0]}
    for batch, scores in zip(batches, logits, strict=True):
        logprobs = scores.log_softmax(-1)
        for i in range(24):
            label, weight = int(batch.labels[i]), float(batch.weights[i])
            name, factor = ("text_loss", 1.0)
            if 4 <= label < 7:
                name, factor = "audio_loss", 0.25
            elif 7 <= label < 9:
                name, factor = "image_loss", 3.0
            loss = -float(logprobs[i, label])
            if weight:
                by_type[name][0] += loss
                by_type[name][1] += 1
            if term == "lm" or int(batch.types[i]) == 2:
                total += weight * factor * loss
                count += weight * factor
    sums = [objective.loss([scores], Logits(), m)
            for scores, m in zip(logits, prepared.micro_batches, strict=True)]
    assert prepared.targets[term] == pytest.approx(count)
    assert sum(float(s.terms[term]) for s in sums) == pytest.approx(total, rel=1e-5)
    for name, (expected_sum, expected_count) in by_type.items():
        assert sum(float(s.meters[name][0]) for s in sums) == pytest.approx(expected_sum, rel=1e-5)
        assert sum(int(s.meters[name][1]) for s in sums) == expected_count


def test_without_id_blocks_no_loss_is_measured_or_copied() -> None:
    config = recipes.get("tiny-qwen3")
    objective = LanguageModelling(SimpleNamespace(config=config,
                                                batches=SimpleNamespace(num_sources=1)))  # type: ignore[arg-type]
    batch = random_batch(0)
    assert objective.meters == () and objective._typed.scale_weights(batch) is batch
    assert objective._typed.compute_meters(torch.zeros(24), batch) == {}


# Sums, denominators and the total loss.


def test_each_term_has_its_own_denominator() -> None:
    a, b = torch.tensor(6.0, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    loss = compute_total_loss(LossSums({"a": a, "b": b}, torch.zeros(1, 2)), {"a": 1.0, "b": 0.5},
                              {"a": 3.0, "b": 20.0})
    loss.backward()
    assert loss.item() == pytest.approx(6 / 3 + 0.5 * 10 / 20)
    assert (a.grad, b.grad) == (torch.tensor(1 / 3), torch.tensor(0.5 / 20))


def test_a_term_without_targets_is_zero_and_stays_in_the_graph() -> None:
    a = torch.tensor(5.0, requires_grad=True)
    loss = compute_total_loss(LossSums({"a": a}, torch.zeros(1, 2)), {"a": 1.0}, {"a": 0.0})
    loss.backward()
    assert loss.item() == 0.0 and a.grad == 0.0


def test_losses_by_source_are_weighted_sums_and_weights() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.5, 0.0, 2.0])
    result = per_source(losses, weights, torch.tensor([0, 2, 2, 0]), 3)
    assert result.tolist() == [[9.0, 3.0], [0.0, 0.0], [1.0, 0.5]] and result.dtype == torch.float64


def test_objective_state_is_json() -> None:
    objective = SimpleNamespace(state=lambda: {"seen": {1}}, restore=lambda state: None)
    with pytest.raises(UserError, match=r"state\(\) returned what JSON"):
        get_checkpoint_parts(objective)["objective"].state()
    assert get_checkpoint_parts(SimpleNamespace()) == {}


@pytest.mark.parametrize(("state", "message"), [
    ({"seen": {3: 1}}, r"state\(\)\['seen'\] has the key 3, which comes back as a string"),
    ({"seen": [0, (1, 2)]}, r"state\(\)\['seen'\]\[1\] is a tuple, which comes back as a list")])
def test_state_that_json_would_change_is_refused(state: object, message: str) -> None:
    objective = SimpleNamespace(state=lambda: state, restore=lambda state: None)
    with pytest.raises(UserError, match=rf"what JSON changes \({message}\); return dicts with strings"):
        get_checkpoint_parts(objective)["objective"].state()


def test_a_step_without_targets_is_refused() -> None:
    batch = GlobalBatch((), 64, 2, "main", 128, {"response": 0.0, "mtp": 0.0})
    with pytest.raises(UserError, match=r"training target .*response: 0, mtp"):
        check_has_targets(batch, 3)
    check_has_targets(GlobalBatch((), 64, 2, "main", 128, {"response": 0.0, "text": 1.0}), 3)
