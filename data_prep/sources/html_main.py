"""Which blocks of a page are its text, and which are what stands around it on every page of the site.

Three looks, from the certain to the likely: the elements and roles that HTML has for either, the names that
authors give to the rest, and how much of a block's text is links (the measure of Kohlschuetter et al.,
"Boilerplate Detection using Shallow Text Features", WSDM 2010, section 4, without words of any language).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

from data_prep.sources.html_blocks import HEADINGS, Block
from data_prep.sources.html_tree import drop

MAIN_SHARE = 0.3
"""Of a page's plain text that an element has to hold to be its main part."""
LEAST_SHARE = 0.4
"""An element that is named like boilerplate and holds more of the plain text than that is none."""
MOST_LINKS = 0.5
"""Share of links in the text of a block, above which it leads elsewhere."""
RUN_BLOCKS = 3
"""So many items of links behind one another are a menu; fewer may be part of a list."""
SHORT_CHARS = 80
PARTLY_NAMED_CHARS = 300
"""An element one part of whose name is that of boilerplate, and that holds more plain text, is none."""
_NEVER_NAMED = frozenset(["p", "pre", "code", "section", "article", "main"])
_AROUND_TAGS = frozenset(["nav", "footer", "aside", "dialog"])
_AROUND_ROLES = frozenset(["navigation", "banner", "contentinfo", "search", "complementary", "menu",
                           "menubar", "dialog", "alertdialog", "toolbar"])
_MAIN_ROLES = ("main", "article")
_MAIN_NAMES = re.compile(r"^(main-?content|article-?(body|content)?|post-?(body|content)|entry-?content|"
                         r"content|mw-content-text|bodycontent|page-?content|story-?body|document)$",
                         re.IGNORECASE)
_AROUND_NAMES = re.compile(
    r"(?:^|[-_ ])(nav|navbar|navigation|navheader|navfooter|menu|menubar|sidebar|sphinxsidebar|breadcrumbs?|"
    r"footer|site-?header|masthead|topbar|cookies?|consent|share|sharing|social|related|recommended|advert|"
    r"ads?|promo|banner|pagination|pager|paginator|toc|tableofcontents|skip|skip-?link|subscribe|newsletter|"
    r"login|signin|search(?:box|form)?|language-?(?:selector|switcher|list)|prev-?next|rellinks|copyright|"
    r"editsection|printfooter|catlinks|jump-?links?|popup|modal|disqus)(?:$|[-_ ])", re.IGNORECASE)


def drop_around(root: Any) -> Any:
    """Take what stands around the text out of a page's tree; returns the element that holds the text."""
    body = next(iter(root.iter("body")), root)
    plain, named = _plain_chars(body), _named(body)
    total = plain[body]
    main = _main(body, plain, named)
    in_article = main is not body
    certain = {*main.iter(*_AROUND_TAGS), *(e for e in main.xpath(".//@role/..")
                                            if e.get("role").lower() in _AROUND_ROLES)}
    if not in_article:
        certain.update(e for e in main.iter("header") if e.getparent() is body)
    perhaps = {e for e in main.iter() if e in named} if in_article else named
    for element in {*certain, *perhaps} - {main}:
        if element.tag in ("body", "html"):
            continue
        most_chars = LEAST_SHARE * max(total, 1)
        if element not in certain:
            most_chars = min(most_chars, _most_named_chars(element))
        if plain[element] < most_chars:
            drop(element)
    return main


def without_menus(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks without runs of links, and without headings that have nothing left below them."""
    leads = [_leads_away(block) for block in blocks]
    kept: list[Block] = []
    start = 0
    while start < len(blocks):
        stop = start
        while stop < len(blocks) and leads[stop] == leads[start]:
            stop += 1
        run = blocks[start:stop]
        is_edge = start == 0 or stop == len(blocks)
        if not leads[start] or (len(run) < RUN_BLOCKS and not is_edge):
            kept += run
        start = stop
    return _without_empty_headings(kept)


def _leads_away(block: Block) -> bool:
    chars = len("".join(block.text.split()))
    if block.kind in ("heading", "code"):
        return False
    return block.link_chars > MOST_LINKS * chars and chars - block.link_chars < SHORT_CHARS


def _without_empty_headings(blocks: Sequence[Block]) -> list[Block]:
    kept: list[Block] = []
    for block in blocks:
        while (kept and block.kind == kept[-1].kind == "heading" and kept[-1].level >= block.level
               and kept[-1].level > 1):
            kept.pop()
        kept.append(block)
    while kept and kept[-1].kind == "heading" and len(kept) > 1:
        kept.pop()
    return kept


def _main(body: Any, plain: Mapping[Any, int], named: Set[Any]) -> Any:
    """Return the innermost element that says it holds the text and does; the body where none says so."""
    looks: tuple[Callable[[Any], Set[Any]], ...] = (
        lambda e: {*e.iter("main"), *(i for i in e.xpath(".//@role/..")
                                      if i.get("role").lower() in _MAIN_ROLES)},
        lambda e: {*e.iter("article"), *(i for i in e.xpath(".//@itemprop/..")
                                         if "articlebody" in i.get("itemprop").lower())},
        lambda e: {i for i in e.iter() if i in named and any(map(_MAIN_NAMES.match, _names(i)))})
    found = body
    for look in looks:
        inside = [e for e in look(found) if e is not found]
        fitting = [e for e in inside if plain[e] >= MAIN_SHARE * max(plain[body], 1)]
        outer = [e for e in fitting if not any(a in fitting for a in e.iterancestors())]
        if len(outer) == 1 and len([e for e in inside if e.tag == outer[0].tag]) - len(
                [e for e in outer[0].iter(outer[0].tag) if e in inside]) <= 0:
            found = outer[0]
            if found.tag == "main":
                break
    return found


def _names(element: Any) -> list[str]:
    return [*(element.get("class") or "").split(), element.get("id") or ""]


def _most_named_chars(element: Any) -> float:
    """Return how much plain text an element may hold to be what its names say: a part of the text may be
    named after what it is about, as "cookie-objects"."""
    if element.tag in HEADINGS or element.tag in _NEVER_NAMED:
        return 0
    found = [(name, match) for name in _names(element) if (match := _AROUND_NAMES.search(name))]
    if not found or "section" in (element.get("class") or "").split():
        return 0
    return math.inf if any(match[1] == name for name, match in found) else PARTLY_NAMED_CHARS


def _named(body: Any) -> set[Any]:
    """Return the elements whose class or id tells something."""
    return {e for e in body.iter() if ((name := e.get("class")) and _tells(name))
            or ((name := e.get("id")) and _tells(name))}


@lru_cache(maxsize=8192)  # most elements are named like many others
def _tells(names: str) -> bool:
    return any(_AROUND_NAMES.search(name) or _MAIN_NAMES.match(name) for name in (*names.split(), names))


def _plain_chars(body: Any) -> dict[Any, int]:
    """Return of each element how many characters of its text are no links."""
    found: dict[Any, int] = defaultdict(int)
    for element in reversed(list(body.iter())):  # children come before what they stand in
        if element.tag == "a":
            found[element] = 0
        elif text := element.text:
            found[element] += len("".join(text.split()))
        tail = element.tail
        found[element.getparent()] += found[element] + (len("".join(tail.split())) if tail else 0)
    return found
