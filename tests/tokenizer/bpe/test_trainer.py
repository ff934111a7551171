"""Merging by arrays: the merges of the textbook's loop and of Hugging Face's trainer,
on every kind of tie and overlap.
"""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, strategies as st
from tokenizers import pre_tokenizers, trainers

from tokenizer.bpe import trainer
from tokenizer.bpe.merging import JoinRule
from tokenizer.bpe.segmenting import merge_of, merged
from tokenizer.bpe.split_pattern import untrained
from tokenizer.bpe.trainer import Merge, MergeLearner, PretokenWords
from tokenizer.bpe.vocabulary import Vocabulary, spelled
from tokenizer.presets import K_EXAONE, SOLAR_OPEN

# Merging by ranks, against tiktoken; and the one pair of tokens that makes a token.

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


TEXT = [inspect.getsource(textwrap), "한국어 문장은 한국어로 씁니다. 문장 하나.\n" * 20,
        "<|end|> for i in x:\n    i += 1\n" * 20]
ANY = JoinRule(max_bytes=99, max_words=0, keeps_words_apart=False, only_superwords=False)
PLAIN = replace(SOLAR_OPEN, split_pattern=r"[^|]+|\|")


def merges_of(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    return [(vocabulary.tokens[a], vocabulary.tokens[b]) for a, b in vocabulary.merges]


@given(st.lists(st.text(alphabet="aab|", max_size=30), max_size=8), st.integers(2, 9))
def test_few_letters_many_ties_and_overlaps(learn: Callable[..., Vocabulary],
                                            brute_force: Callable[..., list], texts: list[str],
                                            max_token_bytes: int) -> None:
    preset = replace(PLAIN, max_token_bytes=max_token_bytes)
    assert merges_of(learn(preset, 256 + 40, texts)) == brute_force(preset, 256 + 40, texts)


def test_real_text_as_in_the_textbook(learn: Callable[..., Vocabulary],
                                      brute_force: Callable[..., list]) -> None:
    text = [TEXT[0][:4000], *TEXT[1:]]
    assert merges_of(learn(SOLAR_OPEN, 700, text)) == brute_force(SOLAR_OPEN, 700, text)


@pytest.mark.parametrize("room", [3, 50_000])
@pytest.mark.parametrize("preset", [SOLAR_OPEN, replace(K_EXAONE, superword_pattern="")],
                         ids=lambda p: p.name)
def test_hugging_faces_trainer_gives_the_same(learn: Callable[..., Vocabulary], preset, room: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "FIRST_PAIRS", room)  # however often the arrays have to grow
    monkeypatch.setattr(trainer, "FIRST_PLACES", 1000 * room)
    theirs = untrained(preset)
    theirs.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, show_progress=False, max_token_length=preset.max_token_bytes + 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    expected = json.loads(theirs.to_str())["model"]["merges"]
    assert len(expected) > 800
    found = merges_of(learn(preset, 2000, TEXT))
    assert [[spelled(a), spelled(b)] for a, b in found] == [list(e) for e in expected]


def test_order_of_texts_does_not_matter(learn: Callable[..., Vocabulary]) -> None:
    shuffled = random.Random(0).sample(TEXT, len(TEXT))
    assert learn(SOLAR_OPEN, 400, TEXT).merges == learn(SOLAR_OPEN, 400, shuffled).merges


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(learn: Callable[..., Vocabulary]) -> None:
    assert learn(SOLAR_OPEN, 600, TEXT).merges[:100] == learn(SOLAR_OPEN, 356, TEXT).merges


def test_counts_are_those_of_the_text() -> None:
    # "abab" five times, "ab" twice, "aaa" three times
    words = PretokenWords(np.array([0, 1, 0, 1, 0, 0, 0, 0, 1]), np.array([4, 3, 2]), np.array([5, 3, 2]))
    learner = MergeLearner(words, [b"a", b"b"], ANY, 2, 9)
    assert list(learner.learn()) == [Merge(0, 1, 12), Merge(0, 0, 6), Merge(2, 2, 5), Merge(3, 0, 3)]


def test_counts_beyond_32_bits() -> None:
    words = PretokenWords(np.array([0, 1, 1, 0]), np.array([2, 2]), np.array([1 << 40, (1 << 40) - 1]))
    learner = MergeLearner(words, [b"a", b"b"], ANY, 2, 9)
    assert list(learner.learn()) == [Merge(0, 1, 1 << 40), Merge(1, 0, (1 << 40) - 1)]


def test_no_words_no_merges() -> None:
    words = PretokenWords(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert list(MergeLearner(words, [b"a"], ANY, 2, 9).learn()) == []


def test_long_tokens_are_bounded(learn: Callable[..., Vocabulary]) -> None:
    vocabulary = learn(replace(SOLAR_OPEN, max_token_bytes=8), 300, [("=" * 64 + "\n") * 3000, *TEXT])
    assert max(map(len, vocabulary.tokens)) == 8
