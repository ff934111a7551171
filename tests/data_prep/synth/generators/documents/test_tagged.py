"""Replies whose parts stand between tags."""

from __future__ import annotations

import pytest

from data_prep.synth.generator import Reply
from data_prep.synth.generators.documents.tagged import malformed, read_list, read_tagged


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


def test_what_was_said_is_kept_for_the_report() -> None:
    sample = malformed(Reply("x" * 9_999, is_cut=True), {"style": "clearer"}, "g")
    assert len(sample.record["text"]) == 2000
    assert sample.reason == "complete"
