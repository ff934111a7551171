"""Documents that are zip archives of XML: EPUB, Word, OpenDocument, PowerPoint, Excel.

Archives are read member by member in memory: no path of theirs ever becomes one of ours.  Office files are
read here and not by a library for each: those build whole documents to be changed, four of them with ten more
behind, where paragraphs, tables and titles in their order are enough.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import unquote

from data_prep.curate.sources.encodings import EncodingLimits, decode_page, read_whole, refuse_bomb
from data_prep.curate.sources.html import licence_of, page_text
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import Broken, Raw
from megatron_sov.base.documents import BadRecord

MAX_MEMBERS = 20_000
_BLOCK_BYTES = 1 << 20


class Archive:
    """The members of an archive, read within limits."""

    def __init__(self, data: bytes, limits: EncodingLimits) -> None:
        """Read its list of members.

        Raises:
            BadRecord: it is no archive, or has too many.
        """
        self._packed_bytes, self._limits = len(data), limits
        self._unpacked_bytes = 0
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as e:
            raise BadRecord("zip", f"is no archive, or only a part of one ({str(e)[:120]}); fetch it again"
                            ) from None
        self.names = frozenset(self._zip.namelist())
        if len(self.names) > MAX_MEMBERS:
            raise BadRecord("too_long", f"has {len(self.names):,} members, of at most {MAX_MEMBERS:,}; leave "
                                        "it out")

    def read(self, name: str) -> bytes:
        """Return a member.

        Raises:
            BadRecord: it is not there, damaged or locked, or all together unpack to too much.
        """
        parts = []
        try:
            with self._zip.open(name) as member:
                while block := member.read(_BLOCK_BYTES):
                    # Counted over all members, and before the next block is unpacked: a bomb ends here.
                    self._unpacked_bytes += len(block)
                    refuse_bomb(self._packed_bytes, self._unpacked_bytes, self._limits.unpacked_bytes)
                    parts.append(block)
        except KeyError:
            raise BadRecord("zip", f"has no member {name[:200]!r}; fetch it again") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as e:
            raise BadRecord("zip", f"has a member {name[:200]!r} that is damaged or locked ({str(e)[:120]}); "
                                   "fetch it again") from None
        return b"".join(parts)

    def tree(self, name: str) -> Any:
        """Return the root of a member that is XML; its entities stay unread.

        Raises:
            BadRecord: as `read`; or it is no XML.
        """
        return xml_tree(self.read(name), name)


def xml_tree(data: bytes, name: str) -> Any:
    """Return the root of an XML document: no entity is replaced, nothing fetched, no DTD read.

    Raises:
        BadRecord: it is none.
    """
    from lxml import etree

    # Entities and DTDs of strangers can read files and grow without bound.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False,
                             remove_comments=True, remove_pis=True)
    try:
        return etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as e:
        raise BadRecord("xml", f"has {name[:200]!r}, which is no XML ({str(e)[:120]}); fetch it again"
                        ) from None


def local(element: Any) -> str:
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


_CONTAINER = "META-INF/container.xml"
_PAGES = frozenset(["application/xhtml+xml", "text/html", "application/x-dtbook+xml"])
_EPUB_FACTS = {"title": "title", "language": "language_hint", "date": "date", "rights": "licence",
          "identifier": "own_id", "creator": "author"}
"""Element of Dublin Core -> column."""


@dataclass(frozen=True)
class EpubOptions(EncodingLimits):
    """Options of books."""

    split: Literal["book", "chapter"] = "book"
    """What is a document: a "book", or each file ("chapter") of one."""


class EpubReader(FileReader):
    """Files of EPUB 2 and 3."""

    format = "epub"
    version = 2  # text of pages by resiliparse
    suffixes = frozenset([".epub"])
    compressed = False
    Options = EpubOptions

    @classmethod
    def documents(cls, job: ReadingJob) -> Iterator[Raw | Broken]:
        archive = Archive(read_whole(job.file, job.options), job.options)
        package_name = _package(archive)
        package = archive.tree(package_name)
        facts = _epub_facts(package)
        chapters = [(name, text) for name in _spine(package, package_name)
                    if (text := page_text(decode_page(archive.read(name)), whole=True)[0])]
        if not chapters:
            raise BadRecord("no_text", "has no chapter with text; recognise its pictures first (OCR)")
        if job.options.split == "book":
            yield Raw("\n\n".join(text for _, text in chapters), job.name, facts)
            return
        for number, (name, text) in enumerate(chapters, 1):
            yield Raw(text, f"{job.name}:{number}", {**facts, "chapter": posixpath.basename(name)[:200]})


def _package(archive: Archive) -> str:
    """Return the name of the member that lists the others.

    Raises:
        BadRecord: none is named.
    """
    for element in archive.tree(_CONTAINER).iter():
        if local(element) == "rootfile" and element.get("full-path"):
            return str(element.get("full-path"))
    raise BadRecord("epub", f"names no package in {_CONTAINER}; fetch it again")


def _epub_facts(package: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for element in package.iter():
        column = _EPUB_FACTS.get(local(element))
        text = " ".join("".join(element.itertext()).split())[:500] if column else ""
        if column and text:
            facts.setdefault(column, licence_of(text) if column == "licence" else text)
    return drop_empty(facts)


def _spine(package: Any, package_name: str) -> list[str]:
    items = {}
    for element in package.iter():
        if local(element) == "item" and element.get("media-type") in _PAGES:
            target = posixpath.join(posixpath.dirname(package_name), unquote(element.get("href") or ""))
            # The table of contents repeats titles.
            if "nav" not in (element.get("properties") or "").split():
                items[element.get("id")] = posixpath.normpath(target).partition("#")[0]
    # The spine has the order of reading; items that are not linear are notes.
    order = [items[e.get("idref")] for e in package.iter()
             if local(e) == "itemref" and e.get("idref") in items and e.get("linear") != "no"]
    return list(dict.fromkeys(order))


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
    # By number: "slide10" comes behind "slide9".
    found = [(int(m[1]), name) for name in archive.names
             if name.startswith(prefix) and "/" not in name[len(prefix):] and (m := _NUMBERED.search(name))]
    return [name for _, name in sorted(found)]


def _word(root: Any) -> Iterator[str]:
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
        mark = "- " if is_item else ""
        if heading:
            mark = "#" * int(heading[1] or 1) + " "
        text = _word_text(root)
        yield mark + text if text else ""
    # Fallbacks repeat their neighbours, and deleted text is gone.
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
    name = local(root)
    if name == "table":
        for row in (e for e in root.iter() if local(e) == "table-row"):
            cells = [" ".join(_open_text(p) for p in cell.iter() if local(p) in ("p", "h"))
                     for cell in row if local(cell) in ("table-cell", "covered-table-cell")]
            if any(cell.strip() for cell in cells):
                # Sheets of OpenDocument are padded with empty cells up to their edge.
                while cells and not cells[-1].strip():
                    cells.pop()
                yield f"| {' | '.join(cells)} |"
    elif name in ("p", "h"):
        level = next((v for k, v in root.attrib.items() if k.endswith("}outline-level")), "1")
        mark = "- " if any(local(e) == "list-item" for e in root.iterancestors()) else ""
        if name == "h":
            mark = "#" * min(int(level) if level.isdecimal() else 1, 6) + " "
        text = _open_text(root)
        yield mark + text if text else ""
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
            # Cells are counted while they are read: a small file may hold very many.
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
    return drop_empty(facts)
