"""Replies with tags; what is copied, by brute force as well."""

from __future__ import annotations

import pytest

from data_prep.synth.declared.parsers import read_tagged
from data_prep.synth.generators.documents.verdicts import copied_share, size_ratio


@pytest.mark.parametrize(("text", "found"), [
    ("Sure!\n<a>one</a>\n<b> two\nlines </b> Done.", {"a": "one", "b": "two\nlines"}),
    ("<b>two</b><a>one</a>", None), ("<a>one</a>", None), ("<a></a><b>two</b>", None),
    ("<a>one</a><b>two", None), ("<a>1</a><a>1</a><b>2</b>", None), ("</a>one<a><b>2</b>", None), ("", None),
])
def test_each_tag_stands_once_and_in_order(text: str, found: dict[str, str] | None) -> None:
    assert read_tagged(text, ["a", "b"]) == found


def test_copied_share_is_that_of_runs_of_words() -> None:
    source, made = "a b c d e f g h i j", "x b c d e y g h i z"
    runs = {tuple(source.split()[i:i + 3]) for i in range(8)}
    mine = [tuple(made.split()[i:i + 3]) for i in range(8)]
    assert copied_share(made, source, 3) == pytest.approx(sum(run in runs for run in mine) / 8)
    assert copied_share(source, source, 3) == 1
    assert copied_share("too short", source, 3) == 0


def test_size_ratio_counts_words() -> None:
    assert size_ratio("one two", "one two three four") == pytest.approx(0.5)
