"""What bytes of text each token stands for, and how many: what turns nats per token into bits per byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from megatron_sov.chat.vocabulary import read_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def count_token_bytes(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """Return [vocab_size] int64: UTF-8 bytes of each token; 0 for special and unused ids.

    Raises:
        UserError: the tokenizer.json cannot be read.
    """
    return np.array([len(text) for text in read_token_bytes(tokenizer, vocab_size)], np.int64)


def read_token_bytes(tokenizer: Path, vocab_size: int) -> list[bytes]:
    """Return the bytes of text that each token stands for; none for special and unused ids.

    In a byte-level vocabulary every character of a token's name stands for one byte.  In one of sentencepiece
    a mark stands for a space and ``<0x0A>`` for a byte; the space that it puts before a text counts too.
    Added tokens are spelled as they are.

    Raises:
        UserError: the tokenizer.json cannot be read.
    """
    file = read_tokenizer(tokenizer)
    spelled = _spelling(file.parts)
    found = [b""] * vocab_size
    for token, name in file.ordinary.items():
        if 0 <= token < vocab_size:
            found[token] = spelled(name)
    for token, added in file.added.items():
        if 0 <= token < vocab_size and not added.get("special"):
            found[token] = added["content"].encode()
    return found


def _spelling(parts: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """Return what gives the bytes that a token's name stands for."""
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        byte_of = byte_alphabet()
        # a character that is none of the 256 is a damaged name, whose length still is what it takes up
        return lambda name: bytes(byte_of.get(character, 0) for character in name)
    spaces = {part.get("replacement") for part in parts if part.get("type") == "Metaspace"} | {
        part["pattern"].get("String") for part in parts
        if part.get("type") == "Replace" and part.get("content") == " " and isinstance(part["pattern"], dict)}
    marks = [mark for mark in spaces if isinstance(mark, str) and mark]

    def spelled(name: str) -> bytes:
        # before the marks: the name of a byte holds none, and must not be read as text
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for mark in marks:
            name = name.replace(mark, " ")
        return name.encode()

    return spelled
