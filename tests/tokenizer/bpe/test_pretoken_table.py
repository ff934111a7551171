"""From runs to one table: sums, order, and what is left out where memory ends."""

from __future__ import annotations

import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tokenizer.bpe.counting import NUM_PARTS, WordTable, gather_words

WORDS = Counter({f"word{i}{'가' * (i % 5)}".encode(): 1 + 1000 // (i + 1) for i in range(400)})


def write_runs(file: Path, runs: list[Counter[bytes]]) -> Path:
    """Write a unit's file as the counting does: each run in parts by a hash of the word."""
    schema = pa.schema([("word", pa.binary()), ("count", pa.int64())])
    with pa.ipc.new_file(str(file), schema) as writer:
        for run in runs:
            parts: list[list[tuple[bytes, int]]] = [[] for _ in range(NUM_PARTS)]
            for word, count in run.items():
                parts[zlib.crc32(word) % NUM_PARTS].append((word, count))
            for rows in parts:
                writer.write_batch(pa.record_batch([[w for w, _ in rows], [n for _, n in rows]],
                                                   schema=schema))
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two units; the first has two runs, and all words stand in several of them."""
    halves = [Counter({w: n // 3 for w, n in WORDS.items() if n // 3}),
              Counter({w: n - 2 * (n // 3) for w, n in WORDS.items()})]
    return [write_runs(tmp_path / "a.arrow", [halves[0], halves[1]]),
            write_runs(tmp_path / "b.arrow", [halves[0]])]


def as_counter(table: WordTable) -> Counter[bytes]:
    assert (np.diff(table.counts) <= 0).all()
    return Counter(dict(zip(table.words(), table.counts.tolist(), strict=True)))


def test_runs_are_added_up(files: list[Path], tmp_path: Path) -> None:
    table = gather_words(files, tmp_path, None)
    assert as_counter(table) == WORDS
    assert (table.min_count, table.dropped_words, table.dropped_share) == (1, 0, 0)
    assert not list(tmp_path.glob("part-*"))


@pytest.mark.parametrize("max_bytes", [0, 200, 2000])
def test_the_rarest_are_left_out_all_of_one_count_together(files: list[Path], tmp_path: Path,
                                                           max_bytes: int) -> None:
    table = gather_words(files, tmp_path, max_bytes)
    left_out = {w: n for w, n in WORDS.items() if n < table.min_count}
    assert as_counter(table) == Counter({w: n for w, n in WORDS.items() if n >= table.min_count})
    assert len(table.raw) + len(table.counts) <= max_bytes and table.dropped_words == len(left_out)
    assert table.dropped_share == pytest.approx(
        sum(len(w) * n for w, n in left_out.items()) / sum(len(w) * n for w, n in WORDS.items()))
    next_size = sum(len(w) + 1 for w, n in WORDS.items() if n >= table.min_count - 1)
    assert next_size > max_bytes  # one count more would not have fitted


def test_memory_is_for_the_words_that_are_kept(tmp_path: Path) -> None:
    once = {f"once{i}".encode(): 1 for i in range(100_000)}
    file = write_runs(tmp_path / "a.arrow", [Counter({b"often": 9, b"twice": 2, **once})])
    tracemalloc.start()
    table = gather_words([file], tmp_path, 20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert as_counter(table) == {b"often": 9, b"twice": 2} and table.dropped_words == len(once)
    assert peak_bytes < 8 * len(once)  # not even the counts of all words


def test_no_words(tmp_path: Path) -> None:
    table = gather_words([write_runs(tmp_path / "a.arrow", [Counter()])], tmp_path, None)
    assert len(table.raw) == len(table.lengths_bytes) == len(table.counts) == 0
