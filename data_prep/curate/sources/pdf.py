"""PDF files: the text of their pages by PDFium, its lines joined to paragraphs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from annotated_types import Ge, Le

from data_prep.curate.sources.encodings import EncodingLimits, read_unpacked
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord

FULL_LINE = 0.75
"""Share of the length of a page's long lines from which on a line goes on in the next."""
HEAD_PAGES = 3
"""Pages with the same first or last line, numbers aside, that make it a running head."""
MAX_REPLACED = 0.2
"""Share of characters without a meaning, above which the fonts have none at all."""
_HYPHENS = ("\x02", "\ufffe", "\u00ad")
"""What PDFium returns for a hyphen at the end of a line."""
_DATE = re.compile(r"D:(\d{4})(\d\d)?(\d\d)?")
_NUMBER = re.compile(r"\d+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uff01-\uff9f]")
"""Characters of Thai and its neighbours, Chinese and Japanese, whose lines go on without a space."""


@dataclass(frozen=True)
class PdfOptions(EncodingLimits):
    """Options of PDFs."""

    time_s: Annotated[float, Ge(0.1), Le(86_400)] = 300.0
    """Processor time that one file may take; ten times of it on the clock."""


class PdfReader(FileReader):
    """Files of PDF."""

    format = "pdf"
    version = 2  # lines of PDFium
    suffixes = frozenset([".pdf"])
    Options = PdfOptions

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        yield build_pdf_document(read_unpacked(job.file, job.options), job.name)


def build_pdf_document(data: bytes, place: str) -> RawDocument:
    """Return a PDF's text and what it says of itself.

    Raises:
        BadRecord: it is no PDF, is locked, or has no text.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as e:
        code = "encrypted" if "password" in str(e).lower() else "pdf"
        raise BadRecord(code, f"cannot be opened ({str(e)[:120]}); fetch it again, or take its password away"
                        ) from None
    # PDFium holds the pages: all text is taken out before the document is closed.
    with document:
        facts = _facts(document)
        pages = [_lines(document, number) for number in range(len(document))]
    text = "\n\n".join(filter(None, map(join_lines, _without_heads(pages))))
    if not text:
        if any(pages):
            raise BadRecord("no_text", f"has running heads alone on its {len(pages)} pages; leave it out")
        raise BadRecord("no_text", f"has no text on its {len(pages)} pages, which are pictures; recognise "
                                   "the characters first (OCR)")
    # Glyphs without a map to characters: what was read would be noise.
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        raise BadRecord("no_text", "has fonts that do not say which characters they show; recognise the "
                                   "characters first (OCR)")
    return RawDocument(text, place, {**facts, "num_pages": len(pages)})


def _facts(document: Any) -> dict[str, Any]:
    told = {name: value.replace("\0", "").encode("utf-8", "replace").decode().strip()[:500]
            for name, value in document.get_metadata_dict(skip_empty=True).items()}
    date = _DATE.match(told.get("CreationDate", ""))
    return drop_empty({"title": told.get("Title"),
                       "date": "-".join(part for part in date.groups() if part) if date else ""})


def _lines(document: Any, number: int) -> list[str]:
    """Return the lines of a page; a page that cannot be read has none."""
    import pypdfium2

    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return []
    try:
        found = page.get_textpage().get_text_bounded().encode("utf-8", "replace").decode()
        return [line.strip() for line in found.split("\n") if line.strip()]
    finally:
        page.close()


def _without_heads(pages: Sequence[list[str]]) -> Iterator[list[str]]:
    """Yield the lines of pages without running heads and page numbers."""
    counts = Counter(_NUMBER.sub("#", line) for lines in pages for line in {*lines[:1], *lines[-1:]})
    for lines in pages:
        is_head = [counts[_NUMBER.sub("#", line)] >= HEAD_PAGES for line in lines]
        yield lines[any(is_head[:1]):len(lines) - any(is_head[-1:])]


def join_lines(lines: Sequence[str]) -> str:
    """Return paragraphs: a line that is nearly as long as the page's long ones goes on in the next."""
    if not lines:
        return ""
    full = FULL_LINE * sorted(map(len, lines))[9 * len(lines) // 10]
    text = lines[0]
    for before, line in pairwise(lines):
        if text.endswith(_HYPHENS):
            text = text[:-1] + line
        elif len(before) < full:
            text += f"\n{line}"
        else:
            text += line if _UNSPACED.match(text[-1]) and _UNSPACED.match(line) else f" {line}"
    return text
