"""Words and lines that are cut differently: those first where it costs most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizer.compare import command
from tokenizer.compare.command import different_lines, different_words
from tokenizer.report.measures import NamedText

Toy = Callable[..., Any]


def text(*chunks: str) -> NamedText:
    return NamedText("t", "t", list(chunks), True)


def test_words_come_by_their_count_times_what_the_difference_costs(toy: Toy) -> None:
    both = [toy(" the", " longest", " of"), toy(" the", " lon", " ofx")]
    found = different_words(both, text("the the of of of longest", "of off the\nfoo"))
    assert found == [
        {"text": "of", "count": 4, "cuts": ["␣of", "␣|o|f"]},          # 4 times 2 tokens
        {"text": "longest", "count": 1, "cuts": ["␣longest", "␣lon|g|e|s|t"]},  # 4 tokens once
        # 2 tokens once; `the` and `foo` are alike
        {"text": "off", "count": 1, "cuts": ["␣of|f", "␣|o|f|f"]}]


def test_the_same_number_of_tokens_may_still_be_another_cut(toy: Toy) -> None:
    (found,) = different_words([toy(" a"), toy("ab")], text("ab"))
    assert found["cuts"] == ["␣a|b", "␣|ab"]


def test_where_spaces_part_no_words_there_are_none(toy: Toy) -> None:
    both = [toy("กำ"), toy()]
    assert different_words(both, text("กำลังที่นี้")) == [] != different_lines(
        both, text("กำลังที่นี้กำลังที่นี้"))


def test_lines_come_by_the_ratio_of_tokens_and_only_those_that_fit(toy: Toy) -> None:
    lines = ["b" * 40 + "a" * 36, "a" * 30, "b" * 40, "a" * 19, "a" * 121, "  " + "a" * 30 + " "]
    found = different_lines([toy("aa"), toy()], text("\n".join(lines), "a" * 31))
    assert [line["text"] for line in found] == ["a" * 30, "a" * 31, "b" * 40 + "a" * 36], (
        "each once, without its margins")
    assert [line["num_tokens"] for line in found] == [[15, 30], [16, 31], [58, 76]]
    assert found[0]["cuts"] == ["|".join(["aa"] * 15), "|".join("a" * 30)]


def test_no_more_than_a_page_shows(toy: Toy) -> None:
    words = " ".join(f"x{chr(ord('a') + i)}" for i in range(26))
    assert len(different_words([toy(*(f" x{chr(ord('a') + i)}" for i in range(26))), toy()],
                               text(words))) == command.NUM_WORDS
