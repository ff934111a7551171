"""An endless stream of shuffled, packed documents from a source, with a cursor that is a few integers.

A stream reads its source in windows of at most `WINDOW_DOCUMENTS` shuffled documents. Each window is packed
separately, so memory and start-up do not depend on the size of the source. If the sample length changes
inside a window, the rest of the window is packed again at the new length: no document is repeated or lost.

A unit is a group of documents that are shuffled and packed together, such as a preference pair."""

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.train.data.token_shards import Documents

WINDOW_DOCUMENTS = 8192
"""Units per window."""
_ROUNDS = 6
"""Rounds in the Feistel network."""
_U = np.uint64
Item = TypeVar("Item")
Packing = Literal["best_fit", "concat", "truncate", "drop"]
"""best_fit: whole documents, cut only if longer than a row; concat: consecutive documents, cut at the end of
each row; truncate: whole units, longer units lose their tail; drop: whole units, no longer units."""


class PackedSegment(NamedTuple):
    """A contiguous range of tokens of one document in a row."""

    document: int
    """Document index in the source."""
    start: int
    """First token."""
    count: int  # type: ignore[assignment]  # hides tuple.count
    """Tokens."""


Row = tuple[PackedSegment, ...]


@dataclass
class Cursor:
    """A stream's position in its source, as JSON values."""

    epoch: int = 0
    """Complete passes over the source."""
    window: int = 0
    """Complete windows in the current epoch."""
    taken: list[list[int]] = field(default_factory=list)
    """[sample length, rows taken at the length] for the current window, in order of use."""
    tokens: int = 0
    """Total tokens taken."""
    samples: int = 0
    """Total samples taken."""
    window_documents: int = field(default_factory=lambda: WINDOW_DOCUMENTS)
    """Units per window when the stream began, so that a resumed run reads equal windows."""
    over_long: int = 0
    """Units read that were longer than a sample."""


class DocumentStream:
    """Returns samples from a source."""

    def __init__(self, name: str, documents: Documents, seed: int, packing: Packing, cursor: Cursor,
                 group: int = 1) -> None:
        """Continue at `cursor`, which `next_sample` advances; `group` is the number of documents per unit."""
        self.name, self.documents, self.cursor, self._group = name, documents, cursor, group
        self._key = (seed, name)
        self._packing = packing
        self.num_windows = -(-(len(documents.lengths) // group) // cursor.window_documents)
        """Windows per epoch."""
        self._rows: list[Row] = []
        self._replay_cursor()

    def next_sample(self, seq_len: int) -> Row:
        """Return the segments of the next sample, with at most `seq_len` tokens, and advance the cursor.

        Raises `UserError` if the source has no token, or if every unit is longer than a sample and dropped.
        """
        empty_windows = 0
        while (row := self._take_row(seq_len)) is None:
            empty_windows += 1
            if empty_windows > self.num_windows + 1:  # the current window may be used up
                if self.cursor.over_long:
                    raise UserError(f"source {self.name!r}: all of its {len(self.documents.lengths)} "
                                    f"training documents are longer than seq_len = {seq_len}, and "
                                    "data.over_long = drop omits them; raise seq_len, or set "
                                    "data.over_long=cut")
                raise UserError(f"source {self.name!r}: none of its {len(self.documents.lengths)} training "
                                "documents contains a token, although its manifest counts some; "
                                "run `sov-data verify` and pack the data again")
            self._next_window()
        self.cursor.tokens += sum(s.count for s in row)
        self.cursor.samples += 1
        return row

    def count_samples(self, seq_len: int, windows: int) -> int:
        """Return the number of `seq_len`-token samples in the next windows; advances the cursor."""
        count = 0
        for _ in range(windows):
            self._rows, self.cursor.taken = [], []
            count += len(self._pack_rows(self._shuffle_window(), seq_len))
            self._next_window()
        return count

    def count_epochs(self) -> float:
        """Return the passes over the source; the current window counts by its share of taken rows."""
        taken = sum(rows for _, rows in self.cursor.taken)
        windows = self.cursor.window + (taken / (taken + len(self._rows)) if taken else 0.0)
        return self.cursor.epoch + windows / self.num_windows

    def _replay_cursor(self) -> None:
        """Repeat taking the rows that `cursor.taken` counts in the current window."""
        # Rows are not stored: repeating the calls reproduces them. Packing counts over-long units a second
        # time, so their number is restored.
        taken, self.cursor.taken, over_long = self.cursor.taken, [], self.cursor.over_long
        for seq_len, rows in taken:
            for _ in range(rows):
                self._take_row(seq_len)
        self.cursor.over_long = over_long

    def _next_window(self) -> None:
        cursor = self.cursor
        cursor.window, cursor.taken, self._rows = cursor.window + 1, [], []
        if cursor.window >= self.num_windows:
            cursor.window, cursor.epoch = 0, cursor.epoch + 1

    def _take_row(self, seq_len: int) -> Row | None:
        """Return the window's next row with at most `seq_len` tokens, or None at its end."""
        taken = self.cursor.taken
        # a new length packs the rest of the window again, so that no document is repeated or lost
        if not taken or taken[-1][0] != seq_len:
            rows = self._pack_rows(self._join_remaining() if taken else self._shuffle_window(), seq_len)
            if not rows:
                return None
            self._rows = rows
            taken.append([seq_len, 0])
        if not self._rows:
            return None
        taken[-1][1] += 1
        return self._rows.pop()

    def _shuffle_window(self) -> list[PackedSegment]:
        """Return the documents in the cursor's window, shuffled by units.

        Window sizes differ by at most one unit, so that no window is too small to be packed well."""
        # shuffling units instead of documents leaves pairs together; an incomplete last unit is never read
        count, group = len(self.documents.lengths) // self._group, self._group
        permutation = Permutation(count, *self._key, self.cursor.epoch)
        first, last = (count * w // self.num_windows for w in (self.cursor.window, self.cursor.window + 1))
        documents = (permutation.permute(first, last)[:, None] * group + np.arange(group)).reshape(-1)
        lengths = np.asarray(self.documents.lengths[documents])
        # an empty document removes its unit, because half a pair is useless
        is_used = (lengths.reshape(-1, group) > 0).all(axis=1).repeat(group)
        return [PackedSegment(d, 0, n) for d, n in zip(documents[is_used].tolist(), lengths[is_used].tolist(),
                                                       strict=True)]

    def _join_remaining(self) -> list[PackedSegment]:
        """Return the window's remaining documents, shuffled, with adjacent segments of a document joined."""
        remaining = sorted(segment for row in self._rows for segment in row)
        # Truncated documents become whole again, because the unit may fit at the new length.
        if self._packing in ("truncate", "drop"):
            documents = [PackedSegment(s.document, 0, int(self.documents.lengths[s.document]))
                         for s in remaining]
            units = [documents[i:i + self._group] for i in range(0, len(documents), self._group)]
            return [segment for unit in self._shuffle_items(units, "left") for segment in unit]
        joined: list[PackedSegment] = []
        for s in remaining:
            last = joined[-1] if joined else None
            if last and last.document == s.document and last.start + last.count == s.start:
                joined[-1] = PackedSegment(s.document, last.start, last.count + s.count)
            else:
                joined.append(s)
        return self._shuffle_items(joined, "left")

    def _pack_rows(self, segments: list[PackedSegment], seq_len: int) -> list[Row]:
        """Pack segments into rows, in reverse order, because `_take_row` takes the last row."""
        if self._packing == "concat":
            return concatenate_segments(segments, seq_len)[::-1]
        if self._packing == "best_fit":
            rows = pack_best_fit(cut_segments(segments, seq_len), seq_len)
        else:
            units, over_long = fit_units(segments, self._group, seq_len, drop=self._packing == "drop")
            self.cursor.over_long += over_long
            rows = pack_units(units, seq_len)
        # best fit sorts rows by length: shuffled, so that length and position are independent
        return self._shuffle_items(rows, "rows")

    def _shuffle_items(self, items: list[Item], purpose: str) -> list[Item]:
        """Shuffle `items` by a permutation whose key is `purpose` and the cursor's position."""
        permutation = Permutation(len(items), *self._key, self.cursor.epoch, self.cursor.window, purpose,
                                  len(self.cursor.taken))
        return [items[i] for i in permutation.permute(0, len(items))]


def cut_segments(segments: Iterable[PackedSegment], seq_len: int) -> list[PackedSegment]:
    """Split long segments, so that none exceeds `seq_len` tokens."""
    short: list[PackedSegment] = []
    for segment in segments:
        document, first, count = segment
        if count <= seq_len:
            short.append(segment)
        else:
            end = first + count
            short += [PackedSegment(document, start, min(seq_len, end - start))
                      for start in range(first, end, seq_len)]
    return short


def fit_units(segments: Sequence[PackedSegment], group: int, seq_len: int, *,
              drop: bool) -> tuple[list[Row], int]:
    """Return units (`group` documents) that fit `seq_len` tokens, and the number of longer units.

    `drop` leaves longer units out; otherwise the tails of their longest documents are cut. Conversations are
    never split over rows, because later turns make no sense without earlier turns."""
    units: list[Row] = []
    over_long = 0
    for i in range(0, len(segments), group):
        unit = tuple(segments[i:i + group])
        if sum(p.count for p in unit) > seq_len:
            over_long += 1
            if drop:
                continue
            unit = _shorten_unit(unit, seq_len)
        units.append(unit)
    return units, over_long


def _shorten_unit(unit: Row, seq_len: int) -> Row:
    """Cut the tails of a unit's longest documents to one length, so that the unit fits `seq_len`."""
    limit, free_tokens = 0, seq_len
    # shortest documents first: a document within an equal share of the free tokens stays whole
    for i, count in enumerate(sorted(segment.count for segment in unit)):
        limit = free_tokens // (len(unit) - i)
        if count > limit:
            break
        free_tokens -= count
    return tuple(PackedSegment(p.document, p.start, min(p.count, limit)) for p in unit)


def pack_units(units: Sequence[Row], seq_len: int) -> list[Row]:
    """Pack whole units into rows with at most `seq_len` tokens by `pack_best_fit`."""
    # a segment stands for each unit, with the unit's index as its document
    num_tokens = (sum(segment.count for segment in unit) for unit in units)
    segments = (PackedSegment(index, 0, count) for index, count in enumerate(num_tokens))
    rows: list[Row] = []
    for row in pack_best_fit(segments, seq_len):
        row_segments: list[PackedSegment] = []
        for segment in row:
            row_segments += units[segment.document]
        rows.append(tuple(row_segments))
    return rows


def pack_units_nearby(units: Sequence[Row], seq_len: int, num_open: int) -> list[Row]:
    """Pack whole units into rows with at most `seq_len` tokens, consecutive units into nearby rows.

    Bounded-space best fit (Csirik and Johnson, Algorithmica 31, 2001): a unit goes into the fullest row with
    enough room among the last `num_open` rows."""
    rows: list[list[PackedSegment]] = []
    free_tokens: list[int] = []
    for unit in units:
        count = sum(segment.count for segment in unit)
        candidates = [i for i in range(max(0, len(rows) - num_open), len(rows)) if free_tokens[i] >= count]
        if not candidates:
            candidates = [len(rows)]
            rows.append([])
            free_tokens.append(seq_len)
        row = min(candidates, key=free_tokens.__getitem__)
        rows[row] += unit
        free_tokens[row] -= count
    return [tuple(row) for row in rows]


def pack_best_fit(segments: Iterable[PackedSegment], seq_len: int) -> list[Row]:
    """Pack segments into rows with at most `seq_len` tokens by best-fit decreasing.

    The longest segment goes first, into the fullest row with enough room. The result has at most 11/9 of the
    fewest possible rows, plus four (Johnson et al., SIAM J. Comput. 3, 1974), in the order of opening.
    Documents stay whole, and the rest of a row is padding (Ding et al., "Fewer Truncations Improve Language
    Modeling", arXiv 2404.10830)."""
    rows: list[list[PackedSegment]] = []
    free_spaces: list[tuple[int, int]] = []  # (free tokens, row), ascending
    # a stable sort: segments of equal length keep their shuffled order
    for segment in sorted(segments, key=lambda s: -s.count):
        count = segment.count
        i = bisect.bisect_left(free_spaces, (count, -1))
        if i < len(free_spaces):
            free, row = free_spaces.pop(i)
            rows[row].append(segment)
        else:
            free, row = seq_len, len(rows)
            rows.append([segment])
        if free > count:
            bisect.insort(free_spaces, (free - count, row))
    return [tuple(row) for row in rows]


def concatenate_segments(segments: Iterable[PackedSegment], seq_len: int) -> list[Row]:
    """Pack documents into full rows in order, cut at each row's end; the last row may be shorter."""
    rows: list[Row] = []
    row: list[PackedSegment] = []
    free_tokens = seq_len
    for segment in segments:
        start, end = segment.start, segment.start + segment.count
        while start < end:
            count = min(free_tokens, end - start)
            row.append(PackedSegment(segment.document, start, count))
            start, free_tokens = start + count, free_tokens - count
            if free_tokens == 0:
                rows.append(tuple(row))
                row, free_tokens = [], seq_len
    return [*rows, tuple(row)] if row else rows


class Permutation:
    """A pseudo-random permutation on `size` indices, computed from its key without a stored list.

    A balanced Feistel network over the next power of four is applied again until the result is below `size`
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002)."""

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._half_bits, self._mask = _U(half_bits), _U((1 << half_bits) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def permute(self, first: int, last: int) -> np.ndarray:
        """Return [last - first] int64: images for indices `first` to `last` - 1.

        Raises `IndexError` if an index is not below `size`."""
        if not 0 <= first <= last <= self.size:
            raise IndexError(f"indices {first} to {last - 1} are not all inside a permutation of {self.size}")
        # the network permutes a power of four of at most 4 x `size`; an index outside the range moves along
        # its cycle, so two indices never meet and the walk ends
        values = self._encrypt_indices(np.arange(first, last, dtype=np.uint64))
        while len(outside := np.flatnonzero(values >= _U(self.size))):
            values[outside] = self._encrypt_indices(values[outside])
        return values.astype(np.int64)

    def _encrypt_indices(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix_bits(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix_bits(x: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser (Steele, Lea, Flood 2014), modulo 2^64."""
    x = x + _U(0x9E3779B97F4A7C15)
    x = (x ^ x >> _U(30)) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ x >> _U(27)) * _U(0x94D049BB133111EB)
    return x ^ x >> _U(31)
