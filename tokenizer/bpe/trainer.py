"""Learning merges: exact byte-pair encoding (arXiv 1508.07909) over counted words, by arrays.

At each step the adjacent pair with the highest count is merged; of equal counts the pair with the smaller
left id, then the smaller right id (the order of Hugging Face `tokenizers`, which therefore gives the same
merges).  The count of a pair is the number of its adjacent places, so "aaa" has "aa" twice;
merging goes from left to right.

All words lie in one array of ids.  The places of a pair are found once, when it comes into being; later steps
only take places away, since a new place of a pair needs a new token.  So what was counted once is an upper
bound, and a pair is counted again only when it reaches the top of the heap.  The loop itself is compiled
(tokenizer/bpe/merging.py); here its arrays are laid out, and grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.bpe.merging import (
    BLOCK_BITS, BYTES_FULL, END, ENOUGH, EXHAUSTED, HEAP_FULL, NUM_SIZES, NUM_TOKENS, NUM_TRAITS, PLACES_FULL,
    JoinRule, MergeStore, add_first_pairs, learn_merges, set_all_traits)

FIRST_PLACES = 4_000_000
"""Places of single symbols that are sorted at a time."""
FIRST_PAIRS = 1 << 16
"""Pairs that there is room for at first."""
BATCH_MERGES = 2048
"""Merges that the compiled loop learns before they are told: enough that another thread, which then has the
interpreter, is seldom in the way."""
MAX_PLACES = 2**31 - 1
_GROWTH = {HEAP_FULL: "heap", PLACES_FULL: "places", BYTES_FULL: "token_bytes"}


@dataclass(frozen=True)
class PretokenWords:
    """Distinct words with their counts, the most frequent first."""

    symbols: NDArray[np.integer]
    """Ids of all words, one word after another, [sum of lengths]."""
    lengths: NDArray[np.int64]
    """Symbols of each word, [words]."""
    counts: NDArray[np.int64]
    """How often each word stands in the text, falling, [words]."""


class Merge(NamedTuple):
    """One step of training."""

    left: int
    """Id of the left token."""
    right: int
    """Id of the right token."""
    frequency: int
    """How often the pair stood in the text."""


class MergeLearner:
    """Words under training; `learn` yields merge after merge."""

    def __init__(self, words: PretokenWords, tokens: list[bytes], rule: JoinRule, min_count: int,
                 max_merges: int) -> None:
        """Lay out the words and find their pairs.

        Args:
            words: their ids are those of `tokens`.
            tokens: what is learned so far; merges become the tokens after them.
            rule: which pairs may become a token.
            min_count: a pair that occurs less often is not merged.
            max_merges: merges to learn, at most.
        """
        # places are 32-bit numbers, which halves the memory of the largest arrays
        if len(words.symbols) + len(words.lengths) >= MAX_PLACES:
            raise ValueError(f"{len(words.symbols)} symbols in {len(words.lengths)} words are too "
                             "many for 32 bits")
        self._rule, self._min_count, self._max_merges = rule, min_count, max_merges
        self._store = _build_store(words, tokens, max_merges)
        set_all_traits(self._store)
        self._find_first_pairs()

    def _find_first_pairs(self) -> None:
        """Find the pairs of single symbols, some left symbols at a time,
        so that sorting takes little memory."""
        symbols = self._store.symbols
        # pairs never cross a word: END stands between words
        places = np.flatnonzero((symbols[:-1] >= 0) & (symbols[1:] >= 0)).astype(np.int32)
        lefts = symbols[places]
        # left symbols with about FIRST_PLACES places together form a group
        groups = np.cumsum(np.bincount(lefts, minlength=int(self._store.sizes[NUM_TOKENS]))) // FIRST_PLACES
        for group in np.unique(groups):
            first, behind = np.searchsorted(groups, [group, group + 1])
            some = places[(lefts >= first) & (lefts < behind)]
            # of 16 bits and less numpy sorts by counting
            of_some = symbols[some].astype(np.min_scalar_type(int(self._store.sizes[NUM_TOKENS])))
            # stable: places of a pair rise, and `_merge` relies on that where matches overlap
            some = some[np.argsort(of_some, kind="stable")]
            while (done := add_first_pairs(self._store, some, self._rule, self._min_count)) < len(some):
                some = some[done:]
                # as many as places are left is enough for certain, so this happens once for a group
                self._grow(HEAP_FULL, len(some))
                self._grow(PLACES_FULL, len(some))

    def learn(self) -> Iterator[Merge]:
        """Yield merges, best first, until there are `max_merges` or no pair occurs often enough."""
        left, stopped = self._max_merges, ENOUGH
        while left and stopped != EXHAUSTED:
            merges = np.empty((min(left, BATCH_MERGES), 3), np.int64)
            num_merges, stopped = learn_merges(self._store, merges, self._rule, self._min_count)
            for merge in merges[:num_merges].tolist():
                yield Merge(*merge)
            left -= num_merges
            # the loop stopped before it changed anything, so it goes on with the larger array
            if stopped in _GROWTH:
                self._grow(stopped)

    def _grow(self, which: int, more: int = 1) -> None:
        array = getattr(self._store, _GROWTH[which])
        grown = np.empty((len(array) + len(array) // 4 + more, *array.shape[1:]), array.dtype)
        grown[: len(array)] = array
        # a new tuple with the same arrays but one: nothing else is copied
        self._store = self._store._replace(**{_GROWTH[which]: grown})


def _build_store(words: PretokenWords, tokens: list[bytes], max_merges: int) -> MergeStore:
    """Return the arrays in which words are learned from, without pairs."""
    ends = np.r_[0, np.cumsum(words.lengths + 1)]
    symbols = np.full(int(ends[-1]) + 1, END, np.int32)
    inside = np.ones(len(symbols), np.bool_)
    # one END before the first word and one behind each, so a neighbour can be read without a bound check
    inside[ends] = False
    symbols[inside] = words.symbols
    del inside
    # words come with falling counts: a level is a run of equal ones
    changes = (np.flatnonzero(np.r_[True, words.counts[1:] != words.counts[:-1]]) if len(words.counts)
               else np.zeros(0, int))
    level_starts = ends[changes].astype(np.int32)
    # two blocks more than places: the level of the next block is read as the upper bound
    blocks = np.arange(0, len(symbols) + (2 << BLOCK_BITS), 1 << BLOCK_BITS)
    num_tokens, raw = len(tokens) + max_merges, np.frombuffer(b"".join(tokens), np.uint8)
    token_ends = np.zeros(num_tokens, np.int64)
    token_ends[: len(tokens)] = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    sizes = np.zeros(NUM_SIZES, np.int64)
    sizes[NUM_TOKENS] = len(tokens)
    return MergeStore(
        symbols, level_starts, words.counts[changes],
        (level_starts.searchsorted(blocks, "right") - 1).clip(0).astype(np.int32),
        heap=np.empty((FIRST_PAIRS, 4), np.int64), places=np.empty(max(len(words.symbols), 1), np.int32),
        spans=np.ones(num_tokens, np.int32), token_ends=token_ends,
        # a guess of 8 bytes for each merge; the loop asks for more where tokens are longer
        token_bytes=np.concatenate((raw, np.zeros(8 * max_merges, np.uint8))),
        traits=np.zeros((num_tokens, NUM_TRAITS), np.int32), other_counts=np.zeros(num_tokens, np.int64),
        other_lengths=np.zeros(num_tokens, np.int32), other_starts=np.zeros(num_tokens, np.int64),
        sizes=sizes)
