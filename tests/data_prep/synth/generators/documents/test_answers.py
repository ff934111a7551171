"""Short answers: when two are the same, and when a document has one."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.documents.answers import answer_in, same_answer, stands_in


@pytest.mark.parametrize(("given", "expected", "language", "same"), [
    ("The Han River.", "Han river", "en", True),
    ("King Sejong (1397–1450)", "king sejong", "en", True),
    ("세종대왕입니다", "세종대왕", "ko", True),
    ("세종대왕이 만들었다", "세종대왕", "ko", False),
    ("1,443", "1443", "en", True),
    ("120만 명", "1,200,000명", "ko", True),
    ("120만 명", "1,200,000원", "ko", False),
    ("1443", "1446", "en", False),
    ("not possible", "possible", "en", False),
    ("not Seoul", "Seoul", "en", False),
    ("", "Seoul", "en", False),
])
def test_same_answer(given: str, expected: str, language: str, same: bool) -> None:
    assert same_answer(given, expected, language) is same
    assert same_answer(expected, given, language) is same


@pytest.mark.parametrize(("answer", "document", "stands"), [
    ("Japan", "They came from Japan.", True), ("an", "They came from Japan.", False),
    ("144", "In 1443 it was", False), ("1.5", "It is 1.52 m", False), ("1,443", "of 1,443 men", True),
    ("세종", "세종이 만들었다", True), ("종이", "세종이 만들었다", False),
    ("กรุงเทพ", "อยู่ในกรุงเทพมหานคร", True), ("한글  창제", "그는 한글 창제를 알렸다", True), ("", "x", False),
    ("a" * 100, "a" * 20_000, False),
])
def test_stands_in(answer: str, document: str, stands: bool) -> None:
    assert stands_in(answer, document) is stands


def test_the_final_answer_of_a_reply() -> None:
    assert answer_in("I think.\n<answer>Seoul</answer>") == "Seoul"
    unmarked = "A long sentence without any mark of an answer stands here, all of it alone."
    assert answer_in(unmarked) == unmarked
