"""The endless, shuffled, packed documents of one source, with a cursor of a few integers.

A stream goes through its source in windows of `WINDOW_DOCUMENTS` shuffled documents.  Each window is packed on its own,
so memory and start-up do not depend on the size of the source.  When the sample length changes inside a window, what is
left of the window is packed anew at the new length: no document is repeated or lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sov.data.packing import Row, Segment, best_fit, concatenate, cut, truncate
from megatron_sov.data.permutation import Permutation
from megatron_sov.data.shards import Documents

WINDOW_DOCUMENTS = 8192
Packing = Literal["best_fit", "truncate", "concat"]
"""best_fit: whole documents, longer ones cut into rows; truncate: whole documents, longer ones lose their tail;
concat: documents follow one another and are cut wherever a row ends."""


@dataclass
class Cursor:
    """Where a stream stands; plain values."""

    epoch: int = 0
    """Passes over the source that are complete."""
    window: int = 0
    """Windows of this epoch that are complete."""
    taken: list[list[int]] = field(default_factory=list)
    """[sample length, rows taken at that length] of the current window, in order of use."""
    tokens: int = 0
    """Tokens given in all."""
    samples: int = 0
    """Samples given in all."""


class Stream:
    """One source's samples, one after another."""

    def __init__(self, name: str, documents: Documents, seed: int, packing: Packing, cursor: Cursor) -> None:
        self.name, self.documents, self.cursor = name, documents, cursor
        self._key = (seed, name)
        self._packing = packing
        self._rows: list[Row] = []
        self._replay()

    def next_sample(self, seq_len: int) -> Row:
        """Return the segments of the next sample of at most `seq_len` tokens and move the cursor behind them."""
        while (row := self._take(seq_len)) is None:
            self._next_window()
        self.cursor.tokens += sum(s.count for s in row)
        self.cursor.samples += 1
        return row

    def _replay(self) -> None:
        """Bring a window to where its cursor says."""
        taken, self.cursor.taken = self.cursor.taken, []
        for seq_len, rows in taken:
            for _ in range(rows):
                self._take(seq_len)

    def _next_window(self) -> None:
        c = self.cursor
        c.window, c.taken, self._rows = c.window + 1, [], []
        if c.window * WINDOW_DOCUMENTS >= len(self.documents.lengths):
            c.window, c.epoch = 0, c.epoch + 1

    def _take(self, seq_len: int) -> Row | None:
        """Return the next row of the window at this length, or None when the window is used up."""
        taken = self.cursor.taken
        if not taken or taken[-1][0] != seq_len:
            parts = self._left() if taken else self._window()
            self._rows = self._pack(parts, seq_len)
            if not self._rows:
                return None
            taken.append([seq_len, 0])
        if not self._rows:
            return None
        taken[-1][1] += 1
        return self._rows.pop()

    def _window(self) -> list[Segment]:
        """Return the documents of the cursor's window, shuffled."""
        count = len(self.documents.lengths)
        first = self.cursor.window * WINDOW_DOCUMENTS
        shuffle = Permutation(count, *self._key, self.cursor.epoch)
        documents = (shuffle[i] for i in range(first, min(first + WINDOW_DOCUMENTS, count)))
        return [Segment(d, 0, n) for d in documents if (n := int(self.documents.lengths[d])) > 0]

    def _left(self) -> list[Segment]:
        """Return what is left of the window, in the order in which it would have come, parts of one document joined."""
        if self._packing == "truncate":
            return [Segment(s.document, 0, int(self.documents.lengths[s.document])) for row in reversed(self._rows) for s in row]
        joined: dict[tuple[int, int], Segment] = {}
        for s in sorted((s for row in self._rows for s in row), key=lambda s: (s.document, s.start)):
            before = joined.pop((s.document, s.start), None)  # the part that ends where this one starts
            part = Segment(s.document, before.start, before.count + s.count) if before else s
            joined[(s.document, s.start + s.count)] = part
        parts = list(joined.values())
        shuffle = Permutation(len(parts), *self._key, self.cursor.epoch, self.cursor.window, "left", len(self.cursor.taken))
        return [parts[shuffle[i]] for i in range(len(parts))]

    def _pack(self, parts: list[Segment], seq_len: int) -> list[Row]:
        """Return rows in the reverse of the order in which they are given."""
        if self._packing == "concat":
            return concatenate(parts, seq_len)[::-1]
        rows = best_fit(cut(parts, seq_len) if self._packing == "best_fit" else truncate(parts, seq_len), seq_len)
        # best fit opens rows by length; shuffled, so that a row's length says nothing about its place in the window
        shuffle = Permutation(len(rows), *self._key, self.cursor.epoch, self.cursor.window, len(self.cursor.taken))
        return [rows[shuffle[i]] for i in range(len(rows))]
