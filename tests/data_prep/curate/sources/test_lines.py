"""Plain text and JSON lines: documents with their locations, and broken records."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data_prep.curate.sources.formats import create_reader
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourceSettings

RECORDS = [{"text": "one", "url": "http://a.example/1", "lang": "en"}, {"text": "둘", "id": 7, "score": 0.5}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def list_texts_or_codes(records: list[RawDocument | BrokenRecord]) -> list[str]:
    """Return the text of each document, and the code of each broken record."""
    return [record.code if isinstance(record, BrokenRecord) else record.text for record in records]


@pytest.mark.parametrize(("name", "pack"), [
    ("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress),
    ("a.jsonl.zst", zstandard.ZstdCompressor().compress)])
def test_a_line_is_a_document_with_its_location(read, name: str, pack) -> None:
    assert read({name: pack(LINES.encode())}) == [
        RawDocument("one", f"{name}:1", {"url": "http://a.example/1", "language_hint": "en"}),
        RawDocument("둘", f"{name}:2", {"own_id": "7", "score": 0.5})]


def test_malformed_lines_are_reported_and_other_lines_are_read(read) -> None:
    lines = ['{"text": "good"}', "no json", "[1]", '{"other": 1}', '{"text": "half \\ud800"}',
             '{"text": " "}', '{"text": 5}', '{"text": "last"}']
    records = read({"a.jsonl": "\n".join(lines)})
    assert list_texts_or_codes(records) == [
        "good", "json", "json", "fields", "utf8", "empty", "fields", "last"]
    assert [one.place for one in records] == [f"a.jsonl:{n}" for n in range(1, 9)]
    assert [one.content for one in records[1:3]] == ["no json", "[1]"]
    # only the empty text is left out without counting as broken
    assert [isinstance(one, BrokenRecord) and one.is_left_out for one in records].index(True) == 5


def test_a_truncated_compressed_file_is_read_up_to_the_cut(read) -> None:
    text = "".join(json.dumps({"text": f"{n} " * 50 + str(n * n)}) + "\n" for n in range(2000))
    packed = gzip.compress(text.encode())
    records = read({"a.jsonl.gz": packed[:len(packed) // 2]})
    assert len(records) > 100 and all(isinstance(one, RawDocument) for one in records[:-1])
    assert records[-1].code == "truncated"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_decompression_bomb_is_refused(read, pack) -> None:
    ending = "gz" if pack is gzip.compress else "zst"
    records = read({f"a.txt.{ending}": pack(bytes(50_000_000))})
    assert list_texts_or_codes(records) == ["bomb"]


def test_a_line_above_the_limit_is_skipped(read) -> None:
    lines = ['{"text": "good"}', '{"text": "' + "x" * 100_000 + '"}', '{"text": "next"}']
    records = read({"a.jsonl": "\n".join(lines)}, document_bytes=10_000)
    assert list_texts_or_codes(records) == ["good", "too_long", "next"]


def test_text_is_unchanged_except_for_its_byte_order_mark(read) -> None:
    text = "Erste Zeile\r\n\r\n  둘째 줄\n"
    assert read({"a.txt": "\ufeff" + text}) == [RawDocument(text, "a.txt")]


def test_long_text_is_split_at_blank_lines(read) -> None:
    text = "".join(f"paragraph {n} " + "word " * 30 + "\n\n" for n in range(8000))
    records = read({"a.txt": text}, "text", cut_bytes=50_000)
    assert "".join(one.text for one in records) == text
    assert all(len(one.text) <= 50_000 and one.text.endswith("\n\n") for one in records)
    assert len({one.place for one in records}) == len(records)


def test_pieces_of_a_large_file_cover_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"document {n}"}) for n in range(5000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("megatron_sov.base.documents.files.SPAN_BYTES", 20_000)
    monkeypatch.setattr("megatron_sov.base.documents.files.WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("megatron_sov.base.documents.files.iter_spans.__defaults__", (20_000,))
    reader = create_reader(SourceSettings("s", ("a.jsonl",), tmp_path))
    pieces = reader.list_pieces()
    documents = [one for piece in pieces for one in reader.read_piece(piece)]
    assert len(pieces) > 5
    assert [one.text for one in documents] == [f"document {n}" for n in range(5000)]
    assert len({one.place for one in documents}) == 5000


@pytest.mark.parametrize("encoding", ["cp949", "euc_jp", "cp1251", "utf-16"])
def test_other_encodings_by_name(read, encoding: str) -> None:
    text = {"cp949": "안녕하세요", "euc_jp": "こんにちは", "cp1251": "Привет"}.get(encoding, "é한")
    assert list_texts_or_codes(read({"a.txt": text.encode(encoding)}, "text", encoding=encoding)) == [text]


def test_a_wrong_encoding_is_reported_and_can_be_detected(read) -> None:
    text = "이 문장은 옛날 부호로 쓰였습니다. 요즘은 유니코드를 씁니다. 그래도 읽을 수 있어야 합니다.\n" * 5
    assert list_texts_or_codes(read({"a.txt": text.encode("cp949")})) == ["utf8"]
    assert list_texts_or_codes(read({"a.txt": text.encode("cp949")}, "text", encoding="detect")) == [text]


def test_a_deeply_nested_field_is_dropped_without_its_record(read) -> None:
    deep = '{"text": "deep", "a": ' + "[" * 1200 + "]" * 1200 + ', "b": 1}'
    records = read({"a.jsonl": f'{{"text": "first"}}\n{deep}\n{{"text": "last"}}\n'})
    assert list_texts_or_codes(records) == ["first", "deep", "last"] and records[1].columns == {"b": 1}


def test_json_lines_are_read_from_a_file_of_any_name(read) -> None:
    lines = "".join(json.dumps({"text": f"{n} " + "y" * 900_000}) + "\n" for n in range(12))
    records = read({"dump.txt": lines}, "jsonl", path="dump.txt")
    assert [one.text.split()[0] for one in records] == [str(n) for n in range(12)]


@pytest.mark.parametrize(("name", "content"), [
    pytest.param("a.txt", b"", id="no bytes"),
    pytest.param("a.txt.gz", gzip.compress(b"", mtime=0), id="packed"),
    pytest.param("a.txt", b"\xef\xbb\xbf", id="only a byte order mark"),
    pytest.param("a.txt", b" \n", id="only white space")])
def test_an_empty_text_file_is_counted(read, name: str, content: bytes) -> None:
    assert [(one.code, one.is_left_out) for one in read({name: content})] == [("empty", True)]
