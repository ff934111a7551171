"""Responses of a row: each document's learned labels, added up; padding between joined samples is none."""

from __future__ import annotations

import numpy as np


def test_documents_are_counted_and_padding_is_not() -> None:
    import torch

    from megatron_sov.post.sft import responses_of
    from megatron_sov.train.data.order import OrderedSample
    from megatron_sov.train.data.rows import join_rows, sample_row
    from megatron_sov.train.data.streams import PackedSegment
    from megatron_sov.train.objectives.microbatch import from_row

    class Documents:
        """Five documents of which the later tokens are responses; the fourth has none."""

        lengths, is_plain, columns = np.array([4, 3, 5, 2, 3]), False, ()
        learned = (np.array([0, 0, 1, 1]), np.array([0, 1, 1]), np.array([0, 1, 0, 1, 1]), np.array([0, 0]),
                   np.array([0, 0, 1]))

        def tokens(self, document: int, start: int, count: int) -> np.ndarray:
            return 10 * document + np.arange(start, start + count)

        def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
            return self.learned[document][start:start + count].astype(np.float32)

        def types(self, document: int, start: int, count: int) -> np.ndarray:
            return (1 + self.learned[document][start:start + count]).astype(np.uint8)

    lengths = Documents.lengths.tolist()
    samples = [OrderedSample(0, tuple(PackedSegment(i, 0, lengths[i]) for i in part)) for part in ((0, 1),
                                                                                                   (2, 3, 4))]
    batch = from_row(join_rows([sample_row(sample, Documents(), 12) for sample in samples]))
    responses = responses_of(batch)
    assert responses.lengths.tolist() == [2, 2, 3, 0, 1]
    values = batch.labels.double()
    assert responses.sums(values).tolist() == [2 + 3, 11 + 12, 21 + 23 + 24, 0, 42]
    assert responses.means(values).tolist() == [2.5, 11.5, 68 / 3, 0, 42]
    values[responses.index == len(responses)] = -torch.inf  # what is not learned may be impossible
    assert torch.isfinite(responses.sums(values)).all()


def test_a_pair_that_lost_a_response_is_left_out() -> None:
    import torch

    from megatron_sov.post.sft import Responses

    responses = Responses(torch.tensor([0, 1, 4, 3, 3]), torch.tensor([1.0, 1.0, 0.0, 2.0]).double())
    assert responses.whole_pairs().tolist() == [1, 0]
    assert responses.of_side(0).tolist() == [True, False, False, False, False]
    assert responses.of_side(1).tolist() == [False, True, False, False, False]
