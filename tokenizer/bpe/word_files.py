"""Arrow files of counted words: runs of one worker, and their sum as one table of distinct words, within a
bound on memory.

All distinct words are never in memory together: their sums lie on the disk in parts, which are read one at a
time, first for the size of the text of each count, then for the words that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_sov.base.artifacts import translate_disk_errors
from tokenizer.bpe.counting import NUM_PARTS, WordCounter, WordTable
from tokenizer.bpe.trainer import MAX_PLACES

MAX_BYTES = MAX_PLACES - 2
"""Bytes of all words, and one for each word, that learning can number."""


class WordFileWriter:
    """Writes runs to one Arrow file."""

    def __init__(self, file: Path) -> None:
        self._schema = pa.schema([("word", pa.binary()), ("count", pa.int64())])
        self._writer = pa.ipc.new_file(str(file), self._schema)

    def __enter__(self) -> WordFileWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, words: WordCounter) -> None:
        """Write a table of words, cut into parts, and empty it."""
        text, word_ends, counts, parts = words.words()
        # sorted by part, so that one part of all runs can be read without the others
        order = np.argsort(parts, kind="stable")
        offsets = np.zeros(len(order) + 1, np.int32)
        offsets[1:] = word_ends
        # no copy: Arrow reads our arrays of text and offsets as they are
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        column = pa.Array.from_buffers(pa.binary(), len(order), buffers)
        batch = pa.record_batch([column, pa.array(counts)], schema=self._schema).take(pa.array(order))
        ends = np.searchsorted(parts[order], np.arange(NUM_PARTS + 1))
        for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            self._writer.write_batch(batch.slice(start, stop - start))
        words.clear()


def gather_words(files: list[Path], work: Path, max_bytes: int | None) -> WordTable:
    """Add up the runs of all units.

    Args:
        files: from `WordFileWriter`.
        work: folder for the sums.
        max_bytes: the most bytes that the words kept may have together; above it the rarest are left out, all
            words of one count together, so that what is kept depends on the text alone.  None: all are kept.

    Raises:
        UserError: the disk refuses.
    """
    # one part in memory at a time; two reads of the sums then bound what the words kept take
    sums = [_sum_part(files, part, work) for part in range(NUM_PARTS)]
    levels = _count_levels(sums)
    min_count = _choose_min_count(levels, MAX_BYTES if max_bytes is None else min(MAX_BYTES, max_bytes))
    table = pa.concat_tables([_read_frequent_words(file, min_count) for file in sums])
    for file in sums:
        file.unlink()
    counts, lengths = table["count"].to_numpy(), _compute_lengths(table)
    # stable: words of equal count keep the order of the parts, so the result is the same on each run
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


def _count_levels(sums: list[Path]) -> _Levels:
    """Read all sums once, one part at a time."""
    rows = np.zeros((0, 3), np.int64)
    for file in sums:
        table = _read_table(file)
        counts, lengths = table["count"].to_numpy(), _compute_lengths(table)
        rows = _sum_by_count(np.concatenate((rows, np.stack((counts, np.ones_like(counts), lengths),
                                                            axis=1))))
    return _Levels(*rows.T)


def _sum_by_count(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add up the rows (count, words, bytes) of equal count."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    # one row for each distinct count stays, however many words there are
    firsts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]][: len(rows)])
    if not len(firsts):
        return rows
    return np.concatenate((rows[firsts, :1], np.add.reduceat(rows[:, 1:], firsts)), axis=1)


def _choose_min_count(levels: _Levels, max_bytes: int) -> int:
    """Return the smallest count at which the words that occur as often, or more often,
    fit with an end mark each."""
    # from the most frequent down; all words of one count are kept or left out together
    sizes = np.cumsum((levels.bytes_ + levels.words)[::-1])
    fitting = int(np.searchsorted(sizes, max_bytes, side="right"))
    return 1 if fitting == len(sizes) else int(levels.counts[::-1][fitting]) + 1


def _read_frequent_words(file: Path, min_count: int) -> Any:
    """Return the words of a part that occur often enough, in memory."""
    table = _read_table(file)
    return table.filter(pc.greater_equal(table["count"], min_count))


def _sum_part(files: list[Path], part: int, work: Path) -> Path:
    """Add up one part of all runs; returns the file with the sums."""
    batches = []
    for file in files:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            # a run is NUM_PARTS batches in order, so every NUM_PARTS-th one is of this part
            batches += [reader.get_batch(i) for i in range(part, reader.num_record_batches, NUM_PARTS)]
    # one thread: several would give the words in an order that changes from run to run
    summed = pa.Table.from_batches(batches).group_by("word", use_threads=False).aggregate([("count", "sum")])
    summed = summed.rename_columns({"count_sum": "count"}).combine_chunks()
    target = work / f"part-{part}.arrow"
    with translate_disk_errors(work), pa.ipc.new_file(str(target), summed.schema) as writer:
        writer.write_table(summed)
    return target


def _read_table(file: Path) -> Any:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def _compute_lengths(table: Any) -> NDArray[np.int64]:
    return np.asarray(pc.binary_length(table["word"]).to_numpy()).astype(np.int64)
