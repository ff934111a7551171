"""Web pages: their main text by resiliparse (Bevendorff et al., "Elastic ChatNoir", ECIR 2018), and facts of
their head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.curate.sources.encodings import EncodingLimits, decode_page, read_unpacked
from data_prep.curate.sources.reader import FileReader, ReadingJob, drop_empty
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord

NO_TEXT = "no_text"
"""Code of a page that was read well and holds no text."""
MAX_DEPTH = 500
"""Elements in one another, where browsers stop too; of a page that is nested deeper only the words are taken,
because the search for the main text takes time with the square of the depth."""
_DEEPER = " > ".join(["*"] * MAX_DEPTH)
_UNSEEN = ["[hidden]", '[style*="display:none" i]', '[style*="display: none" i]', '[aria-hidden="true"]',
           "rt", "rp", "svg", "iframe", "object", "title", ".linenos", "a.headerlink", "a.anchor",
           ".mw-editsection"]
"""Selectors of elements that no reader sees as text; `rt` is the reading beside a Japanese word."""
_AROUND = ["dialog", "[role=navigation]", "[role=banner]", "[role=contentinfo]", "[role=search]",
           "[role=menu]", "[role=complementary]", "[role=dialog]", ".sphinxsidebar", ".breadcrumbs", ".toc"]
"""Selectors of elements around the text that resiliparse's own rules do not look at."""
_BODY = re.compile(r"<body\b[^<>]*>|</head\s*>", re.IGNORECASE)
_MATH = re.compile(r"<math\b(?:[^<]|<(?!/?math\b))*+</math>", re.IGNORECASE)
_ANNOTATION = re.compile(r"<annotation\b[^<>]*application/x-tex[^<>]*>([^<]*)", re.IGNORECASE)
_MATH_SCRIPT = re.compile(r"<script\b[^<>]*\"math/tex[^<>]*>([^<]*)</script>", re.IGNORECASE)
_IMAGE = re.compile(r"<img\b[^<>]*>", re.IGNORECASE)
_MATH_CLASS = re.compile(r"\bclass=\"[^\"]*math", re.IGNORECASE)
_ALT = re.compile(r"\balt=\"([^\"]*)\"", re.IGNORECASE)
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/zero/1)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
# After these two letters it is a byte of a letter that was read in a wrong encoding (step `encoding`).
_SOFT_HYPHEN, _NO_BREAK = re.compile(r"(?<![\xc2\xc3])\xad"), re.compile(r"(?<![\xc2\xc3])\xa0")
_EMPTY = re.compile(r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)"
                    r"([a-zA-Z][\w:-]*+)([^<>]*)/>")


@dataclass(frozen=True)
class HtmlOptions(EncodingLimits):
    """Options of web pages."""

    whole_page: bool = False
    """Keep menus, headers and footers too."""


class HtmlReader(FileReader):
    """Files of HTML."""

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
    """Return a page's text and what it says of itself.

    Args:
        source: HTML.
        place: where it stands.
        job: what it is read for.
        whole: keep what stands around the text.
    """
    text, facts = extract_page_text(source, whole=whole)
    if not text.strip():
        reason = "holds no text but menus and links (whole_page: true keeps these)"
        return job.build_broken(BadRecord(NO_TEXT, reason), place, is_left_out=True)
    return RawDocument(text, place, facts)


def extract_page_text(source: str, *, whole: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the text of a page, and its title, url, date, licence and language where its head has them."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(_prepared(source))
    if tree.body is None:
        return "", {}
    is_deep = tree.body.query_selector(_DEEPER) is not None
    is_main = not whole and not is_deep
    text = extract_plain_text(tree, preserve_formatting=not is_deep, main_content=is_main, alt_texts=False,
                              skip_elements=[*_UNSEEN, *_AROUND] if is_main else _UNSEEN)
    # Soft hyphens and zero-width spaces are for setting lines, and part words for whoever counts them.
    text = _NO_BREAK.sub(" ", _SOFT_HYPHEN.sub("", text.replace("\u200b", "")))
    return text.strip("\n"), _facts(tree)


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
        "licence": parse_licence(links.get("license") or metas.get("dc.rights") or ""),
        "language_hint": (language or metas.get("og:locale") or "")[:35]})


def parse_licence(named: str) -> str:
    """Return the SPDX name of a Creative Commons address, or what is named as it is."""
    found = _CREATIVE_COMMONS.search(named.lower())
    if found is None:
        return named[:200]
    return f"CC-{found[1].upper()}-{found[2]}" if found[1] else "CC0-1.0"


def _prepared(source: str) -> str:
    """Return a page with formulas as their TeX, and its body three levels deeper: nearer to it resiliparse
    takes any list for a menu; of deeper lists it measures how much of them is links."""
    # Spaces for control characters: some parsers end a text at one.
    source = _CONTROLS.sub(" ", source)
    if "http://www.w3.org/1999/xhtml" in source[:2000]:
        source = _EMPTY.sub(r"<\1\2></\1>", source)  # `<title/>` would hold the whole page
    source = _MATH.sub(_tex, _IMAGE.sub(_tex, _MATH_SCRIPT.sub(_tex, source)))
    body = _BODY.search(source)
    start = body.end() if body else 0
    return source[:start] + "<div><div><div>" + source[start:]


def _tex(formula: re.Match[str]) -> str:
    found: re.Match[str] | None = formula
    if formula.re is _MATH:
        found = _ANNOTATION.search(formula[0])
    elif formula.re is _IMAGE:
        found = _MATH_CLASS.search(formula[0]) and _ALT.search(formula[0])
    return f"${found[1].strip()}$" if found and found[1].strip() else formula[0]
