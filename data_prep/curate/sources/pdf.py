"""Reader for PDF files: text by PDFium, with lines joined to paragraphs."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import pypdfium2
from annotated_types import Ge, Le

from data_prep.curate.sources.encodings import EncodingLimits, read_unpacked
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord

FULL_LINE = 0.75
"""A line continues in the next if its length is at least this share of the page's long lines."""
HEAD_PAGES = 3
"""A first or last line on this many pages, ignoring numbers, is a running head."""
MAX_REPLACED = 0.2
"""Maximum share of U+FFFD; above this share the fonts have no character map."""
_HYPHENS = ("\x02", "\ufffe", "\u00ad")
"""PDFium's characters for a hyphen at the end of a line."""
_DATE = re.compile(r"D:(\d{4})(\d\d)?(\d\d)?")
_NUMBER = re.compile(r"\d+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uff01-\uff9f]")
"""Thai, Lao, Burmese, Khmer, Chinese and Japanese, whose lines continue without a space."""


@dataclass(frozen=True)
class PdfOptions(EncodingLimits):
    """Options for `format: pdf`."""

    time_s: Annotated[float, Ge(0.1), Le(86_400)] = 300.0
    """Processor time for one file; the elapsed time may be ten times as long."""


class PdfReader(FileReader):
    format = "pdf"
    version = 2  # lines of PDFium
    suffixes = frozenset([".pdf"])
    Options = PdfOptions

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        yield build_pdf_document(read_unpacked(job.file, job.options), job.name)


def build_pdf_document(data: bytes, place: str) -> RawDocument:
    """Return a PDF's document; raises `BadRecord` for invalid and encrypted files, or without text."""
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as e:
        code = "encrypted" if "password" in str(e).lower() else "pdf"
        raise BadRecord(code, f"cannot be opened ({str(e)[:120]}); fetch it again, or take its password away"
                        ) from None
    # Pages are only valid until the document is closed.
    with document:
        columns = _read_metadata(document)
        pages = [_read_lines(document, number) for number in range(len(document))]
    text = "\n\n".join(filter(None, map(join_lines, _remove_heads(pages))))
    if not text:
        if any(pages):
            raise BadRecord("no_text", f"has running heads alone on its {len(pages)} pages; leave it out")
        raise BadRecord("no_text", f"has no text on its {len(pages)} pages, which are pictures; recognise "
                                   "the characters first (OCR)")
    # Glyphs without a character map would give noise.
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        raise BadRecord("no_text", "has fonts that do not say which characters they show; recognise the "
                                   "characters first (OCR)")
    return RawDocument(text, place, {**columns, "num_pages": len(pages)})


def _read_metadata(document: Any) -> dict[str, Any]:
    metadata = {name: value.replace("\0", "").encode("utf-8", "replace").decode().strip()[:500]
                for name, value in document.get_metadata_dict(skip_empty=True).items()}
    date = _DATE.match(metadata.get("CreationDate", ""))
    date_parts = date.groups("") if date else ()
    return drop_empty({"title": metadata.get("Title"), "date": "-".join(filter(None, date_parts))})


def _read_lines(document: Any, number: int) -> list[str]:
    """Return a page's lines; an unreadable page is empty."""
    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return []
    try:
        text = page.get_textpage().get_text_bounded().encode("utf-8", "replace").decode()
        return [line.strip() for line in text.split("\n") if line.strip()]
    finally:
        page.close()


def _remove_heads(pages: Sequence[list[str]]) -> Iterator[list[str]]:
    """Yield the lines of pages without running heads and page numbers."""
    counts = Counter(_NUMBER.sub("#", line) for lines in pages for line in {*lines[:1], *lines[-1:]})
    for lines in pages:
        is_head = [counts[_NUMBER.sub("#", line)] >= HEAD_PAGES for line in lines]
        start, stop = int(any(is_head[:1])), len(lines) - int(any(is_head[-1:]))
        yield lines[start:stop]


def join_lines(lines: Sequence[str]) -> str:
    """Join lines to paragraphs; a line as long as the page's long lines (`FULL_LINE`) continues."""
    if not lines:
        return ""
    full_chars = FULL_LINE * sorted(map(len, lines))[9 * len(lines) // 10]
    text = lines[0]
    for previous, line in pairwise(lines):
        if text.endswith(_HYPHENS):
            text = text[:-1] + line
        elif len(previous) < full_chars:
            text += f"\n{line}"
        else:
            text += line if _UNSPACED.match(text[-1]) and _UNSPACED.match(line) else f" {line}"
    return text
