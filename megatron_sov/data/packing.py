"""Packing documents into rows: best fit with as few cuts as possible.

Only a document longer than a row is cut (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830);
all others stay whole, and the rows' rest is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
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


def cut(documents: Sequence[int], lengths: Sequence[int], seq_len: int, *, keep_tails: bool) -> list[Segment]:
    """Return the documents as segments of at most `seq_len` tokens.

    Args:
        documents: indices of documents.
        lengths: tokens of each of them; documents without tokens give no segment.
        keep_tails: whether a longer document continues in further segments; without it its tail is left out
            (conversations, whose later turns make no sense alone).
    """
    segments = []
    for document, length in zip(documents, lengths, strict=True):
        last = length if keep_tails else min(length, seq_len)
        segments += [Segment(document, start, min(seq_len, last - start)) for start in range(0, last, seq_len)]
    return segments


def best_fit(segments: Sequence[Segment], seq_len: int) -> list[tuple[Segment, ...]]:
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


def padding_share(rows: Sequence[tuple[Segment, ...]], seq_len: int) -> float:
    """Return the part of all rows' tokens that is padding."""
    filled = sum(s.count for row in rows for s in row)
    return 1 - filled / (len(rows) * seq_len) if rows else 0.0
