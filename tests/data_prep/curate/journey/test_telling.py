"""What a step changed in a text, as lines that a person reads."""

from __future__ import annotations

import time

import pytest

from data_prep.curate.journey.telling import changes


@pytest.mark.parametrize(("before", "after", "shown"), [
    ("a\nb\nc", "a\nb\nc", []),
    ("a\nb\nc", "a\nc", ["@ line 2", "- b"]),
    ("a\nc", "a\nb\nc", ["@ line 2", "+ b"]),
    ("call 010-1234-5678 now", "call <phone> now", ["@ line 1", "~ call [-010-1234-5678-]{+<phone>+} now"]),
    ("one two three", "one two, three", ["@ line 1", "~ one two{+,+} three"]),
    ("a\n", "a", ["~ only the ends of lines differ"]),
    ("x\ny\nz", "p", ["@ line 1", "~ [-x-]{+p+}", "- y", "- z"]),
])
def test_only_what_differs_is_shown(before: str, after: str, shown: list[str]) -> None:
    assert changes(before, after) == shown


def test_a_change_in_a_long_line_is_shown_with_a_little_around_it() -> None:
    line = " ".join(f"word{i}" for i in range(5_000))
    at, shown = changes(line, line.replace("word2500", "other"))
    assert (at, len(shown) < 150) == ("@ line 1", True)
    assert "word2499 [-word2500-]{+other+} word2501" in shown


@pytest.mark.parametrize(("before", "after"), [
    ("a " * 200_000, "b " * 200_000), ("a b " * 100_000, "b a " * 100_000), ("x\n" * 50_000, "y\n" * 50_000),
    ("a " * 400, "a b " * 400), ("\n".join("ab" * 300), "\n".join("ba" * 300))])
def test_huge_and_awkward_texts_are_cut_and_take_a_moment(before: str, after: str) -> None:
    start_s = time.process_time()
    shown = changes(before, after)
    assert time.process_time() - start_s < 2
    assert 0 < len(shown) <= 42 and sum(map(len, shown)) < 50_000


def test_one_huge_word_is_cut_and_takes_a_moment() -> None:
    """Made here: a parameter lives as long as the process of pytest."""
    test_huge_and_awkward_texts_are_cut_and_take_a_moment("z" * 10_000_000, "z")
