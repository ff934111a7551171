"""PDF files: the text of all pages in the order in which it is read."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from data_prep.sources.job import Job, kept
from data_prep.sources.limits import Limits, read_whole
from data_prep.sources.pdf_layout import HYPHEN, Page, Word, pages_text
from data_prep.sources.reader import FileReader
from data_prep.sources.source import Broken, Raw
from megatron_sov.documents import BadRecord
from megatron_sov.settings import AtLeastOne

_DATE = re.compile(r"D:(\d{4})(\d\d)?(\d\d)?")
_WHITE = frozenset([0, 9, 10, 11, 12, 13, 32, 0xA0, 0x2028, 0x2029, 0x3000])
_HYPHEN_MARKS = frozenset([0x02, 0xAD, 0xFFFE])
"""What PDFium returns for a hyphen at the end of a line."""
MAX_REPLACED = 0.2
"""Share of characters without a meaning, above which the fonts have none at all."""


@dataclass(frozen=True)
class PdfOptions(Limits):
    """Options of PDFs."""

    time_s: Annotated[float, Ge(0.1), Le(86_400)] = 300.0
    """Processor time that one file may take: a page takes about 20 ms; ten times of it on the clock."""
    max_pages: AtLeastOne = 10_000
    """A file with more is left out."""
    repeated_lines: bool = False
    """Keep running heads and page numbers."""


class PdfReader(FileReader):
    """Files of PDF."""

    format = "pdf"
    suffixes = frozenset([".pdf"])
    Options = PdfOptions

    @classmethod
    def documents(cls, job: Job) -> Iterator[Raw | Broken]:
        """Yield the file's text."""
        yield pdf_document(read_whole(job.file, job.options), job.name, job)


def pdf_document(data: bytes, place: str, job: Job) -> Raw | Broken:
    """Return a PDF's text and what it says of itself.

    Raises:
        BadRecord: it is no PDF, is locked, or has too many pages.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as e:
        code = "encrypted" if "password" in str(e).lower() else "pdf"
        raise BadRecord(code, f"cannot be opened ({str(e)[:120]}); fetch it again, or take its password away"
                        ) from None
    with document:
        if len(document) > job.options.max_pages:
            raise BadRecord("too_long", f"has {len(document):,} pages, of at most max_pages = "
                                        f"{job.options.max_pages:,}; raise the limit, or leave it out")
        facts = _facts(document)
        pages = [_page(document, number) for number in range(len(document))]
    text = pages_text(pages, keep_repeated=job.options.repeated_lines)
    if not text.strip():
        raise BadRecord("no_text", f"has no text on its {len(pages)} pages, which are pictures; recognise "
                                   "the characters first (OCR)")
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        raise BadRecord("no_text", "has fonts that do not say which characters they show; recognise the "
                                   "characters first (OCR)")
    return Raw(text, place, {**facts, "num_pages": len(pages)})


def _facts(document: Any) -> dict[str, Any]:
    told = {name: value.replace("\0", "").encode("utf-8", "replace").decode().strip()[:500]
            for name, value in document.get_metadata_dict(skip_empty=True).items()}
    date = _DATE.match(told.get("CreationDate", ""))
    return kept({"title": told.get("Title"),
                 "date": "-".join(part for part in date.groups() if part) if date else ""})


def _page(document: Any, number: int) -> Page:
    """Return the words of a page, in the order of its content; a page that cannot be read has none."""
    import pypdfium2
    from pypdfium2 import raw

    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return Page([])
    try:
        text_page = page.get_textpage()
        height = page.get_height()
        handle = text_page.raw
        codes = [raw.FPDFText_GetUnicode(handle, index) for index in range(text_page.count_chars())]
        word_of = _WordReader(raw, handle, codes, height)
        words = [word_of(start, stop) for start, stop in _bounds(codes)]
        return Page([word for word in words if word.x1 > word.x0 and word.y1 > word.y0])
    finally:
        page.close()


def _bounds(codes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield where words begin and end."""
    start = None
    for index, code in enumerate(codes):
        if code in _WHITE:
            if start is not None:
                yield start, index
            start = None
        elif start is None:
            start = index
        if code in _HYPHEN_MARKS and start is not None:  # the word goes on in the next line
            yield start, index + 1
            start = None
    if start is not None:
        yield start, len(codes)


class _WordReader:
    """Reads the words of a page; what pdfium writes into is made once."""

    def __init__(self, raw: Any, text_page: Any, codes: list[int], height: float) -> None:
        self._raw = raw
        self._text_page, self._codes, self._height = text_page, codes, height
        self._edges, self._flags = [ctypes.c_double() for _ in range(4)], ctypes.c_int()

    def __call__(self, start: int, stop: int) -> Word:
        """Return a word; its box is that of its first and its last character."""
        raw = self._raw
        left, bottom, right, top = self._box(start)
        if stop - 1 > start:
            other = self._box(stop - 1)
            left, bottom = min(left, other[0]), min(bottom, other[1])
            right, top = max(right, other[2]), max(top, other[3])
        raw.FPDFText_GetFontInfo(self._text_page, start, None, 0, self._flags)
        return Word("".join(map(_char, self._codes[start:stop])), left, self._height - top, right,
                    self._height - bottom, raw.FPDFText_GetFontSize(self._text_page, start),
                    bool(self._flags.value & 1))

    def _box(self, index: int) -> tuple[float, float, float, float]:
        left, right, bottom, top = self._edges
        self._raw.FPDFText_GetCharBox(self._text_page, index, left, right, bottom, top)
        return left.value, bottom.value, right.value, top.value


def _char(code: int) -> str:
    if code in _HYPHEN_MARKS:
        return HYPHEN
    return chr(code) if code < 0xD800 or 0xE000 <= code < 0x110000 else "\ufffd"
