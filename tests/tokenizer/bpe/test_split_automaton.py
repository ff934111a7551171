"""Automata: their matches are those of Oniguruma, for patterns of many tokenizers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tokenizer.bpe import split_pattern
from tokenizer.bpe.counting import split_words
from tokenizer.bpe.split_pattern import Unsupported, automaton, oniguruma
from tokenizer.presets import K_EXAONE, SOLAR_OPEN

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRIORITIES = r"a|ab|(?:ab|a)(?:c|bcd)?|b(?=c)|c{2,3}d?|[^\S\n]+x|\w\d"
PATTERNS = {"gpt-2": GPT_2, "llama-3": LLAMA_3, "o200k": O200K, "priorities": PRIORITIES, "dot": "..|.",
            "solar-open": SOLAR_OPEN.split_pattern, "k-exaone": K_EXAONE.split_pattern,
            "superwords": K_EXAONE.superword_pattern}


def split(pattern: str, text: str) -> list[str]:
    raw, found = text.encode(), automaton(pattern)
    ends = np.empty(len(raw), np.int32)
    num_words = split_words(np.frombuffer(raw, np.uint8), found.kinds, found.steps, ends)
    return [raw[a:b].decode() for a, b in pairwise([0, *ends[:num_words].tolist()])]


def by_oniguruma(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in oniguruma(pattern, "test").pre_tokenize_str(text)]


LETTERS = "aabbccdx '’sStT019 \n\r\tſéÉ가나\u0301\u3000\U0001f600.,/"


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(LETTERS), st.characters(codec="utf-8"))))
def test_any_text_is_split_as_by_oniguruma(pattern: str, text: str) -> None:
    assert split(pattern, text) == by_oniguruma(pattern, text)


@pytest.mark.deep
@pytest.mark.parametrize("pattern", [r"\p{Co}+|\P{Co}{1,9}", r"\p{Cn}+|.", r"(?i:k)+|[^k]",
                                     r"\p{Greek}+|\P{Greek}{1,9}"])
def test_classes_are_onigurumas_on_every_code_point(pattern: str) -> None:
    """Who is in a class stands in one run, and who is not in pieces of nine: a character on the wrong side
    moves a cut."""
    for start in range(0, 0x110000, 1 << 15):
        text = "".join(chr(c) for c in range(start, start + (1 << 15)) if not 0xD800 <= c < 0xE000)
        assert split(pattern, text) == by_oniguruma(pattern, text), hex(start)


def test_the_first_alternative_wins_not_the_longest() -> None:
    assert split("a|ab|b", "ab") == ["a", "b"]
    assert split("(?:a|ab)c|.", "abc") == ["abc"]


def test_long_runs_take_two_looks_not_many() -> None:
    found = automaton(LLAMA_3)
    raw = np.full(1 << 20, ord(" "), np.uint8)
    assert split_words(raw, found.kinds, found.steps, np.empty(len(raw), np.int32)) == 1


def test_too_large_a_pattern_is_left_to_oniguruma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_pattern, "MOST_STATES", 20)
    with pytest.raises(Unsupported):
        automaton("(?:a{1,9}b{1,9}){1,9}c")
    with pytest.raises(Unsupported):
        automaton("|".join(map(chr, range(0x4E00, 0x4E40))))
