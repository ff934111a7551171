"""The compiled loop: which tokens may join, told from their bytes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.bpe.merging import (
    BEGINS_NEXT_WORD,
    ENDS_IN_WORD,
    INNER_SPACES,
    SIZE_BYTES,
    SPACES,
    SUPERWORD,
    JoinRule,
)
from tokenizer.bpe.trainer import Merge, MergeLearner, Words

LETTER = rb"[A-Za-z\x80-\xff]"


@given(st.lists(st.text(alphabet=" ab가1.", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=8))
def test_traits_are_those_of_the_bytes(tokens: list[bytes]) -> None:
    nothing = Words(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
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
    words = Words(np.array([0, 1, 2, 2, 3]), np.array([3, 2]), np.array([30, 20]))
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
    words = Words(np.array([0, 1, 0, 1, 0, 1]), np.array([6]), np.array([5]))
    assert len(list(MergeLearner(words, [b"a", b"b"], JoinRule(9, 0, False, False), 2, 1).learn())) == 1
