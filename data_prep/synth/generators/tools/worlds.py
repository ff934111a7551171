"""Worlds: a domain becomes tables, rules and typed tools that `virtual` plays, all of them data.

What tools do is a list of steps, so that a world can be tried out before anybody trusts it: it has to be
sound, every tool must come through, change what it says it changes, and keep what its schema promises.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Kind, SampleVerdict, Temperature)
from data_prep.synth.generators.drawing import Draws
from data_prep.synth.generators.tools.replies import items_of, object_in, written
from megatron_sov.base.settings import AtLeastOne, NotBlank, NotNegativeInt
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.virtual.expressions import FUNCTIONS
from megatron_sov.judge.tools.virtual.spec import Spec, ToolSpec, problems_of, spec_of
from megatron_sov.judge.tools.virtual.steps import Tables, WorldStep
from megatron_sov.judge.tools.worlds.virtual import Virtual

DAYS = ("2026-03-02", "2026-07-15", "2027-01-31")
"""Where an argument is a day, beside those of the tables."""
_OF_DAYS = {"days", "is_day"}
Places = dict[str, list[tuple[str, str]]]
"""Argument -> tables and columns whose values it may have; no table: it is a day."""
MAX_STATES = 24
"""That calls begin from."""
FITTING = 0.7
"""Share of arguments that fit the tables."""
LEFT_OUT = 0.4
"""Share of optional arguments that are left out."""
TEXTS = ("alpha", "Zz 9", "")
NUMBERS = (0, 1, 2, 3, 7, -1, 100)
LIES = ("failed", "result", "state")
"""Faults that are the world's own."""
MIN_ROWS = 6
"""Of all tables together, at the start."""
MIN_CHANGING_TOOLS = 2
"""Tools that change a table."""
MIN_TOOLS = 4
"""Fewer are too few to choose from."""
MAX_TOLD = 12
"""Problems that a model is shown to mend."""
# A described world tried out: its tools are called with drawn arguments of the declared types, from many
# states, and held to what they declare. Most arguments fit the tables, so that tools come through; the
# others are anything that the schema allows, so that what it allows and the tool cannot do comes to light.
# Which values an argument of a tool is likely to take, read from the tool's steps.


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


def _places(step: WorldStep) -> Iterator[tuple[str, str, str]]:
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
        # types too: in Python 1 equals True
        if value is not None and not any(value == one and type(value) is type(one) for one in found):
            found.append(value)
    return found


@dataclass
class Trial:
    """What came of it."""

    num_calls: int = 0
    successes: dict[str, int] = field(default_factory=dict)
    """Tool -> calls that gave a result."""
    changes: dict[str, int] = field(default_factory=dict)
    """Tool -> calls that changed a table."""
    lies: list[str] = field(default_factory=list)
    """Sentences: a call that the schema allows and the tool or its world does not, an argument that nothing
    uses, a call that cannot be made again."""


def tried(world: Mapping[str, Any], name: str, calls_per_tool: int) -> Trial:
    """Return what comes of calling a sound world's tools.

    Args:
        world: its description.
        name: of the stream that arguments are drawn from.
        calls_per_tool: to make.
    """
    spec, draws, trial = spec_of(world), Draws("trial", name), Trial()
    virtual = Virtual()
    virtual.reset({"question": "", "world": world, "goal": {}})
    states = [virtual.snapshot()]
    trial.lies += [f"tool {tool.name}: nothing uses its argument {argument}"
                   for tool in spec.tools.values() for argument in sorted(_ignored(tool))]
    places = {tool.name: places_of(tool) for tool in spec.tools.values()}
    for _ in range(calls_per_tool):
        for tool in spec.tools.values():
            state = draws.one(states)
            arguments = _arguments(tool, values_of(spec, places[tool.name], state), draws)
            after = _call(virtual, tool, state, arguments, trial)
            # later calls begin there too: some tools need what another one has changed
            if after is not None and after != state and len(states) < MAX_STATES:
                states.append(after)
    return trial


def _call(virtual: Virtual, tool: ToolSpec, state: Any, arguments: dict[str, Any], trial: Trial) -> Any:
    """Make a call twice; returns the state behind it, or None where there was no result."""
    virtual.restore(state)
    trial.num_calls += 1
    shown = json.dumps(arguments, ensure_ascii=False)[:160]
    try:
        result, after = virtual.call(tool.name, arguments), virtual.snapshot()
    except ToolFault as e:
        if e.code in LIES and not any(lie.startswith(f"tool {tool.name}: ") for lie in trial.lies):
            trial.lies.append(f"tool {tool.name}: its schema allows {shown}, and the call {e.reason}")
        if e.code == "arguments":
            trial.lies.append(f"tool {tool.name}: refuses arguments of its schema: {e.reason}")
        return None
    virtual.restore(state)
    # twice from the same state: nothing may depend on time or chance
    if (virtual.call(tool.name, arguments), virtual.snapshot()) != (result, after):
        trial.lies.append(f"tool {tool.name}: the same call {shown} gives something else")
    trial.successes[tool.name] = trial.successes.get(tool.name, 0) + 1
    if after != state:
        trial.changes[tool.name] = trial.changes.get(tool.name, 0) + 1
    return after


def _ignored(tool: ToolSpec) -> set[str]:
    used = {name for step in tool.steps for expression in step.expressions() for name in expression.names}
    return set(tool.parameters) - used


def _arguments(tool: ToolSpec, fitting: Mapping[str, list[Any]], draws: Draws) -> dict[str, Any]:
    """Return arguments that the tool's schema allows, many of them from those that fit."""
    found = {}
    for name, schema in tool.schemas.items():
        if not tool.is_required(name) and draws.share() < LEFT_OUT:
            continue
        values = [value for value in fitting[name] if not tool.held[name].problem(value)]
        # a tool may change a list that it is given, and the next call would get it
        found[name] = (copy.deepcopy(draws.one(values)) if values and draws.share() < FITTING
                       else _anything(schema, draws))
    return found


def _anything(schema: Mapping[str, Any], draws: Draws) -> Any:
    if "enum" in schema:
        return draws.one(schema["enum"])
    named = schema["type"]
    kind = draws.one(named) if isinstance(named, list) else named
    if kind == "object":
        return {name: _anything(part, draws) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [_anything(schema["items"], draws) for _ in range(draws.below(3))]
    simple: dict[str, tuple[Any, ...]] = {"string": TEXTS, "integer": NUMBERS, "boolean": (True, False),
                                          "number": (*NUMBERS, 0.5), "null": (None,)}
    return draws.one(simple[kind])


@dataclass(frozen=True)
class WorldSettings:
    """How worlds are made."""

    language: NotBlank = "English"
    """Of names that people read, rows and rules, unless a domain has its own `language`."""
    worlds_per_domain: AtLeastOne = 1
    """Each is an item of its own."""
    num_repairs: NotNegativeInt = 1
    """How often a model is told what is wrong and asked to mend it."""
    calls_per_tool: AtLeastOne = 40
    """Drawn calls by which a world is tried out."""
    temperature: Temperature = 0.8
    """Of the writer."""
    max_tokens: AtLeastOne = 8192
    """Of an answer; a world takes some thousands."""


class Worlds(Generator):
    """Makes worlds of domains."""

    name: ClassVar[str] = "worlds"
    kind: Kind = "task"
    help: ClassVar[str] = "virtual tool environments: tables, rules and typed tools, from domains"
    Settings: ClassVar[type[Any]] = WorldSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the domains of files in JSON lines: `domain`, and if they like `description`, `language`."""
        for item in items_of(inputs, "domain", '{"domain": "a library"}'):
            for number in range(1, self.settings.worlds_per_domain + 1):
                yield GeneratorItem(f"{item.id}-{number}", {**item.fields, "number": number}, item.source,
                                    item.licence)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        s, domain = self.settings, str(item.fields["domain"])
        asked = {"temperature": s.temperature, "max_tokens": s.max_tokens}
        language = str(item.fields.get("language") or s.language)
        state = object_in(ask("worlds/tables", domain=domain, language=language, min_rows=MIN_ROWS,
                              description=str(item.fields.get("description") or ""),
                              number=item.fields["number"], **asked)[0])
        if isinstance(state, str):
            yield _unread(domain, state)
            return
        tools = object_in(ask("worlds/tools", domain=domain, language=language, state=written(state),
                              min_tools=MIN_TOOLS, min_changing_tools=MIN_CHANGING_TOOLS,
                              functions=", ".join(FUNCTIONS), **asked)[0])
        world = tools if isinstance(tools, str) else {**state, "tools": tools.get("tools")}
        for repair in range(s.num_repairs + 1):
            if isinstance(world, str):
                yield _unread(domain, world)
                return
            verdicts = self._checked(world, item.id)
            wrong = [verdict for verdict in verdicts if not verdict.passed]
            # the last repair is checked and not mended again
            if not wrong or repair == s.num_repairs:
                break
            told = [line for verdict in wrong for line in verdict.detail.splitlines()][:MAX_TOLD]
            world = object_in(ask("worlds/repair", world=written(world), problems=told,
                                  functions=", ".join(FUNCTIONS), **asked)[0])
        yield GeneratedSample({"domain": domain, "world": world}, tuple(verdicts), notes={"repairs": repair})

    def _checked(self, world: Mapping[str, Any], name: str) -> list[SampleVerdict]:
        """Return what is to say of a world; without a sound description nothing more is looked at."""
        if problems := problems_of(world):
            return [SampleVerdict("sound", False, "\n".join(problems))]
        spec, s = spec_of(world), self.settings
        trial = tried(world, name, s.calls_per_tool)
        changing = [tool for tool in spec.tools.values() if tool.changes]
        counts = {"tools": (len(spec.tools), MIN_TOOLS),
                  "tools that change a table": (len(changing), MIN_CHANGING_TOOLS),
                  "rows": (sum(len(table.rows) for table in spec.tables.values()), MIN_ROWS)}
        return [SampleVerdict("sound", True),
                _all("size", [f"world: has {count} {what}, fewer than {least}"
                              for what, (count, least) in counts.items() if count < least]),
                _all("distinct tools", _alike(spec, world["tools"])),
                _all("honest schema", trial.lies),
                _all("every tool comes through", [
                    f"tool {tool}: none of {s.calls_per_tool} drawn calls gave a result, also with arguments "
                    "that fit the tables" for tool in spec.tools if tool not in trial.successes]),
                _all("every change takes place", [
                    f"tool {tool.name}: has steps that change a table, and none of its calls did"
                    for tool in changing if tool.name in trial.successes and tool.name not in trial.changes])]


def _unread(domain: str, why: str) -> GeneratedSample:
    return GeneratedSample({"domain": domain}, (SampleVerdict("form", False, why),))


def _all(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, "\n".join(problems))


def _alike(spec: Spec, tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on tools that do or say the same as an earlier one."""
    found, said, done = [], dict[str, str](), dict[str, str]()
    for tool in tools:
        says = " ".join(str(tool["description"]).casefold().split())
        does = json.dumps([tool["does"], tool.get("parameters"), tool.get("returns")], sort_keys=True)
        # two that say or do the same leave the choice between them to chance
        for known, value, what in ((said, says, "says"), (done, does, "does")):
            if value in known:
                found.append(f"tool {tool['name']}: {what} the same as {known[value]}")
            known.setdefault(value, tool["name"])
    return found
