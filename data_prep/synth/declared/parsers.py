"""Parsers for replies, named by `parse` steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from megatron_sov.judge.rewards.patterns import parse_json
from megatron_sov.judge.rewards.reward import Refused

TIMEOUT_S = 2.0
MAX_CHARS, MAX_PARTS = 4000, 100
"""Limits for `json_list`: characters per text, and samples per reply."""


def parse_tagged_texts(reply: str, names: Sequence[str]) -> dict[str, str] | None:
    """Parse `<name>text</name>` for each name, in order; words between tags are ignored.

    Returns:
        name -> text; None if a tag is missing, repeated, empty or out of order.
    """
    texts: dict[str, str] = {}
    position = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        # a document may contain the tag itself, and either tag could be the model's
        if reply.count(opening) != 1 or reply.count(closing) != 1:
            return None
        start, stop = reply.index(opening) + len(opening), reply.index(closing)
        text = reply[start:stop].strip()
        if start < position or stop <= start or not text:
            return None
        texts[name], position = text, stop + len(closing)
    return texts


def parse_json_list(reply: str, names: Sequence[str]) -> list[dict[str, str]] | None:
    """Parse a JSON list with objects that hold the texts `names`; omit incomplete objects and repeats."""
    try:
        items = parse_json(reply.strip())
    except Refused:
        return None
    parsed: dict[str, dict[str, str]] = {}
    for item in items if isinstance(items, list) else ():
        texts = {}
        for name in names if isinstance(item, dict) else ():
            text = item.get(name)
            if isinstance(text, str) and text.strip() and len(text) <= MAX_CHARS:
                texts[name] = text.strip()
        if len(texts) == len(names):
            parsed.setdefault(texts[names[0]], texts)
    return list(parsed.values())[:MAX_PARTS] or None


def parse_pattern(reply: str, pattern: str) -> dict[str, str] | None:
    """Parse a regular expression's named groups."""
    try:
        match = regex.search(pattern, reply.strip(), regex.DOTALL | regex.MULTILINE, timeout=TIMEOUT_S)
    except TimeoutError:
        return None
    return {name: text.strip() for name, text in match.groupdict("").items()} if match else None


def _find_listed_names(argument: Any) -> Sequence[str] | str:
    if isinstance(argument, list) and argument and all(
            isinstance(name, str) and name.isidentifier() for name in argument):
        return argument
    return "must be a list of names, such as [question, answer]"


def _find_group_names(argument: Any) -> Sequence[str] | str:
    try:
        groups = list(regex.compile(argument).groupindex)
    except (regex.error, TypeError) as e:
        return f"is no regular expression ({e})"
    return groups or "has no named group, such as (?P<answer>.+)"


@dataclass(frozen=True)
class ResponseParser:
    """Parses fields from a reply, with an argument from the file."""

    parse: Callable[[str, Any], Any]
    """(reply, argument) -> fields, or list if `returns_list`; None: the reply has another form."""
    returns_list: bool = False
    find_field_names: Callable[[Any], Sequence[str] | str] = _find_listed_names
    """Argument -> field names, or a problem sentence."""


PARSERS: Mapping[str, ResponseParser] = {
    "tagged": ResponseParser(parse_tagged_texts),
    "json_list": ResponseParser(parse_json_list, returns_list=True),
    "pattern": ResponseParser(parse_pattern, find_field_names=_find_group_names)}
"""Name in a `parse` step -> parser."""
