"""Packing algorithms against the optimal number of rows, and token by token."""

import math

from hypothesis import given, settings, strategies as st

from megatron_sov.train.data.streams import (
    PackedSegment, Row, concatenate_segments, cut_segments, fit_units, pack_best_fit, pack_units,
    pack_units_nearby)

SEQ_LEN = 24
documents = st.lists(st.integers(1, 60), min_size=1, max_size=30).map(
    lambda counts: [PackedSegment(i, 0, n) for i, n in enumerate(counts)])


def list_tokens(rows: list[Row]) -> list[tuple[int, int]]:
    """Return (document, position) of every token, row by row."""
    segments = [segment for row in rows for segment in row]
    return [(segment.document, position) for segment in segments
            for position in range(segment.start, segment.start + segment.count)]


def count_tokens(row: Row) -> int:
    return sum(segment.count for segment in row)


def find_fewest_rows(counts: list[int], seq_len: int) -> int:
    """Return the minimum number of rows by branch and bound: try the longest remaining document in each row
    with a different free space, and in a new row."""
    lengths = sorted(counts, reverse=True)
    best = len(lengths)

    def place_from(i: int, spaces: tuple[int, ...]) -> None:
        nonlocal best
        missing = sum(lengths[i:]) - sum(spaces)
        if len(spaces) + max(0, math.ceil(missing / seq_len)) >= best:
            return
        if i == len(lengths):
            best = len(spaces)
            return
        for space in sorted({space for space in spaces if space >= lengths[i]}):
            k = spaces.index(space)
            place_from(i + 1, (*spaces[:k], *spaces[k + 1:], space - lengths[i]))
        place_from(i + 1, (*spaces, seq_len - lengths[i]))

    place_from(0, ())
    return best


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=11))
@settings(max_examples=150)
def test_best_fit_uses_at_most_one_row_more_than_the_optimum(counts: list[int]) -> None:
    """The theorem allows 11/9 of the optimum plus four rows; sets this small never need more than one."""
    rows = pack_best_fit([PackedSegment(i, 0, n) for i, n in enumerate(counts)], SEQ_LEN)
    fewest = find_fewest_rows(counts, SEQ_LEN)
    assert fewest <= len(rows) <= fewest + 1
    assert sorted(segment.count for row in rows for segment in row) == sorted(counts)
    assert all(count_tokens(row) <= SEQ_LEN for row in rows)


@given(documents)
def test_only_documents_longer_than_a_row_are_cut(segments: list[PackedSegment]) -> None:
    rows = pack_best_fit(cut_segments(segments, SEQ_LEN), SEQ_LEN)
    assert sorted(list_tokens(rows)) == list_tokens([segments])
    cut_documents = [segment.document for row in rows for segment in row]
    for segment in segments:
        assert cut_documents.count(segment.document) == math.ceil(segment.count / SEQ_LEN)


@given(documents)
def test_only_tokens_beyond_a_row_are_truncated(segments: list[PackedSegment]) -> None:
    units, over_long = fit_units(segments, 1, SEQ_LEN, drop=False)
    rows = pack_units(units, SEQ_LEN)
    truncated = [PackedSegment(p.document, 0, min(p.count, SEQ_LEN)) for p in segments]
    assert sorted(segment for row in rows for segment in row) == truncated
    assert over_long == sum(p.count > SEQ_LEN for p in segments)
    fitting = [(p,) for p in segments if p.count <= SEQ_LEN]
    assert fit_units(segments, 1, SEQ_LEN, drop=True) == (fitting, over_long)


@given(st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=12), st.booleans())
def test_units_stay_whole_and_in_order(counts: list[tuple[int, ...]], drop: bool) -> None:
    documents = [PackedSegment(3 * i + j, 0, n) for i, unit in enumerate(counts) for j, n in enumerate(unit)]
    units, over_long = fit_units(documents, 3, SEQ_LEN, drop=drop)
    rows = pack_units(units, SEQ_LEN)
    assert over_long == sum(sum(unit) > SEQ_LEN for unit in counts)
    assert all(count_tokens(row) <= SEQ_LEN and len(row) % 3 == 0 for row in rows)
    segments = [segment for row in rows for segment in row]
    packed_units = sorted(segments[i:i + 3] for i in range(0, len(segments), 3))
    expected = [i for i, unit in enumerate(counts) if not drop or sum(unit) <= SEQ_LEN]
    assert [[segment.document for segment in unit] for unit in packed_units] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in expected]
    for unit in packed_units:
        original = counts[unit[0].document // 3]
        packed = [segment.count for segment in unit]
        if sum(original) <= SEQ_LEN:
            assert tuple(packed) == original
        else:  # only the longest documents are truncated, to one length, and by no token more than needed
            longest = max(packed)
            assert packed == [min(n, longest) for n in original]
            assert sum(min(n, longest + 1) for n in original) > SEQ_LEN


@given(st.lists(st.tuples(*[st.integers(1, SEQ_LEN // 2)] * 2), max_size=30), st.integers(1, 9))
def test_nearby_packing_keeps_units_close_to_their_order(counts: list[tuple[int, int]],
                                                         num_open: int) -> None:
    units = [tuple(PackedSegment(2 * i + j, 0, n) for j, n in enumerate(unit))
             for i, unit in enumerate(counts)]
    rows = pack_units_nearby(units, SEQ_LEN, num_open)
    assert all(0 < count_tokens(row) <= SEQ_LEN for row in rows)
    row_of_document = {segment.document: i for i, row in enumerate(rows) for segment in row}
    assert sorted(row_of_document) == list(range(2 * len(units))), "each unit once"
    row_of_unit = [row_of_document[2 * i] for i in range(len(units))]
    assert row_of_unit == [row_of_document[2 * i + 1] for i in range(len(units))], "a unit stays whole"
    newest = -1
    for i, row in enumerate(row_of_unit):
        assert newest - num_open < row <= newest + 1
        if row == newest + 1:  # a row is opened only if no open row has space
            for open_row in range(max(0, row - num_open), row):
                used_tokens = sum(sum(counts[j]) for j in range(i) if row_of_unit[j] == open_row)
                assert SEQ_LEN - used_tokens < sum(counts[i])
        newest = max(newest, row)


@given(documents)
def test_concatenation_leaves_space_only_in_the_last_row(segments: list[PackedSegment]) -> None:
    rows = concatenate_segments(segments, SEQ_LEN)
    assert list_tokens(rows) == [(p.document, t) for p in segments for t in range(p.count)]
    assert all(count_tokens(row) == SEQ_LEN for row in rows[:-1])
