"""From words and their places on pages to text: what repeats on pages is taken out, columns are read one
after the other, words become lines and lines paragraphs, rows of tables, and code.

Coordinates are points from the top left corner of a page.
"""

from __future__ import annotations

import ctypes
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any

from annotated_types import Ge, Le

from data_prep.curate.sources.encodings import EncodingLimits, read_whole
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import Broken, Raw
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.settings import AtLeastOne

HYPHEN = "\u00ad"
"""A hyphen that the file itself marks as one at the end of a line."""
_EDGE = re.compile(r"^\W+|\W+$")
_ENDS = re.compile(
    r"(?:은|는|이|가|을|를|에|의|로|으로|와|과|도|만|에서|에게|까지|부터|처럼|보다|이나|라고|이라고|하고|하는|하여|한다|합니다|"
    r"했다|했습니다|된다|됩니다|되는|되어|이다|입니다|습니다|니다|다|요|고|며|면|지|들|들은|들을|들이|들의|적|적인|적으로|하지|"
    r"하면|해서|으며|으면|에는|에도|에서는|으로는|이며)$")
"""Ends of Korean words that as a rule do not stand alone."""
_ALONE = frozenset(["이", "그", "저", "다", "한", "두", "도", "만", "면", "지", "로", "의", "은", "가",
                    "하고", "하는", "하여"])
"""Those of them that are words themselves as well."""
__all__ = ["HYPHEN", "Page", "Word", "pages_text"]
OUTER_LINES = 2
"""So many lines at the top and at the bottom of a page may be running heads."""
NEIGHBOURS = 2
"""Pages on either side that a running head is looked for on: left and right pages may have their own."""
SAME_PLACE_PT = 4.0
CELL_GAP = 1.6
"""Gap between the cells of a row, in sizes of its letters."""
COLUMN_LINES = 4
"""Lines that each of two columns has at least."""
MOST_CROSSING = 0.3
"""Share of a page's lines that may go across the gap between its columns, as titles do."""
FILLED = 0.55
"""Share of a column's width that its lines fill, in the mean; the cells of tables do not."""
PARAGRAPH_GAP = 1.4
"""Distance between lines of two paragraphs, in distances between lines of one."""
_NUMBER = re.compile(r"\d+|\b[ivxlc]+\b")
_BULLET = re.compile(r"(?:[•◦▪‣·●○■□–—*-]|\(?\d{1,3}[.)]|\(?[a-z][.)])$")
_LEADER = re.compile(r"\s*(?:[.·…]\s*){5,}(?:\| )?")
"""Dots that lead from a title to its page."""
_CLOSED = tuple(".!?:;。．！？：」』”\"')")


# Joining the lines of a paragraph: hyphens, Chinese and Japanese without spaces, Korean words in two parts.


class PdfVocabulary:
    """The words of a document."""

    def __init__(self, words: Iterable[str]) -> None:
        self._counts = Counter(_EDGE.sub("", word).lower() for word in words)

    def count(self, word: str) -> int:
        return self._counts[_EDGE.sub("", word).lower()]


def joined(lines: Sequence[str], vocabulary: PdfVocabulary) -> str:
    text = ""
    for line in lines:
        text = _join(text, line.strip(), vocabulary) if text else line.strip()
    return text


def _join(text: str, line: str, vocabulary: PdfVocabulary) -> str:
    if not line:
        return text
    last, first = text.rpartition(" ")[2], line.partition(" ")[0]
    if text[-1] in (HYPHEN, "-", "\u2010") and last[:-1] and last[-2:-1].isalpha() and first[:1].isalpha():
        return _unhyphenated(text, line, last[:-1], first, vocabulary)
    # Chinese and Japanese go on in the next line without a space.
    if _is_unspaced(text[-1]) and _is_unspaced(line[0]):
        return text + line
    if _is_hangul(text[-1]) and _is_hangul(line[0]) and _is_one_word(last, first, vocabulary):
        return text + line
    return f"{text} {line}"


def _unhyphenated(text: str, line: str, last: str, first: str, vocabulary: PdfVocabulary) -> str:
    """Return two lines, the first of which ends with a hyphen: that of a compound stays."""
    if vocabulary.count(f"{last}-{first}") or (first[:1].isupper() and not last.isupper()):
        return text[:-1] + "-" + line
    # Parted where the file marks it, or the word occurs whole; a compound where both halves are words of
    # their own.
    is_parted = text[-1] == HYPHEN or vocabulary.count(last + first) or not (
        vocabulary.count(last) > 1 and vocabulary.count(first) > 1)
    return text[:-1] + ("" if is_parted else "-") + line


def _is_one_word(last: str, first: str, vocabulary: PdfVocabulary) -> bool:
    end = _EDGE.sub("", first)
    if vocabulary.count(last + first) > 0:
        return True
    return bool(_ENDS.match(end)) and end not in _ALONE


def _is_unspaced(char: str) -> bool:
    return ("\u3001" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff"
            or "\uff01" <= char <= "\uff9f" or "\U00020000" <= char <= "\U0003ffff")


def _is_hangul(char: str) -> bool:
    return "\uac00" <= char <= "\ud7a3"


@dataclass(frozen=True)
class Word:
    """A word, or of languages that write none a run of characters."""

    text: str
    """Its characters."""
    x0: float
    """Left."""
    y0: float
    """Top."""
    x1: float
    """Right."""
    y1: float
    """Bottom."""
    size: float
    """Of its font, in points."""
    fixed: bool = False
    """Whether all letters of its font have one width."""


@dataclass(frozen=True)
class Page:
    """A page."""

    words: list[Word]
    """In the order of the file, which need not be that of reading."""


@dataclass(eq=False)
class PdfLine:
    """Words beside one another, which stay as they are: its box is reckoned once."""

    words: list[Word]
    """From the left."""

    @cached_property
    def x0(self) -> float:
        """Left."""
        return min(w.x0 for w in self.words)

    @cached_property
    def x1(self) -> float:
        """Right."""
        return max(w.x1 for w in self.words)

    @cached_property
    def y0(self) -> float:
        """Top."""
        return min(w.y0 for w in self.words)

    @cached_property
    def y1(self) -> float:
        """Bottom."""
        return max(w.y1 for w in self.words)

    @cached_property
    def size(self) -> float:
        """Size of most of its letters."""
        return max(self.words, key=lambda w: len(w.text)).size

    @cached_property
    def fixed(self) -> bool:
        """Whether it is written as code is."""
        return sum(len(w.text) for w in self.words if w.fixed) > sum(len(w.text) for w in self.words) / 2

    def cells(self) -> list[str]:
        """Return its text, cut where gaps are wide."""
        found: list[str] = []
        before: Word | None = None
        for word in self.words:
            gap = word.x0 - before.x1 if before else 0.0
            if before is None or gap > CELL_GAP * max(word.size, before.size, 1.0):
                found.append(word.text)
            # Han characters come one by one, with hardly a gap: they are one run.
            elif gap > 0.08 * word.size or not _is_han(found[-1][-1:] + word.text[:1]):
                found[-1] += f" {word.text}"
            else:
                found[-1] += word.text
            before = word
        return found


def pages_text(pages: Sequence[Page], *, keep_repeated: bool = False) -> str:
    """Return the text of a document.

    Args:
        pages: all of them.
        keep_repeated: keep running heads and page numbers.
    """
    # In this order: heads and page numbers would part paragraphs, and columns are found by what is left.
    lines = [lines_of(page.words) for page in pages]
    repeated = [set[int]()] * len(lines) if keep_repeated else repeated_words(lines)
    bodies = [[word for word in page.words if id(word) not in out]
              for page, out in zip(pages, repeated, strict=True)]
    # The document's own words tell which parts at the end of a line belong together.
    vocabulary = PdfVocabulary(word.text for words in bodies for word in words)
    paragraphs: list[str] = []
    for words in bodies:
        for block in columns_of(words):
            paragraphs += block_paragraphs(lines_of(block), vocabulary)
    return "\n\n".join(_across_pages(paragraphs, vocabulary))


def lines_of(words: Sequence[Word]) -> list[PdfLine]:
    found: list[list[Word]] = []
    boxes: list[tuple[float, float]] = []
    for word in sorted(words, key=lambda w: ((w.y0 + w.y1) / 2, w.x0)):
        middle = (word.y0 + word.y1) / 2
        # small signs such as "." and "'" have boxes that meet their line's at its edge only
        around = 0.1 * word.size
        # Words come from the top down, so only the last lines can be theirs.
        for place in range(len(found) - 1, max(len(found) - 5, -1), -1):
            top, bottom = boxes[place]
            if top - around <= middle <= bottom + around:
                found[place].append(word)
                boxes[place] = (min(top, word.y0), max(bottom, word.y1))
                break
        else:
            found.append([word])
            boxes.append((word.y0, word.y1))
    lines = [PdfLine(sorted(line, key=lambda w: w.x0)) for line in found]
    return sorted(lines, key=lambda line: line.y0)


def repeated_words(pages: Sequence[Sequence[PdfLine]]) -> list[set[int]]:
    """Return of each page the identities of the words in its running heads and page numbers: outer lines that
    a page nearby has too, at the same height, numbers aside."""
    # Without counting a line twice on a page of few lines.
    outer = [[*lines[:OUTER_LINES], *lines[max(OUTER_LINES, len(lines) - OUTER_LINES):]] for lines in pages]
    keys = [[(_key(line), line.y0) for line in lines] for lines in outer]
    found = []
    for number, lines in enumerate(outer):
        near = [key for other in range(max(0, number - NEIGHBOURS), min(len(keys), number + NEIGHBOURS + 1))
                if other != number for key in keys[other]]
        found.append({id(word) for line, (key, y) in zip(lines, keys[number], strict=True)
                      if any(key == k and abs(y - other_y) < SAME_PLACE_PT for k, other_y in near)
                      for word in line.words})
    return found


def _key(line: PdfLine) -> str:
    return _NUMBER.sub("#", " ".join(word.text for word in line.words).lower())


def columns_of(words: Sequence[Word]) -> list[list[Word]]:
    """Return the blocks of a page in the order in which they are read: what stands across columns ends those
    above it."""
    lines = lines_of(words)
    x = _gutter(lines)
    if x is None:
        return [list(words)] if words else []
    blocks: list[list[Word]] = []
    left: list[Word] = []
    right: list[Word] = []
    for line in lines:
        if _crosses(line, x):
            # A line across both columns ends them: left is read before right, and each may have columns in
            # turn.
            blocks += [*columns_of(left), *columns_of(right), line.words]
            left, right = [], []
        else:
            left += [w for w in line.words if w.x1 <= x]
            right += [w for w in line.words if w.x1 > x]
    blocks += [*columns_of(left), *columns_of(right)]
    return _merged(blocks)


def _merged(blocks: list[list[Word]]) -> list[list[Word]]:
    """Return blocks with lines that go across columns and follow one another as one."""
    merged: list[list[Word]] = []
    single = False
    for block in blocks:
        is_line = len(lines_of(block)) == 1
        if is_line and single:
            merged[-1] = merged[-1] + block
        elif block:
            merged.append(block)
        single = is_line
    return merged


def _crosses(line: PdfLine, x: float) -> bool:
    inside = [w for w in line.words if w.x0 < x < w.x1]
    if inside:
        return True
    left = max((w.x1 for w in line.words if w.x1 <= x), default=None)
    right = min((w.x0 for w in line.words if w.x0 >= x), default=None)
    return left is not None and right is not None and right - left < 0.8 * line.size


def _gutter(lines: Sequence[PdfLine]) -> float | None:
    if len(lines) < COLUMN_LINES:
        return None
    gaps: dict[int, int] = {}
    for line in lines:
        for before, word in pairwise(line.words):
            if word.x0 - before.x1 > 0.8 * line.size:
                # Gaps are counted on a raster of 4 points: the column that most of them cover is the gutter.
                for place in range(int(before.x1 / 4) + 1, int(word.x0 / 4) + 1):
                    gaps[place] = gaps.get(place, 0) + 1
    best = max(gaps, key=lambda place: gaps[place], default=None)
    if best is None or gaps[best] < COLUMN_LINES:
        return None
    x = 4.0 * statistics.median_low([place for place in gaps if gaps[place] == gaps[best]])
    crossing = sum(_crosses(line, x) for line in lines)
    if crossing > MOST_CROSSING * len(lines):
        return None
    sides = [[[w for w in line.words if (w.x1 <= x) == is_left] for line in lines if not _crosses(line, x)]
             for is_left in (True, False)]
    # A table has gaps below each other too, but its cells do not fill their columns.
    return x if all(map(_is_prose, sides)) else None


def _is_prose(side: Sequence[Sequence[Word]]) -> bool:
    lines = [PdfLine(list(words)) for words in side if words]
    if len(lines) < COLUMN_LINES:
        return False
    width = max(line.x1 for line in lines) - min(line.x0 for line in lines)
    size = statistics.median(line.size for line in lines)
    filled = statistics.mean((line.x1 - line.x0) / max(width, 1.0) for line in lines)
    return width > 8 * size and filled > FILLED


def block_paragraphs(lines: Sequence[PdfLine], vocabulary: PdfVocabulary) -> list[str]:
    """Return the paragraphs of a block; rows of a table and lines of code stay lines."""
    if not lines:
        return []
    pitch = _pitch(lines)
    left, right = min(line.x0 for line in lines), max(line.x1 for line in lines)
    rows = _rows(lines)
    groups: list[list[PdfLine]] = []
    kinds: list[bool] = []
    for i, line in enumerate(lines):
        if i == 0 or rows[i] != rows[i - 1] or _begins(line, lines[i - 1], pitch, left, right, rows[i]):
            groups.append([])
            kinds.append(rows[i])
        groups[-1].append(line)
    return [_group_text(group, is_rows, vocabulary) for group, is_rows in zip(groups, kinds, strict=True)]


def _rows(lines: Sequence[PdfLine]) -> list[bool]:
    starts = [_cell_starts(line) for line in lines]
    found = [bool(_LEADER.search(" ".join(line.cells()))) for line in lines]
    for i, (line, below) in enumerate(pairwise(lines)):
        if any(abs(a - b) < line.size for a in starts[i] for b in starts[i + 1]) and (
                below.y0 - line.y1 < 3 * line.size):
            found[i] = found[i + 1] = True
    return found


def _cell_starts(line: PdfLine) -> list[float]:
    """Return where cells behind the first one begin; a list's bullet is none."""
    found = [word.x0 for before, word in pairwise(line.words)
             if word.x0 - before.x1 > CELL_GAP * max(word.size, before.size, 1.0)]
    return found[1:] if _BULLET.match(line.words[0].text) and len(line.words) > 1 else found


def _pitch(lines: Sequence[PdfLine]) -> float:
    steps = [b.y0 - a.y0 for a, b in pairwise(lines)
             if 0.5 * a.size < b.y0 - a.y0 < 2.2 * max(a.size, 1.0)]
    return statistics.median(steps) if steps else 1.3 * lines[0].size


def _begins(line: PdfLine, before: PdfLine, pitch: float, left: float, right: float, is_row: bool) -> bool:
    """Return whether a line begins a paragraph, a table or code behind a line of the same sort."""
    if is_row:
        return line.y0 - before.y0 > 4 * pitch
    if line.fixed != before.fixed or abs(line.size - before.size) > 0.12 * before.size:
        return True
    step = line.y0 - before.y0
    if step > PARAGRAPH_GAP * pitch or (line.fixed and step > 2.2 * pitch):
        return True
    if line.fixed:
        return False
    if _BULLET.match(line.words[0].text) and len(line.words) > 1:
        return True
    # Either the first line is set in, or the line before ended early and with a sentence.
    indented = line.x0 - before.x0 > 0.8 * line.size and before.x0 - left < 0.5 * line.size
    ended = before.x1 < right - 0.12 * (right - left) and before.words[-1].text.endswith(_CLOSED)
    return indented or ended


def _group_text(group: Sequence[PdfLine], is_rows: bool, vocabulary: PdfVocabulary) -> str:
    if is_rows:
        return "\n".join(_LEADER.sub(" … ", " | ".join(line.cells())).strip() for line in group)
    if group[0].fixed:
        return _code(group)
    return joined([" ".join(line.cells()) for line in group], vocabulary)


def _code(group: Sequence[PdfLine]) -> str:
    left = min(line.x0 for line in group)
    # The width of a letter gives the column: indents of code are spaces that the file does not hold.
    widths = [(w.x1 - w.x0) / len(w.text) for line in group for w in line.words if len(w.text) > 2]
    width = statistics.median(widths) if widths else 0.6 * group[0].size
    text = []
    for line in group:
        row = ""
        for word in line.words:
            column = round((word.x0 - left) / max(width, 1.0))
            row += " " * max(column - len(row), 1 if row else 0) + word.text
        text.append(row)
    return "\n".join(text)


def _across_pages(paragraphs: Sequence[str], vocabulary: PdfVocabulary) -> list[str]:
    """Return paragraphs; one that breaks off in the middle of a sentence goes on in the next."""
    found: list[str] = []
    for text in paragraphs:
        if (found and "\n" not in found[-1] and "\n" not in text and text[:1].islower()
                and (found[-1].endswith((HYPHEN, "-", ",")) or found[-1][-1:].islower())):
            found[-1] = joined([found[-1], text], vocabulary)
        else:
            found.append(text)
    return [text.replace(HYPHEN, "-") for text in found if text.strip()]


def _is_han(pair: str) -> bool:
    return len(pair) == 2 and all("\u3000" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" for c in pair)


# PDF files: the text of all pages in the order in which it is read.

_DATE = re.compile(r"D:(\d{4})(\d\d)?(\d\d)?")
_WHITE = frozenset([0, 9, 10, 11, 12, 13, 32, 0xA0, 0x2028, 0x2029, 0x3000])
_HYPHEN_MARKS = frozenset([0x02, 0xAD, 0xFFFE])
"""What PDFium returns for a hyphen at the end of a line."""
MAX_REPLACED = 0.2
"""Share of characters without a meaning, above which the fonts have none at all."""


@dataclass(frozen=True)
class PdfOptions(EncodingLimits):
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
    def documents(cls, job: ReadingJob) -> Iterator[Raw | Broken]:
        yield pdf_document(read_whole(job.file, job.options), job.name, job)


def pdf_document(data: bytes, place: str, job: ReadingJob) -> Raw | Broken:
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
    # PDFium holds the pages: all words are taken out before it is closed.
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
    # Glyphs without a map to characters: what was read would be noise.
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        raise BadRecord("no_text", "has fonts that do not say which characters they show; recognise the "
                                   "characters first (OCR)")
    return Raw(text, place, {**facts, "num_pages": len(pages)})


def _facts(document: Any) -> dict[str, Any]:
    told = {name: value.replace("\0", "").encode("utf-8", "replace").decode().strip()[:500]
            for name, value in document.get_metadata_dict(skip_empty=True).items()}
    date = _DATE.match(told.get("CreationDate", ""))
    return drop_empty({"title": told.get("Title"),
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
