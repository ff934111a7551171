"""Merge pairs in compiled loops: find the best pair, merge its positions, count the pairs of the new token.

A heap of rows (`COUNT`, `KEY`, `START`, `LENGTH`) orders the pairs: an upper bound of the count, left id
<< 32 | right id, and the slice of `MergeStore.places` with the pair's positions.  The pair with the highest
count is best; of equal counts, the pair with the lowest key.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.compiled import jit_compile

END, DEAD = -1, -2
"""Entries of `MergeStore.symbols` without a token id."""
COUNT, KEY, START, LENGTH = range(4)
"""Columns of `MergeStore.heap`."""
(SIZE_BYTES, WORDS, FIRST_IS_SPACE, LAST_IS_SPACE, ENDS_IN_WORD, BEGINS_NEXT_WORD, SUPERWORD,
 NUM_TRAITS) = range(8)
"""Columns of `MergeStore.traits`, and their number."""
HEAP_SIZE, PLACES_SIZE, NUM_TOKENS, NUM_SIZES = range(4)
"""Indices in `MergeStore.sizes`, and their number."""
EXHAUSTED, ENOUGH, HEAP_FULL, PLACES_FULL, BYTES_FULL = range(5)
"""Why `learn_merges` returns."""
BLOCK_BITS = 8
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
_SPACE = 0x20


class JoinRule(NamedTuple):
    """Conditions on pairs that may merge."""

    max_bytes: int
    """Maximum bytes in a token."""
    max_words: int
    """Maximum runs of bytes without a space in a token, as in SuperBPE's trainer. 0: no limit."""
    keeps_words_apart: bool
    """Reject pairs whose left token ends a word and whose right token begins the next word."""
    only_superwords: bool
    """Reject pairs whose token has no space between letters."""


class MergeStore(NamedTuple):
    """Arrays that `learn_merges` modifies."""

    symbols: NDArray[np.int32]
    """All words, separated by `END`.  A token over several positions has its id at the first and last
    position and `DEAD` in between, so that neighbours are read without links."""
    level_starts: NDArray[np.int32]
    """A level is a run with equal counts: first positions, [levels]."""
    level_counts: NDArray[np.int64]
    """Word counts, [levels]."""
    block_levels: NDArray[np.int32]
    """Level at every 2^BLOCK_BITS-th position, to start `_get_word_count`."""
    heap: NDArray[np.int64]
    """Pairs, [capacity, 4]."""
    places: NDArray[np.int32]
    """Concatenated pair positions, [capacity]."""
    spans: NDArray[np.int32]
    """Positions per token, [tokens]."""
    token_ends: NDArray[np.int64]
    """Ends in `token_bytes`, [tokens]."""
    token_bytes: NDArray[np.uint8]
    """Concatenated tokens, [capacity]."""
    traits: NDArray[np.int32]
    """Properties for `JoinRule`, [tokens, NUM_TRAITS]."""
    pair_counts: NDArray[np.int64]
    """Scratch in `_add_pairs`, 0 between calls: counts by neighbour, [tokens]."""
    pair_lengths: NDArray[np.int32]
    """Scratch in `_add_pairs`, 0 between calls: positions by neighbour, [tokens]."""
    pair_starts: NDArray[np.int64]
    """Scratch in `_add_pairs`: next free index in `places` by neighbour, [tokens]."""
    sizes: NDArray[np.int64]
    """Used entries in `heap`, `places` and tokens, [NUM_SIZES]."""


@jit_compile
def _is_word_byte(byte: int) -> bool:
    return byte >= 0x80 or 0x41 <= byte <= 0x5A or 0x61 <= byte <= 0x7A


@jit_compile
def set_token_traits(store: MergeStore, token: int) -> None:
    start = store.token_ends[token - 1] if token else 0
    raw = store.token_bytes[start : store.token_ends[token]]
    words, superword = 0, 0
    for i in range(len(raw)):
        if raw[i] != _SPACE:
            words += 1 if i == 0 or raw[i - 1] == _SPACE else 0
        elif 0 < i < len(raw) - 1 and _is_word_byte(raw[i - 1]) and _is_word_byte(raw[i + 1]):
            superword = 1
    first = 1 if raw[0] == _SPACE else 0
    traits = store.traits[token]
    traits[SIZE_BYTES] = len(raw)
    traits[WORDS] = words
    traits[FIRST_IS_SPACE] = first
    traits[LAST_IS_SPACE] = 1 if raw[-1] == _SPACE else 0
    traits[ENDS_IN_WORD] = 1 if _is_word_byte(raw[-1]) else 0
    traits[BEGINS_NEXT_WORD] = 1 if first and (len(raw) == 1 or _is_word_byte(raw[1])) else 0
    traits[SUPERWORD] = superword


@jit_compile
def set_all_traits(store: MergeStore) -> None:
    for token in range(store.sizes[NUM_TOKENS]):
        set_token_traits(store, token)


@jit_compile
def _may_join(left: NDArray[np.int32], right: NDArray[np.int32], rule: JoinRule) -> bool:
    if left[SIZE_BYTES] + right[SIZE_BYTES] > rule.max_bytes:
        return False
    # without a space in between, the last word of left and the first word of right are one word
    num_shared = 0 if left[LAST_IS_SPACE] or right[FIRST_IS_SPACE] else 1
    if rule.max_words and left[WORDS] + right[WORDS] - num_shared > rule.max_words:
        return False
    joins_words = left[ENDS_IN_WORD] and right[BEGINS_NEXT_WORD]
    if rule.keeps_words_apart and joins_words:
        return False
    is_superword = left[SUPERWORD] or right[SUPERWORD] or (joins_words and right[SIZE_BYTES] > 1)
    return not rule.only_superwords or bool(is_superword)


@jit_compile
def _get_word_count(store: MergeStore, place: int) -> int:
    """Search the level at a position and return `level_counts`."""
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
    return heap[a, COUNT] > heap[b, COUNT] or (heap[a, COUNT] == heap[b, COUNT]
                                               and heap[a, KEY] < heap[b, KEY])


@jit_compile
def _swap_entries(heap: NDArray[np.int64], a: int, b: int) -> None:
    for column in range(4):
        heap[a, column], heap[b, column] = heap[b, column], heap[a, column]


@jit_compile
def _push_pair(store: MergeStore, count: int, key: np.int64, start: int, length: int) -> None:
    heap, at = store.heap, store.sizes[HEAP_SIZE]
    heap[at, COUNT], heap[at, KEY], heap[at, START], heap[at, LENGTH] = count, key, start, length
    store.sizes[HEAP_SIZE] += 1
    # sift up; without the key, ties would depend on the order of insertion
    while at and _is_better_pair(heap, at, (at - 1) >> 1):
        _swap_entries(heap, at, (at - 1) >> 1)
        at = (at - 1) >> 1


@jit_compile
def _sink_first(heap: NDArray[np.int64], size: int) -> None:
    """Sift the first row down after its `COUNT` fell."""
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
    store.sizes[HEAP_SIZE] -= 1
    last = store.sizes[HEAP_SIZE]
    _swap_entries(store.heap, 0, last)
    _sink_first(store.heap, last)


@jit_compile
def _add_pairs(store: MergeStore, token: int, token_is_left: bool, neighbours: NDArray[np.int32],
               places: NDArray[np.int32], rule: JoinRule, min_count: int) -> None:
    """Count and store a token's pairs; `neighbours` has the other token at each of `places`, the pairs' first
    positions."""
    counts, lengths, starts = store.pair_counts, store.pair_lengths, store.pair_starts
    distinct = np.empty(len(neighbours), np.int32)
    num_distinct = 0
    # first pass: sum counts by neighbour
    for i in range(len(neighbours)):
        neighbour = neighbours[i]
        if not lengths[neighbour]:
            distinct[num_distinct] = neighbour
            num_distinct += 1
        lengths[neighbour] += 1
        counts[neighbour] += _get_word_count(store, places[i])
    for i in range(num_distinct):
        neighbour = distinct[i]
        left, right = (token, neighbour) if token_is_left else (neighbour, token)
        # -1: too rare or not allowed; positions are not stored
        starts[neighbour] = -1
        if counts[neighbour] >= min_count and _may_join(store.traits[left], store.traits[right], rule):
            starts[neighbour] = store.sizes[PLACES_SIZE]
            store.sizes[PLACES_SIZE] += lengths[neighbour]
            key = (np.int64(left) << _ID_BITS) | right
            _push_pair(store, counts[neighbour], key, starts[neighbour], lengths[neighbour])
        # clear the touched entries alone: the arrays are as long as the vocabulary
        counts[neighbour] = lengths[neighbour] = 0
    # second pass: write the positions of each pair into its slice
    for i in range(len(neighbours)):
        neighbour = neighbours[i]
        if starts[neighbour] >= 0:
            store.places[starts[neighbour]] = places[i]
            starts[neighbour] += 1


@jit_compile
def add_first_pairs(store: MergeStore, places: NDArray[np.int32], rule: JoinRule, min_count: int) -> int:
    """Add pairs at `places`, sorted by left symbol.

    Returns:
        The positions added; fewer than `len(places)` if an array is full.
    """
    num_added = 0
    while num_added < len(places):
        left, end = store.symbols[places[num_added]], num_added
        while end < len(places) and store.symbols[places[end]] == left:
            end += 1
        # the caller enlarges the arrays and calls again
        if not _has_room(store, end - num_added):
            return num_added
        neighbours = np.empty(end - num_added, np.int32)
        for i in range(end - num_added):
            neighbours[i] = store.symbols[places[num_added + i] + 1]
        _add_pairs(store, left, True, neighbours, places[num_added:end], rule, min_count)
        num_added = end
    return num_added


@jit_compile
def _has_room(store: MergeStore, count: int) -> bool:
    return (store.sizes[PLACES_SIZE] + count <= len(store.places)
            and store.sizes[HEAP_SIZE] + count <= len(store.heap))


@jit_compile
def learn_merges(store: MergeStore, merges: NDArray[np.int64], rule: JoinRule,
                 min_count: int) -> tuple[int, int]:
    """Fill `merges`, [merges, (left, right, count)], until it is full, no pair remains or an array is full.

    Returns:
        `num_merges` and `EXHAUSTED`, `ENOUGH` or the array to enlarge.
    """
    heap, num_merges = store.heap, 0
    while num_merges < len(merges):
        length = _refresh_first(store, min_count)
        if not length:
            return num_merges, EXHAUSTED
        key = heap[0, KEY]
        left, right, start = key >> _ID_BITS, key & _ID_MASK, heap[0, START]
        # check the arrays before the pair leaves the heap; a position adds at most two pairs
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
    """Move the best pair to the top with its exact `COUNT`.

    Later merges remove positions, so `COUNT` is an upper bound until the row reaches the top.

    Returns:
        The pair's `LENGTH`; 0 if no pair remains.
    """
    heap = store.heap
    while store.sizes[HEAP_SIZE]:
        key, start, length = heap[0, KEY], heap[0, START], heap[0, LENGTH]
        left, right = key >> _ID_BITS, key & _ID_MASK
        span, alive = store.spans[left], 0
        for i in range(start, start + length):
            place = store.places[i]
            # compact the slice, to read a removed position once
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
        if heap[0, KEY] == key:
            return alive
    return 0


@jit_compile
def _merge_pair(store: MergeStore, left: int, right: int, places: NDArray[np.int32], rule: JoinRule,
                min_count: int) -> None:
    """Merge a pair at its positions and call `_add_pairs` for the new token."""
    symbols, token = store.symbols, store.sizes[NUM_TOKENS]
    left_span = store.spans[left]
    span = left_span + store.spans[right]
    _add_token(store, left, right, span)
    num_merged, merged_end = 0, -1
    for i in range(len(places)):
        place = places[i]
        if place < merged_end:
            continue  # of "aaaa" the first and the third are merged
        second, merged_end = place + left_span, place + span
        # only the ends of a token have its id; the positions in between are never read
        symbols[second - 1] = symbols[second] = DEAD
        symbols[place] = symbols[merged_end - 1] = token
        places[num_merged] = place
        num_merged += 1
    neighbours, starts = np.empty(num_merged, np.int32), np.empty(num_merged, np.int32)
    num_pairs = 0
    for i in range(num_merged):
        neighbour = symbols[places[i] - 1]
        # END is negative; the pair (token, token) is counted at its left token below
        if neighbour >= 0 and neighbour != token:
            neighbours[num_pairs], starts[num_pairs] = neighbour, places[i] - store.spans[neighbour]
            num_pairs += 1
    _add_pairs(store, token, False, neighbours[:num_pairs], starts[:num_pairs], rule, min_count)
    num_pairs = 0
    for i in range(num_merged):
        neighbour = symbols[places[i] + span]
        if neighbour >= 0:
            neighbours[num_pairs], starts[num_pairs] = neighbour, places[i]
            num_pairs += 1
    _add_pairs(store, token, True, neighbours[:num_pairs], starts[:num_pairs], rule, min_count)


@jit_compile
def _add_token(store: MergeStore, left: int, right: int, span: int) -> None:
    token = store.sizes[NUM_TOKENS]
    store.spans[token] = span
    end = store.token_ends[token - 1]
    for part in (left, right):
        start = store.token_ends[part - 1] if part else 0
        for i in range(start, store.token_ends[part]):
            store.token_bytes[end] = store.token_bytes[i]
            end += 1
    store.token_ends[token] = end
    store.sizes[NUM_TOKENS] += 1
    set_token_traits(store, token)
