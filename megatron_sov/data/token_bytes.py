"""How many bytes of text each token stands for: what turns nats per token into bits per byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.data.vocabulary import read_tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """Return [vocab_size] int64: UTF-8 bytes of each token; 0 for special and unused ids.

    In a byte-level vocabulary every character of a token's name stands for one byte.  In one of sentencepiece
    a mark stands for a space and ``<0x0A>`` for a byte; the space that it puts before a text counts too.
    Added tokens are spelled as they are.

    Raises:
        UserError: the tokenizer.json cannot be read.
    """
    file = read_tokenizer(tokenizer)
    size_bytes = _spelling(file.parts)
    sizes = np.zeros(vocab_size, np.int64)
    for token, name in file.ordinary.items():
        if 0 <= token < vocab_size:
            sizes[token] = size_bytes(name)
    for token, text in file.added_texts.items():
        if 0 <= token < vocab_size:
            sizes[token] = len(text.encode())
    return sizes


def _spelling(parts: list[dict[str, Any]]) -> Callable[[str], int]:
    """Return what gives the bytes that a token's name stands for."""
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return len
    spaces = {part.get("replacement") for part in parts if part.get("type") == "Metaspace"} | {
        part["pattern"].get("String") for part in parts
        if part.get("type") == "Replace" and part.get("content") == " " and isinstance(part["pattern"], dict)}
    marks = [mark for mark in spaces if isinstance(mark, str) and mark]

    def size_bytes(name: str) -> int:
        if "ByteFallback" in kinds and _BYTE.fullmatch(name):
            return 1
        for mark in marks:
            name = name.replace(mark, " ")
        return len(name.encode())

    return size_bytes
