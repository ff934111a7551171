"""Merging by ranks, against tiktoken; and the one pair of tokens that makes a token."""

from __future__ import annotations

import random

import pytest
import tiktoken

from tokenizer.bpe.segmenting import merge_of, merged


def vocabulary(seed: int) -> dict[bytes, int]:
    """Bytes, and random strings over three letters in any order: by no means all of them can be
    reached by merging."""
    draw = random.Random(seed)
    words = {bytes(draw.choices(b"abc", k=draw.randint(2, 6))) for _ in range(40)}
    return {bytes([b]): b for b in range(256)} | {word: 256 + i for i, word in enumerate(
        draw.sample(sorted(words), len(words)))}


@pytest.mark.parametrize("seed", range(20))
def test_one_pair_for_each_token_says_all_that_ranks_say(seed: int) -> None:
    ranks = vocabulary(seed)
    encoding = tiktoken.Encoding("drawn", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    as_floats: dict[bytes, float] = dict(ranks)
    pairs = {merge_of([bytes([b]) for b in token], as_floats): rank
             for token, rank in ranks.items() if len(token) > 1}
    draw = random.Random(seed)
    for _ in range(200):
        text = bytes(draw.choices(b"abc", k=draw.randint(1, 30)))
        parts = merged([bytes([b]) for b in text], lambda a, b: pairs.get((a, b)))
        if text not in ranks:  # tiktoken looks a whole text up first
            assert [ranks[p] for p in parts] == encoding.encode_ordinary(text.decode())


def test_the_leftmost_of_equal_pairs_merges_first() -> None:
    assert merged(["a"] * 5, lambda a, b: 0 if a == b == "a" else None) == ["aa", "aa", "a"]


def test_a_token_that_merging_cannot_make_has_no_pair() -> None:
    ranks: dict[str, float] = {"bc": 3, "ab": 4, "abc": 5, "cab": 6, "cabc": 2, "acac": 7}
    assert merge_of(list("abc"), ranks) == ("a", "bc")
    assert merge_of(list("cab"), ranks) == ("c", "ab")
    assert merge_of(list("cabc"), ranks) == ("c", "abc")  # made of what ranks behind it
    assert merge_of(list("acac"), ranks) is None
