"""Defects planted in small tokenizers are found, and a sound one passes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import tiktoken

from tokenizer.formats.reader import Opened, open_tokenizer
from tokenizer.report import measures as scalars_module
from tokenizer.report.check import TokenizerCheck
from tokenizer.report.command import (
    CHECKS, check_all, check_digits, check_reach, check_whitespace, time_input, worst_inputs)
from tokenizer.report.measures import check_scalars, read_texts, try_scalars

Build = Callable[..., Path]
PAIRS = [("t", "h"), ("th", "e"), ("Ġ", "the")]
TRIED = 0x1000
"""Characters up to here are tried in most tests."""
HANGUL = [("ì", "ķ"), ("ìķ", "Ī")]  # EC 95 88: 안


def scalars(opened: Opened) -> TokenizerCheck:
    return check_scalars(try_scalars(opened, lambda done: None, TRIED))


def reach(opened: Opened) -> TokenizerCheck:
    return check_reach(opened, try_scalars(opened, lambda done: None, TRIED).seen)


@pytest.mark.deep
def test_a_sound_tokenizer_passes(build: Build, heldout: dict[str, Path],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Every twelfth block stands for all of Unicode, in all planes and with Hangul among them; that the
    blocks leave out nothing is proven in test_scalars.py."""
    every = scalars_module._blocks
    monkeypatch.setattr(scalars_module, "_blocks", lambda end: islice(every(end), 0, None, 12))
    opened = open_tokenizer(build(pairs=[*PAIRS, *HANGUL]))
    texts = read_texts([f"{name}={path}" for name, path in heldout.items()], 1)
    found = {c.name: c for c in check_all(opened, texts, skip=("worst",))}
    assert list(found) == [name for name in CHECKS if name != "worst"]
    assert [name for name, c in found.items() if c.verdict == "bad"] == []
    num_blocks = len(range(0, (0x110000 - 0x800) // 2048, 12))
    assert found["scalars"].numbers["num_tried"] == 2048 * num_blocks and found["scalars"].verdict == "good"


@pytest.mark.parametrize(("pairs", "split", "verdict", "single"), [
    (PAIRS, r"\p{L}+|\p{N}|\s+|.", "good", True),
    ([("1", "2"), ("12", "3")], r"\p{L}+|\p{N}+|\s+|.", "bad", False),
])
def test_merging_digits_are_found(build: Build, pairs: list[tuple[str, str]], split: str, verdict: str,
                                  single: bool) -> None:
    check = check_digits(open_tokenizer(build(pairs=pairs, split=split)))
    assert (check.verdict, check.numbers["single_digits"]) == (verdict, single)
    assert check.numbers["num_multi_digit_tokens"] == (0 if single else 2)
    if not single:
        assert (check.numbers["shapes"]["3"].keys() >= {"3", "1+1+1"}
                and check.numbers["shapes"]["3"]["3"] == "123")


def test_regular_groups_of_digits_are_no_defect(build: Build) -> None:
    digits = "0123456789"
    pairs = [(a, b) for a in digits for b in digits]
    check = check_digits(open_tokenizer(build(pairs=pairs, split=r"\p{L}+|\p{N}{1,2}|\s+|.")))
    assert (check.verdict == "note" and check.numbers["regular"]
            and check.numbers["shapes"]["5"].keys() == {"2+2+1"})


def test_unreachable_tokens_are_found_and_explained(build: Build) -> None:
    """`her` is spelled by merges that `the` always prevents; `q z` is cut by the split pattern;
    `qu` has no merge at all."""
    opened = open_tokenizer(build(pairs=[("h", "e"), ("e", "r"), ("h", "er"), ("Ġ", "z"), ("q", "Ġz")],
                                  extra=("qu",)))
    check = reach(opened)
    found = {u["token"]: u for u in check.numbers["unreachable"]}
    assert found.keys() == {"her", "q␣z", "qu"}
    assert (found["her"]["becomes"] == ["he", "r"]
            and found["her"]["reason"] == "its bytes merge to other tokens")
    assert found["qu"]["becomes"] == ["q", "u"]
    assert "text is split inside it" in found["q␣z"]["reason"]
    assert check.verdict == "bad"


def test_dear_indentation_is_told(build: Build) -> None:
    four = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("ĠĠĠĠ", "ĠĠĠĠ")]
    plain, good = (check_whitespace(open_tokenizer(build(f"{len(p)}", pairs=p))) for p in ([], four))
    assert plain.verdict == "note" and good.numbers["longest_spaces"] == 8
    assert plain.numbers["tokens_more_for_spaces"][:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert good.numbers["tokens_more_for_spaces"][:9] == [1, 1, 2, 1, 2, 2, 3, 1, 2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def b64(token: bytes) -> str:
    return base64.b64encode(token).decode()


def test_what_the_library_cannot_do_is_told_and_not_raised(tmp_path: Path) -> None:
    """tiktoken's regular expressions give up on long runs that they have to go back in."""
    ranks = write(tmp_path / "bytes.tiktoken", "".join(f"{b64(bytes([b]))} {b}\n" for b in range(256)))
    write(tmp_path / "bytes.tiktoken.json",
          json.dumps({"pat_str": r"\s+(?!\S)|\s+|\S+", "special_tokens": {}}))
    opened = open_tokenizer(ranks)
    with pytest.raises(BaseException):  # noqa: B017  (a panic of the binding is no Exception)
        tiktoken.Encoding("x", pat_str=r"\s+(?!\S)|\s+|\S+", special_tokens={}, mergeable_ranks={
            bytes([b]): b for b in range(256)}).encode_ordinary(" " * 1_000_000 + "x")
    found = time_input(opened, " ")
    assert " bytes: " in found.error and len(found.times_s) < 4


def test_every_input_is_long_enough() -> None:
    assert all(worst_inputs().values()) and len(worst_inputs()["base64"]) == 1_000_000
