"""Packing documents into rows: best fit with as few cuts as possible.

Only a document longer than a row is cut (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830);
all others stay whole, and the rows' rest is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A contiguous part of one document inside a sample."""

    document: int
    """Index of the document in its source."""
    start: int
    """First token."""
    count: int
    """Tokens."""


Row = tuple[Segment, ...]


def cut(parts: Iterable[Segment], seq_len: int) -> list[Segment]:
    """Return the same tokens in segments of at most `seq_len` tokens."""
    return [Segment(p.document, start, min(seq_len, p.start + p.count - start))
            for p in parts for start in range(p.start, p.start + p.count, seq_len)]


def truncate(parts: Iterable[Segment], seq_len: int) -> list[Segment]:
    """Return the parts without what goes beyond `seq_len` tokens: for conversations, whose later turns mean nothing alone."""
    return [Segment(p.document, p.start, min(seq_len, p.count)) for p in parts]


def best_fit(segments: Iterable[Segment], seq_len: int) -> list[Row]:
    """Return rows of segments, each of at most `seq_len` tokens in all.

    Best-fit decreasing: the longest segment first, into the row with the least room that still holds it.  At most 11/9 of
    the fewest possible rows, plus one (Johnson, 1974).  Rows come in the order in which they were opened.
    """
    rows: list[list[Segment]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for segment in sorted(segments, key=lambda s: -s.count):
        i = bisect.bisect_left(room, (segment.count, -1))
        if i < len(room):
            free, row = room.pop(i)
        else:
            free, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(segment)
        if free > segment.count:
            bisect.insort(room, (free - segment.count, row))
    return [tuple(row) for row in rows]


def concatenate(parts: Iterable[Segment], seq_len: int) -> list[Row]:
    """Return rows of documents one after another, cut wherever a row is full; only the last row may have room left."""
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


def padding_share(rows: Sequence[Row], seq_len: int) -> float:
    """Return the part of all rows' tokens that is padding."""
    filled = sum(s.count for row in rows for s in row)
    return 1 - filled / (len(rows) * seq_len) if rows else 0.0
