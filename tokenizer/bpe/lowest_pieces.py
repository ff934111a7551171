"""A sample of a unit's text, taken before it is known how much text its group has."""

from __future__ import annotations

import itertools
from operator import attrgetter

from tokenizer.mixture import Excerpt

_SLACK = 4
"""Times the limit that are held before the rest is dropped."""


class LowestPieces:
    """The pieces whose hashes are lowest: so many that they hold any share of the group that is
    of `limit_bytes` or less (`tokenizer.mixture.share_of`)."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[Excerpt] = []
        self._size_bytes, self._drop_at_bytes = 0, _SLACK * limit_bytes
        self._highest: float = float("inf")

    def add(self, piece: Excerpt) -> None:
        """Take a piece into the sample, if it may belong to it."""
        if piece.bucket <= self._highest:
            self._pieces.append(piece)
            self._size_bytes += len(piece.raw)
            if self._size_bytes > self._drop_at_bytes:
                self._drop()

    def _drop(self) -> None:
        """Drop what lies above the limit.  A share may end behind the bucket that passes it, where it comes
        nearest to its size, so that bucket is kept."""
        kept: list[Excerpt] = []
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
        self._drop_at_bytes = max(_SLACK * self._limit_bytes, 2 * self._size_bytes)

    def found(self) -> list[Excerpt]:
        """Return the pieces."""
        self._drop()
        return self._pieces
