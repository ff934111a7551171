"""Web pages: their text without what stands around it, with headings, lists, tables and code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.sources.encodings import Limits, decode_page, read_whole
from data_prep.sources.html_blocks import blocks_of, written
from data_prep.sources.html_main import drop_around, without_menus
from data_prep.sources.html_tree import facts_of, parse_page, remove_unseen
from data_prep.sources.reader import FileReader, Job
from data_prep.sources.source import Broken, Raw
from megatron_sov.documents import BadRecord

NO_TEXT = "no_text"
"""Code of what was read well and holds no text."""


@dataclass(frozen=True)
class HtmlOptions(Limits):
    """Options of web pages."""

    whole_page: bool = False
    """Keep menus, headers and footers too."""


class HtmlReader(FileReader):
    """Files of HTML."""

    format = "html"
    suffixes = frozenset([".html", ".htm", ".xhtml", ".shtml"])
    Options = HtmlOptions

    @classmethod
    def documents(cls, job: Job) -> Iterator[Raw | Broken]:
        """Yield the page."""
        yield page(decode_page(read_whole(job.file, job.options)), job.name, job,
                   whole=job.options.whole_page)


def page(source: str, place: str, job: Job, *, whole: bool) -> Raw | Broken:
    """Return a page's text and what it says of itself.

    Args:
        source: HTML.
        place: where it stands.
        job: what it is read for.
        whole: keep what stands around the text.

    Raises:
        BadRecord: it is no page.
    """
    text, facts = page_text(source, whole=whole)
    if not text:
        return job.broken(BadRecord(NO_TEXT, "holds no text beside links"), place, is_left_out=True)
    return Raw(text, place, facts)


def page_text(source: str, *, whole: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the text of a page, "" where it has none, and its columns; raises BadRecord."""
    root = parse_page(source)
    elements = list(root.iter())  # held to the end: libxml2's nodes are wrapped anew for who lets go of them
    facts = facts_of(root)
    remove_unseen(elements)
    text = written(blocks_of(root) if whole else without_menus(blocks_of(drop_around(root))))
    del elements
    return text, facts
