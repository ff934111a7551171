"""Store a learned vocabulary: tokens as bytes and merges in order.

Ids start at 0 and exclude special tokens.  The first 256 ids are the bytes, in the order of their characters
in the byte-level alphabet (as in `tokenizers`); each merge adds one id.
"""

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

_SUPERWORD = re.compile(rb"[A-Za-z\x80-\xff] [A-Za-z\x80-\xff]")


@cache
def _map_bytes_to_characters() -> dict[int, str]:
    """Return byte -> character of the byte-level alphabet, also usable by `str.translate`."""
    return {byte: character for character, byte in byte_alphabet().items()}


@cache
def get_byte_ids() -> NDArray[np.uint8]:
    """Return byte -> id, [256]."""
    characters = _map_bytes_to_characters()
    ids = np.empty(NUM_BYTES, np.uint8)
    ids[sorted(range(NUM_BYTES), key=lambda b: characters[b])] = np.arange(NUM_BYTES)
    return ids


def spell_token(token: bytes) -> str:
    """Return the spelling of a token in tokenizer.json."""
    return token.decode("latin-1").translate(_map_bytes_to_characters())


class Vocabulary:
    """Tokens and merges, none longer than `max_token_bytes`.

    >>> vocabulary = Vocabulary(max_token_bytes=64)
    >>> len(vocabulary.tokens), vocabulary.merges
    (256, [])
    """

    def __init__(self, max_token_bytes: int) -> None:
        self.tokens = [bytes([byte]) for byte in np.argsort(get_byte_ids()).tolist()]
        self.merges: list[tuple[int, int]] = []
        self.max_token_bytes = max_token_bytes

    def add_merge(self, merge: "Merge") -> None:
        self.tokens.append(self.tokens[merge.left] + self.tokens[merge.right])
        self.merges.append((merge.left, merge.right))

    def count_superwords(self) -> int:
        """Count the tokens with a space between letters."""
        return sum(_SUPERWORD.search(token) is not None for token in self.tokens)

    def as_tiktoken(self, pattern: str) -> tiktoken.Encoding:
        """Return a tiktoken encoding with the same ids."""
        ranks = {token: id_ for id_, token in enumerate(self.tokens)}
        return tiktoken.Encoding("learned", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

