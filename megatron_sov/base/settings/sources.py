"""Read settings from `--set key=value` options and from YAML or JSON with the line number of every value."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from megatron_sov.base.settings.problem import (
    UNSET, ProblemCode, SettingsError, SettingsProblem, shorten_text)
from megatron_sov.base.settings.reading import (
    KeyHint, get_inner_hint, list_fields, no_hint, parse_settings, to_plain_values, unknown_key_problem)

S = TypeVar("S")  # a settings class
EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
"""Floats with an exponent, with or without a point."""
WHOLE = re.compile(r"[-+]?(?:0o[0-7]+|0\d+)\Z")
"""Integers that YAML 1.1 reads otherwise than YAML 1.2: 010 (as 8) and 0o10 (as text)."""
BASES = {"0b": 2, "0o": 8, "0x": 16}
"""Prefix of an integer -> its base."""
MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 100_000
"""Limit on values after expanding aliases: a few aliases can expand to gigabytes."""
WAYS_OUT = {
    "mapping values are not allowed here":
        "a text with `: ` in it stands in quotes, and a key with settings below it has a colon at its end",
    "found character '\\t' that cannot start any token": "indent with blanks, not with tabs"}
"""Frequent YAML parser error -> fix."""
Place = tuple[str | int, ...]
"""Keys and list indices on the path to a value."""
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_MAX_INTEGER = 1e19
"""Whole floats from here on stay floats: no count is that large."""


@dataclass
class LocatedDocument:
    """A parsed document with a line per value."""

    value: Any = None
    """Plain dictionaries, lists and scalars."""
    lines: dict[Place, int] = field(default_factory=dict)
    """Value path -> line, from 1."""
    problems: list[SettingsProblem] = field(default_factory=list)
    """Mistakes in the YAML itself."""

    def line(self, place: Place) -> int:
        """Return a value's line, or the nearest enclosing value's line."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_settings_file(cls: type[S], file: Path, where: str = "", *, rules: bool = True) -> S:
    """Read settings from a YAML or JSON file. `where`: beginning of error messages ("": the path); `rules`:
    as in `parse_settings`. Raises `SettingsError`: all problems with their lines."""
    where = where or str(file)
    return parse_settings_yaml(cls, read_settings_text(file, where), where, rules=rules)


def parse_settings_yaml(cls: type[S], text: str, where: str, *, rules: bool = True) -> S:
    """Parse settings from a YAML or JSON document; see `read_settings_file`."""
    located = parse_located_yaml(text)
    if located.problems:
        raise SettingsError(where, located.problems)
    return parse_settings(cls, {} if located.value is None else located.value, where, lines=located.lines,
                          rules=rules)


def read_settings_text(file: Path, where: str = "") -> str:
    """Read a file as text. Raises `SettingsError`: unreadable, longer than `MAX_BYTES`, or not UTF-8."""
    where = where or str(file)
    try:
        size_bytes = file.stat().st_size
        if size_bytes > MAX_BYTES:
            raise _refuse_file(where, f"has {size_bytes:,} bytes, and a file of settings at most "
                               f"{MAX_BYTES:,}", "pass another file")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise _refuse_file(where, f"is not valid UTF-8 (byte {e.start} is {e.object[e.start]:#04x})",
                           "pass a YAML file") from None
    except OSError as e:
        raise _refuse_file(where, f"cannot be read ({e.strerror})", "check the path and its permissions"
                           ) from None


def _refuse_file(where: str, fault: str, fix: str) -> SettingsError:
    return SettingsError(where, [SettingsProblem(ProblemCode.FILE, "", fault, way_out=fix)])


@cache
def _build_loader() -> Any:
    """Return PyYAML's safe loader, extended by numbers like 2e9 and 10.8e12, which are text in YAML 1.1."""
    class Loader(yaml.SafeLoader):
        """Reads numbers as in YAML 1.2 and JSON."""

    # YAML 1.1 requires a point and a sign in the exponent; users write 2e9
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", WHOLE, list("-+0"))
    Loader.add_constructor("tag:yaml.org,2002:int", _parse_integer)
    return Loader


def _parse_integer(loader: Any, node: Any) -> int | str:
    """Parse an integer as in YAML 1.2: 010 is 10 (8 in YAML 1.1), and 1:30 stays text (90 in YAML 1.1)."""
    text = loader.construct_scalar(node).replace("_", "").lower()
    if ":" in text:
        return str(node.value)
    prefix = text.lstrip("-+")[:2]
    return int(text, BASES.get(prefix, 10))


def parse_located_yaml(text: str) -> LocatedDocument:
    """Parse a YAML or JSON document to plain values; tags that create objects are problems."""
    value, repeated_keys = _parse_json(text)
    if value is UNSET:
        return _read_yaml(text)
    # read again as YAML for the lines. Of YAML's problems only repeated keys count: it also rejects tabs and
    # misreads surrogate pairs (\ud83d\ude00)
    located = _read_yaml(text.replace("\t", " "))
    located.problems = [problem for problem in located.problems if problem.code == ProblemCode.TWICE]
    if not located.problems:  # if YAML stopped before a repeated key, its line is unknown
        located.problems = [SettingsProblem(ProblemCode.TWICE, key, "is set twice", way_out="set it once")
                            for key in repeated_keys]
    located.value = None if located.problems else value
    return located


def _parse_json(text: str) -> tuple[Any, list[str]]:
    """Parse a JSON object or list; return its value, `UNSET` if the text is not JSON, and repeated keys."""
    repeated_keys: list[str] = []

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        counts = Counter(key for key, _ in pairs)
        repeated_keys.extend(key for key, count in counts.items() if count > 1)
        return mapping

    value = UNSET
    if text.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text, parse_float=_parse_number, object_pairs_hook=build_object)
    return value, repeated_keys


def _parse_number(text: str) -> float:
    """Parse a float; with an exponent, whole values become integers (users write token counts as 2e9)."""
    value = float(text)
    return int(value) if EXPONENT.match(text) and value.is_integer() else value


def _read_yaml(text: str) -> LocatedDocument:
    """Parse YAML; faults become problems of the document."""
    located = LocatedDocument()
    # a loader for `finally`: the constructor in the `try` block raises on characters that YAML forbids
    loader = _build_loader()("")
    try:
        loader = _build_loader()(text)
        node = loader.get_single_node()
        if node is not None:
            located.value = _NodeConverter(loader, located).convert(node, (), 0)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        message = e.problem or e.context or ""
        located.problems.append(SettingsProblem(
            ProblemCode.FILE, "", f"is not valid YAML ({message})", line=mark.line + 1 if mark else 1,
            way_out=WAYS_OUT.get(message, "correct the line")))
    except RecursionError:
        located.problems.append(SettingsProblem(ProblemCode.FILE, "", f"is nested more than {MAX_DEPTH} deep",
                                                line=1, way_out="make it flatter"))
    except yaml.YAMLError as e:
        located.problems.append(SettingsProblem(
            ProblemCode.FILE, "", f"is not valid YAML ({' '.join(str(e).split())})", line=1,
            way_out="correct the file"))
    finally:
        loader.dispose()
    return located


class _NodeConverter:
    """Converts YAML nodes to plain values, expanding aliases at each use."""

    def __init__(self, loader: Any, located: LocatedDocument) -> None:
        self.loader, self.located, self.num_values = loader, located, 0

    def convert(self, node: Any, place: Place, depth: int) -> Any:
        """Return a node's value; record lines and problems. Raises `MarkedYAMLError`: too deep or large."""
        line = node.start_mark.line + 1
        self.num_values += 1
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {MAX_DEPTH} deep",
                                       problem_mark=node.start_mark)
        # aliases count at each use: ten levels of ten aliases make 10^10 values
        if self.num_values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"its aliases make more than {MAX_VALUES:,} values",
                                       problem_mark=node.start_mark)
        # `_convert_mapping` replaces this line with the line of the key
        self.located.lines.setdefault(place, line)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(child, (*place, i), depth + 1) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._convert_mapping(node, place, depth)
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError):
            # a tag rejects values with its own kind of exception: `!!int ''`, `!!timestamp soon`
            self._report(line, place, f"{node.tag} {str(node.value)[:60]!r} is not a plain value",
                         "write text, numbers, true or false")
            return None
        if isinstance(value, float) and EXPONENT.match(node.value):
            return _parse_number(node.value)
        # dates and similar values stay text
        return value if value is None or isinstance(value, (str, int, float, bool)) else node.value

    def _convert_mapping(self, node: Any, place: Place, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, child in node.value:
            line, key = key_node.start_mark.line + 1, getattr(key_node, "value", None)
            if key_node.tag == "tag:yaml.org,2002:merge":
                for alias in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    if isinstance(alias, yaml.MappingNode):
                        # YAML: earlier merged mappings win over later ones, and own keys win over merged keys
                        merged = {**self.convert(alias, place, depth + 1), **merged}
                    else:
                        self._report(line, place, "<< takes an alias of a mapping", "")
            elif not isinstance(key_node, yaml.ScalarNode) or not isinstance(key, str):
                self._report(line, place, "a key must be a word, not a list or a mapping", "")
            elif key in mapping:
                self.located.problems.append(SettingsProblem(
                    ProblemCode.TWICE, ".".join(map(str, (*place, key))), "is set twice",
                    way_out="set it once", line=line))
            else:
                mapping[key] = self.convert(child, (*place, key), depth + 1)
                self.located.lines[*place, key] = line
        return {**merged, **mapping}

    def _report(self, line: int, place: Place, rule: str, way_out: str) -> None:
        key = ".".join(map(str, place))
        self.located.problems.append(SettingsProblem(ProblemCode.TYPE, key, rule, way_out=way_out, line=line))


def parse_changes(changes: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Parse `key=value` changes to key -> value; the last change of a key wins, so users can override
    scripts.

    Values are JSON if they parse as JSON (`true`, `1e-4`, `{"en": 1}`, `null`), otherwise text.

    Args:
        changes: arguments of the option, in order.
        option: its name, for error messages.

    Raises:
        SettingsError: changes without "=" or with broken JSON.
    """
    values: dict[str, Any] = {}
    problems: list[SettingsProblem] = []
    for text in changes:
        key, equals, value = text.partition("=")
        # `a..b=1` and `=1` have an empty part
        if not equals or not all(key.split(".")):
            problems.append(SettingsProblem(ProblemCode.FORM, "",
                                            f"{shorten_text(text)!r} must have the form key=value"))
        else:
            try:
                values[key] = parse_value(value)
            except (ValueError, RecursionError) as e:
                problems.append(SettingsProblem(
                    ProblemCode.JSON, key, f"{shorten_text(value)} begins like JSON but does not parse ({e})",
                    way_out="close all quotes and brackets, put text into double quotes, and the whole "
                    "setting into single quotes"))
    if problems:
        raise SettingsError(option, problems)
    return values


def format_change(key: str, value: Any) -> str:
    """Format a setting as `key=value`, the inverse of `parse_changes`; values other than text become JSON."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def parse_value(text: str) -> Any:
    """Parse a value as JSON or text; raise ValueError for invalid text that begins like JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith(("{", "[", '"')):
            raise
        return _PYTHON_WORDS.get(text, text)
    # users write token counts as 1e9
    is_integer = isinstance(value, float) and value.is_integer() and abs(value) < _MAX_INTEGER
    return int(value) if is_integer else value


def parse_nested(changes: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Parse `key=value` changes to nested dictionaries: dots in keys separate levels. Raises `SettingsError`:
    as `parse_changes`, or a key has both a value and fields."""
    values: dict[str, Any] = {}
    for key, value in parse_changes(changes, option).items():
        *path, last = key.split(".")
        node: Any = values
        for depth, part in enumerate(path):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                rule = f"{'.'.join(path[:depth + 1])} is a value and has no fields"
                raise SettingsError(option, [SettingsProblem(ProblemCode.UNKNOWN, key, rule)])
        node[last] = value
    return values


def apply_changes(settings: S, changes: Iterable[str], option: str = "--set", *,
                  instead: KeyHint = no_hint, rules: bool = True) -> S:
    """Return settings with `key=value` changes applied, e.g. ``train.steps=100`` or ``phases.0.seq_len=512``;
    `option` is named in error messages, `instead` and `rules`: see `parse_settings`. Raises
    `SettingsError`."""
    raw = assign_values(settings, parse_changes(changes, option), option, instead)
    return parse_settings(type(settings), raw, option, instead=instead, rules=rules)


def assign_values(settings: Any, changes: Mapping[str, Any], option: str,
                  instead: KeyHint = no_hint) -> dict[str, Any]:
    """Return plain settings with values assigned by dotted key. Raises `SettingsError`: unknown keys."""
    raw = to_plain_values(settings)
    results = [_assign_value(type(settings), raw, key, value, instead) for key, value in changes.items()]
    problems = [problem for problem in results if problem]
    if problems:
        raise SettingsError(option, problems)
    return raw


def _assign_value(cls: Any, raw: Any, key: str, value: Any, instead: KeyHint) -> SettingsProblem | None:
    """Assign a value inside plain settings `raw` for class `cls`; return the key's problem, if any."""
    parts = key.split(".")
    node, hint = raw, cls  # the value on the path to the key, and its declared type
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        # dotted keys change list items and never append
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                rule = f"the last item of {above} is {len(node) - 1}" if node else f"{above} has no items"
                return SettingsProblem(ProblemCode.UNKNOWN, key, rule)
        elif not isinstance(node, dict):
            return SettingsProblem(ProblemCode.UNKNOWN, key, f"{above} is a value and has no fields")
        elif dataclasses.is_dataclass(hint) and part not in list_fields(cast(Any, hint)):
            unknown_key = ".".join(parts[:depth + 1])
            return unknown_key_problem(unknown_key, list_fields(cast(Any, hint)), instead(unknown_key))
        index: Any = int(part) if isinstance(node, list) else part
        hint = get_inner_hint(hint, part)
        if depth == len(parts) - 1:
            node[index] = value
        else:
            child = node[index] if isinstance(node, list) else node.get(index)
            if child is None:  # assigning inside a disabled group enables the group with default values
                child = node[index] = {}
            node = child
    return None
