"""`key=value`, as `--set` and its like take it: read, and applied to settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from megatron_sov.base.settings.problem import ProblemCode, SettingsError, SettingsProblem, cut
from megatron_sov.base.settings.reading import Instead, fields_of, hint_below, no_other, plain, read, unknown

C = TypeVar("S")
_WORDS = {"True": True, "False": False, "None": None}
_MAX_WHOLE = 1e19


def parse_changes(given: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return key -> value of `key=value` changes; of a key that is given twice the last one counts, so that
    what a script says can be overridden behind it.

    Values are read as JSON where they parse (`true`, `1e-4`, `{"en": 1}`, `null`), else as text.

    Args:
        given: what stands behind the option, each time.
        option: that they are given by, for sentences.

    Raises:
        SettingsError: some have another form, or broken JSON.
    """
    found: dict[str, Any] = {}
    problems: list[SettingsProblem] = []
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(SettingsProblem(ProblemCode.FORM, "",
                                            f"{cut(text)!r} must have the form key=value"))
        else:
            try:
                found[key] = parse_value(value)
            except (ValueError, RecursionError) as e:
                problems.append(SettingsProblem(
                    ProblemCode.JSON, key, f"{cut(value)} begins like JSON and is none ({e})",
                    way_out="close what "
                    "is open, put a text into double quotes, and the whole setting into single ones"))
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
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < _MAX_WHOLE
    return int(value) if is_whole else value


def parse_nested(given: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return changes as nested values, where there are no settings that they change: dots lead inwards.

    Raises:
        SettingsError: as `parse_changes`, and a key that was set to a value and has fields.
    """
    found: dict[str, Any] = {}
    for key, value in parse_changes(given, option).items():
        *path, last = key.split(".")
        node: Any = found
        for depth, part in enumerate(path):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                rule = f"{'.'.join(path[:depth + 1])} is a value and has no fields"
                raise SettingsError(option, [SettingsProblem(ProblemCode.UNKNOWN, key, rule)])
        node[last] = value
    return found


def change(settings: C, given: Iterable[str], option: str = "--set", *,
           instead: Instead = no_other, rules: bool = True) -> C:
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
    raw = assign_all(settings, parse_changes(given, option), option, instead)
    return read(type(settings), raw, option, instead=instead, rules=rules)


def assign_all(settings: Any, given: Mapping[str, Any], option: str, instead: Instead = no_other
               ) -> dict[str, Any]:
    """Return settings as plain values, with the given values in their places.

    Raises:
        SettingsError: naming every key that does not exist.
    """
    raw = plain(settings)
    problems = [problem for key, value in given.items()
                if (problem := _assign(type(settings), raw, key, value, instead))]
    if problems:
        raise SettingsError(option, problems)
    return raw


def _assign(cls: Any, raw: Any, key: str, value: Any, instead: Instead) -> SettingsProblem | None:
    """Set one value inside plain settings of a class, and return what is wrong with its key."""
    parts, node, hint = key.split("."), raw, cls
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                return SettingsProblem(ProblemCode.UNKNOWN, key,
                                       f"the last item of {above} is {len(node) - 1}"
                                       if node else f"{above} has no items")
        elif not isinstance(node, dict):
            return SettingsProblem(ProblemCode.UNKNOWN, key, f"{above} is a value and has no fields")
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
