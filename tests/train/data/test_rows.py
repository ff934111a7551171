"""Packed rows: labels, loss weights and positions of every token."""

from typing import Any

import numpy as np
from hypothesis import given, settings, strategies as st

from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import RowOrigin, build_heldout_samples, build_row, join_rows
from megatron_sov.train.data.streams import PackedSegment


def test_a_row_by_hand(numbered: Any) -> None:
    """Samples: the end of a document, a whole document, one that
    continues in the next sample, and padding."""
    sample = OrderedSample(2, (PackedSegment(0, 3, 2), PackedSegment(1, 0, 3), PackedSegment(2, 0, 2)))
    row = build_row(sample, numbered([5, 3, 9]), 10, pad_id=7, columns=("score", "unknown"))
    assert row.tokens.tolist() == [103, 104, 200, 201, 202, 300, 301, 7, 7, 7]
    assert row.labels.tolist() == [104, 0, 201, 202, 0, 301, 302, 0, 0, 0]
    assert row.weights.tolist() == np.float32([0.104, 0, 0.201, 0.202, 0, 0.301, 0.302, 0, 0, 0]).tolist()
    assert row.types.tolist() == [104 % 3, 0, 201 % 3, 202 % 3, 0, 301 % 3, 302 % 3, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2]
    assert row.padding.tolist() == [False] * 7 + [True] * 3
    assert row.bounds.tolist() == [0, 2, 5, 7, 10]
    assert row.sources.tolist() == [2] * 10
    # Like weights, a column has the value of the label.
    score = np.float32([-10.4, 0, -20.1, -20.2, 0, -30.1, -30.2, 0, 0, 0])
    assert {name: column.tolist() for name, column in row.columns.items()} == {
        "score": score.tolist(), "unknown": [0] * 10}


def find_first_visible_token(label: int, length: int, seq_len: int) -> int:
    """Return the first token of a document that the model sees when it predicts token `label`: windows of
    `seq_len` tokens move by half their length, as for strided perplexity."""
    if length <= seq_len or label <= seq_len:
        return 0
    stride = max(1, seq_len // 2)
    window = (label - seq_len - 1) // stride + 1
    return min(seq_len + window * stride, length - 1) - seq_len


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 16))
def test_every_label_counts_once_with_as_much_context_as_fits(numbered: Any, lengths: list[int],
                                                              seq_len: int) -> None:
    documents = numbered(lengths)
    first_visible: dict[int, int] = {}
    for sample in build_heldout_samples(documents, 0, seq_len, 10**9):
        row = build_row(sample, documents, seq_len)
        is_learned = row.weights > 0
        # The next token of the same document.
        assert (row.labels[is_learned] == row.tokens[is_learned] + 1).all()
        assert not (is_learned & row.padding).any()
        for index in np.flatnonzero(is_learned).tolist():
            assert int(row.labels[index]) not in first_visible
            first_visible[int(row.labels[index])] = int(row.tokens[index - row.positions[index]]) % 100
    assert first_visible == {100 * (d + 1) + label: find_first_visible_token(label, length, seq_len)
                             for d, length in enumerate(lengths) for label in range(1, length)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 40))
@settings(max_examples=50)
def test_held_out_samples_stop_at_their_budget(numbered: Any, lengths: list[int], max_tokens: int) -> None:
    documents, budget, expected = numbered(lengths), max_tokens, 0
    samples = build_heldout_samples(documents, 3, 6, max_tokens)
    for length in lengths:
        expected += min(length - 1, max(0, budget))
        budget -= length
    assert sum(int((build_row(s, documents, 6).weights > 0).sum()) for s in samples) == expected
    assert {s.source for s in samples} == {3}


def test_joined_rows_keep_documents_separate(numbered: Any) -> None:
    documents = numbered([4, 6])
    rows = [build_row(OrderedSample(i, (PackedSegment(i, 0, 4),)), documents, 5, columns=("score",))
            for i in range(2)]
    joined = join_rows(rows)
    assert joined.bounds.tolist() == [0, 4, 5, 9, 10]
    assert joined.tokens.tolist() == rows[0].tokens.tolist() + rows[1].tokens.tolist()
    assert joined.sources.tolist() == [0] * 5 + [1] * 5
    assert joined.bounds.dtype == np.int32
    assert (joined.columns["score"].tolist()
            == rows[0].columns["score"].tolist() + rows[1].columns["score"].tolist())
    assert joined.origins == (RowOrigin(0, 0, PackedSegment(0, 0, 4)),
                              RowOrigin(5, 1, PackedSegment(1, 0, 4)))
