"""UTF-8 bytes per token, which convert nats per token to bits per byte."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from megatron_sov.chat.vocabulary import read_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def count_token_bytes(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """Return [vocab_size] int64: number of UTF-8 bytes per token; 0 for special and unused ids.

    Raises `UserError` if `tokenizer.json` cannot be read."""
    return np.array([len(text) for text in read_token_bytes(tokenizer, vocab_size)], np.int64)


def read_token_bytes(tokenizer: Path, vocab_size: int) -> list[bytes]:
    """Return each token's text as UTF-8 bytes; b"" for special and unused ids.

    In a byte-level vocabulary, every character of a token's name is one byte. In a sentencepiece vocabulary,
    a mark is a space and ``<0x0A>`` a byte; the space inserted before a text counts, too. Added tokens are
    literal text. Raises `UserError` if `tokenizer.json` cannot be read."""
    file = read_tokenizer(tokenizer)
    to_bytes = _build_name_decoder(file.parts)
    texts = [b""] * vocab_size
    for token, name in file.ordinary.items():
        if 0 <= token < vocab_size:
            texts[token] = to_bytes(name)
    for token, added in file.added.items():
        if 0 <= token < vocab_size and not added.get("special"):
            texts[token] = added["content"].encode()
    return texts


def _build_name_decoder(parts: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """Return a function that converts a token's name to bytes."""
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        byte_values = byte_alphabet()
        # a character outside the alphabet is damage and becomes a zero byte
        return lambda name: bytes(byte_values.get(character, 0) for character in name)
    spaces = set()
    for part in parts:
        if part.get("type") == "Metaspace":
            spaces.add(part.get("replacement"))
        elif (part.get("type") == "Replace" and part.get("content") == " "
              and isinstance(part["pattern"], dict)):
            spaces.add(part["pattern"].get("String"))
    marks = [mark for mark in spaces if isinstance(mark, str) and mark]

    def decode_name(name: str) -> bytes:
        # before the marks, because the name of a byte has no mark and is not text
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for mark in marks:
            name = name.replace(mark, " ")
        return name.encode()

    return decode_name
