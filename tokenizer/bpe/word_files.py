"""Write counted words to Arrow files and sum them into one table of distinct words within a memory bound.

The sums of each part stay on disk and are read one part at a time: first for the bytes of each count, then
for the words to keep.
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
"""Maximum bytes of all words, with one end mark per word, for 32-bit positions in learning."""


class WordFileWriter:
    """Writes a unit's runs to an Arrow file."""

    def __init__(self, file: Path) -> None:
        self._schema = pa.schema([("word", pa.binary()), ("count", pa.int64())])
        self._writer = pa.ipc.new_file(str(file), self._schema)

    def __enter__(self) -> WordFileWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write_run(self, words: WordCounter) -> None:
        """Write a word table as `NUM_PARTS` record batches and clear it."""
        text, word_ends, counts, parts = words.get_words()
        order = np.argsort(parts, kind="stable")
        offsets = np.zeros(len(order) + 1, np.int32)
        offsets[1:] = word_ends
        # Arrow reads the text and offset arrays without a copy
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        column = pa.Array.from_buffers(pa.binary(), len(order), buffers)
        batch = pa.record_batch([column, pa.array(counts)], schema=self._schema).take(pa.array(order))
        ends = np.searchsorted(parts[order], np.arange(NUM_PARTS + 1))
        for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            self._writer.write_batch(batch.slice(start, stop - start))
        words.clear()


def gather_words(files: list[Path], work: Path, max_bytes: int | None) -> WordTable:
    """Sum all runs by word.

    Args:
        files: Arrow files from `WordFileWriter`.
        work: folder for temporary sums.
        max_bytes: bound on the bytes of words.  Above it the words with the lowest counts are dropped, all
            words of a count together, so that the result depends on the text alone.  None: no bound.

    Raises:
        UserError: the disk is full.
    """
    sums = [_sum_part(files, part, work) for part in range(NUM_PARTS)]
    levels = _count_levels(sums)
    min_count = _choose_min_count(levels, MAX_BYTES if max_bytes is None else min(MAX_BYTES, max_bytes))
    table = pa.concat_tables([_read_frequent_words(file, min_count) for file in sums])
    for file in sums:
        file.unlink()
    counts, lengths = table["count"].to_numpy(), _compute_lengths(table)
    # a stable sort, so that words of equal count have the same order on each run
    order = np.argsort(-counts, kind="stable")
    raw = np.zeros(0, np.uint8)
    if len(order):
        words = table["word"].combine_chunks().take(pa.array(order))
        raw = np.frombuffer(words.buffers()[2], np.uint8)[: int(lengths.sum())]
    text_bytes, dropped = levels.counts * levels.num_bytes, levels.counts < min_count
    dropped_share = int(text_bytes[dropped].sum()) / max(int(text_bytes.sum()), 1)
    return WordTable(raw, lengths[order], counts=counts[order], min_count=min_count,
                     dropped_words=int(levels.num_words[dropped].sum()), dropped_share=dropped_share)


@dataclass(frozen=True)
class _Levels:
    """Statistics by word count."""

    counts: NDArray[np.int64]
    """Distinct counts, rising."""
    num_words: NDArray[np.int64]
    num_bytes: NDArray[np.int64]


def _count_levels(sums: list[Path]) -> _Levels:
    rows = np.zeros((0, 3), np.int64)
    for file in sums:
        table = _read_table(file)
        counts, lengths = table["count"].to_numpy(), _compute_lengths(table)
        new_rows = np.stack((counts, np.ones_like(counts), lengths), axis=1)
        rows = _sum_by_count(np.concatenate((rows, new_rows)))
    return _Levels(*rows.T)


def _sum_by_count(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum the rows (count, words, bytes) of equal count."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    firsts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]][: len(rows)])
    if not len(firsts):
        return rows
    return np.concatenate((rows[firsts, :1], np.add.reduceat(rows[:, 1:], firsts)), axis=1)


def _choose_min_count(levels: _Levels, max_bytes: int) -> int:
    """Return the lowest `min_count` whose words fit into `max_bytes`, with an end mark per word."""
    sizes = np.cumsum((levels.num_bytes + levels.num_words)[::-1])
    fitting = int(np.searchsorted(sizes, max_bytes, side="right"))
    return 1 if fitting == len(sizes) else int(levels.counts[::-1][fitting]) + 1


def _read_frequent_words(file: Path, min_count: int) -> Any:
    table = _read_table(file)
    return table.filter(pc.greater_equal(table["count"], min_count))


def _sum_part(files: list[Path], part: int, work: Path) -> Path:
    """Sum a part over all runs and return the Arrow file."""
    batches = []
    for file in files:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            # a run is NUM_PARTS batches in order
            batches += [reader.get_batch(i) for i in range(part, reader.num_record_batches, NUM_PARTS)]
    # several threads would change the order of words from run to run
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
