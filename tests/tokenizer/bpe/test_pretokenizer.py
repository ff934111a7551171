"""Splitting: the automaton and Oniguruma give one result on every character,
and patterns that cannot work are refused."""

from __future__ import annotations

import pickle

import pytest

from megatron_sov.base.errors import UserError
from tokenizer.bpe.split_pattern import Splitter, automaton, check_coverage, oniguruma
from tokenizer.presets import K_EXAONE, SOLAR_OPEN

PATTERNS = {"solar-open": SOLAR_OPEN.split_pattern, "k-exaone": K_EXAONE.split_pattern,
            "superwords": K_EXAONE.superword_pattern}


def by_oniguruma(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in oniguruma(pattern, "test").pre_tokenize_str(text)]


@pytest.mark.deep
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_all_of_unicode_is_split_as_by_oniguruma(pattern: str) -> None:
    splitter = Splitter(SOLAR_OPEN, pattern)
    for start in range(0, 0x110000, 8192):
        characters = [chr(c) for c in range(start, start + 8192) if not 0xD800 <= c < 0xE000]
        for text in ("".join(characters), " ".join(characters[::7]), "a".join(characters[::7])):
            assert splitter.split(text) == by_oniguruma(pattern, text), hex(start)


def test_text_between_matches_and_groups_are_kept() -> None:
    assert Splitter(SOLAR_OPEN, r"\p{L}+").split("ab 12 cd") == ["ab", " 12 ", "cd"]
    assert Splitter(SOLAR_OPEN, r"(\p{L})(\p{N})|.").split("a1b") == ["a1", "b"]


def test_an_engine_that_differs_is_not_used_again() -> None:
    splitter = Splitter(SOLAR_OPEN, SOLAR_OPEN.split_pattern)
    splitter._automaton = automaton(r"[\s\S]")  # an engine gone wrong: it cuts between all characters
    assert splitter.split("wrong now") != ["wrong", " now"]
    splitter.check("some text")
    assert splitter.split("right now") == ["right", " now"]


def test_where_pieces_end_is_told_in_bytes() -> None:
    for pattern in (SOLAR_OPEN.split_pattern, r"(\p{L})+|."):  # by the automaton, by Oniguruma
        assert Splitter(SOLAR_OPEN, pattern).ends("가나 a".encode()).tolist()[0] == 6


@pytest.mark.parametrize("pattern", ["a*", "a|", "(?=a)", r"\b", ".|^"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="can match empty text"):
        oniguruma(pattern, "mine")


def test_a_pattern_that_does_not_compile_is_refused() -> None:
    with pytest.raises(UserError, match="preset mine: split pattern '\\(' is no regular expression"):
        oniguruma("(", "mine")


def test_normalization_is_the_presets() -> None:
    decomposed = "\u1112\u1161\u11ab"
    assert Splitter(K_EXAONE, K_EXAONE.split_pattern).normalize(decomposed) == "한"
    assert Splitter(SOLAR_OPEN, SOLAR_OPEN.split_pattern).normalize(decomposed) == decomposed


def test_a_splitter_travels_to_another_process() -> None:
    travelled = pickle.loads(pickle.dumps(Splitter(K_EXAONE, K_EXAONE.split_pattern)))
    for text in ("it's 12 \u1112\u1161\u11ab 가나", "\n\n a  b\t", "Ünïcode 2026, 漢字"):
        normal = travelled.normalize(text)
        travelled.check(normal)
        assert travelled.split(normal) == by_oniguruma(K_EXAONE.split_pattern, normal)


def test_a_pattern_that_passes_over_text_is_refused() -> None:
    for pattern in PATTERNS.values():
        check_coverage(pattern, "known")
    with pytest.raises(UserError, match=r"passes over some text, such as U\+0300"):
        check_coverage(r"\p{L}+|\p{N}|[^\p{M}]", "mine")
