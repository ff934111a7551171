"""The stream of one source: every token once an epoch, at changing sample lengths and after kills."""

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_sov.base.errors import UserError
from megatron_sov.train.data import streams
from megatron_sov.train.data.streams import Cursor, DocumentStream, Packing

corpora = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any).map(
    lambda lengths: [*lengths, 3])  # document lengths; the last document fits every sample
packings = st.sampled_from(["best_fit", "truncate", "concat", "drop"])
SETTINGS = settings(max_examples=120)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 7)


class DocumentLengths:
    """Documents without tokens: a stream reads only their lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)


def create_stream(corpus: list[int], packing: Packing, cursor: Cursor | None = None, seed: int = 1,
                  name: str = "web", group: int = 1) -> DocumentStream:
    documents: Any = DocumentLengths(corpus)
    return DocumentStream(name, documents, seed, packing, cursor or Cursor(), group=group)


@given(corpora, packings, st.lists(st.sampled_from([5, 16, 33]), min_size=1, max_size=60))
@SETTINGS
def test_each_token_occurs_once_in_each_epoch(corpus: list[int], packing: Packing,
                                              seq_lens: list[int]) -> None:
    """Within an epoch no token occurs twice; at its end every token has occurred."""
    source = create_stream(corpus, packing)
    counts_by_epoch: dict[int, Counter[tuple[int, int]]] = {}
    for seq_len in seq_lens:
        row = source.next_sample(seq_len)
        assert 0 < sum(s.count for s in row) <= seq_len
        counts = counts_by_epoch.setdefault(source.cursor.epoch, Counter())
        counts.update((s.document, t) for s in row for t in range(s.start, s.start + s.count))
    all_tokens = {(d, t) for d, n in enumerate(corpus) for t in range(n)}
    # The shortest sample has 5 tokens: truncation keeps at least the first 5 of each document.
    beginnings = {(d, t) for d, n in enumerate(corpus) for t in range(min(n, 5))}
    tokens_of_short = {(d, t) for d, n in enumerate(corpus) for t in range(n) if n <= 5}
    for epoch, counts in counts_by_epoch.items():
        assert max(counts.values()) == 1
        assert set(counts) <= all_tokens
        if epoch < source.cursor.epoch:
            assert set(counts) >= {"truncate": beginnings, "drop": tokens_of_short}.get(packing, all_tokens)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30),
       st.sampled_from(["truncate", "drop"]), st.lists(st.sampled_from([5, 16, 33]), min_size=1, max_size=40),
       st.integers(0, 40))
@SETTINGS
def test_pairs_stay_together_at_changing_lengths_and_after_kills(pairs: list[tuple[int, int]],
                                                                 packing: Packing, seq_lens: list[int],
                                                                 killed_before: int) -> None:
    corpus = [n for pair in [*pairs, (2, 3)] for n in pair]  # the last pair fits every sample
    source = create_stream(corpus, packing, name="pairs", group=2)
    counts_by_epoch: dict[int, Counter[int]] = {}
    for number, seq_len in enumerate(seq_lens):
        if number == killed_before:
            cursor = Cursor(**json.loads(json.dumps(dataclasses.asdict(source.cursor))))
            source = create_stream(corpus, packing, cursor, name="pairs", group=2)
        row = source.next_sample(seq_len)
        assert sum(s.count for s in row) <= seq_len
        for chosen, rejected in zip(row[::2], row[1::2], strict=True):
            assert chosen.document % 2 == 0 and rejected.document == chosen.document + 1
            counts_by_epoch.setdefault(source.cursor.epoch, Counter())[chosen.document // 2] += 1
            if packing == "drop":
                assert (chosen.count, rejected.count) == tuple(corpus[chosen.document:rejected.document + 1])
    for epoch, counts in counts_by_epoch.items():
        assert set(counts.values()) == {1}
        if epoch < source.cursor.epoch and packing == "truncate":
            assert len(counts) == len(corpus) // 2


def test_overlong_documents_are_counted_at_each_occurrence() -> None:
    source = create_stream([3, 9, 16, 30, 20], "drop")
    documents = {(s.document, s.count) for _ in range(6) for s in source.next_sample(16)}
    assert documents == {(0, 3), (1, 9), (2, 16)}
    assert (source.cursor.epoch, source.cursor.over_long) == (2, 6)  # 2 long documents, in epochs 0, 1 and 2
    resumed = create_stream([3, 9, 16, 30, 20], "drop", Cursor(**dataclasses.asdict(source.cursor)))
    assert resumed.cursor.over_long == 6, "a resumed stream does not count repacked documents again"
    with pytest.raises(UserError, match=r"data\.over_long = drop omits"):
        create_stream([30, 9], "drop").next_sample(8)


def test_the_order_depends_on_seed_name_and_epoch() -> None:
    corpus = [4] * 20

    def read_documents(source: DocumentStream, count: int) -> list[int]:
        return [source.next_sample(4)[0].document for _ in range(count)]

    first = create_stream(corpus, "best_fit")
    epochs = [read_documents(first, 20), read_documents(first, 20)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert read_documents(create_stream(corpus, "best_fit", seed=2), 20) != epochs[0]
    assert read_documents(create_stream(corpus, "best_fit", name="code"), 20) != epochs[0]


def test_windows_are_of_equal_size() -> None:
    """15 documents in windows of at most 7 make three windows of 5, not windows of 7, 7 and 1."""
    source = create_stream([1] * 15, "best_fit")
    rows = [source.next_sample(5) for _ in range(3)]
    assert [len(row) for row in rows] == [5, 5, 5]
    assert source.count_epochs() == 1.0


def test_the_share_of_an_epoch_is_counted_by_rows() -> None:
    source = create_stream([2] * 14, "best_fit")  # two windows of seven documents, four rows each
    epochs = []
    for _ in range(9):
        source.next_sample(4)
        epochs.append(source.count_epochs())
    assert epochs == [pytest.approx(num_rows / (2 * 4)) for num_rows in range(1, 10)]


def test_a_source_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="20 training documents contains"):
        create_stream([0] * 20, "best_fit").next_sample(8)


def test_a_resumed_stream_keeps_its_window_size(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = [7] * 50
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 10)
    uninterrupted = create_stream(corpus, "best_fit")
    expected = [uninterrupted.next_sample(16) for _ in range(40)]
    resumed = create_stream(corpus, "best_fit")
    first = [resumed.next_sample(16) for _ in range(9)]
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 25)
    restarted = create_stream(corpus, "best_fit", Cursor(**dataclasses.asdict(resumed.cursor)))
    assert first + [restarted.next_sample(16) for _ in range(31)] == expected
