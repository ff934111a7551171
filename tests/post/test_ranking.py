"""Held-out pairs ranked by response log-probabilities, within the sample length."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.model.config import DataConfig, PhaseConfig, TrainConfig
from megatron_sov.model.config.post_training import PreferenceConfig
from megatron_sov.post import preference
from megatron_sov.post.preference import compare_values, compute_pair_meters
from megatron_sov.train.data.sources import Source

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


def test_responses_after_the_sample_end_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    def logprobs(view: Any, documents: Pairs, chosen: range, seq_len: int, rows: int) -> np.ndarray:
        """Of each response -1 (better) or -2 a token, 0 where `document_logprobs` has no number."""
        numbers = []
        for document, mean in zip(chosen, (-1, -2, -2, -1, -1, -1, -1, -2, -1, -1), strict=True):
            of = np.full(documents.lengths[document], float(mean), np.float32)
            of[:1] = of[SEQ_LEN + 1:] = 0
            numbers.append(of)
        return np.concatenate(numbers)

    monkeypatch.setattr(preference, "score_documents", logprobs)
    events: list[dict[str, Any]] = []
    view: Any = SimpleNamespace(
        step=3, config=SimpleNamespace(data=DataConfig(phases=(PhaseConfig("main", seq_len=SEQ_LEN),)),
                               train=TrainConfig(), preference=PreferenceConfig("simper")),
        events=SimpleNamespace(write=lambda name, **fields: events.append({"name": name, **fields})))
    source = Source("pairs", None, "preference", {}, {"train": 0, "heldout": 59}, 1.0)
    documents = Pairs()
    monkeypatch.setattr(Source, "open_split", lambda self, split: documents)
    # correct, wrong, a tie, correct within the sample; the last response is outside every sample
    expected = {"pairs": 4, "chosen_likelier": 2.5 / 4, "pairs_right": 2.5 / 4, "margin": 0.25}
    assert preference.measure_heldout_pairs(view, [source], None) == {"pairs": expected}
    assert events == [{"name": "heldout_pairs", "step": 3, "source": "pairs", **expected}]
    none = dataclasses.replace(source, name="none")
    monkeypatch.setattr(Pairs, "first", (9,) * 10)
    assert preference.measure_heldout_pairs(view, [none], None) == {}


@pytest.mark.each("method", ["dpo", "ipo", "dpo-norm"])
def test_a_model_equal_to_its_reference_ranks_half_of_the_pairs(method: Any) -> None:
    sums, lengths = torch.tensor([-3.0, -7.0, -2.0, -1.0]).double(), torch.tensor([1.0, 2, 3, 4]).double()
    preference_config = PreferenceConfig(method)
    result = compute_pair_meters(preference_config, compare_values(preference_config, sums, lengths, sums))
    assert result["pairs_right"].tolist() == [0.5, 0.5] and result["margin"].tolist() == [0, 0]
