"""The endless, shuffled, packed documents of one source, with a cursor of a few integers.

A stream goes through its source in windows of at most `WINDOW_DOCUMENTS` shuffled documents.  Each window is
packed on its own, so memory and start-up do not depend on the size of the source.  When the sample length
changes inside a window, what is left of the window is packed anew at the new length:
no document is repeated or lost.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.train.data.token_shards import Documents

# Packing documents into rows: best fit with as few cuts as possible, or one after another.
#
# By best fit only a document longer than a row is cut (Ding et al., "Fewer Truncations Improve
# Language Modeling", arXiv 2404.10830); all others stay whole, and the rows' rest is padding.

class PackedSegment(NamedTuple):
    """A contiguous part of one document inside a sample."""

    document: int
    """Index of the document in its source."""
    start: int
    """First token."""
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks here
    """Tokens."""


Row = tuple[PackedSegment, ...]


def cut_segments(parts: Iterable[PackedSegment], seq_len: int) -> list[PackedSegment]:
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


def fit_units(parts: Sequence[PackedSegment], group: int, seq_len: int, *,
              drop: bool) -> tuple[list[Row], int]:
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


def pack_units(units: Sequence[Row], seq_len: int) -> list[Row]:
    """Return rows of whole units, each of at most `seq_len` tokens in all, as `best_fit` does of segments."""
    rows = pack_best_fit((PackedSegment(i, 0, sum(p.count for p in unit)) for i, unit in enumerate(units)),
                    seq_len)
    found: list[Row] = []
    for row in rows:
        whole = [units[stands_for.document] for stands_for in row]
        found.append(tuple(part for unit in whole for part in unit))
    return found


def pack_units_nearby(units: Sequence[Row], seq_len: int, num_open: int) -> list[Row]:
    """Return rows of whole units, each of at most `seq_len` tokens in all, so that units that follow one
    another lie in the same row or in rows nearby.

    Best fit of bounded space (Csirik and Johnson, Algorithmica 31, 2001): each unit goes into the row with
    the least room that holds it, of the last `num_open` rows.
    """
    rows: list[list[PackedSegment]] = []
    room: list[int] = []
    for unit in units:
        count = sum(part.count for part in unit)
        holding = [i for i in range(max(0, len(rows) - num_open), len(rows)) if room[i] >= count]
        if not holding:
            holding = [len(rows)]
            rows.append([])
            room.append(seq_len)
        row = min(holding, key=room.__getitem__)
        rows[row] += unit
        room[row] -= count
    return [tuple(row) for row in rows]


def pack_best_fit(segments: Iterable[PackedSegment], seq_len: int) -> list[Row]:
    """Return rows of segments, each of at most `seq_len` tokens in all.

    Best-fit decreasing: the longest segment first, into the row with the least room that still holds it.  At
    most 11/9 of the fewest possible rows, plus four (Johnson et al., SIAM J. Comput. 3, 1974).  Rows come in
    the order in which they were opened.
    """
    rows: list[list[PackedSegment]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    # sorting is stable: segments of one length keep the shuffled order that they came in
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


def concatenate_segments(parts: Iterable[PackedSegment], seq_len: int) -> list[Row]:
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


_ROUNDS = 6
_U = np.uint64
WINDOW_DOCUMENTS = 8192
Item = TypeVar("Item")
Packing = Literal["best_fit", "concat", "truncate", "drop"]
"""best_fit: whole documents, longer ones cut into rows; concat: documents follow one another and are cut
wherever a row ends; truncate: whole units of documents, longer ones lose their tail; drop: whole units,
longer ones are left out."""


# Shuffling without a list: a keyed permutation of [0, n) that is computed for any stretch of indices.


class Permutation:
    """A pseudo-random permutation of `size` indices, a function of its key alone.

    A balanced Feistel network over the next power of four, walked along its cycle until the result is below
    `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002).  Memory does not grow with `size`.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._half_bits, self._mask = _U(half_bits), _U((1 << half_bits) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def span(self, first: int, last: int) -> np.ndarray:
        """Return [last - first] int64: where the indices first, ..., last - 1 go.

        Raises:
            IndexError: one of them lies outside.
        """
        if not 0 <= first <= last <= self.size:
            raise IndexError(f"indices {first} to {last - 1} are not all inside a permutation of {self.size}")
        # the network permutes a power of four that is at most four times as large; an index that leaves the
        # range walks on along its own cycle, so two of them never meet and the walk ends
        values = self._encrypt(np.arange(first, last, dtype=np.uint64))
        while len(outside := np.flatnonzero(values >= _U(self.size))):
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), modulo 2^64."""
    x = x + _U(0x9E3779B97F4A7C15)
    x = (x ^ x >> _U(30)) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ x >> _U(27)) * _U(0x94D049BB133111EB)
    return x ^ x >> _U(31)


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
    window_documents: int = field(default_factory=lambda: WINDOW_DOCUMENTS)
    """Size of a window when the stream began, in units; it keeps it, so that a resumed run meets the
    same windows."""
    over_long: int = 0
    """Units met that were longer than a sample."""


class DocumentStream:
    """One source's samples, one after another."""

    def __init__(self, name: str, documents: Documents, seed: int, packing: Packing, cursor: Cursor,
                 group: int = 1) -> None:
        """Go on where a cursor stands.

        Args:
            name: of the source.
            documents: its documents.
            seed: of the order.
            packing: how documents become rows.
            cursor: where the stream stands; it is moved.
            group: documents in a row that are one unit: shuffled as one, and whole in one row.
        """
        self.name, self.documents, self.cursor, self._group = name, documents, cursor, group
        self._key = (seed, name)
        self._packing = packing
        self.num_windows = -(-(len(documents.lengths) // group) // cursor.window_documents)
        """Windows of documents, each packed on its own, that one pass goes through."""
        self._rows: list[Row] = []
        self._replay()

    def next_sample(self, seq_len: int) -> Row:
        """Return the segments of the next sample of at most `seq_len` tokens and move the cursor behind them.

        Raises:
            UserError: the source has no token.
        """
        windows_without = 0
        while (row := self._take(seq_len)) is None:
            windows_without += 1
            if windows_without > self.num_windows + 1:  # the current one may be used up
                if self.cursor.over_long:
                    raise UserError(f"source {self.name!r}: all of its {len(self.documents.lengths)} "
                                    f"training documents are longer than a sample of {seq_len} tokens, and "
                                    "data.over_long = drop leaves them out; make samples longer (seq_len), "
                                    "or set data.over_long=cut")
                raise UserError(f"source {self.name!r}: none of its {len(self.documents.lengths)} training "
                                "documents holds a token, although its manifest counts some; "
                                "run `sov-data verify` and pack the data again")
            self._next_window()
        self.cursor.tokens += sum(s.count for s in row)
        self.cursor.samples += 1
        return row

    def count_samples(self, seq_len: int, windows: int) -> int:
        """Return how many samples of `seq_len` tokens the next windows make; moves the cursor."""
        found = 0
        for _ in range(windows):
            self._rows, self.cursor.taken = [], []
            found += len(self._pack(self._window(), seq_len))
            self._next_window()
        return found

    def epochs(self) -> float:
        """Return how often the source was gone through, its current window counted by rows."""
        taken = sum(rows for _, rows in self.cursor.taken)
        windows = self.cursor.window + (taken / (taken + len(self._rows)) if taken else 0.0)
        return self.cursor.epoch + windows / self.num_windows

    def _replay(self) -> None:
        """Bring a window to where its cursor says."""
        # rows are not stored: the same calls in the same order give them again. Packing counts over-long
        # units again meanwhile, so their number is put back
        taken, self.cursor.taken, counted = self.cursor.taken, [], self.cursor.over_long
        for seq_len, rows in taken:
            for _ in range(rows):
                self._take(seq_len)
        self.cursor.over_long = counted

    def _next_window(self) -> None:
        c = self.cursor
        c.window, c.taken, self._rows = c.window + 1, [], []
        if c.window >= self.num_windows:
            c.window, c.epoch = 0, c.epoch + 1

    def _take(self, seq_len: int) -> Row | None:
        """Return the next row of the window at this length, or None when the window is used up."""
        taken = self.cursor.taken
        # a new length repacks what is left of the window; nothing that was given comes again, and nothing is
        # lost
        if not taken or taken[-1][0] != seq_len:
            rows = self._pack(self._left() if taken else self._window(), seq_len)
            if not rows:
                return None
            self._rows = rows
            taken.append([seq_len, 0])
        if not self._rows:
            return None
        taken[-1][1] += 1
        return self._rows.pop()

    def _window(self) -> list[PackedSegment]:
        """Return the documents of the cursor's window, shuffled by units.

        Windows are of equal size to a unit, so that none is too small to be packed well.
        """
        # shuffled are units, not documents: the two of a pair never part; a last unit that is not whole is
        # never given
        count, group = len(self.documents.lengths) // self._group, self._group
        shuffle = Permutation(count, *self._key, self.cursor.epoch)
        first, last = (count * w // self.num_windows for w in (self.cursor.window, self.cursor.window + 1))
        documents = (shuffle.span(first, last)[:, None] * group + np.arange(group)).reshape(-1)
        lengths = np.asarray(self.documents.lengths[documents])
        # a document without tokens takes its whole unit with it: half a pair teaches nothing
        filled = (lengths.reshape(-1, group) > 0).all(axis=1).repeat(group)
        return [PackedSegment(d, 0, n) for d, n in zip(documents[filled].tolist(), lengths[filled].tolist(),
                                                       strict=True)]

    def _left(self) -> list[PackedSegment]:
        """Return what is left of the window, shuffled, parts of one document joined."""
        left = sorted(s for row in self._rows for s in row)
        # a tail that was cut off comes back: the unit may fit whole at the new length
        if self._packing in ("truncate", "drop"):
            whole = [PackedSegment(s.document, 0, int(self.documents.lengths[s.document])) for s in left]
            units = [whole[i:i + self._group] for i in range(0, len(whole), self._group)]
            return [part for unit in self._shuffled(units, "left") for part in unit]
        parts: list[PackedSegment] = []
        for s in left:
            before = parts[-1] if parts else None
            if before and before.document == s.document and before.start + before.count == s.start:
                parts[-1] = PackedSegment(s.document, before.start, before.count + s.count)
            else:
                parts.append(s)
        return self._shuffled(parts, "left")

    def _pack(self, parts: list[PackedSegment], seq_len: int) -> list[Row]:
        """Return rows in the reverse of the order in which they are given."""
        if self._packing == "concat":
            return concatenate_segments(parts, seq_len)[::-1]
        if self._packing == "best_fit":
            rows = pack_best_fit(cut_segments(parts, seq_len), seq_len)
        else:
            units, over_long = fit_units(parts, self._group, seq_len, drop=self._packing == "drop")
            self.cursor.over_long += over_long
            rows = pack_units(units, seq_len)
        # best fit opens rows by length; shuffled, so that a row's length says nothing about its
        # place in the window
        return self._shuffled(rows, "rows")

    def _shuffled(self, items: list[Item], what: str) -> list[Item]:
        """Return the items in an order that is a function of the place in the source."""
        shuffle = Permutation(len(items), *self._key, self.cursor.epoch, self.cursor.window, what,
                              len(self.cursor.taken))
        return [items[i] for i in shuffle.span(0, len(items))]
