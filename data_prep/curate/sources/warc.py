"""Web archives: each page, text or PDF that a server answered with is a document."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.curate.sources.encodings import DETECT, LimitBytes, decode_page, decode_text, open_unpacked
from data_prep.curate.sources.html import NO_TEXT, HtmlOptions, build_page_document
from data_prep.curate.sources.pdf import PdfOptions, build_pdf_document
from data_prep.curate.sources.reader import FileReader, ReadingJob, SourceItem, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord

CONTENT_RECORDS = frozenset(["response", "resource", "conversion"])
"""Types of records that hold what a server sent, or text made of it."""
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]{2,40})", re.IGNORECASE)
_TAG = re.compile(rb"\s*<[\0A-Za-z!?/]")
_BLOCK_BYTES = 1 << 16
_HTML = frozenset(["text/html", "application/xhtml+xml"])


@dataclass(frozen=True)
class WarcOptions(HtmlOptions, PdfOptions):
    """Options of web archives: those of pages and of PDFs, and a limit of what one record may hold."""

    record_bytes: LimitBytes = 16 << 20
    """Of what a server sent; longer ones are left out unread."""


class WarcReader(FileReader):
    """Files of WARC 1.0 and 1.1, as a whole or record by record compressed, and WET files."""

    format = "warc"
    version = 3  # text of pages and PDFs as their readers give it
    suffixes = frozenset([".warc", ".wet"])
    Options = WarcOptions

    @classmethod
    def iter_items(cls, job: ReadingJob) -> Iterator[SourceItem]:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

        number = 0
        with open_unpacked(job.file) as file:
            # The iterator would take an error for the archive's end; `error` keeps it apart.
            stream = _UntilDamaged(file)
            try:
                for record in ArchiveIterator(stream):
                    number += 1
                    if record.rec_type in CONTENT_RECORDS:
                        yield SourceItem(f"{job.name}:{number}", _Record(record, f"{job.name}:{number}", job))
            except (ArchiveLoadFailed, ValueError, AttributeError) as e:  # the last: half a header
                reason = (str(e).splitlines() or ["it ends"])[0][:200]
                # Otherwise the stream below is damaged, and that is reported.
                if not stream.error:
                    raise BadRecord("warc", f"is no WARC file, or damaged behind record {number} ({reason}); "
                                            "what came before is read") from None
            if stream.error:
                raise BadRecord("truncated", f"is cut off or damaged behind record {number} ("
                                             f"{stream.error}); what came before is read; fetch it again")


class _UntilDamaged:
    """A stream that ends where it is damaged: its reader takes an error in it for the archive's end."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.error = stream, ""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; what comes before the damage is not lost with what it would be read
        with."""
        try:
            data: bytes = self._stream.read1(size)
            return data
        except (EOFError, OSError, zlib.error) as e:
            self.error = str(e)
            return b""


def decode_http_body(body: bytes, packing: str, limit_bytes: int) -> bytes:
    """Return a body without the packing that its header names; of a long one a little more than the limit.

    Crawlers that unpack bodies often leave the header as it was: a body that does not look packed stays.

    Raises:
        BadRecord: it is cut off or damaged, or packed in another way.
    """
    if packing in ("", "identity") or _looks_written(body):
        return body
    is_gzip = packing in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b"
    if not is_gzip and packing != "deflate":
        raise BadRecord("encoding", f"is packed as Content-Encoding: {packing[:40]}, which is not unpacked "
                                    "here; let the crawler unpack it", content=body[:1000])
    # 31: gzip; 15: zlib's head, as RFC 9110 has it; -15: without, as many servers send it
    is_zlib = body[:1] == b"\x78" and int.from_bytes(body[:2], "big") % 31 == 0
    window_bits = 31 if is_gzip else 15 if is_zlib else -15
    found = b""
    try:
        while body and len(found) <= limit_bytes:
            unpacker = zlib.decompressobj(window_bits)
            found += unpacker.decompress(body, limit_bytes + 1 - len(found))
            if not unpacker.eof and len(found) <= limit_bytes:
                raise BadRecord("truncated", "is cut off inside its Content-Encoding", content=found[:1000])
            # A gzip body may be several members in a row.
            body = unpacker.unused_data if is_gzip and unpacker.unused_data[:2] == b"\x1f\x8b" else b""
    except zlib.error as e:
        raise BadRecord("truncated", f"is damaged ({e})", content=found[:1000]) from None
    return found


def _looks_written(body: bytes) -> bool:
    # packed bytes may begin with "<" too, but hardly go on as a tag does
    if _TAG.match(body) or body.startswith(b"%PDF"):
        return True
    try:
        return b"\0" not in body and body.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


class _Record:
    """One record that holds an answer."""

    def __init__(self, record: Any, place: str, job: ReadingJob) -> None:
        self._record, self._place, self._job = record, place, job

    def __call__(self) -> Iterator[RawDocument | BrokenRecord]:
        record = self._record
        header = record.http_headers if record.rec_type == "response" else None
        status = (header.get_statuscode() or "") if header else "200"
        named = (header.get_header("Content-Type") if header else
                 record.rec_headers.get_header("Content-Type")) or ""
        type_ = named.partition(";")[0].strip().lower()
        if status != "200":
            yield self._left_out("status", f"is an answer of status {status[:10]}")
            return
        if type_ not in _HTML and type_ not in ("text/plain", "application/pdf"):
            yield self._left_out("type", f"is of type {type_[:60] or 'unknown'}")
            return
        body = self._body(header)
        charset = _CHARSET.search(named)
        found = self._document(type_, body, charset[1] if charset else "")
        if isinstance(found, RawDocument):
            yield RawDocument(found.text, self._place, {**found.columns, **self._facts()})
        else:
            yield found

    def _document(self, type_: str, body: bytes, charset: str) -> RawDocument | BrokenRecord:
        job = self._job
        if type_ in _HTML:
            return build_page_document(decode_page(body, charset), self._place, job,
                                       whole=job.options.whole_page)
        if type_ == "application/pdf":
            return build_pdf_document(body, self._place)
        text = decode_text(body, DETECT) if not charset else decode_page(body, charset)
        if not text.strip():
            return self._left_out(NO_TEXT, "holds no text")
        return RawDocument(text, self._place)

    def _body(self, header: Any) -> bytes:
        """Return what was sent, unpacked.

        Raises:
            BadRecord: it is too long, cut off, or packed in a way that is not known.
        """
        from warcio.bufferedreaders import ChunkedDataReader

        limit_bytes = self._job.options.record_bytes
        packing, transfer = (((header.get_header(name) or "") if header else "").strip().lower()
                             for name in ("Content-Encoding", "Transfer-Encoding"))
        stream = self._record.raw_stream
        # warcio's own unpacking takes a stream that is cut off, or that it cannot unpack, as it is
        body: bytes = (ChunkedDataReader(stream) if transfer == "chunked" else stream).read(limit_bytes + 1)
        if len(body) <= limit_bytes:
            self._refuse_cut()
            body = decode_http_body(body, packing, limit_bytes)
        if len(body) > limit_bytes:
            raise BadRecord("too_long", f"holds more than record_bytes = {limit_bytes:,} bytes; raise the "
                                        "limit, or leave it out")
        if self._record.rec_headers.get_header("WARC-Truncated"):
            raise BadRecord("truncated", "was cut off by the crawler", content=body[:1000])
        return body

    def _facts(self) -> dict[str, Any]:
        headers = self._record.rec_headers
        return drop_empty({"url": (headers.get_header("WARC-Target-URI") or "").strip("<>"),
                           "crawled": headers.get_header("WARC-Date"),
                           "own_id": (headers.get_header("WARC-Record-ID") or "").strip("<>")})

    def _refuse_cut(self) -> None:
        """Raise `BadRecord` where the archive ends inside the record; reads it to its end, as whoever wants
        the next one has to."""
        stream = self._record.raw_stream
        while stream.read(_BLOCK_BYTES):
            pass
        if getattr(stream, "limit", 0) > 0:
            raise BadRecord("truncated", "is cut off; fetch the archive again")

    def _left_out(self, code: str, reason: str) -> BrokenRecord:
        self._refuse_cut()
        return self._job.broken(BadRecord(code, reason), self._place, is_left_out=True)
