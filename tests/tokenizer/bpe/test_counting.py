"""Compiled word counting equals Python's `Counter`: hash tables, word files, and the units of a corpus."""

import json
import random
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.documents import list_files
from megatron_sov.base.errors import UserError
from tokenizer.bpe import count_pipeline, counting
from tokenizer.bpe.count_pipeline import CountSettings, UnitCounts, count_units
from tokenizer.bpe.counting import NUM_PARTS, WordCounter, WordTable
from tokenizer.bpe.splitter import Splitter
from tokenizer.bpe.word_files import gather_words
from tokenizer.mixture import GroupShare, SourceGroup, plan_count_units
from tokenizer.presets import SOLAR_OPEN


def read_words(counter: WordCounter) -> Counter[bytes]:
    """Return the counted words, and check that each is listed once and has a part."""
    text, ends, counts, parts = counter.get_words()
    assert len(parts) == len(counter) and all(0 <= part < NUM_PARTS for part in parts)
    words = [text[a:b].tobytes() for a, b in zip([0, *ends[:-1]], ends, strict=True)] if len(ends) else []
    assert len(set(words)) == len(words)
    return Counter(dict(zip(words, counts.tolist(), strict=True)))


def add_words(counter: WordCounter, words: list[bytes], times: int) -> None:
    counter.add_text(b"".join(words), np.cumsum([len(w) for w in words], dtype=np.int32), times)


@given(st.lists(st.tuples(st.lists(st.binary(min_size=1, max_size=3), max_size=50), st.integers(1, 5))))
def test_words_are_counted_as_by_counter(texts: list[tuple[list[bytes], int]]) -> None:
    counter, expected = WordCounter(), Counter[bytes]()
    for words, times in texts:
        add_words(counter, words, times)
        for word in words:
            expected[word] += times
    assert read_words(counter) == expected


def test_the_table_grows_and_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "FIRST_SLOTS", 4)
    counter = WordCounter()
    for start in range(0, 3000, 100):
        add_words(counter, [str(n).encode() for n in range(start, start + 150)], 1)
    result = read_words(counter)
    assert len(result) == 3050 and result[b"149"] == 2 and result[b"50"] == 1
    counter.clear()
    assert not read_words(counter)
    add_words(counter, [b"again"], 7)
    assert read_words(counter) == {b"again": 7}


def test_counts_beyond_32_bits() -> None:
    counter = WordCounter()
    add_words(counter, [b"a"], 1 << 40)
    add_words(counter, [b"a"], 1 << 40)
    assert read_words(counter) == {b"a": 1 << 41}


def test_a_words_part_is_the_same_in_every_table() -> None:
    words = [b"one", b"two", "셋".encode(), b"four"]
    first, second = WordCounter(), WordCounter()
    add_words(first, words, 1)
    add_words(second, words[::-1], 2)
    assert first.get_words()[3].tolist() == second.get_words()[3].tolist()[::-1]


WORDS = Counter({f"word{i}{'가' * (i % 5)}".encode(): 1 + 1000 // (i + 1) for i in range(400)})


def write_runs(file: Path, runs: list[Counter[bytes]]) -> Path:
    """Write the word file of a unit: each run of counts in `NUM_PARTS` batches, by a hash of the word."""
    schema = pa.schema([("word", pa.binary()), ("count", pa.int64())])
    with pa.ipc.new_file(str(file), schema) as writer:
        for run in runs:
            parts: list[list[tuple[bytes, int]]] = [[] for _ in range(NUM_PARTS)]
            for word, count_corpus in run.items():
                parts[zlib.crc32(word) % NUM_PARTS].append((word, count_corpus))
            for rows in parts:
                writer.write_batch(pa.record_batch([[w for w, _ in rows], [n for _, n in rows]],
                                                   schema=schema))
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The word files of two units, with two runs and one, which add up to `WORDS`."""
    third = Counter({word: n // 3 for word, n in WORDS.items() if n // 3})
    rest = Counter({word: n - 2 * (n // 3) for word, n in WORDS.items()})
    return [write_runs(tmp_path / "a.arrow", [third, rest]), write_runs(tmp_path / "b.arrow", [third])]


def to_counter(table: WordTable) -> Counter[bytes]:
    assert (np.diff(table.counts) <= 0).all()
    return Counter(dict(zip(table.iter_words(), table.counts.tolist(), strict=True)))


def test_runs_are_added_up(files: list[Path], tmp_path: Path) -> None:
    table = gather_words(files, tmp_path, None)
    assert to_counter(table) == WORDS
    assert (table.min_count, table.dropped_words, table.dropped_share) == (1, 0, 0)
    assert not list(tmp_path.glob("part-*"))


@pytest.mark.parametrize("max_bytes", [0, 200, 2000])
def test_rarest_words_are_dropped_by_count(files: list[Path], tmp_path: Path, max_bytes: int) -> None:
    table = gather_words(files, tmp_path, max_bytes)
    left_out = {w: n for w, n in WORDS.items() if n < table.min_count}
    assert to_counter(table) == Counter({w: n for w, n in WORDS.items() if n >= table.min_count})
    assert len(table.raw) + len(table.counts) <= max_bytes and table.dropped_words == len(left_out)
    assert table.dropped_share == pytest.approx(
        sum(len(w) * n for w, n in left_out.items()) / sum(len(w) * n for w, n in WORDS.items()))
    next_size = sum(len(w) + 1 for w, n in WORDS.items() if n >= table.min_count - 1)
    assert next_size > max_bytes  # words of the next lower count would not fit


def test_memory_limit_applies_to_remaining_words(tmp_path: Path) -> None:
    once = {f"once{i}".encode(): 1 for i in range(100_000)}
    file = write_runs(tmp_path / "a.arrow", [Counter({b"often": 9, b"twice": 2, **once})])
    tracemalloc.start()
    table = gather_words([file], tmp_path, 20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert to_counter(table) == {b"often": 9, b"twice": 2} and table.dropped_words == len(once)
    assert peak_bytes < 8 * len(once)  # less than the int64 counts of all words


ONCE = GroupShare(1, 0)
LETTERS = str.maketrans("0123456789", "ghijklmnop")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with four files, whose words have very different frequencies."""
    rng, folder = random.Random(1), tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        numbers = [[int(rng.paretovariate(0.4)) % 9000 for _ in range(40)] for _ in range(60)]
        lines = [" ".join(hex(n)[2:].translate(LETTERS) for n in line) for line in numbers]
        (folder / f"{i}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def count_corpus(corpus: Path, work: Path, share: GroupShare = ONCE, *, workers: int = 1,
                 limit_bytes: int = 1 << 30) -> list[UnitCounts]:
    """Return the counts of the corpus's units, whose word files are in `work`."""
    work.mkdir(exist_ok=True)
    settings = CountSettings(SOLAR_OPEN, SOLAR_OPEN.split_pattern, (share,))
    return list(count_units(plan_count_units([SourceGroup("g", (corpus,))], 1), settings, work, workers,
                            limit_bytes))


def count_by_counter(corpus: Path, times: int = 1) -> Counter[bytes]:
    """Return the number of each word in the corpus, `times` over, by Python's `Counter`."""
    splitter = Splitter(SOLAR_OPEN, SOLAR_OPEN.split_pattern)
    texts = [json.loads(line)["text"] for file in list_files(corpus)
             for line in file.read_text().splitlines()]
    return Counter({word.encode(): times * n
                    for word, n in Counter(w for t in texts for w in splitter.split_text(t)).items()})


def test_a_table_that_is_written_out_many_times_gives_the_same(corpus: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_pipeline, "LEAST_WORDS", 50)
    counts = count_corpus(corpus, tmp_path / "work", limit_bytes=1)
    once = count_corpus(corpus, tmp_path / "other")
    # the files of several runs are larger
    assert sum(c.file.stat().st_size for c in counts) > sum(c.file.stat().st_size for c in once)
    words = gather_words([c.file for c in counts], tmp_path / "work", None)
    assert to_counter(words) == count_by_counter(corpus)


def test_long_words_are_written_out_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(chr(97 + i) * 5000 for i in range(26)))
    (tmp_path / "b.txt").write_text(" ".join(chr(65 + i) * 5000 for i in range(26)))
    settings = CountSettings(SOLAR_OPEN, SOLAR_OPEN.split_pattern, (ONCE,))
    units = plan_count_units([SourceGroup("g", (tmp_path,))], 1 << 20)
    # 52 words of 5,000 bytes; the smallest table has room for 60,000 bytes
    [counts] = count_units(units, settings, tmp_path, 1, limit_bytes=1)
    assert pyarrow.ipc.open_file(str(counts.file)).num_record_batches > NUM_PARTS


def test_repeated_text_counts_once_per_occurrence(corpus: Path, tmp_path: Path) -> None:
    counts = count_corpus(corpus, tmp_path / "work", GroupShare(3, 0))
    words = gather_words([c.file for c in counts], tmp_path / "work", None)
    assert to_counter(words) == count_by_counter(corpus, 3)
    some = count_corpus(corpus, tmp_path / "work", GroupShare(2, 30_000))
    assert 2 < sum(c.counted_bytes for c in some) / (sum(c.counted_bytes for c in counts) / 3) < 3


def test_complete_files_are_reused_and_changed_ones_recounted(corpus: Path, tmp_path: Path) -> None:
    before = {c.file: c.file.stat().st_mtime_ns for c in count_corpus(corpus, tmp_path / "work")}
    (corpus / "2.jsonl").write_text('{"text": "other words"}')
    after = {c.file: c.file.stat().st_mtime_ns for c in count_corpus(corpus, tmp_path / "work")}
    assert len(before.items() & after.items()) == 3
    lost = next(iter(before.keys() & after.keys()))
    lost.unlink()  # its record alone does not suffice
    count_corpus(corpus, tmp_path / "work")
    assert lost.exists()


def test_mistakes_in_the_text_are_placed(corpus: Path, tmp_path: Path) -> None:
    with open(corpus / "1.jsonl", "ab") as f:
        f.write(b'\n{"text": "\xff"}')
    with pytest.raises(UserError,
                       match=r"1.jsonl:61: is not valid JSON .*invalid start byte|1.jsonl:61: is not UTF-8"):
        count_corpus(corpus, tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.tmp-*"))
