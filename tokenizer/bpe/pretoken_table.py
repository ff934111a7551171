"""From the runs of all units to one table of distinct words, within a bound on memory.

All distinct words are never in memory together: their sums lie on the disk in parts, which are read one at a
time, first for how much text there is of each count, then for the words that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.artifacts import disk_errors
from tokenizer.bpe.trainer import MAX_PLACES
from tokenizer.bpe.word_counter import NUM_PARTS

MAX_BYTES = MAX_PLACES - 2
"""Bytes of all words, and one for each word, that learning can number."""


@dataclass(frozen=True)
class WordTable:
    """Distinct words, the most frequent first."""

    raw: NDArray[np.uint8]
    """UTF-8 bytes of all words, one after another."""
    lengths_bytes: NDArray[np.int64]
    """Bytes of each word, [words]."""
    counts: NDArray[np.int64]
    """How often each stands in the text, falling, [words]."""
    min_count: int
    """Words that occur less often were left out for want of memory; 1: none."""
    dropped_words: int
    """How many those were."""
    dropped_share: float
    """Share of the text, by bytes, that they were."""

    def words(self) -> Iterator[bytes]:
        """Yield the words."""
        raw, start = self.raw.tobytes(), 0
        for length in self.lengths_bytes.tolist():
            yield raw[start : start + length]
            start += length


def gather_words(files: list[Path], work: Path, max_bytes: int | None) -> WordTable:
    """Add up the runs of all units.

    Args:
        files: as `tokenizer.bpe.pretoken_counts` writes them.
        work: folder for the sums.
        max_bytes: the most bytes that the words kept may have together; above it the rarest are left out, all
            words of one count together, so that what is kept depends on the text alone.  None: all are kept.

    Raises:
        UserError: the disk refuses.
    """
    import pyarrow as pa

    sums = [_sum_part(files, part, work) for part in range(NUM_PARTS)]
    levels = _levels(sums)
    min_count = _cut_off(levels, MAX_BYTES if max_bytes is None else min(MAX_BYTES, max_bytes))
    table = pa.concat_tables([_kept(file, min_count) for file in sums])
    for file in sums:
        file.unlink()
    counts, lengths = table["count"].to_numpy(), _lengths(table)
    order = np.argsort(-counts, kind="stable")
    raw = np.zeros(0, np.uint8)
    if len(order):
        words = table["word"].combine_chunks().take(pa.array(order))
        raw = np.frombuffer(words.buffers()[2], np.uint8)[: int(lengths.sum())]
    text_bytes, dropped = levels.counts * levels.bytes_, levels.counts < min_count
    dropped_share = int(text_bytes[dropped].sum()) / max(int(text_bytes.sum()), 1)
    return WordTable(raw, lengths[order], counts[order], min_count, int(levels.words[dropped].sum()),
                     dropped_share)


@dataclass(frozen=True)
class _Levels:
    """How many words occur equally often: as many rows as there are counts, however many words there are."""

    counts: NDArray[np.int64]
    """Counts that occur, rising."""
    words: NDArray[np.int64]
    """Words of each."""
    bytes_: NDArray[np.int64]
    """Bytes of those words together."""


def _levels(sums: list[Path]) -> _Levels:
    """Read all sums once, one part at a time."""
    rows = np.zeros((0, 3), np.int64)
    for file in sums:
        table = _read(file)
        counts, lengths = table["count"].to_numpy(), _lengths(table)
        rows = _by_count(np.concatenate((rows, np.stack((counts, np.ones_like(counts), lengths), axis=1))))
    return _Levels(*rows.T)


def _by_count(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add up the rows (count, words, bytes) of equal count."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    firsts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]][: len(rows)])
    if not len(firsts):
        return rows
    return np.concatenate((rows[firsts, :1], np.add.reduceat(rows[:, 1:], firsts)), axis=1)


def _cut_off(levels: _Levels, max_bytes: int) -> int:
    """Return the smallest count at which the words that occur as often, or more often,
    fit with an end mark each."""
    sizes = np.cumsum((levels.bytes_ + levels.words)[::-1])
    fitting = int(np.searchsorted(sizes, max_bytes, side="right"))
    return 1 if fitting == len(sizes) else int(levels.counts[::-1][fitting]) + 1


def _kept(file: Path, min_count: int) -> Any:
    """Return the words of a part that occur often enough, in memory."""
    import pyarrow.compute as pc

    table = _read(file)
    return table.filter(pc.greater_equal(table["count"], min_count))


def _sum_part(files: list[Path], part: int, work: Path) -> Path:
    """Add up one part of all runs; returns the file with the sums."""
    import pyarrow as pa

    batches = []
    for file in files:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            batches += [reader.get_batch(i) for i in range(part, reader.num_record_batches, NUM_PARTS)]
    summed = pa.Table.from_batches(batches).group_by("word", use_threads=False).aggregate([("count", "sum")])
    summed = summed.rename_columns({"count_sum": "count"}).combine_chunks()
    target = work / f"part-{part}.arrow"
    with disk_errors(work), pa.ipc.new_file(str(target), summed.schema) as writer:
        writer.write_table(summed)
    return target


def _read(file: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def _lengths(table: Any) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    return np.asarray(pc.binary_length(table["word"]).to_numpy()).astype(np.int64)
