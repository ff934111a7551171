"""Defects planted in small tokenizers are found, and a sound one passes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from tokenizer.formats.reader import Opened, Tiktoken, open_tokenizer
from tokenizer.report import measures as scalars_module
from tokenizer.report.check import TokenizerCheck
from tokenizer.report.command import (
    CHECKS, Timed, check_all, check_digits, check_neutral, check_reach, check_used, check_whitespace,
    time_input, worst_inputs)
from tokenizer.report.measures import (
    check_determinism, check_inventory, check_scalars, check_scripts, check_streaming, check_superwords,
    measure, num_blocks, read_texts, try_scalars)

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


def test_unicode_is_tried_in_as_many_blocks_as_told(build: Build) -> None:
    told: list[int] = []
    found = try_scalars(open_tokenizer(build()), told.append, 5000)
    assert len(told) == 3 and found.num_tried == 5000 and num_blocks() == (0x110000 - 0x800) // 2048


def test_a_lost_character_is_named(build: Build, dropping: Any) -> None:
    check = scalars(open_tokenizer(build(normalizer=dropping)))
    assert check.verdict == "bad" and check.numbers["lost"] == ["U+00DF"]


def test_a_missing_byte_loses_what_needs_it(build: Build) -> None:
    check = scalars(open_tokenizer(build(without="Q")))
    assert check.verdict == "bad" and check.numbers["lost"] == ["U+0051"]


def test_composition_is_told_but_no_loss(build: Build, nfc: Any) -> None:
    check = scalars(open_tokenizer(build(normalizer=nfc)))
    assert check.verdict == "note" and check.numbers["num_lost"] == 0
    # grave and acute tone marks have other spellings
    assert {"U+0340", "U+0341"} <= set(check.numbers["normalized"])


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


def test_parts_of_characters_are_completed(build: Build) -> None:
    """A space and the first two bytes of Hangul, the last byte and a space:
    both need characters around them."""
    across = [("Ġ", "ì"), ("Ġì", "ķ"), ("Ī", "t")]
    opened = open_tokenizer(build(pairs=across, split=r"[\s\S]+"))
    check = reach(opened)
    assert check.numbers["num_unreachable"] == 0
    assert check_inventory(opened).numbers["num_parts_of_characters"] == 3


@pytest.mark.parametrize(("words", "verdict"), [
    ({"special": ("<|end|>",)}, "good"), ({"special": (), "added": ("<|end|>",)}, "bad"),
    ({"special": (), "added": ("    ",)}, "good")])
def test_special_tokens_that_users_can_write_are_found(build: Build, words: dict[str, Any],
                                                       verdict: str) -> None:
    check = check_neutral(open_tokenizer(build(**words)))
    assert check.verdict == verdict
    assert check.numbers["become_ids_in_text"] == (["<|end|>"] if verdict == "bad" else [])


def test_superwords_are_counted(build: Build) -> None:
    opened = open_tokenizer(build(pairs=[*PAIRS, ("a", "Ġthe"), ("aĠthe", "Ġthe")],
                                  split=r"[\p{L} ]+|\p{N}|\s+|."))
    numbers = check_superwords(opened).numbers
    assert (numbers["num_superwords"], numbers["by_num_words"], numbers["longest"][0]) == (
        2, {2: 1, 3: 1}, "a␣the␣the")


def test_dear_indentation_is_told(build: Build) -> None:
    four = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("ĠĠĠĠ", "ĠĠĠĠ")]
    plain, good = (check_whitespace(open_tokenizer(build(f"{len(p)}", pairs=p))) for p in ([], four))
    assert plain.verdict == "note" and good.numbers["longest_spaces"] == 8
    assert plain.numbers["tokens_more_for_spaces"][:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert good.numbers["tokens_more_for_spaces"][:9] == [1, 1, 2, 1, 2, 2, 3, 1, 2]


def test_decomposed_korean_is_dear_unless_it_is_composed(build: Build, nfc: Any) -> None:
    plain, composed = (check_scripts(open_tokenizer(build(f"{n is None}", normalizer=n)))
                       for n in (None, nfc))
    assert (plain.numbers["decomposed_over_composed"] > 1.5
            and composed.numbers["decomposed_over_composed"] == 1)
    assert composed.verdict == "note" and "Hangul: decomposed (NFD)" in composed.numbers["equivalent"]
    assert plain.numbers["hangul_syllables_by_tokens"] == {"3": 11172} and plain.numbers["lost"] == []


def test_streaming_takes_back_what_longer_tokens_swallow(build: Build) -> None:
    opened = open_tokenizer(build(pairs=[("a", "b"), ("c", "d"), ("ab", "cd")]))
    texts = read_texts([str(write(Path(opened.path) / "t.txt", "abcd"))], 1)
    check = check_streaming(opened, texts)
    # a -> ab takes back 1, ab c takes back none, ab c -> abcd takes back both
    assert check.numbers["texts"]["t"] == {"num_chars": 4, "num_tokens": 1, "most_taken_back": 2,
                                           "mean_taken_back": 1.0, "prefixes_decode": True}
    assert check_determinism(opened, texts).verdict == "good"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class Forgetful(Tiktoken):
    """Gives other ids the second time."""

    def __init__(self, opened: Opened) -> None:
        self.__dict__.update(opened.__dict__)
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [self.calls % 2] * len(text)


def test_chance_is_found(tmp_path: Path) -> None:
    ranks = tmp_path / "bytes.tiktoken"
    write(ranks, "".join(f"{b64(bytes([b]))} {b}\n" for b in range(256)))
    rules = {"pat_str": r"\p{L}+|\s+|[^\p{L}\s]+", "special_tokens": {"<|end|>": 256}}
    write(tmp_path / "bytes.tiktoken.json", json.dumps(rules))
    opened = open_tokenizer(ranks)
    assert check_determinism(opened, []).verdict == "good"
    assert check_determinism(Forgetful(opened), []).verdict == "bad"


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


def test_never_used_tokens_against_plain_counting(build: Build, heldout: dict[str, Path]) -> None:
    opened = open_tokenizer(build())
    texts = read_texts([str(path) for path in heldout.values()], 1)
    check = check_used(opened, [measure(opened, text) for text in texts])
    used = {i for text in texts for chunk in text.chunks for i in opened.encode(chunk)}
    assert check.numbers["num_never_used"] == len(opened.tokens.keys() - used)


def test_a_busy_moment_is_not_taken_for_growth() -> None:
    held_up, calm = Timed([1, 4], [1.0, 16.0], 9, ""), Timed([1, 4], [1.1, 4.0], 9, "")
    assert (held_up.exponent == 2 and held_up.fastest(calm).times_s == [1.0, 4.0]
            and held_up.fastest(calm).exponent == 1)


def test_every_input_is_long_enough() -> None:
    assert all(worst_inputs().values()) and len(worst_inputs()["base64"]) == 1_000_000
