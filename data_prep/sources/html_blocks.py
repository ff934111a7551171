"""A page's tree as a list of blocks: headings, paragraphs, items, code, rows of tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.sources.html_tree import text_of

Kind = Literal["heading", "paragraph", "item", "code", "row"]
HEADINGS = {f"h{n}": n for n in range(1, 7)}
INLINE = frozenset(["a", "abbr", "acronym", "b", "bdi", "bdo", "big", "br", "cite", "code", "data", "del",
                    "dfn", "em", "font", "i", "ins", "kbd", "label", "mark", "q", "ruby", "rb", "s", "samp",
                    "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr", "img",
                    "nobr", "math"])
_CODE_LANGUAGE = re.compile(r"(?:language|lang|highlight|sourceCode|brush:?)[-\s]+([a-z0-9+#]+)",
                            re.IGNORECASE)
_NO_LANGUAGE = frozenset(["default", "none", "text", "notranslate", "highlight", "plaintext"])
_HAN_BREAK = re.compile(r"(?<=[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef])[ \t]*\n\s*"
                        r"(?=[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef])")
MAX_CELL_CHARS = 2000
"""A table with a longer cell lays a page out, and is no table of data."""
_NOT_IN_CELLS = frozenset(["table", "pre", "h1", "h2", "h3", "h4", "ul", "ol", "dl", "blockquote", "article",
                           "section", "form"])


@dataclass
class Block:
    """A piece of text that stands on lines of its own."""

    kind: Kind
    text: str
    """As it is written out, without the marks of its kind."""
    element: Any
    """Where it stands in the tree."""
    level: int = 0
    """Of a heading 1-6; how deep an item is, from 0; cells of a row."""
    mark: str = ""
    """Of an item "- " or "1. "; of code its language."""
    link_chars: int = 0
    """Characters of it that are links."""


def blocks_of(root: Any) -> list[Block]:
    """Return the blocks of a tree, in order."""
    found: list[Block] = []
    _Walk(found).element(root, depth=-1, mark="")
    return found


class _Walk:
    """A walk through a tree that gathers blocks."""

    def __init__(self, found: list[Block]) -> None:
        self._found = found
        self._parts: list[str] = []
        self._links = 0

    def element(self, element: Any, depth: int, mark: str) -> None:
        """Gather what an element holds; `depth` and `mark` are those of the item that it stands in."""
        tag = element.tag
        if tag in HEADINGS:
            self._whole(element, "heading", HEADINGS[tag])
        elif tag == "pre" or (tag == "textarea"):
            self._code(element)
        elif tag == "table" and (rows := _rows(element)):
            self._table(element, rows)
        elif tag in ("ul", "ol", "menu", "dir"):
            self._list(element, depth + 1)
        else:
            self._flow(element, depth, mark)

    def _flow(self, element: Any, depth: int, mark: str) -> None:
        kind: Kind = "item" if mark else "paragraph"
        before = len(self._found)
        self._add_text(element.text)
        for child in element:
            if child.tag in INLINE and not _holds_blocks(child):
                self._inline(child)
            else:
                self._flush(element, kind, depth, mark)
                if kind == "item" and len(self._found) > before:
                    mark = "  "  # what follows in the item stands below it
                self.element(child, depth, mark if child.tag not in HEADINGS else "")
            self._add_text(child.tail)
        self._flush(element, kind, depth, mark)

    def _inline(self, element: Any) -> None:
        tag = element.tag
        if tag == "br":
            self._parts.append("\u2028")
            return
        before = len(self._parts)
        self._add_text(element.text)
        for child in element:
            self._inline(child)
            self._add_text(child.tail)
        if tag == "a":
            self._links += sum(len("".join(part.split())) for part in self._parts[before:])

    def _add_text(self, text: str | None) -> None:
        if text:
            self._parts.append(text)

    def _flush(self, element: Any, kind: Kind, level: int, mark: str) -> None:
        text = tidy("".join(self._parts))
        links, self._links = self._links, 0
        self._parts = []
        if text:
            self._found.append(Block(kind, text, element, max(level, 0), mark, links))

    def _whole(self, element: Any, kind: Kind, level: int) -> None:
        for part in element.itertext():
            self._parts.append(part)
        self._links = sum(len("".join(text_of(a).split())) for a in element.iter("a"))
        self._flush(element, kind, level, "")
        if self._found and self._found[-1].element is element:
            self._found[-1].text = self._found[-1].text.replace("\n", " ")

    def _code(self, element: Any) -> None:
        for line_break in element.iter("br"):
            line_break.tail = "\n" + (line_break.tail or "")
        text = text_of(element).expandtabs().strip("\n").rstrip()
        if text.strip():
            links = sum(len(text_of(a)) for a in element.iter("a"))
            self._found.append(Block("code", text, element, 0, _language(element), links))

    def _table(self, element: Any, rows: list[list[str]]) -> None:
        caption = element.find("caption")
        if caption is not None:
            self._whole(caption, "paragraph", 0)
        links = sum(len("".join(text_of(a).split())) for a in element.iter("a"))
        total = sum(len(cell) for row in rows for cell in row) or 1
        for row in rows:
            chars = sum(map(len, row))
            self._found.append(Block("row", " | ".join(row), element, len(row), "", links * chars // total))

    def _list(self, element: Any, depth: int) -> None:
        number = int(element.get("start")) if (element.get("start") or "").isdecimal() else 1
        for child in element:
            if child.tag == "li":
                self.element(child, depth, f"{number}. " if element.tag == "ol" else "- ")
                number += 1
            else:
                self.element(child, depth, "")


def tidy(text: str) -> str:
    """Return inline text with its white space as a browser shows it; a line break of the source between two
    characters of Chinese or Japanese is no space."""
    if text.isascii():
        return " ".join(text.split())
    text = _HAN_BREAK.sub("", text.replace("\u00ad", "").replace("\u200b", ""))
    lines = (" ".join(line.split()) for line in text.split("\u2028"))
    return "\n".join(lines).strip()


def _holds_blocks(element: Any) -> bool:
    """Return whether an inline element holds what stands on lines of its own."""
    return len(element) > 0 and any(e.tag not in INLINE for e in element.iter())


def _language(element: Any) -> str:
    """Return the language of code, as its element or the one around it names it."""
    around = [element, element.getparent(), *(element.iter("code"))]
    if element.getparent() is not None:
        around.append(element.getparent().getparent())
    for one in around:
        found = _CODE_LANGUAGE.search((one.get("class") or "") if one is not None else "")
        if found and found[1].lower() not in _NO_LANGUAGE:
            return found[1].lower().removesuffix("3") if found[1].lower() == "python3" else found[1].lower()
    return ""


def _rows(table: Any) -> list[list[str]]:
    """Return the cells of a table of data; of a table that lays a page out nothing."""
    rows: list[list[str]] = []
    for row in table.iter("tr"):
        cells = [cell for cell in row if cell.tag in ("td", "th")]
        for cell in cells:
            if any(e.tag in _NOT_IN_CELLS for e in cell.iter() if e is not cell):
                return []
        texts = [tidy(_cell_text(cell)).replace("\n", " ") for cell in cells]
        if any(len(text) > MAX_CELL_CHARS for text in texts):
            return []
        if any(texts):
            rows.append(texts)
    return rows if max(map(len, rows), default=0) > 1 else []


def _cell_text(element: Any) -> str:
    """Return a cell's text; what stands on lines of its own is kept apart."""
    parts = [element.text or ""]
    for child in element:
        parts += [_cell_text(child) if child.tag in INLINE else f" {_cell_text(child)} ", child.tail or ""]
    return "".join(parts)


def written(blocks: Sequence[Block]) -> str:
    """Return blocks as text: headings with "#", items with their marks, code between fences, rows of
    tables between "|"."""
    return "\n".join(_lines(blocks)).strip("\n")


def _lines(blocks: Sequence[Block]) -> Iterator[str]:
    before: Block | None = None
    for block in blocks:
        together = before is not None and before.kind == block.kind and (
            block.kind == "item" or (block.kind == "row" and before.element is block.element))
        if before is not None and not together:
            yield ""
        if block.kind == "heading":
            yield f"{'#' * block.level} {block.text}"
        elif block.kind == "code":
            fence = "```" if "```" not in block.text else "~~~~"
            yield f"{fence}{block.mark}\n{block.text}\n{fence}"
        elif block.kind == "item":
            indent = "  " * block.level
            yield f"{indent}{block.mark}" + block.text.replace("\n", f"\n{indent}  ")
        elif block.kind == "row":
            yield f"| {block.text} |"
            if not together:
                yield f"| {' | '.join(['---'] * block.level)} |"
        else:
            yield block.text
        before = block
