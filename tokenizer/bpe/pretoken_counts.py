"""Counting words: each unit becomes a file of (word, count), written in parts so that memory stays bounded.

A worker's table is written out as a run whenever it has grown to its limit.  Runs are cut by a hash of the
word into `NUM_PARTS` parts; all runs of one part together are small enough to be added up in memory
(tokenizer/bpe/pretoken_table.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.artifacts import atomic_write, new_file
from megatron_sov.work.pool import in_processes
from tokenizer.bpe.count_units import Unit, UnitSizes
from tokenizer.bpe.lowest_pieces import LowestPieces
from tokenizer.bpe.pretokenizer import Splitter
from tokenizer.bpe.word_counter import NUM_PARTS, WordCounter
from tokenizer.mixture import NUM_BUCKETS, Excerpt, Share, pieces
from tokenizer.presets import Preset

WORD_BYTES = 120
"""What a word takes in a worker's table: its text, the entry, and the copies while a run is written."""
SAMPLE_BYTES = 100_000
"""Text of each group that bytes per token are measured on and that the finished tokenizer is
checked on, at most."""
LEAST_WORDS = 1000
"""Words in a worker's table before it is written out, however small the bound."""
CODE_VERSION = 3
"""Raise it when the same text is counted differently, so that older files are not taken for new ones."""


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """What the counts of a unit depend on."""

    preset: Preset
    """Its normalization matters here."""
    pattern: str
    """What splits text into words."""
    shares: tuple[Share, ...]
    """How often the pieces of each group are seen."""

    def key(self, unit: Unit) -> str:
        """Return the name of a unit's files."""
        return unit.key({"normalization": self.preset.normalization, "pattern": self.pattern,
                         "share": dataclasses.asdict(self.shares[unit.group]), "code_version": CODE_VERSION})


@dataclasses.dataclass(frozen=True)
class UnitCounts:
    """A counted unit."""

    file: Path
    """Arrow file of `NUM_PARTS` record batches (word, count) for each run."""
    seen_bytes: int
    """Text counted, repetitions included."""
    sizes: UnitSizes
    """All text of the unit, whatever is seen of it."""
    lowest: tuple[Excerpt, ...]
    """The pieces that may belong to a sample of its group."""


def count_units(units: list[Unit], settings: CountSettings, work: Path, workers: int,
                limit_bytes: int) -> Iterator[UnitCounts]:
    """Yield the counts of each unit, in order; what is there already is kept.

    Args:
        units: what to read.
        settings: how.
        work: folder for the files.
        workers: processes.
        limit_bytes: memory for the tables of all workers together.

    Raises:
        UserError: a file cannot be read, the disk refuses, or a worker was ended from outside.
    """
    limit_words = max(limit_bytes // max(min(workers, len(units)), 1) // WORD_BYTES, LEAST_WORDS)
    splitter = Splitter(settings.preset, settings.pattern)  # made once, not by every worker
    yield from in_processes(_counter, (settings, splitter, work, limit_words), units, workers)


def _counter(settings: CountSettings, splitter: Splitter, work: Path,
             limit_words: int) -> Callable[[Unit], UnitCounts]:
    return _UnitCounter(settings, splitter, work, limit_words).count


class _UnitCounter:
    """Counts units; one per process."""

    def __init__(self, settings: CountSettings, splitter: Splitter, work: Path, limit_words: int) -> None:
        self._settings, self._splitter, self._work, self._limit_words = settings, splitter, work, limit_words
        self._limit_text_bytes = limit_words * WORD_BYTES // 2
        self._words = WordCounter()

    def count(self, unit: Unit) -> UnitCounts:
        """Return the counts of a unit; it is read unless they are there."""
        file = self._work / f"{self._settings.key(unit)}.arrow"
        record = file.with_suffix(".json")
        if not (record.exists() and file.exists()):
            with new_file(file) as temporary:
                facts = self._count(unit, temporary)
            atomic_write(record, json.dumps(facts, ensure_ascii=False))
        facts = json.loads(record.read_text(encoding="utf-8"))
        sizes = UnitSizes(facts["num_documents"], np.array(facts["buckets"], np.int64),
                          np.array(facts["bucket_bytes"], np.int64))
        lowest = tuple(Excerpt(text.encode(), bucket) for bucket, text in facts["lowest"])
        return UnitCounts(file, facts["seen_bytes"], sizes, lowest)

    def _count(self, unit: Unit, file: Path) -> dict[str, Any]:
        share, splitter = self._settings.shares[unit.group], self._splitter
        words, seen_bytes, num_documents, checked = self._words, 0, 0, False
        bucket_bytes, lowest = np.zeros(NUM_BUCKETS, np.int64), LowestPieces(SAMPLE_BYTES)
        words.clear()  # of a unit that could not be read
        with _RunWriter(file) as runs:
            for document in unit.documents():
                num_documents += 1
                for piece in pieces(document):
                    bucket_bytes[piece.bucket] += len(piece.raw)
                    lowest.add(piece)
                    times = share.times(piece.bucket)
                    if not times:
                        continue
                    raw = piece.raw
                    if self._settings.preset.normalization != "none":
                        raw = splitter.normalize(piece.text).encode()
                    if not checked:
                        splitter.check(raw.decode())
                        checked = True
                    words.add(raw, splitter.ends(raw), times)
                    seen_bytes += times * len(piece.raw)
                    # words of text without spaces are long: their text is bounded too
                    if len(words) > self._limit_words or words.text_bytes() > self._limit_text_bytes:
                        runs.write(words)
            runs.write(words)
        sizes = UnitSizes.of(num_documents, bucket_bytes)
        return {"seen_bytes": seen_bytes, "num_documents": num_documents, "buckets": sizes.buckets.tolist(),
                "bucket_bytes": sizes.bytes_.tolist(),
                "lowest": [(piece.bucket, piece.text) for piece in lowest.found()]}


class _RunWriter:
    """Writes runs to one Arrow file."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self._schema = pa.schema([("word", pa.binary()), ("count", pa.int64())])
        self._writer = pa.ipc.new_file(str(file), self._schema)

    def __enter__(self) -> _RunWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, words: WordCounter) -> None:
        """Write a table of words, cut into parts, and empty it."""
        import pyarrow as pa

        text, word_ends, counts, parts = words.words()
        order = np.argsort(parts, kind="stable")
        offsets = np.zeros(len(order) + 1, np.int32)
        offsets[1:] = word_ends
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        column = pa.Array.from_buffers(pa.binary(), len(order), buffers)
        batch = pa.record_batch([column, pa.array(counts)], schema=self._schema).take(pa.array(order))
        ends = np.searchsorted(parts[order], np.arange(NUM_PARTS + 1))
        for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            self._writer.write_batch(batch.slice(start, stop - start))
        words.clear()
