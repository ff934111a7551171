"""Reader for web archives: a page, text or PDF in a server's response is a document."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from warcio.archiveiterator import ArchiveIterator
from warcio.bufferedreaders import ChunkedDataReader
from warcio.exceptions import ArchiveLoadFailed

from data_prep.curate.sources.encodings import DETECT, LimitBytes, decode_page, decode_text, open_unpacked
from data_prep.curate.sources.html import NO_TEXT, HtmlOptions, build_page_document
from data_prep.curate.sources.pdf import PdfOptions, build_pdf_document
from data_prep.curate.sources.reader import FileReader, ReadingJob, SourceItem, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord

CONTENT_RECORDS = frozenset(["response", "resource", "conversion"])
"""Record types with a server's response, or text extracted from a response."""
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]{2,40})", re.IGNORECASE)
_TAG = re.compile(rb"\s*<[\0A-Za-z!?/]")
_BLOCK_BYTES = 1 << 16
_HTML = frozenset(["text/html", "application/xhtml+xml"])


@dataclass(frozen=True)
class WarcOptions(HtmlOptions, PdfOptions):
    """Options for `format: warc`: options for pages and PDFs, and a record limit."""

    record_bytes: LimitBytes = 16 << 20
    """Maximum bytes in a response; longer responses are left out."""


class WarcReader(FileReader):
    """Reads WARC 1.0 and 1.1 files, compressed whole or record by record, and WET files."""

    format = "warc"
    version = 3  # follows the versions of HtmlReader and PdfReader
    suffixes = frozenset([".warc", ".wet"])
    Options = WarcOptions

    @classmethod
    def iter_items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        number = 0
        with open_unpacked(job.file) as file:
            # The iterator takes a read error for the end of the archive; `stream.error` has the difference.
            stream = _UntilDamaged(file)
            try:
                for record in ArchiveIterator(stream):
                    number += 1
                    if record.rec_type in CONTENT_RECORDS:
                        yield SourceItem(f"{job.name}:{number}", _Record(record, f"{job.name}:{number}", job))
            except (ArchiveLoadFailed, ValueError, AttributeError) as e:  # AttributeError: half a header
                reason = (str(e).splitlines() or ["it ends"])[0][:200]
                # A damaged stream is reported below.
                if not stream.error:
                    raise BadRecord("warc", f"is no WARC file, or damaged behind record {number} ({reason}); "
                                            "what came before is read") from None
            if stream.error:
                raise BadRecord("truncated", f"is cut off or damaged behind record {number} ("
                                             f"{stream.error}); what came before is read; fetch it again")


class _UntilDamaged:
    """A stream that ends at the first damaged block and stores the error."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.error = stream, ""

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read1(size)
            return data
        except (EOFError, OSError, zlib.error) as e:
            self.error = str(e)
            return b""


def decode_http_body(body: bytes, packing: str, limit_bytes: int) -> bytes:
    """Decompress an HTTP body; the result may exceed `limit_bytes` by one byte.

    Crawlers often decompress bodies and keep the header, so a body that looks like text stays unchanged.

    Args:
        body: bytes as stored.
        packing: value of `Content-Encoding`.
        limit_bytes: where decompression stops.

    Raises:
        BadRecord: the body is truncated or damaged, or has an unknown encoding.
    """
    if packing in ("", "identity") or _looks_unpacked(body):
        return body
    is_gzip = packing in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b"
    if not is_gzip and packing != "deflate":
        raise BadRecord("encoding", f"is packed as Content-Encoding: {packing[:40]}, which is not unpacked "
                                    "here; let the crawler unpack it", content=body[:1000])
    # 31: gzip; 15: zlib header, as in RFC 9110; -15: raw deflate, which many servers send.
    is_zlib = body[:1] == b"\x78" and int.from_bytes(body[:2], "big") % 31 == 0
    zlib_bits = 15 if is_zlib else -15
    window_bits = 31 if is_gzip else zlib_bits
    unpacked = b""
    try:
        while body and len(unpacked) <= limit_bytes:
            unpacker = zlib.decompressobj(window_bits)
            unpacked += unpacker.decompress(body, limit_bytes + 1 - len(unpacked))
            if not unpacker.eof and len(unpacked) <= limit_bytes:
                raise BadRecord("truncated", "is cut off inside its Content-Encoding",
                                content=unpacked[:1000])
            # A gzip body may be several members in a row.
            body = unpacker.unused_data if is_gzip and unpacker.unused_data[:2] == b"\x1f\x8b" else b""
    except zlib.error as e:
        raise BadRecord("truncated", f"is damaged ({e})", content=unpacked[:1000]) from None
    return unpacked


def _looks_unpacked(body: bytes) -> bool:
    # Packed bytes may begin with "<", but hardly with a whole tag.
    if _TAG.match(body) or body.startswith(b"%PDF"):
        return True
    try:
        return b"\0" not in body and body.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


class _Record:
    """Reads a response record's document."""

    def __init__(self, record: Any, place: str, job: ReadingJob) -> None:
        self._record, self._place, self._job = record, place, job

    def __call__(self) -> Iterator[RawDocument | BrokenRecord]:
        record = self._record
        header = record.http_headers if record.rec_type == "response" else None
        status = (header.get_statuscode() or "") if header else "200"
        content_type = (header or record.rec_headers).get_header("Content-Type") or ""
        type_ = content_type.partition(";")[0].strip().lower()
        if status != "200":
            yield self._build_left_out("status", f"is an answer of status {status[:10]}")
            return
        if type_ not in _HTML and type_ not in ("text/plain", "application/pdf"):
            yield self._build_left_out("type", f"is of type {type_[:60] or 'unknown'}")
            return
        body = self._read_body(header)
        charset = _CHARSET.search(content_type)
        document = self._build_document(type_, body, charset[1] if charset else "")
        if isinstance(document, RawDocument):
            yield RawDocument(document.text, self._place, {**document.columns, **self._read_metadata()})
        else:
            yield document

    def _build_document(self, type_: str, body: bytes, charset: str) -> RawDocument | BrokenRecord:
        job = self._job
        if type_ in _HTML:
            return build_page_document(decode_page(body, charset), self._place, job,
                                       whole=job.options.whole_page)
        if type_ == "application/pdf":
            return build_pdf_document(body, self._place)
        text = decode_text(body, DETECT) if not charset else decode_page(body, charset)
        if not text.strip():
            return self._build_left_out(NO_TEXT, "holds no text")
        return RawDocument(text, self._place)

    def _read_body(self, header: Any) -> bytes:
        """Return the decompressed body; raises `BadRecord` if it is too long, truncated or not decodable."""
        limit_bytes = self._job.options.record_bytes

        def get_field(name: str) -> str:
            return ((header.get_header(name) if header else "") or "").strip().lower()

        stream = self._record.raw_stream
        if get_field("Transfer-Encoding") == "chunked":
            stream = ChunkedDataReader(stream)
        # warcio's own decompression would accept truncated and undecodable streams unchanged.
        body: bytes = stream.read(limit_bytes + 1)
        if len(body) <= limit_bytes:
            self._check_complete()
            body = decode_http_body(body, get_field("Content-Encoding"), limit_bytes)
        if len(body) > limit_bytes:
            raise BadRecord("too_long", f"holds more than record_bytes = {limit_bytes:,} bytes; raise the "
                                        "limit, or leave it out")
        if self._record.rec_headers.get_header("WARC-Truncated"):
            raise BadRecord("truncated", "was cut off by the crawler", content=body[:1000])
        return body

    def _read_metadata(self) -> dict[str, Any]:
        headers = self._record.rec_headers
        return drop_empty({"url": (headers.get_header("WARC-Target-URI") or "").strip("<>"),
                           "crawled": headers.get_header("WARC-Date"),
                           "own_id": (headers.get_header("WARC-Record-ID") or "").strip("<>")})

    def _check_complete(self) -> None:
        """Read the record to its end; raise `BadRecord` if the archive ends earlier."""
        stream = self._record.raw_stream
        while stream.read(_BLOCK_BYTES):
            pass
        if getattr(stream, "limit", 0) > 0:
            raise BadRecord("truncated", "is cut off; fetch the archive again")

    def _build_left_out(self, code: str, reason: str) -> BrokenRecord:
        self._check_complete()
        return self._job.build_broken(BadRecord(code, reason), self._place, is_left_out=True)
