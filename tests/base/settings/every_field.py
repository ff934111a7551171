"""Drives every field of the classes of settings over its bounds and to values of other types, as plain
values, as YAML and by `key=value`: for tests of rooms with settings."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

from megatron_sov.base.settings import SettingsError, find_problems, parse_changes, read, read_yaml
from megatron_sov.base.settings.reading import fields_of, hints_of
from tests.freeze_surface import ROOT, SETTINGS

CONTROL = "a\x1b[2Jb\x00c"
HUGE = 10 ** 400
WRONG: dict[Any, list[Any]] = {
    int: ["many", 1.5, True, [1], {"a": 1}, CONTROL, None],
    float: ["many", True, [1.0], {"a": 1}, CONTROL, None],
    bool: ["yes", 1, 0.0, [True], None], str: [1, 1.5, True, ["a"], {"a": "b"}, None]}
"""Type -> values that are none of it, though YAML or Python would turn some into it."""


def classes_below(folder: str, *, without: str = "//") -> Iterator[type]:
    """Yield the classes of settings below a folder of the sources, but for one of its folders, that a reader
    of plain values can make."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file.is_relative_to(ROOT / folder / without):
            continue
        names = [node.name for node in ast.parse(file.read_text(encoding="utf-8")).body
                 if isinstance(node, ast.ClassDef) and SETTINGS.search(node.name)
                 and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)]
        for name in names:
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            cls = getattr(module, name)
            try:
                TypeAdapter(cls)
            except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, NameError):
                continue  # holds what no file can say
            yield cls


def cases(cls: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield field, value and the code of the problem that it is, "": it may be taken."""
    for name in fields_of(cls):
        inner, bounds, is_optional = _taken_apart(hints_of(cls)[name])
        yield name, HUGE, ""
        yield name, CONTROL, ""
        yield name, {"no_such_key": 1}, ""
        for bound in bounds:
            yield from ((name, value, "bound") for value in _outside(bound, inner))
        if get_origin(inner) is Literal:
            yield from ((name, value, "choice") for value in ("no such word", CONTROL))
        for value in WRONG.get(inner, []):
            if value is not None or not is_optional:
                yield name, value, "type"


def _taken_apart(hint: Any) -> tuple[Any, list[Any], bool]:
    """Return a type that has one part beside None, its bounds, and whether it takes None."""
    bounds, is_optional = [], False
    while True:
        if get_origin(hint) is Annotated:
            bounds += [part for part in hint.__metadata__ if isinstance(part, (Ge, Gt, Le, Lt))]
            if any(not isinstance(part, (Ge, Gt, Le, Lt)) and type(part).__name__ == "BeforeValidator"
                   for part in hint.__metadata__):
                return None, [], True
            hint = get_args(hint)[0]
        elif get_origin(hint) in (Union, UnionType):
            parts = [part for part in get_args(hint) if part is not NoneType]
            is_optional |= len(parts) < len(get_args(hint))
            if len(parts) != 1:
                return None, [], True
            hint = parts[0]
        else:
            return hint, bounds, is_optional


def _outside(bound: Any, inner: Any) -> list[Any]:
    """Return values right outside of a bound and far off."""
    edge: Any
    match bound:
        case Ge(ge=edge):
            return [edge - 1, edge - 10 ** 18]
        case Gt(gt=edge) if edge > float("-inf"):
            return [edge, edge - 10 ** 18]
        case Le(le=edge):
            return [edge + 1, edge + 10 ** 18]
        case Lt(lt=edge) if edge < float("inf"):
            return [edge, edge + 10 ** 18]
    return [float("inf"), float("-inf")] if inner is float else []


SOURCES = ("plain", "yaml", "change")


def find_wrongs(cls: Any, *, from_all: bool = True) -> list[str]:
    """Return one sentence for each case that is not told as it should be, from every source or from one,
    in turns."""
    wrongs = []
    for number, (name, value, code) in enumerate(cases(cls), len(cls.__name__)):
        for source in SOURCES if from_all else (SOURCES[number % len(SOURCES)],):
            case = f"{cls.__name__}.{name} = {str(value)[:40]!r} as {source}"
            try:
                codes, said = _told(cls, name, value, source)
            except Exception as e:  # the defect that is looked for
                wrongs.append(f"{case}: {type(e).__name__}: {e}")
                continue
            if code and (code, name) not in codes:
                wrongs.append(f"{case}: is no {code}: {codes}")
            if "\x1b" in said or "\x00" in said or len(said) > 20_000:
                wrongs.append(f"{case}: the sentence holds what a user wrote")
    return wrongs


def _told(cls: Any, name: str, value: Any, source: str) -> tuple[list[tuple[str, str]], str]:
    """Return codes with keys, and the message, of one value from one source."""
    try:
        if source == "plain":
            read(cls, {name: value}, "file", rules=False)
        elif source == "yaml":
            text = json.dumps(value).replace("Infinity", ".inf")
            read_yaml(cls, f"{name}: {text}\n", "file.yaml", rules=False)
        else:
            raw = parse_changes([f"{name}={json.dumps(value)}"])
            _, problems = find_problems(cls, raw)
            if problems:
                raise SettingsError("--set", problems)
    except SettingsError as e:
        return [(str(problem.code), problem.key.split(".")[0]) for problem in e.problems], str(e)
    return [], ""
