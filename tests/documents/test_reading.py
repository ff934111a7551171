"""Reading files: what becomes a document, and what is refused with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_sov import documents
from megatron_sov.documents import (
    Message,
    Reading,
    list_files,
    read_documents,
)
from megatron_sov.errors import UserError


def read(path: Path) -> list[str]:
    return [d.text for d in read_documents(list_files(path))]


def test_a_text_file_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\t\n")
    assert read(tmp_path / "a.txt") == ["one\r\n\r\n  two\t\n"]


def test_a_large_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "x" * 999 + "\n\n"
    (tmp_path / "big.txt").write_text(paragraph * 1200)
    found = read(tmp_path / "big.txt")
    assert "".join(found) == paragraph * 1200
    assert all(len(t) <= documents.DOCUMENT_BYTES and t.endswith("\n\n") for t in found)
    assert len(found) == -(-1200 // (documents.DOCUMENT_BYTES // len(paragraph)))


def test_jsonl_holds_text_or_messages_and_blank_ones_are_passed_over(tmp_path: Path) -> None:
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
        read(tmp_path / "cp949.txt")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no text file"):
        read(tmp_path / "empty")


def test_compressed_files_of_one_or_more_frames_read_as_plain_ones(tmp_path: Path) -> None:
    text = "".join(f"line {i} 한국어\n\n" for i in range(100_000))  # above the size of a whole document
    raw = text.encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw[:777]) + gzip.compress(raw[777:]))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(raw[:777]) + zstandard.compress(raw[777:]))
    plain = read(tmp_path / "a.txt")
    assert "".join(plain) == text and len(plain) > 5
    assert plain == read(tmp_path / "b.txt.gz") == read(tmp_path / "c.txt.zst")
    assert [p.name for p in list_files(tmp_path)] == ["a.txt", "b.txt.gz", "c.txt.zst"]
    for name in ("b.txt.gz", "c.txt.zst"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
        with pytest.raises(UserError, match=f"{name}: is cut off or damaged"):
            read(tmp_path / name)


def test_a_byte_order_mark_is_no_text_of_jsonl_either(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert read(tmp_path / "a.jsonl") == ["one", "two"]


def test_rows_of_parquet_are_records_with_their_numbers(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    parquet.write_table(pyarrow.table({"id": ["a", "b"], "messages": [chat, chat[1:]]}),
                        tmp_path / "a.parquet", row_group_size=1)
    first, second = read_documents([tmp_path / "a.parquet"])
    assert (first.messages == (Message("user", "hi"), Message("assistant", "yo"))
            and (first.id, first.where) == ("a", f"{tmp_path}/a.parquet:1"))
    assert second.messages == (Message("assistant", "yo"),)
    parquet.write_table(pyarrow.table({"body": ["one", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet:2: has no string field 'body'"):
        list(read_documents([tmp_path / "b.parquet"], Reading("text", "body")))
    with pytest.raises(UserError, match=r"b\.parquet: has no string field 'text' \(fields: body\)"):
        list(read_documents([tmp_path / "b.parquet"], Reading("text")))
