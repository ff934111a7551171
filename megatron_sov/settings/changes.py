"""`key=value`, as `--set` and its like take it: read, and applied to settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, TypeVar, cast

from megatron_sov.settings.problem import Code, Problem, SettingsError
from megatron_sov.settings.reading import Instead, fields_of, hint_below, no_other, plain, read, unknown

S = TypeVar("S")
_WORDS = {"True": True, "False": False, "None": None}
_EXACT = 2.0 ** 53


def parse_changes(given: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return key -> value of `key=value` changes, in their order.

    Values are read as JSON where they parse (`true`, `1e-4`, `{"en": 1}`, `null`), else as text.

    Args:
        given: what stands behind the option, each time.
        option: that they are given by, for sentences.

    Raises:
        SettingsError: some have another form, broken JSON, or are set twice.
    """
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(Problem(Code.FORM, "", f"{text!r} must have the form key=value"))
        elif key in found:
            problems.append(Problem(Code.TWICE, key, "is set twice", way_out="set it once"))
        else:
            try:
                found[key] = parse_value(value)
            except (ValueError, RecursionError) as e:
                problems.append(Problem(
                    Code.JSON, key, f"begins like JSON and is none ({e})", value, "close what is open and "
                    "put the whole setting into single quotes; a text stands in double quotes inside these"))
                found[key] = None
    if problems:
        raise SettingsError(option, problems)
    return found


def parse_value(text: str) -> Any:
    """Return what a text stands for; raises ValueError where it begins like JSON and is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith(("{", "[", '"')):
            raise
        return _WORDS.get(text, text)
    # 1e9 is how people write a whole number of tokens
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value


def parse_nested(given: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return changes as nested values, where there are no settings that they change: dots lead inwards.

    Raises:
        SettingsError: as `parse_changes`, and a key that was set to a value and has fields.
    """
    found: dict[str, Any] = {}
    for key, value in parse_changes(given, option).items():
        *path, last = key.split(".")
        node: Any = found
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise SettingsError(option, [Problem(Code.TWICE, key, "is set as a whole and by its fields",
                                                 way_out="set one of them")])
        node[last] = value
    return found


def change(settings: S, given: Iterable[str], option: str = "--set", *,
           instead: Instead = no_other, rules: bool = True) -> S:
    """Return settings with `key=value` changes applied, e.g. ``train.steps=100`` or ``phases.0.seq_len=512``.

    Args:
        settings: a frozen dataclass.
        given: the changes.
        option: that they are given by, for sentences.
        instead: what to say of keys that do not exist.
        rules: whether the rules between settings are asked too (`problems()`).

    Raises:
        SettingsError: all that is wrong with them.
    """
    raw = plain(settings)
    problems = [problem for key, value in parse_changes(given, option).items()
                if (problem := assign(type(settings), raw, key, value, instead))]
    if problems:
        raise SettingsError(option, problems)
    return read(type(settings), raw, option, instead=instead, rules=rules)


def assign(cls: Any, raw: Any, key: str, value: Any, instead: Instead = no_other) -> Problem | None:
    """Set one value inside plain settings.

    Args:
        cls: the dataclass that they are of.
        raw: the plain settings, changed in place.
        key: where, with dots.
        value: plain.
        instead: see `change`.

    Returns:
        What is wrong with the key.
    """
    parts, node, hint = key.split("."), raw, cls
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                return Problem(Code.UNKNOWN, key, f"the last item of {above} is {len(node) - 1}"
                               if node else f"{above} has no items")
        elif not isinstance(node, dict):
            return Problem(Code.UNKNOWN, key, f"{above} is a value and has no fields")
        elif dataclasses.is_dataclass(hint) and part not in fields_of(cast(Any, hint)):
            here = ".".join(parts[:depth + 1])
            return unknown(here, fields_of(cast(Any, hint)), instead(here))
        index: Any = int(part) if isinstance(node, list) else part
        hint = hint_below(hint, part)
        if depth == len(parts) - 1:
            node[index] = value
        else:
            below = node[index] if isinstance(node, list) else node.get(index)
            if below is None:  # a block that is off is made of its own defaults
                below = node[index] = {}
            node = below
    return None
