"""Read files and spans as documents, and refuse malformed records with their location."""

import gzip
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from data_prep.curate.sources.reader import list_source_files
from data_prep.curate.sources.source import SourceSettings
from megatron_sov.base import documents
from megatron_sov.base.documents import (
    Document, Message, RecordReading, list_files, plan_units, read_documents, read_span)
from megatron_sov.base.documents.files import ZstdFile
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.records import count_text_bytes
from megatron_sov.base.errors import UserError


def read_texts(path: Path) -> list[str]:
    """Return the texts of the documents in a file or folder."""
    return [d.text for d in read_documents(list_files(path))]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\t\n")
    assert read_texts(tmp_path / "a.txt") == ["one\r\n\r\n  two\t\n"]


def test_large_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "x" * 999 + "\n\n"
    (tmp_path / "big.txt").write_text(paragraph * 1200)
    pieces = read_texts(tmp_path / "big.txt")
    assert "".join(pieces) == paragraph * 1200
    assert all(len(t) <= documents.DOCUMENT_BYTES and t.endswith("\n\n") for t in pieces)
    assert len(pieces) == -(-1200 // (documents.DOCUMENT_BYTES // len(paragraph)))


def test_jsonl_skips_blank_texts(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    lines = [{"text": "한국어"}, {"text": "  "}, {"messages": chat}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second = read_documents([tmp_path / "a.jsonl"])
    assert first.text == "한국어" and first.where.endswith("a.jsonl:1")
    assert second.messages == (Message("user", "hi"), Message("assistant", "yo"))
    assert second.texts() == ("hi", "yo")


def test_other_encodings_and_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cp949.txt").write_bytes("abc 한국어".encode("cp949"))
    with pytest.raises(UserError, match=r"cp949.txt: is not UTF-8 \(byte 0xc7 at offset 4\)"):
        read_texts(tmp_path / "cp949.txt")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read_texts(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no text file"):
        read_texts(tmp_path / "empty")


def test_compressed_files_equal_plain_files(tmp_path: Path) -> None:
    text = "".join(f"line {i} 한국어\n\n" for i in range(100_000))  # above the size of a whole document
    raw = text.encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw[:777]) + gzip.compress(raw[777:]))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(raw[:777]) + zstandard.compress(raw[777:]))
    plain = read_texts(tmp_path / "a.txt")
    assert "".join(plain) == text and len(plain) > 5
    assert plain == read_texts(tmp_path / "b.txt.gz") == read_texts(tmp_path / "c.txt.zst")
    assert [p.name for p in list_files(tmp_path)] == ["a.txt", "b.txt.gz", "c.txt.zst"]
    for name in ("b.txt.gz", "c.txt.zst"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
        with pytest.raises(UserError, match=f"{name}: is cut off or damaged"):
            read_texts(tmp_path / name)


def test_parquet_rows_have_numbers(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    parquet.write_table(pyarrow.table({"id": ["a", "b"], "messages": [chat, chat[1:]]}),
                        tmp_path / "a.parquet", row_group_size=1)
    first, second = read_documents([tmp_path / "a.parquet"])
    assert first.messages == (Message("user", "hi"), Message("assistant", "yo"))
    assert (first.id, first.where) == ("a", f"{tmp_path}/a.parquet:1")
    assert second.messages == (Message("assistant", "yo"),)
    parquet.write_table(pyarrow.table({"body": ["one", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet:2: has no string field 'body'"):
        list(read_documents([tmp_path / "b.parquet"], RecordReading("text", "body")))
    with pytest.raises(UserError, match=r"b\.parquet: has no string field 'text' \(fields: body\)"):
        list(read_documents([tmp_path / "b.parquet"], RecordReading("text")))


# Files, their order, and the spans in which they are read.


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/y.txt", ".git/config.txt", "picture.png", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path) == ["a/y.txt", "a/z.py", "b.md"]


@pytest.mark.each("span_bytes", [150, 1000, 2_000_000])
def test_spans_cover_all_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span_bytes: int) -> None:
    texts = ["a", "b" * 700, *(f"text {i}\n한국어" for i in range(300))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    monkeypatch.setattr("megatron_sov.base.documents.files.WHOLE_FILE_BYTES", 100)
    [*units] = plan_units([tmp_path / "a.jsonl"], span_bytes)
    assert (len(units) > 10) == (span_bytes <= 1000)
    spans = [span for unit in units for span in unit]
    items = [item for span in spans for item in read_span(span, RecordReading("text"))]
    assert [d.text for d in items if isinstance(d, Document)] == texts and len(items) == len(texts)


def test_small_files_share_a_unit(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("x" * 100)
    units = list(plan_units(list_files(tmp_path), 450))
    assert [len(unit) for unit in units] == [4] * 5
    assert [span.file.name for unit in units for span in unit] == [f"{i:02}.txt" for i in range(20)]


# In a folder of generated samples, only accepted samples are data.


def test_rejected_samples_are_skipped(tmp_path: Path) -> None:
    for name in ("made/kept.jsonl", "made/rejected.jsonl", "made/candidates/part-0.jsonl",
                 "made/kept-prompt.jsonl", "made/checks/texts/samples/a.jsonl", "web/a.jsonl", "kept.jsonl",
                 "half/candidates/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert list_files(tmp_path / "made") == [tmp_path / "made/kept.jsonl"]
    expected = ["half/candidates/a.jsonl", "kept.jsonl", "made/kept.jsonl", "web/a.jsonl"]
    assert [file.relative_to(tmp_path).as_posix() for file in list_files(tmp_path)] == expected
    assert list_files(tmp_path / "made/rejected.jsonl"), "who names a file means it"
    source = SourceSettings("made", (".",), tmp_path, "jsonl")
    assert list_source_files(source, lambda name: name.endswith(".jsonl")) == expected


# One record as a document: required fields of each kind, and refusals with their location.


@pytest.mark.each(("line", "rule"), [
    ("{bad", "is not valid JSON"),
    ("[1]", "is a JSON list"),
    ('{"txt": "a"}', "no string field 'text'"),
    ('{"text": 3}', "no string field 'text'"),
    ('{"text": "\\ud800"}', "surrogate"), ('{"text": "\\ud83d\\ude00 \\ud800"}', "surrogate"),
    ('{"messages": []}', "non-empty list"),
    ('{"messages": [{"role": "<|end|>", "content": "a"}]}', "must be one of system, user"),
    ('{"messages": [{"role": "user", "content": null}]}', "must be a string"),
    ('{"messages": [{"role": "user", "content": "a"}], "num_prompt_messages": 1}', "at least 1, and not all"),
    ('{"messages": [{"role": "user", "content": "a"}], "num_prompt_messages": true}', "has 'True' in"),
    (b'{"text": "\xb0\xa1"}', "is not UTF-8"),
])
def test_bad_line_is_named(tmp_path: Path, line: str | bytes, rule: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + raw + b"\n")
    with pytest.raises(UserError, match=rule) as e:
        read_texts(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl:2" in str(e.value)


@pytest.mark.parametrize("record", [
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
    {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}],
     "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
], ids=["strings", "transcripts", "shared beginning"])
def test_preference_record_forms(tmp_path: Path, record: dict[str, object]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    [document] = read_documents([tmp_path / "a.jsonl"], RecordReading("preference"))
    assert (document.kind, document.messages, document.chosen, document.rejected) == (
        "preference", (Message("user", "p"),), (Message("assistant", "c"),), (Message("assistant", "r"),))


@pytest.mark.each(("record", "rule"), [
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "nothing to prefer"),
    ({"chosen": "c", "rejected": "r"}, "has no prompt"),
    ({"prompt": "p", "chosen": [{"role": "user", "content": "c"}], "rejected": "r"},
     "'chosen' holds no message of the assist"),
    ({"prompt": "p"}, "is a prompt, but --format is preference"),
    ({"text": "t"}, "is plain text, but --format is preference"),
])
def test_malformed_preferences_are_refused(tmp_path: Path, record: dict[str, object], rule: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rule):
        list(read_documents([tmp_path / "a.jsonl"], RecordReading("preference")))


def test_prompt_keeps_other_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "answer": {"value": 4},
                                                  "level": "쉬움"}))
    [document] = read_documents([tmp_path / "a.jsonl"], RecordReading("prompt"))
    assert document.kind == "prompt" and document.messages == (Message("user", "2 + 2?"),)
    assert json.loads(document.extra) == {"answer": {"value": 4}, "level": "쉬움"}


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=3000), max_size=5), st.integers(1, 5000))
def test_compressed_frames_are_joined(frames: list[bytes], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.zst"
        file.write_bytes(b"".join(map(zstandard.compress, frames)))
        with io.BufferedReader(ZstdFile(file)) as f:
            assert b"".join(iter(lambda: f.read(size), b"")) == b"".join(frames)


@pytest.mark.each("num_missing_bytes", [1, 5, 500])
def test_truncated_compressed_file_is_detected(tmp_path: Path, num_missing_bytes: int) -> None:
    raw = zstandard.compress(b"first") + zstandard.compress(bytes(range(256)) * 40, 1)
    (tmp_path / "a.zst").write_bytes(raw[: len(raw) - min(num_missing_bytes, len(raw) // 3)])
    with (pytest.raises(EOFError, match="Truncated"), io.BufferedReader(ZstdFile(tmp_path / "a.zst")) as f):
        f.read()
    (tmp_path / "b.zst").write_bytes(b"no zstd at all")
    with pytest.raises(EOFError), io.BufferedReader(ZstdFile(tmp_path / "b.zst")) as f:
        f.read()


# Small compressed files with huge content: reading them must take memory for the record limit, not for the
# content.


ZEROS_BYTES = 400_000_000
MAX_GROWTH_MB = 120
MEASURE_READING = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from megatron_sov.base.documents import RecordReading, list_files
from megatron_sov.base.documents.files import iter_spans
from megatron_sov.base.documents.reading import read_span
def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024
before, codes = peak_mb(), set()
for span in iter_spans(Path(sys.argv[1])):
    codes |= {item.code for item in read_span(span, RecordReading(max_document_bytes=1_000_000))}
print(peak_mb() - before, *codes)
"""


def write_zeros(file: Path) -> None:
    with gzip.open(file, "wb", 1) if file.suffix == ".gz" else zstandard.open(file, "wb") as f:
        for _ in range(ZEROS_BYTES // 4_000_000):
            f.write(bytes(4_000_000))


def write_one_string_in_many_rows(file: Path) -> None:
    # all rows share one string, so that this process needs no memory for 200 of them
    rows = pyarrow.chunked_array([pyarrow.array(["x" * 4_000_000])] * 200)
    parquet.write_table(pyarrow.table({"text": rows}), file, compression="zstd", store_schema=False)


@pytest.mark.deep
@pytest.mark.parametrize(("name", "write"), [
    ("a.jsonl.gz", write_zeros), ("a.jsonl.zst", write_zeros),
    ("a.parquet", write_one_string_in_many_rows)])
def test_memory_is_bounded_by_record_limit(name: str, write, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 2_000_000
    completed = subprocess.run([sys.executable, "-c", MEASURE_READING, str(tmp_path / name)],
                               capture_output=True, text=True, check=True)
    growth_mb, *codes = completed.stdout.split()
    assert codes == ["too_long"] and int(growth_mb) < MAX_GROWTH_MB, completed.stdout


class UnencodedText(str):
    """A text that may not be encoded."""

    def encode(self, *_: object) -> bytes:
        raise AssertionError("was encoded")


def test_ascii_text_is_counted_without_encoding() -> None:
    assert count_text_bytes(UnencodedText("plain words")) == 11
    assert count_text_bytes("전화") == 6


@pytest.mark.each(("name", "content", "is_refused"), [
    ("a.jsonl", r'{"own": "plain and 전화"}', False), ("a.jsonl", r'{"own": "\u00e9"}', False),
    ("a.jsonl", r'{"own": "\ud83d\ude00"}', False), ("a.jsonl", r'{"own": {"a": ["\uD800"]}}', True),
    ("a.json", r'[{"own": "\udfff"}]', True)])
def test_any_field_of_a_record_may_hold_a_lone_surrogate(tmp_path: Path, name: str, content: str,
                                                         is_refused: bool) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    if is_refused:
        with pytest.raises(UserError, match="half of a surrogate pair"):
            list(read_records(tmp_path / name))
    else:
        assert len(list(read_records(tmp_path / name))) == 1


def test_lines_without_escapes_are_not_formatted_to_find_surrogates(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"own": "plain words"}\n{"own": "전화"}\n', encoding="utf-8")
    monkeypatch.setattr(json, "dumps", None)
    assert len(list(read_records(tmp_path / "a.jsonl"))) == 2


@pytest.mark.each(("name", "content"), [
    ("a.txt", '{"n": 1}\n{"n": 2}\n'), ("a", '[{"n": 1}, {"n": 2}]'), ("a.NDJSON", '{"n": 1}\n{"n": 2}\n'),
    ("a.jsonl.gz", '{"n": 1}\n{"n": 2}\n'), ("a.json.gz", '[{"n": 1},\n {"n": 2}]'),
    ("a.lines.gz", '{"n": 1}\n\n{"n": 2}\n')])
def test_content_and_not_the_ending_makes_a_named_file_one_of_records(tmp_path: Path, name: str,
                                                                      content: str) -> None:
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wb") as file:
        file.write(content.encode())
    assert [record["n"] for _, record in read_records(tmp_path / name)] == [1, 2]


def test_a_named_file_of_text_holds_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A heading\n")
    with pytest.raises(UserError, match=r"a.md:1: is not valid JSON .*; every line must be one JSON object"):
        list(read_records(tmp_path / "a.md"))
