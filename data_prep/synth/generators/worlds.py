"""Checks of virtual worlds and of tasks in them.

A world is tried out: its tools are called with drawn arguments of their types, on many tables.  Most of them
fit the tables, so that tools give results; the others are anything that the types allow, which shows what a
tool allows and fails on.  The goal of a task is the end that its reference calls lead to.
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
from megatron_sov.base.documents.messages import BadRecord, check_depth
from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.patterns import NO_JSON, parse_json
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.judge.tools.environment import InfrastructureFault, ToolFault
from megatron_sov.judge.tools.worlds.goals import contains_words, normalize_text
from megatron_sov.judge.tools.worlds.virtual import (
    CallOutcome, Tables, Virtual, VirtualWorld, call_tools, find_world_problems, read_world)

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
DRAFT_FIELDS = {"question", "calls", "answers"}
"""Of a task that a model wrote."""
DrawnCall = tuple[Tables, str, dict[str, Any]]
"""Tables, tool, arguments."""


def json_object(reply: str) -> dict[str, Any] | str:
    """Return the JSON object of a reply, with or without words around it, or a sentence about its fault."""
    if getattr(reply, "cut", False):
        return "the answer was cut off at its limit of tokens"
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        found = parse_json(reply)
        if found is NO_JSON and 0 <= begin < end:
            found = parse_json(reply[begin:end + 1])
        if found is not NO_JSON:
            check_depth(found)
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
    if problems := find_world_problems(world):
        return [_verdict("sound", problems)]
    spec = read_world(world)
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
        try:
            code = ast.dump(ast.Module([ast.Expr(ast.Constant(ast.dump(function.args))), *function.body[1:]],
                                       []))
        except RecursionError:
            found.append(f"tool {name}: is nested too deeply")
            continue
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
    """Tool -> a call that its types allow and the tool or its world does not, or that has two results."""

    def run(self, calls_per_tool: int) -> None:
        """Make the world's examples, and then so many drawn calls of each tool."""
        states = [self.spec.copy_first_tables()]
        calls: list[DrawnCall] = [(states[0], call["name"], call["arguments"]) for call in self.spec.examples]
        made: list[tuple[DrawnCall, CallOutcome]] = []
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

    def _add(self, call: DrawnCall, outcome: CallOutcome) -> None:
        tables, name, arguments = call
        if outcome.fault is None:
            self.successful.add(name)
            if outcome.tables != tables:
                self.changing.add(name)
        elif outcome.fault.code in WORLD_FAULTS:
            self.faults.setdefault(name, f"tool {name}: its types allow {json_text(arguments)[:160]}, and "
                                         f"the call {outcome.fault.reason}")

    def _repeat(self, made: Sequence[tuple[DrawnCall, CallOutcome]]) -> None:
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
        schema = self.spec.tools[tool].describe_for_models()["function"]["parameters"]
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
    first = spec.copy_first_tables()
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


def task_problem(task: Mapping[str, Any]) -> str:
    """Return why a task is none of a virtual world; empty: it is one."""
    try:
        Virtual().reset(task)
    except UserError as e:
        return str(e)
    return ""


def draft_problem(draft: Any) -> str:
    """Return why an object is no draft of a task; empty: it is one."""
    if not isinstance(draft, Mapping):
        return str(draft)
    if unknown := sorted(set(draft) - DRAFT_FIELDS):
        return f"has {unknown[0][:40]!r} beside {', '.join(sorted(DRAFT_FIELDS))}"
    question, calls, answers = draft.get("question"), draft.get("calls"), draft.get("answers", [])
    if not isinstance(question, str) or not question.strip():
        return "question must be text"
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        return "answers must be a list of texts"
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        return "calls must be a list of objects with name and arguments"
    return ""


def _is_call(call: Any) -> bool:
    return (isinstance(call, dict) and set(call) == {"name", "arguments"} and isinstance(call["name"], str)
            and isinstance(call["arguments"], dict))


def task_verdicts(task: Mapping[str, Any], min_calls: int, max_calls: int) -> list[SampleVerdict]:
    """Return the verdicts on a task; of one whose calls are refused the first alone.

    Args:
        task: of `virtual`, whose world is sound and whose goal has the form of a draft.
        min_calls: of the reference.
        max_calls: of the reference.

    Raises:
        NoReply: the sandbox failed: the item is made again.
    """
    calls, answers = task["goal"]["calls"], task["goal"]["answers"]
    virtual = Virtual()
    # without the goal: the end that the calls lead to is the goal
    virtual.reset({**task, "goal": {}})
    first, changing = virtual.snapshot(), []
    for place, call in enumerate(calls):
        before = virtual.snapshot()
        try:
            virtual.call(call["name"], call["arguments"])
        except InfrastructureFault as e:
            raise NoReply(e.reason) from None
        except ToolFault as e:
            return [SampleVerdict("reachable goal", False, f"call {place + 1}: {e.reason}")]
        if virtual.snapshot() != before:
            changing.append(place)
    question = normalize_text(task["question"])
    told = [] if changing else [answer for answer in answers
                                if contains_words(question, normalize_text(answer))]
    tools = [name for name in virtual.tools_by_name if "_" in name and name.casefold() in question]
    idle = _idle_calls(virtual, first, calls, changing) if changing or answers else (
        "the calls change nothing, and nothing has to be said")
    return [
        SampleVerdict("reachable goal", True),
        SampleVerdict("goal not reached yet", not idle, idle),
        SampleVerdict("number of calls", min_calls <= len(calls) <= max_calls, f"{len(calls)}"),
        SampleVerdict("answers from tools", not told, f"the question says {', '.join(told)[:60]!r}"),
        SampleVerdict("question names no tools", not tools, ", ".join(tools))]


def _idle_calls(virtual: Virtual, first: Any, calls: Sequence[Mapping[str, Any]],
                changing: Sequence[int]) -> str:
    """Return how fewer calls lead to the same end; empty: none do.

    Args:
        virtual: at the end of all calls.
        first: its state before them.
        calls: of the reference.
        changing: places of the calls that change a table.
    """
    end = _compared(virtual)
    for left_out in changing:
        virtual.restore(first)
        for call in (*calls[:left_out], *calls[left_out + 1:]):
            try:
                virtual.call(call["name"], call["arguments"])
            except InfrastructureFault as e:
                raise NoReply(e.reason) from None
            except ToolFault:  # it needs what the call that is left out has changed
                continue
        if _compared(virtual) == end:
            return f"the goal is reached without call {left_out + 1} ({calls[left_out]['name']})"
    virtual.restore(first)
    if changing and _compared(virtual) == end:
        return "the calls undo each other: the tables are as they were at first"
    return ""


def _compared(virtual: Virtual) -> dict[str, Any]:
    return {table: virtual.project_rows(table, rows) for table, rows in virtual.state.items()}
