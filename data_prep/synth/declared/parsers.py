"""Parsers that a step `parse` names: how fields are read from a reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from megatron_sov.judge.rewards.patterns import parse_json
from megatron_sov.judge.rewards.reward import Refused

TIMEOUT_S = 2.0
MAX_CHARS, MAX_PARTS = 4000, 100
"""Of one text in JSON, and texts of a list: samples that one reply may become."""


def read_tagged(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """Return the texts between the tags of each name, in order, each once and not empty; None where a reply
    has another form.  Words around the tags are left out."""
    found: dict[str, str] = {}
    place = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        # a document that has such a tag itself makes two, and it is unknown which one is meant
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        start, stop = text.index(opening) + len(opening), text.index(closing)
        if start < place or stop <= start or not (part := text[start:stop].strip()):
            return None
        found[name], place = part, stop + len(closing)
    return found


def read_json_list(reply: str, names: Sequence[str]) -> list[dict[str, str]] | None:
    """Read a list of objects with these texts; those without them, or that repeat the first, are left out."""
    try:
        listed = parse_json(reply.strip())
    except Refused:
        return None
    found: dict[str, dict[str, str]] = {}
    for one in listed if isinstance(listed, list) else ():
        texts = {name: text.strip() for name in names if isinstance(one, dict)
                 and isinstance(text := one.get(name), str) and len(text) <= MAX_CHARS}
        if len(texts) == len(names) and all(texts.values()):
            found.setdefault(texts[names[0]], texts)
    return list(found.values())[:MAX_PARTS] or None


def read_pattern(reply: str, pattern: str) -> dict[str, str] | None:
    """Read the named groups of a regular expression."""
    try:
        found = regex.search(pattern, reply.strip(), regex.DOTALL | regex.MULTILINE, timeout=TIMEOUT_S)
    except TimeoutError:
        return None
    return {name: text.strip() for name, text in found.groupdict("").items()} if found else None


def _names(argument: Any) -> Sequence[str] | str:
    if isinstance(argument, list) and argument and all(
            isinstance(name, str) and name.isidentifier() for name in argument):
        return argument
    return "must be a list of names, such as [question, answer]"


def _groups(argument: Any) -> Sequence[str] | str:
    try:
        groups = list(regex.compile(argument).groupindex)
    except (regex.error, TypeError) as e:
        return f"is no regular expression ({e})"
    return groups or "has no named group, such as (?P<answer>.+)"


@dataclass(frozen=True)
class Parser:
    """Reads fields, by an argument that the file gives."""

    read: Callable[[str, Any], Any]
    """Reply and argument -> fields, or a list of fields where `gives_several`; None: it has another form."""
    gives_several: bool = False
    names: Callable[[Any], Sequence[str] | str] = _names
    """Argument -> the fields that it gives, or a sentence with its mistake."""


PARSERS: Mapping[str, Parser] = {
    "tagged": Parser(read_tagged), "json_list": Parser(read_json_list, gives_several=True),
    "pattern": Parser(read_pattern, names=_groups)}
"""Name in a step -> parser."""
