"""Worlds for tools: a model designs tables, rules and tools in Python, and every tool is tried out.

Tools are called with drawn arguments of the declared types, on many tables. Most arguments fit the tables, so
that calls succeed; the others are anything that the types allow, which shows what a tool allows and fails on.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Kind, SampleVerdict, Temperature)
from data_prep.synth.generators.drawing import Draws
from data_prep.synth.generators.tools.replies import items_of, object_in, written
from megatron_sov.base.settings import AtLeastOne, NotBlank, NotNegativeInt
from megatron_sov.judge.rewards.constraint import MODULES
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.worlds.virtual import (
    Tables, ToolOutcome, VirtualWorld, call_tools, problems_of, world_of)

MAX_STATES = 24
"""Tables that calls begin from."""
FITTING = 0.7
"""Share of arguments that fit the tables."""
LEFT_OUT = 0.4
"""Share of optional arguments that are left out."""
TEXTS = ("alpha", "Zz 9", "")
NUMBERS = (0, 1, 2, 3, 7, -1, 100)
LIES = ("failed", "state")
"""Faults that are the world's own."""
MIN_ROWS = 6
"""Of all tables together, at the start."""
MIN_CHANGING_TOOLS = 2
"""Tools that change a table."""
MIN_TOOLS = 4
"""Fewer are too few to choose from."""
MAX_TOLD = 12
"""Problems that a model is shown to mend."""
BATCH = 32
"""Calls that are made again together."""
DrawnCall = tuple[Tables, str, dict[str, Any]]
"""Tables, tool, arguments."""


@dataclass
class Trial:
    """Figures of the calls of a world's tools."""

    num_calls: int = 0
    successes: dict[str, int] = field(default_factory=dict)
    """Tool -> calls that gave a result."""
    changes: dict[str, int] = field(default_factory=dict)
    """Tool -> calls that changed a table."""
    lies: list[str] = field(default_factory=list)
    """Sentences: a call that the types allow and the tool or its world does not, an argument that nothing
    uses, a call that cannot be made again."""

    def add(self, call: DrawnCall, outcome: ToolOutcome) -> None:
        tables, name, arguments = call
        self.num_calls += 1
        fault = outcome.fault
        if fault is None:
            self.successes[name] = self.successes.get(name, 0) + 1
            if outcome.tables != tables:
                self.changes[name] = self.changes.get(name, 0) + 1
        elif fault.code in LIES and not any(lie.startswith(f"tool {name}: ") for lie in self.lies):
            self.lies.append(f"tool {name}: its types allow {written(arguments)[:160]}, and the call "
                             f"{fault.reason}")


def tried(world: Mapping[str, Any], name: str, calls_per_tool: int) -> Trial:
    """Return the trial of a sound world's tools.

    Args:
        world: its description.
        name: of the stream that arguments are drawn from.
        calls_per_tool: to make, beside the world's examples.
    """
    spec, draws, trial = world_of(world), Draws("trial", name), Trial()
    trial.lies += [f"tool {tool}: nothing uses its argument {argument}"
                   for tool in spec.tools for argument in sorted(_ignored(spec, tool))]
    states = [spec.first_tables()]
    examples: list[DrawnCall] = [(states[0], call["name"], call["arguments"]) for call in spec.examples]
    made: list[tuple[DrawnCall, ToolOutcome]] = []
    for number in range(calls_per_tool + 1):
        calls = [_drawn(spec, tool, draws.one(states), draws) for tool in spec.tools] if number else examples
        # an argument that fits another place may not be of this one's type
        calls = [call for call in calls if _is_allowed(spec, call)]
        for call, outcome in zip(calls, call_tools(spec, calls), strict=True):
            trial.add(call, outcome)
            made.append((call, outcome))
            # later calls begin there too: some tools need what another one has changed
            if outcome.fault is None and outcome.tables != call[0] and len(states) < MAX_STATES:
                states.append(outcome.tables)
    trial.lies += _differences(spec, [(call, outcome) for call, outcome in made if outcome.fault is None])
    return trial


def _differences(spec: VirtualWorld, made: Sequence[tuple[DrawnCall, ToolOutcome]]) -> list[str]:
    """Make calls again in other processes: nothing may depend on time or chance."""
    for start in range(0, len(made), BATCH):
        batch = made[start:start + BATCH]
        again = call_tools(spec, [call for call, _ in batch])
        for ((_, name, arguments), first), second in zip(batch, again, strict=True):
            if second.fault is not None or (first.result, first.tables) != (second.result, second.tables):
                return [f"tool {name}: the same call {written(arguments)[:160]} gives something else"]
    return []


def _ignored(spec: VirtualWorld, tool: str) -> set[str]:
    names = {node.id for node in ast.walk(spec.functions[tool]) if isinstance(node, ast.Name)}
    return set(spec.tools[tool].parameters) - names


def _is_allowed(spec: VirtualWorld, call: DrawnCall) -> bool:
    try:
        spec.tools[call[1]].call(call[2])
    except ToolFault:
        return False
    return True


def _drawn(spec: VirtualWorld, tool: str, tables: Tables, draws: Draws) -> DrawnCall:
    """Return a call with arguments that the tool's types allow, many of them from those that fit."""
    schema = spec.tools[tool].description_for_models()["function"]["parameters"]
    found = {}
    for name, part in schema["properties"].items():
        if name not in schema["required"] and draws.share() < LEFT_OUT:
            continue
        values = fitting_values(spec, tool, name, tables)
        # a tool may change a list that it is given, and the next call would get it
        found[name] = (copy.deepcopy(draws.one(values)) if values and draws.share() < FITTING
                       else _anything(part, draws))
    return tables, tool, found


def fitting_values(spec: VirtualWorld, tool: str, argument: str, tables: Tables) -> list[Any]:
    """Return values that an argument is likely to take: those of the world's examples, and the keys and
    columns of the first tables among which one of those stands, in tables as they are."""
    given = [call["arguments"][argument] for call in spec.examples
             if call["name"] == tool and argument in call["arguments"]]
    found = list(given)
    first = spec.first_tables()
    for table, rows in tables.items():
        if any(isinstance(value, str) and value in first[table] for value in given):
            found += rows
        # in the order of the world: draws must be the same in every process
        for column in dict.fromkeys(column for row in first[table].values() for column in row):
            if any(_is_in(value, [row[column] for row in first[table].values()]) for value in given):
                found += [row[column] for row in rows.values() if row[column] is not None]
    return [value for place, value in enumerate(found) if not _is_in(value, found[:place])]


def _is_in(value: Any, values: Sequence[Any]) -> bool:
    # types too: in Python 1 equals True
    return any(value == one and type(value) is type(one) for one in values)


def _anything(schema: Mapping[str, Any], draws: Draws) -> Any:
    if "anyOf" in schema:
        return _anything(draws.one(schema["anyOf"]), draws)
    if "enum" in schema or "const" in schema:
        return draws.one(schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return [_anything(schema.get("items", {}), draws) for _ in range(draws.below(3))]
    simple: dict[str, tuple[Any, ...]] = {"string": TEXTS, "integer": NUMBERS, "boolean": (True, False),
                                          "number": (*NUMBERS, 0.5), "null": (None,), "object": ({},)}
    return copy.deepcopy(draws.one(simple[schema.get("type", "string")]))


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
                              modules=", ".join(sorted(MODULES)), **asked)[0])
        world = tools if isinstance(tools, str) else {
            **state, "code": tools.get("code"), "examples": tools.get("examples")}
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
                                  modules=", ".join(sorted(MODULES)), **asked)[0])
        yield GeneratedSample({"domain": domain, "world": world}, tuple(verdicts), notes={"repairs": repair})

    def _checked(self, world: Mapping[str, Any], name: str) -> list[SampleVerdict]:
        """Return what is to say of a world; without a sound description nothing more is looked at."""
        if problems := problems_of(world):
            return [SampleVerdict("sound", False, "\n".join(problems))]
        spec, s = world_of(world), self.settings
        trial = tried(world, name, s.calls_per_tool)
        counts = {"tools": (len(spec.tools), MIN_TOOLS),
                  "tools that change a table": (len(trial.changes), MIN_CHANGING_TOOLS),
                  "rows": (sum(len(table.rows) for table in spec.tables.values()), MIN_ROWS)}
        return [SampleVerdict("sound", True),
                _all("honest types", trial.lies),
                _all("every tool comes through", [
                    f"tool {tool}: none of its calls gave a result, also with arguments that fit the tables"
                    for tool in spec.tools if tool not in trial.successes]),
                _all("size", [f"world: has {count} {what}, fewer than {least}"
                              for what, (count, least) in counts.items() if count < least]),
                _all("distinct tools", _alike(spec))]


def _unread(domain: str, why: str) -> GeneratedSample:
    return GeneratedSample({"domain": domain}, (SampleVerdict("form", False, why),))


def _all(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, "\n".join(problems))


def _alike(spec: VirtualWorld) -> list[str]:
    """Return sentences on tools with the description or the code of an earlier one."""
    found, said, done = [], dict[str, str](), dict[str, str]()
    for name, tool in spec.tools.items():
        function = spec.functions[name]
        code = ast.dump(ast.Module([ast.Expr(ast.Constant(ast.dump(function.args))), *function.body[1:]], []))
        # two that say or do the same leave the choice between them to chance
        for known, value, what in ((said, " ".join(tool.description.casefold().split()), "says"),
                                   (done, code, "does")):
            if value in known:
                found.append(f"tool {name}: {what} the same as {known[value]}")
            known.setdefault(value, name)
    return found
