"""Web archives: the records that become documents, and truncated archives."""

import gzip
import io
import zlib
from typing import Any

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.curate.sources.source import BrokenRecord, RawDocument
from data_prep.curate.sources.warc import decode_http_body
from megatron_sov.base.documents import BadRecord

TEXT = "이 문장은 웹 페이지에 있던 것이고, 누구나 읽을 수 있을 만큼 충분히 길다."
RESPONSES = [
    ("http://a.example/1", "text/html; charset=euc-kr", "200 OK",
     f"<html><body><nav><a>menu</a></nav><p>{TEXT}</p></body></html>".encode("euc-kr")),
    ("http://a.example/2", "image/png", "200 OK", b"\x89PNG"),
    ("http://a.example/3", "text/html", "404 Not Found", b"<p>no such page</p>"),
    ("http://a.example/4", "text/plain", "200 OK", "plain ü".encode()),
    ("http://a.example/5", "application/pdf", "200 OK", b"%PDF-1.4 and no more"),
]
"""HTTP responses: (address, type, status, body)."""


def write_archive(*records: tuple[str, str, bytes, dict[str, Any]], packed: bool = True) -> bytes:
    """Return an archive of records, each an address, a type, a payload and other fields."""
    sink = io.BytesIO()
    writer = WARCWriter(sink, gzip=packed)
    for url, type_, payload, fields in records:
        writer.write_record(writer.create_warc_record(url, type_, payload=io.BytesIO(payload), **fields))
    return sink.getvalue()


def build_archive(*, packed: bool = True) -> bytes:
    """Return an archive of RESPONSES after a record about the archive."""
    return write_archive(("a.warc", "warcinfo", b"software: test\r\n", {}), *(
        (url, "response", body, {
            "http_headers": StatusAndHeaders(status, [("Content-Type", type_)], protocol="HTTP/1.1"),
            "warc_headers_dict": {"WARC-Date": "2026-01-02T03:04:05Z",
                                  "WARC-Record-ID": f"<urn:test:{url[-1]}>"}})
        for url, type_, status, body in RESPONSES), packed=packed)


def list_texts_or_codes(records: list[RawDocument | BrokenRecord]) -> list[str]:
    """Return the text of each document, and the code of each broken record."""
    return [record.text if isinstance(record, RawDocument) else record.code for record in records]


EXPECTED = [TEXT, "type", "status", "plain ü", "pdf"]
"""Text or code of each of RESPONSES."""
PLAIN = {"warc_content_type": "text/plain"}


@pytest.mark.parametrize(("name", "content"), [
    ("a.warc.gz", build_archive()), ("a.warc", build_archive(packed=False)),
    ("a.warc.gz", gzip.compress(build_archive(packed=False)))])
def test_http_responses_are_documents_in_any_compression(read, name: str, content: bytes) -> None:
    records = read({name: content})
    assert list_texts_or_codes(records) == EXPECTED
    assert records[0].place == f"{name}:2"
    assert records[0].columns["url"] == "http://a.example/1"
    assert records[0].columns["crawled"] == "2026-01-02T03:04:05Z"
    assert [one.is_left_out for one in records if isinstance(one, BrokenRecord)] == [True, True, False]


def test_extracted_text_of_an_archive_is_read(read) -> None:
    archive = write_archive(("http://a.example", "conversion", TEXT.encode(), PLAIN))
    assert list_texts_or_codes(read({"a.wet.gz": archive})) == [TEXT]


@pytest.mark.parametrize("packed", [True, False])
def test_a_truncated_archive_is_reported_at_every_offset(read, packed: bool) -> None:
    content = build_archive(packed=packed)
    name = "a.warc.gz" if packed else "a.warc"
    for length in range(len(content) - 5, 400, -407):
        texts_or_codes = list_texts_or_codes(read({name: content[:length]}))
        whole = [one for one in texts_or_codes if one in EXPECTED]
        assert whole == EXPECTED[:len(whole)], length  # documents are read whole or not at all
        if packed:
            assert texts_or_codes[-1] == "truncated", (length, texts_or_codes)


def test_a_record_above_the_limit_is_skipped(read) -> None:
    archive = write_archive(*(("http://a.example", "resource", b"x" * size, PLAIN) for size in (2000, 20)))
    assert list_texts_or_codes(read({"a.warc.gz": archive}, "warc",
                                    record_bytes=1000)) == ["too_long", "x" * 20]


def test_a_file_that_is_not_an_archive_is_reported(read) -> None:
    assert "warc" in list_texts_or_codes(read({"a.warc": b"hello\r\n" * 100}))[-1]


def compress_raw(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


BODY = f"<p>{TEXT}</p>".encode()
PACKED = gzip.compress(BODY)


@pytest.mark.parametrize(("packing", "body", "expected"), [
    ("gzip", PACKED, BODY), ("x-gzip", PACKED + PACKED, BODY + BODY), ("deflate", zlib.compress(BODY), BODY),
    ("gzip", BODY, BODY), ("br", BODY, BODY), ("", BODY, BODY), ("identity", b"\xff\0", b"\xff\0"),
    ("gzip", PACKED[:-20], "truncated"), ("gzip", PACKED[:40] + b"?" + PACKED[41:], "truncated"),
    ("deflate", compress_raw(BODY), BODY), ("deflate", zlib.compress(BODY)[:-9], "truncated"),
    ("deflate", BODY, BODY), ("gzip, br", PACKED, "encoding"),
    ("br", b"\x8b\x1c\xff\0" + bytes(range(200)), "encoding")])
def test_bodies_are_decompressed_or_reported(packing: str, body: bytes, expected: bytes | str) -> None:
    try:
        result: bytes | str = decode_http_body(body, packing, 10_000)
    except BadRecord as e:
        result = e.code
    assert result == expected


def test_a_decompression_bomb_in_a_body_is_refused() -> None:
    assert len(decode_http_body(gzip.compress(bytes(10_000_000)), "gzip", 1000)) == 1001


def test_a_truncated_compressed_page_is_not_a_document(read) -> None:
    headers = [("Content-Type", "text/html"), ("Content-Encoding", "gzip"), ("Transfer-Encoding", "Chunked")]
    archive = write_archive(*(
        ("http://a.example", "response", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
         {"http_headers": StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")})
        for body in (PACKED[:-20], PACKED)))
    assert list_texts_or_codes(read({"a.warc.gz": archive})) == ["truncated", TEXT]
