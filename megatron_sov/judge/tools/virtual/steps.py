"""What a tool of a virtual world does: a list of steps over tables, each an object with one verb.

    {"get": TABLE, "key": VALUE, "as": NAME}            the row of that key, or the call is refused
    {"get": TABLE, "where": TEST, "as": NAME}           the first row for which the test holds; both may have
                                                        "else": "sentence" for the refusal
    {"find": TABLE, "where": TEST, "as": NAME}          all rows for which the test holds, in which a row is
                                                        `row`; also "order": VALUE of a row, "limit": number
    {"require": TEST, "else": "sentence"}               or the call is refused with the sentence
    {"insert": TABLE, "row": {COLUMN: VALUE}, "as": NAME}
    {"update": TABLE, "key": VALUE, "set": {COLUMN: VALUE}}
    {"delete": TABLE, "key": VALUE}
    {"let": NAME, "be": VALUE}
    {"return": VALUE or {FIELD: VALUE}}                 the last step

Values and tests are expressions.  A row has its columns and its key as `id`, as they were when it was read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.judge.tools.environment import ToolFault, ToolRefused
from megatron_sov.judge.tools.virtual.expressions import (
    CONSTANTS, FUNCTIONS, Columns, Expression, Problems, quote, read, value_of)

MAX_STEPS = 20
"""Of a tool."""
MAX_TOLD_CHARS = 300
"""Of a refusal's sentence."""
VERBS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "get": (frozenset({"as"}), frozenset({"key", "where", "else"})),
    "find": (frozenset({"as"}), frozenset({"where", "order", "limit"})),
    "require": (frozenset({"else"}), frozenset()),
    "insert": (frozenset({"row"}), frozenset({"as"})),
    "update": (frozenset({"key", "set"}), frozenset()),
    "delete": (frozenset({"key"}), frozenset()),
    "let": (frozenset({"be"}), frozenset()),
    "return": (frozenset(), frozenset()),
}
"""Verb -> what stands beside it, and what may."""
CHANGING = frozenset({"insert", "update", "delete"})
_TABLED = frozenset({"get", "find"}) | CHANGING
_ROW = "row"
RESERVED = frozenset({_ROW, *CONSTANTS})
"""Names that steps and arguments may not have."""
Tables = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class WorldStep:
    """One step, sound as far as can be seen without values."""

    verb: str
    """One of `VERBS`."""
    table: str = ""
    """Whose rows."""
    name: str = ""
    """Under which later steps know what it gives; empty: under none."""
    values: Mapping[str, Expression] = field(default_factory=dict)
    """Of `key`, `where`, `order`, `be`, `require` and `return`, as the verb has them."""
    columns: Mapping[str, Expression] = field(default_factory=dict)
    """Column -> what it becomes, or field of the result."""
    told: str = ""
    """What a refused model is told."""
    limit: int = 0
    """Most rows; 0: all."""

    def expressions(self) -> list[Expression]:
        return [*self.values.values(), *self.columns.values()]


class StepReader:
    """Reads the steps of one tool, and knows which names there are by then."""

    def __init__(self, where: str, tables: Mapping[str, Set[str]], arguments: Set[str],
                 problems: Problems) -> None:
        """Args:
            where: the tool, for problems.
            tables: name -> columns.
            arguments: names of the tool's.
            problems: is told.
        """
        self._where, self._tables, self._problems = where, tables, problems
        self._names: dict[str, Set[str] | None] = dict.fromkeys(sorted(arguments))

    def steps(self, given: Any) -> tuple[WorldStep, ...]:
        if not isinstance(given, list) or not 0 < len(given) <= MAX_STEPS:
            self._problems.add(f"{self._where}.does", f"must be a list of 1 to {MAX_STEPS} steps")
            return ()
        # in order: a step may use the names of those before it
        found = [self._step(step, f"{self._where}.does[{i}]") for i, step in enumerate(given)]
        if [step.verb for step in found if step.verb == "return"] != ["return"] or found[-1].verb != "return":
            self._problems.add(f"{self._where}.does", "must end with its only `return`")
        return tuple(found)

    def _step(self, given: Any, where: str) -> WorldStep:
        verbs = [verb for verb in VERBS if isinstance(given, Mapping) and verb in given]
        if len(verbs) != 1:
            self._problems.add(where, f"{quote(given)} must be an object with one of {', '.join(VERBS)}")
            return WorldStep("let")
        verb, = verbs
        needed, may = VERBS[verb]
        beside = set(map(str, given)) - {verb}
        if missing := sorted(needed - beside):
            self._problems.add(where, f"a {verb} needs {missing[0]!r}")
        if unknown := sorted(beside - needed - may):
            self._problems.add(where, f"a {verb} has no {unknown[0]!r}")
        made = self._tabled(given, verb, where) if verb in _TABLED else self._plain(given, verb, where)
        if made.name:
            # columns are known of rows alone; of other values nothing can be said before they exist
            known = self._tables[made.table] | {"id"} if made.table else None
            self._names[made.name] = known
        return made

    def _tabled(self, given: Mapping[str, Any], verb: str, where: str) -> WorldStep:
        table = given[verb]
        if not isinstance(table, str) or table not in self._tables:
            self._problems.add(where, f"there is no table {quote(table)}; there are "
                                      f"{', '.join(self._tables)}")
            return WorldStep(verb)
        row = {**self._names, _ROW: self._tables[table] | {"id"}}
        values = {word: self._read(given[word], where, row if word in ("where", "order") else self._names)
                  for word in ("key", "where", "order") if word in given}
        columns = self._columns(given.get("row", given.get("set", {})), table, where, whole=verb == "insert")
        if verb == "get" and len(values) != 1:
            self._problems.add(where, "a get needs `key` or `where`, one of them")
        limit = given.get("limit", 0)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            self._problems.add(where, f"limit is {quote(limit)}, must be a whole number")
            limit = 0
        return WorldStep(verb, table, self._name(given.get("as", ""), where), values, columns,
                         self._told(given, where) if "else" in given else "", limit)

    def _plain(self, given: Mapping[str, Any], verb: str, where: str) -> WorldStep:
        if verb == "require":
            return WorldStep(verb, values={verb: self._read(given[verb], where)},
                             told=self._told(given, where))
        if verb == "let":
            return WorldStep(verb, name=self._name(given[verb], where),
                             values={"be": self._read(given.get("be"), where)})
        result = given[verb]
        if isinstance(result, Mapping):
            fields = {str(name): self._read(value, where) for name, value in result.items()}
            return WorldStep(verb, columns=fields)
        return WorldStep(verb, values={verb: self._read(result, where)})

    def _told(self, given: Mapping[str, Any], where: str) -> str:
        told = given.get("else")
        if not isinstance(told, str) or not told.strip():
            self._problems.add(where, "`else` must be the sentence that a refused model is told")
            return ""
        return told[:MAX_TOLD_CHARS]

    def _read(self, text: Any, where: str, names: Columns | None = None) -> Expression:
        return read(text, self._names if names is None else names, where, self._problems)

    def _columns(self, given: Any, table: str, where: str, whole: bool) -> dict[str, Expression]:
        if not isinstance(given, Mapping):
            self._problems.add(where, f"{quote(given)} must be an object of columns")
            return {}
        known = self._tables[table]
        if unknown := sorted(set(map(str, given)) - known):
            self._problems.add(where, f"{table} has no column {unknown[0]!r}; it has "
                                      f"{', '.join(sorted(known))}")
        if whole and (missing := sorted(known - set(given))):
            self._problems.add(where, f"the new row of {table} lacks {', '.join(missing)}")
        return {str(name): self._read(value, where) for name, value in given.items()}

    def _name(self, given: Any, where: str) -> str:
        if given == "":
            return ""
        if not isinstance(given, str) or not given.isidentifier() or given in self._names \
                or given in RESERVED or given in FUNCTIONS:
            self._problems.add(where, f"{quote(given)} must be a new name of letters, digits and _, and none "
                                      f"of {', '.join(FUNCTIONS)}")
            return ""
        return given


def run(steps: tuple[WorldStep, ...], arguments: Mapping[str, Any], tables: Tables,
        new_key: Callable[[str, dict[str, Any]], str]) -> Any:
    """Return what a tool's steps give; they change the tables.

    Args:
        steps: sound ones.
        arguments: all of the tool's.
        tables: name -> rows by key.
        new_key: puts a row into a table; returns its key.

    Raises:
        ToolFault: the call is refused, or a step fails; the tables may be changed halfway.
    """
    scope = dict(arguments)
    result: Any = None
    for step in steps:
        given = _DO[step.verb](step, scope, tables, new_key)
        if step.name:
            scope[step.name] = given
        result = given
    # what is given out must not change with the tables later
    return copy.deepcopy(result)


NewKey = Callable[[str, dict[str, Any]], str]


def _row(step: WorldStep, scope: Mapping[str, Any], tables: Tables) -> tuple[str, dict[str, Any]]:
    key = value_of(step.values["key"], scope)
    if not isinstance(key, str) or key not in tables[step.table]:
        raise ToolRefused(step.told or f"there is no {quote(key)} in {step.table}")
    return key, tables[step.table][key]


def _get(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> Any:
    if "where" in step.values:
        found: list[dict[str, Any]] = _find(step, scope, tables, new_key)
        if not found:
            raise ToolRefused(step.told or f"there is no such row in {step.table}")
        return found[0]
    key, row = _row(step, scope, tables)
    return {"id": key, **copy.deepcopy(row)}


def _find(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> Any:
    # by key, so that results do not depend on the order of earlier changes
    rows = [{"id": key, **copy.deepcopy(row)} for key, row in sorted(tables[step.table].items())]
    if "where" in step.values:
        rows = [row for row in rows if _test(step.values["where"], {**scope, _ROW: row})]
    if "order" in step.values:
        places = [value_of(step.values["order"], {**scope, _ROW: row}) for row in rows]
        # numbers are one kind, bool is one of its own: Python would sort true among the numbers
        kinds = {float if type(place) is int else type(place) for place in places}
        if len(kinds) > 1 or not kinds <= {str, bool, float}:
            raise ToolFault("failed", "failed (rows cannot be put in order: what they are ordered by is not "
                                      "all numbers or all texts)")
        # the place in the list breaks ties, and rows are never compared
        rows = [row for _, _, row in sorted(zip(places, range(len(rows)), rows, strict=True))]
    return rows[:step.limit or None]


def _require(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> None:
    if not _test(step.values["require"], scope):
        raise ToolRefused(step.told)


def _insert(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> Any:
    row = {name: copy.deepcopy(value_of(value, scope)) for name, value in step.columns.items()}
    return {"id": new_key(step.table, row), **copy.deepcopy(row)}


def _update(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> None:
    _, row = _row(step, scope, tables)
    # all values are worked out before the row changes
    row |= {name: copy.deepcopy(value_of(value, scope)) for name, value in step.columns.items()}


def _delete(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> None:
    key, _ = _row(step, scope, tables)
    del tables[step.table][key]


def _let(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> Any:
    return value_of(step.values["be"], scope)


def _return(step: WorldStep, scope: Mapping[str, Any], tables: Tables, new_key: NewKey) -> Any:
    if "return" in step.values:
        return value_of(step.values["return"], scope)
    return {name: value_of(value, scope) for name, value in step.columns.items()}


def _test(test: Expression, scope: Mapping[str, Any]) -> bool:
    found = value_of(test, scope)
    if not isinstance(found, bool):
        raise ToolFault("failed", f"failed ({quote(test.text)} is neither true nor false)")
    return found


_DO: dict[str, Callable[[WorldStep, dict[str, Any], Tables, NewKey], Any]] = {
    "get": _get, "find": _find, "require": _require, "insert": _insert, "update": _update, "delete": _delete,
    "let": _let, "return": _return}
