"""Text that grows by a character, tokens that are decoded as they come, the same text twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenizer.report import measures
from tokenizer.report.measures import LONG_REWIND, NamedText, check_determinism, check_streaming

Toy = Callable[..., Any]


def text(*chunks: str, name: str = "t") -> NamedText:
    return NamedText(name, name, list(chunks), True)


@pytest.mark.parametrize(("ids", "others", "common"), [
    ([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([], [1], 0), ([1, 2], [1, 2], 2), ([5, 2], [1, 2], 0)])
def test_the_beginning_that_two_encodings_have_in_common(ids: list[int], others: list[int],
                                                         common: int) -> None:
    assert measures._common(ids, others) == common


def test_tokens_that_a_longer_one_swallows_are_counted_by_hand(toy: Toy) -> None:
    """x | x,a | x,a,b | x,a,b,c | x,abcd | x,abcd,e: the d takes back three tokens,
    no other character takes back any."""
    check = check_streaming(toy("abcd"), [text("", "xabcde", "")])
    assert check.numbers["texts"]["t"] == {"num_chars": 6, "num_tokens": 3, "most_taken_back": 3,
                                           "mean_taken_back": 3 / 5, "prefixes_decode": True}
    assert check.verdict == "good" and "mixed" in check.numbers["texts"]
    row = next(row for row in check.tables[0].rows if row[0] == "t")
    assert row == ["t", "3", "3", "0.60", "xabcd", "yes"], "and where: behind the d"


def test_a_long_rewind_is_a_remark(toy: Toy) -> None:
    long = "".join(chr(ord("a") + i) for i in range(LONG_REWIND + 2))
    assert check_streaming(toy(long[:-1]), [text(long)]).verdict == "good"
    assert check_streaming(toy(long), [text(long)]).verdict == "note"


def test_parts_of_characters_at_the_end_are_no_defect_and_other_text_is(toy: Toy) -> None:
    opened = toy()
    assert check_streaming(opened, [text("한국")]).verdict == "good", "bytes of a character come one by one"
    decode = opened.decode
    opened.decode = lambda ids: decode(ids).lstrip("h") if len(ids) == 3 else decode(ids)
    check = check_streaming(opened, [text("hello"), text("abc def", name="plain")])
    assert check.verdict == "bad" and not check.numbers["texts"]["t"]["prefixes_decode"]
    assert check.summary.endswith("gives other text than the beginning in t")


def test_ids_that_depend_on_company_or_order_are_found(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = toy("the")
    monkeypatch.setattr(measures, "open_tokenizer", lambda path: opened)
    texts = [text("the first", "the second", "last")]
    good = check_determinism(opened, texts)
    assert (good.verdict, good.numbers["num_chunks"], good.numbers["num_different"]) == ("good", 4, 0)
    assert check_determinism(opened, texts).numbers["ids_sha256"] == good.numbers["ids_sha256"]
    alone = opened.encode_many
    opened.encode_many = lambda texts: [*alone(texts)[:-1], [7]]
    bad = check_determinism(opened, texts)
    assert (bad.verdict, bad.numbers["num_different"]) == ("bad", 2), "the last of both orders"
