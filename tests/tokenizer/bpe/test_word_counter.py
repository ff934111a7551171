"""Counting in compiled code: as Python's Counter, however often the table grows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tokenizer.bpe import counting
from tokenizer.bpe.counting import NUM_PARTS, WordCounter


def as_counter(counter: WordCounter) -> Counter[bytes]:
    text, ends, counts, parts = counter.words()
    assert len(parts) == len(counter) and all(0 <= part < NUM_PARTS for part in parts)
    words = [text[a:b].tobytes() for a, b in zip([0, *ends[:-1]], ends, strict=True)] if len(ends) else []
    assert len(set(words)) == len(words)
    return Counter(dict(zip(words, counts.tolist(), strict=True)))


def add(counter: WordCounter, words: list[bytes], times: int) -> None:
    counter.add(b"".join(words), np.cumsum([len(w) for w in words], dtype=np.int32), times)


@given(st.lists(st.tuples(st.lists(st.binary(min_size=1, max_size=3), max_size=50), st.integers(1, 5))))
def test_words_are_counted_as_by_counter(texts: list[tuple[list[bytes], int]]) -> None:
    counter, expected = WordCounter(), Counter[bytes]()
    for words, times in texts:
        add(counter, words, times)
        for word in words:
            expected[word] += times
    assert as_counter(counter) == expected


def test_the_table_grows_and_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "FIRST_SLOTS", 4)
    counter = WordCounter()
    for start in range(0, 3000, 100):
        add(counter, [str(n).encode() for n in range(start, start + 150)], 1)
    found = as_counter(counter)
    assert len(found) == 3050 and found[b"149"] == 2 and found[b"50"] == 1
    counter.clear()
    assert not as_counter(counter)
    add(counter, [b"again"], 7)
    assert as_counter(counter) == {b"again": 7}


def test_counts_beyond_32_bits() -> None:
    counter = WordCounter()
    add(counter, [b"a"], 1 << 40)
    add(counter, [b"a"], 1 << 40)
    assert as_counter(counter) == {b"a": 1 << 41}


def test_a_words_part_is_the_same_in_every_table() -> None:
    words = [b"one", b"two", "셋".encode(), b"four"]
    one, other = WordCounter(), WordCounter()
    add(one, words, 1)
    add(other, words[::-1], 2)
    assert one.words()[3].tolist() == other.words()[3].tolist()[::-1]
