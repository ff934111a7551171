"""Parsers that a step `parse` names: how fields are read from a reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from data_prep.synth.generators.documents.verdicts import read_list, read_tagged
from megatron_sov.judge.rewards.patterns import json_of
from megatron_sov.judge.rewards.reward import Refused

TIMEOUT_S = 2.0
MAX_CHARS = 4000
"""Of one text in a list of JSON."""


def find_problem(argument: Any) -> str:
    """Return what is wrong with a list of names in a file; "": nothing."""
    listed = argument if isinstance(argument, list) else []
    sound = listed and all(isinstance(name, str) and name.isidentifier() for name in listed)
    return "" if sound else "must be a list of names, such as [question, answer]"


@dataclass(frozen=True)
class Parser:
    """Reads fields, by an argument that the file gives."""

    read: Callable[[str, Any], Any]
    """Reply and argument -> fields, or a list of fields where `gives_several`; None: it has another form."""
    gives_several: bool = False
    names: Callable[[Any], Sequence[str]] = list
    """Argument -> the fields that it gives."""
    problem: Callable[[Any], str] = find_problem


def read_json_list(reply: str, names: Sequence[str]) -> list[Mapping[str, str]] | None:
    """Read a list of objects with these texts; those without them, or that repeat the first, are left out."""
    listed = _json(reply)
    found: dict[str, Mapping[str, str]] = {}
    for one in listed if isinstance(listed, list) else ():
        if (texts := _texts(one, names)) is not None:
            found.setdefault(texts[names[0]], texts)
    return list(found.values()) or None


def read_lines(reply: str, name: str) -> list[dict[str, str]] | None:
    """Read each line, without a mark or number at its beginning."""
    lines = [regex.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line).strip() for line in reply.split("\n")]
    return [{name: line} for line in dict.fromkeys(filter(None, lines))] or None


def read_pattern(reply: str, pattern: str) -> dict[str, str] | None:
    """Read the named groups of a regular expression."""
    try:
        found = regex.search(pattern, reply.strip(), regex.DOTALL | regex.MULTILINE, timeout=TIMEOUT_S)
    except TimeoutError:
        return None
    return {name: text.strip() for name, text in found.groupdict("").items()} if found else None


def _pattern_problem(pattern: Any) -> str:
    try:
        groups = regex.compile(pattern).groupindex
    except (regex.error, TypeError) as e:
        return f"is no regular expression ({e})"
    return "" if groups else "has no named group, such as (?P<answer>.+)"


def _json(reply: str) -> Any:
    try:
        return json_of(reply.strip())
    except Refused:
        return None


def _texts(value: Any, names: Sequence[str]) -> dict[str, str] | None:
    """Return the texts of an object; None: one is missing, empty or too long."""
    found = {name: text.strip() for name in names if isinstance(value, dict)
             and isinstance(text := value.get(name), str) and len(text) <= MAX_CHARS}
    return found if len(found) == len(names) and all(found.values()) else None


PARSERS: Mapping[str, Parser] = {
    "tagged": Parser(lambda reply, names: read_tagged(reply, *names)),
    "list": Parser(lambda reply, names: read_list(reply, *names), gives_several=True),
    "json": Parser(lambda reply, names: _texts(_json(reply), names)),
    "json_list": Parser(read_json_list, gives_several=True),
    "lines": Parser(read_lines, gives_several=True, names=lambda name: [name],
                    problem=lambda name: find_problem([name]) and "must be the name of a field"),
    "pattern": Parser(read_pattern, problem=_pattern_problem, names=lambda pattern: (
        [] if _pattern_problem(pattern) else list(regex.compile(pattern).groupindex)))}
"""Name in a step -> parser."""
