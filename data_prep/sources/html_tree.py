"""A page as a tree without what no reader sees, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data_prep.sources.reader import kept
from megatron_sov.documents import BadRecord

UNSEEN = frozenset(["script", "style", "noscript", "template", "svg", "canvas", "iframe", "object", "embed",
                    "audio", "video", "button", "select", "input", "textarea", "option", "link", "meta",
                    "map", "rp", "rt", "head"])
"""Elements whose content is no text of the page; `rt` is the reading beside a Japanese word."""
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_ANCHOR_MARKS = frozenset(["¶", "#", "§", "🔗", "\uf0c1", "permalink", "[edit]", "link"])
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/zero/1)")
_TEX = "application/x-tex"
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")


def parse_page(text: str) -> Any:
    """Return the root element of a page.

    Raises:
        BadRecord: it has no elements.
    """
    from lxml import etree

    # without `huge_tree` a page that is nested 256 deep would end there, and nobody would know
    parser = etree.HTMLParser(remove_comments=True, remove_pis=True, no_network=True, huge_tree=True)
    try:
        root = etree.fromstring(_XML_DECLARATION.sub("", _CONTROLS.sub(" ", text)), parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError) as e:
        raise BadRecord("html", f"holds no page ({str(e)[:120]})") from None
    if root is None:
        raise BadRecord("html", "holds no page (it is empty)")
    return root


def text_of(element: Any) -> str:
    """Return all text in an element."""
    return "".join(element.itertext())


def facts_of(root: Any) -> dict[str, Any]:
    """Return columns of a page: title, url, date, licence, language_hint, as far as it tells them."""
    metas: dict[str, str] = {}
    for meta in root.iter("meta"):
        name = (meta.get("property") or meta.get("name") or meta.get("itemprop") or "").lower()
        metas.setdefault(name, (meta.get("content") or "").strip()[:500])
    links: dict[str, str] = {}
    for link in root.iter("link", "a"):
        for relation in (link.get("rel") or "").lower().split():
            links.setdefault(relation, (link.get("href") or "").strip()[:500])
    title = next((" ".join(text_of(e).split()) for e in root.iter("title", "h1")), "")
    published = next((metas[n] for n in ("article:published_time", "datepublished", "dc.date", "dcterms.date",
                                         "date", "pubdate") if metas.get(n)), "")
    return kept({
        "title": metas.get("og:title") or title[:500],
        "url": links.get("canonical") or metas.get("og:url"),
        "date": published or next((e.get("datetime") for e in root.iter("time") if e.get("datetime")), ""),
        "licence": licence_of(links.get("license") or metas.get("dc.rights") or ""),
        "language_hint": (root.get("lang") or root.get("{http://www.w3.org/XML/1998/namespace}lang")
                          or metas.get("og:locale") or "")[:35]})


def licence_of(named: str) -> str:
    """Return the SPDX name of a Creative Commons address, or what is named as it is."""
    found = _CREATIVE_COMMONS.search(named.lower())
    if found is None:
        return named[:200]
    return f"CC-{found[1].upper()}-{found[2]}" if found[1] else "CC0-1.0"


def remove_unseen(elements: Sequence[Any]) -> None:
    """Take out of a tree what a browser does not show as text; formulas become their TeX.

    Args:
        elements: all of the tree, in order.
    """
    perhaps = _perhaps_unseen(elements[0])
    for element in elements:
        if element not in perhaps:
            continue
        tag = element.tag
        if tag == "math":
            tex = next((a.text for a in element.iter("annotation") if a.get("encoding") == _TEX), None)
            if tex:
                _replace_by(element, f"${tex.strip()}$")
        elif tag == "script" and (element.get("type") or "").startswith("math/tex"):
            _replace_by(element, f"${(element.text or '').strip()}$")
        elif tag == "img" and "math" in (element.get("class") or ""):
            _replace_by(element, f"${(element.get('alt') or '').strip()}$")
        elif tag in UNSEEN or _is_hidden(element) or _is_anchor_mark(element):
            drop(element)


def _perhaps_unseen(root: Any) -> set[Any]:
    """Return the elements that may have to go, found by libxml2: a page has thousands, and few that do."""
    found = set(root.iter("math", "img", *UNSEEN))
    found.update(link for link in root.iter("a") if (link.get("href") or "").startswith("#"))
    found.update(root.xpath("//@hidden/.. | //@aria-hidden/.. | //@style/.. | "
                            "//@class[contains(., 'linenos')]/.."))
    return found


def _is_hidden(element: Any) -> bool:
    return (element.get("hidden") is not None or element.get("aria-hidden") == "true"
            or bool(_HIDDEN_STYLE.search(element.get("style") or ""))
            or "linenos" in (element.get("class") or "").split())


def _is_anchor_mark(element: Any) -> bool:
    """Return whether an element is the sign beside a heading that links to it."""
    if element.tag != "a" or not (element.get("href") or "").startswith("#"):
        return False
    return text_of(element).strip().lower() in _ANCHOR_MARKS


def drop(element: Any) -> None:
    """Take an element out of its tree; the text behind it stays."""
    parent = element.getparent()
    if parent is None:
        return
    _append_text(element, parent, element.tail or "")
    parent.remove(element)


def _replace_by(element: Any, text: str) -> None:
    element.tail = text + (element.tail or "")
    drop(element)


def _append_text(element: Any, parent: Any, text: str) -> None:
    previous = element.getprevious()
    if previous is not None:
        previous.tail = (previous.tail or "") + text
    else:
        parent.text = (parent.text or "") + text
