"""Convert plain values (JSON types) to frozen settings dataclasses, and collect the problems."""

import contextlib
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from megatron_sov.base.errors import find_nearest_name, suggest_name
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.hints.table import find_note, find_our_value, load_table
from megatron_sov.base.settings.problem import (
    LEFT_OUT, TOKENS_KEY, UNSET, ProblemCode, Relation, SettingsError, SettingsProblem, to_problem)

S = TypeVar("S")
KeyHint = Callable[[str], str]
"""Unknown key -> hint for the message; "": suggest the nearest key."""
_UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden"}  # error types of pydantic
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
_TYPES = {
    "int": "must be a whole number", "float": "must be a number", "bool": "must be true or false",
    "string": "must be text", "path": "must be a path", "tuple": "must be a list", "list": "must be a list",
    "frozen_set": "must be a list", "set": "must be a list", "dict": "must be an object of settings",
    "dataclass": "must be an object of settings", "mapping": "must be an object of settings",
    "none": "must be null"}
"""Prefix of pydantic's error type -> our rule."""
MIN_TOKEN_DIGITS = 9
"""A value of `train.steps` with at least this many digits is taken for a number of tokens."""
_BOUNDS = {"greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
           "less_than": "must be below {lt}", "less_than_equal": "must be at most {le}",
           "finite_number": "must be a finite number",
           "multiple_of": "must be a multiple of {multiple_of}",
           "too_short": "must have at least {min_length} items",
           "too_long": "must have at most {max_length} items",
           "string_too_short": "must not be empty",
           "string_too_long": "must have at most {max_length} characters"}
_SHORT_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgbtKMGBT])(?:i?[bB])?")  # 8k, 2B, 1.5 GiB
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([hdw])")  # 3d: hours, days or weeks
_HOURS = {"h": 1, "d": 24, "w": 168}
_FACTORS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def no_hint(key: str) -> str:
    return ""


def parse_settings(cls: type[S], raw: object, where: str, *,
                   lines: Mapping[tuple[str | int, ...], int] | None = None,
                   instead: KeyHint = no_hint, rules: bool = True) -> S:
    """Build settings from plain values (JSON types).

    The only conversions are lists to tuples, integers to floats, and text to paths.

    Args:
        cls: dataclass of the settings.
        raw: plain values.
        where: file or option with the values, for messages.
        lines: path of a value in the file -> line number.
        instead: gives hints for unknown keys.
        rules: whether to check rules between settings too.

    Raises:
        SettingsError: lists every key that is unknown, missing, of a wrong type, or breaks a rule.
    """
    settings, problems = try_parse_settings(cls, raw, instead)
    if settings is not None and rules:
        # rules compare values, so check them only if every value has its type
        problems = find_rule_problems(settings)
    if problems:
        raise SettingsError(where, [dataclasses.replace(p, line=_find_line(p.key, lines)) for p in problems])
    return cast(S, settings)


def _find_line(key: str, lines: Mapping[tuple[str | int, ...], int] | None) -> int:
    """Return a key's line, or the nearest enclosing value's line."""
    path = split_key(key)
    while lines and path and path not in lines:
        path = path[:-1]
    return (lines or {}).get(path, 0)


def split_key(key: str) -> tuple[str | int, ...]:
    if not key:
        return ()
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def try_parse_settings(cls: type[S], raw: object,
                       instead: KeyHint = no_hint) -> tuple[S | None, list[SettingsProblem]]:
    """Return (settings or None, violated declarations in field order); checks no rules between fields."""
    if not isinstance(raw, Mapping):
        return None, [SettingsProblem(ProblemCode.TYPE, "", "must be an object of settings", raw)]
    try:
        text = json.dumps(raw, default=_convert_dataclass)
        settings, error = _get_validator(cast(Any, cls))(text)
    except (TypeError, ValueError, RecursionError) as e:
        return None, [SettingsProblem(ProblemCode.TYPE, "", f"holds a value that JSON does not have ({e})")]
    if error is not None:
        return None, _sort_by_field(cls, explain_validation_error(cls, error, instead))
    return settings, []


def _convert_dataclass(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__}")
    return dataclasses.asdict(value)


def find_declaration_problems(settings: Any) -> list[SettingsProblem]:
    """Return violated declarations in settings that code built without reading a file."""
    return try_parse_settings(type(settings), to_plain_values(settings))[1]


def find_rule_problems(settings: Any) -> list[SettingsProblem]:
    """Return violated rules between settings, in field order.

    Checks nested settings, relations declared by fields, and the class's own `problems()`.
    """
    class_problems = list(map(to_problem, settings.problems())) if hasattr(settings, "problems") else []
    if not dataclasses.is_dataclass(settings):  # a user's own class
        return class_problems
    # nested settings first, which may cause problems in the outer settings
    problems = [problem for field in dataclasses.fields(settings)
                for problem in _find_inner_problems(field.name, getattr(settings, field.name, None))]
    try:
        hints = get_field_hints(cast(Any, type(settings)))
    except (NameError, TypeError):  # a user's class annotates a field with an unknown type
        hints = {}
    for name, hint in hints.items():
        for relation in getattr(hint, "__metadata__", ()):
            if isinstance(relation, Relation) and (problem := relation.find_problem(settings, name)):
                problems.append(problem)
    problems += class_problems
    without_repetitions = [problem for i, problem in enumerate(problems) if problem not in problems[:i]]
    return _sort_by_field(type(settings), without_repetitions)


def _find_inner_problems(name: str, value: Any) -> list[SettingsProblem]:
    """Return violated rules in a field's value, which is a settings object or a collection."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # a problem without a key gets the name only in a collection, where it tells the item
        return [problem.with_prefix(name) if problem.key or "." in name else problem
                for problem in find_rule_problems(value)]
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    return [problem for key, item in items for problem in _find_inner_problems(f"{name}.{key}", item)]


def find_all_problems(settings: Any) -> list[SettingsProblem]:
    """Return the problems in settings built by code: violated declarations, else violated rules."""
    return find_declaration_problems(settings) or find_rule_problems(settings)


def _get_declared_types(target: Any) -> dict[str, Any]:
    """Return the types of a class's `__init__` or fields; empty if a type's name is unknown."""
    # try the fields too: a dataclass's `__init__` does not know names from its base class's module
    for declaration in (vars(target).get("__init__", target), target):
        with contextlib.suppress(NameError, TypeError):
            return get_type_hints(declaration, include_extras=True)
    return {}


def parse_arguments(target: Any, values: Mapping[str, Any], where: str, *, prefix: str = "",
                    num_ours: int = 0) -> dict[str, Any]:
    """Convert plain values to arguments for a class or function, by the declared types.

    Args:
        target: the class or function.
        values: argument name -> plain value.
        where: subject of messages.
        prefix: precedes argument names in the keys of problems.
        num_ours: leading arguments that the program passes itself.

    Raises:
        SettingsError: lists all arguments that are unknown, missing or of a wrong type.
    """
    parameters = [*inspect.signature(target).parameters.items()][num_ours:]
    accepted = {name: p for name, p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    hints = _get_declared_types(target)
    arguments: dict[str, Any] = {}
    problems = [unknown_key_problem(name, accepted) for name in values if name not in accepted]
    for name, parameter in accepted.items():
        if name not in values:
            if parameter.default is parameter.empty:
                problems.append(_make_missing_problem(name))
            continue
        hint = hints.get(name, Any)
        arguments[name], error = _build_validator(hint)(json.dumps(values[name]))
        if error is not None:
            problems += [problem.with_prefix(name) for problem in explain_validation_error(hint, error)]
    if problems:
        raise SettingsError(where, [problem.with_prefix(prefix) for problem in problems])
    return arguments


def explain_validation_error(cls: Any, error: Any, instead: KeyHint = no_hint) -> list[SettingsProblem]:
    """Convert pydantic's `ValidationError` to a problem per key."""
    problems: dict[str, SettingsProblem] = {}
    errors = error.errors(include_url=False)
    for item in errors:
        path = item["loc"]
        # pydantic does not count invalid items as items; the items' own problems suffice
        if item["type"] == "too_short" and any(
                other["loc"] != path and other["loc"][:len(path)] == path for other in errors):
            continue
        problem = _translate_value(_convert_error(cls, item, instead))
        earlier = problems.get(problem.key)
        if earlier is None:
            problems[problem.key] = problem
        # pydantic reports each union member separately: merge the types into a sentence
        elif earlier.code == problem.code == ProblemCode.TYPE and problem.rule not in earlier.rule:
            rule = f"{earlier.rule} or {problem.rule.removeprefix('must be ')}"
            problems[problem.key] = dataclasses.replace(earlier, rule=rule)
    # a misspelt key explains a missing one
    hints = {problem.way_out for problem in problems.values() if problem.code == ProblemCode.UNKNOWN}
    return [problem for problem in problems.values()
            if problem.code != ProblemCode.MISSING or f"did you mean '{problem.key}'?" not in hints]


def _convert_error(cls: Any, error: Any, instead: KeyHint) -> SettingsProblem:
    """Convert an error of pydantic to a problem in our words, with advice and a value to write. `instead`:
    gives hints for unknown keys."""
    kind, ctx = error["type"], error.get("ctx", {})
    path, hint = _locate_error(cls, error["loc"])
    key = ".".join(map(str, path))
    value = error.get("input", UNSET)
    # a key has no value of its own; never show secrets or the whole file
    if error["loc"][-1:] == ("[key]",) or path[:1] == ("secrets",) or kind == "json_invalid":
        value = UNSET
    if kind == "json_invalid":
        return SettingsProblem(ProblemCode.TYPE, key, f"holds a text that is not valid JSON ({ctx['error']})")
    if kind in _UNKNOWN:
        fields = list_fields(cast(Any, hint)) if dataclasses.is_dataclass(hint) else ()
        return unknown_key_problem(key, fields, instead(key))
    if kind in _MISSING:
        return _make_missing_problem(key)
    if kind in ("literal_error", "enum"):
        return _make_choice_problem(key, value, hint, ctx.get("expected", "another word"))
    if kind == "bound":
        return SettingsProblem(ProblemCode(ctx["code"]), key, ctx["rule"], value, ctx["way_out"])
    # `Lt(math.inf)` declares finite numbers
    if kind == "less_than" and ctx["lt"] == float("inf"):
        kind = "finite_number"
    if kind in _BOUNDS:
        return _make_bound_problem(key, value, kind, ctx)
    expected = next((begin for begin in _TYPES if kind.startswith(f"{begin}_")), "")
    if expected:
        return _make_type_problem(key, value, expected)
    rule = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    code = ProblemCode.RULE if kind in ("value_error", "assertion_error") else ProblemCode.TYPE
    return SettingsProblem(code, key, rule, value)


def _make_choice_problem(key: str, value: Any, hint: Any, expected: str) -> SettingsProblem:
    """Return the problem for a value outside the choices of the type `hint`; `expected` lists the choices."""
    rule = f"must be {expected}"
    if not isinstance(value, str):
        return SettingsProblem(ProblemCode.CHOICE, key, rule, value)
    choices = [word for word in _list_choices(hint) if isinstance(word, str)]
    removed = suggest_successor(value)
    part = _find_part(value, choices)
    advice = (removed or _suggest_lower_case(value, choices) or _suggest_equivalent(key, value)
              or suggest_name(value, choices) or (f"; did you mean {part!r}?" if part else ""))
    nearest = ""
    # neither another program's word with a command of its own nor a blank value is a misspelt choice
    if "`megatron-sov" not in advice and re.search(r"[\w.-]", value):
        # words that may mean a choice, the likeliest first
        candidates = (value.lower(), _find_equivalent(key, value), find_nearest_name(value, choices), part,
                      *re.findall(r"[\w.-]+", removed))
        nearest = next((word for word in candidates if word in choices), "")
    if not nearest and (removed or not advice):
        advice += f"; {LEFT_OUT}"
    return SettingsProblem(ProblemCode.CHOICE, key, rule, value, advice.removeprefix("; "),
                           value_to_write=nearest)


def _make_bound_problem(key: str, value: Any, kind: str, ctx: Mapping[str, Any]) -> SettingsProblem:
    """Return the problem for a value outside a bound; `kind` and `ctx`: pydantic's error type and bounds."""
    bounds = {name: _format_number(number) for name, number in ctx.items()}
    nearest = _find_nearest_value(value, **ctx)
    advice = f"write {nearest}" if "." in nearest else ""
    if kind == "greater_than" and value == 0:
        advice = LEFT_OUT
    return SettingsProblem(ProblemCode.BOUND, key, _BOUNDS[kind].format(**bounds), value, advice,
                           value_to_write=nearest)


def _make_type_problem(key: str, value: Any, expected: str) -> SettingsProblem:
    """Return the problem for a value of a wrong type; `expected` is a key in `_TYPES`."""
    numbers = _suggest_numbers(expected, value.strip(), key) if isinstance(value, str) else []
    advice = f"write {' or '.join(numbers)}" if numbers else _suggest_value(expected, value, key)
    value_to_write = "".join(numbers[:1])
    if key.rpartition(".")[2] == "steps" and len(value_to_write) >= MIN_TOKEN_DIGITS:
        value_to_write = f"{TOKENS_KEY}{value_to_write}"
        advice = f"a step is a batch; the tokens of the whole run are {value_to_write}"
    return SettingsProblem(ProblemCode.TYPE, key, _TYPES[expected], value, advice,
                           value_to_write=value_to_write)


def _translate_value(problem: SettingsProblem) -> SettingsProblem:
    """Suggest our value for another program's value, and no value for -1, all, none or auto."""
    word = str(problem.value).lower()
    ours = _find_equivalent(problem.key, word)
    if "=" in ours:
        return dataclasses.replace(problem, value_to_write=ours)
    is_default = problem.value is not None and word in load_table()["defaults"]
    if problem.code not in (ProblemCode.TYPE, ProblemCode.BOUND) or not (ours or is_default):
        return problem
    return dataclasses.replace(problem, way_out=f"write {ours}" if ours else LEFT_OUT, value_to_write=ours)


def _find_nearest_value(value: Any, lt: float = math.inf, le: float = math.inf, ge: float | None = None,
                        **_: Any) -> str:
    """Return the likely value in the bounds: a percentage as a share, else an inclusive bound; "": none."""
    if isinstance(value, (int, float)) and min(lt, le) == 1 and 2 <= value <= 100:
        return f"{value / 100:g}"
    bound = le if math.isfinite(le) else ge
    if bound is None:
        return ""
    if bound == 0 and isinstance(value, (int, float)) and value < 0:  # a sign too many
        bound = -value
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def _find_part(value: str, choices: Iterable[str]) -> str:
    """Return the longest choice whose words are in `value`, e.g. linear in linear_with_warmup; "": none."""
    words = {*re.split(r"[_-]", value.lower())}
    return max((choice for choice in choices if words >= {*re.split(r"[_-]", choice)}), key=len, default="")


def _suggest_lower_case(value: str, known: Collection[str]) -> str:
    """Suggest the lower-case spelling if the choices contain the spelling."""
    return f"; write {value.lower()}" if value.lower() in known else ""


def _suggest_equivalent(key: str, value: str) -> str:
    """Suggest our value, setting, note or command for another program's value; "": unknown."""
    is_method = key.rpartition(".")[2].lstrip("-") == "method"
    command_notes = load_table()["commands"]["megatron-sov"] if is_method else {}
    command = next((text for words, text in command_notes.items() if value.lower() in words.split()), "")
    equivalent = _find_equivalent(key, value)
    if equivalent and not command:
        return f"; {'pass --set' if '=' in equivalent else 'it is'} {equivalent} here"
    hint = command or find_note(value)
    return f"; {hint}" if hint else ""


def _find_equivalent(key: str, value: str) -> str:
    """Return our value for another program's value of a setting or option; "": unknown."""
    return find_our_value(value, key, key.rpartition(".")[2].lstrip("-"))


def _suggest_value(expected: str, value: Any, key: str) -> str:
    """Suggest how to write a value that stands for no number; `expected` is a key in `_TYPES`."""
    if value is None:
        return "give it a value, or leave it out"
    short_number = _SHORT_NUMBER.fullmatch(value) if isinstance(value, str) else None
    if expected == "float" and short_number and float(short_number[1]) == 0:  # typed as $50k, arrived as 0k
        return "a shell reads $5 as a variable; write e.g. 50000"
    number = parse_percent(value)
    if expected == "int" and isinstance(number, float) and 0 < number < 1 and "steps" in key:
        return f"steps are counted, and {number:g} is a share of them; {LEFT_OUT}"
    if expected == "int" and isinstance(value, str) and re.fullmatch(r"[\d.]+ ?(s|sec|m|min|h|d)\w*", value):
        return f"steps are counted, and no time; {LEFT_OUT}"
    if expected == "string" and isinstance(value, bool):
        return "YAML reads no, off, yes and on as false and true; put it in quotes"
    if expected == "string" and isinstance(value, (int, float)):
        return "put it in double quotes"  # YAML reads 2:00:00 as 7200
    if expected in ("tuple", "list") and isinstance(value, (str, int, float)):
        if isinstance(value, str) and "," in value:
            items = [part.strip() for part in value.split(",")]
            return f"e.g. {json.dumps(items, ensure_ascii=False)[:60]}"
        return f"e.g. [{json.dumps(value, ensure_ascii=False)[:60]}]"
    return ""


def parse_percent(value: Any) -> Any:
    """Return "3 %" as 0.03, and other values unchanged."""
    match = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(match[1]) / 100 if match else value


def _suggest_numbers(expected: str, text: str, key: str) -> list[str]:
    """Return the plain numbers that 8k, 2B, $5, 10 %, 0,1 or 3d may mean, the likeliest first; a list such
    as 4k,8k gives numbers with blanks between."""
    if expected == "int" and re.fullmatch(r"\w+(,\w+)+", text):
        items = [[part] if part.isdecimal() else _suggest_numbers("int", part, key)
                 for part in text.split(",")]
        return [" ".join(numbers[0] for numbers in items)] if all(items) else []
    if expected == "int" and (match := _SHORT_NUMBER.fullmatch(text)):
        decimal = f"{float(match[1]) * _FACTORS[match[2].lower()]:.0f}"
        if match[2] not in "kK":
            return [decimal]
        binary = f"{float(match[1]) * 1024:.0f}"
        return [binary, decimal] if re.search("seq_len|length", key) else [decimal, binary]
    if expected == "int" and (match := re.fullmatch(r"(\d+)[ _-]?(?:shot|step|token|epoch|gpu)s?", text)):
        return [match[1]]
    if expected != "float":
        return []
    if match := _SHORT_NUMBER.fullmatch(text.lstrip("$")):
        number = float(match[1]) * _FACTORS[match[2].lower()]
        return [f"{number:.0f}"] if number else []
    if (share := parse_percent(text)) != text:
        return [f"{share:g}"]
    if re.fullmatch(r"\d+,\d+", text):
        return [text.replace(",", ".")]
    if key.endswith(("days", "hours")) and (match := _DURATION.fullmatch(text.lower())):
        hours = float(match[1]) * _HOURS[match[2]]
        return [f"{hours if key.endswith('hours') else hours / 24:g}"]
    return []


def _format_number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def unknown_key_problem(key: str, known: Iterable[str], instead: str = "") -> SettingsProblem:
    """Return the problem for an unknown key; its last part could be in `known`, and `instead` replaces the
    suggestion of the nearest name."""
    group, dot, name = key.rpartition(".")
    names = list(known)
    advice = instead or suggest_name(name, names, group + dot).removeprefix("; ")
    if not advice:
        advice = f"there are {', '.join(names[:30])}" if names else "there are none"
    return SettingsProblem(ProblemCode.UNKNOWN, key, "no such setting", way_out=advice)


def _make_missing_problem(key: str) -> SettingsProblem:
    return SettingsProblem(ProblemCode.MISSING, key, "is missing", way_out="it has no default; set it")


def _locate_error(cls: Any, loc: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Return a pydantic error's path without union member names, and the type declared at the path.

    For an unknown key, the type is the enclosing class.
    """
    path: list[Any] = []
    hint = _strip_bounds(cls)
    # pydantic inserts names of union members between the keys; walking along the types distinguishes them
    for i, part in enumerate(loc):
        if dataclasses.is_dataclass(hint):
            path.append(part)
            if part not in list_fields(cast(Any, hint)):
                break
            hint = get_inner_hint(hint, part)
        elif get_origin(hint) in (tuple, list, dict, set, frozenset, Mapping):
            if part != "[key]":
                path.append(part)
            hint = get_inner_hint(hint, part)
        elif i == 0 or not isinstance(part, str):
            path.append(part)
    return tuple(path), hint


def _list_choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for inner in get_args(hint) for choice in _list_choices(inner))


def get_inner_hint(hint: Any, part: Any) -> Any:
    """Return the type of a field, an item or a value inside the type `hint`; None if unknown. `part`: name of
    the field, index of the item, or key of the value."""
    if dataclasses.is_dataclass(hint):
        return _strip_bounds(get_field_hints(cast(Any, hint)).get(part))
    args = get_args(hint)
    if get_origin(hint) is dict or get_origin(hint) is Mapping:
        return _strip_bounds(args[1])
    if get_origin(hint) is tuple and len(args) > 1 and args[1] is not Ellipsis:
        index = int(part) if str(part).isdecimal() else 0
        return _strip_bounds(args[index] if index < len(args) else None)
    return _strip_bounds(args[0]) if args else None


def _strip_bounds(hint: Any) -> Any:
    """Remove bounds from a type; from a union, return the member with fields or items."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        inner = (_strip_bounds(part) for part in get_args(hint))
        return next((part for part in inner
                     if dataclasses.is_dataclass(part) or get_origin(part) in (tuple, list, dict)), hint)
    return hint


@cache
def get_field_hints(cls: Any) -> dict[str, Any]:
    """Return the resolved types of a class's fields (cached, because resolving annotations is slow)."""
    return get_type_hints(cls, include_extras=True)


@cache
def list_fields(cls: Any) -> tuple[str, ...]:
    """Return the field names that users may set, in declaration order."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.init and f.metadata.get("is_written", True))


def _build_validator(hint: Any) -> Callable[[str], tuple[Any, Any]]:
    """Return the function that parses JSON text as a type: (value, None), or (None, pydantic's
    `ValidationError`). Strict JSON converts lists to tuples and text to paths, and nothing else."""
    # not at the top: pydantic is slow to import, and `--help` validates nothing
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(hint)

    def validate_json(text: str) -> tuple[Any, Any]:
        try:
            return adapter.validate_json(text, strict=True, extra="forbid"), None
        except ValidationError as e:
            return None, e

    return validate_json


# cached: building a class's adapter takes longer than a run's checks
_get_validator = cache(_build_validator)


def _sort_by_field(cls: Any, problems: list[SettingsProblem]) -> list[SettingsProblem]:
    """Sort problems by field order, unknown keys last."""
    def index_fields(problem: SettingsProblem) -> tuple[float, ...]:
        indices, hint = [], cls
        for part in problem.key.split("."):
            if dataclasses.is_dataclass(hint):
                # index of the part among the fields of its class; unknown names go last
                names = list_fields(cast(Any, hint))
                indices.append(float(names.index(part)) if part in names else float("inf"))
            else:
                indices.append(float(part) if part.isdecimal() else 0.0)
            hint = get_inner_hint(hint, part) if hint is not None else None
        return tuple(indices)

    return sorted(problems, key=index_fields)


def iter_leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full dotted name, value) from nested plain settings; an empty mapping counts as a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from iter_leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_plain_values(settings: Any) -> dict[str, Any]:
    """Convert settings to mutable plain values (JSON types)."""
    return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(settings), default=str)))
