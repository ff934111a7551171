"""Packing documents into rows: best fit with as few cuts as possible, or one after another.

By best fit only a document longer than a row is cut (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830); all others stay whole, and the rows' rest is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """A contiguous part of one document inside a sample."""

    document: int
    """Index of the document in its source."""
    start: int
    """First token."""
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks here
    """Tokens."""


Row = tuple[Segment, ...]


def cut(parts: Iterable[Segment], seq_len: int) -> list[Segment]:
    """Return the same tokens in segments of at most `seq_len` tokens."""
    pieces: list[Segment] = []
    for part in parts:
        document, first, count = part
        if count <= seq_len:
            pieces.append(part)
        else:
            end = first + count
            pieces += [Segment(document, start, min(seq_len, end - start))
                       for start in range(first, end, seq_len)]
    return pieces


def truncate(parts: Iterable[Segment], seq_len: int) -> list[Segment]:
    """Return the parts without what goes beyond `seq_len` tokens: for conversations,
    whose later turns mean nothing alone."""
    return [p if p.count <= seq_len else Segment(p.document, p.start, seq_len) for p in parts]


def best_fit(segments: Iterable[Segment], seq_len: int) -> list[Row]:
    """Return rows of segments, each of at most `seq_len` tokens in all.

    Best-fit decreasing: the longest segment first, into the row with the least room that still holds it.  At
    most 11/9 of the fewest possible rows, plus four (Johnson et al., SIAM J. Comput. 3, 1974).  Rows come in
    the order in which they were opened.
    """
    rows: list[list[Segment]] = []
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


def concatenate(parts: Iterable[Segment], seq_len: int) -> list[Row]:
    """Return rows of documents one after another, cut wherever a row is full; only the last row
    may have room left."""
    rows: list[Row] = []
    row: list[Segment] = []
    room = seq_len
    for part in parts:
        start, end = part.start, part.start + part.count
        while start < end:
            count = min(room, end - start)
            row.append(Segment(part.document, start, count))
            start, room = start + count, room - count
            if room == 0:
                rows.append(tuple(row))
                row, room = [], seq_len
    return [*rows, tuple(row)] if row else rows
