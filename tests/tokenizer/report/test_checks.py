"""Checks of a tokenizer: special tokens, tokens that no text gives, slow inputs, planted defects."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken

from tokenizer.formats.reader import Opened, open_tokenizer
from tokenizer.report import command, measures as scalars_module
from tokenizer.report.check import TokenizerCheck, cut, is_text, shown
from tokenizer.report.command import (
    CHECKS, LIMIT_S, MEASURABLE_S, Timed, check_all, check_digits, check_neutral, check_reach, check_used,
    check_whitespace, check_worst, time_input, worst_inputs)
from tokenizer.report.measures import NamedText, TokenizerMeasures, check_scalars, read_texts, try_scalars


@pytest.mark.parametrize(("token", "text"), [
    (b" the", "␣the"), ("한국".encode(), "한국"), (b"\n\t\x00", r"\n\t\x00"),
    ("안".encode()[:2], r"\xec\x95"), (" a b ", "␣a␣b␣"), ("\u00a0\u200b", r"\xa0\u200b"), (b"", "")])
def test_spaces_controls_and_parts_of_characters_are_seen(token: bytes | str, text: str) -> None:
    assert shown(token) == text


def test_a_cut_text_has_bars_between_its_tokens() -> None:
    assert cut([b"The", b" q", b"u", b"\n"]) == r"The|␣q|u|\n" and cut([]) == ""


@pytest.mark.parametrize(("token", "whole"), [(b"abc", True), ("가".encode(), True),
                                              ("가".encode()[1:], False), (b"\xff", False)])
def test_whole_characters_are_text(token: bytes, whole: bool) -> None:
    assert is_text(token) == whole


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


Costs = Callable[[str], float]


class Timer:
    """Gives every text as many tokens as letters, and takes the time that a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.costs_s, self.sizes = 0.0, (lambda text: 0.0), list[int]()
        monkeypatch.setattr(command, "SIZE_BYTES", 10_000)  # of the noise
        monkeypatch.setattr(command, "time", SimpleNamespace(process_time=lambda: self.now_s))

    def encode(self, text: str) -> list[int]:
        self.sizes.append(len(text.encode()))
        self.now_s += self.costs_s(text)
        return [0] * len(text)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Any:
    return Timer(monkeypatch)


def test_sizes_grow_fourfold_up_to_the_asked_one_and_characters_stay_whole(timer: Any) -> None:
    timer.costs_s = lambda text: 1e-6 * len(text.encode())
    found = time_input(timer, "가나", 64_000)
    assert found.sizes_bytes == timer.sizes == [999, 3_999, 15_999, 63_999]
    assert found.times_s == pytest.approx([1e-6 * size for size in found.sizes_bytes])
    assert found.num_tokens == 21_333 and found.error == ""


@pytest.mark.parametrize(("power", "scale_s"), [(1.0, 1e-6), (2.0, 1e-11), (1.5, 1e-8)])
def test_the_power_of_growth_is_found(power: float, scale_s: float, timer: Any) -> None:
    timer.costs_s = lambda text: scale_s * len(text) ** power
    assert time_input(timer, "a").exponent == pytest.approx(power, abs=1e-6)


def test_short_times_say_nothing_and_one_size_neither() -> None:
    assert Timed([1, 4], [0.01, MEASURABLE_S * 0.9], 1, "").exponent is None
    assert Timed([4], [10.0], 1, "").exponent is None
    assert Timed([1_000_000], [2.0], 1, "").mb_per_s == 0.5


def test_a_size_that_would_take_too_long_is_not_tried(timer: Any) -> None:
    timer.costs_s = lambda text: LIMIT_S / 10 * (len(text) / 62_500) ** 2  # 2 s for 1/16: 1/4 may take 32 s
    found = time_input(timer, "a", 1_000_000)
    assert found.sizes_bytes == [15_625, 62_500] and found.exponent == pytest.approx(2)


def test_what_the_library_says_where_it_gives_up_is_kept_and_the_readers_ctrl_c_is_not(timer: Any) -> None:
    class Panic(BaseException):
        pass

    def wants_rollback(text: str) -> float:
        if len(text) > 500_000:
            raise timer.problem
        return 1.0

    timer.costs_s, timer.problem = wants_rollback, Panic("stack\n  overflow")
    found = time_input(timer, "a")
    assert found.error == "Panic at 1,000,000 bytes: stack overflow" and len(found.times_s) == 3
    timer.problem = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        time_input(timer, "a")


def check(timer: Any, costs_s: Costs) -> Any:
    timer.costs_s = costs_s
    told: list[int] = []
    found = check_worst(timer, told.append, 10_000)
    assert told == [1] * len(worst_inputs()) and list(found.numbers["inputs"]) == list(worst_inputs())
    return found


def test_linear_time_is_good_and_the_slowest_input_is_named(timer: Any) -> None:
    found = check(timer, lambda text: 1e-4 * len(text.encode()) * (2 if "7" in text[:1] else 1))
    assert found.verdict == "good"
    assert found.summary == "slowest: digits, 0.01 MB per CPU second; time grows with the text"


def test_steep_growth_is_bad_once_it_came_twice(timer: Any) -> None:
    steep = check(timer, lambda text: 1e-7 * len(text) ** 2 if text[0] == "!" else 1e-4 * len(text.encode()))
    assert steep.verdict == "bad" and "time grows faster than the text for punctuation" in steep.summary
    seen: list[int] = []

    def held_up(text: str) -> float:
        """Take ten times as long for the largest size of punctuation, the first time only."""
        if text[0] == "!" and len(text) == 10_000:
            seen.append(len(text))
        return 1e-4 * len(text.encode()) * (10 if len(seen) == 1 and text[0] == "!" and len(text) == 10_000
                                            else 1)

    assert check(timer, held_up).verdict == "good" and len(seen) == 2


def test_what_fails_and_what_stopped_early_is_bad(timer: Any) -> None:
    def costs_s(text: str) -> float:
        if text[0] == "\t":
            raise RuntimeError("no tabs")
        return LIMIT_S if text[0] == " " else 0.001

    found = check(timer, costs_s)
    assert found.verdict == "bad"
    assert found.summary.endswith("; stopped early: spaces; fails on tabs")
    rows = {row[0]: row for row in found.tables[0].rows}
    assert rows["tabs"] == ["tabs", "–", "0", "–", "–", "RuntimeError at 156 bytes: no tabs"]


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
    blocks leave out nothing is proven by another test."""
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
