"""Packing documents into rows: best fit with as few cuts as possible, or one after another.

By best fit only a document longer than a row is cut (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830); all others stay whole, and the rows' rest is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PackedSegment(NamedTuple):
    """A contiguous part of one document inside a sample."""

    document: int
    """Index of the document in its source."""
    start: int
    """First token."""
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks here
    """Tokens."""


Row = tuple[PackedSegment, ...]


def cut(parts: Iterable[PackedSegment], seq_len: int) -> list[PackedSegment]:
    """Return the same tokens in segments of at most `seq_len` tokens."""
    pieces: list[PackedSegment] = []
    for part in parts:
        document, first, count = part
        if count <= seq_len:
            pieces.append(part)
        else:
            end = first + count
            pieces += [PackedSegment(document, start, min(seq_len, end - start))
                       for start in range(first, end, seq_len)]
    return pieces


def fitting(parts: Sequence[PackedSegment], group: int, seq_len: int, *, drop: bool) -> tuple[list[Row], int]:
    """Return units of at most `seq_len` tokens, and how many were longer: for conversations, whose later
    turns mean nothing alone.

    Args:
        parts: whole documents.
        group: how many in a row are one unit, such as the two of a preference.
        seq_len: tokens of a row.
        drop: longer units are left out; else their longest documents lose their tails.
    """
    units: list[Row] = []
    over_long = 0
    for i in range(0, len(parts), group):
        unit = tuple(parts[i:i + group])
        if sum(p.count for p in unit) > seq_len:
            over_long += 1
            if drop:
                continue
            unit = _shortened(unit, seq_len)
        units.append(unit)
    return units, over_long


def _shortened(unit: Row, seq_len: int) -> Row:
    """Return a unit without the tails of its longest documents, which are then of one length."""
    most, room = 0, seq_len
    for left, count in zip(range(len(unit), 0, -1), sorted(p.count for p in unit), strict=True):
        most = room // left
        if count > most:
            break
        room -= count
    return tuple(PackedSegment(p.document, p.start, min(p.count, most)) for p in unit)


def best_fit_units(units: Sequence[Row], seq_len: int) -> list[Row]:
    """Return rows of whole units, each of at most `seq_len` tokens in all, as `best_fit` does of segments."""
    rows = best_fit((PackedSegment(i, 0, sum(p.count for p in unit)) for i, unit in enumerate(units)),
                    seq_len)
    return [tuple(part for stands_for in row for part in units[stands_for.document]) for row in rows]


def best_fit(segments: Iterable[PackedSegment], seq_len: int) -> list[Row]:
    """Return rows of segments, each of at most `seq_len` tokens in all.

    Best-fit decreasing: the longest segment first, into the row with the least room that still holds it.  At
    most 11/9 of the fewest possible rows, plus four (Johnson et al., SIAM J. Comput. 3, 1974).  Rows come in
    the order in which they were opened.
    """
    rows: list[list[PackedSegment]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for segment in sorted(segments, key=lambda s: -s.count):
        count = segment.count
        i = bisect.bisect_left(room, (count, -1))
        if i < len(room):
            free, row = room.pop(i)
            rows[row].append(segment)
        else:
            free, row = seq_len, len(rows)
            rows.append([segment])
        if free > count:
            bisect.insort(room, (free - count, row))
    return [tuple(row) for row in rows]


def concatenate(parts: Iterable[PackedSegment], seq_len: int) -> list[Row]:
    """Return rows of documents one after another, cut wherever a row is full; only the last row
    may have room left."""
    rows: list[Row] = []
    row: list[PackedSegment] = []
    room = seq_len
    for part in parts:
        start, end = part.start, part.start + part.count
        while start < end:
            count = min(room, end - start)
            row.append(PackedSegment(part.document, start, count))
            start, room = start + count, room - count
            if room == 0:
                rows.append(tuple(row))
                row, room = [], seq_len
    return [*rows, tuple(row)] if row else rows
