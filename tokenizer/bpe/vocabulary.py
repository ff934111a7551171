"""What is learned: tokens as bytes, merges in their order, and which tokens may still join.

Ids here count from 0 without the special tokens: first the 256 bytes, in the order of their characters in the
byte-level alphabet (as `tokenizers` numbers them), then one id for each merge.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_sov.byte_bpe import byte_characters
from tokenizer.bpe.trainer import Merge
from tokenizer.presets import NUM_BYTES

if TYPE_CHECKING:
    import tiktoken

SPACE = 0x20
_JOINED = re.compile(rb"[A-Za-z\x80-\xff] [A-Za-z\x80-\xff]")


@cache
def _characters() -> dict[int, str]:
    return {byte: character for character, byte in byte_characters().items()}


@cache
def byte_ids() -> NDArray[np.uint8]:
    """Return the id of each byte, [256]."""
    characters = _characters()
    ids = np.empty(NUM_BYTES, np.uint8)
    ids[sorted(range(NUM_BYTES), key=lambda b: characters[b])] = np.arange(NUM_BYTES)
    return ids


def spelled(token: bytes) -> str:
    """Return a token as tokenizer.json spells it."""
    characters = _characters()
    return "".join(characters[b] for b in token)


class Vocabulary:
    """Tokens and merges as they are learned."""

    def __init__(self, max_tokens: int, max_token_bytes: int) -> None:
        """`max_tokens`: bytes and merges, at most."""
        self.tokens: list[bytes] = [
            b for _, b in sorted((int(i), bytes([b])) for b, i in enumerate(byte_ids()))]
        self.merges: list[tuple[int, int]] = []
        self.max_token_bytes = max_token_bytes
        self._sizes_bytes, self._spaces, self._inner_spaces = (np.zeros(max_tokens, np.int64)
                                                               for _ in range(3))
        self._ends_in_word, self._begins_next_word, self._superword = (np.zeros(max_tokens, np.bool_)
                                                                       for _ in range(3))
        for id_, token in enumerate(self.tokens):
            self._note(id_, token)

    def add(self, merge: Merge) -> None:
        """Add a merge's token."""
        token = self.tokens[merge.left] + self.tokens[merge.right]
        self._note(len(self.tokens), token)
        self.tokens.append(token)
        self.merges.append((merge.left, merge.right))

    def _note(self, id_: int, token: bytes) -> None:
        self._sizes_bytes[id_] = len(token)
        self._spaces[id_] = token.count(SPACE)
        self._inner_spaces[id_] = token.count(SPACE, 1)
        self._ends_in_word[id_] = _in_word(token[-1])
        self._begins_next_word[id_] = token[0] == SPACE and (len(token) == 1 or _in_word(token[1]))
        self._superword[id_] = _JOINED.search(token) is not None

    def within_words(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs may join: those that are not too long."""
        return self._sizes_bytes[left] + self._sizes_bytes[right] <= self.max_token_bytes

    def before_superwords(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs may join before words do.

        A letter, or the last byte of a wide space, and then a space: learned in a run of spaces, such a merge
        would join two words of the finished tokenizer by their bytes before either word is whole,
        so it is never learned.
        """
        return self.within_words(left, right) & ~(self._ends_in_word[left] & self._begins_next_word[right])

    def across_words(self, max_words: int, left: NDArray[np.int64],
                     right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs may join to superwords: not too long, and of at most `max_words` words."""
        return self.within_words(left, right) & (self._inner_spaces[left] + self._spaces[right] < max_words)

    def into_superwords(self, max_words: int, left: NDArray[np.int64],
                        right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs may join where every token is to be a superword;
        within a word none may any more."""
        joins = self._ends_in_word[left] & self._begins_next_word[right] & (self._sizes_bytes[right] > 1)
        return self.across_words(max_words, left, right) & (
            joins | self._superword[left] | self._superword[right])

    def num_superwords(self) -> int:
        """Return how many tokens hold a space between letters."""
        return int(self._superword[: len(self.tokens)].sum())

    def as_tiktoken(self, pattern: str) -> tiktoken.Encoding:
        """Return the vocabulary in tiktoken's form, with the ids that it has here."""
        import tiktoken

        ranks = {token: id_ for id_, token in enumerate(self.tokens)}
        return tiktoken.Encoding("learned", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _in_word(byte: int) -> bool:
    """Return whether a byte may belong to a letter."""
    return byte >= 0x80 or chr(byte).isalpha()
