"""Packing algorithms against the optimal number of rows, and token by token."""

import math

from hypothesis import given, settings, strategies as st

from megatron_sov.train.data.streams import (
    PackedSegment, Row, concatenate_segments, cut_segments, fit_units, pack_best_fit, pack_units,
    pack_units_nearby)

SEQ_LEN = 24
documents = st.lists(st.integers(1, 60), min_size=1, max_size=30).map(
    lambda counts: [PackedSegment(i, 0, n) for i, n in enumerate(counts)])


def tokens(rows: list[Row]) -> list[tuple[int, int]]:
    """Return (document, place) of every token, row by row."""
    return [(s.document, t) for row in rows for s in row for t in range(s.start, s.start + s.count)]


def fewest_rows(counts: list[int], seq_len: int) -> int:
    """Return the optimum by branch and bound: the longest document goes into each row of another room, or
    into a new row."""
    lengths = sorted(counts, reverse=True)
    best = len(lengths)

    def place(i: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        missing = sum(lengths[i:]) - sum(rooms)
        if len(rooms) + max(0, -(-missing // seq_len)) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for room in sorted({r for r in rooms if r >= lengths[i]}):
            k = rooms.index(room)
            place(i + 1, (*rooms[:k], *rooms[k + 1:], room - lengths[i]))
        place(i + 1, (*rooms, seq_len - lengths[i]))

    place(0, ())
    return best


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=11))
@settings(max_examples=150)
def test_best_fit_uses_at_most_one_row_more_than_the_optimum(counts: list[int]) -> None:
    """On sets this small it is never more than one row above, where the theorem would allow 11/9 and four."""
    rows = pack_best_fit([PackedSegment(i, 0, n) for i, n in enumerate(counts)], SEQ_LEN)
    assert fewest_rows(counts, SEQ_LEN) <= len(rows) <= fewest_rows(counts, SEQ_LEN) + 1
    assert sorted(s.count for row in rows for s in row) == sorted(counts)
    assert all(sum(s.count for s in row) <= SEQ_LEN for row in rows)


@given(documents)
def test_only_documents_longer_than_a_row_are_cut(parts: list[PackedSegment]) -> None:
    rows = pack_best_fit(cut_segments(parts, SEQ_LEN), SEQ_LEN)
    assert sorted(tokens(rows)) == sorted((p.document, t) for p in parts for t in range(p.count))
    pieces = [s.document for row in rows for s in row]
    assert all(pieces.count(p.document) == math.ceil(p.count / SEQ_LEN) for p in parts)


@given(documents)
def test_only_tokens_beyond_a_row_are_truncated(parts: list[PackedSegment]) -> None:
    units, over_long = fit_units(parts, 1, SEQ_LEN, drop=False)
    rows = pack_units(units, SEQ_LEN)
    assert sorted(s for row in rows for s in row) == [PackedSegment(p.document, 0, min(p.count, SEQ_LEN))
                                                      for p in parts]
    assert over_long == sum(p.count > SEQ_LEN for p in parts)
    assert fit_units(parts, 1, SEQ_LEN, drop=True) == ([(p,) for p in parts if p.count <= SEQ_LEN], over_long)


@given(st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=12), st.booleans())
def test_units_stay_whole_and_in_order(counts: list[tuple[int, ...]], drop: bool) -> None:
    parts = [PackedSegment(3 * i + j, 0, n) for i, unit in enumerate(counts) for j, n in enumerate(unit)]
    units, over_long = fit_units(parts, 3, SEQ_LEN, drop=drop)
    rows = pack_units(units, SEQ_LEN)
    assert over_long == sum(sum(unit) > SEQ_LEN for unit in counts)
    assert all(sum(s.count for s in row) <= SEQ_LEN for row in rows)
    of_rows = [s for row in rows for s in row]
    result = sorted(of_rows[i:i + 3] for i in range(0, len(of_rows), 3))
    assert [[s.document for s in unit] for unit in result] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i, unit in enumerate(counts) if not drop or sum(unit) <= SEQ_LEN]
    assert all(len(row) % 3 == 0 for row in rows)
    for unit in result:
        whole, kept = counts[unit[0].document // 3], [s.count for s in unit]
        if sum(whole) <= SEQ_LEN:
            assert tuple(kept) == whole
        else:  # the longest lose their tails, down to one length; no token more than it takes
            most = max(kept)
            assert kept == [min(n, most) for n in whole] and sum(min(n, most + 1) for n in whole) > SEQ_LEN


@given(st.lists(st.tuples(*[st.integers(1, SEQ_LEN // 2)] * 2), max_size=30), st.integers(1, 9))
def test_nearby_packing_keeps_units_close_to_their_order(counts: list[tuple[int, int]],
                                                         num_open: int) -> None:
    units = [tuple(PackedSegment(2 * i + j, 0, n) for j, n in enumerate(unit))
             for i, unit in enumerate(counts)]
    rows = pack_units_nearby(units, SEQ_LEN, num_open)
    assert all(0 < sum(s.count for s in row) <= SEQ_LEN for row in rows)
    place = {s.document: i for i, row in enumerate(rows) for s in row}
    assert sorted(place) == list(range(2 * len(units))), "each unit once"
    row_of_unit = [place[2 * i] for i in range(len(units))]
    assert row_of_unit == [place[2 * i + 1] for i in range(len(units))], "a unit stays whole"
    opened = -1
    for i, row in enumerate(row_of_unit):
        assert opened - num_open < row <= opened + 1
        if row == opened + 1:  # a row is opened where none of the last ones has room
            held = [sum(sum(counts[j]) for j in range(i) if row_of_unit[j] == r)
                    for r in range(max(0, row - num_open), row)]
            assert all(SEQ_LEN - tokens_held < sum(counts[i]) for tokens_held in held)
        opened = max(opened, row)


@given(documents)
def test_concatenation_leaves_space_only_in_the_last_row(parts: list[PackedSegment]) -> None:
    rows = concatenate_segments(parts, SEQ_LEN)
    assert tokens(rows) == [(p.document, t) for p in parts for t in range(p.count)]
    assert all(sum(s.count for s in row) == SEQ_LEN for row in rows[:-1])
