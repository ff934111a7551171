"""The fast encoder: equal to `tokenizers` on all of Unicode, and left aside wherever it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.encode import LONGEST_WHITESPACE_CHARS, FastBpe, load_fast


def opened(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


Pair = tuple[FastBpe, Tokenizer]


@pytest.fixture(scope="module", params=["solar-open", "k-exaone"])
def file(request: pytest.FixtureRequest, tokenizers: dict[str, Path]) -> Path:
    return tokenizers[request.param] / "tokenizer.json"


@pytest.fixture(scope="module")
def pair(file: Path) -> Pair:
    return FastBpe(file, opened(file)), opened(file)


def test_every_kind_of_character_gives_the_same_ids(pair: Pair) -> None:
    fast, tokenizer = pair
    planes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 17)]
    blocks = ["x".join(map(chr, planes[i : i + 4096])) for i in range(0, len(planes), 4096)]
    for block, encoding in zip(blocks, tokenizer.encode_batch_fast(blocks, add_special_tokens=False),
                               strict=True):
        assert fast.encode(block) == encoding.ids, f"from U+{ord(block[0]):04X}"


AWKWARD = "ab'sS 가\u1100\u1161\u0301\n\r\t1/\u3000\u017f<|end|>"


@settings(max_examples=300)
@given(text=st.one_of(st.text(max_size=200), st.text(alphabet=AWKWARD, max_size=200)))
def test_drawn_text_gives_the_same_ids(pair: Pair, text: str) -> None:
    fast, tokenizer = pair
    assert fast.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "\u3000", "a", "가", "!"])
def test_a_very_long_run_is_no_problem(pair: Pair, unit: str) -> None:
    fast, tokenizer = pair
    text = f"x{unit * (200_000 // len(unit))}y"
    assert fast.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_the_longest_whitespace_left_to_tiktoken_is_within_its_stack(pair: Pair) -> None:
    fast, tokenizer = pair
    for unit in (" ", "\n", "\u3000", " \n", "\t"):
        text = "x" + (unit * LONGEST_WHITESPACE_CHARS)[: LONGEST_WHITESPACE_CHARS - 1] + "y"
        assert fast.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copy(source, target)
    raw = json.loads(target.read_text())
    edit(raw)
    target.write_text(json.dumps(raw))
    return target


def swap_merges(raw: dict[str, Any]) -> None:
    merges = raw["model"]["merges"]
    merges[0], merges[5] = merges[5], merges[0]


def unmatched_text(raw: dict[str, Any]) -> None:
    """Leave text unmatched, which `tokenizers` keeps and tiktoken drops."""
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a+"


@pytest.mark.parametrize(("edit", "reason"), [
    (swap_merges, "do not rise with its merges"),
    (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "normalizer is Lowercase"),
    (lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
                                           "trim_offsets": True, "use_regex": True}),
     "not a split followed by bytes"),
    (lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
     "a regular expression that isolates"),
    (lambda raw: raw["added_tokens"][5].update(special=False), "is matched in ordinary text"),
    (lambda raw: raw["model"].update(dropout=0.1), "not plain byte-level BPE"),
    (lambda raw: raw["model"]["vocab"].update({"zqzqzq": 384}), "not 256 bytes and one token for each merge"),
    (unmatched_text, "tiktoken differs on"),
])
def test_what_tiktoken_cannot_express_is_left_to_tokenizers(tokenizers: dict[str, Path], tmp_path: Path,
                                                            edit: Callable[[dict[str, Any]], Any],
                                                            reason: str) -> None:
    file = edited(tokenizers["solar-open"] / "tokenizer.json", tmp_path / "tokenizer.json", edit)
    fast, sentence = load_fast(file, opened(file), ["some text"])
    assert fast is None and sentence.startswith("encoding with tokenizers, because") and reason in sentence


def test_a_sound_tokenizer_is_expressed(file: Path) -> None:
    fast, sentence = load_fast(file, opened(file), ["some text", "한국어"])
    assert fast is not None and sentence.startswith("encoding with tiktoken: the same ids")
