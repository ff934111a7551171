"""Parsers that a step `parse` names: how fields are read from a reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import regex

from data_prep.synth.generators.documents.verdicts import read_list, read_tagged
from megatron_sov.judge.rewards.patterns import json_of
from megatron_sov.judge.rewards.reward import Refused

TIMEOUT_S = 2.0
MAX_CHARS = 4000
"""Of one text in a list of JSON."""
Found = Any
"""Fields, or a list of fields where `gives_several`; None: the reply has another form."""


class Parser(ABC):
    """Reads fields."""

    gives_several: ClassVar[bool] = False

    def names(self, argument: Any) -> Sequence[str]:
        """Return the fields that it gives."""
        return list(argument)

    def problem(self, argument: Any) -> str:
        """Return what is wrong with the argument in a file; "": nothing."""
        listed = argument if isinstance(argument, list) else []
        sound = listed and all(isinstance(name, str) and name.isidentifier() for name in listed)
        return "" if sound else "must be a list of names, such as [question, answer]"

    @abstractmethod
    def read(self, reply: str, argument: Any) -> Found:
        """Read a reply."""


class Tagged(Parser):
    """`<name>...</name>`, each once and in order."""

    def read(self, reply: str, argument: Any) -> Found:
        return read_tagged(reply, *argument)


class TaggedList(Parser):
    """Groups of tags that follow each other."""

    gives_several = True

    def read(self, reply: str, argument: Any) -> Found:
        return read_list(reply, *argument)


class JsonObject(Parser):
    """An object of JSON with these texts."""

    def read(self, reply: str, argument: Any) -> Found:
        return _texts(_json(reply), argument)


class JsonList(Parser):
    """A list of JSON objects with these texts; those without them, and those that repeat the first, are left
    out."""

    gives_several = True

    def read(self, reply: str, argument: Any) -> Found:
        listed = _json(reply)
        found: dict[str, Mapping[str, str]] = {}
        for one in listed if isinstance(listed, list) else ():
            if (texts := _texts(one, argument)) is not None:
                found.setdefault(texts[argument[0]], texts)
        return list(found.values()) or None


class Lines(Parser):
    """Each line, without a mark or number at its beginning."""

    gives_several = True

    def names(self, argument: Any) -> Sequence[str]:
        return [argument]

    def problem(self, argument: Any) -> str:
        return "" if isinstance(argument, str) and argument.isidentifier() else "must be the name of a field"

    def read(self, reply: str, argument: Any) -> Found:
        lines = [regex.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line).strip() for line in reply.split("\n")]
        return [{argument: line} for line in dict.fromkeys(filter(None, lines))] or None


class Pattern(Parser):
    """The named groups of a regular expression."""

    def names(self, argument: Any) -> Sequence[str]:
        return list(regex.compile(argument).groupindex) if not self.problem(argument) else []

    def problem(self, argument: Any) -> str:
        try:
            groups = regex.compile(argument).groupindex
        except (regex.error, TypeError) as e:
            return f"is no regular expression ({e})"
        return "" if groups else "has no named group, such as (?P<answer>.+)"

    def read(self, reply: str, argument: Any) -> Found:
        try:
            found = regex.search(argument, reply.strip(), regex.DOTALL | regex.MULTILINE, timeout=TIMEOUT_S)
        except TimeoutError:
            return None
        return {name: text.strip() for name, text in found.groupdict("").items()} if found else None


PARSERS: Mapping[str, Parser] = {"tagged": Tagged(), "list": TaggedList(), "json": JsonObject(),
                                 "json_list": JsonList(), "lines": Lines(), "pattern": Pattern()}
"""Name in a step -> parser."""


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
