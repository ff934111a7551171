"""Documents of offices: Word, OpenDocument, PowerPoint, Excel, all of them archives of XML.

Read here and not by a library for each: those build whole documents to be changed, four of them with ten more
behind, where paragraphs, tables and titles in their order are enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from data_prep.curate.sources.encodings import read_whole
from data_prep.curate.sources.reader import FileReader, ReadingJob, kept
from data_prep.curate.sources.source import Broken, Raw
from data_prep.curate.sources.zipped import Archive, local
from megatron_sov.base.documents import BadRecord

_NUMBERED = re.compile(r"(\d+)\.xml$")
_HEADING = re.compile(r"heading\s*([1-6])|^title$", re.IGNORECASE)
_OFFICE_META = "meta.xml"
_OPEN_XML_META = "docProps/core.xml"
_FACTS = {"title": "title", "language": "language_hint", "created": "date", "creation-date": "date"}
MAX_CELLS = 1_000_000
"""Of a sheet; a cell that is repeated counts each time."""


class OfficeReader(FileReader):
    """Files of .docx, .pptx, .xlsx, .odt, .odp and .ods."""

    format = "office"
    suffixes = frozenset([".docx", ".pptx", ".xlsx", ".odt", ".odp", ".ods", ".docm", ".pptm", ".xlsm"])
    compressed = False

    @classmethod
    def documents(cls, job: ReadingJob) -> Iterator[Raw | Broken]:
        """Yield the document."""
        archive = Archive(read_whole(job.file, job.options), job.options)
        lines = [line for line in _lines(archive) if line.strip()]
        if not lines:
            raise BadRecord("no_text", "holds no text")
        yield Raw(_spaced(lines), job.name, _facts(archive))


def _lines(archive: Archive) -> Iterator[str]:
    if "word/document.xml" in archive.names:
        yield from _word(archive.tree("word/document.xml"))
    elif "content.xml" in archive.names:
        yield from _open_document(archive.tree("content.xml"))
    elif "ppt/presentation.xml" in archive.names:
        for name in _numbered(archive, "ppt/slides/slide"):
            yield from _word(archive.tree(name))
    elif "xl/workbook.xml" in archive.names:
        yield from _sheets(archive)
    else:
        raise BadRecord("office", "holds none of word/document.xml, content.xml, ppt/presentation.xml, "
                                  "xl/workbook.xml; name its format, or leave it out")


def _numbered(archive: Archive, prefix: str) -> list[str]:
    found = [(int(m[1]), name) for name in archive.names
             if name.startswith(prefix) and "/" not in name[len(prefix):] and (m := _NUMBERED.search(name))]
    return [name for _, name in sorted(found)]


def _word(root: Any) -> Iterator[str]:
    """Yield the paragraphs and rows of Word's or PowerPoint's XML."""
    name = local(root)
    if name == "tbl":
        for row in (e for e in root if local(e) == "tr"):
            cells = [" ".join(_word_text(p) for p in cell.iter() if local(p) == "p").strip()
                     for cell in row if local(cell) == "tc"]
            yield f"| {' | '.join(cells)} |"
    elif name == "p":
        style = next((next(iter(e.attrib.values()), "") for e in root.iter() if local(e) == "pStyle"), "")
        heading = _HEADING.search(style)
        is_item = any(local(e) == "numPr" for e in root.iter())
        mark = "#" * int(heading[1] or 1) + " " if heading else "- " if is_item else ""
        text = _word_text(root)
        yield mark + text if text else ""
    elif name not in ("AlternateContent", "del"):
        for child in root:
            yield from _word(child)


def _word_text(paragraph: Any) -> str:
    parts = []
    for element in paragraph.iter():
        name = local(element)
        if name == "t":
            parts.append(element.text or "")
        elif name in ("tab", "br", "cr"):
            parts.append(" ")
    return "".join(parts).strip()


def _open_document(root: Any) -> Iterator[str]:
    """Yield the paragraphs and rows of OpenDocument's XML."""
    name = local(root)
    if name == "table":
        for row in (e for e in root.iter() if local(e) == "table-row"):
            cells = [" ".join(_open_text(p) for p in cell.iter() if local(p) in ("p", "h"))
                     for cell in row if local(cell) in ("table-cell", "covered-table-cell")]
            if any(cell.strip() for cell in cells):
                while cells and not cells[-1].strip():
                    cells.pop()
                yield f"| {' | '.join(cells)} |"
    elif name in ("p", "h"):
        level = next((v for k, v in root.attrib.items() if k.endswith("}outline-level")), "1")
        mark = "#" * min(int(level) if level.isdecimal() else 1, 6) + " " if name == "h" else ""
        in_list = any(local(e) == "list-item" for e in root.iterancestors())
        text = _open_text(root)
        yield (mark or ("- " if in_list else "")) + text if text else ""
    elif name not in ("tracked-changes", "annotation", "forms", "scripts", "automatic-styles"):
        for child in root:
            yield from _open_document(child)


def _open_text(element: Any) -> str:
    parts = [element.text or ""]
    for child in element:
        name = local(child)
        if name in ("s", "tab", "line-break"):
            parts.append(" ")
        elif name not in ("annotation", "note", "bookmark"):
            parts.append(_open_text(child))
        parts.append(child.tail or "")
    return "".join(parts).strip() if local(element) in ("p", "h") else "".join(parts)


def _sheets(archive: Archive) -> Iterator[str]:
    shared: list[str] = []
    if "xl/sharedStrings.xml" in archive.names:
        shared = ["".join(t.text or "" for t in item.iter() if local(t) == "t")
                  for item in archive.tree("xl/sharedStrings.xml") if local(item) == "si"]
    num_cells = 0
    for name in _numbered(archive, "xl/worksheets/sheet"):
        for row in (e for e in archive.tree(name).iter() if local(e) == "row"):
            cells = [_cell(cell, shared) for cell in row if local(cell) == "c"]
            num_cells += len(cells)
            if num_cells > MAX_CELLS:
                raise BadRecord("too_long", f"has more than {MAX_CELLS:,} cells; leave it out")
            if any(cell.strip() for cell in cells):
                yield f"| {' | '.join(cells)} |"


def _cell(cell: Any, shared: list[str]) -> str:
    value = next((e.text or "" for e in cell.iter() if local(e) == "v"), "")
    if cell.get("t") == "s":
        return shared[int(value)].strip() if value.isdecimal() and int(value) < len(shared) else ""
    if cell.get("t") == "inlineStr":
        return "".join(e.text or "" for e in cell.iter() if local(e) == "t").strip()
    return value.strip()


def _spaced(lines: list[str]) -> str:
    """Return lines with an empty one between, except between rows and between items."""
    text = lines[0]
    for before, line in pairwise(lines):
        together = line[:2] == before[:2] and line[:2] in ("| ", "- ")
        text += ("\n" if together else "\n\n") + line
    return text


def _facts(archive: Archive) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in (_OFFICE_META, _OPEN_XML_META):
        if name in archive.names:
            for element in archive.tree(name).iter():
                column = _FACTS.get(local(element))
                if column and element.text:
                    facts.setdefault(column, element.text.strip()[:500])
    return kept(facts)
