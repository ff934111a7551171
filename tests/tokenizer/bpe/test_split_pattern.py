"""Split patterns: parsing, automata that split as the regex library Oniguruma, and refused patterns."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.errors import UserError
from tokenizer.bpe import splitter as splitter_module
from tokenizer.bpe.counting import split_words
from tokenizer.bpe.split_pattern import (
    CharacterClass, Lookahead, PatternChoice, PatternSequence, Repeat, UnsupportedPattern, build_splitter,
    check_coverage, parse_pattern)
from tokenizer.bpe.splitter import Splitter, build_automaton
from tokenizer.presets import K_EXAONE, SOLAR_OPEN


def test_a_pattern_is_read_as_a_tree() -> None:
    assert parse_pattern(r"\p{L}+|[^\s[:alpha:]]{1,3}(?!\S)|(?i:'s)") == PatternChoice((
        PatternSequence((Repeat(CharacterClass(r"\p{L}"), 1, None),)),
        PatternSequence((Repeat(CharacterClass("[^\\s[:alpha:]]"), 1, 3), Lookahead(r"\S", negated=True))),
        PatternSequence((PatternSequence((CharacterClass("'"), CharacterClass("(?i:s)"))),))))


@pytest.mark.each("pattern", [
    "(a)", "a*?", "a++", "a{2}+", "(?<=a)b", r"\bx", "^a", "a$", r"(a)\1", r"\x41", "[]a]", "[a", "(?:a",
    "a)", "(?=ab)c", "(?i:[a-z])", "(?:a*)*b", "a{200}", "a{3,1}", "a*", "a|", "(?!a)", "{a",
    "(?i:'ss)", "(?i:ﬀ|x)", "(?i:fi)"])  # letters that case folding joins or splits
def test_unsupported_pattern_syntax_is_reported(pattern: str) -> None:
    with pytest.raises(UnsupportedPattern):
        parse_pattern(pattern)


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRIORITIES = r"a|ab|(?:ab|a)(?:c|bcd)?|b(?=c)|c{2,3}d?|[^\S\n]+x|\w\d"
PRESET_PATTERNS = {"solar-open": SOLAR_OPEN.split_pattern, "k-exaone": K_EXAONE.split_pattern,
              "superwords": K_EXAONE.superword_pattern}
PATTERNS = {"gpt-2": GPT_2, "llama-3": LLAMA_3, "o200k": O200K, "priorities": PRIORITIES, "dot": "..|.",
            **PRESET_PATTERNS}


def split(pattern: str, text: str) -> list[str]:
    """Return the pieces of a text, split by the automaton of a pattern."""
    raw, automaton = text.encode(), build_automaton(pattern)
    ends = np.empty(len(raw), np.int32)
    num_words = split_words(np.frombuffer(raw, np.uint8), automaton.kinds, automaton.steps, ends)
    return [raw[a:b].decode() for a, b in pairwise([0, *ends[:num_words].tolist()])]


def split_by_oniguruma(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in build_splitter(pattern, "test").pre_tokenize_str(text)]


LETTERS = "aabbccdx '’sStT019 \n\r\tſéÉ가나\u0301\u3000\U0001f600.,/"


@pytest.mark.tier1_cases(3)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(LETTERS), st.characters(codec="utf-8"))))
def test_any_text_is_split_as_by_oniguruma(pattern: str, text: str) -> None:
    assert split(pattern, text) == split_by_oniguruma(pattern, text)


def test_the_first_alternative_wins_not_the_longest() -> None:
    assert split("a|ab|b", "ab") == ["a", "b"]
    assert split("(?:a|ab)c|.", "abc") == ["abc"]


def test_long_runs_take_linear_time() -> None:
    automaton = build_automaton(LLAMA_3)
    raw = np.full(1 << 20, ord(" "), np.uint8)
    assert split_words(raw, automaton.kinds, automaton.steps, np.empty(len(raw), np.int32)) == 1


def test_too_large_a_pattern_is_left_to_oniguruma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitter_module, "MOST_STATES", 20)
    with pytest.raises(UnsupportedPattern):
        build_automaton("(?:a{1,9}b{1,9}){1,9}c")
    with pytest.raises(UnsupportedPattern):
        build_automaton("|".join(map(chr, range(0x4E00, 0x4E40))))


@pytest.mark.deep
@pytest.mark.parametrize("pattern", PRESET_PATTERNS.values(), ids=PRESET_PATTERNS)
def test_all_of_unicode_is_split_as_by_oniguruma(pattern: str) -> None:
    splitter = Splitter(SOLAR_OPEN, pattern)
    for start in range(0, 0x110000, 8192):
        characters = [chr(c) for c in range(start, start + 8192) if not 0xD800 <= c < 0xE000]
        for text in ("".join(characters), " ".join(characters[::7]), "a".join(characters[::7])):
            assert splitter.split_text(text) == split_by_oniguruma(pattern, text), hex(start)


def test_text_between_matches_is_preserved() -> None:
    assert Splitter(SOLAR_OPEN, r"\p{L}+").split_text("ab 12 cd") == ["ab", " 12 ", "cd"]
    assert Splitter(SOLAR_OPEN, r"(\p{L})(\p{N})|.").split_text("a1b") == ["a1", "b"]


def test_an_engine_that_differs_is_not_used_again() -> None:
    splitter = Splitter(SOLAR_OPEN, SOLAR_OPEN.split_pattern)
    splitter._automaton = build_automaton(r"[\s\S]")  # a wrong automaton, which splits all characters
    assert splitter.split_text("wrong now") != ["wrong", " now"]
    splitter.compare_engines("some text")
    assert splitter.split_text("right now") == ["right", " now"]


def test_piece_ends_are_byte_offsets() -> None:
    for pattern in (SOLAR_OPEN.split_pattern, r"(\p{L})+|."):  # by the automaton, by Oniguruma
        assert Splitter(SOLAR_OPEN, pattern).find_ends("가나 a".encode()).tolist()[0] == 6


@pytest.mark.each(("pattern", "message"), [
    *((pattern, "can match empty text") for pattern in ("a*", "a|", "(?=a)", r"\b", ".|^")),
    ("(", r"preset mine: split pattern '\(' is no regular expression")])
def test_a_pattern_that_cannot_split_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_splitter(pattern, "mine")


def test_normalization_is_the_presets() -> None:
    decomposed = "\u1112\u1161\u11ab"
    assert Splitter(K_EXAONE, K_EXAONE.split_pattern).normalize(decomposed) == "한"
    assert Splitter(SOLAR_OPEN, SOLAR_OPEN.split_pattern).normalize(decomposed) == decomposed


def test_a_splitter_can_be_sent_to_another_process() -> None:
    unpickled = pickle.loads(pickle.dumps(Splitter(K_EXAONE, K_EXAONE.split_pattern)))
    for text in ("it's 12 \u1112\u1161\u11ab 가나", "\n\n a  b\t", "Ünïcode 2026, 漢字"):
        normal = unpickled.normalize(text)
        unpickled.compare_engines(normal)
        assert unpickled.split_text(normal) == split_by_oniguruma(K_EXAONE.split_pattern, normal)


def test_a_pattern_that_passes_over_text_is_refused() -> None:
    for pattern in PRESET_PATTERNS.values():
        check_coverage(pattern, "known")
    with pytest.raises(UserError, match=r"passes over some text, such as U\+0300"):
        check_coverage(r"\p{L}+|\p{N}|[^\p{M}]", "mine")
