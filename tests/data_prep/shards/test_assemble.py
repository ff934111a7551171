"""From units to shards, against a plain reading of the same input."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data_prep.shards import assemble
from data_prep.shards.assemble import (
    EncodedSource, ShardedWriter, bad_rows, survey, write_quarantine, write_shards)
from data_prep.shards.encode import Encoder, EncodingSettings
from data_prep.shards.token_artifact import HeldoutRule, document_hash, open_split
from data_prep.shards.units import UnitEncoder, UnitSettings
from megatron_sov.base.documents import Document, RecordReading, files, plan_units

IDS = [0, 0, 2, 1, None, None, 3, 0, 3]
"""Ids of the records, three in a file. The second 0 and the second 3 came before in their file; the third 0
is the id of another text in another file."""
REPEATED = (1, 8)


@pytest.fixture(params=[1, 10**9], ids=["a unit a file", "one unit"])
def source(request: pytest.FixtureRequest, tokenizers: dict[str, Path],
           tmp_path: Path) -> tuple[EncodedSource, Path]:
    """Nine documents in three files, and the folder of their units."""
    for number in range(3):
        rows = [{"text": f"document {i}"} | ({} if IDS[i] is None else {"id": IDS[i]})
                for i in range(3 * number, 3 * number + 3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(["{", *map(json.dumps, rows)]))
    settings = UnitSettings(tokenizers["solar-open"], "a", "b", "uint16", RecordReading("text"),
                            EncodingSettings())
    encoder = UnitEncoder(settings, tmp_path / "work")
    found = EncodedSource("s", "text", tmp_path)
    found.units += [(unit, encoder.encode(unit))
                    for unit in plan_units(sorted(tmp_path.glob("*.jsonl")), request.param)]
    return found, tmp_path


@pytest.mark.parametrize("block_tokens", [1, 10, 1 << 22])
def test_shards_hold_what_plain_reading_gives(source: tuple[EncodedSource, Path], tokenizers: dict[str, Path],
                                              monkeypatch: pytest.MonkeyPatch, block_tokens: int) -> None:
    monkeypatch.setattr(assemble, "BLOCK_TOKENS", block_tokens)
    encoded, folder = source
    rule = HeldoutRule(0.4)
    assert survey(encoded, folder / "work", "uint16", rule) == 7
    assert encoded.num_shared_ids == 1
    splits = write_shards(encoded, folder / "work", folder / "out", "uint16", rule, 10**9)[""]
    encoder = Encoder(tokenizers["solar-open"])
    expected: dict[bool, list[list[int]]] = {True: [], False: []}
    for i in range(9):
        if i not in REPEATED:
            document = Document("", f"document {i}")
            heldout = bool(rule.is_heldout(np.array([document_hash(document)], np.uint64))[0])
            expected[heldout].append(encoder.encode_batch([document]).ids.tolist())
    assert expected[True] and expected[False]
    for heldout, split in ((False, "train"), (True, "heldout")):
        assert ([d.tolist() for d in open_split(folder / f"out/s/{split}-00000").documents()]
                == expected[heldout])
        assert splits[split]["num_bytes"] == len(expected[heldout]) * len("document 0")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3)), max_size=12))
def test_repeated_documents_are_those_of_a_plain_search(rows: list[tuple[int, int, int]]) -> None:
    ids, files_, hashes = (np.array([row[i] for row in rows], dtype) for i, dtype in enumerate(
        (np.uint64, np.int64, np.uint64)))
    expected = [id_ != 0 and any(id_ == other and (file == other_file or text == other_text)
                                 for other, other_file, other_text in rows[:i])
                for i, (id_, file, text) in enumerate(rows)]
    assert assemble.find_repeated(ids, files_, hashes).tolist() == expected


def test_bad_records_and_repeated_ids_stand_in_the_order_of_the_input(
        source: tuple[EncodedSource, Path]) -> None:
    encoded, folder = source
    survey(encoded, folder / "work", "uint16", HeldoutRule(0.0))
    rows = list(bad_rows(encoded, folder / "work", "uint16"))
    assert [(Path(r["file"]).name, r["line"], r["code"]) for r in rows] == [
        ("0.jsonl", 1, "json"), ("0.jsonl", 3, "duplicate_id"), ("1.jsonl", 1, "json"),
        ("2.jsonl", 1, "json"), ("2.jsonl", 4, "duplicate_id")]
    with open(folder / "list", "w", encoding="utf-8") as f:
        assert write_quarantine(encoded, folder / "work", "uint16", f) == {"json": 3, "duplicate_id": 2}
    assert [json.loads(line) for line in (folder / "list").read_text().splitlines()] == [
        {"source": "s", **r} for r in rows]


def test_lines_are_counted_through_the_spans_of_a_file(tokenizers: dict[str, Path], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"line {i}"}) if i % 40 else "bad" for i in range(1, 400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = UnitSettings(tokenizers["solar-open"], "a", "b", "uint16", RecordReading("text"),
                            EncodingSettings())
    encoder = UnitEncoder(settings, tmp_path / "work")
    encoded = EncodedSource("s", "text", tmp_path)
    monkeypatch.setattr(files, "WHOLE_FILE_BYTES", 0)
    encoded.units += [(unit, encoder.encode(unit)) for unit in plan_units([tmp_path / "a.jsonl"], 700)]
    assert len(encoded.units) > 5
    assert [r["line"] for r in bad_rows(encoded, tmp_path / "work", "uint16")] == list(range(40, 400, 40))


def write(folder: Path, lengths: list[int], shard_tokens: int, group: int, batch: int) -> ShardedWriter:
    with ShardedWriter(folder, "s/train", "uint16", False, True, group, shard_tokens) as writer:
        for i in range(0, len(lengths), batch * group):
            part = np.array(lengths[i : i + batch * group], np.int32)
            ids = np.concatenate([np.full(n, i + k) for k, n in enumerate(part)])
            writer.write(part, part.astype(np.int64) * 3, {"bin": ids},
                         [b"%d\n" % (i + k) for k in range(len(part))])
    return writer


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=40), st.integers(1, 60), st.sampled_from([1, 2]),
       st.integers(1, 7))
def test_shards_keep_order_limit_and_groups(lengths: list[int], shard_tokens: int, group: int,
                                            batch: int) -> None:
    lengths = lengths[: len(lengths) // group * group]
    with tempfile.TemporaryDirectory() as folder:
        writer = write(Path(folder), lengths, shard_tokens, group, batch)
        found, lines = [], []
        for number, shard in enumerate(writer.shards):
            assert shard.prefix == f"s/train-{number:05d}"
            documents = [d.tolist() for d in open_split(Path(folder) / shard.prefix).documents()]
            assert len(documents) == shard.num_documents > 0 and len(documents) % group == 0
            assert sum(map(len, documents)) == shard.num_tokens == shard.num_bytes // 3
            assert shard.num_tokens <= shard_tokens or len(documents) == group
            found += documents
            lines += Path(f"{folder}/{shard.prefix}.extra.jsonl").read_text().split()
        assert (found == [[i] * n for i, n in enumerate(lengths)]
                and lines == [str(i) for i in range(len(lengths))])
        # none was closed with room for the next
        for shard, following in zip(writer.shards, writer.shards[1:], strict=False):
            first = open_split(Path(folder) / following.prefix).lengths_tokens[:group].sum()
            assert shard.num_tokens + first > shard_tokens


def test_batches_do_not_move_the_limits(tmp_path: Path) -> None:
    lengths = [(i * 7) % 11 + 1 for i in range(200)]
    one, other = (write(tmp_path / str(batch), lengths, 50, 2, batch) for batch in (1, 60))
    assert one.shards == other.shards


def test_an_empty_split_has_one_empty_shard(tmp_path: Path) -> None:
    record = write(tmp_path, [], 10, 1, 1).record()
    assert record == {"shards": [{"prefix": "s/train-00000", "num_documents": 0, "num_tokens": 0,
                                  "num_bytes": 0}], "num_documents": 0, "num_tokens": 0, "num_bytes": 0}
