"""Every shipped file of rules loads, keeps its own rules, and finds stop words in its own language."""

from __future__ import annotations

import pytest

from data_prep.curate.quality.rules.step import known_languages, language_rules
from tests.data_prep.curate.quality.test_identify import SENTENCES
from tests.typed_words import keys_of

WITH_SETTINGS = {"ko", "en", "th", "es", "de", "ja", "vi"}
"""Languages of the recipes' tokenizers and corpora, which must not fall back to the rules of others."""


@pytest.mark.parametrize("code", [*known_languages(), "other"])
def test_a_file_loads_and_its_thresholds_are_possible(code: str) -> None:
    rules = language_rules(code)
    assert rules.code == code
    assert keys_of(rules.thresholds) == []
    assert (rules.unit == "characters") == (rules.chars_per_word > 1)
    assert all(isinstance(word, str) for word in rules.stop_words)


def test_the_languages_of_the_recipes_have_their_own() -> None:
    assert set(known_languages()) >= WITH_SETTINGS


@pytest.mark.parametrize("code", sorted(set(known_languages()) & set(SENTENCES)))
def test_a_sentence_has_stop_words_of_its_language(code: str) -> None:
    text = SENTENCES[code].lower()
    assert language_rules(code).num_stop_words(text, text.replace(".", " ").split()) >= 1


def test_a_language_without_a_file_has_those_of_others() -> None:
    assert language_rules("sw").code == "other"
    assert language_rules("common").code == "other"
