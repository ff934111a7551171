"""A vocabulary's parts, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenizer.report.measures import check_inventory, check_superwords, words_in

Toy = Callable[..., Any]


def test_every_part_is_counted(toy: Toy) -> None:
    """256 bytes, three words, two parts of Hangul; special tokens come last."""
    opened = toy("the", " the", "of the time", "안".encode()[:2], "안".encode()[1:], special=("<|end|>",))
    check = check_inventory(opened)
    numbers = check.numbers
    assert check.verdict == "good"
    assert ((numbers["vocab_size"], numbers["num_special"], numbers["num_added"], numbers["num_single_bytes"])
            == (262, 1, 0, 256))
    assert ((numbers["num_parts_of_characters"], numbers["ids_without_token"], numbers["num_same_bytes"])
            == (2, 0, 0))
    assert numbers["special"] == {"261": "<|end|>"}
    assert numbers["mean_bytes"] == pytest.approx((256 + 3 + 4 + 11 + 2 + 2) / 261)
    assert numbers["tokens_by_num_bytes"] == {1: 256, 2: 2, 3: 1, 4: 1, 11: 1}
    assert numbers["longest"][0] == {"id": 258, "token": "of␣the␣time", "num_bytes": 11}
    assert check.summary == ("262 ids: 1 special, 0 added, 256 single bytes, 2 parts of characters; "
                             "the longest token has 11 bytes")
    assert check.tables[0].rows == [["<|end|>", "261", "special"]]


def test_gaps_and_twins_are_remarks(toy: Toy) -> None:
    opened = toy("the")
    opened.tokens |= {257: b"the", 260: b"x"}
    opened.added = {261: "<|pad|>"}
    check = check_inventory(opened)
    assert check.verdict == "note"
    assert (check.numbers["ids_without_token"], check.numbers["same_bytes"]) == (2, ["x", "the"])
    assert check.summary.endswith("; 2 ids have no token; 2 tokens share their bytes with another")


@pytest.mark.parametrize(("token", "words"), [
    (b" of the", 2), (b"the", 1), (b" 1 2", 0), ("한국 사람".encode(), 2), (b" a-b c.", 2),
    ("안 a".encode()[1:], 1)])
def test_words_have_letters(token: bytes, words: int) -> None:
    assert words_in(token) == words


def test_superwords_come_longest_first_and_none_is_said(toy: Toy) -> None:
    numbers = check_superwords(toy(" of the", "in order to", " the", "one of the",
                                   special=(" so it is",))).numbers
    assert (numbers["num_superwords"], numbers["by_num_words"]) == (3, {2: 1, 3: 2})
    assert numbers["longest"] == ["in␣order␣to", "one␣of␣the", "␣of␣the"], (
        "of the same number of words the longer one")
    assert check_superwords(toy("the")).summary == "no token spans words"
