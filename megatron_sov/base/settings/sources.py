"""Settings as people write them: `key=value` of `--set` and its like, and YAML whose every value knows its
line, so that a mistake found later can still be pointed at.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from megatron_sov.base.settings.problem import UNSET, ProblemCode, SettingsError, SettingsProblem, cut
from megatron_sov.base.settings.reading import Instead, fields_of, hint_below, no_other, plain, read, unknown

S = TypeVar("S")
EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
WHOLE = re.compile(r"[-+]?(?:0o[0-7]+|0\d+)\Z")
"""Whole numbers of YAML 1.2 that are none in YAML 1.1, or others."""
BASES = {"0b": 2, "0o": 8, "0x": 16}
MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 100_000
"""A few aliases can stand for gigabytes."""
WAYS_OUT = {
    "mapping values are not allowed here":
        "a text with `: ` in it stands in quotes, and a key with settings below it has a colon at its end",
    "found character '\\t' that cannot start any token": "indent with blanks, not with tabs"}
"""What YAML's parser says where people err most, and what is meant."""
Place = tuple[str | int, ...]
"""Keys and list positions that lead to a value."""


@dataclass
class Located:
    """What a file says, and where."""

    value: Any = None
    """Plain dictionaries, lists and scalars."""
    lines: dict[Place, int] = field(default_factory=dict)
    """Place of each value -> its line, from 1."""
    problems: list[SettingsProblem] = field(default_factory=list)
    """Each mistake in the YAML itself."""

    def line(self, place: Place) -> int:
        """Return the line of a value, or of the nearest one around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_file(cls: type[S], file: Path, where: str = "", *, rules: bool = True) -> S:
    """Return the settings in a YAML or JSON file.

    Args:
        cls: a frozen dataclass.
        file: the file.
        where: what a message begins with, e.g. "--cluster big.yaml"; "": the file.
        rules: see `read`.

    Raises:
        SettingsError: all that is wrong, with its line.
    """
    where = where or str(file)
    return read_yaml(cls, read_text(file, where), where, rules=rules)


def read_yaml(cls: type[S], text: str, where: str, *, rules: bool = True) -> S:
    """Return the settings in a text of YAML or JSON; see `read_file`."""
    located = read_located(text)
    if located.problems:
        raise SettingsError(where, located.problems)
    return read(cls, {} if located.value is None else located.value, where, lines=located.lines, rules=rules)


def read_text(file: Path, where: str = "") -> str:
    """Return the text of a file of settings.

    Raises:
        SettingsError: it cannot be read, is too long or is no text.
    """
    where = where or str(file)
    try:
        size_bytes = file.stat().st_size
        if size_bytes > MAX_BYTES:
            raise _refuse_file(where, f"has {size_bytes:,} bytes, and a file of settings at most "
                               f"{MAX_BYTES:,}", "pass another file")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise _refuse_file(where, f"is no text in UTF-8 (byte {e.start} is {e.object[e.start]:#04x})",
                           "pass a YAML file") from None
    except OSError as e:
        raise _refuse_file(where, f"cannot be read ({e.strerror})", "check the path and its permissions"
                           ) from None


def _refuse_file(where: str, rule: str, way_out: str, line: int = 0) -> SettingsError:
    return SettingsError(where, [SettingsProblem(ProblemCode.FILE, "", rule, way_out=way_out, line=line)])


@cache
def _loader() -> Any:
    """Return PyYAML's safe loader, with numbers such as 2e9 and 10.8e12, which YAML 1.1 takes for text."""
    import yaml  # here, since the parsers of commands start without it

    class Loader(yaml.SafeLoader):
        """Reads numbers as YAML 1.2 and JSON have them."""

    # YAML 1.1 wants a point and a sign in the exponent; people write 2e9
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", WHOLE, list("-+0"))
    Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
    return Loader


def _whole_number(loader: Any, node: Any) -> int | str:
    """Return a whole number; in YAML 1.1 010 would be 8, and 1:30 would be 90."""
    text = loader.construct_scalar(node).replace("_", "").lower()
    return node.value if ":" in text else int(text, BASES.get(text.lstrip("-+")[:2], 10))


def read_located(text: str) -> Located:
    """Read a YAML or JSON document as plain values.  Tags that would make objects are not taken."""
    twice: list[str] = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        counts = Counter(key for key, _ in pairs)
        twice.extend(key for key, count in counts.items() if count > 1)
        return made

    try:
        # JSON is read as JSON: YAML differs from it in tabs, surrogate pairs and limits
        value = (json.loads(text, parse_float=_number, object_pairs_hook=as_object)
                 if text.lstrip().startswith(("{", "[")) else UNSET)
    except (ValueError, RecursionError):
        value = UNSET
    if value is UNSET:
        return _read_yaml(text)
    # YAML takes no tabs, reads \ud83d\ude00 as two halves of a sign and has limits of its own: it gives lines
    found = _read_yaml(text.replace("\t", " "))
    found.problems = [p for p in found.problems if p.code == ProblemCode.TWICE] or [
        SettingsProblem(ProblemCode.TWICE, key, "is set twice", way_out="set it once") for key in twice]
    found.value = None if found.problems else value
    return found


def _number(text: str) -> float:
    """Return a number with a point or an exponent; 2e9 is how people write a whole number of tokens."""
    value = float(text)
    return int(value) if EXPONENT.match(text) and value.is_integer() else value


def _read_yaml(text: str) -> Located:
    import yaml

    found = Located()
    # so that `dispose` below has something, also when the text itself cannot be opened
    loader = _loader()("")
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is not None:
            found.value = _Reading(loader, found).value(node, (), 0)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        said = e.problem or e.context or ""
        way_out = WAYS_OUT.get(said, "mend it")
        found.problems.append(SettingsProblem(ProblemCode.FILE, "", f"is no YAML ({said})", way_out=way_out,
                                              line=mark.line + 1 if mark else 1))
    except RecursionError:
        found.problems.append(SettingsProblem(ProblemCode.FILE, "", f"is nested more than {MAX_DEPTH} deep",
                                              line=1, way_out="make it flatter"))
    except yaml.YAMLError as e:
        found.problems.append(SettingsProblem(ProblemCode.FILE, "",
                                              f"is no YAML ({' '.join(str(e).split())})",
                                              way_out="mend it", line=1))
    finally:
        loader.dispose()
    return found


class _Reading:
    """One walk over a document's nodes; an alias is walked again wherever it stands."""

    def __init__(self, loader: Any, found: Located) -> None:
        self.loader, self.found, self.num_values = loader, found, 0

    def value(self, node: Any, place: Place, depth: int) -> Any:
        import yaml

        line = node.start_mark.line + 1
        self.num_values += 1
        # counted in the walk, aliases each time: ten levels of ten aliases are 10^10 values
        if depth > MAX_DEPTH or self.num_values > MAX_VALUES:
            what = f"it is nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else \
                f"its aliases make more than {MAX_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        # the key's own line goes before the value's
        self.found.lines.setdefault(place, line)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*place, i), depth + 1) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, depth)
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError):
            # a tag falls over a value that it does not know in its own way: `!!int ''`, `!!timestamp soon`
            self._refuse(line, place, f"{node.tag} {str(node.value)[:60]!r} is no plain value",
                         "write text, numbers, true or false")
            return None
        if isinstance(value, float) and EXPONENT.match(node.value):
            return _number(node.value)
        # dates and the like: what is meant is the text
        return value if value is None or isinstance(value, (str, int, float, bool)) else node.value

    def _mapping(self, node: Any, place: Place, depth: int) -> dict[str, Any]:
        import yaml

        made: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, child in node.value:
            line, key = key_node.start_mark.line + 1, getattr(key_node, "value", None)
            if key_node.tag == "tag:yaml.org,2002:merge":
                for part in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    if isinstance(part, yaml.MappingNode):
                        # YAML's merge: of several the first one counts, and the mapping's own keys before all
                        merged = {**self.value(part, place, depth + 1), **merged}
                    else:
                        self._refuse(line, place, "<< takes an alias of a mapping", "")
            elif not isinstance(key_node, yaml.ScalarNode) or not isinstance(key, str):
                self._refuse(line, place, "a key must be a word, not a list or a mapping", "")
            elif key in made:
                self.found.problems.append(SettingsProblem(ProblemCode.TWICE,
                                                           ".".join(map(str, (*place, key))),
                                                           "is set twice", way_out="set it once", line=line))
            else:
                made[key] = self.value(child, (*place, key), depth + 1)
                self.found.lines[*place, key] = line
        return {**merged, **made}

    def _refuse(self, line: int, place: Place, rule: str, way_out: str) -> None:
        key = ".".join(map(str, place))
        self.found.problems.append(SettingsProblem(ProblemCode.TYPE, key, rule, way_out=way_out, line=line))


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
        # `a..b=1` and `=1` have an empty part
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
        # a position must exist: settings of a list are changed, never made longer, by dots
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
