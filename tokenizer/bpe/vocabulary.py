"""What is learned: tokens as bytes, and merges in their order.

Ids here count from 0 without the special tokens: first the 256 bytes, in the order of their characters in the
byte-level alphabet (as `tokenizers` numbers them), then one id for each merge.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from numpy.typing import NDArray

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from tokenizer.presets import NUM_BYTES

if TYPE_CHECKING:  # imports numba
    from tokenizer.bpe.trainer import Merge

_JOINED = re.compile(rb"[A-Za-z\x80-\xff] [A-Za-z\x80-\xff]")


@cache
def _map_bytes_to_characters() -> dict[int, str]:
    """Return the character of each byte, which is also a table for `str.translate`."""
    return {byte: character for character, byte in byte_alphabet().items()}


@cache
def get_byte_ids() -> NDArray[np.uint8]:
    """Return the id of each byte, [256]."""
    characters = _map_bytes_to_characters()
    ids = np.empty(NUM_BYTES, np.uint8)
    ids[sorted(range(NUM_BYTES), key=lambda b: characters[b])] = np.arange(NUM_BYTES)
    return ids


def spell_token(token: bytes) -> str:
    """Return a token as tokenizer.json spells it."""
    return token.decode("latin-1").translate(_map_bytes_to_characters())


class Vocabulary:
    """Tokens and merges as they are learned.

    >>> vocabulary = Vocabulary(max_token_bytes=64)
    >>> len(vocabulary.tokens), vocabulary.merges
    (256, [])
    """

    def __init__(self, max_token_bytes: int) -> None:
        """`max_token_bytes`: no token is longer."""
        self.tokens: list[bytes] = [
            b for _, b in sorted((int(i), bytes([b])) for b, i in enumerate(get_byte_ids()))]
        self.merges: list[tuple[int, int]] = []
        self.max_token_bytes = max_token_bytes

    def add(self, merge: Merge) -> None:
        self.tokens.append(self.tokens[merge.left] + self.tokens[merge.right])
        self.merges.append((merge.left, merge.right))

    def num_superwords(self) -> int:
        """Return how many tokens hold a space between letters."""
        return sum(_JOINED.search(token) is not None for token in self.tokens)

    def as_tiktoken(self, pattern: str) -> tiktoken.Encoding:
        """Return the vocabulary in tiktoken's form, with the ids that it has here."""
        ranks = {token: id_ for id_, token in enumerate(self.tokens)}
        return tiktoken.Encoding("learned", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

