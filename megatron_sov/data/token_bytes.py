"""How many bytes of text each token stands for: what turns nats per token into bits per byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_sov.errors import UserError


def token_bytes(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """Return [vocab_size] int64: UTF-8 bytes of each token of a byte-level BPE tokenizer; 0 for special and unused ids.

    In a byte-level vocabulary every character of a token's name stands for one byte.
    """
    file = tokenizer / "tokenizer.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        vocabulary, added = raw["model"]["vocab"], raw.get("added_tokens", [])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e})") from None
    sizes = np.zeros(vocab_size, np.int64)
    for name, token in vocabulary.items():
        if token < vocab_size:
            sizes[token] = len(name)
    for token in added:
        if token["id"] < vocab_size:
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return sizes
