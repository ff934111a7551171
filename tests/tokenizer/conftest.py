"""Small tokenizers made merge by merge, so that a test can plant a defect in one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
GAP = "Ġ"  # a space in the byte-level alphabet
PAIRS = [("t", "h"), ("th", "e"), (GAP, "the"), (GAP, "a"), ("i", "n"), ("o", "n"), ("e", "r")]

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that writes a byte-level BPE tokenizer.json and returns its path."""

    def write(name: str = "plain", *, pairs: list[tuple[str, str]] = PAIRS, extra: tuple[str, ...] = (), split: str = SPLIT,
              without: str = "", special: tuple[str, ...] = ("<|end|>",), added: tuple[str, ...] = (),
              normalizer: Any = None) -> Path:
        alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
        tokens = [*alphabet, *(a + b for a, b in pairs), *extra]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        return tmp_path / name

    return write


@pytest.fixture
def heldout(tmp_path: Path) -> dict[str, Path]:
    """Return small held-out texts by name."""
    english = ["The other man in there was on the train.", "a theme, then another in 2026", "x\n\n    y = 10"]
    (tmp_path / "english.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in english), encoding="utf-8")
    (tmp_path / "thai.txt").write_text("กำลังที่นี้ผู้ใหญ่เก็บน้ำผึ้ง", encoding="utf-8")
    return {"english": tmp_path / "english.jsonl", "thai": tmp_path / "thai.txt"}


@pytest.fixture
def nfc() -> Any:
    """Return the normalizer to composed form."""
    return normalizers.NFC()


@pytest.fixture
def dropping() -> Any:
    """Return a normalizer that loses a character."""
    return normalizers.Replace("ß", "")
