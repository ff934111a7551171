"""Special tokens spelled out by a user: none becomes its id, and all come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenizer.report.command import check_neutral

Toy = Callable[..., Any]
SPECIAL = ("<|end|>", "[UNK]", "pad")


def test_what_stays_text_is_good_and_the_other_way_is_told(toy: Toy) -> None:
    check = check_neutral(toy(special=SPECIAL))
    assert check.verdict == "good"
    assert check.numbers == {"num_tried": 3, "become_ids_in_text": [], "not_given_back": [],
                             "num_ids_where_special_is_read": 3}
    assert check.summary.startswith("3 special tokens tried in text: encoded as ordinary text "
                                    "(encode) all stay text")
    assert "3 become ids, so never encode users' text that way" in check.summary


def test_one_that_becomes_its_id_only_between_letters_is_found(toy: Toy) -> None:
    opened = toy(special=SPECIAL)
    plain = opened.encode
    opened.encode = lambda text: opened.encode_special(text) if text == "a[UNK]b" else plain(text)
    check = check_neutral(opened)
    assert check.verdict == "bad" and check.numbers["become_ids_in_text"] == ["[UNK]"]
    assert check.tables[0].rows[0][0] == "[UNK]" and check.tables[0].rows[0][-1] == "becomes its id"


def test_one_that_does_not_come_back_is_a_defect(toy: Toy) -> None:
    check = check_neutral(toy(special=SPECIAL, change=lambda text: text.replace("pad", "")))
    assert check.verdict == "bad"
    assert check.numbers["not_given_back"] == ["pad"] and "; 1 do not come back" in check.summary


@pytest.mark.parametrize(("added", "tried"),
                         [("<tool>", True), ("{x}", True), ("    ", False), ("<br", False)])
def test_added_tokens_count_where_they_look_like_control(toy: Toy, added: str, tried: bool) -> None:
    opened = toy()
    opened.added = {300: added}
    assert check_neutral(opened).numbers["num_tried"] == tried
