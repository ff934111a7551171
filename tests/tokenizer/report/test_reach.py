"""Tokens that no text gives: what is tried, in which order, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenizer.report import command
from tokenizer.report.command import check_reach, check_used
from tokenizer.report.measures import NamedText, TokenizerMeasures

Toy = Callable[..., Any]
HEAD, TAIL = "안".encode()[:2], "안".encode()[1:]


def measured(opened: Any, name: str, *chunks: str) -> TokenizerMeasures:
    text = NamedText(name, name, list(chunks), True)
    ids = [i for chunk in chunks for i in opened.encode(chunk)]
    return TokenizerMeasures(text, np.bincount(ids, minlength=opened.vocab_size), 0)


def test_used_tokens_are_counted_over_all_texts(toy: Toy) -> None:
    opened = toy("the", "한", special=("<|end|>",))
    check = check_used(opened, [measured(opened, "en", "the the", "a" * 100), measured(opened, "ko", "한a")])
    assert check.numbers["num_never_used"] == 258 - len({"the", " ", "a", "한"})
    assert check.numbers["used_at_least"] == {1: 4, 10: 1, 100: 1}
    assert check.numbers["used_by_text"] == {"en": 3, "ko": 2} and check.numbers["num_bytes"] == 111
    assert check.verdict == "note" and check.summary.endswith("; more text would use more of them")


def test_what_was_not_seen_is_looked_for_and_found(toy: Toy) -> None:
    """A word, the beginning of a syllable, its end, and a syllable's end before a letter."""
    opened = toy("the", HEAD, TAIL + b"a")
    check = check_reach(opened, np.zeros(opened.vocab_size, np.bool_))
    assert check.numbers["num_unreachable"] == 0 and check.verdict == "good"
    assert check.summary.startswith("every token is given by some text; ")
    assert check.numbers["num_bytes_never_alone"] == 256 - len(command.NEVER_IN_UTF8), "nothing was seen"


def test_a_token_that_is_never_taken_is_explained_and_a_seen_one_is_believed(toy: Toy) -> None:
    opened = toy("the", "qu", " qu ")
    taken = opened.encode
    opened.encode_many = lambda texts: [[i for i in taken(text) if i != 257] for text in texts]
    seen = np.zeros(opened.vocab_size, np.bool_)
    check = check_reach(opened, seen)
    assert [u["token"] for u in check.numbers["unreachable"]] == ["qu"]
    assert (check.numbers["num_proven"], check.verdict) == (0, "bad"), "1 of 259 is more than is tolerated"
    assert "text is split inside it" in check.numbers["unreachable"][0]["reason"]
    opened.merged_alone = lambda id_: [ord("q"), ord("u")] if id_ == 257 else [id_]
    (found,) = check_reach(opened, seen).numbers["unreachable"]
    assert (found["becomes"], found["reason"]) == (["q", "u"], "its bytes merge to other tokens")
    seen[257] = True
    assert check_reach(opened, seen).numbers["num_unreachable"] == 0


def test_few_of_many_are_a_remark(toy: Toy) -> None:
    opened = toy("qu", *(f"w{i:05}" for i in range(2000)))
    taken = opened.encode
    opened.encode_many = lambda texts: [[i for i in taken(text) if i != 256] for text in texts]
    check = check_reach(opened, np.zeros(opened.vocab_size, np.bool_))
    assert (check.numbers["num_unreachable"], check.verdict) == (1, "note")


@pytest.mark.parametrize("token", [HEAD, TAIL, TAIL + b"t", b" " + HEAD, TAIL + " 가 ".encode() + HEAD])
def test_texts_that_are_tried_for_a_part_of_a_character_hold_its_bytes(token: bytes) -> None:
    (texts,) = command._completions({1: token}).values()
    if token == TAIL:  # the inside of a character: all of Unicode was tried for it
        assert texts == []
    else:
        assert 1 < len(texts) <= command.MAX_COMPLETIONS and all(token in text.encode() for text in texts)


@pytest.mark.parametrize(("left", "right"), [(3, 2), (1, 5), (70, 70), (0, 4)])
def test_pairs_of_surroundings_come_once_and_the_frequent_ones_first(left: int, right: int) -> None:
    before, after = [f"b{i}" for i in range(left)], [f"a{i}" for i in range(right)]
    pairs = command._mixed(before, after)
    assert len(pairs) == len(set(pairs)) == min(left * right, command.MAX_COMPLETIONS)
    sums = [int(b[1:]) + int(a[1:]) for b, a in pairs]
    assert sums == sorted(sums)


def test_every_text_of_a_token_is_tried_until_it_is_found() -> None:
    asked: list[list[str]] = []

    def encode_many(texts: list[str]) -> list[list[int]]:
        asked.append(texts)
        return [[{"b": 2, "z": 1}.get(text, 0)] for text in texts]

    opened: Any = SimpleNamespace(encode_many=encode_many)
    assert command._not_found(opened, {1: ["x", "y", "z"], 2: ["a", "b", "c"], 3: ["u"], 4: []}) == [4, 3]
    assert asked == [["x", "a", "u"], ["y", "b"], ["z"]]
