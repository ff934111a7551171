"""Shares of words and characters that are heard wrong, counted by hand."""

from __future__ import annotations

import unicodedata

import pytest

from megatron_sov.omni.media.heard import error_rates, normalised


def test_case_and_punctuation_do_not_count() -> None:
    assert normalised("  Ｈello, — World! ") == "ｈello world"
    assert error_rates("Hello, world!", "hello world") == (0, 0)


@pytest.mark.parametrize(("text", "heard", "words", "characters"), [
    ("one two three four", "one too three", 2 / 4, 6 / 18),  # one changed, one left out
    ("서울 시청", "서울시청", 2 / 2, 1 / 5),  # of a language with few spaces characters say more
    ("a", "a b c", 2, 4), ("abc", "", 1, 1)])
def test_shares_are_of_what_was_to_be_said(text: str, heard: str, words: float, characters: float) -> None:
    assert error_rates(text, heard) == (words, pytest.approx(characters))


@pytest.mark.parametrize(("text", "words"), [
    ("Les cafés d'été", 4), ("서울 시청", 2), ("हिन्दी भाषा", 2), ("คนไทยดี", 1), ("İstanbul ΐ", 2),
    ("می\N{ZERO WIDTH NON-JOINER}خواهم", 1), ("co\N{SOFT HYPHEN}op", 1), ("a\N{ZERO WIDTH SPACE}b", 2)])
def test_a_word_is_one_in_each_form_of_unicode(text: str, words: int) -> None:
    """Marks are parts of words: vowels that are marks count, and accents do not cut a word."""
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert len(normalised(forms[0]).split()) == words and normalised(forms[0]) == normalised(forms[1])
    assert error_rates(*forms) == error_rates(*forms[::-1]) == (0, 0)


def test_a_vowel_that_is_a_mark_is_heard_wrong() -> None:
    assert error_rates("किताब", "कताब") == (1, pytest.approx(1 / 5))
