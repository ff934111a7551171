"""Which values an argument of a tool is likely to take, read from the tool's steps."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_sov.tools.virtual.spec import Spec, ToolSpec
from megatron_sov.tools.virtual.steps import Step, Tables

DAYS = ("2026-03-02", "2026-07-15", "2027-01-31")
"""Where an argument is a day, beside those of the tables."""
_OF_DAYS = {"days", "is_day"}


Places = dict[str, list[tuple[str, str]]]
"""Argument -> tables and columns whose values it may have; no table: it is a day."""


def places_of(tool: ToolSpec) -> Places:
    """Return where a tool's arguments take their values: keys of rows that they name, columns that they are
    compared with or written into."""
    places: dict[str, set[tuple[str, str]]] = {name: set() for name in tool.parameters}
    for step in tool.steps:
        for argument, table, column in _places(step):
            if argument in places:
                places[argument].add((table, column))
    return {name: sorted(found) for name, found in places.items()}


def values_of(spec: Spec, places: Places, tables: Tables) -> dict[str, list[Any]]:
    """Return argument -> values of those places, in tables as they are."""
    return {name: _unique(value for place in found for value in _found(spec, place, tables))
            for name, found in places.items()}


def _places(step: Step) -> Iterator[tuple[str, str, str]]:
    """Yield (name, table, column): the name may be the column's value; no table: it is a day."""
    if "key" in step.values and isinstance(step.values["key"].tree, ast.Name):
        yield step.values["key"].tree.id, step.table, "id"
    for column, value in step.columns.items():
        if step.table and isinstance(value.tree, ast.Name):
            yield value.tree.id, step.table, column
    for expression in step.expressions():
        for node in ast.walk(expression.tree):
            names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
            columns = [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OF_DAYS:
                yield from ((name, "", "day") for name in names)
            elif isinstance(node, (ast.Compare, ast.Call)) and step.table and len(columns) == 1:
                yield from ((name, step.table, columns[0]) for name in names)


def _found(spec: Spec, place: tuple[str, str], tables: Tables) -> list[Any]:
    table, column = place
    if not table:
        return list(DAYS)
    if column == "id":
        return list(tables[table])
    described = spec.tables[table].columns.get(column, {})
    other: Mapping[str, Any] = tables.get(described.get("references", ""), {})
    return [*other, *described.get("enum", ()), *(row.get(column) for row in tables[table].values())]


def _unique(values: Iterator[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value is not None and not any(value == one and type(value) is type(one) for one in found):
            found.append(value)
    return found
