"""Checks of a tokenizer's report, with planted defects: special tokens, used tokens, digits, white space."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenizer.formats.reader import open_tokenizer
from tokenizer.report import measures as scalars_module
from tokenizer.report.check import format_token, format_tokens, is_text
from tokenizer.report.command import (
    CHECKS, check_all, check_digits, check_neutral, check_used, check_whitespace)
from tokenizer.report.measures import NamedText, TokenizerMeasures, read_texts


@pytest.mark.each(("token", "text"), [
    (b" the", "␣the"), ("한국".encode(), "한국"), (b"\n\t\x00", r"\n\t\x00"),
    ("안".encode()[:2], r"\xec\x95"), (" a b ", "␣a␣b␣"), ("\u00a0\u200b", r"\xa0\u200b"), (b"", "")])
def test_spaces_controls_and_partial_characters_are_detected(token: bytes | str, text: str) -> None:
    assert format_token(token) == text


def test_a_cut_text_has_bars_between_its_tokens() -> None:
    assert format_tokens([b"The", b" q", b"u", b"\n"]) == r"The|␣q|u|\n" and format_tokens([]) == ""


@pytest.mark.each(("token", "is_complete"), [
    (b"abc", True), ("가".encode(), True), ("가".encode()[1:], False), (b"\xff", False)])
def test_complete_characters_are_text(token: bytes, is_complete: bool) -> None:
    assert is_text(token) == is_complete


Toy = Callable[..., Any]
SPECIAL = ("<|end|>", "[UNK]", "pad")


def test_special_tokens_in_text_are_text_or_reported(toy: Toy) -> None:
    check = check_neutral(toy(special=SPECIAL))
    assert check.verdict == "good"
    assert check.numbers == {"num_tried": 3, "become_ids_in_text": [], "not_given_back": [],
                             "num_ids_where_special_is_read": 3}
    assert check.summary.startswith("3 special tokens tried in text: encoded as ordinary text "
                                    "(split_special_tokens=True in transformers) all stay text")
    assert "3 become ids, so never encode users' text that way" in check.summary


def test_a_special_token_matched_only_between_letters_is_detected(toy: Toy) -> None:
    opened = toy(special=SPECIAL)
    plain = opened.encode
    opened.encode = lambda text: opened.encode_special(text) if text == "a[UNK]b" else plain(text)
    check = check_neutral(opened)
    assert check.verdict == "bad" and check.numbers["become_ids_in_text"] == ["[UNK]"]
    assert check.tables[0].rows[0][0] == "[UNK]" and check.tables[0].rows[0][-1] == "becomes its id"


def test_a_special_token_lost_in_decoding_is_a_defect(toy: Toy) -> None:
    check = check_neutral(toy(special=SPECIAL, change=lambda text: text.replace("pad", "")))
    assert check.verdict == "bad"
    assert check.numbers["not_given_back"] == ["pad"] and "; 1 are not returned" in check.summary


@pytest.mark.parametrize(("added", "tried"),
                         [("<tool>", True), ("{x}", True), ("    ", False), ("<br", False)])
def test_added_tokens_count_where_they_look_like_control(toy: Toy, added: str, tried: bool) -> None:
    opened = toy()
    opened.added = {300: added}
    assert check_neutral(opened).numbers["num_tried"] == tried


def build_measures(opened: Any, name: str, *chunks: str) -> TokenizerMeasures:
    text = NamedText(name, name, list(chunks), True)
    ids = [i for chunk in chunks for i in opened.encode(chunk)]
    return TokenizerMeasures(text, np.bincount(ids, minlength=opened.vocab_size), 0)


def test_used_tokens_are_counted_over_all_texts(toy: Toy) -> None:
    opened = toy("the", "한", special=("<|end|>",))
    check = check_used(opened, [build_measures(opened, "en", "the the", "a" * 100),
                                build_measures(opened, "ko", "한a")])
    assert check.numbers["num_never_used"] == 258 - len({"the", " ", "a", "한"})
    assert check.numbers["used_at_least"] == {1: 4, 10: 1, 100: 1}
    assert check.numbers["used_by_text"] == {"en": 3, "ko": 2} and check.numbers["num_bytes"] == 111
    assert check.verdict == "note" and check.summary.endswith("; more text would use more of them")


Build = Callable[..., Path]
PAIRS = [("t", "h"), ("th", "e"), ("Ġ", "the")]
HANGUL = [("ì", "ķ"), ("ìķ", "Ī")]  # EC 95 88: 안


@pytest.mark.deep
def test_a_sound_tokenizer_passes(build: Build, heldout: dict[str, Path],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries every twelfth block of Unicode, in all planes and Hangul; another test checks all blocks."""
    every = scalars_module._iter_blocks
    monkeypatch.setattr(scalars_module, "_iter_blocks", lambda end: islice(every(end), 0, None, 12))
    opened = open_tokenizer(build(pairs=[*PAIRS, *HANGUL]))
    texts = read_texts([f"{name}={path}" for name, path in heldout.items()], 1)
    found = {c.name: c for c in check_all(opened, texts)}
    assert tuple(found) == CHECKS
    assert [c.name for c in check_all(opened, [], skip=("scalars", "neutral"))] == [
        "inventory", "superwords", "digits", "whitespace"]
    assert [name for name, c in found.items() if c.verdict == "bad"] == []
    num_blocks = len(range(0, (0x110000 - 0x800) // 2048, 12))
    assert found["scalars"].numbers["num_tried"] == 2048 * num_blocks and found["scalars"].verdict == "good"


@pytest.mark.parametrize(("pairs", "split", "verdict", "single"), [
    (PAIRS, r"\p{L}+|\p{N}|\s+|.", "good", True),
    ([("1", "2"), ("12", "3")], r"\p{L}+|\p{N}+|\s+|.", "bad", False),
])
def test_merged_digits_are_detected(build: Build, pairs: list[tuple[str, str]], split: str, verdict: str,
                                    single: bool) -> None:
    check = check_digits(open_tokenizer(build(pairs=pairs, split=split)))
    assert (check.verdict, check.numbers["single_digits"]) == (verdict, single)
    assert check.numbers["num_multi_digit_tokens"] == (0 if single else 2)
    if not single:
        shapes = check.numbers["shapes"]["3"]
        assert shapes.keys() >= {"3", "1+1+1"} and shapes["3"] == "123"


def test_regular_groups_of_digits_are_accepted(build: Build) -> None:
    digits = "0123456789"
    pairs = [(a, b) for a in digits for b in digits]
    check = check_digits(open_tokenizer(build(pairs=pairs, split=r"\p{L}+|\p{N}{1,2}|\s+|.")))
    assert check.verdict == "note" and check.numbers["regular"]
    assert check.numbers["shapes"]["5"].keys() == {"2+2+1"}


def test_expensive_indentation_is_reported(build: Build) -> None:
    four = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("ĠĠĠĠ", "ĠĠĠĠ")]
    plain, good = (check_whitespace(open_tokenizer(build(f"{len(p)}", pairs=p))) for p in ([], four))
    assert plain.verdict == "note" and good.numbers["longest_spaces"] == 8
    assert plain.numbers["tokens_more_for_spaces"][:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert good.numbers["tokens_more_for_spaces"][:9] == [1, 1, 2, 1, 2, 2, 3, 1, 2]
