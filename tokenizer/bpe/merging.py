"""The compiled loop of training: the best pair, its places, the pairs of the new token.

Pairs lie in a heap of rows (`COUNT`, `KEY`, `START`, `LENGTH`): how often the pair stands in the text at
most, left id << 32 | right id, and where in `MergeStore.places` its places are.  Of two pairs the one with
the higher count is better, of equal counts the one with the lower key.
"""

from __future__ import annotations

import itertools
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import jit_compile
from tokenizer.mixture import TextPiece

# A sample of a unit's text, taken before it is known how much text its group has.

_SLACK = 4
"""Times the limit that are held before the rest is dropped."""


class PieceSampler:
    """The pieces whose hashes are lowest: so many that they hold any share of the group that is
    of `limit_bytes` or less (`tokenizer.mixture.choose_share`)."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[TextPiece] = []
        self._size_bytes, self._drop_at_bytes = 0, _SLACK * limit_bytes
        self._highest: float = float("inf")

    def add(self, piece: TextPiece) -> None:
        """Take a piece into the sample, if it may belong to it."""
        # buckets above the limit were dropped once, and the sum of those below only grows
        if piece.bucket <= self._highest:
            self._pieces.append(piece)
            self._size_bytes += len(piece.raw)
            if self._size_bytes > self._drop_at_bytes:
                self._drop()

    def _drop(self) -> None:
        """Drop what lies above the limit.  A share may end behind the bucket that passes it, where it comes
        nearest to its size, so that bucket is kept."""
        kept: list[TextPiece] = []
        self._size_bytes = 0
        by_bucket = sorted(self._pieces, key=attrgetter("bucket"))
        for bucket, pieces in itertools.groupby(by_bucket, attrgetter("bucket")):
            if self._size_bytes > self._limit_bytes:
                break
            self._highest = bucket
            first = len(kept)
            kept += pieces
            self._size_bytes += sum(len(piece.raw) for piece in kept[first:])
        self._pieces = kept
        # sort rarely: at four times the limit, or twice of what one full bucket forces us to keep
        self._drop_at_bytes = max(_SLACK * self._limit_bytes, 2 * self._size_bytes)

    def found(self) -> list[TextPiece]:
        """Return the pieces."""
        self._drop()
        return self._pieces


END, DEAD = -1, -2
COUNT, KEY, START, LENGTH = range(4)
SIZE_BYTES, SPACES, INNER_SPACES, ENDS_IN_WORD, BEGINS_NEXT_WORD, SUPERWORD, NUM_TRAITS = range(7)
HEAP_SIZE, PLACES_SIZE, NUM_TOKENS, NUM_SIZES = range(4)
EXHAUSTED, ENOUGH, HEAP_FULL, PLACES_FULL, BYTES_FULL = range(5)
BLOCK_BITS = 8
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
_SPACE = 0x20


class JoinRule(NamedTuple):
    """Which pairs may become a token."""

    max_bytes: int
    """Longest token."""
    max_words: int
    """Most words in a token; 0: any number."""
    keeps_words_apart: bool
    """A pair that ends a word at its left and begins the next one at its right may not."""
    only_superwords: bool
    """Only a token that holds a space between letters may."""


class MergeStore(NamedTuple):
    """What is learned from, as arrays that the loop changes."""

    symbols: NDArray[np.int32]
    """All words, `END` before and behind each.  A token of several places has its id at its first and at
    its last place and `DEAD` between, so both neighbours of a place are read without links."""
    level_starts: NDArray[np.int32]
    """Words of equal count are neighbours: the first place of each such level."""
    level_counts: NDArray[np.int64]
    """Its count."""
    block_levels: NDArray[np.int32]
    """The level of every 2^BLOCK_BITS-th place, so that a place's level is found in a short list."""
    heap: NDArray[np.int64]
    """Pairs, [capacity, 4]."""
    places: NDArray[np.int32]
    """Places of all pairs, one pair after another, [capacity]."""
    spans: NDArray[np.int32]
    """Places that a token takes, [tokens]."""
    token_ends: NDArray[np.int64]
    """Where each token's bytes end, [tokens]."""
    token_bytes: NDArray[np.uint8]
    """Bytes of all tokens, one after another, [capacity]."""
    traits: NDArray[np.int32]
    """What decides whether a token may join, [tokens, NUM_TRAITS]."""
    other_counts: NDArray[np.int64]
    """All 0 between calls of `_add_pairs`; counts of the pairs with each other token, [tokens]."""
    other_lengths: NDArray[np.int32]
    """All 0 between calls; places of those pairs, [tokens]."""
    other_starts: NDArray[np.int64]
    """Where those places go, [tokens]."""
    sizes: NDArray[np.int64]
    """How much of the heap, the places and the tokens is in use, [NUM_SIZES]."""


@jit_compile
def _is_word_byte(byte: int) -> bool:
    """Return whether a byte may belong to a letter."""
    return byte >= 0x80 or 0x41 <= byte <= 0x5A or 0x61 <= byte <= 0x7A


@jit_compile
def set_token_traits(store: MergeStore, token: int) -> None:
    """Find a token's traits from its bytes."""
    start = store.token_ends[token - 1] if token else 0
    raw = store.token_bytes[start : store.token_ends[token]]
    spaces, superword = 0, 0
    for i in range(len(raw)):
        if raw[i] == _SPACE:
            spaces += 1
            if 0 < i < len(raw) - 1 and _is_word_byte(raw[i - 1]) and _is_word_byte(raw[i + 1]):
                superword = 1
    first = 1 if raw[0] == _SPACE else 0
    traits = store.traits[token]
    traits[SIZE_BYTES] = len(raw)
    traits[SPACES] = spaces
    # a space in front belongs to the word behind it, so it parts no words
    traits[INNER_SPACES] = spaces - first
    traits[ENDS_IN_WORD] = 1 if _is_word_byte(raw[-1]) else 0
    traits[BEGINS_NEXT_WORD] = 1 if first and (len(raw) == 1 or _is_word_byte(raw[1])) else 0
    traits[SUPERWORD] = superword


@jit_compile
def set_all_traits(store: MergeStore) -> None:
    """Find the traits of the tokens that are known at the beginning."""
    for token in range(store.sizes[NUM_TOKENS]):
        set_token_traits(store, token)


@jit_compile
def _may_join(left: NDArray[np.int32], right: NDArray[np.int32], rule: JoinRule) -> bool:
    """Return whether tokens of these traits may join."""
    if left[SIZE_BYTES] + right[SIZE_BYTES] > rule.max_bytes:
        return False
    # words of the joined token: each space inside begins one more
    if rule.max_words and left[INNER_SPACES] + right[SPACES] >= rule.max_words:
        return False
    next_word = left[ENDS_IN_WORD] and right[BEGINS_NEXT_WORD]
    if rule.keeps_words_apart and next_word:
        return False
    return not rule.only_superwords or bool(
        left[SUPERWORD] or right[SUPERWORD] or (next_word and right[SIZE_BYTES] > 1))


@jit_compile
def _get_word_count(store: MergeStore, place: int) -> int:
    """Return the count of the word at a place."""
    # words lie by falling count, so a place tells its count, without an array of a count for each place
    low, high = store.block_levels[place >> BLOCK_BITS], store.block_levels[(place >> BLOCK_BITS) + 1]
    while low < high:
        middle = (low + high + 1) >> 1
        if store.level_starts[middle] <= place:
            low = middle
        else:
            high = middle - 1
    return store.level_counts[low]


@jit_compile
def _is_better_pair(heap: NDArray[np.int64], a: int, b: int) -> bool:
    """Return whether one row of the heap is better than another."""
    return heap[a, COUNT] > heap[b, COUNT] or (heap[a, COUNT] == heap[b, COUNT]
                                               and heap[a, KEY] < heap[b, KEY])


@jit_compile
def _swap_entries(heap: NDArray[np.int64], a: int, b: int) -> None:
    for column in range(4):
        heap[a, column], heap[b, column] = heap[b, column], heap[a, column]


@jit_compile
def _push_pair(store: MergeStore, count: int, key: np.int64, start: int, length: int) -> None:
    """Add a pair to the heap."""
    heap, at = store.heap, store.sizes[HEAP_SIZE]
    heap[at, COUNT], heap[at, KEY], heap[at, START], heap[at, LENGTH] = count, key, start, length
    store.sizes[HEAP_SIZE] += 1
    # sift up; ties go to the lower key, or the merges would depend on the order of insertion
    while at and _is_better_pair(heap, at, (at - 1) >> 1):
        _swap_entries(heap, at, (at - 1) >> 1)
        at = (at - 1) >> 1


@jit_compile
def _sink_first(heap: NDArray[np.int64], size: int) -> None:
    """Let the first row of the heap find its place, now that it may not be the best any more."""
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and _is_better_pair(heap, child + 1, child):
            child += 1
        if not _is_better_pair(heap, child, at):
            return
        _swap_entries(heap, at, child)
        at = child


@jit_compile
def _drop_first(store: MergeStore) -> None:
    """Take the first row from the heap."""
    store.sizes[HEAP_SIZE] -= 1
    last = store.sizes[HEAP_SIZE]
    _swap_entries(store.heap, 0, last)
    _sink_first(store.heap, last)


@jit_compile
def _add_pairs(store: MergeStore, token: int, token_is_left: bool, others: NDArray[np.int32],
               places: NDArray[np.int32], rule: JoinRule, min_count: int) -> None:
    """Add the pairs of a token with others: the other token and the place of each, [places]."""
    counts, lengths, starts = store.other_counts, store.other_lengths, store.other_starts
    distinct = np.empty(len(others), np.int32)
    num_distinct = 0
    for i in range(len(others)):
        other = others[i]
        # first pass: sums by the other token, in arrays that are all 0 between calls
        if not lengths[other]:
            distinct[num_distinct] = other
            num_distinct += 1
        lengths[other] += 1
        counts[other] += _get_word_count(store, places[i])
    for i in range(num_distinct):
        other = distinct[i]
        left, right = (token, other) if token_is_left else (other, token)
        # -1: rarer than asked for or not allowed, so its places are not even stored
        starts[other] = -1
        if counts[other] >= min_count and _may_join(store.traits[left], store.traits[right], rule):
            starts[other] = store.sizes[PLACES_SIZE]
            store.sizes[PLACES_SIZE] += lengths[other]
            key = (np.int64(left) << _ID_BITS) | right
            _push_pair(store, counts[other], key, starts[other], lengths[other])
        # cleared by the list of those touched: clearing whole arrays would cost the vocabulary at each merge
        counts[other] = lengths[other] = 0
    # second pass: places of one pair become neighbours; `starts` moves on as they are written
    for i in range(len(others)):
        other = others[i]
        if starts[other] >= 0:
            store.places[starts[other]] = places[i]
            starts[other] += 1


@jit_compile
def add_first_pairs(store: MergeStore, places: NDArray[np.int32], rule: JoinRule, min_count: int) -> int:
    """Add the pairs of single symbols at some places, sorted by their left symbols; returns how many places
    there was room for."""
    done = 0
    while done < len(places):
        left, end = store.symbols[places[done]], done
        # all pairs of one left symbol at a time, since `_add_pairs` counts for a single token
        while end < len(places) and store.symbols[places[end]] == left:
            end += 1
        # told before anything is written: the caller enlarges and comes back with what is left
        if not _has_room(store, end - done):
            return done
        others = np.empty(end - done, np.int32)
        for i in range(end - done):
            others[i] = store.symbols[places[done + i] + 1]
        _add_pairs(store, left, True, others, places[done:end], rule, min_count)
        done = end
    return done


@jit_compile
def _has_room(store: MergeStore, count: int) -> bool:
    return (store.sizes[PLACES_SIZE] + count <= len(store.places)
            and store.sizes[HEAP_SIZE] + count <= len(store.heap))


@jit_compile
def learn_merges(store: MergeStore, merges: NDArray[np.int64], rule: JoinRule, min_count: int) -> tuple[int,
                                                                                                      int]:
    """Merge until `merges`, [merges, (left, right, count)], is full, no pair is left, or an array is full.

    Returns:
        How many merges were learned, and why no more: `EXHAUSTED`, `ENOUGH`, or the array to enlarge.
    """
    heap, num_merges = store.heap, 0
    while num_merges < len(merges):
        length = _refresh_first(store, min_count)
        if not length:
            return num_merges, EXHAUSTED
        key = heap[0, KEY]
        left, right, start = key >> _ID_BITS, key & _ID_MASK, heap[0, START]
        # the pair is taken from the heap when nothing can keep it from being merged
        # two new pairs for each place at most: one with either neighbour
        if store.sizes[HEAP_SIZE] + 2 * length > len(heap):
            return num_merges, HEAP_FULL
        if store.sizes[PLACES_SIZE] + 2 * length > len(store.places):
            return num_merges, PLACES_FULL
        size_bytes = store.traits[left, SIZE_BYTES] + store.traits[right, SIZE_BYTES]
        if store.token_ends[store.sizes[NUM_TOKENS] - 1] + size_bytes > len(store.token_bytes):
            return num_merges, BYTES_FULL
        merges[num_merges, 0], merges[num_merges, 1], merges[num_merges, 2] = left, right, heap[0, COUNT]
        num_merges += 1
        _drop_first(store)
        _merge_pair(store, left, right, store.places[start : start + length], rule, min_count)
    return num_merges, ENOUGH


@jit_compile
def _refresh_first(store: MergeStore, min_count: int) -> int:
    """Bring the best pair to the top of the heap, with its right count; returns how many places it has,
    0 where no pair is left.

    Of the places that were found once, those are left at which both tokens still stand: other merges may have
    swallowed either of them since.  So a count on the heap is an upper bound, and is right where no place is
    gone.
    """
    heap = store.heap
    # a lazy heap: counts fall only when their row comes to the top, not whenever a neighbour is merged
    while store.sizes[HEAP_SIZE]:
        key, start, length = heap[0, KEY], heap[0, START], heap[0, LENGTH]
        left, right = key >> _ID_BITS, key & _ID_MASK
        span, alive = store.spans[left], 0
        for i in range(start, start + length):
            place = store.places[i]
            # dead places are squeezed out in place, so each is looked at once after it died
            if store.symbols[place] == left and store.symbols[place + span] == right:
                store.places[start + alive] = place
                alive += 1
        if alive == length:
            return alive
        count = 0
        for i in range(start, start + alive):
            count += _get_word_count(store, store.places[i])
        if count < min_count:
            _drop_first(store)
            continue
        heap[0, COUNT], heap[0, LENGTH] = count, alive
        _sink_first(heap, store.sizes[HEAP_SIZE])
        # it is still the best with its right count; else the next row is refreshed
        if heap[0, KEY] == key:
            return alive
    return 0


@jit_compile
def _merge_pair(store: MergeStore, left: int, right: int, places: NDArray[np.int32], rule: JoinRule,
           min_count: int) -> None:
    """Merge a pair at its places and find the pairs of the new token."""
    symbols, token = store.symbols, store.sizes[NUM_TOKENS]
    left_span = store.spans[left]
    span = left_span + store.spans[right]
    _add_token(store, left, right, span)
    merged, merged_end = 0, -1
    for i in range(len(places)):
        place = places[i]
        if place < merged_end:
            continue  # of "aaaa" the first and the third are merged
        second, merged_end = place + left_span, place + span
        # only the ends of a token carry its id: what lies between is never read
        symbols[second - 1] = symbols[second] = DEAD
        symbols[place] = symbols[merged_end - 1] = token
        places[merged] = place
        merged += 1
    others, at = np.empty(merged, np.int32), np.empty(merged, np.int32)
    found = 0
    for i in range(merged):
        other = symbols[places[i] - 1]
        # a token has its id at its last place too; END is below 0
        if other >= 0 and other != token:  # token token: counted at its left one
            others[found], at[found] = other, places[i] - store.spans[other]
            found += 1
    _add_pairs(store, token, False, others[:found], at[:found], rule, min_count)
    found = 0
    for i in range(merged):
        other = symbols[places[i] + span]
        if other >= 0:
            others[found], at[found] = other, places[i]
            found += 1
    _add_pairs(store, token, True, others[:found], at[:found], rule, min_count)


@jit_compile
def _add_token(store: MergeStore, left: int, right: int, span: int) -> None:
    """Note a new token."""
    token = store.sizes[NUM_TOKENS]
    store.spans[token] = span
    end = store.token_ends[token - 1]
    # bytes are copied from the same array: both parts lie before `end`
    for part in (left, right):
        start = store.token_ends[part - 1] if part else 0
        for i in range(start, store.token_ends[part]):
            store.token_bytes[end] = store.token_bytes[i]
            end += 1
    store.token_ends[token] = end
    store.sizes[NUM_TOKENS] += 1
    set_token_traits(store, token)
