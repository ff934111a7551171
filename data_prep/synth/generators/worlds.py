"""Trial of a virtual world: its tools are called with drawn arguments of their types, on many tables.

Most arguments fit the tables, so that tools give results; the others are anything that the types allow, so
that arguments come to light which a tool allows and fails on.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.generators.drawing import draws_of
from data_prep.synth.replies import NoReply
from megatron_sov.base.documents.messages import BadRecord, refuse_deep
from megatron_sov.judge.rewards.patterns import NO_JSON, json_of
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.judge.tools.environment import InfrastructureFault, ToolFault
from megatron_sov.judge.tools.worlds.virtual import (
    Tables, ToolOutcome, VirtualWorld, call_tools, problems_of, world_of)

MIN_TOOLS, MIN_CHANGING_TOOLS, MIN_ROWS = 4, 2, 6
MAX_STATES = 24
"""Tables that calls begin from."""
FITTING_SHARE, LEFT_OUT_SHARE = 0.7, 0.4
"""Of arguments, those that fit the tables; of optional ones, those that are left out."""
SIMPLE: Mapping[str, Sequence[Any]] = {
    "string": ("alpha", "Zz 9", ""), "integer": (0, 1, 2, 3, 7, -1, 100), "boolean": (True, False),
    "number": (0, 1, 2, 3, 7, -1, 100, 0.5), "null": (None,), "object": ({},)}
WORLD_FAULTS = ("failed", "state")
"""Codes of faults that are the world's own where a call keeps to the types."""
BATCH = 32
"""Calls that are made again together."""
DrawnCall = tuple[Tables, str, dict[str, Any]]
"""Tables, tool, arguments."""


def json_object(reply: str) -> dict[str, Any] | str:
    """Return the JSON object of a reply, with or without words around it, or a sentence about its fault."""
    if getattr(reply, "cut", False):
        return "the answer was cut off at its limit of tokens"
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        found = json_of(reply)
        if found is NO_JSON and 0 <= begin < end:
            found = json_of(reply[begin:end + 1])
        if found is not NO_JSON:
            refuse_deep(found)
            # numbers and characters that the journal cannot hold fail here
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (BadRecord, Refused, ValueError, RecursionError) as e:
        return f"the answer holds no JSON that can be kept ({str(e)[:100]})"
    return found if isinstance(found, dict) else "the answer is no JSON object"


def json_text(value: Any) -> str:
    """Return a value as JSON, in the order of its keys."""
    return json.dumps(value, ensure_ascii=False)


def world_verdicts(world: Mapping[str, Any], name: str, calls_per_tool: int) -> list[SampleVerdict]:
    """Return the verdicts on a world; of one without a sound description the first alone.

    Args:
        world: its description.
        name: of the stream that arguments are drawn from.
        calls_per_tool: drawn calls, beside the world's examples.

    Raises:
        NoReply: the sandbox failed: the item is made again.
    """
    if problems := problems_of(world):
        return [_verdict("sound", problems)]
    spec = world_of(world)
    trial = Trial(spec, draws_of("trial", name))
    try:
        trial.run(calls_per_tool)
    except InfrastructureFault as e:
        raise NoReply(e.reason) from None
    counts = (("tools", len(spec.tools), MIN_TOOLS),
              ("tools that change a table", len(trial.changing), MIN_CHANGING_TOOLS),
              ("rows", sum(len(table.rows) for table in spec.tables.values()), MIN_ROWS))
    return [
        _verdict("sound", []),
        _verdict("honest types", [*trial.unused_arguments(), *trial.faults.values()]),
        _verdict("every tool comes through", [
            f"tool {tool}: none of its calls gave a result, also with arguments that fit the tables"
            for tool in spec.tools if tool not in trial.successful]),
        _verdict("size", [f"world: has {count} {what}, fewer than {least}"
                          for what, count, least in counts if count < least]),
        _verdict("distinct tools", _repeated_tools(spec))]


def _verdict(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, "\n".join(problems))


def _repeated_tools(spec: VirtualWorld) -> list[str]:
    """Return a sentence for each tool with the description or the code of an earlier one, which leaves the
    choice between them to chance."""
    found, known = [], dict[str, str]()
    for name, tool in spec.tools.items():
        function = spec.functions[name]
        code = ast.dump(ast.Module([ast.Expr(ast.Constant(ast.dump(function.args))), *function.body[1:]], []))
        for what, value in (("says", " ".join(tool.description.casefold().split())), ("does", code)):
            if value in known:
                found.append(f"tool {name}: {what} the same as {known[value]}")
            known.setdefault(value, name)
    return found


@dataclass
class Trial:
    """Calls of a world's tools, and their outcome."""

    spec: VirtualWorld
    draws: Random
    successful: set[str] = field(default_factory=set)
    """Tools of which a call gave a result."""
    changing: set[str] = field(default_factory=set)
    """Tools of which a call changed a table."""
    faults: dict[str, str] = field(default_factory=dict)
    """Tool -> a call that its types allow and the tool or its world does not, or that cannot be made again."""

    def run(self, calls_per_tool: int) -> None:
        """Make the world's examples, and then so many drawn calls of each tool."""
        states = [self.spec.first_tables()]
        calls: list[DrawnCall] = [(states[0], call["name"], call["arguments"]) for call in self.spec.examples]
        made: list[tuple[DrawnCall, ToolOutcome]] = []
        for _ in range(calls_per_tool + 1):
            # an argument that fits another place may not be of this one's type
            calls = [call for call in calls if self._is_allowed(call)]
            for call, outcome in zip(calls, call_tools(self.spec, calls), strict=True):
                self._add(call, outcome)
                if outcome.fault is not None:
                    continue
                made.append((call, outcome))
                # later calls begin there too: some tools need what another one has changed
                if outcome.tables != call[0] and len(states) < MAX_STATES:
                    states.append(outcome.tables)
            calls = [self._draw_call(tool, self.draws.choice(states)) for tool in self.spec.tools]
        self._repeat(made)

    def unused_arguments(self) -> list[str]:
        """Return a sentence for each argument that the code of its tool does not read."""
        found = []
        for tool, function in self.spec.functions.items():
            used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            found += [f"tool {tool}: nothing uses its argument {argument}"
                      for argument in sorted(set(self.spec.tools[tool].parameters) - used)]
        return found

    def _add(self, call: DrawnCall, outcome: ToolOutcome) -> None:
        tables, name, arguments = call
        if outcome.fault is None:
            self.successful.add(name)
            if outcome.tables != tables:
                self.changing.add(name)
        elif outcome.fault.code in WORLD_FAULTS:
            self.faults.setdefault(name, f"tool {name}: its types allow {json_text(arguments)[:160]}, and "
                                         f"the call {outcome.fault.reason}")

    def _repeat(self, made: Sequence[tuple[DrawnCall, ToolOutcome]]) -> None:
        """Make calls again in other processes: nothing may depend on time or chance."""
        for start in range(0, len(made), BATCH):
            batch = made[start:start + BATCH]
            again = call_tools(self.spec, [call for call, _ in batch])
            for ((_, name, arguments), first), second in zip(batch, again, strict=True):
                if second.fault is not None or (first.result, first.tables) != (second.result, second.tables):
                    self.faults.setdefault(
                        name, f"tool {name}: the same call {json_text(arguments)[:160]} gives something else")

    def _is_allowed(self, call: DrawnCall) -> bool:
        try:
            self.spec.tools[call[1]].call(call[2])
        except ToolFault:
            return False
        return True

    def _draw_call(self, tool: str, tables: Tables) -> DrawnCall:
        """Return a call with arguments that the tool's types allow, many of which fit the tables."""
        schema = self.spec.tools[tool].description_for_models()["function"]["parameters"]
        found = {}
        for name, part in schema["properties"].items():
            if name not in schema["required"] and self.draws.random() < LEFT_OUT_SHARE:
                continue
            fitting = fitting_values(self.spec, tool, name, tables)
            # a tool may change a list that it is given, and the next call would get it
            found[name] = (copy.deepcopy(self.draws.choice(fitting))
                           if fitting and self.draws.random() < FITTING_SHARE else self._any_value(part))
        return tables, tool, found

    def _any_value(self, schema: Mapping[str, Any]) -> Any:
        if "anyOf" in schema:
            return self._any_value(self.draws.choice(schema["anyOf"]))
        if "enum" in schema or "const" in schema:
            return self.draws.choice(schema.get("enum") or [schema["const"]])
        if schema.get("type") == "array":
            return [self._any_value(schema.get("items", {})) for _ in range(self.draws.randrange(3))]
        return copy.deepcopy(self.draws.choice(SIMPLE[schema.get("type", "string")]))


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
        for column in sorted({column for row in first[table].values() for column in row}):
            if any(_is_in(value, [row[column] for row in first[table].values()]) for value in given):
                found += [row[column] for row in rows.values() if row[column] is not None]
    return [value for place, value in enumerate(found) if not _is_in(value, found[:place])]


def _is_in(value: Any, values: Sequence[Any]) -> bool:
    # types too: in Python 1 equals True
    return any(value == one and type(value) is type(one) for one in values)
