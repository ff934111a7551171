"""A virtual world as it is described, read and held to its own rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NotRequired, Union, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.judge.tools.environment import Parameter
from megatron_sov.judge.tools.virtual.expressions import Problems, quote
from megatron_sov.judge.tools.virtual.steps import CHANGING, RESERVED, StepReader, Tables, WorldStep

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
MAX_SPEC_CHARS = 400_000
"""Of a world as JSON."""
MAX_TABLES, MAX_COLUMNS, MAX_ROWS, MAX_TOOLS, MAX_ARGUMENTS = 12, 24, 500, 32, 12
"""Of a world, of a table, and of a tool."""
COLUMN_WORDS = frozenset({"references", "free"})
"""Of columns, beside JSON schema's: `references`: a table whose keys it holds; `free`: words of the caller's,
which no goal compares."""
_WORLD = {"name", "rules", "tables", "tools"}
_TABLE = {"prefix", "columns", "rows"}
_TOOL = {"name", "description", "parameters", "returns", "does"}


# The part of JSON schema in which worlds declare columns, arguments and results, as Python types. What a
# declaration says is held to; a keyword that would not be is refused, since a schema that is only shown may
# lie.


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
        problems.add(where, f"{quote(schema)} must be a JSON schema, at most {MAX_LEVELS} levels deep")
        return Any
    named = schema.get("type")
    names: list[Any] = named if isinstance(named, list) else [named]
    known = PLAIN.keys() | _WORDS.keys()
    if not names or not all(isinstance(name, str) and name in known for name in names):
        problems.add(where, f"type is {quote(named)}, must be one of {', '.join(sorted(known))}, or a list "
                            "of them")
        return Any
    allowed = _ANYWHERE | also | {word for name in names for word in _WORDS.get(name, ())}
    # a keyword that is shown and not held to would mislead the model
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
            # True is an int in Python, and no whole number of a schema
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
        # results without `required` must have all fields, which is stricter than JSON schema
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
        problems.add(where, f"required is {quote(required)}, must be a list of properties")
    if schema.get("additionalProperties", False) is not False:
        problems.add(where, "additionalProperties must be false: nothing else is taken or given")
    return fields


class StoredCollection:
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
            # without the wrapping field `value`, which only the type here has
            place = ".".join(str(part) for part in first["loc"][1:])
            return f"{place}: {first['msg'][:120]}" if place else first["msg"][:120]
        except (TypeError, ValueError) as e:
            return f"is no JSON ({str(e)[:80]})"
        return ""


@dataclass(frozen=True)
class TableSpec:
    """A table of a world."""

    name: str
    prefix: str
    """That keys of new rows begin with."""
    columns: Mapping[str, Mapping[str, Any]]
    """Name -> schema."""
    rows: Mapping[str, Mapping[str, Any]]
    """Key -> row, at the start."""
    held: StoredCollection = field(compare=False)
    """What each row is held to."""

    @property
    def free(self) -> frozenset[str]:
        """Return the columns that no goal compares."""
        return frozenset(name for name, column in self.columns.items() if column.get("free") is True)

    def references(self) -> dict[str, str]:
        """Return column -> the table whose keys it holds."""
        return {name: column["references"] for name, column in self.columns.items()
                if "references" in column}


@dataclass(frozen=True)
class ToolSpec:
    """A tool of a world."""

    name: str
    description: str
    parameters: Mapping[str, Parameter]
    """Name -> what it takes."""
    schemas: Mapping[str, Mapping[str, Any]]
    """Name -> the schema that the parameter was declared with."""
    held: Mapping[str, StoredCollection] = field(compare=False)
    """Name -> what the parameter is held to."""
    returns: StoredCollection = field(compare=False)
    """What results are held to."""
    steps: tuple[WorldStep, ...] = ()

    def is_required(self, name: str) -> bool:
        return self.parameters[name].default is Parameter.default

    @property
    def changes(self) -> bool:
        return any(step.verb in CHANGING for step in self.steps)


@dataclass(frozen=True)
class Spec:
    """A world whose description is sound."""

    name: str
    rules: str
    """What models are told before they begin."""
    tables: Mapping[str, TableSpec]
    tools: Mapping[str, ToolSpec]

    def first_tables(self) -> Tables:
        return {name: {key: dict(row) for key, row in table.rows.items()}
                for name, table in self.tables.items()}

    def broken_rule(self, tables: Tables) -> str:
        """Return why tables are not those of this world; empty: they keep its rules."""
        for name, table in self.tables.items():
            references = table.references()
            for key, row in tables[name].items():
                if wrong := table.held.problem(row):
                    return f"row {key} of {name}: {wrong}"
                for column, other in references.items():
                    if row[column] is not None and row[column] not in tables[other]:
                        return f"row {key} of {name}: {column} is {quote(row[column])}, which {other} has not"
        return ""


def problems_of(world: Any) -> list[str]:
    """Return all that is wrong with a description, a sentence each."""
    return _read(world)[1].told


def spec_of(world: Any) -> Spec:
    """Return a described world.

    Raises:
        UserError: the description breaks rules; all of them are told.
    """
    try:
        # the order of tools is what models see, so it is part of the cache's key
        text = json.dumps(world, sort_keys=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"the task's world is no JSON ({e})") from None
    return _known(text)


@lru_cache(maxsize=32)
def _known(text: str) -> Spec:
    spec, problems = _read(json.loads(text))
    if problems.told or spec is None:
        raise UserError(list_problems("the task's world", problems.told))
    return spec


def _read(world: Any) -> tuple[Spec | None, Problems]:
    problems = Problems()
    if not isinstance(world, Mapping):
        problems.add("world", f"is {quote(world)}, must be an object with {', '.join(sorted(_WORLD))}")
        return None, problems
    try:
        # bounded before anything is read: the parts below walk all of it
        too_long = len(json.dumps(world, allow_nan=False)) > MAX_SPEC_CHARS
    except (TypeError, ValueError, RecursionError):
        too_long = True
    if too_long:
        problems.add("world", f"must be JSON of at most {MAX_SPEC_CHARS:,} characters")
        return None, problems
    _only(world, _WORLD, "world", problems)
    tables = _tables(world.get("tables"), problems)
    tools = _tools(world.get("tools"), tables, problems)
    rules = _text(world, "rules", "world", problems)
    spec = Spec(_text(world, "name", "world", problems), rules, tables, tools)
    # rows are held to their types only where the types themselves are sound
    if not problems.told and (broken := spec.broken_rule(spec.first_tables())):
        problems.add("tables", broken)
    return (None if problems.told else spec), problems


def _tables(given: Any, problems: Problems) -> dict[str, TableSpec]:
    if not isinstance(given, Mapping) or not 0 < len(given) <= MAX_TABLES:
        problems.add("tables", f"must be an object of 1 to {MAX_TABLES} tables")
        return {}
    found: dict[str, TableSpec] = {}
    for name, table in given.items():
        where = f"tables.{str(name)[:40]}"
        if not isinstance(table, Mapping) or not str(name).isidentifier():
            problems.add(where, "must be an object with prefix, columns and rows; its name has letters, "
                                "digits and _")
            continue
        _only(table, _TABLE, where, problems)
        columns = _columns(table.get("columns"), where, given, problems)
        rows = _rows(table.get("rows"), where, problems)
        found[name] = TableSpec(name, _prefix(table, where, problems), columns, rows,
                                _row_type(columns, where, problems))
    prefixes = [table.prefix for table in found.values()]
    # new keys are prefix and number: two tables would give out the same
    if len(set(prefixes)) < len(prefixes):
        problems.add("tables", "each table must have a prefix of its own, so that a key tells its table")
    return found


def _prefix(table: Mapping[str, Any], where: str, problems: Problems) -> str:
    prefix = table.get("prefix")
    if not isinstance(prefix, str) or not prefix.isalpha() or len(prefix) > 12:
        problems.add(where, f"prefix is {quote(prefix)}, must be 1 to 12 letters, as in B for the key B1")
        return ""
    return prefix


def _columns(given: Any, where: str, tables: Mapping[str, Any],
             problems: Problems) -> dict[str, Mapping[str, Any]]:
    if not isinstance(given, Mapping) or not 0 < len(given) <= MAX_COLUMNS or "id" in given \
            or not all(isinstance(name, str) and name.isidentifier() for name in given):
        problems.add(f"{where}.columns", f"must be an object of 1 to {MAX_COLUMNS} columns, whose names have "
                                         "letters, digits and _, and are not id, the key's name")
        return {}
    for name, column in given.items():
        refers = isinstance(column, Mapping) and "references" in column
        other = column["references"] if refers else None
        if refers and (not isinstance(other, str) or other not in tables
                       or column.get("type") not in ("string", ["string", "null"])):
            problems.add(f"{where}.{name}", f"references {quote(other)}: must be a table, whose keys are of "
                                            "type string")
        if isinstance(column, Mapping) and column.get("free", False) not in (True, False):
            problems.add(f"{where}.{name}", "free must be true or false")
    return dict(given)


def _row_type(columns: Mapping[str, Any], where: str, problems: Problems) -> StoredCollection:
    return StoredCollection(record_of({name: type_of(column, f"{where}.{name}", problems, COLUMN_WORDS)
                                       for name, column in columns.items()}))


def _rows(given: Any, where: str, problems: Problems) -> dict[str, Mapping[str, Any]]:
    if not isinstance(given, Mapping) or len(given) > MAX_ROWS or not all(
            isinstance(row, Mapping) and key and len(str(key)) <= 40 for key, row in given.items()):
        problems.add(f"{where}.rows", f"must be an object of at most {MAX_ROWS} rows by key, each an object")
        return {}
    return dict(given)


def _tools(given: Any, tables: Mapping[str, TableSpec], problems: Problems) -> dict[str, ToolSpec]:
    if not isinstance(given, list) or not 0 < len(given) <= MAX_TOOLS:
        problems.add("tools", f"must be a list of 1 to {MAX_TOOLS} tools")
        return {}
    found: dict[str, ToolSpec] = {}
    for i, tool in enumerate(given):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            problems.add(where, f"{quote(tool)} must be an object with {', '.join(sorted(_TOOL))}")
            continue
        name = _text(tool, "name", where, problems)
        where = f"tool {name[:40]}" if name else where
        if not name.isidentifier() or len(name) > 64:
            problems.add(where, "its name must have letters, digits and _, 64 at most")
        if name in found:
            problems.add(where, "stands there twice")
        _only(tool, _TOOL, where, problems)
        found[name] = _tool(tool, name, where, tables, problems)
    return found


def _tool(tool: Mapping[str, Any], name: str, where: str, tables: Mapping[str, TableSpec],
          problems: Problems) -> ToolSpec:
    given = tool.get("parameters", {})
    if not isinstance(given, Mapping) or given.get("type", "object") != "object":
        problems.add(f"{where}.parameters", "must be the JSON schema of an object")
        given = {}
    _only(given, {"type", "properties", "required", "additionalProperties", "description"},
          f"{where}.parameters", problems)
    schemas = fields_of(given, f"{where}.parameters", problems)
    if len(schemas) > MAX_ARGUMENTS:
        problems.add(f"{where}.parameters", f"has more than {MAX_ARGUMENTS}")
    required = given.get("required", [])
    parameters, held = {}, {}
    for argument, schema in schemas.items():
        if argument in RESERVED:
            problems.add(f"{where}.{argument}", "steps mean something else by this name; choose another one")
        kind = type_of(schema, f"{where}.{argument}", problems)
        held[argument] = StoredCollection(kind)
        described = schema.get("description", "") if isinstance(schema, Mapping) else ""
        if isinstance(required, list) and argument in required:
            parameters[argument] = Parameter(kind, str(described))
            continue
        default = schema.get("default") if isinstance(schema, Mapping) else None
        if default is not None and (wrong := held[argument].problem(default)):
            problems.add(f"{where}.{argument}", f"its default {quote(default)} is not of its type ({wrong})")
        # an argument that may be left out is null inside of steps, so null is allowed
        parameters[argument] = Parameter(kind | None if default is None else kind, str(described), default)
    returns = StoredCollection(type_of(tool.get("returns"), f"{where}.returns", problems))
    # steps are read once, against all names that there are: a typing error never reaches an episode
    reader = StepReader(where, {t.name: t.columns.keys() for t in tables.values()}, set(parameters), problems)
    return ToolSpec(name, _text(tool, "description", where, problems), parameters, schemas, held,
                    returns, reader.steps(tool.get("does")))


def _only(given: Mapping[str, Any], known: set[str], where: str, problems: Problems) -> None:
    if unknown := sorted(set(map(str, given)) - known):
        problems.add(where, f"has {unknown[0]!r}; it may have {', '.join(sorted(known))}")


def _text(given: Mapping[str, Any], name: str, where: str, problems: Problems) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value.strip():
        problems.add(where, f"{name} is {quote(value)}, must be text")
        return ""
    return value
