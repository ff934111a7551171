"""The compiled loop: which tokens may join, told from their bytes."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tokenizer.bpe.merging import (
    BEGINS_NEXT_WORD, ENDS_IN_WORD, INNER_SPACES, SIZE_BYTES, SPACES, SUPERWORD, JoinRule, LowestPieces)
from tokenizer.bpe.trainer import Merge, MergeLearner, PretokenWords
from tokenizer.mixture import NUM_BUCKETS, Excerpt, Sizes, share_of

# A sample of a group, gathered from its units before the group's size is known.

LIMIT_BYTES = 1000


def sizes_of(pieces: list[Excerpt]) -> Sizes:
    row = np.zeros(NUM_BUCKETS, np.int64)
    for piece in pieces:
        row[piece.bucket] += len(piece.raw)
    return Sizes(len(pieces), int(row.sum()), row)


@pytest.mark.parametrize("num_buckets", [3, 40, NUM_BUCKETS])
def test_units_keep_every_piece_that_a_sample_of_their_group_may_hold(num_buckets: int) -> None:
    drawn = random.Random(num_buckets)
    units = [[Excerpt(b"x" * drawn.randrange(1, 300), drawn.randrange(num_buckets)) for _ in range(200)]
             for _ in range(3)]
    together = LowestPieces(LIMIT_BYTES)
    for unit in units:
        kept = LowestPieces(LIMIT_BYTES)
        for piece in unit:
            kept.add(piece)
        for piece in kept.found():
            together.add(piece)
    pieces = [piece for unit in units for piece in unit]
    sizes = sizes_of(pieces)
    share = share_of(sizes, LIMIT_BYTES / sizes.num_bytes)
    wanted = [piece for piece in pieces if share.times(piece.bucket)]
    assert wanted and sorted(p.raw for p in together.found() if share.times(p.bucket)) == sorted(
        p.raw for p in wanted)


def test_no_more_than_a_bucket_above_the_limit_is_held() -> None:
    kept = LowestPieces(LIMIT_BYTES)
    for number in range(5000):
        kept.add(Excerpt(b"x" * 100, number * 7919 % NUM_BUCKETS))
    assert sum(len(piece.raw) for piece in kept.found()) == LIMIT_BYTES + 100


LETTER = rb"[A-Za-z\x80-\xff]"


@given(st.lists(st.text(alphabet=" ab가1.", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=8))
def test_traits_are_those_of_the_bytes(tokens: list[bytes]) -> None:
    nothing = PretokenWords(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    traits = MergeLearner(nothing, tokens, JoinRule(9, 0, False, False), 2, 1)._store.traits
    for token, row in zip(tokens, traits, strict=False):
        assert row[SIZE_BYTES] == len(token)
        assert row[SPACES] == token.count(b" ") and row[INNER_SPACES] == token[1:].count(b" ")
        assert row[ENDS_IN_WORD] == bool(re.search(LETTER + rb"\Z", token))
        assert row[BEGINS_NEXT_WORD] == bool(re.match(rb" (" + LETTER + rb"|\Z)", token))
        assert row[SUPERWORD] == bool(re.search(LETTER + b" " + LETTER, token))


def merges(rule: JoinRule) -> list[Merge]:
    """Learn from "a b" thirty times and "b." twenty times."""
    tokens = [b"a", b" ", b"b", b"."]
    words = PretokenWords(np.array([0, 1, 2, 2, 3]), np.array([3, 2]), np.array([30, 20]))
    return list(MergeLearner(words, tokens, rule, 2, 9).learn())


@pytest.mark.parametrize(("rule", "expected"), [
    (JoinRule(9, 0, False, False), [Merge(0, 1, 30), Merge(4, 2, 30), Merge(2, 3, 20)]),
    (JoinRule(2, 0, False, False), [Merge(0, 1, 30), Merge(2, 3, 20)]),
    (JoinRule(9, 0, True, False), [Merge(1, 2, 30), Merge(2, 3, 20)]),
    (JoinRule(9, 1, False, False), [Merge(1, 2, 30), Merge(2, 3, 20)]),
    (JoinRule(9, 0, False, True), []),
], ids=["any", "short", "words apart", "one word", "superwords alone"])
def test_rules_say_which_pairs_merge(rule: JoinRule, expected: list[Merge]) -> None:
    assert merges(rule) == expected


def test_no_more_merges_than_asked_for() -> None:
    words = PretokenWords(np.array([0, 1, 0, 1, 0, 1]), np.array([6]), np.array([5]))
    assert len(list(MergeLearner(words, [b"a", b"b"], JoinRule(9, 0, False, False), 2, 1).learn())) == 1
