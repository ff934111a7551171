"""Counting through the disk: the same words however often a table is written out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from megatron_sov.base.documents import list_files
from megatron_sov.base.errors import UserError
from tokenizer.bpe import count_pipeline
from tokenizer.bpe.count_pipeline import CountSettings, UnitCounts, count_units
from tokenizer.bpe.counting import NUM_PARTS, WordTable, gather_words
from tokenizer.bpe.split_pattern import Splitter
from tokenizer.mixture import Share, SourceGroup, plan
from tokenizer.presets import SOLAR_OPEN

ONCE = Share(1, 0)
LETTERS = str.maketrans("0123456789", "ghijklmnop")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four files of lines whose words are unequally frequent."""
    drawn, folder = random.Random(1), tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        numbers = [[int(drawn.paretovariate(0.4)) % 9000 for _ in range(40)] for _ in range(60)]
        lines = [" ".join(hex(n)[2:].translate(LETTERS) for n in line) for line in numbers]
        (folder / f"{i}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def count(corpus: Path, work: Path, share: Share = ONCE, *, workers: int = 1,
          limit_bytes: int = 1 << 30) -> list[UnitCounts]:
    work.mkdir(exist_ok=True)
    settings = CountSettings(SOLAR_OPEN, SOLAR_OPEN.split_pattern, (share,))
    return list(count_units(plan([SourceGroup("g", (corpus,))], 1), settings, work, workers, limit_bytes))


def expected(corpus: Path, times: int = 1) -> Counter[bytes]:
    splitter = Splitter(SOLAR_OPEN, SOLAR_OPEN.split_pattern)
    texts = [json.loads(line)["text"] for file in list_files(corpus)
             for line in file.read_text().splitlines()]
    return Counter({word.encode(): times * n
                    for word, n in Counter(w for t in texts for w in splitter.split(t)).items()})


def as_counter(table: WordTable) -> Counter[bytes]:
    assert (np.diff(table.counts) <= 0).all()
    return Counter(dict(zip(table.words(), table.counts.tolist(), strict=True)))


@pytest.mark.deep
@pytest.mark.parametrize("workers", [1, 2])
def test_words_are_counted_as_one_table_would(corpus: Path, tmp_path: Path, workers: int) -> None:
    counts = count(corpus, tmp_path / "work", workers=workers)
    assert as_counter(gather_words([c.file for c in counts], tmp_path / "work", None)) == expected(corpus)


def test_a_table_that_is_written_out_many_times_gives_the_same(corpus: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_pipeline, "LEAST_WORDS", 50)
    counts = count(corpus, tmp_path / "work", limit_bytes=1)
    once = count(corpus, tmp_path / "other")
    # several runs
    assert sum(c.file.stat().st_size for c in counts) > sum(c.file.stat().st_size for c in once)
    assert as_counter(gather_words([c.file for c in counts], tmp_path / "work", None)) == expected(corpus)


def test_long_words_are_written_out_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(chr(97 + i) * 5000 for i in range(26)))
    (tmp_path / "b.txt").write_text(" ".join(chr(65 + i) * 5000 for i in range(26)))
    settings = CountSettings(SOLAR_OPEN, SOLAR_OPEN.split_pattern, (ONCE,))
    units = plan([SourceGroup("g", (tmp_path,))], 1 << 20)
    [counts] = count_units(units, settings, tmp_path, 1, limit_bytes=1)  # room for 60,000 bytes
    assert pyarrow.ipc.open_file(str(counts.file)).num_record_batches > NUM_PARTS


def test_repeated_text_counts_as_often_as_it_is_seen(corpus: Path, tmp_path: Path) -> None:
    counts = count(corpus, tmp_path / "work", Share(3, 0))
    assert as_counter(gather_words([c.file for c in counts], tmp_path / "work", None)) == expected(corpus, 3)
    some = count(corpus, tmp_path / "work", Share(2, 30_000))
    assert 2 < sum(c.seen_bytes for c in some) / (sum(c.seen_bytes for c in counts) / 3) < 3


def test_complete_units_are_kept_and_changed_ones_counted_again(corpus: Path, tmp_path: Path) -> None:
    before = {c.file: c.file.stat().st_mtime_ns for c in count(corpus, tmp_path / "work")}
    (corpus / "2.jsonl").write_text('{"text": "other words"}')
    after = {c.file: c.file.stat().st_mtime_ns for c in count(corpus, tmp_path / "work")}
    assert len(before.items() & after.items()) == 3
    lost = next(iter(before.keys() & after.keys()))
    lost.unlink()  # its record alone is not trusted
    count(corpus, tmp_path / "work")
    assert lost.exists()


def test_mistakes_in_the_text_are_placed(corpus: Path, tmp_path: Path) -> None:
    with open(corpus / "1.jsonl", "ab") as f:
        f.write(b'\n{"text": "\xff"}')
    with pytest.raises(UserError,
                       match=r"1.jsonl:61: is not valid JSON .*invalid start byte|1.jsonl:61: is not UTF-8"):
        count(corpus, tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.tmp-*"))
