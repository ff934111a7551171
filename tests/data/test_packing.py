"""Packing against the fewest rows there can be, and token by token."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sov.data.packing import Row, Segment, best_fit, concatenate, cut, truncate

SEQ_LEN = 24
documents = st.lists(st.integers(1, 60), min_size=1, max_size=30).map(lambda counts: [Segment(i, 0, n) for i, n in enumerate(counts)])


def tokens(rows: list[Row]) -> list[tuple[int, int]]:
    """Return (document, place) of every token, row by row."""
    return [(s.document, t) for row in rows for s in row for t in range(s.start, s.start + s.count)]


def fewest_rows(counts: list[int], seq_len: int) -> int:
    """The optimum by branch and bound: the longest item goes into each row that differs in its room, or into a new one."""
    items = sorted(counts, reverse=True)
    best = len(items)

    def place(i: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        missing = sum(items[i:]) - sum(rooms)
        if len(rooms) + max(0, math.ceil(missing / seq_len)) >= best:
            return
        if i == len(items):
            best = len(rooms)
            return
        for room in sorted({r for r in rooms if r >= items[i]}):
            place(i + 1, tuple(sorted([*(rooms[:(k := rooms.index(room))]), *rooms[k + 1:], room - items[i]])))
        place(i + 1, (*rooms, seq_len - items[i]))

    place(0, ())
    return best


def test_the_optimum_by_hand() -> None:
    """6 3 3 | 4 4 4 fills two rows of 12; best fit puts 6 4 | 4 4 3 and needs a third for the last 3."""
    assert fewest_rows([6, 4, 4, 4, 3, 3], 12) == 2
    assert len(best_fit([Segment(i, 0, n) for i, n in enumerate([6, 4, 4, 4, 3, 3])], 12)) == 3
    assert fewest_rows([7, 7, 7], 12) == 3
    assert fewest_rows([3] * 8, 12) == 2


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=11))
@settings(max_examples=150)
def test_best_fit_is_within_its_bound_of_the_fewest_rows(counts: list[int]) -> None:
    """On sets this small it is never more than one row above, where the theorem would allow 11/9 and four."""
    rows = best_fit([Segment(i, 0, n) for i, n in enumerate(counts)], SEQ_LEN)
    assert fewest_rows(counts, SEQ_LEN) <= len(rows) <= fewest_rows(counts, SEQ_LEN) + 1
    assert sorted(s.count for row in rows for s in row) == sorted(counts)
    assert all(sum(s.count for s in row) <= SEQ_LEN for row in rows)


@given(documents)
def test_only_documents_longer_than_a_row_are_cut(parts: list[Segment]) -> None:
    rows = best_fit(cut(parts, SEQ_LEN), SEQ_LEN)
    assert sorted(tokens(rows)) == sorted((p.document, t) for p in parts for t in range(p.count))
    pieces = [s.document for row in rows for s in row]
    assert all(pieces.count(p.document) == math.ceil(p.count / SEQ_LEN) for p in parts)


@given(documents)
def test_conversations_lose_what_is_beyond_a_row_and_nothing_else(parts: list[Segment]) -> None:
    rows = best_fit(truncate(parts, SEQ_LEN), SEQ_LEN)
    assert sorted(s for row in rows for s in row) == [Segment(p.document, 0, min(p.count, SEQ_LEN)) for p in parts]


@given(documents)
def test_one_after_another_leaves_no_room_but_at_the_end(parts: list[Segment]) -> None:
    rows = concatenate(parts, SEQ_LEN)
    assert tokens(rows) == [(p.document, t) for p in parts for t in range(p.count)]
    assert all(sum(s.count for s in row) == SEQ_LEN for row in rows[:-1])


def test_rows_by_hand() -> None:
    a, b, c, d = (Segment(i, 0, n) for i, n in enumerate((3, 7, 5, 12)))
    assert best_fit(cut([a, b, c, d], 10), 10) == [(Segment(3, 0, 10),), (b, a), (c, Segment(3, 10, 2))]
    assert concatenate([a, b, c], 10) == [(a, b), (c,)]
    assert best_fit([], 10) == concatenate([], 10) == []
