"""Shares of words and characters that are heard wrong, counted by hand."""

from __future__ import annotations

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
