"""Training: exact sizes, bytes that survive, special tokens that text cannot reach."""

from __future__ import annotations

import inspect
import itertools
import json
import textwrap
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_sov.errors import UserError
from tokenizer import bpe
from tokenizer.presets import K_EXAONE, SMALLEST_VOCAB, SOLAR_OPEN

TEXT = [inspect.getsource(textwrap), "한국어 문장은 한국어로 씁니다. 문장 하나.\n" * 20, "<|end|> for i in x:\n    i += 1\n" * 20]


@pytest.fixture(scope="module")
def solar() -> Tokenizer:
    return bpe.train(SOLAR_OPEN, 400, TEXT)


@pytest.fixture(scope="module")
def exaone() -> Tokenizer:
    return bpe.train(K_EXAONE, 400, TEXT)


def brute_force_merges(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """The textbook loop of BPE training: count all pairs, merge the most frequent, again."""
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = max(pairs, key=lambda p: pairs[p])
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            out, i = [], 0
            while i < len(word):
                pair_here = word[i : i + 2] == best
                out.append("".join(word[i : i + 2]) if pair_here else word[i])
                i += 2 if pair_here else 1
            merged[tuple(out)] += times
        words = merged
    return merges


def test_merges_are_those_of_the_textbook() -> None:
    # distinct frequencies, so that no tie leaves the order open
    words = {"abcd": 40, "abce": 21, "bcf": 12, "gh": 9}
    text = "".join(f"{word}\n" * times for word, times in words.items())
    trained = bpe.train(SOLAR_OPEN, SMALLEST_VOCAB + 5, [text])
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    assert merges == brute_force_merges(Counter({tuple(w): n for w, n in words.items()}), 5)


def test_vocabulary_is_exact_with_specials_then_bytes_first(solar: Tokenizer) -> None:
    vocab = solar.get_vocab()
    assert solar.get_vocab_size() == 400 and sorted(vocab.values()) == list(range(400))
    assert [t for t, i in sorted(vocab.items(), key=lambda e: e[1]) if i < 64] == SOLAR_OPEN.special_by_id()
    assert all(len(t) == 1 for t, i in vocab.items() if 64 <= i < SMALLEST_VOCAB)


@given(st.text())
def test_solar_gives_every_text_back(solar: Tokenizer, text: str) -> None:
    solar.encode_special_tokens = True
    ids = solar.encode(text, add_special_tokens=False).ids
    assert solar.decode(ids, skip_special_tokens=False) == text
    assert all(i >= 64 for i in ids)


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("\u1112\u1161\u11ab\u0301e"))))
def test_exaone_gives_back_the_composed_text(exaone: Tokenizer, text: str) -> None:
    exaone.encode_special_tokens = True
    assert exaone.decode(exaone.encode(text, add_special_tokens=False).ids) == unicodedata.normalize("NFC", text)


def test_decomposed_hangul_meets_composed_only_with_nfc(solar: Tokenizer, exaone: Tokenizer) -> None:
    composed, decomposed = "한국어", unicodedata.normalize("NFD", "한국어")
    assert exaone.encode(composed).ids == exaone.encode(decomposed).ids
    assert solar.encode(composed).ids != solar.encode(decomposed).ids


def test_order_of_texts_does_not_matter(solar: Tokenizer) -> None:
    assert bpe.train(SOLAR_OPEN, 400, TEXT[::-1]).to_str() == bpe.train(SOLAR_OPEN, 400, TEXT).to_str()


def test_too_little_text_says_how_far_it_went() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 1000: the text is too small for it, only 32\d tokens were reached"):
        bpe.train(SOLAR_OPEN, 1000, ["hello hello"])
    with pytest.raises(UserError, match="must be at least 320"):
        bpe.train(SOLAR_OPEN, 319, TEXT)


def test_a_merge_that_spells_a_special_token_is_refused() -> None:
    whole = replace(SOLAR_OPEN, name="mine", split_pattern=r"\S+|\s+")
    with pytest.raises(UserError, match=r"merges spell the special token '<\|end\|>'"):
        bpe.train(whole, 420, ["<|end|> <|end|>\n" * 50, *TEXT])
    with pytest.raises(UserError, match="is no regular expression"):
        bpe.train(replace(whole, split_pattern="("), 420, TEXT)


def test_long_tokens_are_bounded() -> None:
    trained = bpe.train(replace(SOLAR_OPEN, max_token_bytes=8), 340, [("=" * 64 + "\n") * 3000, *TEXT])
    assert max(len(t) for t, i in trained.get_vocab().items() if i >= 64) == 8


def test_bytes_per_token_counts_utf8(solar: Tokenizer) -> None:
    ids = solar.encode("한국어 cat").ids
    assert bpe.bytes_per_token(solar, ["한국어 cat"]) == 13 / len(ids)
