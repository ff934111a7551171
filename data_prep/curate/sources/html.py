"""Web pages: their text without what stands around it, with headings, items, rows of tables and code.

The tree and the choice of the text are resiliparse's (Bevendorff et al., "Elastic ChatNoir", ECIR 2018); here
is what it is told to leave out, and how its minimal HTML is written as text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from data_prep.curate.sources.encodings import EncodingLimits, decode_page, read_whole
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import Broken, Raw
from megatron_sov.base.documents import BadRecord

NO_TEXT = "no_text"
"""Code of what was read well and holds no text."""
MAX_DEPTH = 500
"""Of elements in one another; browsers stop there too. The search for the main text takes the square of it,
and so do the indents of lists: of a page that is nested deeper only the words are kept, all of them."""
_DEEPER = " > ".join(["*"] * MAX_DEPTH)
_UNSEEN = ["[hidden]", '[style*="display:none" i]', '[style*="display: none" i]', '[aria-hidden="true"]',
           '[style*="visibility:hidden" i]', '[style*="visibility: hidden" i]', "rt", "rp", "svg", "iframe",
           "object", "title", ".linenos", "a.headerlink", "a.anchor", ".mw-editsection"]
"""Selectors of what no reader sees as text; `rt` is the reading beside a Japanese word."""
_AROUND = ["dialog", "[role=navigation]", "[role=banner]", "[role=contentinfo]", "[role=search]",
           "[role=menu]", "[role=complementary]", "[role=dialog]", "[role=toolbar]", ".sphinxsidebar",
           ".breadcrumbs", ".toc", "body > div > div > div > footer", "body > div > div > div > * > footer"]
"""Selectors of what stands around the text, which resiliparse's own rules do not look at."""
_IS_LAYOUT, _IS_AROUND = "data-layout-table", "data-around-text"
"""Attributes that `mark_cells_around` writes."""
_BODY = re.compile(r"<body\b[^<>]*>|</head\s*>", re.IGNORECASE)
_CELL = re.compile(r"(<t[dh]\b[^<>]*>)\s*<p\b[^<>]*>((?:[^<]|<(?!/?(?:p|t[dhr]|table)\b))*+)</p>"
                   r"\s*(?=</t[dh]>)", re.IGNORECASE)
_MATH = re.compile(r"<math\b(?:[^<]|<(?!/?math\b))*+</math>", re.IGNORECASE)
_ANNOTATION = re.compile(r"<annotation\b[^<>]*application/x-tex[^<>]*>([^<]*)", re.IGNORECASE)
_MATH_SCRIPT = re.compile(r"<script\b[^<>]*\"math/tex[^<>]*>([^<]*)</script>", re.IGNORECASE)
_IMAGE = re.compile(r"<img\b[^<>]*>", re.IGNORECASE)
_MATH_CLASS = re.compile(r"\bclass=\"[^\"]*math", re.IGNORECASE)
_ALT = re.compile(r"\balt=\"([^\"]*)\"", re.IGNORECASE)
_MARKS = re.compile(r"(\0|</?(?:h[1-6]|p|ul|ol|li|br)>)")
_PRE = re.compile(r"</?pre>")
_TAG = re.compile(r"<[^<>]*>")
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/zero/1)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_EMPTY = re.compile(r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)"
                    r"([a-zA-Z][\w:-]*+)([^<>]*)/>")
_HAN = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"
_HAN_BREAK = re.compile(rf"(?<={_HAN})[ \t]*\r?\n\s*(?={_HAN})")
# After these two letters it is a byte of a letter that was read in a wrong encoding (step `encoding`).
_SOFT_HYPHEN, _NO_BREAK = re.compile(r"(?<![\xc2\xc3])\xad"), re.compile(r"(?<![\xc2\xc3])\xa0")
_PREFORMATTED = re.compile(r"(<pre\b(?:[^<]|<(?!/?pre\b))*+</pre>)", re.IGNORECASE)
_BLOCK_END = re.compile(r"(?:\n|<br\b[^<>]*>)?</(?:div|p|li)\s*>\n?", re.IGNORECASE)
_BLOCK_BEGIN = re.compile(r"(?<=[^\n>])<(?:div|p|li)\b[^<>]*>", re.IGNORECASE)
_BLOCK = re.compile(r"</?(?:div|p|li|ul|ol)\b[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class HtmlOptions(EncodingLimits):
    """Options of web pages."""

    whole_page: bool = False
    """Keep menus, headers and footers too."""


class HtmlReader(FileReader):
    """Files of HTML."""

    format = "html"
    version = 2  # text of pages by resiliparse
    suffixes = frozenset([".html", ".htm", ".xhtml", ".shtml"])
    Options = HtmlOptions

    @classmethod
    def documents(cls, job: ReadingJob) -> Iterator[Raw | Broken]:
        yield page(decode_page(read_whole(job.file, job.options)), job.name, job,
                   whole=job.options.whole_page)


def page(source: str, place: str, job: ReadingJob, *, whole: bool) -> Raw | Broken:
    """Return a page's text and what it says of itself.

    Args:
        source: HTML.
        place: where it stands.
        job: what it is read for.
        whole: keep what stands around the text.
    """
    text, facts = page_text(source, whole=whole)
    if not text:
        reason = "holds no text but menus and links (whole_page: true keeps these)"
        return job.broken(BadRecord(NO_TEXT, reason), place, is_left_out=True)
    return Raw(text, place, facts)


def page_text(source: str, *, whole: bool = False) -> tuple[str, dict[str, Any]]:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(_prepared(source))
    if tree.body is None:
        return "", {}
    facts = _facts(tree)
    # Nested too deep for the search of the main text, whose time grows with the square of the depth.
    if tree.body.query_selector(_DEEPER):
        words = extract_plain_text(tree, preserve_formatting=False, alt_texts=False, skip_elements=_UNSEEN)
        return words, facts
    extract = partial(extract_plain_text, tree, preserve_formatting="minimal_html", alt_texts=False)
    if whole:
        return _markdown(extract(skip_elements=_UNSEEN)), facts
    if mark_cells_around(tree.body):
        text = _markdown(extract(main_content=True, skip_elements=[*_UNSEEN, *_AROUND, f"[{_IS_AROUND}]"]))
        # Without a text that they stand around, the links are what the page is for.
        if len(text.encode()) >= TEXT_BYTES:
            return text, facts
    return _markdown(extract(main_content=True, skip_elements=_UNSEEN + _AROUND)), facts


def _facts(tree: Any) -> dict[str, Any]:
    """Return columns of a page: title, url, date, licence, language_hint, as far as it tells them."""
    root = tree.document
    metas: dict[str, str] = {}
    # `values`: iterating over resiliparse's lists takes time with the square of their length.
    for meta in root.query_selector_all("meta").values():
        name = (meta.getattr("property") or meta.getattr("name") or meta.getattr("itemprop") or "").lower()
        # The first of a name counts, and no value is long: a page may repeat them without end.
        metas.setdefault(name, (meta.getattr("content") or "").strip()[:500])
    links: dict[str, str] = {}
    for link in root.query_selector_all("link[rel], a[rel]").values():
        for relation in (link.getattr("rel") or "").lower().split():
            links.setdefault(relation, (link.getattr("href") or "").strip()[:500])
    # Most reliable first: what a page says to programs, then what it shows to people.
    title = root.query_selector("title") or root.query_selector("h1")
    published = next((metas[n] for n in ("article:published_time", "datepublished", "dc.date", "dcterms.date",
                                         "date", "pubdate") if metas.get(n)), "")
    time = root.query_selector("time[datetime]")
    page_root = root.query_selector("html")
    language = (page_root.getattr("lang") or page_root.getattr("xml:lang")) if page_root else ""
    return drop_empty({
        "title": metas.get("og:title") or (" ".join(title.text.split())[:500] if title else ""),
        "url": links.get("canonical") or metas.get("og:url"),
        "date": published or (time.getattr("datetime") if time else ""),
        "licence": licence_of(links.get("license") or metas.get("dc.rights") or ""),
        "language_hint": (language or metas.get("og:locale") or "")[:35]})


# Pages that are laid out by tables: resiliparse looks for navigation among elements of blocks, and not among
# cells.  Lengths are in bytes of UTF-8, as a syllable of Korean says about as much as three letters.

TEXT_BYTES = 300
"""Bytes next to links from which on a cell holds text."""
_SHORT_BYTES = 120
_MAX_LAYOUT_ROWS = 4
"""A table of more rows, without tables in it, holds data."""
_NAMED_AROUND = re.compile(
    r"(?<![a-z])(?:(?:left|right|top|bottom)?(?:nav|menu)|navigation|navbar|sidebar|footer|ads?|adverts?|"
    r"sponsor(?:ed|s)?|breadcrumbs?|copyright)(?![a-z])", re.IGNORECASE)
_NOTICE = re.compile(
    r"©|\(c\) ?\d{4}|copyright|all rights reserved|저작권|무단 ?전재|版权所有|著作権|สงวนลิขสิทธิ์|"
    r"^(?:advertisements?|sponsored(?: links?)?|ads?|광고|広告|广告|โฆษณา)$", re.IGNORECASE)


def mark_cells_around(body: Any) -> bool:
    """Write an attribute into cells of layout tables, and into tables in them, that hold navigation, adverts,
    forms or notices of copyright; returns whether there are any.  Tables of data stay whole.

    Args:
        body: of a page.
    """
    around: list[Any] = []
    for table in body.query_selector_all("table").values():
        outer = table.parent.closest("table")
        rows = _rows(table)
        is_in_data = outer is not None and not outer.hasattr(_IS_LAYOUT)
        if not rows or is_in_data or _is_marked_as_data(table, rows):
            continue
        is_nested = table.query_selector("table") is not None
        if not _is_layout(table, rows, is_nested):
            # Menus in columns, as of a picture and a link.
            around += [table] if outer is not None and _is_menu(table) else []
            continue
        table.setattr(_IS_LAYOUT, "")
        cells = [cell for row in rows for cell in row]
        if is_nested or any(_text_bytes(cell)[1] >= TEXT_BYTES for cell in cells):
            around += [cell for cell in cells
                       if (_is_around if cell.query_selector("table") is None else _is_menu)(cell)]
        elif _is_around(table):
            # Links with descriptions are long enough together, so that they stay.
            around.append(table)
    for element in around:
        element.setattr(_IS_AROUND, "")
    return bool(around)


def _rows(table: Any) -> list[list[Any]]:
    """Return the cells of each row of a table, without those of the tables in it."""
    sections = [table, *(child for child in _children(table) if child.tag in ("tbody", "thead", "tfoot"))]
    rows = [row for section in sections for row in _children(section) if row.tag == "tr"]
    return [cells for row in rows if (cells := [cell for cell in _children(row) if cell.tag in ("td", "th")])]


def _children(element: Any) -> Iterator[Any]:
    child = element.first_element_child
    while child is not None:
        yield child
        child = child.next_element_sibling


def _is_marked_as_data(table: Any, rows: list[list[Any]]) -> bool:
    return (table.getattr("role") in ("table", "grid")
            or any(child.tag in ("caption", "thead") for child in _children(table))
            or any(cell.tag == "th" for row in rows for cell in row))


def _is_layout(table: Any, rows: list[list[Any]], is_nested: bool) -> bool:
    """Return whether a table places parts of a page: it has tables in it, or one row or column, or one of a
    few cells has most of the text."""
    if table.getattr("role") in ("presentation", "none") or is_nested:
        return True
    if len(rows) == 1 or max(map(len, rows)) == 1:
        return True
    if len(rows) > _MAX_LAYOUT_ROWS:
        return False
    lengths = [_text_bytes(cell)[1] for row in rows for cell in row]
    return max(lengths) >= TEXT_BYTES and max(lengths) > sum(lengths) / 2


def _text_bytes(element: Any) -> tuple[int, int]:
    """Return the bytes of text in links and next to them, blanks not counted."""
    linked = sum(_num_bytes(link.inner_text) for link in element.query_selector_all("a[href]").values())
    return linked, max(_num_bytes(element.inner_text) - linked, 0)


def _num_bytes(text: str) -> int:
    return len("".join(text.split()).encode())


def _is_menu(element: Any) -> bool:
    linked, unlinked = _text_bytes(element)
    return linked > 0.7 * (linked + unlinked) and unlinked < TEXT_BYTES


def _is_around(element: Any) -> bool:
    """Return whether a cell, or a layout table without a cell of text, holds what stands around a text."""
    linked, unlinked = _text_bytes(element)
    link_share = linked / max(linked + unlinked, 1)
    is_title = element.query_selector("h1, h2") is not None and link_share <= 0.5
    if linked + unlinked == 0 or unlinked >= TEXT_BYTES or is_title:
        return False
    is_short = unlinked < _SHORT_BYTES
    names = f"{element.getattr('class') or ''} {element.getattr('id') or ''}"
    text = " ".join(element.inner_text.split())
    return bool(link_share > 0.5 or (is_short and link_share > 0.2) or _NAMED_AROUND.search(names)
                or _NOTICE.search(text)
                or (is_short and element.query_selector("form, input, select") is not None))


def licence_of(named: str) -> str:
    """Return the SPDX name of a Creative Commons address, or what is named as it is."""
    found = _CREATIVE_COMMONS.search(named.lower())
    if found is None:
        return named[:200]
    return f"CC-{found[1].upper()}-{found[2]}" if found[1] else "CC0-1.0"


def _prepared(source: str) -> str:
    """Return a page with formulas as their TeX and each cell on one line, and its body three levels deeper:
    nearer to it resiliparse takes any list for a menu; deeper ones are asked how much of them is links.

    All on the source: a change of the tree wraps each of its nodes in Python.
    """
    # Spaces for control characters: some parsers end a text at one.
    source = _CONTROLS.sub(" ", source)
    if "http://www.w3.org/1999/xhtml" in source[:2000]:
        source = _EMPTY.sub(r"<\1\2></\1>", source)  # `<title/>` would hold the whole page
    source = _PREFORMATTED.sub(_without_blocks, source)
    if not source.isascii():
        # Line breaks between Han characters are no spaces, except in preformatted text.
        parts = _PREFORMATTED.split(source)
        parts[::2] = [_HAN_BREAK.sub("", part) for part in parts[::2]]
        source = "".join(parts)
    # From the inside out: scripts and pictures of formulas, then MathML, then the cells that hold them.
    source = _CELL.sub(r"\1\2", _MATH.sub(_tex, _IMAGE.sub(_tex, _MATH_SCRIPT.sub(_tex, source))))
    body = _BODY.search(source)
    start = body.end() if body else 0
    return source[:start] + "<div><div><div>" + source[start:]


def _without_blocks(preformatted: re.Match[str]) -> str:
    """Return preformatted text with line feeds for blocks, as of code with a <div> or an item for each line;
    resiliparse's minimal HTML joins or indents them."""
    return _BLOCK.sub("", _BLOCK_BEGIN.sub("\n", _BLOCK_END.sub("\n", preformatted[0])))


def _tex(formula: re.Match[str]) -> str:
    found: re.Match[str] | None = formula
    if formula.re is _MATH:
        found = _ANNOTATION.search(formula[0])
    elif formula.re is _IMAGE:
        found = _MATH_CLASS.search(formula[0]) and _ALT.search(formula[0])
    return f"${found[1].strip()}$" if found and found[1].strip() else formula[0]


def _markdown(found: str) -> str:
    """Return resiliparse's minimal HTML as text: headings with "#", items with their marks, code between
    fences with its white space, cells of a row between "|"."""
    found, codes = _cut_out_code(found)
    parts: list[str] = []
    lists: list[int | None] = []  # that are open: the number of the last item, None where it has bullets
    is_heading = False
    waiting = iter(codes)
    for token in _MARKS.split(found):
        is_end, tag = token.startswith("</"), token.strip("</>") if token.startswith("<") else ""
        indent = "  " * (len(lists) - 1)
        if token == "\0":
            # A fence that the code itself has would end it early.
            fence = "~~~~" if "```" in next(waiting) else "```"
            parts.append(f"\n\n{fence}\n\0\n{fence}\n\n")
        elif tag in ("ul", "ol"):
            before = len(lists)
            lists = lists[:-1] if is_end else [*lists, 0 if tag == "ol" else None]
            parts.append("" if before and lists else "\n\n")
        elif tag == "li" and not is_end and lists:
            number = lists[-1]
            lists[-1] = None if number is None else number + 1
            parts.append(f"\n{indent}{'- ' if number is None else f'{number + 1}. '}")
        elif tag.startswith("h"):
            is_heading = not is_end
            parts.append("\n\n" if is_end else f"\n\n{'#' * int(tag[1])} ")
        elif tag == "p":
            # The first paragraph of an item goes behind its mark.
            is_first = bool(lists) and (is_end or parts[-1].endswith(("- ", ". ")))
            gap = f"\n{indent}  " if lists else "\n\n"
            parts.append("" if is_first else gap)
        elif not tag and token.strip(" \n"):
            lines = [line.strip().replace("\t\t", " | ")
                     for line in html.unescape(token).rstrip().split("\n")]
            gap = f"\n{indent}  " if lists else "\n"
            parts.append((" " if is_heading else gap).join(lines))
    text = re.sub(r"\n(?:[ \t]*\n)+", "\n\n", "".join(parts)).strip("\n")
    # Only now the code: its blank lines and blanks are its own.
    text = "".join(one for pair in zip_longest(text.split("\0"), codes, fillvalue="") for one in pair)
    if text.isascii():
        return text
    # Soft hyphens and zero-width spaces are for setting lines, and part words for whoever counts them.
    return _NO_BREAK.sub(" ", _SOFT_HYPHEN.sub("", text.replace("\u200b", "")))


def _cut_out_code(found: str) -> tuple[str, list[str]]:
    """Return minimal HTML with a NUL in the place of each preformatted text, and these texts; a control
    character cannot be in a page (`_prepared`)."""
    pieces: list[str] = []
    codes: list[str] = []
    depth = begin = 0
    for tag in _PRE.finditer(found):
        is_end = tag[0] == "</pre>"
        # Only the outermost of nested elements is cut out: this tag opens or closes it.
        if depth == is_end:
            (codes if is_end else pieces).append(found[begin:tag.start()])
            begin = tag.end()
        depth += -1 if is_end else 1
    pieces.append(found[begin:])
    codes = [html.unescape(_TAG.sub("", code.replace("<br>", "\n"))).strip("\n").rstrip() for code in codes]
    between = ["\0" if code else "" for code in codes]
    return ("".join(one for pair in zip_longest(pieces, between, fillvalue="") for one in pair),
            [code for code in codes if code])
