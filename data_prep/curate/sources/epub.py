"""Books in EPUB: their chapters in the order of the spine."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

from data_prep.curate.sources.encodings import EncodingLimits, decode_page, read_whole
from data_prep.curate.sources.html import licence_of, page_text
from data_prep.curate.sources.reader import FileReader, ReadingJob, kept
from data_prep.curate.sources.source import Broken, Raw
from data_prep.curate.sources.zipped import Archive, local
from megatron_sov.base.documents import BadRecord

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
        """Yield the book, or its chapters."""
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
    return kept(facts)


def _spine(package: Any, package_name: str) -> list[str]:
    """Return the names of the members that are read, in order, each once."""
    items = {}
    for element in package.iter():
        if local(element) == "item" and element.get("media-type") in _PAGES:
            target = posixpath.join(posixpath.dirname(package_name), unquote(element.get("href") or ""))
            if "nav" not in (element.get("properties") or "").split():
                items[element.get("id")] = posixpath.normpath(target).partition("#")[0]
    order = [items[e.get("idref")] for e in package.iter()
             if local(e) == "itemref" and e.get("idref") in items and e.get("linear") != "no"]
    return list(dict.fromkeys(order))
