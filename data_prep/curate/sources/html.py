"""Reader for web pages: main text by resiliparse (Bevendorff et al., "Elastic ChatNoir", ECIR 2018), and
metadata from the head."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from data_prep.curate.sources.encodings import EncodingLimits, decode_page, read_unpacked
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord

NO_TEXT = "no_text"
"""Code for a valid page without text."""
MAX_DEPTH = 500
"""Nested elements, as in browsers. From deeper pages only the words are taken, because the time to find the
main text grows with the square of the depth."""
_DEEPER = " > ".join(["*"] * MAX_DEPTH)
_INVISIBLE = ["[hidden]", '[style*="display:none" i]', '[style*="display: none" i]', '[aria-hidden="true"]',
              "rt", "rp", "svg", "iframe", "object", "title", ".linenos", "a.headerlink", "a.anchor",
              ".mw-editsection"]
"""Selectors of elements that are not visible text; `rt` is the pronunciation above a Japanese word."""
_SURROUNDINGS = ["dialog", "[role=navigation]", "[role=banner]", "[role=contentinfo]", "[role=search]",
                 "[role=menu]", "[role=complementary]", "[role=dialog]", ".sphinxsidebar", ".breadcrumbs",
                 ".toc"]
"""Selectors of elements around the main text that resiliparse's rules ignore."""
_BODY = re.compile(r"<body\b[^<>]*>|</head\s*>", re.IGNORECASE)
_MATH = re.compile(r"<math\b(?:[^<]|<(?!/?math\b))*+</math>", re.IGNORECASE)
_ANNOTATION = re.compile(r"<annotation\b[^<>]*application/x-tex[^<>]*>([^<]*)", re.IGNORECASE)
_MATH_SCRIPT = re.compile(r"<script\b[^<>]*\"math/tex[^<>]*>([^<]*)</script>", re.IGNORECASE)
_IMAGE = re.compile(r"<img\b[^<>]*>", re.IGNORECASE)
_MATH_CLASS = re.compile(r"\bclass=\"[^\"]*math", re.IGNORECASE)
_ALT_TEXT = re.compile(r"\balt=\"([^\"]*)\"", re.IGNORECASE)
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/zero/1)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
# Not after these two letters: there it is a byte of a wrongly decoded letter (see the step `encoding`).
_SOFT_HYPHEN, _NO_BREAK = re.compile(r"(?<![\xc2\xc3])\xad"), re.compile(r"(?<![\xc2\xc3])\xa0")
_SELF_CLOSED = re.compile(r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)"
                          r"([a-zA-Z][\w:-]*+)([^<>]*)/>")


@dataclass(frozen=True)
class HtmlOptions(EncodingLimits):
    """Options for `format: html`."""

    whole_page: bool = False
    """Keep menus, headers and footers."""


class HtmlReader(FileReader):
    format = "html"
    version = 3  # text with resiliparse's own layout
    suffixes = frozenset([".html", ".htm", ".xhtml", ".shtml"])
    Options = HtmlOptions

    @classmethod
    def iter_documents(cls, job: ReadingJob) -> Iterator[RawDocument | BrokenRecord]:
        yield build_page_document(decode_page(read_unpacked(job.file, job.options)), job.name, job,
                                  whole=job.options.whole_page)


def build_page_document(source: str, place: str, job: ReadingJob, *,
                        whole: bool) -> RawDocument | BrokenRecord:
    """Build a document from an HTML page; `whole` keeps menus, headers and footers."""
    text, columns = extract_page_text(source, whole=whole)
    if not text.strip():
        reason = "holds no text but menus and links (whole_page: true keeps these)"
        return job.build_broken(BadRecord(NO_TEXT, reason), place, is_left_out=True)
    return RawDocument(text, place, columns)


def extract_page_text(source: str, *, whole: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the text, and columns title, url, date, licence and language_hint if the page has them."""
    tree = HTMLTree.parse(_prepare_page(source))
    if tree.body is None:
        return "", {}
    is_deep = tree.body.query_selector(_DEEPER) is not None
    is_main = not whole and not is_deep
    text = extract_plain_text(tree, preserve_formatting=not is_deep, main_content=is_main, alt_texts=False,
                              skip_elements=[*_INVISIBLE, *_SURROUNDINGS] if is_main else _INVISIBLE)
    # Soft hyphens and zero-width spaces only mark line breaks, and would split words in counts.
    text = _NO_BREAK.sub(" ", _SOFT_HYPHEN.sub("", text.replace("\u200b", "")))
    return text.strip("\n"), _read_metadata(tree)


def _read_metadata(tree: Any) -> dict[str, Any]:
    root = tree.document
    metas: dict[str, str] = {}
    # `values()`: iterating over resiliparse's lists takes time proportional to the square of their length.
    for meta in root.query_selector_all("meta").values():
        name = (meta.getattr("property") or meta.getattr("name") or meta.getattr("itemprop") or "").lower()
        # The first value counts, and values are cut: a page may repeat them endlessly.
        metas.setdefault(name, (meta.getattr("content") or "").strip()[:500])
    links: dict[str, str] = {}
    for link in root.query_selector_all("link[rel], a[rel]").values():
        for relation in (link.getattr("rel") or "").lower().split():
            links.setdefault(relation, (link.getattr("href") or "").strip()[:500])
    # Most reliable first: metadata for programs, then visible elements.
    title = root.query_selector("title") or root.query_selector("h1")
    date_names = ("article:published_time", "datepublished", "dc.date", "dcterms.date", "date", "pubdate")
    published = next((metas[name] for name in date_names if metas.get(name)), "")
    time = root.query_selector("time[datetime]")
    page_root = root.query_selector("html")
    language = (page_root.getattr("lang") or page_root.getattr("xml:lang")) if page_root else ""
    return drop_empty({
        "title": metas.get("og:title") or (" ".join(title.text.split())[:500] if title else ""),
        "url": links.get("canonical") or metas.get("og:url"),
        "date": published or (time.getattr("datetime") if time else ""),
        "licence": parse_licence(links.get("license") or metas.get("dc.rights") or ""),
        "language_hint": (language or metas.get("og:locale") or "")[:35]})


def parse_licence(value: str) -> str:
    """Return the SPDX name for a Creative Commons address, and other values unchanged."""
    match = _CREATIVE_COMMONS.search(value.lower())
    if match is None:
        return value[:200]
    return f"CC-{match[1].upper()}-{match[2]}" if match[1] else "CC0-1.0"


def _prepare_page(source: str) -> str:
    """Replace formulas by TeX, and nest the body three levels deeper: at lower levels resiliparse takes every
    list for a menu, at deeper levels it measures the share of links."""
    # Some parsers end a text at a control character.
    source = _CONTROLS.sub(" ", source)
    if "http://www.w3.org/1999/xhtml" in source[:2000]:
        source = _SELF_CLOSED.sub(r"<\1\2></\1>", source)  # `<title/>` would contain the whole page
    for pattern in (_MATH_SCRIPT, _IMAGE, _MATH):
        source = pattern.sub(_format_formula, source)
    body = _BODY.search(source)
    start = body.end() if body else 0
    return source[:start] + "<div><div><div>" + source[start:]


def _format_formula(formula: re.Match[str]) -> str:
    source: re.Match[str] | None = formula
    if formula.re is _MATH:
        source = _ANNOTATION.search(formula[0])
    elif formula.re is _IMAGE:
        source = _MATH_CLASS.search(formula[0]) and _ALT_TEXT.search(formula[0])
    return f"${source[1].strip()}$" if source and source[1].strip() else formula[0]
