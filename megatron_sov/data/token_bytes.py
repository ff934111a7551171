"""How many bytes of text each token stands for: what turns nats per token into bits per byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_sov.data.vocabulary import read_added_texts, read_vocabulary


def token_bytes(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """Return [vocab_size] int64: UTF-8 bytes of each token of a byte-level BPE tokenizer;
    0 for special and unused ids.

    In a byte-level vocabulary every character of a token's name stands for one byte;
    added tokens are spelled as they are.
    """
    sizes = np.zeros(vocab_size, np.int64)
    for token, name in read_vocabulary(tokenizer).items():
        if token < vocab_size:
            sizes[token] = len(name)
    for token, text in read_added_texts(tokenizer).items():
        if token < vocab_size:
            sizes[token] = len(text.encode())
    return sizes
