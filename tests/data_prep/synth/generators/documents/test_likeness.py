"""What is copied, by brute force as well."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.documents.likeness import copied_share, letters_likeness, size_ratio


def test_copied_share_is_that_of_runs_of_words() -> None:
    source, made = "a b c d e f g h i j", "x b c d e y g h i z"
    runs = {tuple(source.split()[i:i + 3]) for i in range(8)}
    mine = [tuple(made.split()[i:i + 3]) for i in range(8)]
    assert copied_share(made, source, 3) == pytest.approx(sum(run in runs for run in mine) / 8)
    assert copied_share(source, source, 3) == 1
    assert copied_share("too short", source, 3) == 0


def test_size_ratio_counts_words() -> None:
    assert size_ratio("one two", "one two three four") == pytest.approx(0.5)


def test_letters_likeness_is_the_jaccard_index_of_three_letters() -> None:
    assert letters_likeness("Who is it?", "who is it") == 1
    assert letters_likeness("abcd", "abce") == pytest.approx(1 / 3)
    assert letters_likeness("세종은 누구인가?", "강은 어디인가?") < 0.3
