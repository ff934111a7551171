"""Encoded units and the shards assembled from them, compared with a plain reading of the same input."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from data_prep.shards import assemble
from data_prep.shards.assemble import (
    EncodedSource, ShardedWriter, iter_bad_records, survey_source, write_shards)
from data_prep.shards.encode import Encoder, EncodingSettings
from data_prep.shards.heldout import HeldoutRule, hash_document
from data_prep.shards.token_artifact import open_split
from data_prep.shards.units import UnitEncoder, UnitSettings, compute_unit_key, open_unit
from megatron_sov.base.documents import BadRecord, Conversation, Document, RecordReading, files, plan_units
from megatron_sov.work.progress.resumable import part_folder

IDS = [0, 0, 2, 1, None, None, 3, 0, 3]
"""Ids of nine records, three per file. 1 and 8 repeat an id of their file, 7 an id of another file."""
REPEATED = (1, 8)


@pytest.fixture
def options(tokenizers: dict[str, Path]) -> UnitSettings:
    return UnitSettings(tokenizers["solar-open"], "a", "b", "uint16", RecordReading("text"),
                        EncodingSettings())


@pytest.fixture(params=[1, 10**9], ids=["a unit a file", "one unit"])
def source(request: pytest.FixtureRequest, options: UnitSettings,
           tmp_path: Path) -> tuple[EncodedSource, Path]:
    """Nine documents in three files, and the folder of their units."""
    for number in range(3):
        rows = [{"text": f"document {i}"} | ({} if IDS[i] is None else {"id": IDS[i]})
                for i in range(3 * number, 3 * number + 3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(["{", *map(json.dumps, rows)]))
    encoder = UnitEncoder(options, tmp_path / "work")
    encoded_source = EncodedSource("s", "text", tmp_path)
    encoded_source.units += [(unit, encoder.encode(unit))
                             for unit in plan_units(sorted(tmp_path.glob("*.jsonl")), request.param)]
    return encoded_source, tmp_path


@pytest.mark.parametrize("block_tokens", [1, 10, 1 << 22])
def test_shards_equal_plain_reading(source: tuple[EncodedSource, Path], tokenizers: dict[str, Path],
                                    monkeypatch: pytest.MonkeyPatch, block_tokens: int) -> None:
    monkeypatch.setattr(assemble, "BLOCK_TOKENS", block_tokens)
    encoded, folder = source
    rule = HeldoutRule(0.4)
    assert survey_source(encoded, folder / "work", "uint16", rule) == 7  # 9 documents - 2 repeated
    assert encoded.num_shared_ids == 1
    splits = write_shards(encoded, folder / "work", folder / "out", "uint16", rule, 10**9)[""]
    encoder = Encoder(tokenizers["solar-open"])
    expected: dict[bool, list[list[int]]] = {True: [], False: []}
    for i in range(9):
        if i not in REPEATED:
            document = Document("", f"document {i}")
            heldout = bool(rule.is_heldout(np.array([hash_document(document)], np.uint64))[0])
            expected[heldout].append(encoder.encode_batch([document]).ids.tolist())
    assert expected[True] and expected[False]
    for heldout, split in ((False, "train"), (True, "heldout")):
        assert ([d.tolist() for d in open_split(folder / f"out/s/{split}-00000").documents()]
                == expected[heldout])
        assert splits[split]["num_bytes"] == len(expected[heldout]) * len("document 0")


def test_blocks_hold_as_many_groups_as_fit() -> None:
    """Groups are pairs: two of 2 + 2 tokens fill a block of 8, and one of 9 + 1 has a block of its own."""
    blocks = list(assemble.iter_blocks(np.array([2, 2, 2, 2, 9, 1]), 2, 8))
    assert blocks == [(slice(0, 4), slice(0, 8)), (slice(4, 6), slice(8, 18))]  # documents, tokens


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3)), max_size=12))
def test_repeated_documents_equal_plain_search(rows: list[tuple[int, int, int]]) -> None:
    """A row is the id (0: none), the file and the hash of the text of a document."""
    ids = np.array([id_ for id_, _, _ in rows], np.uint64)
    file_numbers = np.array([file for _, file, _ in rows], np.int64)
    hashes = np.array([text for _, _, text in rows], np.uint64)
    expected = [id_ != 0 and any(id_ == other_id and (file == other_file or text == other_text)
                                 for other_id, other_file, other_text in rows[:i])
                for i, (id_, file, text) in enumerate(rows)]
    assert assemble.find_repeated_documents(ids, file_numbers, hashes).tolist() == expected


def test_line_numbers_continue_over_spans(options: UnitSettings, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"line {i}"}) if i % 40 else "bad" for i in range(1, 400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    encoder = UnitEncoder(options, tmp_path / "work")
    encoded = EncodedSource("s", "text", tmp_path)
    monkeypatch.setattr(files, "WHOLE_FILE_BYTES", 0)
    encoded.units += [(unit, encoder.encode(unit)) for unit in plan_units([tmp_path / "a.jsonl"], 700)]
    assert len(encoded.units) > 5
    assert [r["line"] for r in iter_bad_records(encoded, tmp_path / "work", "uint16")] == [
        *range(40, 400, 40)]


BYTES_PER_TOKEN = 3


def write_documents(folder: Path, lengths: list[int], shard_tokens: int, group: int,
                    batch: int) -> ShardedWriter:
    """Write documents in batches of groups; each token, and the extra line, is its document's number."""
    with ShardedWriter(folder, "s/train", "uint16", {}, True, group, shard_tokens) as writer:
        for first in range(0, len(lengths), batch * group):
            part = np.array(lengths[first : first + batch * group], np.int32)
            numbers = range(first, first + len(part))
            writer.write(part, part.astype(np.int64) * BYTES_PER_TOKEN, {"bin": np.repeat(numbers, part)},
                         [b"%d\n" % number for number in numbers])
    return writer


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=40), st.integers(1, 60), st.sampled_from([1, 2]),
       st.integers(1, 7))
def test_shards_keep_order_limit_and_groups(lengths: list[int], shard_tokens: int, group: int,
                                            batch: int) -> None:
    lengths = lengths[: len(lengths) // group * group]
    with tempfile.TemporaryDirectory() as folder:
        writer = write_documents(Path(folder), lengths, shard_tokens, group, batch)
        found, lines = [], []
        for number, shard in enumerate(writer.shards):
            assert shard.prefix == f"s/train-{number:05d}"
            documents = [d.tolist() for d in open_split(Path(folder) / shard.prefix).documents()]
            assert len(documents) == shard.num_documents > 0 and len(documents) % group == 0
            assert sum(map(len, documents)) == shard.num_tokens == shard.num_bytes // BYTES_PER_TOKEN
            assert shard.num_tokens <= shard_tokens or len(documents) == group
            found += documents
            lines += Path(f"{folder}/{shard.prefix}.extra.jsonl").read_text().split()
        assert found == [[number] * length for number, length in enumerate(lengths)]
        assert lines == [str(number) for number in range(len(lengths))]
        # no shard was closed with room for the first group of the next shard
        for shard, following in zip(writer.shards, writer.shards[1:], strict=False):
            first = open_split(Path(folder) / following.prefix).lengths_tokens[:group].sum()
            assert shard.num_tokens + first > shard_tokens


LINES = [json.dumps({"id": f"id {i}", "text": f"line {i} 한국어"}) for i in range(50)]


def write_lines(folder: Path, name: str = "a.jsonl", lines: list[str] = LINES) -> Path:
    (folder / name).write_text("\n".join(lines))
    return folder / name


def compute_key(file: Path, options: UnitSettings) -> str:
    [unit] = plan_units([file])
    return compute_unit_key(unit, options)


def test_unit_key_depends_on_bytes_and_settings_only(options: UnitSettings, tmp_path: Path) -> None:
    known = compute_key(write_lines(tmp_path), options)
    moved = dataclasses.replace(options, tokenizer=tmp_path / "elsewhere")
    assert compute_key(write_lines(tmp_path, "b.jsonl"), moved) == known
    for changed in (dataclasses.replace(options, tokenizer_sha256="c"),
                    dataclasses.replace(options, config_sha256="c"),
                    dataclasses.replace(options, dtype="int32"),
                    dataclasses.replace(options, reading=RecordReading("text", "body")),
                    dataclasses.replace(options, reading=RecordReading("text", max_document_bytes=99)),
                    dataclasses.replace(options, encoding=EncodingSettings(bos="start"))):
        assert compute_key(tmp_path / "a.jsonl", changed) != known
    for name, lines in (("a.jsonl", LINES[1:]), ("a.jsonl", ["{}", *LINES[1:]]), ("a.txt", LINES)):
        assert compute_key(write_lines(tmp_path, name, lines), options) != known


def test_unit_key_of_parquet_depends_on_values_and_columns(options: UnitSettings, tmp_path: Path) -> None:
    keys = set()
    for table in ({"text": ["a", "b"]}, {"text": ["a", "c"]}, {"body": ["a", "b"]}):
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        keys |= {compute_key(tmp_path / "a.parquet", options), compute_key(tmp_path / "a.parquet", options)}
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    keys.add(compute_key(tmp_path / "a.parquet", options))
    assert len(keys) == 4, "one key for each of three tables, and one for the damaged file"


def test_complete_unit_is_reused_and_partial_unit_rebuilt(options: UnitSettings, tmp_path: Path) -> None:
    [unit] = plan_units([write_lines(tmp_path)])
    first = UnitEncoder(options, tmp_path / "work").encode(unit)
    assert first.encoded_now and first.num_sequences == 50 and first.num_lines == (50,)
    again = UnitEncoder(options, tmp_path / "work").encode(unit)
    assert again == dataclasses.replace(first, encoded_now=False)
    folder = part_folder(tmp_path / "work", first.key)
    torn = folder.rename(folder.with_name(f"{first.key}.tmp-1"))  # as a killed process leaves it
    assert UnitEncoder(options, tmp_path / "work").encode(unit).encoded_now
    assert (torn / "tokens").read_bytes() == (folder / "tokens").read_bytes()


def test_unit_stores_a_row_per_sequence(options: UnitSettings, tmp_path: Path) -> None:
    write_lines(tmp_path, "a.jsonl", [LINES[0], "{", "", LINES[1]])
    (tmp_path / "b.txt").write_text("only text")
    [unit] = plan_units([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    record = UnitEncoder(options, tmp_path / "work").encode(unit)
    stored = open_unit(tmp_path / "work", record.key, "uint16")
    assert stored.sequences["line"].tolist() == [1, 4, 0] and stored.sequences["span"].tolist() == [0, 0, 1]
    texts = ["line 0 한국어", "line 1 한국어", "only text"]
    assert stored.sequences["bytes"].tolist() == [len(text.encode()) for text in texts]
    assert (stored.sequences["id"] != 0).tolist() == [True, True, False] and stored.kinds is None
    assert stored.sequences["tokens"].sum() == len(stored.tokens) == record.num_tokens
    assert [(r["span"], r["line"], r["code"]) for r in stored.iter_bad_rows()] == [(0, 2, "json")]
    assert record.num_bad == {"json": 1} and record.num_lines == (4, 0)


def test_bad_record_without_text_is_stored(options: UnitSettings, tmp_path: Path) -> None:
    [unit] = plan_units([write_lines(tmp_path, "a.jsonl", [LINES[0], '{"\\ud800": 1}'])])
    record = UnitEncoder(options, tmp_path / "work").encode(unit)
    [row] = open_unit(tmp_path / "work", record.key, "uint16").iter_bad_rows()
    assert row["code"] == "fields" and "(fields: ?)" in row["reason"]


def test_document_rejected_by_template_is_found_in_batch(options: UnitSettings, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sov.chat.template import ChatTemplate

    render = ChatTemplate.render

    def strict(self: ChatTemplate, conversation: Conversation, *args: Any, **kwargs: Any) -> str:
        if conversation.messages and conversation.messages[0].role == "system":
            raise BadRecord("template", "is refused")
        return render(self, conversation, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", strict)
    refused = (3, 4, 17)
    lines = [{"messages": [{"role": "system" if i in refused else "user", "content": str(i)},
                           {"role": "assistant", "content": "yes"}]} for i in range(20)]
    [unit] = plan_units([write_lines(tmp_path, "chat.jsonl", list(map(json.dumps, lines)))])
    record = UnitEncoder(dataclasses.replace(options, reading=RecordReading("chat")),
                         tmp_path / "work").encode(unit)
    stored = open_unit(tmp_path / "work", record.key, "uint16")
    assert [r["line"] - 1 for r in stored.iter_bad_rows()] == list(refused)
    assert [line - 1 for line in stored.sequences["line"].tolist()] == [
        i for i in range(20) if i not in refused]
