"""Reading split patterns: what is read, and what is left to Oniguruma."""

from __future__ import annotations

import pytest

from tokenizer.bpe.split_pattern import Next, OneOf, PatternChoice, Repeat, Sequence, Unsupported, parse


def test_a_pattern_is_read_as_a_tree() -> None:
    assert parse(r"\p{L}+|[^\s[:alpha:]]{1,3}(?!\S)|(?i:'s)") == PatternChoice((
        Sequence((Repeat(OneOf(r"\p{L}"), 1, None),)),
        Sequence((Repeat(OneOf("[^\\s[:alpha:]]"), 1, 3), Next(r"\S", negated=True))),
        Sequence((Sequence((OneOf("'"), OneOf("(?i:s)"))),))))


@pytest.mark.parametrize("pattern", [
    "(a)", "a*?", "a++", "a{2}+", "(?<=a)b", r"\bx", "^a", "a$", r"(a)\1", r"\x41", "[]a]", "[a", "(?:a",
    "a)", "(?=ab)c", "(?i:[a-z])", "(?:a*)*b", "a{200}", "a{3,1}", "a*", "a|", "(?!a)", "{a"])
def test_what_is_not_read_is_said_to_be(pattern: str) -> None:
    with pytest.raises(Unsupported):
        parse(pattern)


@pytest.mark.parametrize("pattern", ["(?i:'ss)", "(?i:ﬀ|x)", "(?i:fi)"])
def test_letters_that_fold_into_one_are_left_to_oniguruma(pattern: str) -> None:
    with pytest.raises(Unsupported):
        parse(pattern)
