"""SuperBPE: the merges of a brute-force two-stage loop, tokens over several words,
and one step the same as two."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer

from tokenizer.bpe.vocabulary import Vocabulary
from tokenizer.formats.hf_files import finished
from tokenizer.presets import K_EXAONE, SOLAR_OPEN

NOUNS = ["cat", "dog", "bird", "고양이", "강아지", "año", "Straße"]
drawn = random.Random(4)
PHRASES = ("one of the {0}s", "in the {0}", "그 {0} 그리고", "{0}, {0}!\n")
TEXT = [" ".join(drawn.choice(PHRASES).format(n) for n in drawn.choices(NOUNS, k=80)) for _ in range(4)]


def merges_of(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    return [(vocabulary.tokens[a], vocabulary.tokens[b]) for a, b in vocabulary.merges]


@pytest.mark.parametrize(("max_words", "only"), [(2, False), (4, False), (4, True)])
def test_both_stages_as_by_brute_force(learn: Callable[..., Vocabulary], brute_force: Callable[..., list],
                                       max_words: int, only: bool) -> None:
    preset = replace(K_EXAONE, max_superword_words=max_words)
    found = learn(preset, 420, TEXT, transition=330, only=only)
    assert merges_of(found) == brute_force(preset, 420, TEXT, transition=330, only=only)
    words = [len(t.decode(errors="replace").split()) for t in found.tokens]
    assert max(words) == max_words and found.num_superwords() > 20


@given(st.lists(st.text(alphabet="ab  ", max_size=60), min_size=1, max_size=6), st.booleans())
def test_random_letters_and_spaces_as_by_brute_force(learn: Callable[..., Vocabulary],
                                                     brute_force: Callable[..., list], texts: list[str],
                                                     only: bool) -> None:
    found = learn(K_EXAONE, 300, texts, transition=262, only=only)
    assert merges_of(found) == brute_force(K_EXAONE, 300, texts, transition=262, only=only)


def test_where_stage_2_is_for_superwords_they_are_as_many_as_its_tokens(
        learn: Callable[..., Vocabulary]) -> None:
    mixed, only = (learn(K_EXAONE, 420, TEXT, transition=275, only=only) for only in (False, True))
    assert mixed.num_superwords() < only.num_superwords() == 420 - 275
    assert (all(len(token.split()) > 1 for token in only.tokens[275:])
            and mixed.tokens[:275] == only.tokens[:275])


def test_no_merge_of_stage_1_joins_words_by_their_bytes(learn: Callable[..., Vocabulary]) -> None:
    # wide spaces end in byte 0x80, as many letters do; merged with a following space they
    # would join Korean words
    text = ["1\u1680  2\u2000  3\u3000  ." * 50] * 40 + ["네가 내가 보가 했다"] * 30
    vocabulary = learn(K_EXAONE, 290, text)
    assert not [t for t in vocabulary.tokens if t[-1:] == b" " and t[-2:-1] > b"\x7f"]
    # where words never join it does no harm
    assert any(t.endswith(b"\x80 ") for t in learn(SOLAR_OPEN, 290, text).tokens)


@pytest.fixture(scope="module")
def solar(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(SOLAR_OPEN, 370, TEXT)


@pytest.fixture(scope="module")
def superwords(learn: Callable[..., Vocabulary]) -> Tokenizer:
    trained = finished(K_EXAONE, learn(K_EXAONE, 420, TEXT, transition=330))
    trained.encode_special_tokens = True
    return trained


def test_vocabulary_is_exact_with_specials_then_bytes_first(solar: Tokenizer) -> None:
    vocab = solar.get_vocab()
    assert solar.get_vocab_size() == 370 and sorted(vocab.values()) == list(range(370))
    assert [t for t, i in sorted(vocab.items(), key=lambda e: e[1]) if i < 64] == SOLAR_OPEN.special_by_id()
    assert all(len(t) == 1 for t, i in vocab.items() if 64 <= i < SOLAR_OPEN.smallest_vocab)


@given(st.text())
def test_solar_gives_every_text_back(solar: Tokenizer, text: str) -> None:
    ids = solar.encode(text, add_special_tokens=False).ids
    assert solar.decode(ids, skip_special_tokens=False) == text
    assert all(i >= 64 for i in ids)


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"),
                                  st.sampled_from("\u1112\u1161\u11ab\u0301e a  "))))
def test_exaone_gives_back_the_composed_text(superwords: Tokenizer, text: str) -> None:
    assert (superwords.decode(superwords.encode(text, add_special_tokens=False).ids)
            == unicodedata.normalize("NFC", text))


def test_a_superword_is_one_token(superwords: Tokenizer) -> None:
    assert " of the" in [superwords.decode([i]) for i in superwords.encode("one of the birds").ids] or \
        "one of the" in [superwords.decode([i]) for i in superwords.encode("one of the birds").ids]


def test_decomposed_hangul_meets_composed_only_with_nfc(solar: Tokenizer, superwords: Tokenizer) -> None:
    composed, decomposed = "고양이", unicodedata.normalize("NFD", "고양이")
    assert superwords.encode(composed).ids == superwords.encode(decomposed).ids
    assert solar.encode(composed).ids != solar.encode(decomposed).ids
