"""Held-out pairs measured by the log-probabilities of their responses, as far as samples reach."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.model.config import DataConfig, PhaseConfig, TrainConfig
from megatron_sov.model.config.post_training import PreferenceConfig
from megatron_sov.train.data.token_shards import Source

SEQ_LEN = 4


class Pairs:
    """Five pairs; a number of `first` is the place where a response begins."""

    columns, is_plain = (), False
    lengths = np.array([4, 4, 4, 4, 4, 4, 4, 9, 4, 9], np.int32)
    first = (2, 2, 2, 2, 2, 2, 2, 2, 2, 6)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return np.where(np.arange(start, start + count) >= self.first[document], 2, 1).astype(np.uint8)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return (self.types(document, start, count) == 2).astype(np.float32)


def test_what_lies_behind_a_sample_counts_for_neither_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sov.post import preference

    def logprobs(view: Any, documents: Pairs, chosen: range, seq_len: int, rows: int) -> np.ndarray:
        """Of each response -1 (better) or -2 a token, 0 where `document_logprobs` has no number."""
        numbers = []
        for document, mean in zip(chosen, (-1, -2, -2, -1, -1, -1, -1, -2, -1, -1), strict=True):
            of = np.full(documents.lengths[document], float(mean), np.float32)
            of[:1] = of[SEQ_LEN + 1:] = 0
            numbers.append(of)
        return np.concatenate(numbers)

    monkeypatch.setattr(preference, "document_logprobs", logprobs)
    events: list[dict[str, Any]] = []
    view: Any = SimpleNamespace(
        step=3, config=SimpleNamespace(data=DataConfig(phases=(PhaseConfig("main", seq_len=SEQ_LEN),)),
                               train=TrainConfig(), preference=PreferenceConfig("simper")),
        events=SimpleNamespace(write=lambda name, **fields: events.append({"name": name, **fields})))
    source = Source("pairs", None, "preference", {}, {"train": 0, "heldout": 59}, 1.0)
    documents = Pairs()
    monkeypatch.setattr(Source, "shard", lambda self, split: documents)
    # right, wrong, a tie, right by what a sample holds; of the last one's response no sample holds anything
    expected = {"pairs": 4, "chosen_likelier": 2.5 / 4, "pairs_right": 2.5 / 4, "margin": 0.25}
    assert preference.measure_heldout_pairs(view, [source], None) == {"pairs": expected}
    assert events == [{"name": "heldout_pairs", "step": 3, "source": "pairs", **expected}]
    none = dataclasses.replace(source, name="none")
    monkeypatch.setattr(Pairs, "first", (9,) * 10)
    assert preference.measure_heldout_pairs(view, [none], None) == {}


def rewards(method: str, policy: list[float], reference: list[float], lengths: list[int]) -> list[float]:
    """Return the implicit rewards of TRL, one response at a time."""
    beta = {"dpo": 0.1, "ipo": 0.1, "dpo-norm": 5.0, "simpo": 2.0}.get(method, 1.0)
    found = []
    for own, other, length in zip(policy, reference, lengths, strict=True):
        ratio = own - other if method in ("dpo", "ipo", "dpo-norm") else own
        found.append(beta * (ratio if method == "dpo" else ratio / length))
    return found


@pytest.mark.parametrize("method", ["dpo", "ipo", "dpo-norm", "simpo", "simper", "orpo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_and_margin_are_those_of_trl(method: Any, seed: int) -> None:
    from megatron_sov.post.preference import compared_values, pair_meters

    drawn = np.random.default_rng(seed)
    policy, reference = drawn.normal(-20, 3, 8), drawn.normal(-20, 3, 8)
    lengths = drawn.integers(1, 9, 8)
    asked = PreferenceConfig(method)
    found = pair_meters(asked, compared_values(
        asked, *map(torch.from_numpy, (policy, lengths.astype(np.float64))),
        torch.from_numpy(reference) if method in ("dpo", "ipo", "dpo-norm") else None))
    of = rewards(method, policy.tolist(), reference.tolist(), lengths.tolist())
    margins = [chosen - rejected for chosen, rejected in zip(of[0::2], of[1::2], strict=True)]
    assert found["margin"].tolist() == pytest.approx(margins)
    assert found["pairs_right"].tolist() == [float(margin > 0) for margin in margins]


@pytest.mark.parametrize("method", ["dpo", "ipo", "dpo-norm"])
def test_a_model_that_equals_its_reference_is_right_in_half_of_the_pairs(method: Any) -> None:
    from megatron_sov.post.preference import compared_values, pair_meters

    sums, lengths = torch.tensor([-3.0, -7.0, -2.0, -1.0]).double(), torch.tensor([1.0, 2, 3, 4]).double()
    asked = PreferenceConfig(method)
    found = pair_meters(asked, compared_values(asked, sums, lengths, sums))
    assert found["pairs_right"].tolist() == [0.5, 0.5] and found["margin"].tolist() == [0, 0]
