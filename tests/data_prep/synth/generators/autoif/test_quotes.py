"""Quotations survive a translation, or there is none."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.autoif.answers import quoted, with_quotes_of


@pytest.mark.parametrize(("text", "words"), [
    ('Use "a" and “b c”.', ["a", "b c"]), ("Use 「가」 and `x y`.", ["가", "x y"]),
    ("Don't use 'it' or it's.", ["it"]),
    ("A title between <<T>> marks", ["<<T>>"]), ("nothing", []), ('"', []), ('an "open\nquote"', [])])
def test_quotations(text: str, words: list[str]) -> None:
    assert quoted(text) == words


@pytest.mark.parametrize(("text", "translation", "expected"), [
    ('Use the word "reason".', '"reason"이라는 말을 쓰세요.', '"reason"이라는 말을 쓰세요.'),
    ('Use the word "reason".', "“reason”이라는 말을 쓰세요.", "“reason”이라는 말을 쓰세요."),
    ('Use the word "reason".', '"이유"라는 말을 쓰세요.', '"reason"라는 말을 쓰세요.'),
    ('Put "a" before "b".', '"b" 앞에 "a"를 두세요.', '"b" 앞에 "a"를 두세요.'),
    ('Put "a" before "b".', '"가"를 "나" 앞에 두세요.', '"a"를 "b" 앞에 두세요.'),
    ('Use the word "reason".', "이유라는 말을 쓰세요.", None),
    ('Use the word "reason".', '"이유"와 "까닭"을 쓰세요.', None),
    ('Use "a" and "a".', '"a"를 쓰세요.', None),
    ("Use no commas.", "쉼표를 쓰지 마세요.", "쉼표를 쓰지 마세요."),
])
def test_a_translation_has_the_quotations_of_its_text(text: str, translation: str,
                                                      expected: str | None) -> None:
    assert with_quotes_of(text, translation) == expected
