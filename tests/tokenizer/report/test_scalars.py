"""All of Unicode, on a tokenizer that loses what a test plants."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest

from tokenizer.report import measures
from tokenizer.report.measures import Scalars, check_scalars, num_blocks, try_scalars

Toy = Callable[..., Any]


def tried(opened: Any, end: int = 0x1000) -> Scalars:
    return try_scalars(opened, lambda num_blocks: None, end)


def test_everything_that_came_up_is_seen_and_all_come_back(toy: Toy) -> None:
    opened = toy("가", "abc", "d\u00e9")
    found = tried(opened)
    assert (found.num_tried, found.lost, found.changed, found.lost_blocks) == (0x1000, [], [], [])
    assert found.seen[opened.encode("abc")].all(), "neighbours stand side by side"
    assert not found.seen[256] and not found.seen[258], ("neither a Hangul syllable nor these two "
                                                         "letters came up")
    check = check_scalars(found)
    assert (check.verdict, check.summary) == ("good", "4,096 characters tried, all come back")


def test_all_scalar_values_stand_in_blocks_and_surrogates_are_none() -> None:
    blocks = list(measures._blocks(measures.END))
    every = chain(range(0xD800), range(0xE000, 0x110000))
    assert all(a == b for a, b in zip(chain.from_iterable(blocks), every, strict=True))
    assert num_blocks() == len(blocks)


def test_a_lost_character_is_named_once_and_its_block_is_explained_by_it(toy: Toy) -> None:
    found = tried(toy(change=lambda text: text.replace("ß", "ss").replace("\u0e01", "")))
    assert found.lost == [0xDF, 0xE01] and found.lost_blocks == []
    check = check_scalars(found)
    assert check.verdict == "bad" and check.summary == "4,096 characters tried, 2 lost, the first U+00DF"
    assert check.tables[0].rows == [["U+00DF", "LATIN SMALL LETTER SHARP S", "ß"],
                                    ["U+0E01", "THAI CHARACTER KO KAI", "ก"]]


def test_what_is_written_in_an_equivalent_way_is_a_remark(toy: Toy) -> None:
    found = tried(toy(change=lambda text: text.replace("\u0344", unicodedata.normalize("NFC", "\u0344"))))
    assert found.changed == [0x344] and found.lost == []
    check = check_scalars(found)
    assert (check.verdict == "note"
            and check.summary.endswith("1 written in another, equivalent way (normalization)"))


def test_a_block_that_only_neighbours_spoil_is_told_with_how_it_was_written(toy: Toy) -> None:
    found = tried(toy(change=lambda text: text.replace(" \u0e01 ", " ")))
    assert found.lost == [] and found.lost_blocks == ["U+0800 to U+0FFF, behind a space"]
    check = check_scalars(found)
    assert check.verdict == "bad" and "1 blocks do not come back" in check.summary


def test_planes_without_characters_are_tried_side_by_side_only(toy: Toy,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "EMPTY_PLANES", range(0x800, 0x1000))
    opened, texts = toy(), []
    encoded = opened.encode_many
    opened.encode_many = lambda several: texts.append(len(several)) or encoded(several)
    told: list[int] = []
    found = try_scalars(opened, told.append, 0x1800)
    assert texts == [3, 1, 3] and told == [1, 1, 1] and found.num_tried == 0x1800
    assert np.count_nonzero(found.seen) > 128
