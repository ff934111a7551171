"""From the runs of all units to one table of distinct words, within a bound on memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.artifacts import disk_errors
from tokenizer.counting import NUM_PARTS
from tokenizer.merging import MAX_PLACES

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
        files: as `tokenizer.counting` writes them.
        work: folder for the sums.
        max_bytes: the most bytes that the words kept may have together; above it the rarest are left out, all words of one
            count together, so that what is kept depends on the text alone.  None: all are kept.

    Raises:
        UserError: the disk refuses.
    """
    import pyarrow as pa

    sums = [_sum_part(files, part, work) for part in range(NUM_PARTS)]
    tables = [_read(file) for file in sums]
    counts = np.concatenate([table["count"].to_numpy() for table in tables])
    lengths = np.concatenate([_lengths(table) for table in tables])
    min_count = _cut_off(counts, lengths, MAX_BYTES if max_bytes is None else min(MAX_BYTES, max_bytes))
    kept = counts >= min_count
    dropped_bytes, total_bytes = int(counts[~kept] @ lengths[~kept]), int(counts @ lengths)
    table = pa.concat_tables([t.filter(pa.array(part)) for t, part in zip(tables, _split_like(kept, tables), strict=True)])
    del tables
    for file in sums:
        file.unlink()
    counts, lengths, num_dropped = counts[kept], lengths[kept], int((~kept).sum())
    order = np.argsort(-counts, kind="stable")
    raw = np.zeros(0, np.uint8)
    if len(order):
        words = table["word"].combine_chunks().take(pa.array(order))
        raw = np.frombuffer(words.buffers()[2], np.uint8)[: int(lengths.sum())]
    return WordTable(raw, lengths[order], counts[order], min_count, num_dropped, dropped_bytes / max(total_bytes, 1))


def _split_like(values: NDArray[np.bool_], tables: list[Any]) -> list[NDArray[np.bool_]]:
    """Return values cut into the rows of each table."""
    return np.split(values, np.cumsum([table.num_rows for table in tables])[:-1])


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


def _cut_off(counts: NDArray[np.int64], lengths: NDArray[np.int64], max_bytes: int) -> int:
    """Return the smallest count at which the words that occur as often fit."""
    if int(lengths.sum()) + len(lengths) <= max_bytes:
        return 1
    order = np.argsort(-counts, kind="stable")
    fits = int(np.searchsorted(np.cumsum(lengths[order] + 1), max_bytes, side="right"))
    return int(counts[order[fits]]) + 1
