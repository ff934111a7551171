"""Rows of documents for one forward pass each, and the best of a few words."""

from __future__ import annotations

import pytest
import torch

from megatron_sov.generate.choosing import ROW_DOCUMENTS, ROW_TOKENS, best_words, rows_of


@pytest.mark.parametrize(("count", "length"), [(1, 5), (40, 3), (5, ROW_TOKENS // 2), (3, 10 * ROW_TOKENS)])
def test_rows_hold_every_document_once_in_bounded_memory(count: int, length: int) -> None:
    rows = rows_of([[7] * length] * count)
    assert [i for row in rows for i in row] == list(range(count))
    assert all(len(row) == 1 or len(row) * length <= ROW_TOKENS for row in rows)
    assert all(0 < len(row) <= ROW_DOCUMENTS for row in rows)


def test_the_best_word_is_not_the_best_token() -> None:
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0], [0.0, 5.0, 4.0, 4.5]])
    assert best_words(logits, (3, 1, 2)).tolist() == [2, 1]
    assert best_words(logits, (3,)).tolist() == [3, 3]
