"""Learn merges: exact byte-pair encoding (arXiv 1508.07909) over counted words.

Each step merges the adjacent pair with the highest count; of equal counts, the pair with the lower left id,
then the lower right id (the order of Hugging Face `tokenizers`, so the merges are equal).  A pair's count is
its number of adjacent positions, so "aaa" has "aa" twice; merging goes from left to right.

All words are in one array of ids.  The positions of a pair are found once, when the pair appears; later
merges only remove positions, because a new position of a pair needs a new token.  So a count never rises,
and a pair is counted again only at the top of the heap.  The loop is compiled (tokenizer/bpe/merging.py);
`MergeLearner` allocates its arrays and enlarges them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenizer.bpe.merging import (
    BLOCK_BITS, BYTES_FULL, END, ENOUGH, EXHAUSTED, HEAP_FULL, NUM_SIZES, NUM_TOKENS, NUM_TRAITS, PLACES_FULL,
    JoinRule, MergeStore, add_first_pairs, learn_merges, set_all_traits)

FIRST_PLACES = 4_000_000
"""Positions per sort in `_add_first_pairs`."""
FIRST_PAIRS = 1 << 16
"""Initial `MergeStore.heap` capacity."""
BATCH_MERGES = 2048
"""Merges per `learn_merges` call."""
MAX_PLACES = 2**31 - 1
_GROWTH = {HEAP_FULL: "heap", PLACES_FULL: "places", BYTES_FULL: "token_bytes"}


@dataclass(frozen=True)
class PretokenWords:
    """Distinct words as ids, by falling count."""

    symbols: NDArray[np.integer]
    """Concatenated token ids, [sum of lengths]."""
    lengths: NDArray[np.int64]
    """Ids per word, [words]."""
    counts: NDArray[np.int64]
    """Falling, [words]."""


class Merge(NamedTuple):
    """Token ids."""

    left: int
    right: int
    frequency: int
    """Pair count."""


class MergeLearner:
    """Learns merges from words.

    Args:
        words: ids index `tokens`.
        tokens: initial tokens; merges continue their ids.
        rule: see `JoinRule`.
        min_count: minimum pair count.
        max_merges: maximum merges.

    Raises:
        ValueError: the words need more than 2^31 positions.
    """

    def __init__(self, words: PretokenWords, tokens: list[bytes], rule: JoinRule, min_count: int,
                 max_merges: int) -> None:
        # 32-bit positions halve the memory of the largest arrays
        if len(words.symbols) + len(words.lengths) >= MAX_PLACES:
            raise ValueError(f"{len(words.symbols)} symbols in {len(words.lengths)} words are too "
                             "many for 32 bits")
        self._rule, self._min_count, self._max_merges = rule, min_count, max_merges
        self._store = _build_store(words, tokens, max_merges)
        set_all_traits(self._store)
        self._add_first_pairs()

    def iter_merges(self) -> Iterator[Merge]:
        """Yield merges, best first, until `max_merges` or no pair occurs often enough."""
        num_remaining, status = self._max_merges, ENOUGH
        while num_remaining and status != EXHAUSTED:
            merges = np.empty((min(num_remaining, BATCH_MERGES), 3), np.int64)
            num_merges, status = learn_merges(self._store, merges, self._rule, self._min_count)
            for merge in merges[:num_merges].tolist():
                yield Merge(*merge)
            num_remaining -= num_merges
            # `learn_merges` stops before a write, and continues with a larger copy
            if status in _GROWTH:
                self._grow_array(status)

    def _add_first_pairs(self) -> None:
        """Call `add_first_pairs` for some left symbols at a time, to bound memory."""
        symbols, num_tokens = self._store.symbols, int(self._store.sizes[NUM_TOKENS])
        # pairs never cross words, because END is negative
        places = np.flatnonzero((symbols[:-1] >= 0) & (symbols[1:] >= 0)).astype(np.int32)
        lefts = symbols[places]
        # consecutive left symbols with about FIRST_PLACES positions form a group
        groups = np.cumsum(np.bincount(lefts, minlength=num_tokens)) // FIRST_PLACES
        for group in np.unique(groups):
            start, stop = np.searchsorted(groups, [group, group + 1])
            group_places = places[(lefts >= start) & (lefts < stop)]
            # numpy sorts types of at most 16 bits by radix
            group_lefts = symbols[group_places].astype(np.min_scalar_type(num_tokens))
            # stable: `_merge_pair` needs rising positions where matches overlap
            group_places = group_places[np.argsort(group_lefts, kind="stable")]
            while len(group_places):
                num_added = add_first_pairs(self._store, group_places, self._rule, self._min_count)
                group_places = group_places[num_added:]
                if len(group_places):  # room for all remaining positions: at most once per group
                    self._grow_array(HEAP_FULL, len(group_places))
                    self._grow_array(PLACES_FULL, len(group_places))

    def _grow_array(self, status: int, min_growth: int = 1) -> None:
        array = getattr(self._store, _GROWTH[status])
        grown = np.empty((len(array) + len(array) // 4 + min_growth, *array.shape[1:]), array.dtype)
        grown[: len(array)] = array
        self._store = self._store._replace(**{_GROWTH[status]: grown})


def _build_store(words: PretokenWords, tokens: list[bytes], max_merges: int) -> MergeStore:
    """Allocate the arrays and copy the words, without pairs."""
    ends = np.r_[0, np.cumsum(words.lengths + 1)]
    symbols = np.full(int(ends[-1]) + 1, END, np.int32)
    is_symbol = np.ones(len(symbols), np.bool_)
    # END before the first word and after each word, so that neighbours need no bound check
    is_symbol[ends] = False
    symbols[is_symbol] = words.symbols
    del is_symbol
    changes = np.flatnonzero(np.r_[True, words.counts[1:] != words.counts[:-1]][: len(words.counts)])
    level_starts = ends[changes].astype(np.int32)
    # two more blocks than positions: the search reads the level of the next block as upper bound
    blocks = np.arange(0, len(symbols) + (2 << BLOCK_BITS), 1 << BLOCK_BITS)
    num_tokens, raw = len(tokens) + max_merges, np.frombuffer(b"".join(tokens), np.uint8)
    token_ends = np.zeros(num_tokens, np.int64)
    token_ends[: len(tokens)] = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    sizes = np.zeros(NUM_SIZES, np.int64)
    sizes[NUM_TOKENS] = len(tokens)
    return MergeStore(
        symbols, level_starts, level_counts=words.counts[changes],
        block_levels=(level_starts.searchsorted(blocks, "right") - 1).clip(0).astype(np.int32),
        heap=np.empty((FIRST_PAIRS, 4), np.int64), places=np.empty(max(len(words.symbols), 1), np.int32),
        spans=np.ones(num_tokens, np.int32), token_ends=token_ends,
        # 8 bytes per merge at first; the loop stops if tokens need more
        token_bytes=np.concatenate((raw, np.zeros(8 * max_merges, np.uint8))),
        traits=np.zeros((num_tokens, NUM_TRAITS), np.int32), pair_counts=np.zeros(num_tokens, np.int64),
        pair_lengths=np.zeros(num_tokens, np.int32), pair_starts=np.zeros(num_tokens, np.int64),
        sizes=sizes)
