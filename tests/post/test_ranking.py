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


class PairDocuments:
    """Five pairs, chosen and rejected responses alternating; `response_starts`: index of each response's
    first token."""

    columns, is_plain = (), False
    lengths = np.array([4, 4, 4, 4, 4, 4, 4, 9, 4, 9], np.int32)
    response_starts = (2, 2, 2, 2, 2, 2, 2, 2, 2, 6)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return np.where(np.arange(start, start + count) >= self.response_starts[document], 2,
                        1).astype(np.uint8)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return (self.types(document, start, count) == 2).astype(np.float32)


def test_responses_after_the_sample_end_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    def score_documents(view: Any, documents: PairDocuments, indices: range, seq_len: int, rows: int
                        ) -> np.ndarray:
        """Return -1 or -2 per token of a document, and 0 where no log-probability exists."""
        logprobs = []
        for document, mean in zip(indices, (-1, -2, -2, -1, -1, -1, -1, -2, -1, -1), strict=True):
            document_logprobs = np.full(documents.lengths[document], float(mean), np.float32)
            document_logprobs[:1] = document_logprobs[SEQ_LEN + 1:] = 0
            logprobs.append(document_logprobs)
        return np.concatenate(logprobs)

    monkeypatch.setattr(preference, "score_documents", score_documents)
    events: list[dict[str, Any]] = []
    view: Any = SimpleNamespace(
        step=3, config=SimpleNamespace(data=DataConfig(phases=(PhaseConfig("main", seq_len=SEQ_LEN),)),
                                       train=TrainConfig(), preference=PreferenceConfig("simper")),
        events=SimpleNamespace(write=lambda name, **fields: events.append({"name": name, **fields})))
    source = Source("pairs", None, "preference", {}, {"train": 0, "heldout": 59}, 1.0)
    documents = PairDocuments()
    monkeypatch.setattr(Source, "open_split", lambda self, split: documents)
    # Right, wrong, a tie, right within the sample; the last pair has a response after the sample's end.
    expected = {"pairs": 4, "chosen_likelier": 2.5 / 4, "pairs_right": 2.5 / 4, "margin": 0.25}
    assert preference.measure_heldout_pairs(view, [source], None) == {"pairs": expected}
    assert events == [{"name": "heldout_pairs", "step": 3, "source": "pairs", **expected}]
    source_without_pairs = dataclasses.replace(source, name="none")
    monkeypatch.setattr(PairDocuments, "response_starts", (9,) * 10)
    assert preference.measure_heldout_pairs(view, [source_without_pairs], None) == {}


@pytest.mark.each("method", ["dpo", "ipo", "dpo-norm"])
def test_a_model_equal_to_its_reference_ranks_half_of_the_pairs(method: Any) -> None:
    sums, lengths = torch.tensor([-3.0, -7.0, -2.0, -1.0]).double(), torch.tensor([1.0, 2, 3, 4]).double()
    preference_config = PreferenceConfig(method)
    meters = compute_pair_meters(preference_config, compare_values(preference_config, sums, lengths, sums))
    assert meters["pairs_right"].tolist() == [0.5, 0.5] and meters["margin"].tolist() == [0, 0]
