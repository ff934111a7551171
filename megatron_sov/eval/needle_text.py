"""What needles are made of: sentences that tie rare words together, and the text that they are hidden in.

A needle is ``\n The code of K1 K2 V1 V2.``: a key of two words, its value right behind.  Asked is by literal repetition, up to
the key; the value has to follow.  Keys and values for training and for testing never mix: a hash of the pair decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_sov.data.shards import Source
from megatron_sov.errors import UserError

OPENING, CLOSING = "\nThe code of", "."
NUM_WORDS, MIN_WORDS = 64, 16
TEST_PART = 5
"""One pair of words in this many is kept for tests."""
MIN_WORD_BYTES = 4


@dataclass(frozen=True)
class NeedleForm:
    """The parts of a needle as token ids."""

    opening: tuple[int, ...]
    """What stands before the key."""
    closing: tuple[int, ...]
    """What stands behind the value."""
    words: tuple[int, ...]
    """Tokens that are whole words."""
    special: tuple[int, ...] = ()
    """Special tokens, which no haystack may hold."""

    @property
    def statement_tokens(self) -> int:
        """Tokens of one needle."""
        return len(self.opening) + 4 + len(self.closing)

    @cached_property
    def pairs(self) -> dict[bool, np.ndarray]:
        """Ordered pairs of different words [pairs, 2]: True -> for tests, False -> for training."""
        found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for first in self.words:
            for second in self.words:
                if first != second:
                    found[is_test_pair(first, second)].append((first, second))
        return {test: np.array(pairs, np.int64).reshape(-1, 2) for test, pairs in found.items()}

    def draw(self, generator: np.random.Generator, count: int, *, test: bool) -> np.ndarray:
        """Return `count` different pairs [count, 2]."""
        return self.pairs[test][generator.choice(len(self.pairs[test]), count, replace=False)]

    def question(self, key: np.ndarray) -> list[int]:
        """Return the tokens up to where the value has to follow."""
        return [*self.opening, *key.tolist()]

    def statement(self, key: np.ndarray, value: np.ndarray) -> list[int]:
        """Return a whole needle."""
        return [*self.question(key), *value.tolist(), *self.closing]


def is_test_pair(first: int, second: int) -> bool:
    """Return whether a pair of word tokens is for tests alone, at whatever run and data."""
    digest = hashlib.blake2b(f"{first} {second}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % TEST_PART == 0


def needle_form(tokenizer_folder: Path) -> NeedleForm:
    """Return the needle's parts in a tokenizer's ids; its words are the rarest whole ones, which are those merged last.

    Raises:
        UserError: there is no tokenizer, or it has too few whole words.
    """
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{tokenizer_folder}: has no readable tokenizer.json ({e}); needles are made of its words") from None
    special = tuple(sorted(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special))
    words: list[int] = []
    for token in range(tokenizer.get_vocab_size(with_added_tokens=False) - 1, -1, -1):
        if len(words) == NUM_WORDS:
            break
        if token not in special and _is_whole_word(tokenizer, token):
            words.append(token)
    if len(words) < MIN_WORDS:
        raise UserError(f"{tokenizer_folder}: only {len(words)} of its tokens are whole words, needles need {MIN_WORDS}; "
                        "train a tokenizer with a larger vocabulary")
    opening, closing = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in (OPENING, CLOSING))
    return NeedleForm(opening, closing, tuple(words), special)


def _is_whole_word(tokenizer: Tokenizer, token: int) -> bool:
    text = tokenizer.decode([token], skip_special_tokens=False)
    word = text[1:]
    return (text[:1] == " " and word.isalpha() and len(word.encode()) >= MIN_WORD_BYTES
            and tokenizer.encode(text, add_special_tokens=False).ids == [token])


class Haystack:
    """Text of given sources: a document anywhere, and the ones after it, until there is enough."""

    def __init__(self, sources: Sequence[Source], split: str, special: Sequence[int]) -> None:
        """Open the sources' split.

        Raises:
            UserError: it holds no text.
        """
        usable = [s for s in sources if not s.is_chat and s.num_tokens.get(split, 0) > 0]
        if not usable:
            raise UserError(f"--data: its sources hold no '{split}' text to hide needles in; pack text with --heldout 0.02")
        self._shards = [s.shard(split) for s in usable]
        weights = np.array([s.num_tokens[split] for s in usable], np.float64)
        self._reached = np.cumsum(weights / weights.sum())
        self._special = np.array(special, np.int64)

    def text(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` tokens [count] int64 without special ones."""
        shard = self._shards[min(int(np.searchsorted(self._reached, generator.random(), side="right")), len(self._shards) - 1)]
        document = int(generator.integers(len(shard.lengths)))
        start = int(generator.integers(int(shard.lengths[document]) or 1))
        parts: list[np.ndarray] = []
        found = 0
        while found < count:
            ids = shard.tokens(document, start, min(int(shard.lengths[document]) - start, count - found))
            ids = ids[~np.isin(ids, self._special)]
            parts.append(ids)
            found += len(ids)
            document, start = (document + 1) % len(shard.lengths), 0
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
