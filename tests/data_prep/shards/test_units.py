"""Units: the same for the same bytes and settings, another one for anything else, complete or not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
from pyarrow import parquet

from data_prep.shards.encode import EncodingSettings
from data_prep.shards.units import UnitEncoder, UnitSettings, encode_units, open_unit, unit_key
from megatron_sov.base.documents import BadRecord, Conversation, RecordReading, plan_units
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.resumable import part_folder

LINES = [json.dumps({"id": f"id {i}", "text": f"line {i} 한국어"}) for i in range(50)]


@pytest.fixture
def settings(tokenizers: dict[str, Path]) -> UnitSettings:
    return UnitSettings(tokenizers["solar-open"], "a", "b", "uint16", RecordReading("text"),
                        EncodingSettings())


def write(folder: Path, name: str = "a.jsonl", lines: list[str] = LINES) -> Path:
    (folder / name).write_text("\n".join(lines))
    return folder / name


def key(file: Path, settings: UnitSettings) -> str:
    [unit] = plan_units([file])
    return unit_key(unit, settings)


def test_the_key_is_of_bytes_and_settings_not_of_places(settings: UnitSettings, tmp_path: Path) -> None:
    known = key(write(tmp_path), settings)
    moved = dataclasses.replace(settings, tokenizer=tmp_path / "elsewhere")
    assert key(write(tmp_path, "b.jsonl"), moved) == known
    for changed in (dataclasses.replace(settings, tokenizer_sha256="c"),
                    dataclasses.replace(settings, config_sha256="c"),
                    dataclasses.replace(settings, dtype="int32"),
                    dataclasses.replace(settings, reading=RecordReading("text", "body")),
                    dataclasses.replace(settings, reading=RecordReading("text", max_document_bytes=99)),
                    dataclasses.replace(settings, encoding=EncodingSettings(bos="start"))):
        assert key(tmp_path / "a.jsonl", changed) != known
    for name, lines in (("a.jsonl", LINES[1:]), ("a.jsonl", ["{}", *LINES[1:]]), ("a.txt", LINES)):
        assert key(write(tmp_path, name, lines), settings) != known


def test_the_key_of_parquet_follows_values_and_columns(settings: UnitSettings, tmp_path: Path) -> None:
    keys = set()
    for table in ({"text": ["a", "b"]}, {"text": ["a", "c"]}, {"body": ["a", "b"]}):
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        keys.add(key(tmp_path / "a.parquet", settings))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    keys.add(key(tmp_path / "a.parquet", settings))
    assert len(keys) == 4


def test_a_complete_unit_is_kept_and_a_torn_one_made_again(settings: UnitSettings, tmp_path: Path) -> None:
    [unit] = plan_units([write(tmp_path)])
    first = UnitEncoder(settings, tmp_path / "work").encode(unit)
    assert first.encoded_now and first.num_sequences == 50 and first.num_lines == (50,)
    again = UnitEncoder(settings, tmp_path / "work").encode(unit)
    assert again == dataclasses.replace(first, encoded_now=False)
    folder = part_folder(tmp_path / "work", first.key)
    torn = folder.rename(folder.with_name(f"{first.key}.tmp-1"))  # as a killed process leaves it
    assert UnitEncoder(settings, tmp_path / "work").encode(unit).encoded_now
    assert (torn / "tokens").read_bytes() == (folder / "tokens").read_bytes()


def test_what_is_stored_of_each_sequence(settings: UnitSettings, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [LINES[0], "{", "", LINES[1]])
    (tmp_path / "b.txt").write_text("only text")
    [unit] = plan_units([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    record = UnitEncoder(settings, tmp_path / "work").encode(unit)
    stored = open_unit(tmp_path / "work", record.key, "uint16")
    assert stored.sequences["line"].tolist() == [1, 4, 0] and stored.sequences["span"].tolist() == [0, 0, 1]
    assert stored.sequences["bytes"].tolist() == [len("line 0 한국어".encode()),
                                                  len("line 1 한국어".encode()), 9]
    assert (stored.sequences["id"] != 0).tolist() == [True, True, False] and stored.kinds is None
    assert stored.sequences["tokens"].sum() == len(stored.tokens) == record.num_tokens
    assert [(r["span"], r["line"], r["code"]) for r in stored.bad_rows()] == [(0, 2, "json")]
    assert record.num_bad == {"json": 1} and record.num_lines == (4, 0)


def test_a_bad_record_is_kept_though_its_reason_names_no_text(settings: UnitSettings, tmp_path: Path) -> None:
    [unit] = plan_units([write(tmp_path, "a.jsonl", [LINES[0], '{"\\ud800": 1}'])])
    record = UnitEncoder(settings, tmp_path / "work").encode(unit)
    [row] = open_unit(tmp_path / "work", record.key, "uint16").bad_rows()
    assert row["code"] == "fields" and "(fields: ?)" in row["reason"]


def test_documents_that_a_template_refuses_are_found_inside_a_batch(tokenizers: dict[str, Path],
                                                                    settings: UnitSettings, tmp_path: Path,
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
    [unit] = plan_units([write(tmp_path, "chat.jsonl", list(map(json.dumps, lines)))])
    record = UnitEncoder(dataclasses.replace(settings, reading=RecordReading("chat")),
                         tmp_path / "work").encode(unit)
    stored = open_unit(tmp_path / "work", record.key, "uint16")
    assert [r["line"] - 1 for r in stored.bad_rows()] == list(refused)
    assert [line - 1 for line in stored.sequences["line"].tolist()] == [
        i for i in range(20) if i not in refused]


def worker_processes() -> list[psutil.Process]:
    """Return the encoding processes, without the tracker that Python starts beside them."""
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.deep
def test_order_is_the_inputs_and_an_ended_worker_is_said(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    for i in range(12):  # the first ones are the largest, so they end last
        (tmp_path / f"{i:02}.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {k}"})
                                                          for k in range(2000 - 160 * i)))
    units = list(plan_units(sorted(tmp_path.glob("*.jsonl")), 1))
    settings = UnitSettings(tokenizers["solar-open"], "a", "b", "uint16", RecordReading("text"),
                            EncodingSettings())
    records = encode_units(units, settings, tmp_path / "work", 2)
    first = next(records)
    workers = worker_processes()
    assert [first.num_sequences, *(r.num_sequences for r in records)] == [2000 - 160 * i for i in range(12)]
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=600)[1]
    records = encode_units(units, settings, tmp_path / "other", 2)
    next(records)
    worker_processes()[-1].kill()
    with pytest.raises(UserError, match="run the same command again"):
        list(records)
