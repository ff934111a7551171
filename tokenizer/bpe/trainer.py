"""Learning merges: exact byte-pair encoding (arXiv 1508.07909) over counted words, by arrays.

At each step the adjacent pair with the highest count is merged; of equal counts the pair with the smaller
left id, then the smaller right id (the order of Hugging Face `tokenizers`, which therefore gives the same
merges).  The count of a pair is the number of its adjacent places, so "aaa" has "aa" twice;
merging goes from left to right.

All words lie in one array of ids, with an end mark before and behind each.  A token of several places has its
id at its first and at its last place and dead marks between, so both neighbours of a place are read without
links.  The places of a pair are found once, when it comes into being; later steps only take places away,
since a new place of a pair needs a new token.  So what was counted once is an upper bound, and a pair is
counted again only when it reaches the top of the heap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

END, DEAD = -1, -2
HOT_PAIRS = 50_000
"""Pairs that enter the heap at a time; the others wait in arrays until counts have come down to theirs."""
FIRST_PLACES = 4_000_000
"""Places of single symbols that are sorted at a time."""
MAX_PLACES = 2**31 - 1
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
_KEY, _COUNT, _START, _LENGTH = range(4)

Joinable = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""(left ids, right ids) -> whether each pair may become a token."""


@dataclass(frozen=True)
class Words:
    """Distinct words with their counts, the most frequent first."""

    symbols: NDArray[np.integer]
    """Ids of all words, one word after another, [sum of lengths]."""
    lengths: NDArray[np.int64]
    """Symbols of each word, [words]."""
    counts: NDArray[np.int64]
    """How often each word stands in the text, falling, [words]."""


@dataclass(frozen=True)
class Merge:
    """One step of training."""

    left: int
    """Id of the left token."""
    right: int
    """Id of the right token."""
    count: int
    """How often the pair stood in the text."""


class _Rows:
    """A growing array of columns."""

    def __init__(self, columns: int, dtype: type[np.generic], capacity: int) -> None:
        self._data: NDArray[Any] = np.empty((columns, max(capacity, 16)), dtype)
        self.size = 0

    def reserve(self, count: int) -> NDArray[Any]:
        """Return `count` new rows, to be filled, [columns, count]."""
        end = self.size + count
        if end > self._data.shape[1]:
            grown = np.empty((len(self._data), end + end // 4), self._data.dtype)
            grown[:, : self.size] = self.rows()
            self._data = grown
        new = self._data[:, self.size : end]
        self.size = end
        return new

    def rows(self) -> NDArray[Any]:
        """Return what is there, [columns, size]."""
        return self._data[:, : self.size]

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the rows where `mask` is false."""
        kept = self.rows()[:, mask]
        self.size = kept.shape[1]
        self._data[:, : self.size] = kept


class MergeLearner:
    """Words under training; `learn` yields merge after merge."""

    def __init__(self, words: Words, joinable: Joinable, first_id: int, min_count: int) -> None:
        """Lay out the words and find their pairs.

        Args:
            words: their ids are below `first_id`.
            joinable: asked once for each pair that comes into being; it must know a token once its
                merge has been yielded.
            first_id: id of the first merge's token.
            min_count: a pair that occurs less often is not merged.
        """
        if len(words.symbols) + len(words.lengths) >= MAX_PLACES:
            raise ValueError(f"{len(words.symbols)} symbols in {len(words.lengths)} words are too "
                             "many for 32 bits")
        self._joinable, self._next_id, self._min_count = joinable, first_id, min_count
        ends = np.r_[0, np.cumsum(words.lengths + 1)]
        self._symbols = np.full(int(ends[-1]) + 1, END, np.int32)
        inside = np.ones(len(self._symbols), np.bool_)
        inside[ends] = False
        self._symbols[inside] = words.symbols
        del inside
        # words of equal count are neighbours, so the count at a place is found in a short list
        changes = (np.flatnonzero(np.r_[True, words.counts[1:] != words.counts[:-1]]) if len(words.counts)
                   else np.zeros(0, int))
        self._level_starts, self._level_counts = ends[changes].astype(np.int32), words.counts[changes]
        self._spans = np.ones(first_id, np.int32)
        self._places = _Rows(1, np.int32, len(words.symbols))
        self._heap: list[tuple[int, int, int, int]] = []
        self._waiting = _Rows(4, np.int64, HOT_PAIRS)
        self._limit = (-MAX_PLACES**2, 0)
        """(-count, key): pairs before it are in the heap, the others wait."""
        self._find_first_pairs()

    def _find_first_pairs(self) -> None:
        """Find the pairs of single symbols, some left symbols at a time,
        so that sorting takes little memory."""
        symbols = self._symbols
        places = np.flatnonzero((symbols[:-1] >= 0) & (symbols[1:] >= 0)).astype(np.int32)
        lefts = symbols[places]
        groups = np.cumsum(np.bincount(lefts, minlength=len(self._spans))) // FIRST_PLACES
        for group in np.unique(groups):
            bounds = np.searchsorted(groups, [group, group + 1])
            some = places[(lefts >= bounds[0]) & (lefts < bounds[1])]
            keys = (symbols[some].astype(np.int64) << _ID_BITS) | symbols[some + 1]
            self._add_pairs(keys, some, self._weights(some))

    def _weights(self, places: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the count of the word at each place."""
        return self._level_counts.take(self._level_starts.searchsorted(places, "right") - 1)

    def learn(self) -> Iterator[Merge]:
        """Yield merges, best first, until no pair occurs often enough."""
        while (top := self._best()) is not None:
            merge, places = top
            yield merge
            self._merge(merge.left, merge.right, places)

    def _best(self) -> tuple[Merge, NDArray[np.int32]] | None:
        """Return the pair to merge and its places, or None where none is left."""
        symbols, heap, all_places = self._symbols, self._heap, self._places.rows()[0]
        while heap or self._fill_heap():
            negative, key, start, length = heapq.heappop(heap)
            left, right = key >> _ID_BITS, key & _ID_MASK
            # Of the places that were found once, those are left at which both tokens still stand: other
            # merges may have swallowed either of them since.
            places = all_places[start : start + length]
            alive = symbols.take(places) == left
            alive &= symbols.take(places + self._spans[left]) == right
            num_alive = int(np.count_nonzero(alive))
            # nothing changed, so the count on the heap is right, and the heap says it is the best
            if num_alive == length:
                return Merge(left, right, -negative), places
            if not num_alive:
                continue
            # The count on the heap was an upper bound.  With the right one the pair may still be the best: it
            # is, where neither the heap nor (`_limit`) any of the waiting pairs has a bound above it.
            places = places.compress(alive)
            count = int(self._weights(places).sum())
            if count < self._min_count:
                continue
            if (-count, key) < min(self._limit, heap[0][:2] if heap else (0, 0)):
                return Merge(left, right, count), places
            # Else it goes back under its right count, with its places moved together,
            # so that they are looked through once.
            all_places[start : start + num_alive] = places
            if (-count, key) < self._limit:
                heapq.heappush(heap, (-count, key, start, num_alive))
            else:
                self._waiting.reserve(1)[:, 0] = key, count, start, num_alive
        return None

    def _put(self, pairs: NDArray[np.int64]) -> None:
        """Put pairs, [4, pairs], into the heap or among those that wait."""
        negative, key = self._limit
        hot = (pairs[_COUNT] > -negative) | ((pairs[_COUNT] == -negative) & (pairs[_KEY] < key))
        if hot.any():
            for key, count, start, length in pairs[:, hot].T.tolist():
                heapq.heappush(self._heap, (-count, key, start, length))
            pairs = pairs[:, ~hot]
        if pairs.shape[1]:
            self._waiting.reserve(pairs.shape[1])[:] = pairs

    def _fill_heap(self) -> bool:
        """Move the best of the waiting pairs into the heap; returns whether there were any."""
        rows = self._waiting.rows()
        if not rows.shape[1]:
            return False
        order = np.arange(rows.shape[1])
        if len(order) > HOT_PAIRS:
            threshold = np.partition(rows[_COUNT], len(order) - HOT_PAIRS)[len(order) - HOT_PAIRS]
            order = np.flatnonzero(rows[_COUNT] >= threshold)
        order = order[np.lexsort((rows[_KEY, order], -rows[_COUNT, order]))][:HOT_PAIRS]
        last = order[-1]
        self._limit = (-int(rows[_COUNT, last]), int(rows[_KEY, last]) + 1)
        pairs = rows[:, order]
        mask = np.ones(rows.shape[1], np.bool_)
        mask[order] = False
        self._waiting.keep(mask)
        self._put(pairs)
        return True

    def _merge(self, left: int, right: int, places: NDArray[np.int32]) -> None:
        """Merge a pair at its places and find the pairs of the new token."""
        symbols, token, left_span = self._symbols, self._next_id, self._spans[left]
        self._next_id += 1
        if token == len(self._spans):
            self._spans = np.resize(self._spans, len(self._spans) * 2)
        self._spans[token] = left_span + self._spans[right]
        if left == right:
            places = places[_every_other(places, int(left_span))]
        second, behind = places + left_span, places + self._spans[token]
        symbols[second - 1] = DEAD
        symbols[second] = DEAD
        symbols[places] = token
        symbols[behind - 1] = token
        before, after = symbols.take(places - 1), symbols.take(behind)
        # token token: counted at its left one
        has_before, has_after = (before >= 0) & (before != token), after >= 0
        weights = self._weights(places)
        before = before.compress(has_before).astype(np.int64)
        after = after.compress(has_after).astype(np.int64)
        keys = np.concatenate(((before << _ID_BITS) | token, after | (token << _ID_BITS)))
        starts = np.concatenate((places.compress(has_before) - self._spans.take(before),
                                 places.compress(has_after)))
        self._add_pairs(keys, starts,
                        np.concatenate((weights.compress(has_before), weights.compress(has_after))))

    def _add_pairs(self, keys: NDArray[np.int64], places: NDArray[np.int32],
                   weights: NDArray[np.int64]) -> None:
        """Add pairs by their places: left id << 32 | right id, place and count of the word, [places] each."""
        if not len(keys):
            return
        order = keys.argsort(kind="stable")
        keys, places = keys.take(order), places.take(order)
        bounds = np.empty(len(keys) + 1, np.bool_)
        bounds[0] = bounds[-1] = True
        np.not_equal(keys[1:], keys[:-1], out=bounds[1:-1])
        ends = bounds.nonzero()[0]
        firsts, lengths = ends[:-1], ends[1:] - ends[:-1]
        counts = np.add.reduceat(weights.take(order), firsts)
        keys = keys.take(firsts)
        kept = (counts >= self._min_count) & self._joinable(keys >> _ID_BITS, keys & _ID_MASK)
        if not kept.all():
            places = places[np.repeat(kept, lengths)]
            keys, counts, lengths = keys[kept], counts[kept], lengths[kept]
        if len(keys):
            pairs = np.empty((4, len(keys)), np.int64)
            pairs[_KEY], pairs[_COUNT], pairs[_LENGTH] = keys, counts, lengths
            pairs[_START] = lengths.cumsum() - lengths + self._places.size
            self._places.reserve(len(places))[0] = places
            self._put(pairs)


def _every_other(places: NDArray[np.int32], span: int) -> NDArray[np.bool_]:
    """Return which places of a doubled token to merge, from left to right:
    of "aaaa" the first and the third."""
    begins = np.concatenate(([True], places[1:] != places[:-1] + span))
    numbers = np.arange(len(places))
    return (numbers - np.maximum.accumulate(np.where(begins, numbers, 0))) % 2 == 0
