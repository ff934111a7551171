"""The part of JSON schema in which worlds declare columns, arguments and results, as Python types.

What a declaration says is held to; a keyword that would not be is refused, since a schema that is only shown
may lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, Union, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from megatron_sov.tools.virtual.problems import Problems, shown

PLAIN: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}
"""JSON schema's name -> Python type."""
MAX_LEVELS = 6
"""Objects and lists within each other."""
CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Strict: "3" is no 3, and true is no 1."""
_WORDS = {"array": {"items"}, "object": {"properties", "required", "additionalProperties"}}
_ANYWHERE = {"type", "description", "enum", "default", "title"}
# made of values, which type checkers do not follow
_TYPED_DICT, _NOT_REQUIRED = cast(Any, TypedDict), cast(Any, NotRequired)
_UNION, _LITERAL, _LIST = cast(Any, Union), cast(Any, Literal), cast(Any, list)


def type_of(schema: Any, where: str, problems: Problems, also: frozenset[str] = frozenset(),
            levels: int = MAX_LEVELS) -> Any:
    """Return the Python type of a schema; what is wrong is noted, and it is then `Any`.

    Args:
        schema: of one value.
        where: the place, for problems.
        problems: is told.
        also: further keywords that the place knows.
        levels: that may follow.
    """
    if not isinstance(schema, Mapping) or not levels:
        problems.add(where, f"{shown(schema)} must be a JSON schema, at most {MAX_LEVELS} levels deep")
        return Any
    named = schema.get("type")
    names: list[Any] = named if isinstance(named, list) else [named]
    known = PLAIN.keys() | _WORDS.keys()
    if not names or not all(isinstance(name, str) and name in known for name in names):
        problems.add(where, f"type is {shown(named)}, must be one of {', '.join(sorted(known))}, or a list "
                            "of them")
        return Any
    allowed = _ANYWHERE | also | {word for name in names for word in _WORDS.get(name, ())}
    if unknown := sorted(set(map(str, schema)) - allowed):
        problems.add(where, f"has {unknown[0]!r}, which nothing would hold to; a {names[0]} may have "
                            f"{', '.join(sorted(allowed))}")
    if "enum" in schema:
        return _choice(schema["enum"], names, where, problems)
    made = [_one(name, schema, where, problems, levels) for name in names]
    return _UNION[tuple(made)]


def _choice(values: Any, names: list[str], where: str, problems: Problems) -> Any:
    plain = {"string": str, "integer": int, "null": type(None)}
    kinds = tuple(plain[name] for name in names if name in plain)
    if not isinstance(values, list) or not values or not all(
            isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        problems.add(where, "enum must be a list of texts or whole numbers of the type beside it")
        return Any
    return _LITERAL[tuple(values)]


def _one(name: str, schema: Mapping[str, Any], where: str, problems: Problems, levels: int) -> Any:
    if name == "array":
        return _LIST[type_of(schema.get("items"), f"{where}.items", problems, levels=levels - 1)]
    return _object(schema, where, problems, levels) if name == "object" else PLAIN[name]


def _object(schema: Mapping[str, Any], where: str, problems: Problems, levels: int) -> Any:
    fields = fields_of(schema, where, problems)
    required = schema.get("required", list(fields))
    made = {}
    for name, part in fields.items():
        kind = type_of(part, f"{where}.{name}", problems, levels=levels - 1)
        made[name] = kind if name in required else _NOT_REQUIRED[kind]
    return record_of(made)


def record_of(fields: Mapping[str, Any]) -> Any:
    """Return the type of an object with these fields and no other.

    Args:
        fields: name -> Python type.
    """
    return with_config(CONFIG)(_TYPED_DICT("Object", dict(fields)))


def fields_of(schema: Mapping[str, Any], where: str, problems: Problems) -> Mapping[str, Any]:
    """Return the properties of an object's schema; what is wrong with them is noted."""
    fields = schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) and name.isidentifier()
                                                  for name in fields):
        problems.add(where, "properties must be an object whose keys are names of letters, digits and _")
        return {}
    if not isinstance(required, list) or not all(isinstance(name, str) and name in fields
                                                 for name in required):
        problems.add(where, f"required is {shown(required)}, must be a list of properties")
    if schema.get("additionalProperties", False) is not False:
        problems.add(where, "additionalProperties must be false: nothing else is taken or given")
    return fields


class Held:
    """A type that values are held to."""

    def __init__(self, kind: Any) -> None:
        """`kind`: as `type_of` gives it."""
        # inside of an object, so that strictness reaches what lists hold
        self._adapter = TypeAdapter(record_of({"value": kind}))

    def problem(self, value: Any) -> str:
        """Return what a JSON value has that the type does not allow; empty: nothing."""
        try:
            self._adapter.validate_json(json.dumps({"value": value}, allow_nan=False))
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"][1:])
            return f"{place}: {first['msg'][:120]}" if place else first["msg"][:120]
        except (TypeError, ValueError) as e:
            return f"is no JSON ({str(e)[:80]})"
        return ""
