"""Replies with tags, short answers, copies and grades; what is copied, by brute force as well."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data_prep.synth.generators.documents.verdicts import (
    answer_in, copied_share, same_answer, size_ratio, stands_in)

sys.path.append(str(Path(__file__).parents[2]))
from scripted import ScriptedAsk

from data_prep.synth.declared.parsers import read_list, read_tagged
from data_prep.synth.generators.documents.verdicts import agreed, graded


@pytest.mark.parametrize(("said", "passed"), [
    (json.dumps({"score": 8}), True), (json.dumps({"score": 6.9}), False), ("Score: 10, obviously!", False)])
def test_a_grade_has_to_reach_a_bound_and_no_grade_does_not(said: str, passed: bool) -> None:
    verdict = graded(ScriptedAsk(lambda request: said), "sound", "Is it?", {"text": "x"}, 7)
    assert (verdict.check, verdict.passed) == ("judge: sound", passed)


def test_the_judge_is_asked_about_other_words_alone() -> None:
    ask = ScriptedAsk(lambda request: json.dumps({"score": 10}))
    assert agreed(ask, "solved", "Where?", "Seoul.", "seoul", "en", 7).passed
    assert not agreed(ask, "solved", "Where?", "unknown", "Seoul", "en", 7).passed
    assert not agreed(ask, "solved", "Where?", "in the capital", "Seoul", "en", 0).passed
    assert ask.calls == 0
    assert agreed(ask, "solved", "Where?", "in the capital", "Seoul", "en", 7).check == "judge: solved"
    assert ask.calls == 1


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


@pytest.mark.parametrize(("text", "found"), [
    ("Sure!\n<a>one</a>\n<b> two\nlines </b> Done.", {"a": "one", "b": "two\nlines"}),
    ("<b>two</b><a>one</a>", None), ("<a>one</a>", None), ("<a></a><b>two</b>", None),
    ("<a>one</a><b>two", None), ("<a>1</a><a>1</a><b>2</b>", None), ("</a>one<a><b>2</b>", None), ("", None),
])
def test_each_tag_stands_once_and_in_order(text: str, found: dict[str, str] | None) -> None:
    assert read_tagged(text, "a", "b") == found


def test_lists_are_groups_of_tags() -> None:
    assert read_list("<q>1</q><a>x</a>\n\n<q>2</q>\n<a>y</a>", "q", "a") == [
        {"q": "1", "a": "x"}, {"q": "2", "a": "y"}]
    for broken in ("", "<q>1</q>", "<q>1</q><a>x</a><q>2</q>", "<q>1</q><q>2</q><a>x</a><a>y</a>"):
        assert read_list(broken, "q", "a") is None


def test_copied_share_is_that_of_runs_of_words() -> None:
    source, made = "a b c d e f g h i j", "x b c d e y g h i z"
    runs = {tuple(source.split()[i:i + 3]) for i in range(8)}
    mine = [tuple(made.split()[i:i + 3]) for i in range(8)]
    assert copied_share(made, source, 3) == pytest.approx(sum(run in runs for run in mine) / 8)
    assert copied_share(source, source, 3) == 1
    assert copied_share("too short", source, 3) == 0


def test_size_ratio_counts_words() -> None:
    assert size_ratio("one two", "one two three four") == pytest.approx(0.5)
