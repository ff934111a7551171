"""Phrases: every language has some for tests and some for training, and none is on both sides."""

from __future__ import annotations

import pytest

from megatron_sov.config import Language
from megatron_sov.eval.needle.text import LANGUAGES, is_for_tests, phrases


@pytest.mark.parametrize("language", LANGUAGES)
def test_both_sides_have_phrases_and_share_none(language: Language) -> None:
    sides = [[text for form in phrases(language, test=test) for text in form.texts().values()]
             for test in (True, False)]
    assert all(sides) and not set(sides[0]) & set(sides[1])
    openings = [{text.split("{}")[0] for text in side} for side in sides]
    assert not openings[0] & openings[1], "a model that learned what stands before a key would know the test"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_value_stands_right_behind_its_key_and_questions_have_their_places(language: Language) -> None:
    for form in (*phrases(language, test=True), *phrases(language, test=False)):
        assert "{}{}" in form.statement
        assert {name: text.count("{}") for name, text in form.texts().items()} \
            == {"statement": 2, "all_values": 1, "values_of": 4, "assignment": 2, "holders": 1}


def test_the_split_is_a_function_of_the_text_alone() -> None:
    assert is_for_tests("\nThe value of{}{}.") and not is_for_tests("\nThe code of{}{}.")
    share = sum(is_for_tests(a, b) for a in range(60) for b in range(60)) / 3600
    assert 0.17 < share < 0.23
