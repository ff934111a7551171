"""From plain values to a frozen dataclass, with all that is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from megatron_sov.base.errors import nearest
from megatron_sov.base.hints.removed import was_removed
from megatron_sov.base.hints.table import note_on, table
from megatron_sov.base.settings.problem import (
    UNSET, ProblemCode, Relation, SettingsError, SettingsProblem, as_problem)

S = TypeVar("S")
Instead = Callable[[str], str]
"""Key that does not exist -> what to say of it; "": the nearest one."""
_UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
_TYPES = {
    "int": "must be a whole number", "float": "must be a number", "bool": "must be true or false",
    "string": "must be text", "path": "must be a path", "tuple": "must be a list", "list": "must be a list",
    "frozen_set": "must be a list", "set": "must be a list", "dict": "must be an object of settings",
    "dataclass": "must be an object of settings", "mapping": "must be an object of settings",
    "none": "must be null"}
"""Begin of pydantic's name of a wrong type -> our rule."""
_BOUNDS = {"greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
           "less_than": "must be below {lt}", "less_than_equal": "must be at most {le}",
           "finite_number": "must be a finite number",
           "multiple_of": "must be a multiple of {multiple_of}",
           "too_short": "must have at least {min_length} items",
           "too_long": "must have at most {max_length} items",
           "string_too_short": "must not be empty",
           "string_too_long": "must have at most {max_length} characters"}
_SHORT_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmbtKMBT])")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 168}
_THOUSANDS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def no_other(key: str) -> str:
    return ""


def read(cls: type[S], raw: object, where: str, *, lines: Mapping[tuple[str | int, ...], int] | None = None,
         instead: Instead = no_other, rules: bool = True) -> S:
    """Return settings of plain values, as JSON has them; nothing is converted but lists to tuples, whole
    numbers to floats and texts to paths.

    Args:
        cls: a frozen dataclass; unknown keys are refused.
        raw: what stands in the file, or was put together from an option.
        where: the file or the option that a message begins with.
        lines: place of a value in a file -> its line.
        instead: what to say of keys that do not exist.
        rules: whether the rules between settings are asked too (`problems()`, where the class has it).

    Raises:
        SettingsError: naming every key that is unknown, missing, of a wrong type, or breaks a rule.
    """
    settings, problems = find_problems(cls, raw, instead)
    if settings is not None and rules:
        # only where every field is sound: rules compare values and may rely on their types
        problems = rules_of(settings)
    if problems:
        raise SettingsError(where, [dataclasses.replace(p, line=_line(p.key, lines)) for p in problems])
    return cast(S, settings)


def _line(key: str, lines: Mapping[tuple[str | int, ...], int] | None) -> int:
    """Return the line of a key, or of the nearest place around it."""
    place = place_of(key)
    while lines and place and place not in lines:
        place = place[:-1]
    return (lines or {}).get(place, 0)


def place_of(key: str) -> tuple[str | int, ...]:
    if not key:
        return ()
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def find_problems(cls: type[S], raw: object, instead: Instead = no_other) -> tuple[S | None,
                                                                                   list[SettingsProblem]]:
    """Return settings of plain values, or None, and what breaks their declaration, in the order of the
    fields; the rules between them are not asked."""
    from pydantic import ValidationError

    if not isinstance(raw, Mapping):
        return None, [SettingsProblem(ProblemCode.TYPE, "", "must be an object of settings", raw)]
    try:
        # strict JSON takes lists for tuples and text for paths, and nothing else for anything else
        text = json.dumps(raw, default=_as_fields)
        return _adapter(cast(Any, cls)).validate_json(text, strict=True, extra="forbid"), []
    except ValidationError as e:
        return None, _in_order(cls, explain(cls, e, instead))
    except (TypeError, ValueError, RecursionError) as e:
        return None, [SettingsProblem(ProblemCode.TYPE, "", f"holds a value that JSON has not ({e})")]


def _as_fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__}")
    return dataclasses.asdict(value)


def check(settings: Any) -> list[SettingsProblem]:
    """Return what breaks the declaration of settings that were made by code, where nothing is read."""
    return find_problems(type(settings), plain(settings))[1]


def rules_of(settings: Any) -> list[SettingsProblem]:
    """Return what breaks the rules between settings, in the order of the fields: those of the settings
    inside, the relations that the fields declare, and what the class's own `problems` says."""
    own = list(map(as_problem, settings.problems())) if hasattr(settings, "problems") else []
    if not dataclasses.is_dataclass(settings):  # of a user's own code
        return own
    # inner settings first: what the outer ones compare may be wrong because of them
    found = [problem for field in dataclasses.fields(settings)
             for problem in _rules_inside(field.name, getattr(settings, field.name, None))]
    try:
        hints = hints_of(cast(Any, type(settings)))
    except (NameError, TypeError):  # a user's class names a type that is not known here
        hints = {}
    for name, hint in hints.items():
        for relation in getattr(hint, "__metadata__", ()):
            if isinstance(relation, Relation) and (problem := relation.broken_by(settings, name)):
                found.append(problem)
    found += own
    return _in_order(type(settings), [one for i, one in enumerate(found) if one not in found[:i]])


def _rules_inside(name: str, value: Any) -> list[SettingsProblem]:
    """Return what breaks the rules of settings that a field holds, alone or as items."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # what is wrong with one of several is told with its place
        return [problem.below(name) if problem.key or "." in name else problem for problem in rules_of(value)]
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    return [problem for key, item in items for problem in _rules_inside(f"{name}.{key}", item)]


def problems_of(settings: Any) -> list[SettingsProblem]:
    """Return all that is wrong with settings that were made by code: what breaks their bounds, else what
    breaks rules between them."""
    return check(settings) or rules_of(settings)


def _declared_types(made: Any) -> dict[str, Any]:
    """Return the types of a class's own __init__, or of its fields; none where a name is not known."""
    # fields too where there is an __init__: that of a dataclass does not know names of its base's module
    for declared in (vars(made).get("__init__", made), made):
        with contextlib.suppress(NameError, TypeError):
            return get_type_hints(declared, include_extras=True)
    return {}


def read_arguments(made: Any, given: Mapping[str, Any], where: str, *, prefix: str = "",
                   num_ours: int = 0) -> dict[str, Any]:
    """Return values for what a class or a function is made with, by the types that it declares.

    Args:
        made: the class or the function.
        given: name -> plain value.
        where: names it in messages, e.g. "reward math".
        prefix: what stands before the names in a key, e.g. "objective.options".
        num_ours: leading arguments that the program gives, not the user.

    Raises:
        SettingsError: a setting does not exist, is missing or has the wrong type; all of them are named.
    """
    from pydantic import TypeAdapter, ValidationError

    taken = {name: p for name, p in [*inspect.signature(made).parameters.items()][num_ours:]
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    hints = _declared_types(made)
    found: dict[str, Any] = {}
    problems = [unknown(name, taken) for name in given if name not in taken]
    for name, parameter in taken.items():
        if name not in given:
            problems += [_missing(name)] if parameter.default is parameter.empty else []
            continue
        try:
            text = json.dumps(given[name])
            found[name] = TypeAdapter(hints.get(name, Any)).validate_json(text, strict=True,
                                                                          extra="forbid")
        except ValidationError as e:
            problems += [problem.below(name) for problem in explain(hints.get(name, Any), e)]
    if problems:
        raise SettingsError(where, [problem.below(prefix) if prefix else problem for problem in problems])
    return found


def explain(cls: Any, error: Any, instead: Instead = no_other) -> list[SettingsProblem]:
    """Return the problems of a ValidationError of pydantic, one for each place."""
    found: dict[str, SettingsProblem] = {}
    errors = error.errors(include_url=False)
    for one in errors:
        place = one["loc"]
        # pydantic does not count bad items, so the list only seems short; their own problems are reported
        if one["type"] == "too_short" and any(
                other["loc"] != place and other["loc"][:len(place)] == place for other in errors):
            continue
        problem = _problem(cls, one, instead)
        earlier = found.get(problem.key)
        if earlier is None:
            found[problem.key] = problem
        # pydantic reports each part of a union by itself
        elif earlier.code == problem.code == ProblemCode.TYPE and problem.rule not in earlier.rule:
            # a value that is none of several types: one sentence with all of them
            rule = f"{earlier.rule} or {problem.rule.removeprefix('must be ')}"
            found[problem.key] = dataclasses.replace(earlier, rule=rule)
    # a misspelt key explains a missing one
    meant = {problem.way_out for problem in found.values() if problem.code == ProblemCode.UNKNOWN}
    return [problem for problem in found.values()
            if problem.code != ProblemCode.MISSING or f"did you mean '{problem.key}'?" not in meant]


def _problem(cls: Any, error: Any, instead: Instead) -> SettingsProblem:
    kind, ctx = error["type"], error.get("ctx", {})
    place, hint = _place(cls, error["loc"])
    key = ".".join(map(str, place))
    # a key is no value of its own, a secret's content is not shown, nor the whole file
    value = UNSET if error["loc"][-1:] == ("[key]",) or place[:1] == ("secrets",) or kind == "json_invalid" \
        else error.get("input", UNSET)
    if kind == "json_invalid":
        return SettingsProblem(ProblemCode.TYPE, key, f"holds a text that is none ({ctx['error']})")
    if kind in _UNKNOWN:
        fields = fields_of(cast(Any, hint)) if dataclasses.is_dataclass(hint) else ()
        return unknown(key, fields, instead(key))
    if kind in _MISSING:
        return _missing(key)
    if kind in ("literal_error", "enum"):
        known = [word for word in _choices(hint) if isinstance(word, str)]
        close = ""
        if isinstance(value, str):
            close = (was_removed(value) or _other_case(value, known) or _foreign(key, value)
                     or nearest(value, known))
        return SettingsProblem(ProblemCode.CHOICE, key, f"must be {ctx.get('expected', 'another word')}",
                               value, close.removeprefix("; "))
    if kind == "asked":
        return SettingsProblem(ProblemCode(ctx["code"]), key, ctx["rule"], value, ctx["way_out"])
    # our bound for finite numbers is "below infinity"; the sentence says what is meant
    if kind == "less_than" and ctx["lt"] == float("inf"):
        kind = "finite_number"
    if kind in _BOUNDS:
        shown = {name: _number(number) for name, number in ctx.items()}
        return SettingsProblem(ProblemCode.BOUND, key, _BOUNDS[kind].format(**shown), value)
    for begin, rule in _TYPES.items():
        if kind.startswith(f"{begin}_"):
            return SettingsProblem(ProblemCode.TYPE, key, rule, value, _type_way_out(begin, value, key))
    rule = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return SettingsProblem(ProblemCode.RULE if kind in ("value_error",
                                                        "assertion_error") else ProblemCode.TYPE, key, rule,
                           value)


def _other_case(value: str, known: Collection[str]) -> str:
    """Return the end of a sentence about a value that is known in another case."""
    return f"; write {value.lower()}" if value.lower() in known else ""


def _foreign(key: str, value: str) -> str:
    """Return the end of a sentence about a value of another program: ours, a note, or of an algorithm the
    command that trains by it; "" if the table has none."""
    if ours := table()["values"].get(key, {}).get(value.lower()):
        return f"; {'pass --set' if '=' in str(ours) else 'it is'} {ours} here"
    rows = table()["commands"]["megatron-sov"] if key.rpartition(".")[2] == "method" else {}
    command = next((text for words, text in rows.items() if value.lower() in words.split()), "")
    found = note_on(value) or command
    return f"; {found}" if found else ""


def _type_way_out(wanted: str, value: Any, key: str) -> str:
    if value is None:
        return "give it a value, or leave it out"
    if wanted == "int" and isinstance(value, str) and (found := _SHORT_NUMBER.fullmatch(value.strip())):
        number = float(found[1]) * _THOUSANDS[found[2].lower()]
        return f"write {number:.0f}" + (f" or {float(found[1]) * 1024:.0f}" if found[2] in "kK" else "")
    if wanted == "float" and isinstance(value, str) and (
            found := _SHORT_NUMBER.fullmatch(value.strip().lstrip("$"))):
        number = float(found[1]) * _THOUSANDS[found[2].lower()]
        return f"write {number:.0f}" if number else "a shell reads $5 as a variable; write e.g. 50000"
    if wanted == "float" and isinstance(value, str) and (found := _PERCENT.fullmatch(value.strip())):
        return f"write {float(found[1]) / 100:g}"
    if wanted == "float" and isinstance(value, str) and key.endswith(("days", "hours")) and (
            found := _SPAN.fullmatch(value.strip().lower())):
        hours = float(found[1]) * _HOURS[found[2]]
        return f"write {hours if key.endswith('hours') else hours / 24:g}"
    if wanted == "int" and isinstance(value, float) and 0 < value < 1 and "steps" in key:
        return f"{value:g} of 1000 steps are {value * 1000:.0f}"
    if wanted == "string" and isinstance(value, bool):
        return "YAML takes no, off, yes and on for false and true; put it in quotes"
    if wanted == "string" and isinstance(value, (int, float)):
        return "put it in double quotes"  # YAML reads 2:00:00 as 7200
    if wanted in ("tuple", "list") and isinstance(value, (str, int, float)):
        if isinstance(value, str) and "," in value:
            return f"e.g. {json.dumps([part.strip() for part in value.split(',')], ensure_ascii=False)[:60]}"
        return f"e.g. [{json.dumps(value, ensure_ascii=False)[:60]}]"
    return ""


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def unknown(key: str, known: Iterable[str], instead: str = "") -> SettingsProblem:
    """Return the problem of a key that does not exist.

    Args:
        key: with dots.
        known: names that may stand in the place of its last part.
        instead: what to say in place of the nearest of these.
    """
    group, dot, name = key.rpartition(".")
    names = list(known)
    close = nearest(name, names, group + dot).removeprefix("; ")
    return SettingsProblem(ProblemCode.UNKNOWN, key, "no such setting", way_out=instead or close or (
        f"there are {', '.join(names[:30])}" if names else "there are none"))


def _missing(key: str) -> SettingsProblem:
    return SettingsProblem(ProblemCode.MISSING, key, "is missing", way_out="it has no default; set it")


def _place(cls: Any, loc: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Return the place of a pydantic error without the names of a union's parts, and the type that is
    declared there; for a key that does not exist, the class around it."""
    place: list[Any] = []
    hint = _inside(cls)
    # pydantic puts names of a union's parts between the keys; a walk along the types finds which are which
    for i, part in enumerate(loc):
        if dataclasses.is_dataclass(hint):
            place.append(part)
            if part not in fields_of(cast(Any, hint)):
                break
            hint = hint_below(hint, part)
        elif get_origin(hint) in (tuple, list, dict, set, frozenset, Mapping):
            if part != "[key]":
                place.append(part)
            hint = hint_below(hint, part)
        elif i == 0 or not isinstance(part, str):
            place.append(part)
    return tuple(place), hint


def _choices(hint: Any) -> tuple[Any, ...]:
    from typing import Literal

    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for inner in get_args(hint) for choice in _choices(inner))


def hint_below(hint: Any, part: Any) -> Any:
    """Return the type of a field, of an item or of a value inside a type; None where it has none."""
    if dataclasses.is_dataclass(hint):
        return _inside(hints_of(cast(Any, hint)).get(part))
    args = get_args(hint)
    if get_origin(hint) is dict or get_origin(hint) is Mapping:
        return _inside(args[1])
    if get_origin(hint) is tuple and len(args) > 1 and args[1] is not Ellipsis:
        at = int(part) if str(part).isdecimal() else 0
        return _inside(args[at] if at < len(args) else None)
    return _inside(args[0]) if args else None


def _inside(hint: Any) -> Any:
    """Return a type without its bounds, and a choice's one part that has fields or items."""
    from types import UnionType
    from typing import Union

    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        inner = (_inside(part) for part in get_args(hint))
        return next((part for part in inner
                     if dataclasses.is_dataclass(part) or get_origin(part) in (tuple, list, dict)), hint)
    return hint


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of a class's fields; they stand there as text, which takes longest to read."""
    return get_type_hints(cls, include_extras=True)


@cache
def fields_of(cls: Any) -> tuple[str, ...]:
    """Return the fields that a user may set, in their order."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.init and f.metadata.get("is_written", True))


@cache
def _adapter(cls: Any) -> Any:
    """Return what checks a class; to make it takes longer than all checks of a run."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _in_order(cls: Any, problems: list[SettingsProblem]) -> list[SettingsProblem]:
    """Return problems in the order of the fields, unknown keys last."""
    def position(problem: SettingsProblem) -> tuple[float, ...]:
        at, hint = [], cls
        for part in problem.key.split("."):
            if dataclasses.is_dataclass(hint):
                # position of each part among the fields of its class; what is unknown goes last
                names = fields_of(cast(Any, hint))
                at.append(float(names.index(part)) if part in names else float("inf"))
            else:
                at.append(float(part) if part.isdecimal() else 0.0)
            hint = hint_below(hint, part) if hint is not None else None
        return tuple(at)

    return sorted(problems, key=position)


def by_name(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield plain settings with their full names, as `--set` has them; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from by_name(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(settings: Any) -> dict[str, Any]:
    """Return settings as JSON has them, in values that may be changed."""
    return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(settings), default=str)))
